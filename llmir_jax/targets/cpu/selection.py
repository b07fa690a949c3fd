"""The k largest elements of each row, in one thread: k times the best of those that come after the last one."""

from xdsl.ir import Operation

from llmir_jax.dialects.build import dtype_of, shape_of
from llmir_jax.dialects.stablehlo_ext import TopKOp
from llmir_jax.targets.cpu.elementwise import ELEMENTS, is_float, storable
from llmir_jax.targets.cpu.expressions import Buffer
from llmir_jax.targets.cpu.index import unravel
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Value, constant
from llmir_jax.targets.cpu.loops import Loops, rows_and_columns
from llmir_jax.targets.cpu.rows import Row

LOOKS = 1 << 16
"""Elements that a row may be looked at in all, k times over: about as many nanoseconds."""


def top_k_reason(op: TopKOp) -> str | None:
    """Why a selection has no kernel."""
    dtype = dtype_of(op.operand)
    if not is_float(dtype) and dtype.name != "int32":
        return f"of {dtype.name}"
    size, k = shape_of(op.operand)[-1], op.k.value.data
    return f"{k} of {size} are too many for it" if k * size > LOOKS else None


def top_k(loops: Loops, op: Operation, values: Buffer, indices: Buffer) -> tuple[str, list[Buffer]]:
    """The values, largest first and equal ones in their order, and where they are."""
    assert isinstance(op, TopKOp)
    shape, k = shape_of(op.operand), op.k.value.data
    domain = rows_and_columns(shape)
    element = ELEMENTS[dtype_of(op.operand).name]
    is_real = element == "float"
    least, most = (constant(element, x) for x in ((-float("inf"), float("inf")) if is_real else (-(2**31), 2**31 - 1)))

    def body(kernel: Kernel, row: Row) -> None:
        f = kernel.f

        def compare(name: str, a: Value, b: Value) -> Value:
            return f.fcompare(f"o{name}", a, b) if is_real else f.compare(name if name == "eq" else f"s{name}", a, b)

        def best(j: Value, last: list[Value]) -> list[Value]:
            def look(column: Value, found: list[Value]) -> list[Value]:
                evaluator, index = row.at(1, column, domain.columns)
                x = evaluator.at(op.operand, unravel(row.index * domain.columns + index, shape))
                same = f.binary("and", compare("eq", x, last[0]), f.compare("sgt", column, last[1]))
                follows = f.binary("or", compare("lt", x, last[0]), same)
                better = f.binary("or", compare("gt", x, found[0]), f.compare("slt", found[1], 0))
                taken = f.binary("and", follows, better)
                return [f.select(taken, x, found[0]), f.select(taken, column, found[1])]

            found = f.loop(0, domain.columns, 1, look, [least, f.value(-1)])
            place = f.add(f.mul(row.number, k), j)
            where = f.cast("trunc", f.value(f.maximum(found[1], 0)), "i32")  # of NaN alone, none comes after another
            for buffer, value in ((values, found[0]), (indices, where)):
                offset = f.mul(place, buffer.width)
                f.store(storable(f, value, buffer.element), kernel.pointer(buffer), offset, align=buffer.width)
            return found

        f.loop(0, k, 1, best, [most, f.value(-1)])

    return loops.rowwise("top_k", domain.columns, domain.rows, body)


__all__ = ["LOOKS", "top_k", "top_k_reason"]
