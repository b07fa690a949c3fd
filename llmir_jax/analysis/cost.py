"""What one token costs a derived step: bytes of weights that it reads, and multiply-adds.

Counted on the step at the length that it was derived at, a prime, so that no other dimension is taken for its tokens:

    weights     every parameter once a step, at the width that it has in memory; of one that rows are gathered from,
                converted or not, the row of each token
    per token   matrix products of activations with weights, whatever they are quantized to
    per row     those of the rows whose logits are wanted
    per pair    products of a query with a key, and of its weight with the value
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function, module_length
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import ints, shape_of
from llmir_jax.runtime.batch import CacheGroup
from llmir_jax.transforms import signature
from llmir_jax.transforms.sink_logits_rows import SinkLogitsRowsPass


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of a decoder; see above."""

    weight_bytes: float
    """Read by a step of one token."""
    multiply_adds_per_token: int
    multiply_adds_per_row: int
    multiply_adds_per_pair: int
    cache_groups: tuple[CacheGroup, ...]

    def cache_bytes(self, context: float) -> float:
        """Keys and values that a token reads after `context` others, less what windows hide."""
        return sum(
            min(context, group.window or context) * group.nbytes / (group.num_pages * group.page_size)
            for group in self.cache_groups
        )

    def prefill_multiply_adds(self, num_tokens: int) -> int:
        """Of a prompt of `num_tokens` with an empty cache and one row of logits, as if there were no windows."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return (
            num_tokens * self.multiply_adds_per_token + self.multiply_adds_per_row + pairs * self.multiply_adds_per_pair
        )


def step_cost(
    module: ModuleOp, weight_bytes: Sequence[int], cache_groups: Sequence[CacheGroup], *, max_seqs: int
) -> StepCost:
    """The cost of a derived step, whose parameters have these sizes in order."""
    module = module.clone()
    SinkLogitsRowsPass(at_logits=False).apply(Context(), module)
    main, length = main_function(module), module_length(module)
    num_bytes = sum(
        _bytes_read(arg, size, length)
        for (arg, _), size in zip(signature.parameter_paths(main), weight_bytes, strict=True)
    )
    token = row = pair = 0
    for op in main.walk():
        if isinstance(op, llm.PagedAttentionOp | llm.AttendPagesOp):
            heads, dim = shape_of(op.q)[-2:]
            pair += heads * (dim + shape_of(op.results[0])[-1])
            continue
        num_multiply_adds = multiply_adds(op)
        if num_multiply_adds and length in shape_of(op.results[0]):
            token += num_multiply_adds // length
        else:
            row += num_multiply_adds // max_seqs
    return StepCost(
        weight_bytes=num_bytes,
        multiply_adds_per_token=token,
        multiply_adds_per_row=row,
        multiply_adds_per_pair=pair,
        cache_groups=tuple(cache_groups),
    )


def multiply_adds(op: Operation) -> int:
    """Of a matrix product; 0 for other operations."""
    if isinstance(op, stablehlo.DotGeneralOp):
        over = ints(op.dot_dimension_numbers.lhs_contracting_dimensions)
        return prod(shape_of(op.results[0])) * prod(shape_of(op.lhs)[dim] for dim in over)
    if isinstance(op, llm.LinearOp | llm.QuantizedMatmulOp):
        return prod(shape_of(op.output)) * shape_of(op.x)[-1]
    if isinstance(op, llm.GatedMLPOp):
        weights = sum(prod(shape_of(w)) for w in (op.gate_w, op.up_w, op.down_w))
        return prod(shape_of(op.x)[:-1]) * weights
    return 0


def _bytes_read(arg: SSAValue, size: int, length: int) -> float:
    """Of a parameter of `size` bytes by a step of one token."""
    num_gathered = _gathered_elements(arg, length)
    if num_gathered is None:
        return size
    kind: Any = arg.type
    num_elements: int = prod(kind.get_shape())
    return min(size, size * num_gathered / num_elements)


def _gathered_elements(table: SSAValue, length: int) -> int | None:
    """Elements of the rows that a token has gathered from a table; None if it is read in another way too.

    A table of 16 bits that a model computes with in float32 is converted as a whole in the IR; what runs converts rows.
    """
    gathered = 0
    for use in table.uses:
        op = use.operation
        if isinstance(op, stablehlo.ConvertOp):
            elements = _gathered_elements(op.results[0], length)
        elif use.index == 0 and isinstance(op, stablehlo.GatherOp | llm.QuantizedGatherOp):
            elements = prod(shape_of(op.results[0])) // length
        else:
            elements = None
        if elements is None:
            return None
        gathered += elements
    return gathered
