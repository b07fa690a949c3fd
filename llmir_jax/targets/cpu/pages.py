"""Loops that write keys and values to their pages."""

from collections.abc import Callable

from xdsl.ir import SSAValue

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.targets.cpu.expressions import Buffer, Evaluator
from llmir_jax.targets.cpu.halves import narrow
from llmir_jax.targets.cpu.index import Index, dynamic, unravel
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Number, Value, constant
from llmir_jax.targets.cpu.loops import Body, Loops
from llmir_jax.targets.cpu.rows import Domain, Row

Element = Callable[[Evaluator, Index], Value]
"""The value of a column."""


def writing_pages(loops: Loops, op: llm.WritePagesOp, pages: Buffer, which: int) -> Callable[[Domain], Body]:
    """Writes keys (0) or values (1) to their pages; rows of the domain are tokens."""
    value = (op.k, op.v)[which]
    num_rows, num_heads, head_dim = shape_of(value)
    page_size = pages.shape[1]

    def of(domain: Domain) -> Body:
        def body(kernel: Kernel, evaluator: Evaluator, row: Index, column: Index) -> None:
            f = kernel.f

            def scalar() -> Evaluator:
                return Evaluator(
                    f, loops.stored, kernel.pointer, evaluator.variables, evaluator.lane, 1, evaluator.seen
                )

            count = f.cast("sext", scalar().at(op.num_tokens, []), "i64")
            result = evaluator.at(value, unravel(row * domain.columns + column, (num_rows, num_heads, head_dim)))
            is_token = f.compare("slt", row.emit(f, evaluator.variables), count)

            def write() -> None:
                inner = scalar()
                position = f.cast("sext", inner.at(op.positions, [row]), "i64")
                sequence = f.cast("sext", inner.at(op.seq_ids, [row]), "i64")
                seqs, entries = shape_of(op.block_tables)
                entry = dynamic(f.value(f.div(position, page_size)), entries)
                page = f.cast("sext", inner.at(op.block_tables, [dynamic(sequence, seqs), entry]), "i64")
                slot = f.add(f.mul(page, page_size), f.rem(position, page_size))
                place = f.add(f.mul(slot, domain.columns), column.emit(f, evaluator.variables))
                f.store(
                    narrow(f, result, pages.element),
                    kernel.pointer(pages),
                    f.mul(place, pages.width),
                    align=pages.width,
                )

            f.when(is_token, write)

        return body

    return of


def writing_quantized_pages(
    loops: Loops, op: llm.WritePagesOp, pages: Buffer, which: int
) -> Callable[[Domain], tuple[str, list[Buffer]]]:
    """The same for pages of integers of 8 or 4 bits: kernels whose columns are whole heads."""
    value = (op.k, op.v)[which]
    num_rows, num_heads, head_dim = shape = shape_of(value)
    page_size = pages.shape[1]

    def body(kernel: Kernel, row: Row) -> None:
        f = kernel.f

        def int_at(operand: SSAValue, indices: list[Index]) -> Value:
            evaluator, _ = row.at(1, 0, 1)
            return f.cast("sext", evaluator.at(operand, indices), "i64")

        def element(evaluator: Evaluator, column: Index) -> Value:
            return evaluator.at(value, unravel(row.index * (num_heads * head_dim) + column, shape))

        def write() -> None:
            position, sequence = int_at(op.positions, [row.index]), int_at(op.seq_ids, [row.index])
            seqs, entries = shape_of(op.block_tables)
            entry = dynamic(f.value(f.div(position, page_size)), entries)
            page = int_at(op.block_tables, [dynamic(sequence, seqs), entry])
            slot = f.add(f.mul(page, page_size), f.rem(position, page_size))

            def head_of(head: Value, carried: list[Value]) -> list[Value]:
                start = dynamic(head, num_heads) * head_dim
                place = f.add(f.mul(slot, num_heads), head)
                write_head = _write_int8 if pages.minima is None else _write_int4
                write_head(kernel, row, element, start, head_dim, pages, place)
                return []

            lo, hi = (f.div(kernel.number(name), head_dim) for name in ("col_lo", "col_hi"))
            f.loop(lo, hi, 1, head_of)

        is_token = f.compare("slt", row.number, int_at(op.num_tokens, []))
        f.when(is_token, write)

    return lambda domain: loops.rowwise("write_pages", num_heads * head_dim, num_rows, body)


def _store_side(kernel: Kernel, side: Buffer | None, place: Number, value: Value) -> Value:
    """Round a number of a head to float16 and store it; returns it as it was stored."""
    assert side is not None
    f = kernel.f
    rounded = f.cast("fptrunc", value, "half")
    f.store(rounded, kernel.pointer(side), f.mul(place, 2), align=2)
    return f.cast("fpext", rounded, "float")


def _positive(kernel: Kernel, scale: Value) -> Value:
    """A scale to divide by: 1 for a head of zeros."""
    f = kernel.f
    is_positive = f.fcompare("ogt", scale, constant("float", 0.0))
    return f.select(is_positive, scale, constant("float", 1.0))


def _write_int8(
    kernel: Kernel, row: Row, element: Element, start: Index, head_dim: int, pages: Buffer, place: Number
) -> None:
    f = kernel.f
    largest = row.segment_max(element, start, head_dim)
    scale = _store_side(kernel, pages.scales, place, f.binary("fdiv", largest, constant("float", 127.0)))
    divisor = _positive(kernel, scale)
    inverse = f.binary("fdiv", constant("float", 1.0), divisor)
    base = f.at(kernel.pointer(pages), f.mul(place, head_dim))
    row.segment_round(element, start, head_dim, divisor, inverse, base, 0, head_dim)


def _write_int4(
    kernel: Kernel, row: Row, element: Element, start: Index, head_dim: int, pages: Buffer, place: Number
) -> None:
    """x = q · scale + minimum, q from 0 to 15; elements 2i and 2i + 1 are the low and the high bits of a byte."""
    f = kernel.f
    least, largest = (row.segment_bound(element, start, head_dim, name) for name in ("minimum", "maximum"))
    least = _store_side(kernel, pages.minima, place, least)
    spread = f.binary("fdiv", f.binary("fsub", largest, least), constant("float", 15.0))
    divisor = _positive(kernel, _store_side(kernel, pages.scales, place, spread))
    base = f.at(kernel.pointer(pages), f.mul(place, head_dim // 2))

    def integers(at: int, width: int) -> Value:
        x = f.binary("fsub", row.lanes_at(element, start + at, width), f.splat(least, width))
        q = f.overloaded("llvm.rint", [f.binary("fdiv", x, f.splat(divisor, width))])
        q = f.overloaded("llvm.maxnum", [q, constant("float", 0.0, width)])
        return f.cast("fptosi", f.overloaded("llvm.minnum", [q, constant("float", 15.0, width)]), "i32")

    width = row.lanes
    while width > 1 and head_dim % width:
        width //= 2
    for at in range(0, head_dim, max(width, 2)):
        if width > 1:
            q = integers(at, width)
            low, high = (f.shuffle(q, q, range(i, width, 2)) for i in (0, 1))
        else:
            low, high = integers(at, 1), integers(at + 1, 1)
        shift = constant("i32", 4, width // 2 or 1)
        packed = f.binary("or", low, f.binary("shl", high, shift))
        f.store(f.cast("trunc", packed, "i8"), base, at // 2)


__all__ = ["writing_pages", "writing_quantized_pages"]
