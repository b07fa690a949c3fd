"""Flash attention on NVIDIA GPUs by a Triton kernel through jax-triton, for what cuDNN does not take.

Compute capabilities are 7.5, 8.0, 8.6, 8.9, 9.0 and 10.0, those of `chips`. Turing multiplies no bfloat16 in its tensor
cores: there bfloat16 is computed in float32. float32 is never rounded to tfloat32. It has no gradients.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.chips import Chip, UnknownChipError, limits_of
from pallas_kernels.flash_attention.types import Masking, Sizes
from pallas_kernels.tiles import Buffer, TileError, choose
from pallas_kernels.triton_host import Launch, call

KERNEL = "pallas_kernels.flash_attention.triton_kernels:flash_attention"
LARGEST_HEAD_DIM = 256
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SUM = 128 * 128
"""Numbers of the weighted values that a program keeps in registers, at most: of 8 warps, 64 a thread of its 255."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How much a program computes: `block_m` queries, `block_n` keys at a time, `num_stages` of them in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def unsupported_reason(sizes: Sizes, masking: Masking, chip: Chip | None = None) -> str | None:
    """None if the kernel takes arguments of these sizes, else why not, with the numbers."""
    if sizes.dtype.name not in DTYPES:
        return f"queries are {sizes.dtype}, not {', '.join(DTYPES)}"
    if max(sizes.head_dim, sizes.value_dim) > LARGEST_HEAD_DIM:
        return f"heads of {sizes.head_dim} and values of {sizes.value_dim}: more than {LARGEST_HEAD_DIM}"
    try:
        choose_tiles(sizes, limits_of(jax.devices()[0]) if chip is None else chip)
    except (TileError, UnknownChipError) as error:
        return str(error)
    return None


def is_wide(sizes: Sizes, chip: Chip) -> bool:
    """Whether products are of float32 although the queries are not: bfloat16 on chips without it."""
    return sizes.dtype.name == "bfloat16" and "bfloat16" not in chip.peak_flops


def shared_buffers(tiles: Tiles, sizes: Sizes, chip: Chip) -> list[Buffer]:
    """What a program keeps in shared memory, at most: Triton's compiler shares some of it."""
    dtype: DTypeLike = jnp.float32 if is_wide(sizes, chip) else sizes.dtype
    copies = tiles.num_stages
    return [
        Buffer(name="queries", shape=(tiles.block_m, _padded(sizes.head_dim)), dtype=dtype),
        Buffer(name="keys", shape=(tiles.block_n, _padded(sizes.head_dim)), dtype=dtype, copies=copies),
        Buffer(name="values", shape=(tiles.block_n, _padded(sizes.value_dim)), dtype=dtype, copies=copies),
        Buffer(name="weights", shape=(tiles.block_m, tiles.block_n), dtype=dtype),
    ]


def choose_tiles(sizes: Sizes, chip: Chip) -> Tiles:
    """The largest tiles that fit. Raises `tiles.TileError`, with the numbers, where none do."""
    assert chip.capability is not None, f"{chip.name} is no GPU"
    stages = (3, 2, 1) if chip.capability >= 80 else (1,)  # Turing has no asynchronous copies
    longest = max(16, 1 << (sizes.seq_len - 1).bit_length())
    candidates = [
        Tiles(block_m=m, block_n=n, num_warps=8 if m * _padded(sizes.value_dim) >= 8192 else 4, num_stages=s)
        for m in (128, 64, 32, 16)
        if m <= longest and (m == 16 or m * _padded(sizes.value_dim) <= LARGEST_SUM)
        for s in stages
        for n in (64, 32, 16)
    ]

    def cost(tiles: Tiles) -> float:
        """Keys read for a query, and less where more are in flight."""
        return (1 + 16 / tiles.block_n) / tiles.block_m - 0.001 * min(tiles.num_stages, 2)

    return choose(
        f"flash_attention with heads of {sizes.head_dim} in {sizes.dtype}",
        candidates,
        lambda tiles: shared_buffers(tiles, sizes, chip),
        cost,
        chip,
        "use smaller heads or 16-bit numbers",
    )


def make_launch(
    q: Array, k: Array, v: Array, masking: Masking, slopes: Array | None, tiles: Tiles, *, wide: bool
) -> Launch:
    """The kernel's launch; of arrays, tracers, or for compiling alone ShapeDtypeStructs."""
    sizes = Sizes.of(q, k, v, slopes)
    constants = {
        "T": sizes.seq_len,
        "HKV": sizes.num_kv_heads,
        "GROUP": sizes.queries_per_kv_head,
        "D": sizes.head_dim,
        "DV": sizes.value_dim,
        "SCALE": float(masking.scale),
        "CAUSAL": masking.causal,
        "WINDOW": masking.window,
        "SOFTCAP": masking.softcap,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PADDED": _padded(sizes.head_dim),
        "PADDED_V": _padded(sizes.value_dim),
        "WIDE_DOT": wide,
    }
    heads: tuple[Array, ...] = ()
    if slopes is None:
        constants["slopes"] = None
    else:
        heads = (slopes if isinstance(slopes, jax.ShapeDtypeStruct) else slopes.astype(jnp.float32),)
    return Launch(
        kernel=KERNEL,
        operands=(q, k, v, *heads),
        outputs=(jax.ShapeDtypeStruct((*q.shape[:3], sizes.value_dim), q.dtype),),
        grid=(-(-sizes.seq_len // tiles.block_m), sizes.num_heads, sizes.batch),
        constants=constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def flash_attention_gpu(
    q: Array,
    k: Array,
    v: Array,
    masking: Masking,
    slopes: Array | None = None,
    *,
    chip: Chip | None = None,
    tiles: Tiles | None = None,
) -> Array:
    """As `api.flash_attention`, whose checks it takes as made.

    Args:
        chip: which one it will run on; None for JAX's first device.
        tiles: None for those that `choose_tiles` finds.

    Raises:
        TileError: no tiles fit the chip's shared memory.
        UnknownChipError: JAX's first device is no known GPU.
        ImportError: jax-triton is not installed.
    """
    chip = limits_of(jax.devices()[0]) if chip is None else chip
    sizes = Sizes.of(q, k, v, slopes)
    tiles = choose_tiles(sizes, chip) if tiles is None else tiles
    launch = make_launch(q, k, v, masking, slopes, tiles, wide=is_wide(sizes, chip))
    assert chip.capability is not None
    (out,) = call(launch, capability=chip.capability)
    result: Array = out
    return result


def _padded(head_dim: int) -> int:
    """A power of two, 16 at least: what Triton's products take."""
    return 1 << (max(16, head_dim) - 1).bit_length()


__all__ = ["Tiles", "choose_tiles", "flash_attention_gpu", "make_launch", "shared_buffers", "unsupported_reason"]
