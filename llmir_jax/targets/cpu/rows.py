"""One row of a value, and folds over its columns."""

from collections.abc import Callable
from dataclasses import dataclass

from xdsl.dialects.builtin import TensorType
from xdsl.ir import Operation
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects.build import dtype_of
from llmir_jax.targets.cpu.elementwise import ELEMENTS, elementwise
from llmir_jax.targets.cpu.expressions import Evaluator, Stored
from llmir_jax.targets.cpu.index import Index, Var, dynamic, variable
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Number, Value, constant, vector
from llmir_jax.targets.cpu.matmul import InputFormat


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


class Row:
    """One row of a rowwise kernel, and folds over its columns."""

    def __init__(self, stored: Stored, kernel: Kernel, domain: Domain, number: Value, lanes: int):
        self.stored, self.kernel, self.domain, self.number = stored, kernel, domain, number
        self.row_var = domain.row()
        self.index = variable(self.row_var)
        self.lanes = lanes

    def at(self, width: int, column: Number, extent: int) -> tuple[Evaluator, Index]:
        var = Var("column", extent, width)
        variables: dict[Var, Number] = {self.row_var: self.number, var: column}
        kernel = self.kernel
        return Evaluator(kernel.f, self.stored, kernel.pointer, variables, var, width), variable(var)

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
                evaluator, index = self.at(lanes, f.add(column, lanes * i), columns)
                result.append(join(total, make(evaluator, index)))
            return result

        totals = f.loop(0, whole, step, body, [start(lanes)] * copies)
        total = totals[0]
        for other in totals[1:]:
            total = join(total, other)
        for column in range(whole, columns // lanes * lanes, lanes):
            evaluator, index = self.at(lanes, column, columns)
            total = join(total, make(evaluator, index))
        while lanes > 1:
            lanes //= 2
            low, high = (f.shuffle(total, total, range(i, i + lanes)) for i in (0, lanes))
            total = join(low, high) if lanes > 1 else join(f.extract(total, 0), f.extract(total, 1))
        rest = columns // (self.lanes if columns >= self.lanes else 1) * (self.lanes if columns >= self.lanes else 1)

        def tail(column: Value, carried: list[Value]) -> list[Value]:
            evaluator, index = self.at(1, column, columns)
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
        evaluator, _ = self.at(1, 0, 1)
        return elementwise(f, combiner, [result, first(evaluator)])

    def lanes_at(self, make: Callable[[Evaluator, Index], Value], start: Index, width: int) -> Value:
        """make(evaluator, column) of `width` columns side by side."""
        var = Var("lane", width, width)  # so that lanes have something to run along
        variables: dict[Var, Number] = {self.row_var: self.number, var: 0}
        kernel = self.kernel
        evaluator = Evaluator(kernel.f, self.stored, kernel.pointer, variables, var, width)
        return make(evaluator, start + variable(var))

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
            return self.lanes_at(lambda evaluator, column: make(evaluator, column, place), start + index, width)

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

    def segment_bound(self, make: Callable[[Evaluator, Index], Value], start: Index, length: int, name: str) -> Value:
        """The "minimum" or the "maximum" of some columns."""
        f = self.kernel.f
        neutral = float("inf") if name == "minimum" else float("-inf")
        return self._segment(
            start,
            length,
            lambda evaluator, column, at: make(evaluator, column),
            lambda a, b: f.overloaded(f"llvm.{name}", [a, b]),
            lambda lanes: constant("float", neutral, lanes),
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
            evaluator = Evaluator(kernel.f, self.stored, kernel.pointer, variables, var, lanes)
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


__all__ = ["Domain", "Row"]
