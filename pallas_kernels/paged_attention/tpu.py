"""Ragged paged attention on TPU: the online softmax of Milakov & Gimelshein (arXiv:1805.02867) over blocks of pages.

One program walks tiles of queries, each of one sequence, and the blocks of keys that a tile sees. While a block is
computed, the pages of the next are on their way from HBM to the other of two buffers: the next of the same tile, or the
first of the next tile, so that the DMA never waits for a sequence to end. The design is that of published ragged paged
attention (arXiv:2604.15464); what differs is how pages lie: a token's heads side by side in one row, so that pages need
no padding for their heads, and keys are in VMEM as the matrix unit wants them.

Heads whose size is no multiple of 128 lanes are served in *lane groups*: the fewest heads that fill whole lanes, as one
matrix product with queries that are 0 outside of their own head. New keys and values come in chunks, aligned to the
pages' tiles, are merged into the block in VMEM, attended to, and copied from there to their page.

Batches of more tokens than sequences take two calls: single tokens with a tile of one query, the others with more.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.lane_groups import gather_heads, spread, spread_slopes
from pallas_kernels.paged_attention.reference import rows_of
from pallas_kernels.paged_attention.schedule import chunks_of, tiles_of
from pallas_kernels.paged_attention.tpu_tiles import (
    VMEM_BUDGET_BYTES,
    Config,
    choose_config,
    layout,
    page_width,
    rows_per_tile,
    unsupported_reason,
    vmem_bytes,
)
from pallas_kernels.paged_attention.types import (
    KVPages,
    Masking,
    PagedAttentionError,
    RaggedBatch,
    Sizes,
    quantize_rows,
)
from pallas_kernels.tiles import LANES

LOWEST = -1e30
"""Below any score; finite, so that a row that saw nothing yet is rescaled by exp(0), not by exp(inf − inf)."""
VMEM_LIMIT_BYTES = 48 << 20
"""What the compiler may use. VMEM is 128 MiB a core on v5e and v6e, 64 on v5p and 7x (jax.experimental.pallas.tpu's
get_tpu_info_for_chip, 0.10.2)."""


def paged_attention_tpu(
    q: Array,
    k: Array,
    v: Array,
    pages: KVPages,
    batch: RaggedBatch,
    masking: Masking,
    slopes: Array | None = None,
    *,
    interpret: Any = False,
    config: Config | None = None,
) -> tuple[Array, KVPages]:
    """As `api.paged_attention`; pages [num_pages, page_size, `page_width`].

    Args:
        interpret: as of `pl.pallas_call`: True or `pltpu.InterpretParams` to run anywhere.
        config: tile sizes of tiles of several queries; None for the largest that fit.

    Raises:
        PagedAttentionError: rows of pages of another width, or a `config` whose VMEM does not fit.
    """
    sizes = Sizes.of(q, k, pages, batch)
    width = page_width(sizes.num_kv_heads, sizes.head_dim)
    if pages.k.shape[2] != width:
        raise PagedAttentionError(
            f"pages on tpu: expected rows of {width} elements ({sizes.num_kv_heads} heads of {sizes.head_dim}, in "
            f"whole lanes of {LANES}), got {pages.k.shape[2]}; allocate pages of page_width(…)"
        )
    if config is not None:
        _check_config(sizes, config)
    new_k, new_v = _chunked(k, sizes, batch), _chunked(v, sizes, batch)
    call = partial(
        _call, spread(q, sizes), new_k, new_v, batch=batch, masking=masking, slopes=slopes, interpret=interpret
    )
    single = choose_config(sizes, single=True)
    assert single is not None, "unsupported_reason said that it fits"
    several = config or choose_config(sizes, single=False)
    seq_ids, _, valid = rows_of(batch, sizes.num_tokens)
    is_single = batch.query_lens == 1
    max_singles = min(sizes.num_tokens, sizes.num_seqs)
    if several is None or (config is None and sizes.num_tokens <= sizes.num_seqs):
        out, pages = call(pages, sizes=sizes, config=single, include=batch.query_lens > 0, max_tiles=sizes.num_tokens)
    else:
        max_tiles = min(sizes.num_tokens, sizes.num_tokens // several.tile + sizes.num_seqs)
        ones, pages = call(pages, sizes=sizes, config=single, include=is_single, max_tiles=max_singles)
        rest, pages = call(pages, sizes=sizes, config=several, include=batch.query_lens > 1, max_tiles=max_tiles)
        out = jnp.where(is_single[seq_ids][:, None, None, None], ones, rest)
    out = jnp.where(valid[:, None, None], gather_heads(out, sizes), 0)
    return out.astype(q.dtype), pages


def _check_config(sizes: Sizes, config: Config) -> None:
    if config.keys_per_block % sizes.page_size or config.tile < 1:
        raise PagedAttentionError(
            f"config: expected at least 1 query and whole pages of {sizes.page_size} keys, got tile={config.tile}, "
            f"keys_per_block={config.keys_per_block}"
        )
    if (needed := vmem_bytes(sizes, config)) > VMEM_BUDGET_BYTES:
        raise PagedAttentionError(
            f"config: {config.tile} queries and {config.keys_per_block} keys take {needed / 2**20:.1f} MiB of VMEM, of "
            f"{VMEM_BUDGET_BYTES >> 20}; give fewer of either"
        )


def _chunked(x: Array, sizes: Sizes, batch: RaggedBatch) -> tuple[Array, Array | None]:
    """New keys or values as chunks [C, chunk, width] of the pages' dtype, and float32 scales [C, Hkv, page_size]."""
    chunk = rows_per_tile(sizes.page_dtype)
    chunks = chunks_of(batch, sizes.num_tokens, chunk=chunk)
    width = page_width(sizes.num_kv_heads, sizes.head_dim)
    scales = None
    stored = x
    if sizes.page_dtype == jnp.int8:
        stored, row_scales = quantize_rows(x)  # [T, Hkv]
        placed = row_scales[chunks.rows].swapaxes(1, 2)  # [C, Hkv, chunk]
        # a chunk's scales repeat along a page: the kernel takes those at its place
        scales = jnp.tile(placed, (1, 1, sizes.page_size // chunk))
    flat = stored.astype(sizes.page_dtype).reshape(sizes.num_tokens, -1)
    flat = jnp.pad(flat, ((0, 0), (0, width - flat.shape[1])))
    return jnp.where(chunks.valid[..., None], flat[chunks.rows], 0), scales


def _call(
    q: Array,
    new_k: tuple[Array, Array | None],
    new_v: tuple[Array, Array | None],
    pages: KVPages,
    *,
    batch: RaggedBatch,
    masking: Masking,
    slopes: Array | None,
    sizes: Sizes,
    config: Config,
    include: Array,
    max_tiles: int,
    interpret: Any,
) -> tuple[Array, KVPages]:
    """One launch: float32 [T, groups, rows, lanes] of the rows it serves, anything in others; and the new pages."""
    width, groups, lanes, rows = layout(sizes)
    chunk = rows_per_tile(sizes.page_dtype)
    keys, queries = config.keys_per_block, config.tile * rows
    tiles = tiles_of(batch, include, masking, tile=config.tile, keys_per_block=keys, max_tiles=max_tiles)
    chunks = chunks_of(batch, sizes.num_tokens, chunk=chunk)
    scalars = (*tiles, chunks.offsets, batch.seq_lens, batch.query_lens, batch.block_tables.reshape(-1))
    padded = jnp.pad(q, ((0, config.tile), (0, 0), (0, 0), (0, 0)))
    has_scales = pages.k_scales is not None
    page_arrays = [pages.k, pages.v]
    new = [new_k[0], new_v[0]]
    if pages.k_scales is not None and pages.v_scales is not None:
        assert new_k[1] is not None and new_v[1] is not None
        page_arrays += [pages.k_scales, pages.v_scales]
        new += [new_k[1], new_v[1]]
    inputs = [padded, *new]
    if slopes is not None:
        wide = jnp.broadcast_to(spread_slopes(slopes, sizes)[..., None], (groups, rows, LANES))
        inputs.append(wide)
    num_blocks_pages = keys // sizes.page_size
    chunks_per_block = keys // chunk
    scratch: list[Any] = [
        pltpu.VMEM((2, config.tile, groups, rows, lanes), jnp.float32),
        pltpu.VMEM((2, config.tile, groups, rows, lanes), jnp.float32),
        pltpu.VMEM((2, 2, keys, width), sizes.page_dtype),
        pltpu.VMEM((2, 2, keys, width), sizes.page_dtype),
        pltpu.VMEM((groups, queries, lanes), jnp.float32),
        pltpu.VMEM((groups, queries, LANES), jnp.float32),
        pltpu.VMEM((groups, queries, LANES), jnp.float32),
        pltpu.SemaphoreType.DMA((4, 2)),
    ]
    if has_scales:
        heads = sizes.num_kv_heads
        scratch += [
            pltpu.VMEM((2, 2, num_blocks_pages, heads, sizes.page_size), jnp.float32),
            pltpu.VMEM((2, 2, chunks_per_block, heads, sizes.page_size), jnp.float32),
        ]
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    in_specs = [hbm] * (len(inputs) + len(page_arrays))
    if slopes is not None:
        in_specs[len(inputs) - 1] = pl.BlockSpec(memory_space=pltpu.VMEM)
    out_shapes = [jax.ShapeDtypeStruct(padded.shape, jnp.float32)]
    out_shapes += [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in page_arrays]
    first_page_input = len(scalars) + len(inputs)
    kernel = partial(
        _kernel,
        sizes=sizes,
        config=config,
        masking=masking,
        num_pages=len(page_arrays),
        has_slopes=slopes is not None,
    )
    out, *written = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=in_specs,
            out_specs=[hbm] * len(out_shapes),
            scratch_shapes=scratch,
        ),
        out_shape=out_shapes,
        input_output_aliases={first_page_input + i: 1 + i for i in range(len(page_arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT_BYTES),
        interpret=interpret,
        name=f"ragged_paged_attention_{config.tile}x{keys}",
    )(*scalars, *inputs, *page_arrays)
    return out[: sizes.num_tokens], KVPages(*written)


def _kernel(*refs: Any, sizes: Sizes, config: Config, masking: Masking, num_pages: int, has_slopes: bool) -> None:
    # prefetched, in SMEM: see `schedule`; tables [S * P]
    count, seq_ids, tile_rows, tile_positions, first_blocks, end_blocks, offsets, seq_lens, query_lens, tables = refs[
        :10
    ]
    q_hbm, *new_hbm = refs[10 : 11 + num_pages]
    slopes_ref = refs[11 + num_pages] if has_slopes else None
    after = 11 + num_pages + has_slopes + num_pages  # the input pages are the output pages
    out_hbm, *pages_hbm = refs[after : after + 1 + num_pages]
    q_buf, out_buf, kv_buf, new_buf, acc_ref, max_ref, sum_ref, sems, *scale_bufs = refs[after + 1 + num_pages :]
    buffers: tuple[Any, Any] = (scale_bufs[0], scale_bufs[1]) if scale_bufs else (None, None)
    scale_buf, new_scale_buf = buffers

    _, groups, lanes, rows = layout(sizes)
    keys, tile = config.keys_per_block, config.tile
    page_size, chunk = sizes.page_size, rows_per_tile(sizes.page_dtype)
    queries = tile * rows
    chunks_per_block, pages_per_block = keys // chunk, keys // page_size
    num_tiles = count[0]
    compute = jnp.bfloat16 if sizes.q_dtype == jnp.bfloat16 and sizes.page_dtype != jnp.float32 else jnp.float32
    precision = lax.Precision.DEFAULT if compute == jnp.bfloat16 else lax.Precision.HIGHEST

    # semaphores: 0 queries, 1 results, 2 pages and new rows, 3 writes; [which, slot]

    def q_copy(i: Any) -> Any:
        slot = lax.rem(i, 2)
        return pltpu.make_async_copy(q_hbm.at[pl.ds(tile_rows[i], tile)], q_buf.at[slot], sems.at[0, slot])

    def out_copy(i: Any) -> Any:
        slot = lax.rem(i, 2)
        return pltpu.make_async_copy(out_buf.at[slot], out_hbm.at[pl.ds(tile_rows[i], tile)], sems.at[1, slot])

    def chunk_range(i: Any, block: Any) -> tuple[Any, Any]:
        """Chunks of a block of keys that hold new tokens, by position // chunk; empty if the first is not less."""
        seq = seq_ids[i]
        first_new = seq_lens[seq] - query_lens[seq]
        low = jnp.maximum(lax.div(first_new, chunk), block * chunks_per_block)
        return low, jnp.minimum(pl.cdiv(seq_lens[seq], chunk), (block + 1) * chunks_per_block)

    def each_fetch(i: Any, block: Any, slot: Any, act: Any) -> None:
        """The copies that bring a block of keys and values, and its new rows."""
        seq = seq_ids[i]
        num = jnp.minimum(pl.cdiv(seq_lens[seq], page_size) - block * pages_per_block, pages_per_block)
        base = seq * sizes.pages_per_seq + block * pages_per_block

        def page(j: Any, _: Any) -> Any:
            index = tables[base + j]
            at = pl.ds(pl.multiple_of(j * page_size, page_size), page_size)
            for which in range(2):
                target = kv_buf.at[slot, which, at]
                act(pltpu.make_async_copy(pages_hbm[which].at[index], target, sems.at[2, slot]))
            if scale_buf is not None:
                for which in range(2):
                    target = scale_buf.at[slot, which, j]
                    act(pltpu.make_async_copy(pages_hbm[2 + which].at[index], target, sems.at[2, slot]))
            return _

        def new_rows(c: Any, _: Any) -> Any:
            here = c - block * chunks_per_block
            at = pl.ds(pl.multiple_of(here * chunk, chunk), chunk)
            for which in range(2):
                source = new_hbm[which].at[c + offsets[seq]]
                act(pltpu.make_async_copy(source, new_buf.at[slot, which, at], sems.at[2, slot]))
            if new_scale_buf is not None:
                for which in range(2):
                    source = new_hbm[2 + which].at[c + offsets[seq]]
                    act(pltpu.make_async_copy(source, new_scale_buf.at[slot, which, here], sems.at[2, slot]))
            return _

        lax.fori_loop(0, num, page, 0)
        lax.fori_loop(*chunk_range(i, block), new_rows, 0)

    def each_write(i: Any, block: Any, slot: Any, act: Any) -> None:
        """The copies of a block's new rows to their pages: those that this tile's own tokens are in."""
        seq = seq_ids[i]
        low, high = chunk_range(i, block)
        low = jnp.maximum(low, lax.div(tile_positions[i], chunk))
        high = jnp.minimum(high, pl.cdiv(tile_positions[i] + tile, chunk))

        def write(c: Any, _: Any) -> Any:
            here = c - block * chunks_per_block
            index = tables[seq * sizes.pages_per_seq + lax.div(c * chunk, page_size)]
            at = pl.ds(pl.multiple_of(here * chunk, chunk), chunk)
            to = pl.ds(pl.multiple_of(lax.rem(c * chunk, page_size), chunk), chunk)
            for which in range(2):
                source = kv_buf.at[slot, which, at]
                act(pltpu.make_async_copy(source, pages_hbm[which].at[index, to], sems.at[3, slot]))
            return _

        lax.fori_loop(low, high, write, 0)
        if scale_buf is None:
            return

        def write_scales(page: Any, _: Any) -> Any:
            index = tables[seq * sizes.pages_per_seq + page]
            for which in range(2):
                source = scale_buf.at[slot, which, page - block * pages_per_block]
                act(pltpu.make_async_copy(source, pages_hbm[2 + which].at[index], sems.at[3, slot]))
            return _

        first_page = lax.div(low * chunk, page_size)
        lax.fori_loop(first_page, jnp.where(high > low, pl.cdiv(high * chunk, page_size), first_page), write_scales, 0)

    def merge(i: Any, block: Any, slot: Any) -> None:
        """Put new rows in their places in the block, and zeros after the sequence's last token."""
        seq = seq_ids[i]
        length, first_new = seq_lens[seq], seq_lens[seq] - query_lens[seq]
        wide = jnp.int32 if sizes.page_dtype == jnp.int8 else jnp.float32

        def place(c: Any, _: Any) -> Any:
            here = c - block * chunks_per_block
            at = pl.ds(pl.multiple_of(here * chunk, chunk), chunk)
            position = c * chunk + lax.broadcasted_iota(jnp.int32, (chunk, kv_buf.shape[-1]), 0)
            for which in range(2):
                old, new = kv_buf[slot, which, at].astype(wide), new_buf[slot, which, at].astype(wide)
                both = jnp.where(position >= first_new, new, old)
                both = jnp.where(position >= length, jnp.zeros_like(both), both)
                kv_buf[slot, which, at] = both.astype(sizes.page_dtype)
            if scale_buf is None:
                return _
            page = lax.div(here * chunk, page_size)
            page_position = (page + block * pages_per_block) * page_size
            lane = page_position + lax.broadcasted_iota(jnp.int32, scale_buf.shape[-2:], 1)
            mine = (lane >= jnp.maximum(c * chunk, first_new)) & (lane < jnp.minimum((c + 1) * chunk, length))
            for which in range(2):
                placed = jnp.where(mine, new_scale_buf[slot, which, here], scale_buf[slot, which, page])
                scale_buf[slot, which, page] = placed
            return _

        def clear(here: Any, _: Any) -> Any:
            at = pl.ds(pl.multiple_of(here * chunk, chunk), chunk)
            kv_buf[slot, 1, at] = jnp.zeros((chunk, kv_buf.shape[-1]), sizes.page_dtype)
            return _

        low, high = chunk_range(i, block)
        lax.fori_loop(low, high, place, 0)
        end = jnp.clip(pl.cdiv(length, chunk) - block * chunks_per_block, 0, chunks_per_block)
        lax.fori_loop(end, chunks_per_block, clear, 0)

    def scales_of(slot: Any, which: int, group: int) -> Array:
        """[rows, keys]: for each query row of a lane group its head's scale of each key."""
        per_group = lanes // sizes.head_dim
        out = jnp.zeros((rows, keys), jnp.float32)
        row_head = lax.div(lax.broadcasted_iota(jnp.int32, (rows, keys), 0), sizes.queries_per_kv_head)
        for i in range(per_group):
            head = group * per_group + i
            if head >= sizes.num_kv_heads:
                break
            line = jnp.concatenate(
                [scale_buf[slot, which, page, head : head + 1] for page in range(pages_per_block)], axis=1
            )
            out = jnp.where(row_head == i, jnp.broadcast_to(line, (rows, keys)), out)
        return out

    def attend(i: Any, block: Any, slot: Any) -> None:
        shape = (tile, rows, keys)
        q_position = tile_positions[i] + lax.broadcasted_iota(jnp.int32, shape, 0)
        k_position = block * keys + lax.broadcasted_iota(jnp.int32, shape, 2)
        seen = k_position < seq_lens[seq_ids[i]]
        if masking.causal:
            seen &= k_position <= q_position
        if masking.window is not None:
            seen &= k_position > q_position - masking.window
        q_slot = lax.rem(i, 2)
        for group in range(groups):
            at = slice(group * lanes, (group + 1) * lanes)
            k, v = (_widen(kv_buf[slot, which, :, at], compute) for which in range(2))  # [keys, lanes]
            q = q_buf[q_slot, :, group].reshape(queries, lanes).astype(compute)
            scores = lax.dot_general(
                q, k, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            ).reshape(shape)
            scores *= masking.scale
            if scale_buf is not None:
                scores *= scales_of(slot, 0, group)[None]
            if masking.softcap is not None:
                scores = masking.softcap * jnp.tanh(scores / masking.softcap)
            if slopes_ref is not None:
                scores += slopes_ref[group][None, :, :1] * (k_position - q_position).astype(jnp.float32)
            scores = jnp.where(seen, scores, LOWEST).reshape(queries, keys)
            old_max = max_ref[group][:, :1]
            new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp(scores - new_max)
            kept = jnp.exp(old_max - new_max)
            total = sum_ref[group][:, :1] * kept + jnp.sum(weights, axis=1, keepdims=True)
            if scale_buf is not None:
                live = jnp.where(k_position[0] < seq_lens[seq_ids[i]], scales_of(slot, 1, group), 0)
                weights = (weights.reshape(shape) * live[None]).reshape(queries, keys)
            values = lax.dot_general(
                weights.astype(compute),
                v,
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            acc_ref[group] = acc_ref[group] * kept + values
            max_ref[group] = jnp.broadcast_to(new_max, (queries, LANES))
            sum_ref[group] = jnp.broadcast_to(total, (queries, LANES))

    def serve_tile(i: Any, slot: Any) -> Any:
        @pl.when(i + 1 < num_tiles)
        def _() -> None:
            q_copy(i + 1).start()

        q_copy(i).wait()
        acc_ref[...] = jnp.zeros_like(acc_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        max_ref[...] = jnp.full_like(max_ref, LOWEST)

        def serve_block(block: Any, slot: Any) -> Any:
            is_last = block + 1 == end_blocks[i]
            next_tile = jnp.where(is_last, i + 1, i)

            @pl.when(next_tile < num_tiles)
            def _() -> None:
                safe = jnp.minimum(next_tile, num_tiles - 1)
                next_block = jnp.where(is_last, first_blocks[safe], block + 1)
                each_fetch(safe, next_block, 1 - slot, lambda copy: copy.start())

            each_fetch(i, block, slot, lambda copy: copy.wait())
            merge(i, block, slot)
            each_write(i, block, slot, lambda copy: copy.start())
            attend(i, block, slot)
            each_write(i, block, slot, lambda copy: copy.wait())
            return 1 - slot

        slot = lax.fori_loop(first_blocks[i], end_blocks[i], serve_block, slot)
        out_slot = lax.rem(i, 2)
        for group in range(groups):
            mean = acc_ref[group] / jnp.maximum(sum_ref[group][:, :1], 1e-37)
            out_buf[out_slot, :, group] = mean.reshape(tile, rows, lanes)

        @pl.when(i > 0)
        def wait_before() -> None:
            out_copy(i - 1).wait()  # it may have written to rows of this tile, beyond its own

        out_copy(i).start()
        return slot

    @pl.when(num_tiles > 0)
    def serve() -> None:
        q_copy(0).start()
        each_fetch(0, first_blocks[0], 0, lambda copy: copy.start())
        lax.fori_loop(0, num_tiles, serve_tile, 0)
        out_copy(num_tiles - 1).wait()


def _widen(x: Array, dtype: Any) -> Array:
    """int8 through float32: not every generation converts it to bfloat16 at once."""
    return x.astype(jnp.float32).astype(dtype) if x.dtype == jnp.int8 else x.astype(dtype)


__all__ = ["paged_attention_tpu", "unsupported_reason"]
