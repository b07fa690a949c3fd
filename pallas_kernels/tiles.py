"""How much fast memory a kernel needs, known before it is compiled, and the choice of tiles by it.

A kernel lists its `Buffer`s for a choice of tiles. On a TPU each takes a whole number of native tiles of VMEM,

    bytes = copies · (leading dims) · ceil(rows / tile rows) · tile rows · ceil(columns / 128) · 128 · bits / 8

where the native tile is [8, 128] of 32 bits, [16, 128] of 16, [32, 128] of 8 and [64, 128] of 4 bits, and arrays of
fewer rows take the next power of two ("Array layouts and tiling",
https://docs.jax.dev/en/latest/pallas/tpu/details.html). `copies` is 2 for what a pipeline fetches while the kernel
works on what it fetched before. On a GPU the shared memory of a block is the plain sum; `copies` is the number of
pipeline stages.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.chips import Chip

LANES = 128
SUBLANES = 8
"""Of a register of 32-bit numbers, in every TPU."""
USABLE_VMEM = 0.9
"""The share of VMEM that kernels plan with: the compiler keeps some for semaphores, spills and its own use."""

Tile = TypeVar("Tile")


class TileError(ValueError):
    """Tiles that do not fit the chip, found before anything is compiled."""


def num_bits(dtype: DTypeLike) -> int:
    """Bits of an element; 4 for JAX's int4 and uint4, which devices pack."""
    name = jnp.dtype(dtype).name
    return 4 if name in ("int4", "uint4") else jnp.dtype(dtype).itemsize * 8


def native_tile(dtype: DTypeLike, num_rows: int | None = None) -> tuple[int, int]:
    """Rows and lanes that a TPU moves at once; of an array of `num_rows`, which may take smaller ones."""
    packing = max(1, 32 // num_bits(dtype))
    rows = SUBLANES * packing
    if num_rows is not None and num_rows < rows:
        rows = max(packing, 1 << (max(num_rows, 1) - 1).bit_length())
    return rows, LANES


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """An array in fast memory, or a large value that the compiler must keep there."""

    name: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    copies: int = 1

    def vmem_bytes(self) -> int:
        """Bytes of VMEM, with padding to native tiles."""
        *leading, rows, columns = (1, 1, *self.shape)[-max(2, len(self.shape)) :]
        tile_rows, lanes = native_tile(self.dtype, rows)
        elements = math.prod(leading) * round_up(rows, tile_rows) * round_up(columns, lanes)
        return self.copies * elements * num_bits(self.dtype) // 8

    def shared_bytes(self) -> int:
        """Bytes of a GPU's shared memory."""
        return self.copies * math.prod(self.shape) * num_bits(self.dtype) // 8

    def bytes_on(self, platform: Literal["tpu", "gpu"]) -> int:
        """Bytes of the fast memory of a platform's chips."""
        return self.vmem_bytes() if platform == "tpu" else self.shared_bytes()

    def __str__(self) -> str:
        copies = "" if self.copies == 1 else f"{self.copies} × "
        return f"{self.name} {copies}{jnp.dtype(self.dtype).name}{list(self.shape)}"


def usable_bytes(chip: Chip) -> int:
    """Fast memory that a kernel may plan with."""
    return int(chip.fast_memory_bytes * USABLE_VMEM) if chip.platform == "tpu" else chip.fast_memory_bytes


def total_bytes(buffers: Iterable[Buffer], chip: Chip) -> int:
    """Fast memory that the buffers take together."""
    return sum(buffer.bytes_on(chip.platform) for buffer in buffers)


def check_fits(subject: str, buffers: Sequence[Buffer], chip: Chip, remedy: str) -> int:
    """The bytes that the buffers take. Raises TileError, with what each of them takes, where they do not fit."""
    needed, usable = total_bytes(buffers, chip), usable_bytes(chip)
    if needed <= usable:
        return needed
    memory = "VMEM" if chip.platform == "tpu" else "shared memory"
    parts = ", ".join(f"{buffer}: {buffer.bytes_on(chip.platform):,}" for buffer in buffers)
    raise TileError(f"{subject}: needs {needed:,} bytes of {memory}, {chip.name} has {usable:,} ({parts}); {remedy}")


def choose(
    subject: str,
    candidates: Iterable[Tile],
    buffers: Callable[[Tile], Sequence[Buffer]],
    cost: Callable[[Tile], float],
    chip: Chip,
    remedy: str,
) -> Tile:
    """The cheapest of the candidates that fit; of equals, the first.

    Raises TileError, with the numbers of the smallest one, where none fits.
    """
    tried = list(candidates)
    fitting = [tile for tile in tried if total_bytes(buffers(tile), chip) <= usable_bytes(chip)]
    if fitting:
        return min(fitting, key=cost)
    if not tried:
        raise TileError(f"{subject}: there are no tiles for it; {remedy}")
    smallest = min(tried, key=lambda tile: total_bytes(buffers(tile), chip))
    check_fits(f"{subject}, tiles {smallest}", buffers(smallest), chip, remedy)
    raise AssertionError("the smallest candidate does not fit")


__all__ = [
    "Buffer",
    "TileError",
    "check_fits",
    "choose",
    "native_tile",
    "num_bits",
    "round_up",
    "total_bytes",
    "usable_bytes",
]
