"""Ragged paged attention on NVIDIA GPUs of compute capability 9.0, by a Pallas kernel through Mosaic GPU.

A block of threads has a tile of queries of one sequence and one KV head, and a part of the sequence's keys. Its queries
are the rows of a wgmma, query heads of one row beside each other: 64 rows, of which a single token fills H / Hkv. Two
warpgroups:

    copies    keys and values of `KEYS` positions at a time, each page a TMA copy, into a ring of `stages` places
    computes  s = q · kᵀ, masked; m' = max(m, s); p = exp2(s − m'); l = l · exp2(m − m') + Σ p;
              acc = acc · exp2(m − m') + p · v      (FlashAttention, Dao et al. 2022; sums in float32)

New keys and values are scattered to their pages by XLA before, in place where pages are donated, so that TMA only reads
what another kernel wrote. XLA gathers the tiles of queries and, as for the Triton kernel, merges the parts of old keys,

    out = Σ_p exp2(lse_p − max lse) out_p / Σ_p exp2(lse_p − max lse).

Slots beyond a sequence's length may hold anything, NaN too: their scores are masked, and their values, which a weight
of 0 does not hide, are overwritten with zeros in the ring. Pages are floats of 16 bits, the dtype of the queries.

It has run in JAX's interpreter, and been compiled to machine code, but on no GPU: how fast it is nobody knows.
"""

import functools
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.chips import Chip, limits_of
from pallas_kernels.paged_attention.gpu import num_splits, tile_table
from pallas_kernels.paged_attention.reference import rows_of, write_pages
from pallas_kernels.paged_attention.types import KVPages, Masking, PagedAttentionError, RaggedBatch, Sizes
from pallas_kernels.tiles import Buffer, check_fits, choose, round_up

CAPABILITIES = (90,)
"""Whose tensor cores have wgmma; those of 10.0 have tcgen05 instead."""
LEAST_JAX = (0, 11)
"""Whose Mosaic GPU has what is used here."""
ROWS = 64
"""Rows of a wgmma of one warpgroup."""
KEYS = 64
"""Keys of one step."""
HEAD_DIMS = (64, 128)
"""Rows of shared memory are swizzled by 128 bytes, 64 numbers. Of 256 a ring of two does not fit beside a result."""
DTYPES = ("bfloat16", "float16")
MOST_STAGES = 4
"""128 KiB in flight for a head_dim of 128, of each multiprocessor: several times what hides the memory's latency."""
LOWEST = -1e30
"""In place of −∞, whose differences are not numbers."""
LOG2_E = math.log2(math.e)
REMEDY = "use the Triton kernel, backend 'gpu'"


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """`block_q` rows of a sequence a tile, `stages` places in the ring, `splits` parts of a sequence's keys."""

    block_q: int
    stages: int
    splits: int = 1


def unsupported_reason(sizes: Sizes) -> str | None:
    """None if the kernel takes these sizes and dtypes, else why not."""
    if jax.__version_info__ < LEAST_JAX:
        return f"Mosaic GPU's kernel needs JAX {'.'.join(map(str, LEAST_JAX))} or later, this is {jax.__version__}"
    if sizes.q_dtype.name not in DTYPES:
        return f"queries are {sizes.q_dtype}, not {' or '.join(DTYPES)}"
    if sizes.page_dtype != sizes.q_dtype:
        return f"pages are {sizes.page_dtype}, not {sizes.q_dtype} as the queries"
    if sizes.head_dim not in HEAD_DIMS:
        return f"head_dim {sizes.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if sizes.page_size % 8 or (sizes.page_size % KEYS and KEYS % sizes.page_size):
        return f"page_size {sizes.page_size} is not 8, 16, 32 or a multiple of {KEYS}"
    if sizes.queries_per_kv_head > ROWS:
        return f"{sizes.queries_per_kv_head} query heads a KV head are more than the {ROWS} rows of a product"
    if sizes.num_tokens == 0 or sizes.num_seqs == 0:
        return f"there is nothing to do for {sizes.num_tokens} tokens of {sizes.num_seqs} sequences"
    return None


