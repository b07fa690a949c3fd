"""Attention of prompts to pages in place: tiles of queries, whose rows are the lanes of vectors.

A *run* is some consecutive tokens of one sequence at consecutive positions, at most a tile. A tile is a run and M query
heads that share a KV head (see `attention`): V vectors, each of one head and as many tokens as there are lanes. Queries
are transposed once, so that for a block of keys

    S[key, v] = Σ_d k[key, d] · q[d, v]          O[d, v] = α[v] · O[d, v] + Σ_key v[key, d] · P[key, v]

are products of one number, broadcast, with vectors: neither keys nor values are transposed, and the online softmax
(Milakov & Gimelshein, arXiv:1805.02867) goes lane by lane, without a sum across lanes. A block of keys and values is
copied out of its pages first, as floats; keys past those that the tile sees are the last one again, with weight 0.

Runs of fewer than half a vector's lanes are left to `attention`, which takes tokens one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass

from xdsl.ir import SSAValue

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.dialects.llm.common import bool_of, float_of, optional_float_of, optional_int_of
from llmir_jax.targets.cpu import elementary
from llmir_jax.targets.cpu.attention import AttentionBuffers, AttentionShape
from llmir_jax.targets.cpu.expressions import Buffer, Evaluator, Stored
from llmir_jax.targets.cpu.halves import half_to_float
from llmir_jax.targets.cpu.host import Host
from llmir_jax.targets.cpu.index import Index, Var, dynamic, variable
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.layout import round_up
from llmir_jax.targets.cpu.llvm import Function, Module, Number, Value, constant, constants, vector
from llmir_jax.targets.cpu.page_rows import page_row, row_values, width_for

KEYS = 16
"""Keys of a block."""
_VECTORS = 3
"""V, at least, where heads do not fill it: with 8 keys, sums for all of 32 registers."""
_NOTHING = -1e30
"""Below every score: the largest score of a token that has seen nothing."""
_HIDDEN = -3e38
"""The score of a key that a token does not see; its weight is 0 whatever the token has seen."""


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """Sizes of a tile, and its scratch."""

    attention: AttentionShape
    lanes: int
    num_registers: int

    @staticmethod
    def of(attention: AttentionShape, host: Host) -> "TileShape":
        """Of an attention on a machine."""
        return TileShape(attention=attention, lanes=host.lanes, num_registers=host.num_registers)

    @property
    def chunks(self) -> int:
        """Vectors of tokens."""
        return max(1, _VECTORS // self.attention.heads)

    @property
    def vectors(self) -> int:
        """V."""
        return self.chunks * self.attention.heads

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return self.chunks * self.lanes

    @property
    def together(self) -> int:
        """Keys, or dimensions of values, whose sums are in registers together: a divisor of KEYS."""
        fitting = (self.num_registers - self.vectors - 2) // self.vectors
        return max(n for n in (1, 2, 4, 8) if n <= max(fitting, 1))

    @property
    def value_stride(self) -> int:
        """Floats from value to value in scratch."""
        return round_up(self.attention.value_dim, self.together)

    @property
    def row_bytes(self) -> int:
        """Bytes of V vectors."""
        return 4 * self.vectors * self.lanes

    @property
    def places(self) -> tuple[int, int, int, int, int]:
        """Where in scratch q, keys, values, weights and sums begin; bytes."""
        head_dim = self.attention.head_dim
        sizes = [head_dim * self.row_bytes, 4 * KEYS * head_dim, 4 * KEYS * self.value_stride, KEYS * self.row_bytes]
        found, at = [0], 0
        for size in sizes:
            at += round_up(size, 64)
            found.append(at)
        q, keys, values, weights, sums = found
        return q, keys, values, weights, sums

    @property
    def scratch_bytes(self) -> int:
        """Of each thread."""
        return self.places[4] + self.value_stride * self.row_bytes


def least_run(host: Host) -> int:
    """Tokens of the shortest run that is a tile."""
    return max(2, host.lanes // 2)


def _scalar(
    kernel: Kernel, stored: Stored, value: SSAValue, indices: list[Index], variables: dict[Var, Number]
) -> Value:
    """An int32 input as i64."""
    none = Var("lane", 1)
    evaluator = Evaluator(kernel.f, stored, kernel.pointer, {**variables, none: 0}, none, 1)
    return kernel.f.cast("sext", evaluator.at(value, indices), "i64")


def runs_kernel(
    module: Module, stored: Stored, op: llm.AttendPagesOp, tokens: int, runs: Buffer
) -> tuple[str, list[Buffer]]:
    """A function (row_lo, row_hi, col_lo, col_hi, buffers…) that cuts a batch into runs of up to `tokens`.

    runs int32[num_rows] has at a row: the tokens of the run that begins there, 0 within one, 1 for a token that is
    taken by itself. Rows of padding are not written.
    """
    kernel = Kernel(module, ("row_lo", "row_hi", "col_lo", "col_hi"))
    f, num_rows = kernel.f, runs.shape[0]
    out = kernel.pointer(runs)
    count = f.minimum(_scalar(kernel, stored, op.num_tokens, [], {}), num_rows)

    def at(value: SSAValue, row: Value) -> Value:
        var = Var("row", num_rows)
        return _scalar(kernel, stored, value, [variable(var)], {var: row})

    def extend(row: Value, carried: list[Value]) -> list[Value]:
        start, sequence, next_position = carried
        own, position = at(op.seq_ids, row), at(op.positions, row)
        goes_on = f.binary("and", f.compare("eq", own, sequence), f.compare("eq", position, next_position))
        goes_on = f.binary("and", goes_on, f.compare("slt", f.sub(row, start), tokens))
        start = f.select(goes_on, start, row)
        f.store(constant("i32", 0), out, f.mul(row, 4), align=4)
        length = f.cast("trunc", f.value(f.add(f.sub(row, start), 1)), "i32")
        f.store(length, out, f.mul(start, 4), align=4)
        return [start, own, f.value(f.add(position, 1))]

    f.loop(0, count, 1, extend, [f.value(0), f.value(-1), f.value(-1)])

    def dissolve(row: Value, carried: list[Value]) -> list[Value]:
        length = f.cast("sext", f.load("i32", out, f.mul(row, 4), align=4), "i64")

        def single(other: Value, carried: list[Value]) -> list[Value]:
            f.store(constant("i32", 1), out, f.mul(other, 4), align=4)
            return []

        def singles() -> None:
            f.loop(row, f.add(row, length), 1, single)

        f.when(f.compare("slt", length, least_run(module.host)), singles)
        return []

    f.loop(0, count, 1, dissolve)
    return f.finish("runs"), kernel.buffers


_OfVector = Callable[[list[Value], Value], None]
"""Emits what is done with the addresses of a vector's tokens, and its byte among V vectors."""


