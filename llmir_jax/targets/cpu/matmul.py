"""Products of activations with packed weights: y[t, n] = Σ_k x[t, k] · w[n, k].

One kernel computes R tokens times 16 rows of a weight in registers, block by block along k (see `layout`). With
activations in 8 bits, x[t, k] = xq[t, k] · xs[t, g] in groups that a block lies in, and u = q + bias,

    Σ_block x · w = scale · xs · Σ xq · u  -  scale · bias · xs · Σ xq      (+ minimum · xs · Σ xq)

where Σ xq · u is one dot instruction for four columns of a vector of rows, and the last sum is known with x. With float
activations u is turned into floats, lane by lane of the same bytes. Sums over blocks are in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llmir_jax.targets.cpu.halves import half_to_float, pair_of_bfloats, widen
from llmir_jax.targets.cpu.layout import ROWS, PackedFormat, round_up
from llmir_jax.targets.cpu.llvm import Function, Module, Number, Value, constant, constants, vector

TILES_AT_ONCE = 4
"""Tiles that stay in a core's nearest cache while all rows go by."""
ROWS_AT_ONCE, MANY_ROWS_AT_ONCE = 4, 6
"""Tokens whose sums stay in registers with two vectors of rows: of few, and of many, where a rest is little."""
_MANY = 128
_UNROLLED = 16
"""At most so many vectors of a block are straight code."""


