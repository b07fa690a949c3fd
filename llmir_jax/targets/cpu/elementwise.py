"""Elementwise operations as instructions on lanes."""

from collections.abc import Callable
from typing import Any

import numpy as np
from xdsl.ir import Operation
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects import stablehlo_ext
from llmir_jax.dialects.build import dtype_of, scalar_constant
from llmir_jax.targets.cpu import elementary
from llmir_jax.targets.cpu.halves import narrow, widen
from llmir_jax.targets.cpu.llvm import Function, Value, constant, element_of, lanes_of, vector

ELEMENTS = {
    "float32": "float",
    "bfloat16": "float",
    "float16": "float",
    "int8": "i32",
    "uint8": "i32",
    "int32": "i32",
    "uint32": "i32",
    "int64": "i64",
    "bool": "i1",
}
"""LLVM types that values are computed in, by dtype."""
STORED_ONLY = ("int8", "uint8", "uint32", "int64")
"""Dtypes that are read, converted and laid out, but not computed with."""
FLOATS = ("float32", "bfloat16", "float16")
_HALF_NAMES = {"bfloat16": "bfloat", "float16": "half"}
_STORED = {**_HALF_NAMES, "bool": "i8", "int8": "i8", "uint8": "i8"}
"""LLVM types in memory, where they are others."""


