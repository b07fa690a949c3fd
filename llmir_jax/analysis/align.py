"""Lays two traces of one forward, at different numbers of tokens, side by side.

A dim is part of the token axis exactly when its size differs between the two; an attribute or a constant that differs
depends on the sequence length. Nothing else may differ: a forward whose operations depend on the length has no single
step to derive.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, FunctionType, IntegerAttr, ModuleOp, TensorType
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, Block, Operation, SSAValue

from llmir_jax.dialects.build import ints, splat_of
from llmir_jax.errors import InvalidIRError, UnsupportedModelError
from llmir_jax.interop import LOC, op_name

LENGTH = "llmir.length"
"""Attribute of a module: the number of tokens it was traced at."""


def location(op: Operation) -> str:
    """Where in the user's source `op` comes from."""
    attribute = op.attributes.get(LOC)
    return "unknown location" if attribute is None else str(getattr(attribute, "data", attribute))


def main_function(module: ModuleOp) -> FuncOp:
    """The function @main of `module`."""
    for op in module.ops:
        if isinstance(op, FuncOp) and op.sym_name.data == "main":
            return op
    raise UnsupportedModelError("the module has no function @main: expected one as JAX lowers it")


def module_length(module: ModuleOp) -> int:
    """The number of tokens `module` was traced at."""
    length = module.attributes.get(LENGTH)
    if not isinstance(length, IntegerAttr) or length.value.data < 2:
        raise InvalidIRError(
            f"the module has no attribute {LENGTH}: expected the number of tokens it was traced at, at least 2"
        )
    return int(length.value.data)


@dataclass
class Alignment:
    """Two traces side by side. `twin` maps each operation and value of the first to the second's."""

    length: int
    other_length: int
    ops: dict[Operation, Operation] = field(default_factory=dict)
    values: dict[SSAValue, SSAValue] = field(default_factory=dict)
    token_sized: dict[SSAValue, tuple[int, ...]] = field(default_factory=dict)
    """Per value and dim: how many times the length it holds, 0 for a dim of fixed size, −… never."""
    odd: dict[SSAValue, str] = field(default_factory=dict)
    """Values with a dim that differs but is no multiple of the length, and why that matters."""
    varying: dict[Operation, frozenset[str]] = field(default_factory=dict)
    """Properties of an operation that depend on the length."""

    def widen(self, other: "Alignment") -> None:
        """Take in what an alignment of the same first trace with a third one found: what varies in either, varies."""
        for op, names in other.varying.items():
            self.varying[op] = self.varying.get(op, frozenset()) | names
        for value, reason in other.odd.items():
            self.odd.setdefault(value, reason)
        for value, multiples in other.token_sized.items():
            if self.token_sized.get(value, multiples) != multiples:
                self.odd.setdefault(
                    value, f"has an axis that follows {self.length} tokens but not {other.other_length}"
                )
        for value in self.odd:
            self.token_sized.pop(value, None)


def align(first: ModuleOp, second: ModuleOp, length: int, other_length: int) -> Alignment:
    """Align two traces of the same forward; raise UnsupportedModelError where their structure differs."""
    result = Alignment(length, other_length)
    _align_blocks(main_function(first).body.block, main_function(second).body.block, result)
    return result


def align_by_size(main: FuncOp, length: int) -> Alignment:
    """The alignment of a module of which there is one trace, at a length that divides no size of the model's own.

    A dim follows the tokens if `length` divides it. What depends on the length then is a constant that holds more than
    one value along such a dim, or a part as long as the sequence of something that is not.
    """
    result = Alignment(length, length)
    for arg in main.body.block.args:
        _size(arg, result)
    for op in main.body.walk():
        result.ops[op] = op
        for value in (*op.results, *(arg for region in op.regions for block in region.blocks for arg in block.args)):
            _size(value, result)
        if names := _varying_by_size(op, result):
            result.varying[op] = names
    return result


