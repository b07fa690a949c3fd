"""Ragged paged attention on NVIDIA GPUs, by a Triton kernel through jax-triton.

Compute capabilities are 7.5, 8.0, 8.6, 8.9, 9.0 and 10.0, those of `chips`.

`triton_kernels.ragged_paged_attention` is the kernel. Here is what goes before and after it: the rows of each sequence
are cut into tiles of `block_q` rows, tiles are chosen by the shared memory that they take, old keys are cut into
`splits` parts where the batch alone does not occupy the GPU, and the parts' results are merged,

    out = Σ_p exp(m_p − m) acc_p / Σ_p exp(m_p − m) l_p,   m = max_p m_p   (Flash-Decoding, Dao et al. 2023).

Turing multiplies no bfloat16 in its tensor cores: there bfloat16 is computed in float32, by its vector units; float16
is what it is fast at. float32 is never rounded to tfloat32.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.chips import Chip, limits_of
from pallas_kernels.paged_attention.types import KVPages, Masking, RaggedBatch, Sizes
from pallas_kernels.tiles import Buffer, TileError, choose, round_up
from pallas_kernels.triton_host import Launch, call

KERNEL = "pallas_kernels.paged_attention.triton_kernels:ragged_paged_attention"
LARGEST_HEAD_DIM = 256
FLOATS = ("float32", "bfloat16", "float16")
PROGRAMS_PER_CORE = 4
"""Programs for each multiprocessor that splitting aims at, so that one's loads hide behind another's products."""
LEAST_KEYS_PER_SPLIT = 128
"""Keys below which a part costs more to merge than it saves."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How much a program computes: `block_q` rows of a sequence, `block_n` keys at a time, `num_stages` of them in
    flight; `splits` programs share the keys of one sequence."""

    block_q: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: int = 1


def unsupported_reason(sizes: Sizes) -> str | None:
    """None if the kernel takes these sizes and dtypes, else why not."""
    if sizes.q_dtype.name not in FLOATS:
        return f"queries are {sizes.q_dtype}, not {' or '.join(FLOATS)}"
    if sizes.page_dtype.name not in (*FLOATS, "int8"):
        return f"pages are {sizes.page_dtype}, not {', '.join(FLOATS)} or int8"
    if sizes.head_dim > LARGEST_HEAD_DIM:
        return f"head_dim {sizes.head_dim} is larger than {LARGEST_HEAD_DIM}"
    if sizes.num_tokens == 0 or sizes.num_seqs == 0:
        return f"there is nothing to do for {sizes.num_tokens} tokens of {sizes.num_seqs} sequences"
    return None


def block_rows(block_q: int, sizes: Sizes) -> int:
    """Rows of a program's products: its rows times query heads a KV head, a power of two, 16 at least."""
    return max(16, _power_of_two(block_q * sizes.queries_per_kv_head))


def is_wide(sizes: Sizes, chip: Chip) -> bool:
    """Whether products are of float32 although the queries are not: bfloat16 on chips without it."""
    return sizes.q_dtype.name == "bfloat16" and "bfloat16" not in chip.peak_flops


def shared_buffers(tiles: Tiles, sizes: Sizes, chip: Chip) -> list[Buffer]:
    """What a program keeps in shared memory, at most: Triton's compiler shares some of it."""
    padded, rows = _power_of_two(max(16, sizes.head_dim)), block_rows(tiles.block_q, sizes)
    dtype: DTypeLike = jnp.float32 if is_wide(sizes, chip) else sizes.q_dtype
    widest = max(jnp.dtype(dtype), sizes.page_dtype, key=lambda d: d.itemsize)
    copies = tiles.num_stages
    return [
        Buffer(name="queries", shape=(rows, padded), dtype=dtype),
        Buffer(name="keys", shape=(tiles.block_n, padded), dtype=widest, copies=copies),
        Buffer(name="values", shape=(tiles.block_n, padded), dtype=widest, copies=copies),
        Buffer(name="weights", shape=(rows, tiles.block_n), dtype=dtype),
    ]


