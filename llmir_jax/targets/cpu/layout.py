"""How a quantized matrix lies in memory for the kernels.

The matrix x [N, K] of a `QuantizedArray` is cut into tiles of 16 rows and blocks of B columns; within a block one scale
(and one minimum) serves a row. With the unsigned u = q + bias (bias: 0 for the kind `minimum`, else 2^(bits-1)),

    x[n, k] = u[n, k] · scale[n, k // B] + minimum[n, k // B]          where minima are stored
    x[n, k] = (u[n, k] - bias) · scale[n, k // B]                      else

A zero point z becomes the minimum -(bias + z) · scale, in float32. Columns of a block are padded with u = bias (0 where
minima are stored) to B' = B rounded up to a multiple of 4 (8 for 4 bits), rows to a multiple of 16 with zeros. Then,
with G = K / B blocks a row, n = 16·t + i, k = B·g + j, the bytes of block (t, g) begin at (t · G + g) · block_bytes,
and in it

    8 bits      byte 64·(j // 4) + 4·i + j % 4 is u
    4 bits      byte 64·(h // 4) + 4·i + h % 4, where h = j % (B'/2), has u in its low four bits if j < B'/2, else in
                its high ones
    scales      side[i] after the B' · 16 · bits / 8 bytes of u
    minima      side[i] after the scales

So 64 bytes hold four columns of 16 rows, the shape in which VNNI's and NEON's dot instructions take them, and one AND
or one shift and AND of them gives such a vector from nibbles.

A float matrix w [N, K] is kept as [N'/16, K, 16], zeros in the rows past N; one of bfloat16 as [N'/16, K'/2, 16, 2], K'
being K rounded up to an even number, so that 32 bits hold two columns of a row.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from xdsl.dialects.builtin import NoneAttr

from llmir_jax.dialects import llm
from llmir_jax.quantization import QuantizedArray
from llmir_jax.quantization.array import pack

ROWS = 16
"""Rows of a tile."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not less than n."""
    return -(-n // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """The layout of a matrix [num_rows, num_columns]."""

    num_rows: int
    num_columns: int
    bits: int  # 4 or 8; 16 or 32 for floats
    block: int  # B
    has_minima: bool = False
    side: str = "half"  # LLVM type of scales and minima, or of a float matrix itself: half, bfloat or float

    @property
    def is_float(self) -> bool:
        """Whether it is a matrix of floats."""
        return self.bits >= 16

    @property
    def columns_together(self) -> int:
        """Columns of a float matrix of which a row's elements lie side by side."""
        return 2 if self.side == "bfloat" else 1

    @property
    def num_tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.num_rows // ROWS)

    @property
    def num_blocks(self) -> int:
        """G, blocks a row."""
        return self.num_columns // self.block

    @property
    def padded_block(self) -> int:
        """B'."""
        return round_up(self.block, self.columns_together if self.is_float else 8 if self.bits == 4 else 4)

    @property
    def bias(self) -> int:
        """What is added to q."""
        return 0 if self.has_minima else 1 << (self.bits - 1)

    @property
    def value_bytes(self) -> int:
        """Bytes of u in a block."""
        return self.padded_block * ROWS * self.bits // 8

    @property
    def side_bytes(self) -> int:
        """Bytes of the scales of a block."""
        return 0 if self.is_float else ROWS * (2 if self.side == "half" else 4)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of a tile."""
        return self.value_bytes + self.side_bytes * (2 if self.has_minima else 1)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return self.num_blocks * self.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.num_tiles * self.tile_bytes


def packed_format(kind: llm.QuantizedTensorType, activation_group: int | None) -> PackedFormat:
    """The layout of a weight that is multiplied with activations in groups of `activation_group`, None for floats.

    One of the two group sizes must divide the other.
    """
    num_rows, num_columns = kind.get_shape()
    group = kind.elements_per_group
    block = group if activation_group is None else min(group, activation_group)
    assert group % block == 0 and (activation_group or block) % block == 0
    has_zero_points = not kind.is_symmetric and not _has_minima(kind)
    return PackedFormat(
        num_rows=num_rows,
        num_columns=num_columns,
        bits=kind.integer_type.width.data,
        block=block,
        has_minima=has_zero_points or _has_minima(kind),
        side="half" if str(kind.scale_type) == "f16" and not has_zero_points else "float",
    )


def _has_minima(kind: llm.QuantizedTensorType) -> bool:
    return not isinstance(kind.min_type, NoneAttr)


def pack_weight(array: QuantizedArray, layout: PackedFormat) -> Bytes:
    """The bytes of a quantized matrix: uint8[layout.nbytes]."""
    n, k = array.shape
    parts = [np.asarray(part) for part in array.composite_parts()]
    u = _unsigned(array, parts[0])
    repeats = k // layout.block // parts[1].shape[1]
    scales = np.repeat(parts[1].astype(np.float32), repeats, axis=1)
    minima = None
    if array.zero_points is not None:
        minima = -(float(1 << (array.bits - 1)) + np.repeat(parts[2].astype(np.float32), repeats, axis=1)) * scales
    elif array.minima is not None:
        minima = np.repeat(parts[2].astype(np.float32), repeats, axis=1)
    tiles, blocks, padded = layout.num_tiles, layout.num_blocks, layout.padded_block
    out = np.zeros((tiles, blocks, layout.block_bytes), np.uint8)
    rows = np.full((tiles * ROWS, blocks, padded), layout.bias, np.uint8)
    rows[:n, :, : layout.block] = u.reshape(n, blocks, layout.block)
    # [tile, i, block, quad, 4] → [tile, block, quad, i, 4]
    quads: Bytes = rows.reshape(tiles, ROWS, blocks, padded // 4, 4).transpose(0, 2, 3, 1, 4)
    if layout.bits == 4:
        half = padded // 8
        quads = quads[:, :, :half] | (quads[:, :, half:] << np.uint8(4))
    out[:, :, : layout.value_bytes] = quads.reshape(tiles, blocks, -1)
    at = layout.value_bytes
    for side in [scales] if minima is None else [scales, minima]:
        padded_side = np.zeros((tiles * ROWS, blocks), np.float16 if layout.side == "half" else np.float32)
        padded_side[:n] = side
        content = np.ascontiguousarray(padded_side.reshape(tiles, ROWS, blocks).transpose(0, 2, 1))
        out[:, :, at : at + layout.side_bytes] = content.view(np.uint8).reshape(tiles, blocks, -1)
        at += layout.side_bytes
    return out.reshape(-1)


def _unsigned(array: QuantizedArray, values: np.ndarray[Any, Any]) -> Bytes:
    """u uint8[N, K]."""
    if array.bits == 4:
        nibbles = np.stack([values & 15, values >> 4], -1).reshape(array.shape).astype(np.uint8)
        return nibbles if array.minima is not None else nibbles ^ np.uint8(8)
    raw = values.view(np.uint8)
    return raw if array.minima is not None else raw ^ np.uint8(128)


def unpack_weight(content: jax.Array, layout: PackedFormat, like: QuantizedArray) -> QuantizedArray:
    """The inverse of `pack_weight`: the array `like` a description of it, from uint8[layout.nbytes]. Traceable."""
    tiles, blocks, padded = layout.num_tiles, layout.num_blocks, layout.padded_block
    bytes_ = content.reshape(tiles, blocks, layout.block_bytes)
    packed = bytes_[:, :, : layout.value_bytes].reshape(tiles, blocks, -1, ROWS, 4)
    quads = jnp.concatenate([packed & 15, packed >> 4], 2) if layout.bits == 4 else packed
    rows = quads.transpose(0, 3, 1, 2, 4).reshape(tiles * ROWS, blocks, padded)
    n = layout.num_rows
    u = rows[:n, :, : layout.block].reshape(n, layout.num_columns)
    dtype = jnp.float16 if layout.side == "half" else jnp.float32

    def side(index: int) -> jax.Array:
        start = layout.value_bytes + index * layout.side_bytes
        raw = bytes_[:, :, start : start + layout.side_bytes]
        floats = jax.lax.bitcast_convert_type(raw.reshape(tiles, blocks, ROWS, -1), dtype)
        return floats.transpose(0, 2, 1).reshape(tiles * ROWS, blocks)[:n]

    per_group = like.group_size // layout.block
    scales = side(0)[:, ::per_group]
    minima = zero_points = None
    if like.minima is not None:
        minima = side(1)[:, ::per_group].astype(like.minima.dtype)
    elif like.zero_points is not None:
        bias = 1 << (like.bits - 1)
        quotient = side(1)[:, ::per_group] / jnp.where(scales == 0, 1, scales)
        zero_points = (-jnp.round(quotient) - bias).astype(jnp.int8)
        zero_points = jnp.where(scales == 0, jnp.int8(0), zero_points)
    if like.bits == 4:
        values = pack(u if like.minima is not None else u ^ 8)
    else:
        values = u if like.minima is not None else jax.lax.bitcast_convert_type(u ^ 128, jnp.int8)
    return QuantizedArray(
        values=values,
        scales=scales.astype(like.scales.dtype),
        zero_points=zero_points,
        minima=minima,
        bits=like.bits,
        group_size=like.group_size,
        shape=like.shape,
        dtype=like.dtype,
    )


def float_format(num_rows: int, num_columns: int, dtype: np.dtype[Any]) -> PackedFormat:
    """The layout of a matrix [num_rows, num_columns] (outputs, inputs) of float32, bfloat16 or float16."""
    return PackedFormat(
        num_rows=num_rows,
        num_columns=num_columns,
        bits=8 * dtype.itemsize,
        block=num_columns,
        side={"float32": "float", "bfloat16": "bfloat", "float16": "half"}[dtype.name],
    )


def pack_floats(matrix: np.ndarray[Any, Any], layout: PackedFormat) -> Bytes:
    """The bytes of a float matrix [N, K]."""
    n, k = matrix.shape
    together = layout.columns_together
    padded = np.zeros((layout.num_tiles * ROWS, layout.padded_block), matrix.dtype)
    padded[:n, :k] = matrix
    tiles = np.ascontiguousarray(padded.reshape(layout.num_tiles, ROWS, -1, together).transpose(0, 2, 1, 3))
    return tiles.view(np.uint8).reshape(-1)


def unpack_floats(content: jax.Array, layout: PackedFormat) -> jax.Array:
    """The inverse of `pack_floats`: [N, K]. Traceable."""
    together, size = layout.columns_together, layout.bits // 8
    dtype = {"float": jnp.float32, "bfloat": jnp.bfloat16, "half": jnp.float16}[layout.side]
    pieces = content.reshape(layout.num_tiles, -1, ROWS, together, size)
    floats = jax.lax.bitcast_convert_type(pieces, dtype).transpose(0, 2, 1, 3)
    return floats.reshape(layout.num_tiles * ROWS, -1)[: layout.num_rows, : layout.num_columns]


__all__ = [
    "ROWS",
    "PackedFormat",
    "float_format",
    "pack_floats",
    "pack_weight",
    "packed_format",
    "round_up",
    "unpack_floats",
    "unpack_weight",
]
