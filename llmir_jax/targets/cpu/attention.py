"""Attention of a ragged batch to pages in place, with an online softmax (Milakov & Gimelshein, arXiv:1805.02867).

The work is cut into *segments*, one for each token and part of the KV heads, and a segment into blocks of keys. All
blocks of all segments, side by side, are shared out evenly: thread id of n takes blocks [W · id / n, W · (id + 1) / n),
however many tokens and however long a context. A segment that lies within one thread's share is finished by it; of one
that is cut, each thread leaves the largest score, the sum of weights and the weighted values in scratch, and the thread
that comes last joins them. So there is no barrier inside.

Query heads that share a KV head are computed in groups of up to M, one group after another for each block: what is read
of a page lies side by side, and comes from memory in order. The states of the groups' softmaxes are in scratch.

Keys of a block are read once for all M heads: products of vectors of 16 lanes, added up by a tree of shuffles so that
the scores of a block are one vector a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

from xdsl.ir import SSAValue

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.dialects.llm.common import bool_of, float_of, optional_float_of, optional_int_of
from llmir_jax.targets.cpu import elementary
from llmir_jax.targets.cpu.expressions import Buffer, Evaluator, Stored
from llmir_jax.targets.cpu.halves import half_to_float
from llmir_jax.targets.cpu.index import Index, Var, dynamic, variable
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.layout import round_up
from llmir_jax.targets.cpu.llvm import Module, Number, Value, constant, constants, vector
from llmir_jax.targets.cpu.page_rows import element_bits, page_row, page_shape, row_values, width_for

ROW_BYTES = 1024
"""Bytes of a page's row, at least, that are read together, if it has as many."""
PREFETCHED = 1
"""Blocks from the one that is computed to the one that is fetched meanwhile."""
MAX_HEADS = 4
"""M: query heads whose sums stay in registers beside each other."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of an attention, and its scratch."""

    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    num_threads: int
    row_bytes: int  # of the keys of a token

    @staticmethod
    def of(op: llm.AttendPagesOp, num_threads: int) -> "AttentionShape":
        """Of an op."""
        num_rows, num_heads, head_dim = shape_of(op.q)
        pages, values = (page_shape(pages.type) for pages in (op.k_pages, op.v_pages))
        return AttentionShape(
            num_rows=num_rows,
            num_heads=num_heads,
            num_kv_heads=pages[2],
            head_dim=head_dim,
            value_dim=values[3],
            num_threads=num_threads,
            row_bytes=pages[2] * pages[3] * element_bits(op.k_pages.type) // 8,
        )

    @property
    def heads(self) -> int:
        """M, query heads of a group."""
        shared = self.num_heads // self.num_kv_heads
        return max(m for m in range(1, MAX_HEADS + 1) if shared % m == 0)

    @property
    def num_segments(self) -> int:
        """Segments of a token: as many as leave each enough of a row to be read in order."""
        most = max(1, self.row_bytes // ROW_BYTES)
        return max(p for p in range(1, self.num_kv_heads + 1) if self.num_kv_heads % p == 0 and p <= most)

    @property
    def num_groups(self) -> int:
        """Groups of a segment."""
        return self.num_heads // self.heads // self.num_segments

    @property
    def group_floats(self) -> int:
        """float32 numbers of a group's state: largest, sum, values for each head; in whole vectors."""
        return round_up(self.heads * (2 + self.value_dim), 16)

    @property
    def scratch_bytes(self) -> int:
        """The states of two segments for each thread."""
        return 2 * self.num_threads * self.num_groups * self.group_floats * 4

    @property
    def counter_bytes(self) -> int:
        """One i32 for each segment; zero before and after."""
        return 4 * self.num_rows * self.num_segments


@dataclass(frozen=True, kw_only=True)
class AttentionBuffers:
    """What the kernels of an attention read, write, and use meanwhile."""

    q: Buffer
    k_pages: Buffer
    v_pages: Buffer
    output: Buffer
    partials: Buffer
    """`AttentionShape.scratch_bytes`."""
    counters: Buffer
    """`AttentionShape.counter_bytes`."""
    tile_scratch: Buffer
    """Of a thread; `TileShape.scratch_bytes`."""
    runs: Buffer | None
    """See `attention_tiles.runs_kernel`; None where every token is taken by itself."""


class _Attention:
    """Emits the kernel of one op."""

    def __init__(
        self, module: Module, stored: Stored, op: llm.AttendPagesOp, buffers: AttentionBuffers, num_threads: int
    ):
        self.op, self.stored = op, stored
        self.shape = AttentionShape.of(op, num_threads)
        self.kernel = Kernel(module, ("id", "n"))
        self.f = self.kernel.f
        self.id, self.n = (self.kernel.number(name) for name in ("id", "n"))
        self.q, self.output = self.kernel.pointer(buffers.q), self.kernel.pointer(buffers.output)
        self.k_pages, self.v_pages = buffers.k_pages, buffers.v_pages
        self.k_scales, self.v_scales = (
            None if pages.scales is None or pages.minima is not None else self.kernel.pointer(pages.scales)
            for pages in (self.k_pages, self.v_pages)
        )
        self.scratch, self.counters = self.kernel.pointer(buffers.partials), self.kernel.pointer(buffers.counters)
        self.runs = None if buffers.runs is None else self.kernel.pointer(buffers.runs)
        self.page_size = self.k_pages.shape[1]
        self.lanes = module.host.lanes
        self.block = self.lanes  # keys of a block: their scores are one vector
        self.k_width = width_for(self.shape.head_dim, self.lanes)
        self.v_width = width_for(self.shape.value_dim, self.lanes)
        self.window = optional_int_of(op.window)
        self.causal = bool_of(op.causal)

    def scalar(self, value: SSAValue, indices: list[Index], variables: dict[Var, Number]) -> Value:
        """An int32 input as i64."""
        none = Var("lane", 1)
        evaluator = Evaluator(self.f, self.stored, self.kernel.pointer, {**variables, none: 0}, none, 1)
        return self.f.cast("sext", evaluator.at(value, indices), "i64")

    def span(self, row: Number) -> tuple[Number, Number, Value, Value]:
        """(first block, blocks, first key, end) of the keys that a token sees, and … its position by `position`."""
        f, op = self.f, self.op
        var = Var("row", self.shape.num_rows)
        variables: dict[Var, Number] = {var: row}
        sequence = self.scalar(op.seq_ids, [variable(var)], variables)
        position = self.scalar(op.positions, [variable(var)], variables)
        seqs = shape_of(op.seq_lens)[0]

        length = self.scalar(op.seq_lens, [dynamic(sequence, seqs)], variables)
        end = f.minimum(f.add(position, 1), length) if self.causal else length
        start: Number = 0
        if self.window is not None:
            start = f.minimum(f.maximum(f.sub(f.add(position, 1), self.window), 0), end)
        first = f.div(start, self.block)
        last = f.div(f.add(end, self.block - 1), self.block)
        blocks = f.sub(last, first)
        self.position, self.sequence = position, sequence
        return first, blocks, f.value(start), f.value(end)

    def emit(self) -> tuple[str, list[Buffer]]:
        """The function of (id, n), and its buffers."""
        f, shape = self.f, self.shape
        count = f.minimum(self.scalar(self.op.num_tokens, [], {}), shape.num_rows)

        def mine(row: Value, number: Number) -> Number:
            """A number of blocks, 0 for a token of a tile."""
            if self.runs is None:
                return number
            run = f.load("i32", self.runs, f.mul(row, 4), align=4)
            return f.select(f.compare("eq", run, constant("i32", 1)), f.value(number), f.value(0))

        def add(row: Value, carried: list[Value]) -> list[Value]:
            blocks = f.mul(mine(row, self.span(row)[1]), shape.num_segments)
            return [f.value(f.add(carried[0], blocks))]

        (total,) = f.loop(0, count, 1, add, [f.value(0)])
        lo = f.div(f.mul(total, self.id), self.n)
        hi = f.div(f.mul(total, f.add(self.id, 1)), self.n)

        def token(row: Value, carried: list[Value]) -> list[Value]:
            before = carried[0]
            first, blocks, start, end = self.span(row)
            own = mine(row, blocks)
            after = f.value(f.add(before, f.mul(own, shape.num_segments)))
            touched = f.binary("and", f.compare("slt", before, hi), f.compare("sgt", after, lo))
            touched = f.binary("and", touched, f.compare("slt", before, after))  # a token of a tile is not
            position, sequence = self.position, self.sequence

            def segments() -> None:
                def segment(number: Value, carried: list[Value]) -> list[Value]:
                    begin = f.add(before, f.mul(number, blocks))
                    stop = f.add(begin, blocks)
                    inside = f.binary("and", f.compare("slt", begin, hi), f.compare("sgt", stop, lo))
                    f.when(
                        inside,
                        lambda: self._segment(
                            row, number, begin, stop, lo, hi, total, first, start, end, position, sequence
                        ),
                    )
                    return []

                f.loop(0, shape.num_segments, 1, segment)

            f.when(touched, segments)
            self._zero_if_blind(row, own, mine(row, 1))
            return [after]

        f.loop(0, count, 1, token, [f.value(0)])
        self._zero_padding(count)
        return f.finish("attend"), self.kernel.buffers

    def _zero_row(self, row: Number) -> None:
        f = self.f
        size = self.shape.num_heads * self.shape.value_dim
        base = f.at(self.output, f.mul(row, 4 * size))

        def zero(i: Value, carried: list[Value]) -> list[Value]:
            f.store(constant("float", 0.0), base, f.mul(i, 4), align=4)
            return []

        f.loop(0, size, 1, zero)

    def _zero_if_blind(self, row: Value, blocks: Number, is_mine: Number) -> None:
        """A token that sees nothing has zeros."""
        f = self.f
        blind = f.binary("and", f.compare("slt", blocks, is_mine), f.compare("eq", self.id, 0))
        f.when(blind, lambda: self._zero_row(row))

    def _zero_padding(self, count: Number) -> None:
        """Padding rows are finite."""
        f = self.f
        if self.shape.num_rows == 1:
            f.when(f.binary("and", f.compare("eq", count, 0), f.compare("eq", self.id, 0)), lambda: self._zero_row(0))
            return

        def body(row: Value, carried: list[Value]) -> list[Value]:
            f.when(f.compare("eq", f.rem(row, self.n), self.id), lambda: self._zero_row(row))
            return []

        f.loop(count, self.shape.num_rows, 1, body)

    def _segment(
        self,
        row: Value,
        number: Value,
        begin: Number,
        stop: Number,
        lo: Number,
        hi: Number,
        total: Value,
        first: Number,
        start: Value,
        end: Value,
        position: Value,
        sequence: Value,
    ) -> None:
        f, shape = self.f, self.shape
        heads = shape.heads
        # the first part of a thread's share continues a segment of the thread before it
        slot = f.select(f.compare("slt", begin, lo), f.value(0), f.value(1))
        mine = self._slot(f.add(f.mul(self.id, 2), slot))
        self._each_group(lambda group: self._store_state(self._nothing(), self._state_at(mine, group)))

        def place(array: Value, group: Value, dim: int) -> tuple[Number, Value]:
            """The first query head of a group, and where its rows begin in queries or outputs."""
            head0 = f.mul(f.add(f.mul(number, shape.num_groups), group), heads)
            return head0, f.at(array, f.mul(f.add(f.mul(row, shape.num_heads), head0), 4 * dim))

        def block(i: Value, carried: list[Value]) -> list[Value]:
            key = f.mul(f.add(first, f.sub(i, begin)), self.block)
            rows = self._rows(key, end, sequence)
            last_block = f.mul(f.div(f.sub(end, 1), self.block), self.block)
            coming = self._rows(f.minimum(f.add(key, PREFETCHED * self.block), last_block), end, sequence)

            def of(group: Value) -> None:
                head0, q = place(self.q, group, shape.head_dim)
                kv_head = f.div(head0, shape.num_heads // shape.num_kv_heads)
                at = self._state_at(mine, group)
                state = self._load_state(at)
                self._store_state(self._block(q, kv_head, key, head0, start, end, position, rows, coming, state), at)

            self._each_group(of)
            return []

        f.loop(f.maximum(begin, lo), f.minimum(stop, hi), 1, block)
        is_whole = f.binary("and", f.compare("sge", begin, lo), f.compare("sle", stop, hi))

        def finish(group: Value) -> None:
            _, out = place(self.output, group, shape.value_dim)
            self._finish(self._load_state(self._state_at(mine, group)), out)

        f.when(is_whole, lambda: self._each_group(finish))
        is_part = f.binary("xor", is_whole, constant("i1", 1))

        def leave() -> None:
            counter = f.at(self.counters, f.mul(f.add(f.mul(row, shape.num_segments), number), 4))
            one, last = self._owner(begin, total), self._owner(f.sub(stop, 1), total)
            old = f.emit("i32", f"atomicrmw add ptr {counter.ref}, i32 1 acq_rel")
            expected = f.cast("trunc", f.value(f.sub(last, one)), "i32")
            is_last = f.compare("eq", old, expected)

            def join(group: Value) -> None:
                def part(thread: Value, carried: list[Value]) -> list[Value]:
                    which = f.select(f.compare("eq", thread, one), f.value(1), f.value(0))
                    other = self._slot(f.add(f.mul(thread, 2), which))
                    return self._merge(carried, self._load_state(self._state_at(other, group)))

                _, out = place(self.output, group, shape.value_dim)
                self._finish(f.loop(one, f.add(last, 1), 1, part, self._nothing()), out)

            def join_all() -> None:
                f.do(f"store atomic i32 0, ptr {counter.ref} monotonic, align 4")
                self._each_group(join)

            f.when(is_last, join_all)

        f.when(is_part, leave)

    def _each_group(self, of: Callable[[Value], None]) -> None:
        def body(group: Value, carried: list[Value]) -> list[Value]:
            of(group)
            return []

        self.f.loop(0, self.shape.num_groups, 1, body)

    def _owner(self, work: Number, total: Value) -> Number:
        """The thread whose share has a block: the largest id with total · id / n ≤ work."""
        f = self.f
        scaled = f.sub(f.mul(f.add(work, 1), self.n), 1)
        return f.div(scaled, total)

    # The state of a group: the largest score of each head, the sum of its weights, and the weighted values

    def _nothing(self) -> list[Value]:
        heads, vectors = self.shape.heads, self.shape.value_dim // self.v_width
        zero = constant("float", 0.0, self.v_width)
        return [constant("float", -3.4e38)] * heads + [constant("float", 0.0)] * heads + [zero] * (heads * vectors)

    def _slot(self, number: Number) -> Value:
        """Where the states of a segment are."""
        return self.f.at(self.scratch, self.f.mul(number, 4 * self.shape.num_groups * self.shape.group_floats))

    def _state_at(self, slot: Value, group: Value) -> Value:
        return self.f.at(slot, self.f.mul(group, 4 * self.shape.group_floats))

    def _store_state(self, state: list[Value], base: Value) -> None:
        """The values first, so that they lie in whole vectors."""
        f, heads = self.f, self.shape.heads
        for i, value in enumerate(state[2 * heads :]):
            f.store(value, base, 4 * self.v_width * i, align=4)
        for i, value in enumerate(state[: 2 * heads]):
            f.store(value, base, 4 * (heads * self.shape.value_dim + i), align=4)

    def _load_state(self, base: Value) -> list[Value]:
        f, shape = self.f, self.shape
        size = shape.heads * shape.value_dim
        scalars = [f.load("float", base, 4 * (size + i), align=4) for i in range(2 * shape.heads)]
        kind = vector("float", self.v_width)
        return scalars + [f.load(kind, base, 4 * i, align=4) for i in range(0, size, self.v_width)]

    def _merge(self, a: list[Value], b: list[Value]) -> list[Value]:
        f, heads = self.f, self.shape.heads
        vectors = (len(a) - 2 * heads) // heads
        largest, sums, values = [], [], []
        for h in range(heads):
            top = f.overloaded("llvm.maxnum", [a[h], b[h]])
            scales = [elementary.fast_exp(f, f.binary("fsub", x[h], top)) for x in (a, b)]
            largest.append(top)
            parts = [f.binary("fmul", x[heads + h], s) for x, s in zip((a, b), scales, strict=True)]
            sums.append(f.binary("fadd", *parts))
            for v in range(vectors):
                place = 2 * heads + h * vectors + v
                scaled = [
                    f.binary("fmul", x[place], f.splat(s, self.v_width)) for x, s in zip((a, b), scales, strict=True)
                ]
                values.append(f.binary("fadd", *scaled))
        return largest + sums + values

    def _finish(self, state: list[Value], out: Value) -> None:
        """Weighted means of the values."""
        f, heads = self.f, self.shape.heads
        vectors = (len(state) - 2 * heads) // heads
        for h in range(heads):
            total = f.overloaded("llvm.maxnum", [state[heads + h], constant("float", 1e-37)])
            inverse = f.splat(f.binary("fdiv", constant("float", 1.0), total), self.v_width)
            for v in range(vectors):
                value = f.binary("fmul", state[2 * heads + h * vectors + v], inverse)
                f.store(value, out, 4 * (h * self.shape.value_dim + v * self.v_width), align=4)

    def _row_of_key(self, key: Number, sequence: Value) -> Number:
        """The number of a key's row in the page arrays."""
        return page_row(self.f, self.scalar, self.op, self.page_size, key, sequence)

    def _rows(self, key: Number, end: Value, sequence: Value) -> list[Number]:
        """Rows of a block's keys; past the end, the last one again."""
        f = self.f
        if self.page_size % self.block == 0:
            first_row = self._row_of_key(key, sequence)
            return [f.add(first_row, i) for i in range(self.block)]
        last = f.sub(end, 1)
        return [self._row_of_key(f.minimum(f.add(key, i), last), sequence) for i in range(self.block)]

    def _block(
        self,
        q: Value,
        kv_head: Number,
        key: Number,
        head0: Number,
        start: Value,
        end: Value,
        position: Value,
        rows: list[Number],
        coming: list[Number],
        state: list[Value],
    ) -> list[Value]:
        f, shape, heads = self.f, self.shape, self.shape.heads
        vectors = shape.value_dim // self.v_width
        scores = self._scores(q, kv_head, rows, coming)
        k_scales, v_scales = (self._scales(scales, kv_head, rows) for scales in (self.k_scales, self.v_scales))
        numbers = f.binary("add", f.splat(f.value(key), self.block), constants("i64", range(self.block)))
        seen = f.compare("slt", numbers, f.splat(end, self.block))
        if self.window is not None:
            seen = f.binary("and", seen, f.compare("sge", numbers, f.splat(start, self.block)))
        softcap = optional_float_of(self.op.softcap)
        scale = shape.head_dim**-0.5 if self.op.scale is None else float_of(self.op.scale)
        weights_at = f.alloca(4 * self.block * heads)
        largest, sums, kept = [], [], []
        for h, score in enumerate(scores):
            if k_scales is not None:
                score = f.binary("fmul", score, k_scales)
            score = f.binary("fmul", score, constant("float", scale, self.block))
            if softcap is not None:
                capped = elementary.tanh(f, f.binary("fmul", score, constant("float", 1 / softcap, self.block)))
                score = f.binary("fmul", capped, constant("float", softcap, self.block))
            if self.op.slopes is not None:
                score = f.binary("fadd", score, self._bias(h, head0, numbers, position))
            score = f.select(seen, score, constant("float", -3.4e38, self.block))
            top = f.overloaded("llvm.maxnum", [state[h], f.reduce("fmax", score)])
            weight = elementary.fast_exp(f, f.binary("fsub", score, f.splat(top, self.block)))
            weight = f.select(seen, weight, constant("float", 0.0, self.block))
            scaled = weight if v_scales is None else f.binary("fmul", weight, v_scales)
            f.store(scaled, weights_at, 4 * self.block * h, align=4 * self.block)
            scale_old = elementary.fast_exp(f, f.binary("fsub", state[h], top))
            largest.append(top)
            kept.append(scale_old)
            sums.append(f.fma(state[heads + h], scale_old, f.reduce("fadd", weight)))
        values = [
            f.binary("fmul", state[2 * heads + h * vectors + v], f.splat(kept[h], self.v_width))
            for h in range(heads)
            for v in range(vectors)
        ]
        values = self._weigh(weights_at, kv_head, key, start, end, rows, values)
        return largest + sums + values

    def _scales(self, scales: Value | None, kv_head: Number, rows: list[Number]) -> Value | None:
        """Scales of the block's keys, of pages in 8 bits; those of keys that do not exist may be anything."""
        if scales is None:
            return None
        f = self.f
        found = []
        for row in rows:
            place = f.mul(f.add(f.mul(row, self.shape.num_kv_heads), kv_head), 2)
            found.append(f.load("half", scales, place, align=2))
        return half_to_float(f, f.join(found))

    def _row(self, pages: Buffer, row: Number, kv_head: Number, dim: int, width: int) -> list[Value]:
        """A key or a value of a head as floats, in vectors; those of 8 bits without their scale."""
        place = self.f.add(self.f.mul(row, self.shape.num_kv_heads), kv_head)
        return row_values(self.kernel, pages, place, dim, width)

    def _bias(self, h: int, head0: Number, numbers: Value, position: Value) -> Value:
        f = self.f

        none = Var("lane", 1)
        evaluator = Evaluator(f, self.stored, self.kernel.pointer, {none: 0}, none, 1)
        head = dynamic(f.value(f.add(head0, h)), self.shape.num_heads)
        assert self.op.slopes is not None
        slope = evaluator.at(self.op.slopes, [head])
        distance = f.cast("sitofp", f.binary("sub", numbers, f.splat(position, self.block)), "float")
        return f.binary("fmul", f.splat(slope, self.block), distance)

    def _prefetch(self, row: Number, kv_head: Number) -> None:
        """Ask for a row's key and value of a head."""
        f = self.f
        place = f.add(f.mul(row, self.shape.num_kv_heads), kv_head)
        for pages in (self.k_pages, self.v_pages):
            num_bytes = pages.width * pages.shape[-1]
            base = f.at(self.kernel.pointer(pages), f.mul(place, num_bytes))
            for at in range(0, num_bytes, 64):
                f.prefetch(base, at)

    def _scores(self, q: Value, kv_head: Number, rows: list[Number], coming: list[Number]) -> list[Value]:
        """q · k for each head: a vector of the block's keys. Meanwhile the keys and values of `coming` are fetched."""
        f, shape, width = self.f, self.shape, self.k_width
        kind = vector("float", width)
        partial: list[list[Value]] = [[] for _ in range(shape.heads)]
        for number, row in enumerate(rows):
            self._prefetch(coming[number], kv_head)
            totals: list[Value | None] = [None] * shape.heads
            for i, key in enumerate(self._row(self.k_pages, row, kv_head, shape.head_dim, width)):
                for h in range(shape.heads):
                    query = f.load(kind, q, 4 * (h * shape.head_dim + width * i), align=4)
                    total = totals[h]
                    totals[h] = f.binary("fmul", key, query) if total is None else f.fma(key, query, total)
            for h, total in enumerate(totals):
                assert total is not None
                partial[h].append(total)
        return [f.join_lanes(vectors, "fadd") for vectors in partial]

    def _weigh(
        self,
        weights_at: Value,
        kv_head: Number,
        key: Number,
        start: Value,
        end: Value,
        rows: list[Number],
        values: list[Value],
    ) -> list[Value]:
        """Values of the block's keys added, each times its weight; of keys that exist only."""
        f, shape, width = self.f, self.shape, self.v_width
        vectors = shape.value_dim // width
        skip = f.maximum(f.sub(start, key), 0) if self.window is not None else 0
        stop = f.minimum(f.sub(end, key), self.block)
        contiguous = self.page_size % self.block == 0
        table: Value | None = None
        if not contiguous:
            table = f.alloca(8 * self.block)
            for i, row in enumerate(rows):
                f.store(f.value(row), table, 8 * i, align=8)

        def one(i: Value, carried: list[Value]) -> list[Value]:
            row = f.add(rows[0], i) if table is None else f.load("i64", table, f.mul(i, 8), align=8)
            loaded = self._row(self.v_pages, row, kv_head, shape.value_dim, width)
            result = []
            for h in range(shape.heads):
                weight = f.load("float", weights_at, f.add(f.mul(i, 4), 4 * self.block * h), align=4)
                wide = f.splat(weight, width)
                result += [f.fma(x, wide, carried[h * vectors + v]) for v, x in enumerate(loaded)]
            return result

        return f.loop(skip, stop, 1, one, values)


def attention_kernel(
    module: Module, stored: Stored, op: llm.AttendPagesOp, buffers: AttentionBuffers, num_threads: int
) -> tuple[str, list[Buffer]]:
    """A function (id, n, buffers…) that does a thread's share of an attention: its name and its buffers.

    Where there are runs it takes the tokens by themselves.
    """
    return _Attention(module, stored, op, buffers, num_threads).emit()


__all__ = ["AttentionBuffers", "AttentionShape", "attention_kernel"]