def choose_tiles(sizes: Sizes, chip: Chip) -> Tiles:
    """The largest tiles that fit. Raises `tiles.TileError`, with the numbers, where none do."""
    is_decode = sizes.num_tokens <= sizes.num_seqs
    assert chip.capability is not None
    stages = (3, 2, 1) if chip.capability >= 80 else (1,)  # Turing has no asynchronous copies
    rows = (1,) if is_decode else (64, 32, 16, 8, 4, 2, 1)
    candidates = [
        Tiles(block_q=q, block_n=n, num_warps=8 if block_rows(q, sizes) * sizes.head_dim >= 8192 else 4, num_stages=s)
        for q in rows
        if q == 1 or q * sizes.queries_per_kv_head <= 64
        for s, n in ((s, n) for s in stages for n in (64, 32, 16))
    ]

    def cost(tiles: Tiles) -> float:
        """Bytes of keys read for a row and block, and less where more are in flight."""
        return (1 + 16 / tiles.block_n) / tiles.block_q - 0.01 * min(tiles.num_stages, 2)

    tiles = choose(
        f"paged_attention with head_dim {sizes.head_dim} of {sizes.q_dtype.name}",
        candidates,
        lambda tiles: shared_buffers(tiles, sizes, chip),
        cost,
        chip,
        "use a smaller head_dim or 16-bit numbers",
    )
    return replace(tiles, splits=num_splits(tiles.block_q, sizes, chip))


def tiles_reason(sizes: Sizes, chip: Chip) -> str | None:
    """None if there are tiles that fit the chip, else why not, with the numbers."""
    try:
        choose_tiles(sizes, chip)
    except TileError as error:
        return str(error)
    return None