def _size(value: SSAValue, result: Alignment) -> None:
    result.values[value] = value
    if isinstance(value.type, TensorType):
        shape = value.type.get_shape()
        result.token_sized[value] = tuple(0 if n % result.length else n // result.length for n in shape)


def _varying_by_size(op: Operation, result: Alignment) -> frozenset[str]:
    name = op_name(op)
    if name == "stablehlo.constant":
        several = any(result.token_sized[op.results[0]]) and splat_of(op.properties["value"]) is None
        return frozenset({"value"} if several else ())
    sizes = {
        "stablehlo.slice": "limit_indices",
        "stablehlo.dynamic_slice": "slice_sizes",
        "stablehlo.gather": "slice_sizes",
    }
    if name not in sizes:
        return frozenset()
    if not any(result.token_sized[op.operands[0]] + result.token_sized[op.results[0]]):
        return frozenset()
    follows = any(n and n % result.length == 0 for n in ints(op.properties[sizes[name]]))
    return frozenset({sizes[name]} if follows else ())


def _align_blocks(a: Block, b: Block, result: Alignment) -> None:
    for x, y in zip(a.args, b.args, strict=True):
        _align_values(x, y, result)
    ops_a, ops_b = list(a.ops), list(b.ops)
    for op_a, op_b in zip(ops_a, ops_b, strict=False):
        _align_ops(op_a, op_b, result)
    if len(ops_a) != len(ops_b):
        extra = (ops_a if len(ops_a) > len(ops_b) else ops_b)[min(len(ops_a), len(ops_b))]
        raise _structure_error(extra, result)


def _structure_error(op: Operation, result: Alignment) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{op_name(op)} at {location(op)}: the forward computes different operations for {result.length} and for "
        f"{result.other_length} tokens, so it has no step that serves every length. Loops or branches over the "
        "sequence (a recurrence over tokens, chunked attention, a condition on the length) cannot be derived"
    )


def _align_ops(x: Operation, y: Operation, result: Alignment) -> None:
    same = (
        op_name(x) == op_name(y)
        and len(x.operands) == len(y.operands)
        and len(x.results) == len(y.results)
        and len(x.regions) == len(y.regions)
        and all(result.values.get(p) is q for p, q in zip(x.operands, y.operands, strict=True))
    )
    if not same:
        raise _structure_error(x, result)
    result.ops[x] = y
    varying = frozenset(_varying(x, y))
    if varying:
        result.varying[x] = varying
    for p, q in zip(x.results, y.results, strict=True):
        _align_values(p, q, result)
    for r, s in zip(x.regions, y.regions, strict=True):
        for block, other in zip(r.blocks, s.blocks, strict=True):
            _align_blocks(block, other, result)


def _varying(x: Operation, y: Operation) -> Iterator[str]:
    for table, other in ((x.properties, y.properties), (x.attributes, y.attributes)):
        for name in table.keys() | other.keys():
            if name.startswith("llmir.") or name == "op_name__":
                continue
            if table.get(name) != other.get(name) and not _same_splat(table.get(name), other.get(name)):
                yield name


def _same_splat(a: Attribute | None, b: Attribute | None) -> bool:
    """Whether two dense attributes repeat one and the same element."""
    if not isinstance(a, DenseIntOrFPElementsAttr) or not isinstance(b, DenseIntOrFPElementsAttr):
        return False
    x, y = splat_of(a), splat_of(b)
    return x is not None and y is not None and x.dtype == y.dtype and x.tobytes() == y.tobytes()


def _align_values(x: SSAValue, y: SSAValue, result: Alignment) -> None:
    result.values[x] = y
    if not isinstance(x.type, TensorType) or not isinstance(y.type, TensorType):
        return
    a, b = x.type.get_shape(), y.type.get_shape()
    if len(a) != len(b):
        result.odd[x] = f"has {len(a)} dims for {result.length} tokens and {len(b)} for {result.other_length}"
        return
    multiples = []
    for m, n in zip(a, b, strict=True):
        if m == n:
            multiples.append(0)
            continue
        count, rest = divmod(m, result.length)
        if rest or n != count * result.other_length:
            result.odd[x] = f"has an axis of {m} elements for {result.length} tokens and {n} for {result.other_length}"
            return
        multiples.append(count)
    result.token_sized[x] = tuple(multiples)


def result_types(function_type: Attribute) -> tuple[Attribute, ...]:
    """The result types of a function type."""
    assert isinstance(function_type, FunctionType)
    return tuple(function_type.outputs)
