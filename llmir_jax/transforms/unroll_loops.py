"""Unrolls loops with a constant trip count and takes the branches that a constant selects.

    %r:2 = stablehlo.while(%i = %c0, %x = %0) : …  cond { i < 30 }  do { … dynamic_slice(%w, %i) … }
      →    thirty copies of the body, in which dynamic_slice became slice

This is what `lax.scan`, `nn.scan` and `nnx.scan` over stacked layers lower to, and what makes a `lax.cond` on a layer's
flag a plain choice. Scalar integer arithmetic on the counter is folded on the way. A loop whose trip count is not a
constant is left alone; later passes refuse it if it touches tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, BlockArgument, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import location
from llmir_jax.dialects.build import OpBuilder, dtype_of, ints, shape_of
from llmir_jax.errors import UnsupportedModelError
from llmir_jax.interop import dense_to_numpy

MAX_UNROLLED_OPS = 200_000
"""Loops that would grow past this many operations are refused: a sign of a loop over something other than layers."""

Folder = Callable[..., Any]


def _quotient(a: Any, b: Any) -> Any:
    """Integer division as StableHLO has it: towards zero."""
    return (a - np.fmod(a, b)) // b


_FOLDERS: dict[type[Operation], Folder] = {
    stablehlo.AddOp: np.add,
    stablehlo.SubtractOp: np.subtract,
    stablehlo.MultiplyOp: np.multiply,
    stablehlo.DivideOp: _quotient,
    stablehlo.MaximumOp: np.maximum,
    stablehlo.MinimumOp: np.minimum,
    stablehlo.RemainderOp: np.fmod,
    stablehlo.AndOp: np.bitwise_and,
    stablehlo.OrOp: np.bitwise_or,
    stablehlo.XorOp: np.bitwise_xor,
    stablehlo.NotOp: np.invert,
    stablehlo.NegateOp: np.negative,
    stablehlo.SignOp: np.sign,
    stablehlo.ClampOp: lambda low, x, high: np.minimum(np.maximum(low, x), high),
    stablehlo.SelectOp: lambda pred, a, b: np.where(pred, a, b),
}
_COMPARE: dict[str, Folder] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
_MAX_FOLDED_ELEMENTS = 16
"""Fewer than the tokens of any trace: what is as long as the sequence must be the same operations at every length."""


def constant_of(value: SSAValue) -> np.ndarray[Any, Any] | None:
    """The array of a constant operation's result, or of a short iota's; or None."""
    op = value.owner
    if isinstance(op, stablehlo.ConstantOp):
        return np.asarray(dense_to_numpy(op.value))
    if isinstance(op, stablehlo.IotaOp) and np.prod(shape_of(value)) <= _MAX_FOLDED_ELEMENTS:
        shape, dim = shape_of(value), op.iota_dimension.value.data
        return np.asarray(np.indices(shape)[dim].astype(dtype_of(value)))
    return None


def _folded(op: Operation) -> np.ndarray[Any, Any] | None:
    """The value of a small integer or boolean operation whose operands are all constants, or None."""
    if len(op.results) != 1 or not op.operands or op.regions:
        return None
    result = op.results[0]
    if dtype_of(result).kind not in "iub" or int(np.prod(shape_of(result))) > _MAX_FOLDED_ELEMENTS:
        return None
    if isinstance(op, stablehlo.DynamicSliceOp | stablehlo.SliceOp | stablehlo.ReshapeOp | stablehlo.BroadcastInDimOp):
        pass
    elif type(op) not in _FOLDERS and not isinstance(op, stablehlo.CompareOp | stablehlo.ConvertOp):
        return None
    operands = [constant_of(x) for x in op.operands]
    if any(x is None for x in operands):
        return None
    arrays: list[np.ndarray[Any, Any]] = [x for x in operands if x is not None]
    if isinstance(op, stablehlo.DivideOp | stablehlo.RemainderOp) and not (arrays[1] > 0).all():
        return None  # by 0, or the smallest number by -1: left to the target
    match op:
        case stablehlo.CompareOp():
            value = _COMPARE[str(op.comparison_direction.data)](*arrays)
        case stablehlo.ConvertOp():
            value = arrays[0].astype(dtype_of(result))
        case stablehlo.ReshapeOp():
            value = arrays[0].reshape(shape_of(result))
        case stablehlo.SliceOp():
            window = zip(ints(op.start_indices), ints(op.limit_indices), ints(op.strides), strict=True)
            value = arrays[0][tuple(slice(*w) for w in window)]
        case stablehlo.DynamicSliceOp():
            value = arrays[0][_window(arrays[0].shape, arrays[1:], ints(op.slice_sizes))]
        case stablehlo.BroadcastInDimOp():
            shape = [1] * len(shape_of(result))
            for dim, size in zip(ints(op.broadcast_dimensions), arrays[0].shape, strict=True):
                shape[dim] = size
            value = np.broadcast_to(arrays[0].reshape(shape), shape_of(result))
        case _:
            with np.errstate(over="ignore"):  # integers wrap around, as they do in XLA
                value = _FOLDERS[type(op)](*arrays)
    return np.ascontiguousarray(value, dtype_of(result)).reshape(shape_of(result))


def _window(shape: tuple[int, ...], starts: list[np.ndarray[Any, Any]], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """The clamped window of a dynamic_slice, as StableHLO defines it."""
    clamped = [min(max(int(s), 0), n - k) for s, n, k in zip(starts, shape, sizes, strict=True)]
    return tuple(slice(s, s + k) for s, k in zip(clamped, sizes, strict=True))


def _replace(op: Operation, values: list[SSAValue]) -> None:
    for old, new in zip(op.results, values, strict=True):
        old.replace_all_uses_with(new)
    op.detach()
    op.erase()


def _fold(op: Operation) -> bool:
    """Replace `op` by a constant, or a dynamic_slice at constant indices by a slice."""
    if (value := _folded(op)) is not None:
        _replace(op, [OpBuilder(op).constant(value)])
        return True
    if isinstance(op, stablehlo.DynamicSliceOp):
        starts = [constant_of(x) for x in op.start_indices]
        if any(s is None for s in starts):
            return False
        window = _window(shape_of(op.operand), [s for s in starts if s is not None], ints(op.slice_sizes))
        sliced = OpBuilder(op).slice(op.operand, [w.start for w in window], [w.stop for w in window])
        _replace(op, [sliced])
        return True
    return False


@dataclass(frozen=True)
class _Counter:
    index: int  # which iteration argument
    start: int
    trips: int


def trip_count(loop: stablehlo.WhileOp) -> _Counter | None:
    """How often `loop` runs, if its condition is `counter < constant` and its body adds one; else None."""
    cond, body = loop.cond.block, loop.body.block
    compare = cond.last_op.operands[0].owner if cond.last_op is not None else None
    if not isinstance(compare, stablehlo.CompareOp) or str(compare.comparison_direction.data) != "LT":
        return None
    if not isinstance(compare.lhs, BlockArgument) or compare.lhs.owner is not cond:
        return None
    index = compare.lhs.index
    limit, start = constant_of(compare.rhs), constant_of(loop.operand[index])
    if isinstance(compare.rhs, BlockArgument) and compare.rhs.owner is cond:
        carried = compare.rhs.index
        if body.last_op is None or body.last_op.operands[carried] is not body.args[carried]:
            return None
        limit = constant_of(loop.operand[carried])
    if limit is None or start is None or body.last_op is None:
        return None
    step = body.last_op.operands[index].owner
    if not isinstance(step, stablehlo.AddOp):
        return None
    addends = [x for x in step.operands if x is not body.args[index]]
    if len(addends) != 1 or (one := constant_of(addends[0])) is None or int(one) != 1:
        return None
    return _Counter(index=index, start=int(start), trips=max(int(limit) - int(start), 0))


def _unroll(loop: stablehlo.WhileOp, counter: _Counter) -> list[Operation]:
    body = loop.body.block
    ops = list(body.ops)
    size = sum(1 for _ in loop.body.walk()) * counter.trips
    if size > MAX_UNROLLED_OPS:
        raise UnsupportedModelError(
            f"stablehlo.while at {location(loop)}: unrolling {counter.trips} iterations makes {size} operations, "
            f"more than {MAX_UNROLLED_OPS}; only loops over layers can be derived"
        )
    values: list[SSAValue] = list(loop.operand)
    block = loop.parent_block()
    assert block is not None
    added: list[Operation] = []
    builder = OpBuilder(loop)
    for trip in range(counter.trips):
        number = np.asarray(counter.start + trip, dtype_of(loop.operand[counter.index]))
        values[counter.index] = builder.constant(number)
        mapping: dict[SSAValue, SSAValue] = dict(zip(body.args, values, strict=True))
        for op in ops[:-1]:
            clone = op.clone(mapping)
            block.insert_op_before(clone, loop)
            added.append(clone)
        values = [mapping.get(x, x) for x in ops[-1].operands]
    _replace(loop, values)
    return added


def _take_branch(op: Operation, branch: Block) -> list[Operation]:
    block = op.parent_block()
    assert block is not None
    mapping: dict[SSAValue, SSAValue] = {}
    added = []
    ops = list(branch.ops)
    for inner in ops[:-1]:
        clone = inner.clone(mapping)
        block.insert_op_before(clone, op)
        added.append(clone)
    _replace(op, [mapping.get(x, x) for x in ops[-1].operands])
    return added


def _resolve(op: Operation) -> list[Operation] | None:
    """The operations that take the place of a loop or a branch, or None where it stays."""
    if isinstance(op, stablehlo.WhileOp):
        counter = trip_count(op)
        return None if counter is None else _unroll(op, counter)
    if isinstance(op, stablehlo.CaseOp):
        index = constant_of(op.index)
        if index is None:
            return None
        last = len(op.branches) - 1
        chosen = int(index) if 0 <= int(index) <= last else last
        return _take_branch(op, op.branches[chosen].block)
    if isinstance(op, stablehlo.IfOp):
        pred = constant_of(op.pred)
        return None if pred is None else _take_branch(op, (op.true_branch if bool(pred) else op.false_branch).block)
    return None


def unroll_loops(module: ModuleOp) -> int:
    """Unroll and fold until nothing changes; returns how many loops and branches went."""
    count = 0
    pending = list(reversed([op for f in module.ops for op in f.regions[0].block.ops]))
    while pending:
        op = pending.pop()
        if op.parent is None or _fold(op):
            continue
        added = _resolve(op)
        if added is not None:
            count += 1
            pending += reversed(added)
    return count


@dataclass(frozen=True)
class UnrollLoopsPass(ModulePass):
    """Unroll layer loops of constant trip count and resolve constant branches."""

    name = "unroll-loops"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        unroll_loops(op)
