"""Modules that went through xDSL give the results of the originals, bit for bit."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from xdsl.dialects import func
from xdsl.dialects import test as xdsl_test
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    DenseIntOrFPElementsAttr,
    FunctionType,
    ModuleOp,
    StringAttr,
    TensorType,
    f32,
    i32,
)
from xdsl.ir import Block, Region
from xdsl.parser import Parser
from xdsl_jax.dialects import stablehlo

from llmir_jax.dense import dense_from_numpy, dense_to_numpy, dtype_element_type, element_dtype
from llmir_jax.dialects.stablehlo_ext import DynamicUpdateSliceOp, ErfOp, TopKOp
from llmir_jax.errors import InvalidIRError, LlmirError
from llmir_jax.interop import LOC, call_module, cleanup, lower_to_module, op_name
from llmir_jax.mlir_export import export_module
from llmir_jax.mlir_import import import_module, make_context

DTYPES = [
    np.bool_,
    *(ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.int4, ml_dtypes.uint4),
    *(np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64),
    *(np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128),
    *(ml_dtypes.float8_e3m4, ml_dtypes.float8_e4m3, ml_dtypes.float8_e4m3b11fnuz, ml_dtypes.float8_e4m3fn),
    *(ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu),
    *(ml_dtypes.float4_e2m1fn, ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)


def lower(fn: Callable[..., Any], *args: Any) -> ir.Module:
    return jax.jit(fn, keep_unused=True).lower(*args).compiler_ir("stablehlo")


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes()


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bits(a) == bits(b)


def assert_round_trip(fn: Callable[..., Any], *args: Any) -> ModuleOp:
    """Executes `fn` through xDSL; returns its module."""
    expected = jax.tree.leaves(jax.jit(fn)(*args))
    module = import_module(lower(fn, *args))
    module.verify()
    assert_same(call_module(module, *jax.tree.leaves(args)), expected)
    return module


def op_names(module: ModuleOp) -> set[str]:
    return {op_name(op) for op in module.walk()}


# Random modules ------------------------------------------------------------------------------------------------------

FLOATS = (jnp.float32, jnp.float16, jnp.bfloat16)
UNARY = (
    jnp.tanh,
    jnp.abs,
    jnp.negative,
    partial(jnp.cumsum, axis=0),
    lambda x: jnp.flip(x, -1),
    lambda x: x.T,
    jnp.sort,
    jax.nn.relu,
)
BINARY = (jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, jnp.minimum, lambda x, y: jnp.where(x > y, x, y))
CASTS = (*FLOATS, jnp.int32, jnp.int8, jnp.uint16, jnp.bool_)

step = st.one_of(
    st.tuples(st.just("unary"), st.sampled_from(UNARY), st.integers(0, 99)),
    st.tuples(st.just("binary"), st.sampled_from(BINARY), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.just("cast"), st.sampled_from(CASTS), st.integers(0, 99)),
    st.tuples(st.just("constant"), st.sampled_from(CASTS), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("scan"), st.sampled_from(BINARY), st.integers(0, 99)),
    st.tuples(st.just("matmul"), st.just(None), st.integers(0, 99), st.integers(0, 99)),
)


def run_dag(steps: list[tuple[Any, ...]], x: jax.Array) -> list[jax.Array]:
    """A list of [3, 3] values, each made from earlier ones."""
    values = [x]
    for kind, op, *picks in steps:
        a = values[picks[0] % len(values)]
        b = values[picks[-1] % len(values)]
        if kind == "unary":
            values.append(jnp.broadcast_to(op(a.astype(jnp.int8) if a.dtype == jnp.bool_ else a), (3, 3)))
        elif kind == "binary":
            values.append(op(a, b) if jnp.bool_ not in (a.dtype, b.dtype) else jnp.logical_xor(a, b))
        elif kind == "cast":
            values.append(a.astype(op))
        elif kind == "constant":
            values.append(jnp.asarray(np.random.default_rng(picks[0]).integers(-3, 4, (3, 3)).astype(op)))
        elif kind == "scan":
            f = a.astype(jnp.float32)
            values.append(lax.scan(lambda c, row, op=op: (op(c, row), c), f, f)[0])
        else:
            values.append(a.astype(jnp.float32) @ b.astype(jnp.float32))
    return values[1:]


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(step, min_size=1, max_size=12), dtype=st.sampled_from(CASTS), seed=st.integers(0, 2**32 - 1))
def test_random_modules_give_the_same_bits(steps: list[Any], dtype: Any, seed: int) -> None:
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 3)) * 3).astype(dtype)
    assert_round_trip(partial(run_dag, steps), x)


# Features ------------------------------------------------------------------------------------------------------------

X = np.linspace(-2, 2, 24, dtype=np.float32).reshape(4, 6)
I = np.arange(6, dtype=np.int32)  # noqa: E741


def composite_gelu(x: jax.Array) -> jax.Array:
    return lax.composite(lambda x, *, c: jax.nn.gelu(x) * c, "llmir.gelu", version=2)(x, c=np.float32(1.5))


@jax.custom_jvp
def custom_square(x: jax.Array) -> jax.Array:
    return x * x


custom_square.defjvp(lambda primals, tangents: (custom_square(*primals), 3.0 * tangents[0]))


def nested_loops(x: jax.Array) -> jax.Array:
    def body(i: jax.Array, c: jax.Array) -> jax.Array:
        return lax.while_loop(lambda s: s.sum() < 10, lambda s: s + 1 + i, c)

    return lax.fori_loop(0, 3, body, x)


FEATURES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "scan": (lambda x, w: lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, w), (X, np.ones((3, 6, 6), np.float32))),
    "while": (nested_loops, (X,)),
    "cond": (lambda x: lax.cond(x.sum() > 0, jnp.sin, lambda x: (x * 2).cumsum(1), x), (X,)),
    "switch": (lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x), (np.int32(2), X)),
    "sort": (lambda x: (jnp.sort(x, 0), jnp.argsort(x, 1), lax.sort((x, -x), num_keys=2)), (X,)),
    "top_k": (lambda x: lax.top_k(x, 3), (X,)),
    "conv": (
        lambda x, w: lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (np.ones((1, 5, 6, 2), np.float32), np.ones((3, 2, 2, 4), np.float32)),
    ),
    "gather": (lambda x, i: (x[:, i % 6], x[i % 4], jnp.take(x, i, axis=1, mode="fill")), (X, I)),
    "scatter": (lambda x, i: (x.at[i % 4].add(1.0), x.at[:, i].set(i * 1.0), x.at[i % 4].max(0.5)), (X, I)),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i, 1), (2, 3)), (X, np.int32(1))),
    "dynamic_update_slice": (lambda x, i: lax.dynamic_update_slice(x, x[:2, :2], (i, 1)), (X, np.int32(7))),
    "reduce_window": (
        lambda x: (jnp.cumsum(x, 1), lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 2), "SAME")),
        (X,),
    ),
    "reverse": (lambda x: jnp.flip(x, (0, 1)), (X,)),
    "reduce": (lambda x: (x.sum(), x.max(1), x.prod(0), jnp.argmin(x, 1), (x > 0).all(), (x > 0).any(0)), (X,)),
    "fft": (lambda x: (jnp.fft.fft(x), jnp.fft.irfft(jnp.fft.rfft(x))), (X,)),
    "complex": (lambda x: (jnp.exp(1j * x).real, lax.complex(x, x) * (2 - 1j), jnp.abs(x + 1j)), (X,)),
    "random": (lambda key: jax.random.normal(jax.random.wrap_key_data(key), (3, 5)), (np.array([0, 7], np.uint32),)),
    "rng_bit_generator": (lambda key: lax.rng_bit_generator(key, (4, 3)), (np.arange(4, dtype=np.uint32),)),
    "chlo": (lambda x: (lax.erf(x), lax.erfc(x), lax.lgamma(x), lax.digamma(x), jnp.sinh(x), jnp.tan(x)), (X,)),
    "composite": (composite_gelu, (X,)),
    "custom_jvp": (jax.grad(lambda x: custom_square(x).sum()), (X,)),
    "remat": (jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x).sum()), (X,)),
    "inner jit": (lambda x: jax.jit(jnp.sin)(x) + jax.jit(jnp.sin)(x + 1), (X,)),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, jnp.int32) >> 3, (X,)),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 5, 4), (X,)),
    "barrier": (lambda x: lax.optimization_barrier((x + 1, x * 2)), (X,)),
    "clamp, pad, concat": (lambda x: jnp.pad(jnp.concatenate([lax.clamp(0.0, x, 1.0), x]), 2), (X,)),
    "pad": (lambda x, i: (jnp.pad(i, 1), lax.pad(x, 1.0, ((-1, 2, 0), (0, 0, 1)))), (X, I)),
    "compare": (lambda x, i: (x < 1, i == i[:1], lax.sort(x), lax.eq(x + 1j, x * 1j), x > jnp.nan), (X, I)),
    "einsum": (lambda x: jnp.einsum("ab,cb->acb", x, x, precision="highest"), (X,)),
    "cholesky": (lambda x: jnp.linalg.cholesky(x @ x.T + 5 * jnp.eye(4)), (X,)),
    "softmax with -inf": (lambda x: jax.nn.softmax(jnp.where(x > 0, x, -jnp.inf), axis=1), (X,)),
    "zero-size": (lambda x: jnp.concatenate([x[:0], jnp.zeros((0, 6)), x]), (X,)),
    "bf16 constants": (
        lambda x: x.astype(jnp.bfloat16) * np.asarray([1.01, 2, 3, 4, 5, -0.0], ml_dtypes.bfloat16),
        (X,),
    ),
    "unicode scope": (lambda x: jax.named_call(jnp.sin, name="é→λ")(x), (X,)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_feature_gives_the_same_bits(name: str) -> None:
    fn, args = FEATURES[name]
    assert_round_trip(fn, *args)


@pytest.mark.parametrize("name", FEATURES)
def test_module_is_unchanged_by_a_round_trip(name: str) -> None:
    fn, args = FEATURES[name]
    module = lower(fn, *args)
    assert str(export_module(import_module(module), module.context)) == str(module)


def test_sharding_annotations_survive() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    fn = jax.jit(lambda x: lax.with_sharding_constraint(x * 2, sharding), in_shardings=sharding, out_shardings=sharding)
    module = fn.lower(X).compiler_ir("stablehlo")
    exported = export_module(import_module(module), module.context)
    assert str(exported) == str(module)
    assert "sharding" in str(exported)
    assert_same(call_module(import_module(module), X), [fn(X)])


def test_donated_argument() -> None:
    fn = jax.jit(lambda x, y: (x + y, y), donate_argnums=0)
    module = import_module(fn.lower(X, X).compiler_ir("stablehlo"))
    assert_same(call_module(module, X, X), [X + X, X])
    outer = jax.jit(lambda x, y: call_module(module, x, y)[0], donate_argnums=0)
    x = jnp.asarray(X)
    assert_same([outer(x, X)], [X + X])
    assert x.is_deleted()


# Constants -----------------------------------------------------------------------------------------------------------


def random_elements(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Random bit patterns of the dtype: infinities, NaNs with payloads, subnormals and minus zero among them."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    narrow = {"2": 2, "4": 4, "6": 6}.get(next((c for c in dtype.name if c.isdigit()), ""), 8)
    if narrow < 8 and dtype.itemsize == 1:
        patterns = rng.integers(0, 2**narrow, shape).astype(np.uint8)
        return patterns.view(dtype) if dtype.name.startswith("float") else patterns.astype(dtype)
    return np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)


def constant_of(module: ModuleOp) -> DenseIntOrFPElementsAttr:
    (constant,) = [op for op in module.walk() if isinstance(op, stablehlo.ConstantOp)]
    return constant.value


@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4), (5, 41)], ids=str)
def test_constant_of_every_dtype_is_exact(dtype: Any, shape: tuple[int, ...]) -> None:
    array = random_elements(dtype, shape, seed=len(shape))
    with jax.enable_x64(True):
        context = mlir.make_ir_context()
        with context, ir.Location.unknown():
            attr = mlir.ir_attribute(array)
            module = ir.Module.parse("module {}")
            with ir.InsertionPoint(module.body):
                ir.Operation.create("stablehlo.constant", results=[attr.type], attributes={"value": attr})
    imported = import_module(module)
    constant = constant_of(imported)
    assert element_dtype(constant.get_element_type()) == np.dtype(dtype)
    assert bits(dense_to_numpy(constant)) == bits(array)
    assert dense_to_numpy(constant).shape == shape
    exported = export_module(imported, context)
    assert str(exported.body.operations[0]) == str(module.body.operations[0])
    assert dense_from_numpy(array, splat=array.size == 1) == constant


@dtypes
def test_splat_stays_a_splat_of_one_element(dtype: Any) -> None:
    array = np.broadcast_to(random_elements(dtype, (1,), seed=3), (4, 300))
    attr = dense_from_numpy(array, splat=True)
    assert len(attr) == 1
    assert bits(dense_to_numpy(attr)) == bits(array)
    module = ModuleOp([stablehlo.ConstantOp(attr)])
    exported = export_module(module, mlir.make_ir_context())
    assert "[" not in str(exported)
    assert constant_of(import_module(exported)) == attr


@dtypes
def test_element_types_and_dtypes_correspond(dtype: Any) -> None:
    assert element_dtype(dtype_element_type(dtype)) == np.dtype(dtype)


def test_no_dtype_of_a_type_that_holds_no_numbers() -> None:
    with pytest.raises(InvalidIRError, match="no dtype"):
        element_dtype(StringAttr("x"))
    with pytest.raises(InvalidIRError, match="no tensor holds"):
        dtype_element_type(np.dtype("S3"))


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan, -0.0, 1e-42], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda dtype: np.dtype(dtype).name)
def test_special_value_executes(value: float, dtype: Any) -> None:
    with np.errstate(under="ignore"):
        constant = np.asarray(value, dtype)
    module = import_module(lower(lambda: jnp.asarray(constant)))
    assert bits(call_module(module)[0]) == bits(constant)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_constants_are_exact(dtype: Any, shape: tuple[int, ...], seed: int) -> None:
    array = random_elements(dtype, shape, seed)
    exported = export_module(ModuleOp([stablehlo.ConstantOp(dense_from_numpy(array))]), mlir.make_ir_context())
    assert bits(dense_to_numpy(constant_of(import_module(exported)))) == bits(array)


def test_constants_parsed_by_xdsl_export_too() -> None:
    text = "dense<[true, false]> : tensor<2xi1>", "dense<-1> : tensor<3xi4>", "dense<1.500000e+00> : tensor<2x2xbf16>"
    for source in text:
        attr = Parser(make_context(), source).parse_attribute()
        assert isinstance(attr, DenseIntOrFPElementsAttr)
        exported = export_module(ModuleOp([stablehlo.ConstantOp(attr)]), mlir.make_ir_context())
        assert str(exported.body.operations[0]).endswith(source)
        imported = constant_of(import_module(exported))
        assert bits(dense_to_numpy(imported)) == bits(dense_to_numpy(attr))


# Attributes, types, locations ----------------------------------------------------------------------------------------


def round_trip_attribute(text: str) -> str:
    context = mlir.make_ir_context()
    with context, ir.Location.unknown():
        module = ir.Module.parse("module {}")
        module.operation.attributes["test.attr"] = ir.Attribute.parse(text)
        expected = str(module.operation.attributes["test.attr"])
    exported = export_module(import_module(module), context)
    found = str(exported.operation.attributes["test.attr"])
    assert found == expected
    return found


@pytest.mark.parametrize(
    "text",
    [
        "unit",
        "true",
        "false",
        "-1 : i4",
        "255 : ui8",
        "18446744073709551615 : ui64",
        "1.000000e-05 : f32",
        "0x7FC00001 : f32",
        "0xFF800000 : f32",
        "0x7FF0000000000000 : f64",
        "1.5 : bf16",
        '"a \\22quoted\\22 \\\\ string, é"',
        '"\\FF\\00 not UTF-8"',
        "[1, [2 : i8, {}], {a = tensor<4xi4>, b = @symbol}]",
        "@outer::@inner",
        '@"needs quotes"',
        "array<i64: 1, -2>",
        "array<i64>",
        "array<i1: true, false>",
        "array<i32: 3>",
        "affine_map<(d0, d1) -> (d1, d0)>",
        "dense<[1, 2]> : tensor<2xi64>",
        "#stablehlo.conv<[b, f, 0, 1]x[o, i, 0, 1]->[b, f, 0, 1]>",
        "#stablehlo<precision HIGHEST>",
        "#stablehlo.channel_handle<handle = 1, type = 2>",
        '#sdy.sharding<@mesh, [{"x"}, {?}]>',
        "tensor<?x4xf32, #stablehlo.bounds<3, ?>>",
        "tuple<tensor<2xf32>, tuple<>, !stablehlo.token>",
        "tensor<3xf4E2M1FN>",
        "tensor<complex<f64>>",
        "(tensor<2xi1>, index) -> none",
    ],
)
def test_attribute_round_trips(text: str) -> None:
    round_trip_attribute(text)


@pytest.mark.parametrize("text", ["dense_resource<blob> : tensor<4xf32>", "dense<1.0> : vector<4xf32>"])
def test_elements_that_are_not_a_tensors_are_refused(text: str) -> None:
    with pytest.raises(InvalidIRError, match="not supported"):
        round_trip_attribute(text)


def test_known_operations_become_classes_and_others_pass_through() -> None:
    def fn(x: jax.Array, i: jax.Array) -> Any:
        return lax.top_k(lax.erf(x), 2), lax.dynamic_update_slice(x, x[:1], (i, i)), lax.sort(x), jnp.sinh(x)

    module = import_module(lower(fn, X, np.int32(1)))
    kinds = {type(op) for op in module.walk()}
    assert {TopKOp, ErfOp, DynamicUpdateSliceOp, stablehlo.SliceOp, func.FuncOp} <= kinds
    assert {"stablehlo.sort", "chlo.sinh"} <= op_names(module)


def test_equal_types_and_attributes_are_one_object() -> None:
    module = import_module(lower(lambda x: jnp.sin(x) + jnp.cos(x), X))
    types = {id(result.type) for op in module.walk() for result in op.results}
    assert len(types) == 1


def test_operations_know_the_users_source_line() -> None:
    def attend(x: jax.Array) -> jax.Array:
        return jax.nn.softmax(x @ x.T)

    module = lower_to_module(attend, X)
    dot = next(op for op in module.walk() if isinstance(op, stablehlo.DotGeneralOp))
    exponential = next(op for op in module.walk() if isinstance(op, stablehlo.ExponentialOp))
    line = attend.__code__.co_firstlineno + 1
    for op in (dot, exponential):
        loc = op.attributes[LOC]
        assert isinstance(loc, StringAttr)
        assert loc.data.startswith(f"test_interop.py:{line} (")
        assert "attend" in loc.data


def test_locations_in_library_code_only_name_the_innermost_frame() -> None:
    context = ir.Context()  # one of its own: JAX may hand the same one out again
    context.allow_unregistered_dialects = True
    with context:
        module = ir.Module.parse(
            f"""module {{
                "test.op"() : () -> () loc(callsite("inner"("{jax.__file__}":3:0) at "outer"("{jax.__file__}":4:0)))
                "test.op"() : () -> () loc("only a name")
                "test.op"() : () -> () loc(fused["x"("a.py":5:0), "b.py":6:0])
                "test.op"() : () -> () loc(unknown)
            }}"""
        )
    locs = [op.attributes.get(LOC) for op in import_module(module).ops]
    assert locs == [StringAttr("__init__.py:3 (inner)"), None, StringAttr("a.py:5 (x)"), None]


# Export and calls ----------------------------------------------------------------------------------------------------


def identity_module(arg: Any, result: Any) -> ModuleOp:
    block = Block(arg_types=[arg])
    block.add_op(func.ReturnOp(block.args[0]))
    return ModuleOp([func.FuncOp("main", FunctionType.from_lists([arg], [result]), Region(block))])


def test_export_drops_our_attributes_only() -> None:
    module = import_module(lower(lambda x: x + 1, X))
    main = next(iter(module.ops))
    main.attributes["llmir.note"] = StringAttr("gone")
    main.attributes["other.note"] = StringAttr("kept")
    text = str(export_module(module, mlir.make_ir_context()))
    assert "llmir" not in text
    assert "other.note" in text


def test_export_refuses_what_is_not_lowered() -> None:
    with pytest.raises(InvalidIRError, match=r"test\.type"):
        export_module(identity_module(xdsl_test.TestType("x"), xdsl_test.TestType("x")), mlir.make_ir_context())


def test_export_verifies() -> None:
    bad = identity_module(TensorType(f32, [2]), TensorType(i32, [2]))
    with pytest.raises(InvalidIRError, match="verify"):
        export_module(bad, mlir.make_ir_context())


def test_cleanup_folds_merges_and_drops() -> None:
    module = lower(lambda x: (jnp.sin(x) + 1.0, jnp.sin(x) * 1.0), X)
    before = str(module).count("stablehlo.sine")
    cleanup(module)
    assert (before, str(module).count("stablehlo.sine")) == (2, 1)


def test_call_composes_with_jit_and_with_itself() -> None:
    module = lower_to_module(lambda x, y: (jnp.sin(x) @ y, jnp.where(x > 0, x, 0)), X, X.T)

    @jax.jit
    def outer(x: jax.Array, y: jax.Array) -> jax.Array:
        def body(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            a, b = call_module(module, jnp.where(c > 1, c, 1), y)
            return b + a.sum() * 0.01, None

        return lax.scan(body, call_module(module, x, y)[1], None, length=3)[0]

    def expected(x: jax.Array, y: jax.Array) -> jax.Array:
        c = jnp.where(x > 0, x, 0)
        for _ in range(3):
            c = jnp.where(c > 1, c, 1)
            c = jnp.where(c > 0, c, 0) + (jnp.sin(c) @ y).sum() * 0.01
        return c

    np.testing.assert_allclose(outer(X, X.T), expected(X, X.T), rtol=1e-5)


def test_call_with_jit_disabled() -> None:
    module = lower_to_module(lambda x: jnp.sin(x), X)
    with jax.disable_jit():
        assert_same(call_module(module, X), [jnp.sin(X)])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_call_lowers_for_every_platform(platform: str) -> None:
    module = lower_to_module(lambda x: jnp.where(x > 0, x, -jnp.inf), X)
    staged = jax.jit(lambda x: call_module(module, call_module(module, x)[0])[0]).trace(X)
    text = staged.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("call @llmir_main") == 2
    assert text.count("func private @llmir_main") == 1


def test_call_names_a_wrong_argument() -> None:
    module = lower_to_module(lambda x: x + 1, X)
    with pytest.raises(LlmirError, match="takes 1 arrays, got 2"):
        call_module(module, X, X)
    with pytest.raises(LlmirError, match=r"argument 0 of @main must be .*float32\[4,6\], got .*float32\[6,4\]"):
        call_module(module, X.T)
    with pytest.raises(LlmirError, match="int32"):
        call_module(module, X.astype(np.int32))


def test_call_needs_a_main_of_static_tensors() -> None:
    with pytest.raises(InvalidIRError, match="@main"):
        call_module(ModuleOp([]))
    dynamic = TensorType(f32, [DYNAMIC_INDEX])
    with pytest.raises(InvalidIRError, match="static shape"):
        call_module(identity_module(dynamic, dynamic), X)


def test_call_without_original_has_no_vmap_and_no_derivative() -> None:
    module = lower_to_module(lambda x: jnp.sin(x), X)
    fn = lambda x: call_module(module, x)[0]  # noqa: E731
    with pytest.raises(LlmirError, match="vmap"):
        jax.vmap(fn)(np.stack([X, X]))
    with pytest.raises(LlmirError, match="derivative"):
        jax.grad(lambda x: fn(x).sum())(X)
    with pytest.raises(LlmirError, match="derivative"):
        jax.jvp(fn, (X,), (X,))


def test_call_with_original_differentiates_and_maps_it() -> None:
    original = jax.jit(lambda x, i: [jnp.sin(x) * i, i + 1])
    module = lower_to_module(original, X, np.int32(3))
    fn = lambda x, i: call_module(module, x, i, original=original)[0]  # noqa: E731
    np.testing.assert_allclose(jax.grad(lambda x: fn(x, np.int32(3)).sum())(X), 3 * np.cos(X), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacrev(lambda x: fn(x, 2).sum()))(X), 2 * np.cos(X), rtol=1e-6)
    mapped = jax.vmap(fn, in_axes=(2, None), out_axes=1)(np.stack([X, -X], axis=2), np.int32(3))
    np.testing.assert_allclose(mapped, np.stack([3 * np.sin(X), -3 * np.sin(X)], axis=1), rtol=1e-6)
    twice = jax.grad(lambda x: jax.grad(lambda x: fn(x, np.int32(3)).sum())(x).sum())(X)
    np.testing.assert_allclose(twice, -3 * np.sin(X), rtol=1e-5, atol=1e-6)


def test_a_called_module_is_exported_once_and_freed() -> None:
    module = lower_to_module(lambda x: x * 2, X)
    traces = []
    outer = jax.jit(lambda x: traces.append(1) or call_module(module, x)[0])  # noqa: F821  (deleted below)
    outer(X), outer(X), call_module(module, X), call_module(module, X)
    assert len(traces) == 1
    reference = weakref.ref(module)
    del module, outer
    jax.clear_caches()
    gc.collect()
    assert reference() is None
