"""Two facts of a decoder's input that the forward cannot know, used before anything is analysed.

A token id is at least 0 and less than the vocabulary:

    %p = stablehlo.compare GE, %tokens, %zeros     →    a constant true        (a padding mask that masks nothing)

An index that is a row's own number picks that row, so the gather or scatter keeps rows apart:

    %i = concatenate(iota over rows, %column)      →    %column alone, and the rows become a batching dim
    %y = scatter(%x[rows, columns], %i, %u)              (`gates.at[jnp.arange(n)[:, None], chosen].set(…)`)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, ModuleOp, i64
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.evaluate import backward_slice, extract
from llmir_jax.dialects.build import OpBuilder, ints, scalar_constant, shape_of, type_of
from llmir_jax.transforms import signature

_COMPARISONS: dict[str, Any] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
_FLIPPED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "EQ": "EQ", "NE": "NE"}


def _is_token_ids(value: SSAValue, tokens: SSAValue) -> bool:
    """Whether every element of `value` is a token id."""
    while value is not tokens:
        op = value.owner
        if not isinstance(op, stablehlo.ReshapeOp | stablehlo.BroadcastInDimOp | stablehlo.TransposeOp):
            return False
        value = op.operands[0]
    return True


def _holds_for_every_id(op: stablehlo.CompareOp, tokens: SSAValue, vocab_size: int) -> bool | None:
    """The comparison's result if it is one and the same for every token id, else None."""
    direction = str(op.comparison_direction.data)
    if _is_token_ids(op.lhs, tokens):
        bound = scalar_constant(op.rhs)
    elif _is_token_ids(op.rhs, tokens):
        bound, direction = scalar_constant(op.lhs), _FLIPPED[direction]
    else:
        return None
    if bound is None:
        return None
    outcomes = {bool(_COMPARISONS[direction](x, int(bound))) for x in _ids_around(int(bound), vocab_size)}
    return outcomes.pop() if len(outcomes) == 1 else None


def _ids_around(bound: int, vocab_size: int) -> set[int]:
    """Ids among which any comparison with `bound` shows all its outcomes."""
    return {min(max(x, 0), vocab_size - 1) for x in (0, bound - 1, bound, bound + 1, vocab_size - 1)}


def fold_token_comparisons(module: ModuleOp) -> int:
    """Fold comparisons of token ids that have one outcome. The logits' last dim is the vocabulary."""
    main = main_function(module)
    tokens = signature.argument(main, "tokens")
    shape = shape_of(signature.results(main)[0]) if signature.results(main) else ()
    if len(shape) != 3:
        return 0
    count = 0
    for op in list(main.body.block.ops):
        if not isinstance(op, stablehlo.CompareOp):
            continue
        outcome = _holds_for_every_id(op, tokens, shape[-1])
        if outcome is None:
            continue
        op.result.replace_all_uses_with(OpBuilder(op).splat(outcome, type_of(op.result)))
        op.detach()
        op.erase()
        count += 1
    return count


def _components(indices: SSAValue, vector: int) -> list[SSAValue] | None:
    """The columns of an index array, if it is a concatenation of single columns."""
    op = indices.owner
    if not isinstance(op, stablehlo.ConcatenateOp) or op.dimension.value.data != vector:
        return None
    columns = list(op.inputs)
    return columns if all(shape_of(c)[vector] == 1 for c in columns) else None


def _counted_dim(column: SSAValue, size: int) -> int | None:
    """The dim that a column counts 0, 1, … size-1 along, the same everywhere else; None if it does not."""
    if size not in shape_of(column)[:-1]:
        return None
    _, arguments = backward_slice([column], [])
    if arguments:
        return None
    content = extract([column], []).run({})[0]
    for dim, n in enumerate(content.shape):
        count = np.arange(n).reshape([-1 if d == dim else 1 for d in range(content.ndim)])
        if n == size and (content == count).all():
            return dim
    return None


def _batched(op: stablehlo.GatherOp | stablehlo.ScatterOp) -> bool:
    gather = isinstance(op, stablehlo.GatherOp)
    numbers = op.dimension_numbers if isinstance(op, stablehlo.GatherOp) else op.scatter_dimension_numbers
    indices = op.start_indices if isinstance(op, stablehlo.GatherOp) else op.scatter_indices
    source = op.operand if isinstance(op, stablehlo.GatherOp) else op.inputs[0]
    vector = numbers.index_vector_dim.value.data
    fields = ("start_index_map", "collapsed_slice_dims", "operand_batching_dims", "start_indices_batching_dims")
    if not gather:
        fields = (
            "scatter_dims_to_operand_dims",
            "inserted_window_dims",
            "input_batching_dims",
            "scatter_indices_batching_dims",
        )
    mapped, dropped, batching, index_batching = (list(ints(getattr(numbers, f))) for f in fields)
    columns = _components(indices, vector)
    if columns is None or len(columns) < 2 or len(columns) != len(mapped):
        return False
    for place, (column, dim) in enumerate(zip(columns, mapped, strict=True)):
        if dim not in dropped:
            continue
        counted = _counted_dim(column, shape_of(source)[dim])
        if counted is None or counted in index_batching:
            continue
        rest = columns[:place] + columns[place + 1 :]
        order = sorted(zip([*batching, dim], [*index_batching, counted], strict=True))
        changed = {
            fields[0]: mapped[:place] + mapped[place + 1 :],
            fields[1]: [d for d in dropped if d != dim],
            fields[2]: [a for a, _ in order],
            fields[3]: [b for _, b in order],
        }
        names = [name for name, _ in type(numbers).get_irdl_definition().parameters]
        new = type(numbers)(*(_dims(changed[n]) if n in changed else getattr(numbers, n) for n in names))
        build = OpBuilder(op)
        joined = build.concatenate(rest, vector) if len(rest) > 1 else rest[0]
        key = "dimension_numbers" if gather else "scatter_dimension_numbers"
        op.properties[key] = new
        op.operands[len(op.inputs) if isinstance(op, stablehlo.ScatterOp) else 1] = joined
        return True
    return False


def _dims(values: list[int]) -> ArrayAttr[IntegerAttr]:
    return ArrayAttr([IntegerAttr(v, i64) for v in values])


def batch_row_indices(module: ModuleOp) -> int:
    """Make rows that gathers and scatters pick by their own number batching dims; returns how many."""
    count = 0
    for op in list(main_function(module).body.block.ops):
        if isinstance(op, stablehlo.GatherOp | stablehlo.ScatterOp):
            while _batched(op):
                count += 1
    return count


@dataclass(frozen=True)
class SimplifyInputsPass(ModulePass):
    """Fold comparisons of token ids with constants; make rows that index themselves batching dims."""

    name = "simplify-inputs"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        fold_token_comparisons(op)
        batch_row_indices(op)