@dataclass(frozen=True, kw_only=True)
class InputFormat:
    """Activations [num_rows, K] prepared for a weight: bytes from the start of their buffer.

    int8: xq int8 [num_rows, G · B'], then scales float32, sums Σ xq int32 and xs · Σ xq float32, [num_rows, G] each.
    float: x float32 [num_rows, G · B'], then Σ x float32 [num_rows, G]; for float weights x alone.
    in_bfloats: x bfloat16 [num_rows, K'], for weights of the same.
    Padding columns are 0.
    """

    num_rows: int
    weight: PackedFormat
    group: int | None  # of activations in 8 bits; None for floats
    in_bfloats: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes of an activation."""
        return 1 if self.is_int8 else 2 if self.in_bfloats else 4

    @property
    def is_int8(self) -> bool:
        """Whether activations are 8-bit integers."""
        return self.group is not None

    @property
    def row_length(self) -> int:
        """Elements of a row, padding included."""
        return self.weight.num_blocks * self.weight.padded_block

    @property
    def row_bytes(self) -> int:
        """Bytes from row to row of the elements."""
        return self.row_length * self.element_bytes

    @property
    def side_bytes(self) -> int:
        """Bytes of one number a block and row."""
        return round_up(self.num_rows * self.weight.num_blocks * 4, 64)

    def side(self, number: int) -> int:
        """Where the numbers of blocks begin: int8 has 0 scales, 1 sums of integers, 2 of floats; float has 0 sums."""
        return round_up(self.num_rows * self.row_bytes, 64) + number * self.side_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.side(3 if self.is_int8 else 0 if self.weight.is_float else 1)


@dataclass(frozen=True, kw_only=True)
class _Dot:
    """acc + Σ of four products of bytes in each 32-bit lane."""

    takes_biased: bool  # u of 8 bits; else q
    emit: Callable[[Function, Value, Value, Value, bool], Value]  # acc, weights, activations, of four bits


def _vpdpbusd(f: Function, acc: Value, u: Value, x: Value, _: bool) -> Value:
    return f.intrinsic("llvm.x86.avx512.vpdpbusd.512", acc.type, [acc, u, x])


def _vpdpbusd_256(f: Function, acc: Value, u: Value, x: Value, _: bool) -> Value:
    return f.intrinsic("llvm.x86.avx512.vpdpbusd.256", acc.type, [acc, u, x])


def _avx2(f: Function, acc: Value, w: Value, x: Value, is_nibble: bool) -> Value:
    if not is_nibble:  # unsigned times signed saturates: |w| · (x with the sign of w) does not
        x = f.intrinsic("llvm.x86.avx2.psign.b", x.type, [x, w])
        w = f.intrinsic("llvm.abs.v32i8", w.type, [w, constant("i1", 0)])
    pairs = f.intrinsic("llvm.x86.avx2.pmadd.ub.sw", "<16 x i16>", [w, x])
    fours = f.intrinsic("llvm.x86.avx2.pmadd.wd", "<8 x i32>", [pairs, constant("i16", 1, 16)])
    return f.binary("add", acc, fours)


def _sdot(f: Function, acc: Value, w: Value, x: Value, _: bool) -> Value:
    return f.intrinsic("llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])


def _plain(f: Function, acc: Value, u: Value, x: Value, _: bool) -> Value:
    lanes = f.module.host.lanes
    wide_u, wide_x = (f.bitcast(v, vector("i32", lanes)) for v in (u, x))
    for i in range(4):
        a = f.binary("lshr", wide_u, constant("i32", 8 * i, lanes)) if i else wide_u
        a = f.binary("and", a, constant("i32", 255, lanes))
        b = f.binary("shl", wide_x, constant("i32", 24 - 8 * i, lanes)) if i < 3 else wide_x
        b = f.binary("ashr", b, constant("i32", 24, lanes))
        acc = f.binary("add", acc, f.binary("mul", a, b))
    return acc


_DOTS = {
    "avx512-vnni": _Dot(takes_biased=True, emit=_vpdpbusd),
    "avx-vnni": _Dot(takes_biased=True, emit=_vpdpbusd_256),
    "avx2": _Dot(takes_biased=False, emit=_avx2),
    "neon-dotprod": _Dot(takes_biased=False, emit=_sdot),
    "generic": _Dot(takes_biased=True, emit=_plain),
}


def vectors_at_once(module: Module, inputs: InputFormat) -> int:
    """Vectors of rows whose sums stay in registers, where there are many tokens.

    Two, so that a number of the input that is read serves two: machines read two vectors at a time while they add up
    two, and scales and weights are read too.
    """
    return 2 if inputs.is_int8 and module.host.num_registers == 32 else 1


def tokens_at_once(module: Module, weight: PackedFormat) -> int:
    """R, the most tokens whose sums stay in registers."""
    registers = module.host.num_registers
    if weight.is_float:
        return 12 if registers == 32 else 6
    return 8 if registers == 32 else 4


def rows_at_once(module: Module, inputs: InputFormat) -> int:
    """Tokens that are computed together: all, if there are few."""
    at_once = tokens_at_once(module, inputs.weight)
    if inputs.num_rows <= at_once:
        return inputs.num_rows
    if vectors_at_once(module, inputs) == 1:
        return at_once
    return MANY_ROWS_AT_ONCE if inputs.num_rows >= _MANY else ROWS_AT_ONCE


@dataclass
class _Product:
    """Emits the sums of some rows of activations and some vectors of rows of tiles, those of a row side by side."""

    f: Function
    inputs: InputFormat
    x: Value
    rows: list[Number]
    vectors: list[tuple[Value, int]]  # tiles, and which vector of a tile's 16 rows

    def __post_init__(self) -> None:
        self.lanes = self.f.module.host.lanes
        self.weight = self.inputs.weight
        self.dot = _DOTS[self.f.module.host.dot]

    def _side(self, number: int, row: int, block: Number, type_: str) -> Value:
        """A number of an input's block, in every lane."""
        f = self.f
        place = f.add(f.mul(self.rows[row], 4 * self.weight.num_blocks), f.mul(block, 4))
        return f.splat(f.load(type_, self.x, f.add(place, self.inputs.side(number)), align=4), self.lanes)

    def _weight_side(self, number: int, block: Value) -> list[Value]:
        f, weight = self.f, self.weight
        width = weight.side_bytes // ROWS
        found = []
        for tile, sub in self.vectors:
            offset = weight.value_bytes + number * weight.side_bytes + sub * self.lanes * width
            base = f.at(tile, f.add(f.mul(block, weight.block_bytes), offset))
            loaded = f.load(vector(weight.side, self.lanes), base, align=width)
            found.append(loaded if weight.side == "float" else half_to_float(f, loaded))
        return found

    def _vectors_of_block(self) -> int:
        """Vectors of bytes of a block."""
        return self.weight.padded_block // (8 if self.weight.bits == 4 else 4)

    def _over_vectors(self, state: list[Value], step: Callable[[Number, list[Value]], list[Value]]) -> list[Value]:
        """step(number of the vector, state) → state for each vector of a block."""
        count = self._vectors_of_block()
        whole = 0 if count <= _UNROLLED else count // 8 * 8
        if whole:

            def body(start: Value, carried: list[Value]) -> list[Value]:
                for i in range(8):
                    carried = step(self.f.add(start, i), carried)
                return carried

            state = self.f.loop(0, whole, 8, body, state)
        for i in range(whole, count):
            state = step(i, state)
        return state

    def _bytes(self, block: Value, number: Number) -> list[Value]:
        f = self.f
        found = []
        for tile, sub in self.vectors:
            offset = f.add(f.mul(block, self.weight.block_bytes), f.add(f.mul(number, 64), sub * self.lanes * 4))
            found.append(f.load(vector("i8", 4 * self.lanes), tile, offset, align=4))
        return found

    def _nibbles(self, raw: Value) -> list[Value]:
        f, lanes = self.f, self.lanes
        mask = constant("i8", 15, 4 * lanes)
        wide = f.bitcast(raw, vector("i16", 2 * lanes))
        shifted = f.bitcast(f.binary("lshr", wide, constant("i16", 4, 2 * lanes)), raw.type)
        return [f.binary("and", raw, mask), f.binary("and", shifted, mask)]

    def _unpacked(self, raw: Value) -> list[Value]:
        """Bytes as the dot instruction takes them; of four bits, the low ones and the high ones."""
        if self.weight.bits == 4:
            return self._nibbles(raw)
        if self.dot.takes_biased or self.weight.has_minima:
            return [raw]
        return [self.f.binary("xor", raw, constant("i8", -128, 4 * self.lanes))]

    def int8_block(self, block: Value, sums: list[Value]) -> list[Value]:
        """Sums with those of a block added."""
        f, weight, count = self.f, self.weight, len(self.vectors)
        is_nibble = weight.bits == 4
        sums_init = []
        for row in range(len(self.rows)):
            zero = constant("i32", 0, self.lanes)
            if (is_nibble or self.dot.takes_biased) and weight.bias:
                correction = self._side(1, row, block, "i32")
                zero = f.binary("mul", correction, constant("i32", -weight.bias, self.lanes))
            sums_init += [zero] * count

        def step(number: Number, dots: list[Value]) -> list[Value]:
            parts = [self._unpacked(raw) for raw in self._bytes(block, number)]
            result = list(dots)
            for part in range(len(parts[0])):
                for row, place in enumerate(self.rows):
                    offset = f.add(f.mul(place, self.inputs.row_bytes), f.mul(block, weight.padded_block))
                    offset = f.add(f.add(offset, f.mul(number, 4)), part * (weight.padded_block // 2))
                    four = f.splat(f.load("i32", self.x, offset, align=4), self.lanes)
                    x = f.bitcast(four, vector("i8", 4 * self.lanes))
                    for v, u in enumerate(parts):
                        at = row * count + v
                        result[at] = self.dot.emit(f, result[at], u[part], x, is_nibble)
            return result

        dots = self._over_vectors(sums_init, step)
        scales = self._weight_side(0, block)
        minima = self._weight_side(1, block) if weight.has_minima else None
        result = []
        for row in range(len(self.rows)):
            own_scale = self._side(0, row, block, "float")
            own_sum = None if minima is None else self._side(2, row, block, "float")
            for v, scale in enumerate(scales):
                at = row * count + v
                product = f.binary("fmul", scale, own_scale)
                total = f.fma(f.cast("sitofp", dots[at], "float"), product, sums[at])
                if minima is not None and own_sum is not None:
                    total = f.fma(minima[v], own_sum, total)
                result.append(total)
        return result

    def float_block(self, block: Value, sums: list[Value]) -> list[Value]:
        """The same, of float activations."""
        f, weight, lanes = self.f, self.weight, self.lanes

        def step(number: Number, partial: list[Value]) -> list[Value]:
            (content,) = self._bytes(block, number)
            raw = f.bitcast(content, vector("i32", lanes))
            result = list(partial)
            bits = weight.bits
            for part in range(8 // bits):
                for i in range(4):
                    shift = 8 * i + 4 * part
                    u = f.binary("lshr", raw, constant("i32", shift, lanes)) if shift else raw
                    u = f.binary("and", u, constant("i32", (1 << bits) - 1, lanes))
                    if weight.bias:
                        u = f.binary("sub", u, constant("i32", weight.bias, lanes))
                    w = f.cast("sitofp", u, "float")
                    for row, place in enumerate(self.rows):
                        offset = f.add(f.mul(place, self.inputs.row_bytes), f.mul(block, 4 * weight.padded_block))
                        at = f.add(f.mul(number, 16), 4 * (i + part * (weight.padded_block // 2)))
                        x = f.splat(f.load("float", self.x, f.add(offset, at), align=4), lanes)
                        result[row] = f.fma(w, x, result[row])
            return result

        partial = self._over_vectors([constant("float", 0, lanes)] * len(self.rows), step)
        (scale,) = self._weight_side(0, block)
        result = [f.fma(part, scale, total) for part, total in zip(partial, sums, strict=True)]
        if weight.has_minima:
            (minimum,) = self._weight_side(1, block)
            result = [f.fma(minimum, self._side(0, row, block, "float"), total) for row, total in enumerate(result)]
        return result

    def _float_columns(self, place: Number) -> list[Value]:
        """A vector of rows of each of the columns that lie together."""
        f, weight, lanes = self.f, self.weight, self.lanes
        ((tile, sub),) = self.vectors
        size = weight.bits // 8 * weight.columns_together
        offset = f.add(f.mul(place, size * ROWS), size * lanes * sub)
        if weight.columns_together == 2:
            return pair_of_bfloats(f, f.load(vector("i32", lanes), tile, offset, align=4))
        return [widen(f, f.load(vector(weight.side, lanes), tile, offset, align=size))]

    def float_weights(self) -> list[Value]:
        """Sums of float weights."""
        f, lanes = self.f, self.lanes
        ((tile, sub),) = self.vectors
        together = self.weight.columns_together
        k = self.weight.padded_block // together
        copies = max(1, 8 // len(self.rows))  # so that sums do not wait for each other
        count = len(self.rows)

        def pair(place: Number, sums: list[Value]) -> list[Value]:
            """Two columns by one instruction."""
            kind = vector("bfloat", 2 * lanes)
            w = f.load(kind, tile, f.add(f.mul(place, 4 * ROWS), 4 * lanes * sub), align=4)
            result = []
            for total, row in zip(sums, self.rows, strict=True):
                offset = f.add(f.mul(row, self.inputs.row_bytes), f.mul(place, 4))
                x = f.bitcast(f.splat(f.load("i32", self.x, offset, align=4), lanes), kind)
                result.append(f.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", total.type, [total, w, x]))
            return result

        def column(place: Number, sums: list[Value]) -> list[Value]:
            if self.inputs.in_bfloats:
                return pair(place, sums)
            result = list(sums)
            for i, w in enumerate(self._float_columns(place)):
                for r, row in enumerate(self.rows):
                    offset = f.add(f.mul(row, self.inputs.row_bytes), f.add(f.mul(place, 4 * together), 4 * i))
                    result[r] = f.fma(w, f.splat(f.load("float", self.x, offset, align=4), lanes), result[r])
            return result

        def body(start: Value, carried: list[Value]) -> list[Value]:
            result = []
            for i in range(copies):
                result += column(f.add(start, i), carried[i * count : (i + 1) * count])
            return result

        zero = constant("float", 0, lanes)
        sums = f.loop(0, k // copies * copies, copies, body, [zero] * (count * copies))
        for place in range(k // copies * copies, k):
            sums[:count] = column(place, sums[:count])
        while len(sums) > count:
            half = (len(sums) // count + 1) // 2 * count
            rest = sums[half:]
            sums = [f.binary("fadd", a, b) for a, b in zip(sums, rest, strict=False)] + sums[len(rest) : half]
        return sums

    def sums(self) -> list[Value]:
        """Products of each row of activations with each vector of rows."""
        if self.weight.is_float:
            return self.float_weights()
        zeros = [constant("float", 0, self.lanes)] * (len(self.rows) * len(self.vectors))
        block = self.int8_block if self.inputs.is_int8 else self.float_block
        return self.f.loop(0, self.weight.num_blocks, 1, block, zeros)


def matmul_kernel(module: Module, inputs: InputFormat, *, row_stride: int, num_columns: int) -> str:
    """A function (x, weight, y, row, end, tile, tiles) that computes some tiles of some rows: its name.

    y is float32 [num_rows, row_stride], of which `num_columns` are written. Rows are those from `row`, a multiple of
    `rows_at_once`, to `end` at least, and less than as many more; all of them if there are no more than that.
    """
    parameters = [("x", "ptr"), ("w", "ptr"), ("y", "ptr noalias")]
    parameters += [(name, "i64") for name in ("row", "end", "tile", "tiles")]
    f = Function(module, parameters)
    arguments = f.arguments
    x, w, y = (arguments[name] for name in "xwy")
    weight = inputs.weight
    lanes = module.host.lanes
    ragged = num_columns % ROWS if row_stride % ROWS or num_columns > row_stride else 0

    last_tile = f.value(f.sub(f.add(arguments["tile"], arguments["tiles"]), 1))
    many = inputs.num_rows > tokens_at_once(module, weight)
    together = vectors_at_once(module, inputs) if many else 1
    subs = ROWS // lanes

    def rows_of(first: Number, count: int, start: Value, stop: Value) -> None:
        rows = [f.add(first, i) for i in range(count)]

        def compute(vectors: list[tuple[Value, int]]) -> None:
            """Of vectors, as (tile, which of its vectors)."""
            places = [(f.at(w, f.mul(tile, weight.tile_bytes)), sub) for tile, sub in vectors]
            sums = _Product(f=f, inputs=inputs, x=x, rows=rows, vectors=places).sums()
            for i, row in enumerate(rows):
                for v, (tile, sub) in enumerate(vectors):
                    total = sums[i * len(vectors) + v]
                    place = f.at(y, f.add(f.mul(row, 4 * row_stride), f.add(f.mul(tile, 4 * ROWS), 4 * lanes * sub)))
                    if ragged:
                        _store_ragged(f, total, place, tile, weight.num_tiles - 1, ragged - lanes * sub)
                    else:
                        f.store(total, place, align=4)

        def tile_of(tile: Value, carried: list[Value]) -> list[Value]:
            if together > subs:
                # of an odd number of tiles the last one is computed twice
                compute([(f.value(f.minimum(f.add(tile, i), last_tile)), 0) for i in range(together)])
                return []
            for sub in range(0, subs, together):
                compute([(tile, sub + i) for i in range(together)])
            return []

        f.loop(start, stop, max(1, together // subs), tile_of)

    at_once = rows_at_once(module, inputs)
    whole = inputs.num_rows // at_once * at_once

    def some_tiles(start: Value, stop: Value) -> None:
        def block_of_rows(first: Value, carried: list[Value]) -> list[Value]:
            rows_of(first, at_once, start, stop)
            return []

        if not many:
            rows_of(0, inputs.num_rows, start, stop)
            return
        end = arguments["end"]
        f.loop(arguments["row"], f.minimum(end, whole), at_once, block_of_rows)
        if inputs.num_rows > whole:
            rest = f.compare("sgt", end, whole)
            f.when(rest, lambda: rows_of(whole, inputs.num_rows - whole, start, stop))

    last = f.value(f.add(last_tile, 1))
    if not many:
        some_tiles(arguments["tile"], last)
        return f.finish("matmul")

    def few(start: Value, carried: list[Value]) -> list[Value]:
        some_tiles(start, f.value(f.minimum(f.add(start, TILES_AT_ONCE), last)))
        return []

    f.loop(arguments["tile"], last, TILES_AT_ONCE, few)
    return f.finish("matmul")


def _store_ragged(f: Function, total: Value, place: Value, tile: Value, last: int, valid: int) -> None:
    """Store a vector of a tile; of the last tile, only the lanes that exist."""
    lanes = f.module.host.lanes
    is_last = f.compare("eq", tile, last)
    mask = f.select(
        f.splat(is_last, lanes),
        constants("i1", [i < valid for i in range(lanes)]) if lanes > 1 else constant("i1", valid > 0),
        constant("i1", 1, lanes),
    )
    name = f"llvm.masked.store.v{lanes}f32.p0"
    f.module.declare(name, "void", [total.type, "ptr", "i32", mask.type])
    f.do(f"call void @{name}({total.type} {total.ref}, ptr {place.ref}, i32 4, {mask.type} {mask.ref})")


__all__ = ["InputFormat", "matmul_kernel", "rows_at_once"]