class _Tiles:
    """Emits the kernel of one op."""

    def __init__(
        self, module: Module, stored: Stored, op: llm.AttendPagesOp, buffers: AttentionBuffers, num_threads: int
    ):
        assert buffers.runs is not None, "tiles are runs"
        self.op, self.stored = op, stored
        self.shape = AttentionShape.of(op, num_threads)
        self.tile = TileShape.of(self.shape, module.host)
        self.kernel = Kernel(module, ("id", "n"))
        self.f: Function = self.kernel.f
        self.lanes = module.host.lanes
        self.id, self.n = (self.kernel.number(name) for name in ("id", "n"))
        self.q, self.output, self.runs = map(self.kernel.pointer, (buffers.q, buffers.output, buffers.runs))
        self.pages = [buffers.k_pages, buffers.v_pages]
        self.page_size = buffers.k_pages.shape[1]
        base = self.kernel.pointer(buffers.tile_scratch)
        self.q_at, self.keys_at, self.values_at, self.weights_at, self.sums_at = (
            self.f.at(base, place) for place in self.tile.places
        )
        self.window = optional_int_of(op.window)
        self.causal = bool_of(op.causal)

    def _int(self, value: SSAValue, indices: list[Index], variables: dict[Var, Number]) -> Value:
        return _scalar(self.kernel, self.stored, value, indices, variables)

    def _of_run(self, row: Value, length: Value) -> tuple[Value, Value, Value, Value, Value]:
        """(sequence, position of the first token, tokens in the cache, first key, end of the keys) of a run."""
        f, op = self.f, self.op
        var = Var("row", self.shape.num_rows)
        variables: dict[Var, Number] = {var: row}
        sequence = self._int(op.seq_ids, [variable(var)], variables)
        position = self._int(op.positions, [variable(var)], variables)
        cached = self._int(op.seq_lens, [dynamic(sequence, shape_of(op.seq_lens)[0])], {})
        end = f.minimum(f.add(position, length), cached) if self.causal else cached
        start: Number = 0
        if self.window is not None:
            start = f.minimum(f.maximum(f.sub(f.add(position, 1), self.window), 0), f.maximum(f.sub(end, 1), 0))
        return sequence, position, cached, f.value(start), f.value(end)

    def _blocks(self, start: Value, end: Value) -> Value:
        f = self.f
        return f.value(f.div(f.add(f.sub(end, start), KEYS - 1), KEYS))

    def emit(self) -> tuple[str, list[Buffer]]:
        """The function of (id, n), and its buffers."""
        f, segments = self.f, self.shape.num_heads // self.shape.heads
        count = f.minimum(self._int(self.op.num_tokens, [], {}), self.shape.num_rows)

        def run_at(row: Value) -> Value:
            return f.cast("sext", f.load("i32", self.runs, f.mul(row, 4), align=4), "i64")

        def cost(row: Value) -> Number:
            """Of a tile: its blocks, and something for the tile itself."""
            *_, start, end = self._of_run(row, run_at(row))
            return f.add(self._blocks(start, end), 1)

        def is_tile(row: Value) -> Value:
            return f.compare("sgt", run_at(row), 1)

        def add(row: Value, carried: list[Value]) -> list[Value]:
            each = f.select(is_tile(row), f.value(f.mul(cost(row), segments)), f.value(0))
            return [f.value(f.add(carried[0], each))]

        (total,) = f.loop(0, count, 1, add, [f.value(0)])
        lo = f.div(f.mul(total, self.id), self.n)
        hi = f.div(f.mul(total, f.add(self.id, 1)), self.n)

        def row_of(row: Value, carried: list[Value]) -> list[Value]:
            length, each = run_at(row), cost(row)
            tiled = is_tile(row)

            def segments_of() -> None:
                def segment(number: Value, inner: list[Value]) -> list[Value]:
                    # a tile belongs to the thread whose share has its middle
                    middle = f.add(f.add(carried[0], f.mul(number, each)), f.div(each, 2))
                    mine = f.binary("and", f.compare("sge", middle, lo), f.compare("slt", middle, hi))
                    f.when(mine, lambda: self._tile(row, length, number))
                    return []

                f.loop(0, segments, 1, segment)

            f.when(tiled, segments_of)
            after = f.select(tiled, f.value(f.mul(each, segments)), f.value(0))
            return [f.value(f.add(carried[0], after))]

        f.loop(0, count, 1, row_of, [f.value(0)])
        return f.finish("attend_tiles"), self.kernel.buffers

    # One tile

    def _tile(self, row: Value, length: Value, number: Value) -> None:
        f, shape, tile, lanes = self.f, self.shape, self.tile, self.lanes
        sequence, position, cached, start, end = self._of_run(row, length)
        head0 = f.value(f.mul(number, shape.heads))
        kv_head = f.value(f.div(head0, shape.num_heads // shape.num_kv_heads))
        self._transpose_queries(row, length, head0)
        zero = constant("float", 0.0, lanes)

        def clear(d: Value, carried: list[Value]) -> list[Value]:
            for v in range(tile.vectors):
                f.store(zero, self.sums_at, f.add(f.mul(d, tile.row_bytes), 4 * lanes * v), align=4)
            return []

        f.loop(0, tile.value_stride, 1, clear)
        # tokens past the run's are the last one again
        last = f.cast("trunc", f.value(f.sub(length, 1)), "i32")
        numbers = [constants("i32", range(c * lanes, (c + 1) * lanes)) for c in range(tile.chunks)]
        first = f.splat(f.cast("trunc", position, "i32"), lanes)
        positions = [f.binary("add", first, f.overloaded("llvm.smin", [n, f.splat(last, lanes)])) for n in numbers]
        bound = f.splat(f.cast("trunc", cached, "i32"), lanes)
        one = constant("i32", 1, lanes)
        ends = [bound] * tile.chunks
        if self.causal:
            ends = [f.overloaded("llvm.smin", [f.binary("add", p, one), bound]) for p in positions]
        slopes = self._slopes(head0)
        state = [constant("float", _NOTHING, lanes)] * tile.vectors + [zero] * tile.vectors

        def block(i: Value, carried: list[Value]) -> list[Value]:
            key = f.value(f.add(start, f.mul(i, KEYS)))
            self._copy_block(sequence, kv_head, key, end)
            return self._block(key, positions, ends, slopes, carried)

        done = f.loop(0, self._blocks(start, end), 1, block, state)
        self._finish(done[tile.vectors :], row, length, head0)

    def _slopes(self, head0: Value) -> list[Value] | None:
        if self.op.slopes is None:
            return None
        f, none = self.f, Var("lane", 1)
        evaluator = Evaluator(f, self.stored, self.kernel.pointer, {none: 0}, none, 1)
        heads = [dynamic(f.value(f.add(head0, h)), self.shape.num_heads) for h in range(self.shape.heads)]
        return [f.splat(evaluator.at(self.op.slopes, [head]), self.lanes) for head in heads]

    def _token_row(self, base: Value, row: Value, length: Value, token: Number, head: Number, dim: int) -> Value:
        """The address of a token's head; of a token past the run, of the last one's."""
        f = self.f
        token = f.minimum(token, f.sub(length, 1))
        place = f.add(f.mul(f.add(row, token), self.shape.num_heads), head)
        return f.at(base, f.mul(place, 4 * dim))

    def _over_vectors(self, row: Value, length: Value, head0: Value, base: Value, dim: int, emit: _OfVector) -> None:
        """emit(rows of a vector's tokens, its byte in V vectors) for each of V vectors."""
        f, lanes, heads = self.f, self.lanes, self.shape.heads

        def of(v: Value, carried: list[Value]) -> list[Value]:
            head, chunk = f.add(head0, f.rem(v, heads)), f.mul(f.div(v, heads), lanes)
            rows = [self._token_row(base, row, length, f.add(chunk, i), head, dim) for i in range(lanes)]
            emit(rows, f.value(f.mul(v, 4 * lanes)))
            return []

        f.loop(0, self.tile.vectors, 1, of)

    def _transpose_queries(self, row: Value, length: Value, head0: Value) -> None:
        """q[d, v], times the scale of scores."""
        f, shape, lanes = self.f, self.shape, self.lanes
        dim, row_bytes = shape.head_dim, self.tile.row_bytes
        scale = dim**-0.5 if self.op.scale is None else float_of(self.op.scale)

        def vector_of(rows: list[Value], at: Value) -> None:
            def square(d: Value, carried: list[Value]) -> list[Value]:
                loaded = [f.load(vector("float", lanes), base, f.mul(d, 4), align=4) for base in rows]
                for i, column in enumerate(f.transpose(loaded)):
                    scaled = f.binary("fmul", column, constant("float", scale, lanes))
                    f.store(scaled, self.q_at, f.add(f.mul(f.add(d, i), row_bytes), at), align=4)
                return []

            def one(d: Value, carried: list[Value]) -> list[Value]:
                column = f.join([f.load("float", base, f.mul(d, 4), align=4) for base in rows])
                scaled = f.binary("fmul", column, constant("float", scale, lanes))
                f.store(scaled, self.q_at, f.add(f.mul(d, row_bytes), at), align=4)
                return []

            whole = dim // lanes * lanes
            f.loop(0, whole, lanes, square)
            f.loop(whole, dim, 1, one)

        self._over_vectors(row, length, head0, self.q, dim, vector_of)

    def _finish(self, totals: list[Value], row: Value, length: Value, head0: Value) -> None:
        """Means of the values, transposed back."""
        f, lanes, dim, row_bytes = self.f, self.lanes, self.shape.value_dim, self.tile.row_bytes
        least = constant("float", 1e-37, lanes)
        for v, total in enumerate(totals):
            inverse = f.binary("fdiv", constant("float", 1.0, lanes), f.overloaded("llvm.maxnum", [total, least]))
            f.store(inverse, self.weights_at, 4 * lanes * v, align=4)

        def vector_of(rows: list[Value], at: Value) -> None:
            inverse = f.load(vector("float", lanes), self.weights_at, at, align=4)

            def mean(d: Number) -> Value:
                place = f.add(f.mul(d, row_bytes), at)
                return f.binary("fmul", f.load(inverse.type, self.sums_at, place, align=4), inverse)

            def square(d: Value, carried: list[Value]) -> list[Value]:
                for base, content in zip(rows, f.transpose([mean(f.add(d, i)) for i in range(lanes)]), strict=True):
                    f.store(content, base, f.mul(d, 4), align=4)
                return []

            def one(d: Value, carried: list[Value]) -> list[Value]:
                content = mean(d)
                for i, base in enumerate(rows):
                    f.store(f.extract(content, i), base, f.mul(d, 4), align=4)
                return []

            whole = dim // lanes * lanes
            f.loop(0, whole, lanes, square)
            f.loop(whole, dim, 1, one)

        self._over_vectors(row, length, head0, self.output, dim, vector_of)

    # One block of keys

    def _copy_block(self, sequence: Value, kv_head: Value, key: Value, end: Value) -> None:
        """Keys and values of a block, as floats."""
        f, shape = self.f, self.shape

        def one(i: Value, carried: list[Value]) -> list[Value]:
            last = f.sub(end, 1)
            page = page_row(f, self._int, self.op, self.page_size, f.minimum(f.add(key, i), last), sequence)
            place = f.add(f.mul(page, shape.num_kv_heads), kv_head)
            for which, (target, dim, stride) in enumerate(
                (
                    (self.keys_at, shape.head_dim, shape.head_dim),
                    (self.values_at, shape.value_dim, self.tile.value_stride),
                )
            ):
                self._copy(which, place, f.at(target, f.mul(i, 4 * stride)), dim)
            return []

        f.loop(0, KEYS, 1, one)

    def _copy(self, which: int, place: Number, target: Value, dim: int) -> None:
        f, pages = self.f, self.pages[which]
        width = width_for(dim, self.lanes)
        values = row_values(self.kernel, pages, place, dim, width)
        if pages.scales is not None and pages.minima is None:
            stored = f.load("half", self.kernel.pointer(pages.scales), f.mul(place, 2), align=2)
            scale = f.splat(half_to_float(f, stored), width)
            values = [f.binary("fmul", value, scale) for value in values]
        for i, value in enumerate(values):
            f.store(value, target, 4 * width * i, align=4)

    def _block(
        self,
        key: Value,
        positions: list[Value],
        ends: list[Value],
        slopes: list[Value] | None,
        state: list[Value],
    ) -> list[Value]:
        """State (largest scores, sums of weights) after a block."""
        f, tile, lanes = self.f, self.tile, self.lanes
        old, sums = state[: tile.vectors], state[tile.vectors :]
        key32 = f.cast("trunc", key, "i32")
        largest = self._scores(key32, positions, ends, slopes, old)
        shrink = [elementary.fast_exp(f, f.binary("fsub", a, b)) for a, b in zip(old, largest, strict=True)]

        def weigh(i: Value, carried: list[Value]) -> list[Value]:
            result = []
            for v, (total, top) in enumerate(zip(carried, largest, strict=True)):
                place = f.add(f.mul(i, tile.row_bytes), 4 * lanes * v)
                score = f.load(top.type, self.weights_at, place, align=4)
                weight = elementary.fast_exp(f, f.binary("fsub", score, top))
                f.store(weight, self.weights_at, place, align=4)
                result.append(f.binary("fadd", total, weight))
            return result

        sums = f.loop(0, KEYS, 1, weigh, [f.binary("fmul", a, b) for a, b in zip(sums, shrink, strict=True)])
        self._add_values(shrink)
        return largest + sums

    def _scores(
        self, key: Value, positions: list[Value], ends: list[Value], slopes: list[Value] | None, largest: list[Value]
    ) -> list[Value]:
        """S [KEYS, V], stored; returns the largest scores."""
        f, tile, lanes, dim = self.f, self.tile, self.lanes, self.shape.head_dim
        softcap = optional_float_of(self.op.softcap)
        kind = vector("float", lanes)

        def some_keys(first: Value, carried: list[Value]) -> list[Value]:
            base = f.at(self.keys_at, f.mul(first, 4 * dim))

            def along(d: Value, totals: list[Value]) -> list[Value]:
                q = [
                    f.load(kind, self.q_at, f.add(f.mul(d, tile.row_bytes), 4 * lanes * v), align=4)
                    for v in range(tile.vectors)
                ]
                result = []
                for i in range(tile.together):
                    k = f.splat(f.load("float", base, f.add(f.mul(d, 4), 4 * dim * i), align=4), lanes)
                    result += [f.fma(k, q[v], totals[i * tile.vectors + v]) for v in range(tile.vectors)]
                return result

            zeros = [constant("float", 0.0, lanes)] * (tile.together * tile.vectors)
            scores = f.loop(0, dim, 1, along, zeros)
            tops = list(carried)
            for i in range(tile.together):
                place = f.add(first, i)
                number = f.binary("add", key, f.cast("trunc", f.value(place), "i32"))
                keys = f.splat(number, lanes)
                seen = []
                for position, end in zip(positions, ends, strict=True):
                    sees = f.compare("slt", keys, end)
                    if self.window is not None:
                        oldest = f.binary("sub", position, constant("i32", self.window, lanes))
                        sees = f.binary("and", sees, f.compare("sgt", keys, oldest))
                    seen.append(sees)
                for v in range(tile.vectors):
                    chunk, head = divmod(v, self.shape.heads)
                    score = scores[i * tile.vectors + v]
                    if softcap is not None:
                        capped = elementary.tanh(f, f.binary("fmul", score, constant("float", 1 / softcap, lanes)))
                        score = f.binary("fmul", capped, constant("float", softcap, lanes))
                    if slopes is not None:
                        distance = f.cast("sitofp", f.binary("sub", keys, positions[chunk]), "float")
                        score = f.fma(slopes[head], distance, score)
                    score = f.select(seen[chunk], score, constant("float", _HIDDEN, lanes))
                    f.store(score, self.weights_at, f.add(f.mul(place, tile.row_bytes), 4 * lanes * v), align=4)
                    tops[v] = f.overloaded("llvm.maxnum", [tops[v], score])
            return tops

        return f.loop(0, KEYS, tile.together, some_keys, largest)

    def _add_values(self, shrink: list[Value]) -> None:
        """O[d, v] = α[v] · O[d, v] + Σ_key v[key, d] · P[key, v]."""
        f, tile, lanes = self.f, self.tile, self.lanes
        kind, stride = vector("float", lanes), 4 * tile.value_stride

        def some_dims(d: Value, carried: list[Value]) -> list[Value]:
            base = f.at(self.values_at, f.mul(d, 4))
            out = f.at(self.sums_at, f.mul(d, tile.row_bytes))
            places = [tile.row_bytes * j + 4 * lanes * v for j in range(tile.together) for v in range(tile.vectors)]
            totals = [f.load(kind, out, place, align=4) for place in places]
            totals = [f.binary("fmul", x, shrink[i % tile.vectors]) for i, x in enumerate(totals)]

            def along(i: Value, sums: list[Value]) -> list[Value]:
                weights = [
                    f.load(kind, self.weights_at, f.add(f.mul(i, tile.row_bytes), 4 * lanes * v), align=4)
                    for v in range(tile.vectors)
                ]
                result = []
                for j in range(tile.together):
                    value = f.splat(f.load("float", base, f.add(f.mul(i, stride), 4 * j), align=4), lanes)
                    result += [f.fma(value, weights[v], sums[j * tile.vectors + v]) for v in range(tile.vectors)]
                return result

            for place, total in zip(places, f.loop(0, KEYS, 1, along, totals), strict=True):
                f.store(total, out, place, align=4)
            return []

        f.loop(0, tile.value_stride, tile.together, some_dims)


def tiles_kernel(
    module: Module, stored: Stored, op: llm.AttendPagesOp, buffers: AttentionBuffers, num_threads: int
) -> tuple[str, list[Buffer]]:
    """A function (id, n, buffers…) that does a thread's share of the tiles: its name and its buffers."""
    return _Tiles(module, stored, op, buffers, num_threads).emit()


__all__ = ["TileShape", "least_run", "runs_kernel", "tiles_kernel"]
