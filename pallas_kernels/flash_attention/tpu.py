"""Flash attention on TPU: JAX's splash attention, with tiles chosen by the VMEM that its kernel takes.

Splash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) is the online softmax of FlashAttention
(arXiv:2205.14135) over tiles of keys, which passes over the tiles of which a mask leaves nothing. It has causal and
local masks, soft caps, grouped queries, heads of any size, and gradients. What is done here:

- Its tiles must divide a sequence: queries, keys and values are padded to whole tiles with zeros. Later keys are seen
  by no query of a causal mask; without one they are of another segment, and are masked.
- It has no scale: queries are scaled, and rounded to their dtype once more.
- A key and a value head of each group are read as they are, once for each query head of the group.
- Tiles that take more VMEM than the compiler gives it are an error before compilation.

It has no ALiBi. Products of float32 are as precise as `jax.default_matmul_precision` says.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from pallas_kernels.chips import Chip, UnknownChipError, chip_named, chip_of
from pallas_kernels.flash_attention.types import FlashAttentionError, Masking, Sizes
from pallas_kernels.tiles import LANES, USABLE_VMEM, Buffer, TileError, check_fits, choose, round_up

DTYPES = ("float32", "bfloat16")
SCOPED_VMEM_BYTES = {"v5e": 16 << 20, "v5p": 16 << 20, "v6e": 32 << 20, "tpu7x": 32 << 20}
"""What the compiler gives a kernel that asks for nothing else, as splash attention does, by chip: the limit that its
error for tiles that take more names (libtpu 0.0.52)."""
STEP_SECONDS = 0.35e-6
"""What a program of a grid takes besides its work, about: as for `quantized_matmul.tpu.STEP_SECONDS`."""
TILE_SIZES = (128, 256, 512, 1024, 2048)
LARGEST_BACKWARD = 512
"""Rows of a tile of the backward kernels, at most: they keep more of each in VMEM."""
REMEDY = "give fewer queries or keys a tile"


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Queries and keys of a tile; multiples of 128, of which one divides the other."""

    queries: int
    keys: int

    def padded(self, seq_len: int) -> int:
        """The length that sequences are padded to."""
        return round_up(seq_len, max(self.queries, self.keys))


def unsupported_reason(sizes: Sizes, masking: Masking, chip: Chip | None = None) -> str | None:
    """None if the kernel takes arguments of these sizes, else why not, with the numbers."""
    if sizes.dtype.name not in DTYPES:
        return f"queries are {sizes.dtype}, not {' or '.join(DTYPES)}"
    if sizes.has_slopes:
        return "splash attention has no ALiBi slopes"
    try:
        choose_tiles(sizes, masking, _chip(chip))
    except (TileError, UnknownChipError) as error:
        return str(error)
    return None


def _chip(chip: Chip | None) -> Chip:
    """The chip to choose tiles for; of other devices than TPUs, on which kernels are interpreted, v5e."""
    if chip is not None:
        return chip
    device = jax.devices()[0]
    return chip_of(device) if device.platform == "tpu" else chip_named("v5e")


def buffers_of(sizes: Sizes, tiles: Tiles) -> list[Buffer]:
    """What the forward kernel keeps in VMEM; `copies` is 2 for what is fetched or written beside the work."""
    queries, keys, dtype = tiles.queries, tiles.keys, sizes.dtype
    return [
        Buffer(name="queries", shape=(queries, sizes.head_dim), dtype=dtype, copies=2),
        Buffer(name="keys", shape=(keys, sizes.head_dim), dtype=dtype, copies=2),
        Buffer(name="values", shape=(keys, sizes.value_dim), dtype=dtype, copies=2),
        Buffer(name="results", shape=(queries, sizes.value_dim), dtype=dtype, copies=2),
        Buffer(name="positions", shape=(queries, LANES), dtype="int32", copies=2),
        Buffer(name="largest scores, sums", shape=(queries, LANES), dtype="float32", copies=2),
        Buffer(name="weighted values", shape=(queries, sizes.value_dim), dtype="float32"),
        Buffer(name="scores", shape=(queries, keys), dtype="float32"),
        Buffer(name="values to multiply", shape=(keys, sizes.value_dim), dtype="float32"),
    ]


def num_visible(seq_len: int, masking: Masking, tiles: Tiles) -> int:
    """Pairs of a tile of queries and a tile of keys of which a query sees a key."""
    padded, count = tiles.padded(seq_len), 0
    for start in range(0, padded, tiles.queries):
        last = start + tiles.queries - 1 if masking.causal else padded - 1
        first = 0 if masking.window is None else max(0, start - masking.window + 1)
        count += last // tiles.keys - first // tiles.keys + 1
    return count