def make_launch(
    q: Array,
    k: Array,
    v: Array,
    pages: KVPages,
    batch: RaggedBatch,
    masking: Masking,
    slopes: Array | None,
    tiles: Tiles,
    *,
    wide: bool,
) -> Launch:
    """The kernel's launch; of arrays, tracers, or for compiling alone ShapeDtypeStructs."""
    sizes = Sizes.of(q, k, pages, batch)
    structs = isinstance(q, jax.ShapeDtypeStruct)
    plan = jax.eval_shape if structs else lambda fn, arg: fn(arg)
    starts = plan(lambda batch: tile_table(batch, sizes, tiles.block_q), batch)
    is_quantized, is_split = pages.k_scales is not None, tiles.splits > 1
    shape = (tiles.splits, sizes.num_tokens, sizes.num_heads)
    out = jax.ShapeDtypeStruct((*shape, sizes.head_dim), jnp.float32 if is_split else q.dtype)
    stats = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    constants = {
        "NUM_ROWS": sizes.num_tokens,
        "HKV": sizes.num_kv_heads,
        "GROUP": sizes.queries_per_kv_head,
        "D": sizes.head_dim,
        "PAGE_SIZE": sizes.page_size,
        "PAGE_WIDTH": pages.k.shape[2],
        "PAGES_PER_SEQ": sizes.pages_per_seq,
        "SCALE": float(masking.scale),
        "CAUSAL": masking.causal,
        "WINDOW": masking.window,
        "SOFTCAP": masking.softcap,
        "BLOCK_Q": tiles.block_q,
        "BLOCK_M": block_rows(tiles.block_q, sizes),
        "BLOCK_N": tiles.block_n,
        "PADDED": _power_of_two(max(16, sizes.head_dim)),
        "SPLITS": tiles.splits,
        "WIDE_DOT": wide,
    }
    constants |= {} if is_quantized else {"k_scales": None, "v_scales": None}
    constants |= {} if slopes is not None else {"slopes": None}
    constants |= {} if is_split else {"stats": None}
    heads = () if slopes is None else (slopes if structs else slopes.astype(jnp.float32),)
    return Launch(
        kernel=KERNEL,
        updated=(pages.k, pages.v, *((pages.k_scales, pages.v_scales) if is_quantized else ())),
        operands=(q, k, v, batch.block_tables, starts, *heads),
        outputs=(out, stats) if is_split else (out,),
        grid=(starts.shape[0], sizes.num_kv_heads, tiles.splits),
        constants=constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def merge(results: tuple[Array, ...], batch: RaggedBatch, dtype: DTypeLike, num_pages: int) -> tuple[Array, KVPages]:
    """What `paged_attention_gpu` returns, of what the kernel gave: `num_pages` arrays of pages, then its outputs."""
    pages, outputs = KVPages(*results[:num_pages]), results[num_pages:]
    if len(outputs) == 1:
        out = outputs[0][0]
    else:
        parts, (largest, total) = outputs  # [SPLITS, T, H, D], [SPLITS, T, H] each
        weights = jnp.exp(largest - largest.max(0))
        whole = jnp.maximum((weights * total).sum(0), 1e-37)
        out = (weights[..., None] * parts).sum(0) / whole[..., None]
    rows = jnp.arange(out.shape[0], dtype=jnp.int32)[:, None]
    live = ((rows >= batch.query_starts) & (rows < batch.query_starts + batch.query_lens)).any(1)
    return jnp.where(live[:, None, None], out, 0).astype(dtype), pages


def paged_attention_gpu(
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
) -> tuple[Array, KVPages]:
    """As `api.paged_attention`, whose checks it takes as made.

    Args:
        chip: which one it will run on; None for JAX's first device.
        tiles: None for those that `choose_tiles` finds.

    Raises:
        TileError: no tiles fit the chip's shared memory.
        UnknownChipError: JAX's first device is no known GPU.
    """
    chip = limits_of(jax.devices()[0]) if chip is None else chip
    sizes = Sizes.of(q, k, pages, batch)
    tiles = choose_tiles(sizes, chip) if tiles is None else tiles
    launch = make_launch(q, k, v, pages, batch, masking, slopes, tiles, wide=is_wide(sizes, chip))
    assert chip.capability is not None
    return merge(call(launch, capability=chip.capability), batch, q.dtype, len(launch.updated))


def tile_table(batch: RaggedBatch, sizes: Sizes, block_q: int) -> Array:
    """int32 [tiles, 8]: first row, rows (0 for a tile too many), sequence, its first row, old keys, all keys, 0, 0."""
    num_tiles = min(sizes.num_tokens, sizes.num_tokens // block_q + sizes.num_seqs)
    per_seq = -(-batch.query_lens // block_q)
    ends = jnp.cumsum(per_seq)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, tile, side="right", method="compare_all")
    seq = jnp.minimum(seq, sizes.num_seqs - 1).astype(jnp.int32)
    skipped = (tile - (ends - per_seq)[seq]) * block_q
    num_rows = jnp.where(tile < ends[-1], jnp.clip(batch.query_lens[seq] - skipped, 0, block_q), 0)
    start, length = batch.query_starts[seq], batch.seq_lens[seq]
    zero = jnp.zeros_like(tile)
    columns = (start + skipped, num_rows, seq, start, length - batch.query_lens[seq], length, zero, zero)
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


def num_splits(block_q: int, sizes: Sizes, chip: Chip, programs_per_core: int = PROGRAMS_PER_CORE) -> int:
    """A power of two, so that a batch of few sequences occupies the chip; 1 where it does without."""
    programs = min(sizes.num_tokens, sizes.num_tokens // block_q + sizes.num_seqs) * sizes.num_kv_heads
    wanted = -(-programs_per_core * chip.num_cores // programs)
    longest = round_up(sizes.pages_per_seq * sizes.page_size, LEAST_KEYS_PER_SPLIT)
    most = max(1, longest // LEAST_KEYS_PER_SPLIT)
    return int(2 ** np.floor(np.log2(max(1, min(wanted, most)))))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


__all__ = [
    "Tiles",
    "choose_tiles",
    "make_launch",
    "merge",
    "num_splits",
    "paged_attention_gpu",
    "shared_buffers",
    "tile_table",
    "tiles_reason",
    "unsupported_reason",
]
