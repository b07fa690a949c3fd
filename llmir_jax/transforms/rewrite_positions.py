"""Makes every use of a token's place in the sequence read the positions input.

    %i = stablehlo.iota dim = 0 : tensor<131xi32>        →   %positions
    %t = stablehlo.slice %table [0:131, 0:64]            →   stablehlo.gather %table, %positions
    %c = stablehlo.constant dense<…> : tensor<131x64xf32> (made for this length)  →  a gather of the longest one

Which operations these are is what the token-axis analysis found. A value of positions alone that is computed in a way
that mixes tokens (a cumulative sum of ones, say) becomes a table too: it was evaluated at several lengths and found to
be the same function of the position at each.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, i32
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.transforms.dead_code_elimination import dce
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import Alignment, location, main_function, module_length
from llmir_jax.analysis.token_axis import TokenAxis, ValueInfo
from llmir_jax.dialects.build import OpBuilder, dense_i64, dtype_of, ints, shape_of, tensor, type_of
from llmir_jax.interop import op_name
from llmir_jax.transforms import signature
from llmir_jax.transforms.check_token_axis import analyse_file
from llmir_jax.transforms.unroll_loops import constant_of


def table_bound(ops: Iterable[Operation], alignment: Alignment) -> tuple[int, str] | None:
    """Rows of the smallest table that is sliced to the sequence length, and where that is; None if there is none."""
    bounds = []
    for op in ops:
        if op_name(op) not in ("stablehlo.slice", "stablehlo.dynamic_slice") or op not in alignment.varying:
            continue
        sized = alignment.token_sized.get(op.results[0], ())
        source = alignment.token_sized.get(op.operands[0], ())
        for d, (a, b) in enumerate(zip(source, sized, strict=False)):
            if not a and b:
                bounds.append((shape_of(op.operands[0])[d] - _start(op, d), location(op)))
    return min(bounds, default=None)


def _start(op: Operation, dim: int) -> int:
    """The first row that a table slice takes."""
    if isinstance(op, stablehlo.SliceOp):
        return ints(op.start_indices)[dim]
    start = constant_of(op.operands[1 + dim])
    return 0 if start is None else int(start)


def gather_bound(axis: TokenAxis, content: Callable[[SSAValue], np.ndarray[Any, Any] | None]) -> tuple[int, str] | None:
    """The first position that has no row in a table indexed by a function of positions, and where that table is read.

    None if every position has its rows. `content(value)` evaluates an index for the longest sequence, or is None.
    """
    bounds = []
    for value, info in axis.info.items():
        op = value.owner
        if not isinstance(op, stablehlo.GatherOp) or info.tokens or not info.positions:
            continue
        operand, indices = axis.info[op.operand], axis.info[op.start_indices]
        if operand.token_dims or not indices.positions or len(indices.token_dims) != 1:
            continue
        rows = np.array([shape_of(op.operand)[d] for d in ints(op.dimension_numbers.start_index_map)])
        index = content(op.start_indices)
        if index is None:
            bounds.append((int(rows.min()), location(op)))
            continue
        vector, (along,) = op.dimension_numbers.index_vector_dim.value.data, indices.token_dims
        columns = [-1 if d == vector else 1 for d in range(index.ndim)]
        outside = index >= (rows.reshape(columns) if vector < index.ndim else rows[0])
        by_position = outside.any(axis=tuple(d for d in range(index.ndim) if d != along))
        if by_position.any():
            bounds.append((int(np.argmax(by_position)), location(op)))
    return min(bounds, default=None)


def rewrite_positions(
    axis: TokenAxis, positions: SSAValue, table_of: Callable[[SSAValue], np.ndarray[Any, Any]]
) -> int:
    """Rewrite in place; `table_of(value)` is a table's content for every position. Returns the number of rewrites."""
    count = 0
    tables = set(axis.tables)
    for value in [*axis.info]:
        op = value.owner
        if not isinstance(op, Operation) or op.parent is None:
            continue
        info = axis.info[value]
        if value in tables:
            new = _gather_table(OpBuilder(op), table_of(value), info, positions)
        elif op_name(op) == "stablehlo.iota" and info.positions and info.opaque is None:
            new = _iota(OpBuilder(op), op, positions)
        elif op in axis.table_slices and info.opaque is None and op not in axis.violations:
            new = _table_slice(op, info, axis.info[op.operands[0]], positions)
        else:
            continue
        axis.info[new] = info
        value.replace_all_uses_with(new)
        count += 1
    return count


def _iota(build: OpBuilder, op: Operation, positions: SSAValue) -> SSAValue:
    assert isinstance(op, stablehlo.IotaOp)
    along = op.iota_dimension.value.data
    element = type_of(op.output).get_element_type()
    return build.broadcast(build.convert(positions, element), shape_of(op.output), [along])


def _gather_table(build: OpBuilder, table: np.ndarray[Any, Any], info: ValueInfo, positions: SSAValue) -> SSAValue:
    value = build.constant(np.ascontiguousarray(table))
    for dim in info.token_dims:
        value = build.take(value, positions, dim)
    return value


def _shifted(build: OpBuilder, positions: SSAValue, start: int) -> SSAValue:
    if not start:
        return positions
    return build.op(stablehlo.AddOp, [positions, build.splat(start, type_of(positions))], positions.type)


def _table_slice(op: Operation, info: ValueInfo, source: ValueInfo, positions: SSAValue) -> SSAValue:
    build = OpBuilder(op)
    value = op.operands[0]
    result = op.results[0]
    new_dims = [d for d in info.token_dims if source.dims[d] is None]
    for dim in range(len(shape_of(result))):
        if dim in new_dims:
            value = build.take(value, _shifted(build, positions, _start(op, dim)), dim)
    if shape_of(value) == shape_of(result):
        return value
    # the slice also took part of other dims
    if isinstance(op, stablehlo.SliceOp):
        start = [0 if d in new_dims else s for d, s in enumerate(ints(op.start_indices))]
        limit = [shape_of(value)[d] if d in new_dims else s for d, s in enumerate(ints(op.limit_indices))]
        strides = [1 if d in new_dims else s for d, s in enumerate(ints(op.strides))]

        return build.op(
            stablehlo.SliceOp,
            [value],
            result.type,
            start_indices=dense_i64(start),
            limit_indices=dense_i64(limit),
            strides=dense_i64(strides),
        )
    starts = [build.constant(np.zeros((), dtype_of(x))) if d in new_dims else x for d, x in enumerate(op.operands[1:])]
    return build.op(stablehlo.DynamicSliceOp, [value, *starts], result.type, **dict(op.properties))


@dataclass(frozen=True)
class RewritePositionsPass(ModulePass):
    """Add the positions argument and use it for what one trace shows to be positions: iotas and slices of tables."""

    name = "rewrite-positions"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        axis = analyse_file(op)
        assert not axis.tables, "with one trace nothing is proved to be a table"
        given = signature.arguments(main, "positions")
        if not given:
            given = [signature.add_argument(main, "positions", tensor((module_length(op),), i32))]
        rewrite_positions(axis, given[0], axis_has_no_tables)
        dce(op)


def axis_has_no_tables(value: SSAValue) -> np.ndarray[Any, Any]:
    """The content of a table, where the analysis found none."""
    raise AssertionError(value)