def chip_reason(sizes: Sizes, chip: Chip) -> str | None:
    """As `unsupported_reason`, on a chip."""
    if chip.capability not in CAPABILITIES:
        return f"{chip.name} is of compute capability {(chip.capability or 0) / 10:.1f}, Mosaic GPU's kernel is for 9.0"
    return unsupported_reason(sizes)


def buffers_of(tiles: Tiles, sizes: Sizes) -> list[Buffer]:
    """What a block of threads keeps in shared memory."""
    dtype, dim = sizes.q_dtype, sizes.head_dim
    return [
        Buffer(name="queries", shape=(ROWS, dim), dtype=dtype),
        Buffer(name="keys", shape=(KEYS, dim), dtype=dtype, copies=tiles.stages),
        Buffer(name="values", shape=(KEYS, dim), dtype=dtype, copies=tiles.stages),
        Buffer(name="weights", shape=(ROWS, KEYS), dtype=dtype),
        Buffer(name="result", shape=(ROWS, dim), dtype="float32"),
        Buffer(name="slopes, logarithms, barriers", shape=(1024,), dtype="uint8", copies=6),  # each begins a KiB
    ]


def choose_tiles(sizes: Sizes, chip: Chip) -> Tiles:
    """Full tiles of queries, and as many stages as fit. Raises `tiles.TileError`, with the numbers, where none do."""
    block_q = 1 if sizes.num_tokens <= sizes.num_seqs else ROWS // sizes.queries_per_kv_head
    stages = choose(
        f"paged_attention by Mosaic GPU with head_dim {sizes.head_dim} of {sizes.q_dtype.name}",
        range(MOST_STAGES, 1, -1),
        lambda stages: buffers_of(Tiles(block_q=block_q, stages=stages), sizes),
        lambda stages: -stages,
        chip,
        REMEDY,
    )
    # One block of threads takes most of a multiprocessor's shared memory; two for each even out lengths.
    return Tiles(block_q=block_q, stages=stages, splits=num_splits(block_q, sizes, chip, programs_per_core=2))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything that is static."""

    group: int
    head_dim: int
    page_size: int
    rows: int  # of a tile that are copied: block_q * group, to a multiple of 8
    tiles: Tiles
    masking: Masking
    has_slopes: bool

    @property
    def copies(self) -> int:
        """Of one step: pages that its keys are in."""
        return max(1, KEYS // self.page_size)


def _kernel(plan: _Plan, plgpu: Any, *refs: Any) -> None:
    names = ["table", "pages_of", "q", "k", "v"]
    names += ["slopes"] if plan.has_slopes else []
    names += ["out", "lse"]
    names += [
        "q_smem",
        "k_smem",
        "v_smem",
        "p_smem",
        "out_smem",
        "lse_smem",
        "slopes_smem",
        "q_full",
        "k_full",
        "v_full",
    ]
    names += ["k_free", "v_free"]
    ref = dict(zip(names, refs, strict=True))
    # table [tiles, 8], pages_of [S, P]; q, out [.., tiles, Hkv, rows, D], slopes [Hkv, ROWS], lse [splits, tiles, Hkv,
    # ROWS]; k, v [pages, page_size, width]; q_smem, out_smem [ROWS, D], k_smem, v_smem [stages, KEYS, D],
    # p_smem [ROWS, KEYS]
    part, head, tile = lax.axis_index("part"), lax.axis_index("head"), lax.axis_index("tile")
    row, num_rows, seq, start, old, length = (ref["table"][tile, i] for i in range(6))
    position = old + row - start  # of the tile's first row
    end = jnp.minimum(length, position + num_rows) if plan.masking.causal else length
    end = jnp.where(num_rows > 0, end, 0)
    low = jnp.int32(0)
    if plan.masking.window is not None:
        low = lax.div(jnp.maximum(position - (plan.masking.window - 1), 0), jnp.int32(KEYS))
    num_steps = jnp.maximum(lax.div(end + (KEYS - 1), jnp.int32(KEYS)) - low, 0)
    per_part = lax.div(num_steps + (plan.tiles.splits - 1), jnp.int32(plan.tiles.splits))
    low += part * per_part
    steps = jnp.clip(num_steps - part * per_part, 0, per_part)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == 1)
    def _copy() -> None:
        columns = pl.ds(head * plan.head_dim, plan.head_dim)

        def fetch(name: str, base: Any, slot: Any) -> None:
            for i in range(plan.copies):
                place = base + i * plan.page_size
                # Of a step's pages those beyond the sequence are its last one again, so that barriers count alike.
                index = lax.div(jnp.minimum(place, length - 1), jnp.int32(plan.page_size))
                size = min(plan.page_size, KEYS)
                rows = pl.ds(lax.rem(place, jnp.int32(plan.page_size)) if plan.page_size > KEYS else 0, size)
                source = ref[name].at[ref["pages_of"][seq, index], rows, columns]
                target = ref[f"{name}_smem"].at[slot, pl.ds(i * size, size)]
                plgpu.copy_gmem_to_smem(source, target, ref[f"{name}_full"].at[slot])

        @pl.loop(0, steps)
        def _step(step: Any) -> None:
            slot = lax.rem(step, jnp.int32(plan.tiles.stages))
            for name in ("k", "v"):

                @pl.when(step >= plan.tiles.stages)
                def _wait(name: str = name) -> None:
                    plgpu.barrier_wait(ref[f"{name}_free"].at[slot])

                fetch(name, (low + step) * KEYS, slot)

        @pl.loop(jnp.maximum(steps - plan.tiles.stages, 0), steps)
        def _drain(step: Any) -> None:  # no barrier ends with an arrival that nothing waited for
            slot = lax.rem(step, jnp.int32(plan.tiles.stages))
            for name in ("k", "v"):
                plgpu.barrier_wait(ref[f"{name}_free"].at[slot])

    @pl.when(warpgroup == 0)
    def _compute() -> None:
        _attend(plan, plgpu, ref, (part, tile, head), (position, length, low, steps))


def _attend(plan: _Plan, plgpu: Any, ref: dict[str, Any], place: tuple[Any, ...], bounds: tuple[Any, ...]) -> None:
    """What the warpgroup that computes does for a tile: `steps` steps from step `low` of the sequence's keys on."""
    (part, tile, head), (position, length, low, steps) = place, bounds
    matrix, column = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    masking, dim = plan.masking, plan.head_dim
    queries = ref["q_smem"].at[pl.ds(0, plan.rows)]
    plgpu.copy_gmem_to_smem(ref["q"].at[tile, head], queries, ref["q_full"])
    if plan.has_slopes:
        plgpu.copy_gmem_to_smem(ref["slopes"].at[head], ref["slopes_smem"], ref["q_full"])
    plgpu.barrier_wait(ref["q_full"])

    def filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        full: Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
        return full

    def across(values: Array, width: int) -> Array:
        """[ROWS] as [ROWS, width]."""
        return lax.broadcast_in_dim(values, (ROWS, width), (0,))

    def iota(axis: int, shape: tuple[int, int] = (ROWS, KEYS)) -> Array:
        made: Array = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=matrix)
        return made

    def scores(base: Any, slot: Any) -> Array:
        """[ROWS, KEYS] times log2 e, `LOWEST` where nothing is to be seen."""

        def product(acc: Any) -> Array:
            plgpu.wgmma(acc, ref["q_smem"], ref["k_smem"].at[slot].transpose((1, 0)))
            made: Array = acc[...]
            return made

        s = pl.run_scoped(product, plgpu.ACC((ROWS, KEYS), jnp.float32)) * masking.scale
        plgpu.barrier_arrive(ref["k_free"].at[slot])
        if masking.softcap is not None:  # tanh(x) = 1 − 2 / (exp(2 x) + 1)
            grown = jnp.exp2(s * (2 * LOG2_E / masking.softcap))
            s = masking.softcap - 2 * masking.softcap / (grown + 1)
        keys = iota(1) + base
        rows = iota(0) if plan.group == 1 else lax.div(iota(0), jnp.int32(plan.group))
        distance = keys - rows - position
        if plan.has_slopes:
            slopes = plgpu.load(ref["slopes_smem"], layout=column)
            s += across(slopes, KEYS) * distance.astype(jnp.float32)
        seen = keys < length
        if masking.causal:
            seen &= distance <= 0
        if masking.window is not None:
            seen &= distance > -masking.window
        return jnp.where(seen, s * LOG2_E, LOWEST)

    def clear(base: Any, slot: Any) -> None:
        """Zeros in place of the values beyond the sequence."""
        values = plgpu.load(ref["v_smem"].at[slot], layout=matrix)
        live = iota(0, (KEYS, dim)) + base < length
        ref["v_smem"][slot] = jnp.where(live, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    def step(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        acc, largest, total = carry
        slot, base = lax.rem(i, jnp.int32(plan.tiles.stages)), (low + i) * KEYS
        plgpu.barrier_wait(ref["k_full"].at[slot])
        s = scores(base, slot)
        new_largest = jnp.maximum(largest, s.max(axis=1))
        shrink = jnp.exp2(largest - new_largest)
        p = jnp.exp2(s - across(new_largest, KEYS))
        total = total * shrink + p.sum(axis=1)
        plgpu.barrier_wait(ref["v_full"].at[slot])
        pl.when(base + KEYS > length)(functools.partial(clear, base, slot))
        # Through shared memory: JAX's interpreter has no wgmma of registers, and what is checked is to be what runs.
        ref["p_smem"][...] = p.astype(ref["v_smem"].dtype)
        plgpu.commit_smem()

        def product(sums: Any) -> Array:
            plgpu.wgmma(sums, ref["p_smem"], ref["v_smem"].at[slot])
            made: Array = sums[...]
            return made

        acc = acc * across(shrink, dim) + pl.run_scoped(product, plgpu.ACC((ROWS, dim), jnp.float32))
        plgpu.barrier_arrive(ref["v_free"].at[slot])
        return acc, new_largest, total

    first = (filled((ROWS, dim), 0, matrix), filled((ROWS,), LOWEST, column), filled((ROWS,), 0, column))
    acc, largest, total = lax.fori_loop(0, steps, step, first)
    total = jnp.maximum(total, 1e-37)  # a part without keys weighs nothing: its logarithm is about `LOWEST`
    ref["out_smem"][...] = acc / across(total, dim)
    ref["lse_smem"][...] = largest + jnp.log2(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(ref["out_smem"].at[pl.ds(0, plan.rows)], ref["out"].at[part, tile, head])
    plgpu.copy_smem_to_gmem(ref["lse_smem"], ref["lse"].at[part, tile, head])
    plgpu.wait_smem_to_gmem(0)


def paged_attention_mosaic_gpu(
    q: Array,
    k: Array,
    v: Array,
    pages: KVPages,
    batch: RaggedBatch,
    masking: Masking,
    slopes: Array | None = None,
    *,
    chip: Chip | None = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> tuple[Array, KVPages]:
    """As `api.paged_attention`, whose checks it takes as made.

    Args:
        chip: which one it will run on; None for JAX's first device.
        tiles: None for those that `choose_tiles` finds.
        interpret: whether to run it in Mosaic GPU's interpreter, for its numbers; True, or InterpretGPUParams.

    Raises:
        PagedAttentionError: the chip has no wgmma.
        TileError: no tiles fit the chip's shared memory.
        UnknownChipError: JAX's first device is no known GPU.
    """
    plgpu = import_module("jax.experimental.pallas.mosaic_gpu")
    chip = limits_of(jax.devices()[0]) if chip is None else chip
    sizes = Sizes.of(q, k, pages, batch)
    if (reason := chip_reason(sizes, chip)) is not None:
        raise PagedAttentionError(f"paged_attention on mosaic_gpu: {reason}; {REMEDY}")
    tiles = choose_tiles(sizes, chip) if tiles is None else tiles
    check_fits(f"paged_attention by Mosaic GPU, {tiles}", buffers_of(tiles, sizes), chip, REMEDY)
    seq_ids, positions, valid = rows_of(batch, sizes.num_tokens)
    pages = write_pages(k, v, pages, batch, seq_ids, positions, valid)

    group, dim, heads = sizes.queries_per_kv_head, sizes.head_dim, sizes.num_kv_heads
    used = tiles.block_q * group
    rows = round_up(used, 8)
    table = tile_table(batch, sizes, tiles.block_q)
    num_tiles = table.shape[0]
    places = jnp.minimum(table[:, :1] + jnp.arange(tiles.block_q, dtype=jnp.int32), sizes.num_tokens - 1)
    tiled = q[places].reshape(num_tiles, tiles.block_q, heads, group, dim).swapaxes(1, 2)
    tiled = jnp.pad(tiled.reshape(num_tiles, heads, used, dim), ((0, 0), (0, 0), (0, rows - used), (0, 0)))
    plan = _Plan(
        group=group, head_dim=dim, page_size=sizes.page_size, rows=rows, tiles=tiles, masking=masking,
        has_slopes=slopes is not None,
    )  # fmt: skip
    operands = [table, batch.block_tables, tiled, pages.k, pages.v]
    if slopes is not None:
        by_row = jnp.tile(slopes.astype(jnp.float32).reshape(heads, group), (1, -(-ROWS // group)))
        operands.append(by_row[:, :ROWS])

    def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
        """Rows of 128 bytes, which TMA writes and wgmma reads without conflicts of banks."""
        width = 128 // jnp.dtype(dtype).itemsize
        transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def ring(num_arrivals: int) -> Any:
        return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=tiles.stages)

    out, lse = plgpu.kernel(
        functools.partial(_kernel, plan, plgpu),
        out_type=(
            jax.ShapeDtypeStruct((tiles.splits, num_tiles, heads, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((tiles.splits, num_tiles, heads, ROWS), jnp.float32),
        ),
        scratch_types=(
            swizzled((ROWS, dim), q.dtype),
            swizzled((tiles.stages, KEYS, dim), q.dtype),
            swizzled((tiles.stages, KEYS, dim), q.dtype),
            swizzled((ROWS, KEYS), q.dtype),
            swizzled((ROWS, dim), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=2 if slopes is not None else 1),
            ring(plan.copies),
            ring(plan.copies),
            ring(1),
            ring(1),
        ),
        grid=(tiles.splits, heads, num_tiles),
        grid_names=("part", "head", "tile"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret or None,
    )(*operands)
    return _rows_of_tiles(out, lse, batch, sizes, tiles.block_q, seq_ids, valid).astype(q.dtype), pages


def _rows_of_tiles(
    out: Array, lse: Array, batch: RaggedBatch, sizes: Sizes, block_q: int, seq_ids: Array, valid: Array
) -> Array:
    """float32 [T, H, D] of the kernel's out [parts, tiles, Hkv, rows, D] and lse [parts, tiles, Hkv, ROWS]."""
    parts, num_tiles, heads, _, dim = out.shape
    group = sizes.queries_per_kv_head
    used = block_q * group
    per_seq = -(-batch.query_lens // block_q)
    first_tiles = jnp.cumsum(per_seq) - per_seq
    inside = jnp.arange(sizes.num_tokens, dtype=jnp.int32) - batch.query_starts[seq_ids]
    tile = jnp.where(valid, first_tiles[seq_ids] + inside // block_q, 0)
    row = jnp.where(valid, inside % block_q, 0)
    outs = out[:, :, :, :used].reshape(parts, num_tiles, heads, block_q, group, dim)[:, tile, :, row]
    if parts == 1:
        merged = outs[:, 0]
    else:
        logs = lse[..., :used].reshape(parts, num_tiles, heads, block_q, group)[:, tile, :, row]
        weights = jnp.exp2(logs - logs.max(1, keepdims=True))  # [T, parts, Hkv, group]
        merged = (weights[..., None] * outs).sum(1) / weights.sum(1)[..., None]
    whole = merged.reshape(sizes.num_tokens, heads * group, dim)
    return jnp.where(valid[:, None, None], whole, 0)


__all__ = ["Tiles", "buffers_of", "chip_reason", "choose_tiles", "paged_attention_mosaic_gpu", "unsupported_reason"]
