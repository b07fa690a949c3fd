"""Kernels that are loops over elements: storing a value, its reduction, statistics of norms, pages, 8-bit activations.

Each is a function (row_lo, row_hi, col_lo, col_hi) over a value seen as a matrix [rows, columns], with pointers to the
buffers that it reads and writes. Columns run in vectors, the rest one by one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from xdsl.ir import SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import ints, shape_of
from llmir_jax.dialects.llm.common import float_of
from llmir_jax.targets.cpu.elementwise import storable
from llmir_jax.targets.cpu.expressions import Buffer, Evaluator, NotAVector, Stored
from llmir_jax.targets.cpu.index import Index, Var, unravel, variable
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Module, Number, Value, constant
from llmir_jax.targets.cpu.rows import Domain, Row

RANGE = ("row_lo", "row_hi", "col_lo", "col_hi")
Body = Callable[[Kernel, Evaluator, Index, Index], None]
"""Emits what is done at a row and a column (of the first lane)."""


class Loops:
    """Emits kernels into a module."""

    def __init__(self, module: Module, stored: Stored):
        self.module, self.stored = module, stored
        self.lanes = module.host.lanes

    def over(
        self,
        domain: Domain,
        stem: str,
        body: Body,
    ) -> tuple[str, list[Buffer]]:
        """A kernel of body(kernel, evaluator, row, column) for each vector of columns: its name and buffers."""
        lanes = self.lanes if domain.columns >= self.lanes else 1
        try:
            return self._over(domain, stem, body, lanes)
        except NotAVector:
            return self._over(domain, stem, body, 1)

    def _over(
        self,
        domain: Domain,
        stem: str,
        body: Body,
        lanes: int,
    ) -> tuple[str, list[Buffer]]:
        kernel = Kernel(self.module, RANGE)
        f = kernel.f
        row_lo, row_hi, col_lo, col_hi = (kernel.number(name) for name in RANGE)

        def row_of(row: Value, carried: list[Value]) -> list[Value]:
            def columns(width: int) -> Callable[[Value, list[Value]], list[Value]]:
                def column_of(column: Value, carried: list[Value]) -> list[Value]:
                    row_var, column_var = domain.row(), domain.column(width)
                    variables: dict[Var, Number] = {row_var: row, column_var: column}
                    evaluator = Evaluator(f, self.stored, kernel.pointer, variables, column_var, width)
                    body(kernel, evaluator, variable(row_var), variable(column_var))
                    return []

                return column_of

            if lanes == 1:
                f.loop(col_lo, col_hi, 1, columns(1))
                return []
            count = f.sub(col_hi, col_lo)
            whole = f.add(col_lo, f.mul(f.div(count, lanes), lanes))
            f.loop(col_lo, whole, lanes, columns(lanes))
            if domain.columns % lanes:
                f.loop(whole, col_hi, 1, columns(1))
            return []

        f.loop(row_lo, row_hi, 1, row_of)
        return f.finish(stem), kernel.buffers

    def probe(self, domain: Domain, body: Body) -> list[tuple[Buffer, Index]]:
        """What a body reads, as places in buffers in terms of the variables of `domain`, without any code."""
        found: list[tuple[Buffer, Index]] = []
        kernel = Kernel(Module(self.module.host), RANGE)
        row, column = domain.row(), domain.column(1)
        variables: dict[Var, Number] = {row: kernel.number("row_lo"), column: kernel.number("col_lo")}
        seen = lambda buffer, place: found.append((buffer, place))  # noqa: E731
        evaluator = Evaluator(kernel.f, self.stored, kernel.pointer, variables, column, 1, seen)
        body(kernel, evaluator, variable(row), variable(column))
        return found

    def storing(self, value: SSAValue, target: Buffer, start: Sequence[int] = ()) -> Callable[[Domain], Body]:
        """Stores a value, whose first element goes to the indices `start` of the target."""
        shape = shape_of(value)

        def of(domain: Domain) -> Body:
            def body(kernel: Kernel, evaluator: Evaluator, row: Index, column: Index) -> None:
                indices = unravel(row * domain.columns + column, shape)
                result = evaluator.at(value, indices)
                place = Index(sum(i * stride for i, stride in zip(start, target.strides, strict=False)))
                for index, stride in zip(indices, target.strides, strict=True):
                    place = place + index * stride
                if evaluator.lanes > 1 and place.stride(evaluator.lane, evaluator.lanes) != 1:
                    raise NotAVector
                f = kernel.f
                offset = f.mul(place.emit(f, evaluator.variables), target.width)
                f.store(storable(f, result, target.element), kernel.pointer(target), offset, align=target.width)

            return body

        return of

    # Reductions along the last dimension

    def rowwise(
        self, stem: str, columns: int, rows: int, body: Callable[[Kernel, Row], None]
    ) -> tuple[str, list[Buffer]]:
        for lanes in (self.lanes, 1):
            kernel = Kernel(self.module, RANGE)
            f = kernel.f

            def row_of(row: Value, carried: list[Value], kernel: Kernel = kernel, lanes: int = lanes) -> list[Value]:
                body(kernel, Row(self.stored, kernel, Domain(rows, columns), row, lanes))
                return []

            try:
                f.loop(kernel.number("row_lo"), kernel.number("row_hi"), 1, row_of)
            except NotAVector:
                continue
            return f.finish(stem), kernel.buffers
        raise AssertionError("a single element can always be computed")

    def statistics(self, op: llm.RMSNormOp | llm.LayerNormOp, target: Buffer) -> tuple[str, list[Buffer]]:
        """1/σ of each row of a norm's input, of a layer norm the mean before it."""
        shape = shape_of(op.x)
        rows, columns = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
        epsilon = float_of(op.epsilon)

        def body(kernel: Kernel, row: Row) -> None:
            f = kernel.f
            per_row = 8 if isinstance(op, llm.LayerNormOp) else 4
            place = f.mul(row.number, per_row)
            mean: Value | None = None

            def element(evaluator: Evaluator, column: Index) -> Value:
                return evaluator.at(op.x, unravel(row.index * columns + column, shape))

            if isinstance(op, llm.LayerNormOp):
                mean = f.binary("fmul", row.sum(element), constant("float", 1 / columns))
                f.store(mean, kernel.pointer(target), place, align=4)
                place = f.add(place, 4)

            def square(evaluator: Evaluator, column: Index) -> Value:
                x = element(evaluator, column)
                if mean is not None:
                    x = f.binary("fsub", x, f.splat(mean, evaluator.lanes))
                return f.binary("fmul", x, x)

            variance = f.binary("fmul", row.sum(square), constant("float", 1 / columns))
            root = f.overloaded("llvm.sqrt", [f.binary("fadd", variance, constant("float", epsilon))])
            f.store(f.binary("fdiv", constant("float", 1.0), root), kernel.pointer(target), place, align=4)

        return self.rowwise("statistics", columns, rows, body)

    def reduce(self, op: stablehlo.ReduceOp, target: Buffer) -> tuple[str, list[Buffer]]:
        """A reduction of one value by one operation, over any dimensions."""
        x, init = op.operands
        shape = shape_of(x)
        dims = ints(op.dimensions)
        kept = [d for d in range(len(shape)) if d not in dims]
        out_shape = tuple(shape[d] for d in kept)
        in_shape = tuple(shape[d] for d in dims)
        rows, columns = (int(np.prod(s, dtype=np.int64)) for s in (out_shape, in_shape))
        combiner = op.body.block.first_op
        assert combiner is not None

        def body(kernel: Kernel, row: Row) -> None:
            f = kernel.f
            outer = unravel(row.index, out_shape)

            def element(evaluator: Evaluator, column: Index) -> Value:
                inner = unravel(column, in_shape)
                indices = [Index()] * len(shape)
                for d, index in (*zip(kept, outer, strict=True), *zip(dims, inner, strict=True)):
                    indices[d] = index
                return evaluator.at(x, indices)

            def first(evaluator: Evaluator) -> Value:
                return evaluator.at(init, [])

            result = row.fold(element, combiner, first)
            offset = f.mul(row.number, target.width)
            f.store(storable(f, result, target.element), kernel.pointer(target), offset, align=target.width)

        return self.rowwise("reduce", columns, rows, body)

    def dot(self, op: stablehlo.DotGeneralOp, target: Buffer) -> tuple[str, list[Buffer]]:
        """A product of two values that is no matmul with a weight, one element of the result after another."""
        numbers = op.dot_dimension_numbers
        sides = [shape_of(op.lhs), shape_of(op.rhs)]
        batch = [ints(numbers.lhs_batching_dimensions), ints(numbers.rhs_batching_dimensions)]
        summed = [ints(numbers.lhs_contracting_dimensions), ints(numbers.rhs_contracting_dimensions)]
        free = [[d for d in range(len(shape)) if d not in (*batch[i], *summed[i])] for i, shape in enumerate(sides)]
        inner = tuple(sides[0][d] for d in summed[0])
        rows, columns = (int(np.prod(s, dtype=np.int64)) for s in (target.shape, inner))

        def body(kernel: Kernel, row: Row) -> None:
            f = kernel.f
            outer = unravel(row.index, target.shape)
            num_batch, num_left = len(batch[0]), len(free[0])
            kept = [outer[num_batch : num_batch + num_left], outer[num_batch + num_left :]]

            def product(evaluator: Evaluator, column: Index) -> Value:
                places = unravel(column, inner)
                values = []
                for i, value in enumerate((op.lhs, op.rhs)):
                    indices = [Index()] * len(sides[i])
                    for dims, found in ((batch[i], outer[:num_batch]), (free[i], kept[i]), (summed[i], places)):
                        for d, index in zip(dims, found, strict=True):
                            indices[d] = index
                    values.append(evaluator.at(value, indices))
                return f.binary("fmul", *values)

            total = row.sum(product)
            f.store(total, kernel.pointer(target), f.mul(row.number, 4), align=4)

        return self.rowwise("dot", columns, rows, body)


def reduce_reason(op: stablehlo.ReduceOp) -> str | None:
    """Why a reduction has no kernel."""
    if len(op.operands) != 2:
        return "reduces several values at once"
    block = op.body.block
    first = block.first_op
    known = (stablehlo.AddOp, stablehlo.MultiplyOp, stablehlo.MaximumOp, stablehlo.MinimumOp, stablehlo.AndOp)
    if not isinstance(first, (*known, stablehlo.OrOp)) or first.next_op is not block.last_op:
        return "reduces by more than one operation"
    if set(first.operands) != set(block.args):
        return "reduces by something else than its two elements"
    return None


def rows_and_columns(shape: Sequence[int]) -> Domain:
    """Leading dimensions as rows, the last as columns."""
    if not shape:
        return Domain(1, 1)
    return Domain(int(np.prod(shape[:-1], dtype=np.int64)), shape[-1])


__all__ = ["Loops", "reduce_reason", "rows_and_columns"]