def memory_element(dtype: np.dtype[Any]) -> str:
    """LLVM type of a dtype in memory that others read or write."""
    return _STORED.get(dtype.name, ELEMENTS[dtype.name])


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether it is computed in float32."""
    return dtype.name in FLOATS


def loaded(f: Function, x: Value, dtype: np.dtype[Any]) -> Value:
    """Lanes from memory as they are computed with."""
    if element_of(x.type) == "i8":
        wide = {"bool": ("trunc", "i1"), "int8": ("sext", "i32"), "uint8": ("zext", "i32")}[dtype.name]
        return f.cast(wide[0], x, wide[1])
    return widen(f, x)


def storable(f: Function, x: Value, element: str) -> Value:
    """Lanes as an element type in memory."""
    source = element_of(x.type)
    if element == "i8":
        return f.cast("zext" if source == "i1" else "trunc", x, "i8")
    return narrow(f, x, element)


def rounded(f: Function, x: Value, dtype: np.dtype[Any]) -> Value:
    """float32 lanes rounded to the floats of a dtype."""
    half = _HALF_NAMES.get(dtype.name)
    return x if half is None else widen(f, narrow(f, x, half))


def _negate(f: Function, x: Value) -> Value:
    if element_of(x.type) == "float":
        return f.emit(x.type, f"fneg {x.type} {x.ref}")
    return f.emit(x.type, f"sub {x.type} zeroinitializer, {x.ref}" if x.type[0] == "<" else f"sub {x.type} 0, {x.ref}")


def _like(x: Value, value: float) -> Value:
    return constant(element_of(x.type), value, lanes_of(x.type))


def _rsqrt(f: Function, x: Value) -> Value:
    return f.binary("fdiv", _like(x, 1.0), f.overloaded("llvm.sqrt", [x]))


def _sign(f: Function, x: Value) -> Value:
    if element_of(x.type) != "float":
        negative = f.select(f.compare("slt", x, _like(x, 0)), _like(x, -1), _like(x, 0))
        return f.select(f.compare("sgt", x, _like(x, 0)), _like(x, 1), negative)
    one = f.overloaded("llvm.copysign", [_like(x, 1.0), x])
    return f.select(f.fcompare("one", x, _like(x, 0.0)), one, x)


def _expm1(f: Function, x: Value) -> Value:
    # Kahan: the error of u cancels between (u - 1) and log(u)
    u = elementary.exp(f, x)
    less = f.binary("fsub", u, _like(x, 1.0))
    y = f.binary("fmul", less, f.binary("fdiv", x, elementary.log(f, u)))
    y = f.select(f.fcompare("oeq", u, _like(x, 1.0)), x, y)
    y = f.select(f.fcompare("oeq", less, _like(x, -1.0)), less, y)
    return f.select(f.fcompare("ogt", x, _like(x, 88.0)), u, y)


def _log1p(f: Function, x: Value) -> Value:
    u = f.binary("fadd", x, _like(x, 1.0))
    y = f.binary("fmul", elementary.log(f, u), f.binary("fdiv", x, f.binary("fsub", u, _like(x, 1.0))))
    y = f.select(f.fcompare("oeq", u, _like(x, 1.0)), x, y)
    return f.select(f.fcompare("oeq", x, _like(x, float("inf"))), x, y)


def _abs(f: Function, x: Value) -> Value:
    if element_of(x.type) == "float":
        return f.overloaded("llvm.fabs", [x])
    return f.select(f.compare("slt", x, _like(x, 0)), _negate(f, x), x)


_UNARY: dict[type[Operation], Callable[[Function, Value], Value]] = {
    stablehlo.AbsOp: _abs,
    stablehlo.NegateOp: _negate,
    stablehlo.ExponentialOp: elementary.exp,
    stablehlo.ExponentialMinusOneOp: _expm1,
    stablehlo.LogOp: elementary.log,
    stablehlo.LogPlusOneOp: _log1p,
    stablehlo.LogisticOp: elementary.logistic,
    stablehlo.TanhOp: elementary.tanh,
    stablehlo.RsqrtOp: _rsqrt,
    stablehlo.SqrtOp: lambda f, x: f.overloaded("llvm.sqrt", [x]),
    stablehlo.SineOp: lambda f, x: elementary.sine_or_cosine(f, x, quarter=0),
    stablehlo.CosineOp: lambda f, x: elementary.sine_or_cosine(f, x, quarter=1),
    stablehlo.FloorOp: lambda f, x: f.overloaded("llvm.floor", [x]),
    stablehlo.CeilOp: lambda f, x: f.overloaded("llvm.ceil", [x]),
    stablehlo.RoundNearestEvenOp: lambda f, x: f.overloaded("llvm.roundeven", [x]),
    stablehlo.RoundNearestAfzOp: lambda f, x: f.overloaded("llvm.round", [x]),
    stablehlo.SignOp: _sign,
    stablehlo.IsFiniteOp: lambda f, x: f.fcompare("olt", f.overloaded("llvm.fabs", [x]), _like(x, float("inf"))),
    stablehlo.NotOp: lambda f, x: f.binary("xor", x, _like(x, 1 if element_of(x.type) == "i1" else -1)),
    stablehlo_ext.ErfOp: elementary.erf,
    stablehlo_ext.ErfcOp: lambda f, x: f.binary("fsub", _like(x, 1.0), elementary.erf(f, x)),
    stablehlo_ext.SquareOp: lambda f, x: f.binary("fmul", x, x),
}
_ANY_NUMBER = (stablehlo.AbsOp, stablehlo.NegateOp, stablehlo.NotOp, stablehlo.SignOp)
_FLOAT_ONLY = tuple(kind for kind in _UNARY if kind not in _ANY_NUMBER)
# (of floats, of integers, of booleans)
_BINARY: dict[type[Operation], tuple[str | None, str | None, str | None]] = {
    stablehlo.AddOp: ("fadd", "add", "or"),
    stablehlo.SubtractOp: ("fsub", "sub", None),
    stablehlo.MultiplyOp: ("fmul", "mul", "and"),
    stablehlo.DivideOp: ("fdiv", "sdiv", None),
    stablehlo.RemainderOp: ("frem", "srem", None),
    stablehlo.MaximumOp: ("llvm.maximum", "llvm.smax", "or"),
    stablehlo.MinimumOp: ("llvm.minimum", "llvm.smin", "and"),
    stablehlo.AndOp: (None, "and", "and"),
    stablehlo.OrOp: (None, "or", "or"),
    stablehlo.XorOp: (None, "xor", "xor"),
}
_PREDICATES = {
    "EQ": ("oeq", "eq"),
    "NE": ("une", "ne"),
    "LT": ("olt", "slt"),
    "LE": ("ole", "sle"),
    "GT": ("ogt", "sgt"),
    "GE": ("oge", "sge"),
}


def elementwise(f: Function, op: Operation, operands: list[Value]) -> Value:
    """The result of an elementwise operation."""
    if type(op) in _UNARY:
        return _UNARY[type(op)](f, operands[0])
    element = element_of(operands[0].type)
    if type(op) in _BINARY:
        name = _BINARY[type(op)][0 if element == "float" else 2 if element == "i1" else 1]
        assert name is not None
        if name in ("sdiv", "srem"):
            return _integer_division(f, name, operands)
        return f.overloaded(name, operands) if "." in name else f.binary(name, operands[0], operands[1])
    if isinstance(op, stablehlo.SelectOp):
        return f.select(*operands)
    if isinstance(op, stablehlo.CompareOp):
        predicates = _PREDICATES[op.comparison_direction.data.value]
        a, b = operands
        if element == "i1":
            a, b = (f.cast("zext", x, "i32") for x in operands)
        return f.fcompare(predicates[0], a, b) if element == "float" else f.compare(predicates[1], a, b)
    if isinstance(op, stablehlo.ClampOp):
        low, x, high = operands
        names = ("llvm.maximum", "llvm.minimum") if element == "float" else ("llvm.smax", "llvm.smin")
        return f.overloaded(names[1], [f.overloaded(names[0], [x, low]), high])
    if isinstance(op, stablehlo.PowerOp):
        return _power(f, op, operands)
    assert isinstance(op, stablehlo.ConvertOp), op
    source, dtype = (dtype_of(value) for value in (op.operands[0], op.results[0]))
    return rounded(f, _convert(f, operands[0], source, dtype), dtype)


def _integer_division(f: Function, name: str, operands: list[Value]) -> Value:
    """As XLA has it where C has none: x / 0 = -1, x mod 0 = x, and no trap at the least integer by -1."""
    x, y = operands
    is_zero, is_minus = f.compare("eq", y, _like(y, 0)), f.compare("eq", y, _like(y, -1))
    safe = f.select(f.binary("or", is_zero, is_minus), _like(y, 1), y)
    result = f.binary(name, x, safe)
    if name == "sdiv":
        result = f.select(is_minus, _negate(f, x), result)
        return f.select(is_zero, _like(x, -1), result)
    result = f.select(is_minus, _like(x, 0), result)
    return f.select(is_zero, x, result)


def _small_power(op: stablehlo.PowerOp) -> int | None:
    """The exponent, where it is a small whole number."""
    exponent = scalar_constant(op.operands[1])
    if exponent is None or not np.isfinite(exponent) or float(exponent) % 1 or not 0 <= float(exponent) <= 8:
        return None
    return int(exponent)


def _power(f: Function, op: stablehlo.PowerOp, operands: list[Value]) -> Value:
    exponent = _small_power(op)
    x = operands[0]
    if exponent is None:
        return f.overloaded("llvm.pow", operands)  # the library's, element by element
    y = _like(x, 1.0)
    for _ in range(exponent):
        y = f.binary("fmul", y, x)
    return y


def _convert(f: Function, x: Value, source_dtype: np.dtype[Any], dtype: np.dtype[Any]) -> Value:
    source, element = element_of(x.type), ELEMENTS[dtype.name]
    is_signed = source_dtype.kind == "i"
    if source == element:
        return x
    if source == "float":
        if element == "i1":
            return f.fcompare("une", x, _like(x, 0.0))
        lanes = lanes_of(x.type)
        suffix = f"v{lanes}{element}.v{lanes}f32" if lanes > 1 else f"{element}.f32"
        name = "llvm.fptosi.sat" if dtype.kind == "i" else "llvm.fptoui.sat"
        return f.intrinsic(f"{name}.{suffix}", vector(element, lanes), [x])
    if element == "float":
        return f.cast("sitofp" if is_signed else "uitofp", x, element)
    if element == "i1":
        return f.compare("ne", x, _like(x, 0))
    order = ["i1", "i32", "i64"]
    if order.index(element) < order.index(source):
        return f.cast("trunc", x, element)
    return f.cast("sext" if is_signed else "zext", x, element)


def elementwise_reason(op: Operation) -> str | None:
    """Why an operation is not computed element by element; None if it is. Empty if there is nothing more to say."""
    kind = "float32" if not op.operands else dtype_of(op.operands[0]).name
    if type(op) in _FLOAT_ONLY and kind not in FLOATS:
        return f"of {kind}"
    if type(op) in _BINARY:
        name = _BINARY[type(op)][0 if kind in FLOATS else 2 if kind == "bool" else 1]
        return None if name is not None else f"of {kind}"
    if isinstance(op, stablehlo.PowerOp):
        return None if kind in FLOATS else f"of {kind}"
    if isinstance(op, stablehlo.ConvertOp) and dtype_of(op.results[0]).itemsize == 1 and kind not in ("bool", "int8"):
        return None if dtype_of(op.results[0]).name == "bool" else f"to {dtype_of(op.results[0]).name}"
    if type(op) in _UNARY or isinstance(
        op, stablehlo.SelectOp | stablehlo.CompareOp | stablehlo.ClampOp | stablehlo.ConvertOp
    ):
        return None
    return ""


__all__ = [
    "ELEMENTS",
    "FLOATS",
    "STORED_ONLY",
    "elementwise",
    "elementwise_reason",
    "is_float",
    "loaded",
    "memory_element",
    "rounded",
    "storable",
]
