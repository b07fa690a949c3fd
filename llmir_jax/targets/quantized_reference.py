"""Quantized tensors in plain JAX: finding scales, encoding, decoding, and the matmul with a quantized weight.

All arithmetic is in float32. Groups run along the last dimension; see `llm.QuantizedTensorType` for what is stored.

A weight in rows of bytes is multiplied a block of its rows at a time, for XLA would make a float copy of all of it. One
in columns is multiplied in one piece, as XLA:TPU wants it: there a loop over blocks copies the whole weight each time,
and in one piece the integers are converted within the product.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike
from xdsl.dialects.builtin import IntegerType, NoneAttr, TensorType
from xdsl.ir import Attribute

from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.quantization.statistics import NUM_BINS, histogram_bins

Decode = Callable[..., Array]
BLOCK_ELEMENTS = 1 << 18
"""About how many elements of a weight are floats at once: 1 MiB of them, which a core's cache holds."""


def _grouped(x: Array, group_size: int) -> Array:
    """[..., K] as [..., groups, group_size]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)


def is_in_columns(kind: Attribute) -> bool:
    """Whether the tensors that hold a value of a type are transposed."""
    return isinstance(kind, llm.QuantizedTensorType) and kind.in_columns


def _range(part: TensorType) -> tuple[int, int]:
    assert isinstance(part.element_type, IntegerType)
    return llm.storage_range(part.element_type)


def pack(integers: Array, num_bits: int) -> Array:
    """Integers [..., K] of fewer than 8 bits as bytes [..., K · bits / 8], the first in the lowest bits."""
    count = 8 // num_bits
    fields = integers.astype(jnp.int32).reshape(*integers.shape[:-1], -1, count) & (2**num_bits - 1)
    shifts = num_bits * jnp.arange(count, dtype=jnp.int32)
    return jnp.sum(fields << shifts, axis=-1).astype(jnp.uint8)


def unpack(packed: Array, num_bits: int, *, signed: bool) -> Array:
    """The inverse of `pack`, as int32."""
    shifts = num_bits * jnp.arange(8 // num_bits, dtype=jnp.int32)
    fields = (packed.astype(jnp.int32)[..., None] >> shifts) & (2**num_bits - 1)
    flat: Array = fields.reshape(*packed.shape[:-1], -1)
    sign = 2 ** (num_bits - 1)
    return (flat ^ sign) - sign if signed else flat


def _stored(kind: llm.QuantizedTensorType, integers: Array) -> Array:
    """Integers, int32, as the type stores them."""
    num_bits = kind.integer_type.width.data
    if kind.in_columns:
        return integers.T.astype(element_dtype(kind.integer_type))
    if num_bits < 8:
        return pack(integers, num_bits)
    return integers.astype(element_dtype(kind.integer_type))


def _integers(kind: llm.QuantizedTensorType | llm.MixedQuantizedTensorType, stored: Array) -> Array:
    """The integers that a type stores, int32."""
    if is_in_columns(kind):
        return stored.astype(jnp.int32)
    if isinstance(kind, llm.QuantizedTensorType) and (num_bits := kind.integer_type.width.data) < 8:
        return unpack(stored, num_bits, signed=isinstance(kind.min_type, NoneAttr))
    return stored.astype(jnp.int32)


def _positive(scale: Array) -> Array:
    """Scales to divide by: 1 where a group is all zero, whose integers are then 0."""
    return jnp.where(scale > 0, scale, 1)


def _encode(values: Array, low: int, high: int) -> Array:
    return jnp.clip(jnp.round(values), low, high).astype(jnp.int32)


def encode_parts(kind: llm.QuantizedTensorType, x: Array) -> tuple[Array, ...]:
    """The parts of x quantized to a type, each group by its own values."""
    integers, *side = _encode_groups(kind, x)
    return _stored(kind, integers), *(part.T if kind.in_columns else part for part in side)


def _encode_groups(kind: llm.QuantizedTensorType, x: Array) -> tuple[Array, ...]:
    """Integers [..., K], int32, and what goes with each group of them [..., groups]."""
    side_dtypes = [element_dtype(part.element_type) for part in kind.parts()[1:]]
    low, high = llm.storage_range(kind.integer_type)
    groups = _grouped(x.astype(jnp.float32), kind.elements_per_group)
    if kind.is_symmetric:
        scale = _rounded(jnp.max(jnp.abs(groups), axis=-1) / high, side_dtypes[0])
        integers = _encode(groups / _positive(scale)[..., None], -high, high)
        return integers.reshape(x.shape), scale.astype(side_dtypes[0])
    least, greatest = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
    if not isinstance(kind.min_type, NoneAttr):
        least = _rounded(least, side_dtypes[1])
        scale = _rounded((greatest - least) / (high - low), side_dtypes[0])
        integers = _encode((groups - least[..., None]) / _positive(scale)[..., None], low, high)
        return integers.reshape(x.shape), scale.astype(side_dtypes[0]), least.astype(side_dtypes[1])
    least, greatest = jnp.minimum(least, 0), jnp.maximum(greatest, 0)
    scale = _rounded((greatest - least) / (high - low), side_dtypes[0])
    zero_point = jnp.clip(jnp.round(low - least / _positive(scale)), low, high)
    integers = _encode(groups / _positive(scale)[..., None] + zero_point[..., None], low, high)
    zero_points = zero_point.astype(jnp.int32).astype(side_dtypes[1])
    return integers.reshape(x.shape), scale.astype(side_dtypes[0]), zero_points


def _rounded(x: Array, dtype: DTypeLike) -> Array:
    """As it will be stored, so that integers are found for the scale that decoding uses."""
    return x.astype(dtype).astype(jnp.float32)


def encode_mixed(kind: llm.MixedQuantizedTensorType, wide_rows: Sequence[int], x: Array) -> tuple[Array, ...]:
    """The parts of a matrix quantized symmetrically a row, ``wide_rows`` to the wide type, the others to the narrow."""
    stored, scales = kind.parts()
    narrow = TensorType(kind.element_type.narrow, stored.get_shape())
    is_wide = np.zeros((x.shape[0], 1), bool)
    is_wide[list(wide_rows)] = True
    high = jnp.where(is_wide, _range(stored)[1], _range(narrow)[1]).astype(jnp.float32)
    wide = x.astype(jnp.float32)
    scale_dtype = element_dtype(scales.element_type)
    scale = _rounded(jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / high, scale_dtype)
    integers = jnp.clip(jnp.round(wide / _positive(scale)), -high, high)
    return integers.astype(jnp.int32).astype(element_dtype(stored.element_type)), scale.astype(scale_dtype)


def dequantize_parts(kind: llm.QuantizedTensorType | llm.MixedQuantizedTensorType) -> Decode:
    """The function from the parts of a value of a type to the floats they stand for, float32."""
    in_columns = is_in_columns(kind)

    def decode(integers: Array, scales: Array, offsets: Array | None = None) -> Array:
        wide = _integers(kind, integers)
        if in_columns:
            groups = wide.reshape(scales.shape[0], -1, wide.shape[1])  # [groups, group_size, N]
        else:
            groups = _grouped(wide, wide.shape[-1] // scales.shape[-1])
        within = -2 if in_columns else -1
        scale = jnp.expand_dims(scales.astype(jnp.float32), within)
        if offsets is None:
            values = groups * scale
        elif isinstance(kind, llm.QuantizedTensorType) and not isinstance(kind.min_type, NoneAttr):
            values = groups * scale + jnp.expand_dims(offsets.astype(jnp.float32), within)
        else:
            values = (groups - jnp.expand_dims(offsets.astype(jnp.int32), within)) * scale
        floats: Array = values.reshape(wide.shape)
        return floats.T if in_columns else floats

    return decode


def _decode_columns(w: Array, scales: Array, zero_points: Array | None, group_size: int | None) -> Array:
    """Floats of integers [K, N] whose scales are [K / group_size, N], or [N]."""
    repeats = 1 if group_size is None else group_size
    wide = w.astype(jnp.int32)
    if zero_points is not None:
        wide = wide - jnp.repeat(zero_points.astype(jnp.int32), repeats, axis=0)
    return wide * jnp.repeat(scales.astype(jnp.float32), repeats, axis=0)


def quantized_matmul(
    x: Array,
    w: Array,
    *rest: Array,
    decode: Decode | None,
    group_size: int | None,
    transpose_w: bool,
    dtype: DTypeLike,
    in_columns: bool = False,
) -> Array:
    """x·w or x·wᵀ in float32, for a weight of a quantized type (by its parts and ``decode``) or of plain integers.

    Args:
        x: [..., K].
        w: integers [K, N] ([N, K] where ``transpose_w``).
        rest: scales, then zero points (or minima) where there are any.
        decode: turns the parts of the weight into floats [N, K]; None for a plain weight.
        group_size: how many elements along K share a scale, for a plain weight; None for one scale a column.
        transpose_w: whether w is stored [N, K].
        dtype: of the result [..., N].
        in_columns: whether the parts of the weight are transposed.
    """
    if decode is not None and in_columns:
        return jnp.matmul(x.astype(jnp.float32), decode(w, *rest).T).astype(dtype)
    if decode is not None:
        return _by_rows(x.astype(jnp.float32), (w, *rest), decode).astype(dtype)
    if transpose_w:
        columns = [part.T for part in rest]
        weight = _decode_columns(w.T, columns[0], columns[1] if len(columns) > 1 else None, group_size)
    else:
        weight = _decode_columns(w, rest[0], rest[1] if len(rest) > 1 else None, group_size)
    return jnp.matmul(x.astype(jnp.float32), weight).astype(dtype)


def round_activations(x: Array, group_size: int | None, scales: Array | None = None) -> Array:
    """x [..., K] rounded to 8 bits and back, float32: each row, or each group of it along K, by its largest value.

    Or by `scales` [K / group_size], the same for every row. Products of these floats differ from sums of products of
    the integers, times scales, by no more than float32 rounds: |q| ≤ 127, so that the integers themselves are exact.
    """
    groups = _grouped(x.astype(jnp.float32), group_size or x.shape[-1])
    if scales is None:
        scale = jnp.max(jnp.abs(groups), axis=-1, keepdims=True) / 127
    else:
        scale = scales.astype(jnp.float32)[:, None]
    return (jnp.clip(jnp.round(groups / _positive(scale)), -127, 127) * scale).reshape(x.shape)


def observe_absmax(x: Array) -> Array:
    """The greatest |x| of each channel of [..., K]: [K]."""
    return jnp.max(jnp.abs(x.astype(jnp.float32)).reshape(-1, x.shape[-1]), axis=0)


def observe_gram(x: Array) -> Array:
    """The sum over the rows of [..., K] of x·xᵀ: [K, K]."""
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.matmul(rows.T, rows, precision=lax.Precision.HIGHEST)


def observe_histogram(x: Array) -> Array:
    """How many |x| of each channel of [..., K] are in each bin: int32 [K, NUM_BINS]."""
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    counts = jnp.zeros((x.shape[-1], NUM_BINS), jnp.int32)
    return counts.at[jnp.arange(x.shape[-1]), histogram_bins(rows)].add(1)


def _by_rows(x: Array, parts: Sequence[Array], decode: Decode) -> Array:
    """x [..., K] times the transposed weight [N, K] of these parts, a block of its rows at a time: [..., N].

    So no whole weight is ever there as floats. A single row is multiplied in one piece: XLA fuses the dequantization of
    a matrix into its product with a vector.
    """
    num_out, num_in = parts[0].shape[0], x.shape[-1]
    rows = x.reshape(-1, num_in)
    block = min(-(-num_out // 2), max(1, BLOCK_ELEMENTS // num_in))
    if len(rows) == 1 or num_out == 1:
        return jnp.matmul(x, decode(*parts).T)

    def body(i: Array, out: Array) -> Array:
        start = jnp.minimum(i * block, num_out - block)  # the last block may repeat rows of the one before
        weight = decode(*(lax.dynamic_slice_in_dim(part, start, block) for part in parts))
        product = lax.dot_general(weight, rows, (((1,), (1,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(out, product, start, 0)

    out: Array = lax.fori_loop(0, -(-num_out // block), body, jnp.zeros((num_out, len(rows)), jnp.float32))
    return out.T.reshape(*x.shape[:-1], num_out)


def quantized_gather(w: Array, *rest: Array, decode: Decode, dtype: DTypeLike, in_columns: bool = False) -> Array:
    """Rows of a matrix of a quantized type.

    Args:
        w: integers [N, K], or [K, N] where ``in_columns``.
        rest: scales, zero points or minima where there are any, and last the ids, integers [...].
        decode: turns the parts of some rows into floats.
        dtype: of the result [..., K].
    """
    *side, ids = rest
    rows = jnp.clip(ids, 0, w.shape[1 if in_columns else 0] - 1)
    if in_columns:
        floats = decode(*(part[:, rows.reshape(-1)] for part in (w, *side)))
        return floats.reshape(*rows.shape, -1).astype(dtype)
    return decode(*(part[rows] for part in (w, *side))).astype(dtype)
