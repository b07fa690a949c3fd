"""Kernels that are loops over elements: storing a value, its reduction, statistics of norms, pages, 8-bit activations.

Each is a function (row_lo, row_hi, col_lo, col_hi) over a value seen as a matrix [rows, columns], with pointers to the
buffers that it reads and writes. Columns run in vectors, the rest one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from xdsl.dialects.builtin import TensorType
from xdsl.ir import Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, ints, shape_of
from llmir_jax.dialects.llm.common import float_of
from llmir_jax.targets.cpu.expressions import ELEMENTS, Buffer, Evaluator, NotAVector, Stored, elementwise
from llmir_jax.targets.cpu.index import Index, Var, dynamic, unravel, variable
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Module, Number, Value, constant, element_of, vector
from llmir_jax.targets.cpu.matmul import InputFormat

RANGE = ("row_lo", "row_hi", "col_lo", "col_hi")
Body = Callable[[Kernel, Evaluator, Index, Index], None]
"""Emits what is done at a row and a column (of the first lane)."""


@dataclass
class Domain:
    """A value as a matrix of rows and columns, and the variables of its loops."""

    rows: int
    columns: int

    def row(self) -> Var:
        """The row."""
        return Var("row", self.rows)

    def column(self, lanes: int) -> Var:
        """The column, of the first of some lanes."""
        return Var("column", self.columns, lanes)


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
                if element_of(result.type) == "i1":
                    result = f.cast("zext", result, "i8")
                offset = f.mul(place.emit(f, evaluator.variables), target.width)
                f.store(result, kernel.pointer(target), offset, align=target.width)

            return body

        return of

    def writing_pages(self, op: llm.WritePagesOp, pages: Buffer, which: int) -> Callable[[Domain], Body]:
        """Writes keys (0) or values (1) to their pages; rows of the domain are tokens."""
        value = (op.k, op.v)[which]
        num_rows, num_heads, head_dim = shape_of(value)
        page_size = pages.shape[1]

        def of(domain: Domain) -> Body:
            def body(kernel: Kernel, evaluator: Evaluator, row: Index, column: Index) -> None:
                f = kernel.f

                def scalar() -> Evaluator:
                    return Evaluator(
                        f, self.stored, kernel.pointer, evaluator.variables, evaluator.lane, 1, evaluator.seen
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
                    f.store(result, kernel.pointer(pages), f.mul(place, pages.width), align=pages.width)

                f.when(is_token, write)

            return body

        return of

    def writing_int8_pages(
        self, op: llm.WritePagesOp, pages: Buffer, which: int
    ) -> Callable[[Domain], tuple[str, list[Buffer]]]:
        """The same for pages in 8 bits: kernels whose columns are whole heads."""
        value = (op.k, op.v)[which]
        num_rows, num_heads, head_dim = shape = shape_of(value)
        page_size, scales = pages.shape[1], pages.scales
        assert scales is not None

        def body(kernel: Kernel, row: _Row) -> None:
            f = kernel.f

            def int_at(operand: SSAValue, indices: list[Index]) -> Value:
                evaluator, _ = row._at(1, 0, 1)
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

        return lambda domain: self._rowwise("write_pages", num_heads * head_dim, num_rows, body)

    # Reductions along the last dimension

    def _rowwise(
        self, stem: str, columns: int, rows: int, body: Callable[[Kernel, "_Row"], None]
    ) -> tuple[str, list[Buffer]]:
        for lanes in (self.lanes, 1):
            kernel = Kernel(self.module, RANGE)
            f = kernel.f

            def row_of(row: Value, carried: list[Value], kernel: Kernel = kernel, lanes: int = lanes) -> list[Value]:
                body(kernel, _Row(self, kernel, Domain(rows, columns), row, lanes))
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

        def body(kernel: Kernel, row: _Row) -> None:
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

        return self._rowwise("statistics", columns, rows, body)

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

        def body(kernel: Kernel, row: _Row) -> None:
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
            if result.type == "i1":
                result = f.cast("zext", result, "i8")
            f.store(result, kernel.pointer(target), f.mul(row.number, target.width), align=target.width)

        return self._rowwise("reduce", columns, rows, body)

    def dot(self, op: stablehlo.DotGeneralOp, target: Buffer) -> tuple[str, list[Buffer]]:
        """A product of two values that is no matmul with a weight, one element of the result after another."""
        numbers = op.dot_dimension_numbers
        sides = [shape_of(op.lhs), shape_of(op.rhs)]
        batch = [ints(numbers.lhs_batching_dimensions), ints(numbers.rhs_batching_dimensions)]
        summed = [ints(numbers.lhs_contracting_dimensions), ints(numbers.rhs_contracting_dimensions)]
        free = [[d for d in range(len(shape)) if d not in (*batch[i], *summed[i])] for i, shape in enumerate(sides)]
        inner = tuple(sides[0][d] for d in summed[0])
        rows, columns = (int(np.prod(s, dtype=np.int64)) for s in (target.shape, inner))

        def body(kernel: Kernel, row: _Row) -> None:
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

        return self._rowwise("dot", columns, rows, body)

    def prepare(
        self, value: SSAValue, inputs: InputFormat, target: Buffer, scales: SSAValue | None = None
    ) -> tuple[str, list[Buffer]]:
        """Activations for a matmul: in 8 bits, or as floats with their sums; see `matmul.InputFormat`.

        `scales` [K / group] are those of 8 bits where they are known before; else each group's largest value gives its.
        """
        shape = shape_of(value)
        weight = inputs.weight
        rows, columns = inputs.num_rows, weight.num_columns
        group = inputs.group or weight.block
        assert group % weight.block == 0

        def body(kernel: Kernel, row: _Row) -> None:
            base = kernel.pointer(target)

            def element(evaluator: Evaluator, column: Index) -> Value:
                return evaluator.at(value, unravel(row.index * columns + column, shape))

            _prepare_row(kernel, row, inputs, base, element, group, scales)

        return self._rowwise("prepare", columns, rows, body)


def _prepare_row(
    kernel: Kernel,
    row: "_Row",
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
                evaluator, _ = row._at(1, 0, 1)
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
                sides = [] if weight.bits == 32 else [total]
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


class _Row:
    """One row of a rowwise kernel, and folds over its columns."""

    def __init__(self, loops: Loops, kernel: Kernel, domain: Domain, number: Value, lanes: int):
        self.loops, self.kernel, self.domain, self.number = loops, kernel, domain, number
        self.row_var = domain.row()
        self.index = variable(self.row_var)
        self.lanes = lanes

    def _at(self, width: int, column: Number, extent: int) -> tuple[Evaluator, Index]:
        var = Var("column", extent, width)
        variables: dict[Var, Number] = {self.row_var: self.number, var: column}
        kernel = self.kernel
        return Evaluator(kernel.f, self.loops.stored, kernel.pointer, variables, var, width), variable(var)

    def _fold(
        self,
        columns: int,
        make: Callable[[Evaluator, Index], Value],
        join: Callable[[Value, Value], Value],
        start: Callable[[int], Value],
    ) -> Value:
        """join over all columns: vectors first, then what is left."""
        f = self.kernel.f
        lanes = self.lanes if columns >= self.lanes else 1
        copies = 4 if columns >= 4 * lanes and lanes > 1 else 1
        step = lanes * copies
        whole = columns // step * step

        def body(column: Value, carried: list[Value]) -> list[Value]:
            result = []
            for i, total in enumerate(carried):
                evaluator, index = self._at(lanes, f.add(column, lanes * i), columns)
                result.append(join(total, make(evaluator, index)))
            return result

        totals = f.loop(0, whole, step, body, [start(lanes)] * copies)
        total = totals[0]
        for other in totals[1:]:
            total = join(total, other)
        for column in range(whole, columns // lanes * lanes, lanes):
            evaluator, index = self._at(lanes, column, columns)
            total = join(total, make(evaluator, index))
        while lanes > 1:
            lanes //= 2
            low, high = (f.shuffle(total, total, range(i, i + lanes)) for i in (0, lanes))
            total = join(low, high) if lanes > 1 else join(f.extract(total, 0), f.extract(total, 1))
        rest = columns // (self.lanes if columns >= self.lanes else 1) * (self.lanes if columns >= self.lanes else 1)

        def tail(column: Value, carried: list[Value]) -> list[Value]:
            evaluator, index = self._at(1, column, columns)
            return [join(carried[0], make(evaluator, index))]

        return f.loop(rest, columns, 1, tail, [total])[0] if rest < columns else total

    def sum(self, make: Callable[[Evaluator, Index], Value]) -> Value:
        """Σ over the columns."""
        f = self.kernel.f
        return self._fold(
            self.domain.columns,
            make,
            lambda a, b: f.binary("fadd", a, b),
            lambda lanes: constant("float", 0.0, lanes),
        )

    def fold(
        self, make: Callable[[Evaluator, Index], Value], combiner: Operation, first: Callable[[Evaluator], Value]
    ) -> Value:
        """A reduction by an operation of two elements."""
        f = self.kernel.f
        assert isinstance(combiner.results[0].type, TensorType)
        element = ELEMENTS[dtype_of(combiner.results[0]).name]
        neutral = _neutral(combiner, element)
        result = self._fold(
            self.domain.columns,
            make,
            lambda a, b: elementwise(f, combiner, [a, b]),
            lambda lanes: constant(element, neutral, lanes),
        )
        evaluator, _ = self._at(1, 0, 1)
        return elementwise(f, combiner, [result, first(evaluator)])

    def _segment(
        self,
        start: Index,
        length: int,
        make: Callable[[Evaluator, Index, Number], Value],
        join: Callable[[Value, Value], Value],
        zero: Callable[[int], Value],
    ) -> Value:
        """All of make(evaluator, column, place within the segment) joined, for some columns from `start` on."""
        f = self.kernel.f
        lanes = self.lanes if length >= self.lanes else 1

        def at(place: Number, index: Index, width: int) -> Value:
            var = Var("lane", width, width)  # so that lanes have something to run along
            variables: dict[Var, Number] = {self.row_var: self.number, var: 0}
            kernel = self.kernel
            evaluator = Evaluator(kernel.f, self.loops.stored, kernel.pointer, variables, var, width)
            return make(evaluator, start + index + variable(var), place)

        def body(number: Value, carried: list[Value]) -> list[Value]:
            index = dynamic(number, length // lanes) * lanes
            return [join(carried[0], at(f.mul(number, lanes), index, lanes))]

        total = zero(lanes)
        whole = length // lanes
        if whole > 8:
            (total,) = f.loop(0, whole, 1, body, [total])
        else:
            for number in range(whole):
                total = join(total, at(number * lanes, Index(number * lanes), lanes))
        width = lanes
        while width > 1:
            width //= 2
            parts = [f.shuffle(total, total, range(i, i + width)) for i in (0, width)]
            total = join(*parts) if width > 1 else join(f.extract(total, 0), f.extract(total, 1))
        for place in range(whole * lanes, length):
            total = join(total, at(place, Index(place), 1))
        return total

    def segment_max(self, make: Callable[[Evaluator, Index], Value], start: Index, length: int) -> Value:
        """The largest absolute value of some columns."""
        f = self.kernel.f
        return self._segment(
            start,
            length,
            lambda evaluator, column, at: f.overloaded("llvm.fabs", [make(evaluator, column)]),
            lambda a, b: f.overloaded("llvm.maximum", [a, b]),
            lambda lanes: constant("float", 0.0, lanes),
        )

    def segment_round(
        self,
        make: Callable[[Evaluator, Index], Value],
        start: Index,
        length: int,
        scale: Value,
        inverse: Value,
        base: Value,
        place: Number,
        padded: int,
    ) -> Value:
        """Store columns rounded to 8 bits; returns the sum of the integers, i32."""
        f = self.kernel.f

        def element(evaluator: Evaluator, column: Index, at: Number) -> Value:
            x = make(evaluator, column)
            by, divisor = f.splat(inverse, evaluator.lanes), f.splat(scale, evaluator.lanes)
            # x / scale, correctly rounded as a division is: the quotient, and what it left divided again
            quotient = f.binary("fmul", x, by)
            left = f.fma(f.emit(quotient.type, f"fneg {quotient.type} {quotient.ref}"), divisor, x)
            quotient = f.fma(left, by, quotient)
            limits = [constant("float", limit, evaluator.lanes) for limit in (127.0, -127.0)]
            whole = f.overloaded("llvm.minnum", [f.overloaded("llvm.rint", [quotient]), limits[0]])
            q = f.cast("fptosi", f.overloaded("llvm.maxnum", [whole, limits[1]]), "i32")
            f.store(f.cast("trunc", q, "i8"), base, f.add(place, at))
            return q

        total = self._segment(
            start, length, element, lambda a, b: f.binary("add", a, b), lambda lanes: constant("i32", 0, lanes)
        )
        for at in range(length, padded):
            f.store(constant("i8", 0), base, f.add(place, at))
        return total

    def round_groups(
        self,
        make: Callable[[Evaluator, Index], Value],
        number: Value,
        num_groups: int,
        group: int,
        inputs: InputFormat,
        base: Value,
    ) -> None:
        """As many groups as there are lanes, each rounded to 8 bits by its largest value: their numbers are vectors.

        `number` counts such bundles. Largest values are compared as integers, the order of positive floats, in which
        NaN comes last and so spreads.
        """
        f, lanes = self.kernel.f, self.lanes
        first = f.mul(number, lanes)
        start = dynamic(number, num_groups // lanes) * (lanes * group)
        var = Var("lane", lanes, lanes)
        variables: dict[Var, Number] = {self.row_var: self.number, var: 0}

        def at(member: int, part: int) -> Value:
            kernel = self.kernel
            evaluator = Evaluator(kernel.f, self.loops.stored, kernel.pointer, variables, var, lanes)
            return make(evaluator, start + Index(member * group + part * lanes) + variable(var))

        ints, floats = vector("i32", lanes), vector("float", lanes)
        largest = []
        for member in range(lanes):
            sizes = [f.bitcast(f.overloaded("llvm.fabs", [at(member, i)]), ints) for i in range(group // lanes)]
            while len(sizes) > 1:
                sizes = [*sizes[2:], f.combine("umax", sizes[0], sizes[1])]
            largest.append(sizes[0])
        scale = f.binary("fdiv", f.bitcast(f.join_lanes(largest, "umax"), floats), constant("float", 127.0, lanes))
        positive = f.fcompare("ugt", scale, constant("float", 0.0, lanes))
        quotient = f.binary("fdiv", constant("float", 1.0, lanes), scale)
        inverse = f.select(positive, quotient, constant("float", 0.0, lanes))
        kept = f.alloca(8 * lanes)
        f.store(scale, kept, 0, align=4)
        f.store(inverse, kept, 4 * lanes, align=4)
        sums = []
        for member in range(lanes):
            divisor = f.splat(f.load("float", kept, 4 * member, align=4), lanes)
            by = f.splat(f.load("float", kept, 4 * (lanes + member), align=4), lanes)
            total: Value | None = None
            for i in range(group // lanes):
                q = self._rounded(at(member, i), divisor, by)
                place = f.add(f.mul(self.number, inputs.row_bytes), f.mul(f.add(first, member), group))
                f.store(f.cast("trunc", q, "i8"), base, f.add(place, i * lanes))
                total = q if total is None else f.binary("add", total, q)
            assert total is not None
            sums.append(total)
        total = f.join_lanes(sums, "add")
        sides = [scale, total, f.binary("fmul", scale, f.cast("sitofp", total, "float"))]
        for i, side in enumerate(sides):
            offset = f.add(f.mul(self.number, 4 * inputs.weight.num_blocks), f.mul(first, 4))
            f.store(side, base, f.add(offset, inputs.side(i)), align=4)

    def _rounded(self, x: Value, divisor: Value, inverse: Value) -> Value:
        """x / divisor, correctly rounded as a division is: the quotient, and what it left divided again; as i32."""
        f = self.kernel.f
        quotient = f.binary("fmul", x, inverse)
        left = f.fma(f.emit(quotient.type, f"fneg {quotient.type} {quotient.ref}"), divisor, x)
        quotient = f.fma(left, inverse, quotient)
        return f.cast("fptosi", f.overloaded("llvm.rint", [quotient]), "i32")

    def segment_copy(
        self,
        make: Callable[[Evaluator, Index], Value],
        start: Index,
        length: int,
        base: Value,
        place: Number,
        padded: int,
    ) -> Value:
        """Store columns as they are; returns their sum."""
        f = self.kernel.f

        def element(evaluator: Evaluator, column: Index, at: Number) -> Value:
            x = make(evaluator, column)
            f.store(x, base, f.add(place, f.mul(at, 4)), align=4)
            return x

        total = self._segment(
            start, length, element, lambda a, b: f.binary("fadd", a, b), lambda lanes: constant("float", 0.0, lanes)
        )
        for at in range(length, padded):
            f.store(constant("float", 0.0), base, f.add(place, 4 * at), align=4)
        return total


def _neutral(combiner: Operation, element: str) -> float | int:
    if isinstance(combiner, stablehlo.AddOp):
        return 0
    if isinstance(combiner, stablehlo.MultiplyOp):
        return 1
    if isinstance(combiner, stablehlo.MaximumOp):
        return float("-inf") if element == "float" else 0 if element == "i1" else -(2**31)
    if isinstance(combiner, stablehlo.MinimumOp):
        return float("inf") if element == "float" else 1 if element == "i1" else 2**31 - 1
    if isinstance(combiner, stablehlo.AndOp):
        return 1 if element == "i1" else -1
    return 0


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


__all__ = ["Domain", "Loops", "reduce_reason", "rows_and_columns"]