def _seconds(sizes: Sizes, masking: Masking, tiles: Tiles, chip: Chip) -> float:
    """A model of the time of a head, to rank tiles by: products of the tiles that are not passed over, and their
    programs."""
    peak = chip.per_device.peak_flops["bfloat16"]
    products = 2 * tiles.queries * tiles.keys * (sizes.head_dim + sizes.value_dim) / peak
    return num_visible(sizes.seq_len, masking, tiles) * (products + STEP_SECONDS)


def choose_tiles(sizes: Sizes, masking: Masking, chip: Chip) -> Tiles:
    """The tiles that take least time, of those that fit. Raises TileError, with the numbers, where none do."""
    longest = max(LANES, round_up(sizes.seq_len, LANES))
    fitting = [size for size in TILE_SIZES if size < 2 * longest]
    candidates = [Tiles(queries=queries, keys=keys) for queries in fitting for keys in fitting]
    return choose(
        _subject(sizes),
        candidates,
        lambda tiles: buffers_of(sizes, tiles),
        lambda tiles: _seconds(sizes, masking, tiles, chip),
        _scoped(chip),
        "use smaller heads",
    )


def _subject(sizes: Sizes) -> str:
    return f"flash_attention of {sizes.seq_len} tokens, heads of {sizes.head_dim} in {sizes.dtype}"


def _scoped(chip: Chip) -> Chip:
    """The chip with the VMEM that the compiler gives a kernel."""
    scoped = SCOPED_VMEM_BYTES.get(chip.name, min(SCOPED_VMEM_BYTES.values()))
    return replace(chip, fast_memory_bytes=int(scoped / USABLE_VMEM))


def flash_attention_tpu(
    q: Array,
    k: Array,
    v: Array,
    masking: Masking,
    slopes: Array | None = None,
    *,
    chip: Chip | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """As `api.flash_attention`, whose checks it takes as made.

    Args:
        chip: which one it will run on; None for JAX's first device, or v5e where that is no TPU.
        tiles: None for those that `choose_tiles` finds.
        interpret: run anywhere, slowly.

    Raises:
        FlashAttentionError: `tiles` that the kernel does not take.
        TileError: `tiles` whose VMEM does not fit.
    """
    assert slopes is None, "unsupported_reason said so"
    sizes = Sizes.of(q, k, v)
    if tiles is None:
        tiles = choose_tiles(sizes, masking, _chip(chip))
    else:
        _check_tiles(sizes, tiles, _chip(chip))
    padding = tiles.padded(sizes.seq_len) - sizes.seq_len
    kernel = _kernel(sizes, masking, tiles, interpret)
    scaled = (q.astype(jnp.float32) * masking.scale).astype(q.dtype)

    def heads_first(x: Array) -> Array:
        """[B, H, padded, D] of [B, T, H, D]."""
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    segments: Any = None
    if padding and not masking.causal:
        ids = (jnp.arange(sizes.seq_len + padding) >= sizes.seq_len).astype(jnp.int32)
        segments = splash_attention_kernel.SegmentIds(q=ids, kv=ids)
    out: Array = jax.vmap(kernel, in_axes=(0, 0, 0, None))(*map(heads_first, (scaled, k, v)), segments)
    return out[:, :, : sizes.seq_len].swapaxes(1, 2)


def _check_tiles(sizes: Sizes, tiles: Tiles, chip: Chip) -> None:
    small, large = sorted((tiles.queries, tiles.keys))
    if small < 1 or small % LANES or large % small:
        raise FlashAttentionError(
            f"tiles: expected multiples of {LANES} of which one divides the other, got {tiles.queries} queries and "
            f"{tiles.keys} keys"
        )
    check_fits(f"{_subject(sizes)}, {tiles}", buffers_of(sizes, tiles), _scoped(chip), REMEDY)


def _kernel(sizes: Sizes, masking: Masking, tiles: Tiles, interpret: bool) -> Any:
    """Splash attention of queries [H, padded, D], keys, values [Hkv, padded, D], and segments of their tokens."""
    shape = (tiles.padded(sizes.seq_len),) * 2
    if masking.window is not None:
        mask: Any = splash_attention_mask.LocalMask(shape, (masking.window - 1, 0 if masking.causal else None), 0)
    elif masking.causal:
        mask = splash_attention_mask.CausalMask(shape)
    else:
        mask = splash_attention_mask.FullMask(shape)
    backward_queries, backward_keys = min(tiles.queries, LARGEST_BACKWARD), min(tiles.keys, LARGEST_BACKWARD)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * sizes.num_heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=tiles.queries,
            block_kv=tiles.keys,
            block_q_dkv=backward_queries,
            block_kv_dkv=backward_keys,
            block_q_dq=backward_queries,
            block_kv_dq=backward_keys,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=masking.softcap,
        interpret=interpret,
    )


__all__ = ["Tiles", "buffers_of", "choose_tiles", "flash_attention_tpu", "num_visible", "unsupported_reason"]
