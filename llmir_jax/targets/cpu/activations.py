"""Activations as a matmul takes them: in 8 bits with their scales, or as floats with their sums."""

from collections.abc import Callable

from xdsl.ir import SSAValue

from llmir_jax.dialects.build import shape_of
from llmir_jax.targets.cpu.expressions import Buffer, Evaluator
from llmir_jax.targets.cpu.index import Index, dynamic, unravel
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Value, constant
from llmir_jax.targets.cpu.loops import Loops
from llmir_jax.targets.cpu.matmul import InputFormat
from llmir_jax.targets.cpu.rows import Row


def prepare(
    loops: Loops, value: SSAValue, inputs: InputFormat, target: Buffer, scales: SSAValue | None = None
) -> tuple[str, list[Buffer]]:
    """Activations for a matmul: in 8 bits, or as floats with their sums; see `matmul.InputFormat`.

    `scales` [K / group] are those of 8 bits where they are known before; else each group's largest value gives its.
    """
    shape = shape_of(value)
    weight = inputs.weight
    rows, columns = inputs.num_rows, weight.num_columns
    group = inputs.group or weight.block
    assert group % weight.block == 0

    def body(kernel: Kernel, row: Row) -> None:
        base = kernel.pointer(target)

        def element(evaluator: Evaluator, column: Index) -> Value:
            return evaluator.at(value, unravel(row.index * columns + column, shape))

        _prepare_row(kernel, row, inputs, base, element, group, scales)

    return loops.rowwise("prepare", columns, rows, body)


def _prepare_row(
    kernel: Kernel,
    row: Row,
    inputs: InputFormat,
    base: Value,
    element: Callable[[Evaluator, Index], Value],
    group: int,
    scales: SSAValue | None,
) -> None:
    """Groups of a row, one after the other."""
    f = kernel.f
    weight = inputs.weight
    num_groups = weight.num_columns // group
    blocks = group // weight.block

    def one_group(number: Value, carried: list[Value]) -> list[Value]:
        at = Index() if num_groups == 1 else dynamic_multiple(number, num_groups, group)
        inverse = scale = None
        if inputs.is_int8:
            if scales is None:
                scale = f.binary("fdiv", row.segment_max(element, at, group), constant("float", 127.0))
            else:
                evaluator, _ = row.at(1, 0, 1)
                scale = evaluator.at(scales, [Index() if num_groups == 1 else dynamic(number, num_groups)])
            positive = f.fcompare("ogt", scale, constant("float", 0.0))
            quotient = f.binary("fdiv", constant("float", 1.0), scale)
            inverse = f.select(positive, quotient, constant("float", 0.0))
        for b in range(blocks):
            block = f.add(f.mul(number, blocks), b)
            place = f.add(
                f.mul(row.number, inputs.row_bytes), f.mul(block, weight.padded_block * (1 if inverse else 4))
            )
            start = at + b * weight.block
            if inverse is None or scale is None:
                total = row.segment_copy(element, start, weight.block, base, place, weight.padded_block)
                sides = [] if weight.is_float else [total]
            else:
                total = row.segment_round(
                    element, start, weight.block, scale, inverse, base, place, weight.padded_block
                )
                sides = [scale, total, f.binary("fmul", scale, f.cast("sitofp", total, "float"))]
            for i, side in enumerate(sides):
                offset = f.add(f.mul(row.number, 4 * weight.num_blocks), f.mul(block, 4))
                f.store(side, base, f.add(offset, inputs.side(i)), align=4)
        return []

    done = 0
    if inputs.is_int8 and scales is None and blocks == 1 and weight.padded_block == group and group % row.lanes == 0:
        done = num_groups // row.lanes * row.lanes if row.lanes > 1 else 0

    def groups(number: Value, carried: list[Value]) -> list[Value]:
        row.round_groups(element, number, num_groups, group, inputs, base)
        return []

    if done:
        f.loop(0, done // row.lanes, 1, groups)
    if num_groups == 1:
        one_group(Value("i64", "0"), [])
    elif done < num_groups:
        f.loop(done, num_groups, 1, one_group)


def dynamic_multiple(number: Value, extent: int, factor: int) -> Index:
    """A loop's number times a factor, as an index."""
    return dynamic(number, extent) * factor


__all__ = ["prepare"]
