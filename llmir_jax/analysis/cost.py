"""What a derived step costs: bytes of weights that it reads, and multiply-adds. `sharding.step_cost` has the terms.

Counted at the length that the step was derived at, a prime, so that no other dimension is taken for its tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, BlockArgument, Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function, module_length
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, ints, shape_of
from llmir_jax.runtime.batch import CacheGroup
from llmir_jax.transforms import signature
from llmir_jax.transforms.sink_logits_rows import SinkLogitsRowsPass
from llmir_jax.transforms.weight_quantization import stored_matrices
from sharding.step_cost import CacheCost, ParameterCost, StepCost


def step_cost(
    module: ModuleOp, weight_bytes: Sequence[int], cache_groups: Sequence[CacheGroup], *, max_seqs: int
) -> StepCost:
    """The cost of a derived step, whose parameters have these sizes in order."""
    module = module.clone()
    SinkLogitsRowsPass(at_logits=False).apply(Context(), module)
    main, length = main_function(module), module_length(module)
    attributes = signature.argument_attributes(main)
    products = _Products(length, max_seqs)
    for op in main.walk():
        products.count(op)
    parameters = []
    for (arg, path), size in zip(signature.parameter_paths(main), weight_bytes, strict=True):
        gathered = _gathered_elements(arg, length)
        token, row, outputs = products.of.get(arg, (0, 0, 0))
        parameters.append(
            ParameterCost(
                path=path,
                shape=_model_shape(arg, attributes[arg.index]),
                nbytes=size,
                nbytes_read=size if gathered is None else min(size, size * gathered / prod(_shape(arg))),
                multiply_adds_per_token=token,
                multiply_adds_per_row=row,
                gathered_size=_table_row(arg, length),
                outputs=outputs,
            )
        )
    return StepCost(
        parameters=tuple(parameters),
        caches=tuple(_cache_cost(group, products.heads) for group in cache_groups),
        itemsize=products.itemsize,
        vocab_size=shape_of(signature.results(main)[0])[-1],
        other_multiply_adds_per_token=products.other,
    )


class _Products:
    """Multiply-adds by the parameter that is multiplied with."""

    def __init__(self, length: int, max_seqs: int) -> None:
        self.of: dict[SSAValue, tuple[int, int, int]] = {}
        """By parameter: per token, per row, and elements that it gives for each of them."""
        self.other = 0
        self.heads: dict[tuple[int, int, int | None], tuple[int, int]] = {}
        """By KV heads, their size, and window: query heads, and the size of a head's values."""
        self.itemsize = 4
        self._length, self._max_seqs = length, max_seqs

    def count(self, op: Operation) -> None:
        if isinstance(op, llm.PagedAttentionOp | llm.AttendPagesOp):
            self._count_attention(op)
            return
        for weight, outputs, number in _weights_of(op):
            is_per_token = self._length in shape_of(op.results[0])
            share = number // (self._length if is_per_token else self._max_seqs)
            root = _parameter(weight)
            if root is None:
                self.other += share if is_per_token else 0
                continue
            token, row, before = self.of.get(root, (0, 0, 0))
            token, row = (token + share, row) if is_per_token else (token, row + share)
            self.of[root] = token, row, max(before, outputs)

    def _count_attention(self, op: llm.PagedAttentionOp | llm.AttendPagesOp) -> None:
        num_heads, head_dim = shape_of(op.q)[-2:]
        self.itemsize = dtype_of(op.q).itemsize
        window = None if op.window is None else int(op.window.value.data)
        num_kv_heads = num_heads
        if isinstance(op, llm.AttendPagesOp):
            num_kv_heads = _shape(op.k_pages)[2]
        self.heads[num_kv_heads, head_dim, window] = num_heads, shape_of(op.results[0])[-1]


def _cache_cost(group: CacheGroup, heads: Mapping[tuple[int, int, int | None], tuple[int, int]]) -> CacheCost:
    found = heads.get((group.num_kv_heads, group.head_dim, group.window))
    num_heads, value_dim = found or next(
        pair for (kv_heads, dim, _), pair in heads.items() if (kv_heads, dim) == (group.num_kv_heads, group.head_dim)
    )
    return CacheCost(
        num_layers=group.num_layers,
        num_heads=num_heads,
        num_kv_heads=group.num_kv_heads,
        value_dim=value_dim,
        bytes_per_token=group.nbytes / (group.num_pages * group.page_size),
        multiply_adds_per_pair=group.num_layers * num_heads * (group.head_dim + value_dim),
        window=group.window,
    )


def _weights_of(op: Operation) -> Iterator[tuple[SSAValue, int, int]]:
    """The operands of a matrix product that may be parameters: outputs a row, and multiply-adds; none for others."""
    if isinstance(op, stablehlo.DotGeneralOp):
        over = ints(op.dot_dimension_numbers.lhs_contracting_dimensions)
        number = prod(shape_of(op.results[0])) * prod(shape_of(op.lhs)[dim] for dim in over)
        weight = op.rhs if _parameter(op.rhs) is not None or _parameter(op.lhs) is None else op.lhs
        inputs = prod(shape_of(op.lhs)[dim] for dim in over)
        yield weight, prod(shape_of(weight)) // inputs, number
    elif isinstance(op, llm.LinearOp | llm.QuantizedMatmulOp):
        outputs = shape_of(op.output)[-1]
        yield op.w, outputs, prod(shape_of(op.output)) * shape_of(op.x)[-1]
    elif isinstance(op, llm.GatedMLPOp):
        num_rows, inputs = prod(shape_of(op.x)[:-1]), shape_of(op.x)[-1]
        for w in (op.gate_w, op.up_w):
            yield w, prod(_shape(w)) // inputs, num_rows * prod(_shape(w))
        yield op.down_w, shape_of(op.output)[-1], num_rows * prod(_shape(op.down_w))


def multiply_adds(op: Operation) -> int:
    """Of a matrix product; 0 for other operations."""
    return sum(number for _, _, number in _weights_of(op))


def _parameter(value: SSAValue) -> SSAValue | None:
    """The argument that a value is, through changes of its type and layout."""
    while isinstance(value.owner, stablehlo.ConvertOp | stablehlo.TransposeOp | stablehlo.ReshapeOp):
        value = value.owner.operands[0]
    return value if isinstance(value, BlockArgument) else None


def _shape(value: SSAValue) -> tuple[int, ...]:
    kind: Any = value.type
    return tuple(kind.get_shape())


def _model_shape(arg: SSAValue, attributes: Mapping[str, Attribute]) -> tuple[int, ...]:
    """The shape of a parameter in its model: a quantized matrix [outputs, inputs] may be of a kernel."""
    shape = _shape(arg)
    if not isinstance(arg.type, llm.QuantizedTensorType):
        return shape
    _, matrix = stored_matrices(dict(attributes))[0]
    return shape[::-1] if len(matrix.rows) == 1 and matrix.rows[0][1] == 1 else shape


def _table_row(table: SSAValue, length: int) -> int:
    """Elements of the row that a token has gathered of a table, whatever else reads it; 0 for what is none."""
    found = 0
    for use in table.uses:
        op = use.operation
        if isinstance(op, stablehlo.ConvertOp):
            found += _table_row(op.results[0], length)
        elif use.index == 0 and isinstance(op, stablehlo.GatherOp | llm.QuantizedGatherOp):
            found += prod(shape_of(op.results[0])) // length
    return found


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
