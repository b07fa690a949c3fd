"""Loops that write keys and values to their pages."""

from collections.abc import Callable

from xdsl.ir import SSAValue

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.targets.cpu.expressions import Buffer, Evaluator
from llmir_jax.targets.cpu.halves import narrow
from llmir_jax.targets.cpu.index import Index, dynamic, unravel
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Value, constant
from llmir_jax.targets.cpu.loops import Body, Loops
from llmir_jax.targets.cpu.rows import Domain, Row


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


def writing_int8_pages(
    loops: Loops, op: llm.WritePagesOp, pages: Buffer, which: int
) -> Callable[[Domain], tuple[str, list[Buffer]]]:
    """The same for pages in 8 bits: kernels whose columns are whole heads."""
    value = (op.k, op.v)[which]
    num_rows, num_heads, head_dim = shape = shape_of(value)
    page_size, scales = pages.shape[1], pages.scales
    assert scales is not None

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
                largest = row.segment_max(element, start, head_dim)
                rounded = f.cast("fptrunc", f.binary("fdiv", largest, constant("float", 127.0)), "half")
                scale = f.cast("fpext", rounded, "float")
                positive = f.fcompare("ogt", scale, constant("float", 0.0))
                divisor = f.select(positive, scale, constant("float", 1.0))
                inverse = f.binary("fdiv", constant("float", 1.0), divisor)
                place = f.add(f.mul(slot, num_heads), head)
                base = f.at(kernel.pointer(pages), f.mul(place, head_dim))
                row.segment_round(element, start, head_dim, divisor, inverse, base, 0, head_dim)
                f.store(rounded, kernel.pointer(scales), f.mul(place, 2), align=2)
                return []

            lo, hi = (f.div(kernel.number(name), head_dim) for name in ("col_lo", "col_hi"))
            f.loop(lo, hi, 1, head_of)

        is_token = f.compare("slt", row.number, int_at(op.num_tokens, []))
        f.when(is_token, write)

    return lambda domain: loops.rowwise("write_pages", num_heads * head_dim, num_rows, body)


__all__ = ["writing_int8_pages", "writing_pages"]
