"""Plain rounding of a matrix of floats, in numpy: on the host, a few rows at a time, before anything is compiled."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from llmir_jax.errors import LlmirError
from llmir_jax.quantization.array import QuantizedArray, pack
from llmir_jax.quantization.scheme import Scheme

_CHUNK_ELEMENTS = 1 << 18  # of a matrix that are in work at once: temporaries stay small, and in the cache
_LARGEST = 2.0**126  # the difference of two numbers of this size is still a float32
_ROUNDING = 2.0**-20  # relative: within it a scale is taken for the nearest number of its dtype, not for the next one


MatrixKey = tuple[str, int]
"""A matrix in a parameter: the parameter's path, and where in its memory the matrix begins, in elements."""
Rounding = Callable[[ArrayLike, Scheme, MatrixKey, DTypeLike | None], QuantizedArray]
"""Quantizes the matrix [N, K] of floats that the key names to a scheme, standing for floats of the dtype."""


def plain_rounding(array: ArrayLike, scheme: Scheme, key: MatrixKey, dtype: DTypeLike | None) -> QuantizedArray:
    """`quantize`, as a `Rounding`."""
    return quantize(array, scheme, name=key[0], dtype=dtype)


def quantize(
    array: ArrayLike,
    scheme: Scheme,
    *,
    name: str = "array",
    dtype: DTypeLike | None = None,
    ranges: tuple[np.ndarray, np.ndarray] | None = None,
) -> QuantizedArray:
    """Plain rounding of a matrix [N, K] to a scheme, a few rows at a time: it needs no second matrix of floats.

    Scales are rounded up and minima down to their dtype, so that every value is within half a scale of its integer's.

    Args:
        array: floats of any dtype.
        scheme: fitted to the shape here (see `Scheme.fitted`).
        name: of the parameter, for errors.
        dtype: that the result stands for; by default the array's.
        ranges: (least, greatest), float [N, G] each, to use for the values of each group in place of what they are;
            values beyond are clipped.

    Raises:
        LlmirError: NaN or infinite values, groups that do not divide K, an odd K in 4 bits, scales that the scheme's
            dtype cannot hold.
    """
    x = np.asarray(array)
    scheme = scheme.fitted(x.shape, name=name)
    n, k = x.shape
    group_size = scheme.group_size or k
    least, greatest = group_ranges(x, group_size, name)
    if ranges is not None:
        least, greatest = (np.asarray(r) for r in ranges)
    if least.shape != (n, k // group_size) or greatest.shape != least.shape:
        raise LlmirError(f"{name}: ranges must be {[n, k // group_size]}, got {list(least.shape)}")
    if scheme.per_tensor:
        least, greatest = least.min(keepdims=True), greatest.max(keepdims=True)
    scales, offsets = group_scales(least.astype(np.float64), greatest.astype(np.float64), scheme, name)

    signed = scheme.kind != "minimum"
    values = np.empty((n, k * scheme.bits // 8), np.int8 if scheme.bits == 8 and signed else np.uint8)
    for rows in _chunks(n, k):
        own = slice(None) if scheme.per_tensor else rows
        q = _encode(x[rows], scales[own], None if offsets is None else offsets[own], scheme)
        values[rows] = pack(q) if scheme.bits == 4 else q.astype(values.dtype)
    stored = None if offsets is None else jnp.asarray(offsets)
    return QuantizedArray(
        values=jnp.asarray(values),
        scales=jnp.asarray(scales),
        zero_points=stored if scheme.kind == "zero_point" else None,
        minima=stored if scheme.kind == "minimum" else None,
        bits=scheme.bits,
        group_size=group_size,
        shape=(n, k),
        dtype=jnp.dtype(x.dtype if dtype is None else dtype),
    )


def _chunks(n: int, k: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // k)
    return (slice(start, start + step) for start in range(0, n, step))


def group_ranges(x: np.ndarray, group_size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and greatest value of each group, float32 [N, G]. Raises LlmirError for what are no finite floats."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LlmirError(f"{name}: expected floating-point values to quantize, got {x.dtype}")
    n, k = x.shape
    least, greatest = (np.empty((n, k // group_size), np.float32) for _ in range(2))
    for rows in _chunks(n, k):
        groups = _grouped(x[rows], k // group_size)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below
            least[rows], greatest[rows] = groups.min(-1), groups.max(-1)  # NaN if one of them is
    fine = (least >= -_LARGEST) & (greatest <= _LARGEST)  # false for NaN
    if not fine.all():
        row = int(np.argmin(fine.all(1)))
        values = x[row].astype(np.float64)
        column = int(np.argmin(np.abs(values) <= _LARGEST))
        raise LlmirError(
            f"{name}: {values[column]:.6g} in row {row}, column {column} (outputs first) cannot be quantized; "
            "expected finite weights: the checkpoint is damaged or its training diverged"
        )
    return least, greatest


def group_scales(
    least: np.ndarray, greatest: np.ndarray, scheme: Scheme, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales, and zero points or minima, of groups whose values are in [least, greatest], float64 of any shape.

    Raises LlmirError, which names `name`, for what the scheme's dtype cannot hold.
    """
    low, high = scheme.integer_range
    if scheme.kind == "symmetric":
        return _round_up(np.maximum(np.abs(least), np.abs(greatest)) / high, scheme, name), None
    if scheme.kind == "minimum":
        minima = _round_down(least, scheme, name)
        return _round_up((greatest - minima.astype(np.float64)) / (high - low), scheme, name), minima
    # Zero is in the range, so that its integer, the zero point, is too.
    least, greatest = np.minimum(least, 0), np.maximum(greatest, 0)
    scales = _round_up((greatest - least) / (high - low), scheme, name)
    zero_points = np.clip(np.rint(low - least / _divisor(scales)), low, high)
    return scales, zero_points.astype(np.int8)


def _encode(x: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None, scheme: Scheme) -> np.ndarray:
    """The integers of some rows, int32 [n, K]."""
    low, high = scheme.integer_range
    groups: np.ndarray = _grouped(x, scales.shape[1]).astype(np.float32)
    divisor = _divisor(scales).astype(np.float32)[..., None]
    if scheme.kind == "minimum":
        assert offsets is not None
        groups = groups - offsets.astype(np.float32)[..., None]
    with np.errstate(over="ignore"):  # of values beyond the range, which are clipped
        q = np.rint(groups / divisor)
    if scheme.kind == "zero_point":
        assert offsets is not None
        q += offsets.astype(np.float32)[..., None]
    integers: np.ndarray = np.clip(q, low, high).astype(np.int32)
    return integers.reshape(x.shape)


def _grouped(x: np.ndarray, num_groups: int) -> np.ndarray:
    return x.reshape(x.shape[0], num_groups, -1)


def _divisor(scales: np.ndarray) -> np.ndarray:
    """Scales to divide by: 1 where a group is all alike, whose integers are then 0."""
    wide = scales.astype(np.float64)
    return np.where(wide > 0, wide, 1)


def _round_up(scales: np.ndarray, scheme: Scheme, name: str) -> np.ndarray:
    """Scales [N, G] in their dtype, not less than they are but for an error that floats have anyway."""
    rounded = _cast(scales, scheme)
    short = rounded.astype(np.float64) < scales * (1 - _ROUNDING)
    bits = _bits(rounded)
    bits[short] += 1  # the next greater of a positive float
    _check_finite(rounded, "scale", scheme, name)
    return rounded


def _round_down(minima: np.ndarray, scheme: Scheme, name: str) -> np.ndarray:
    """Minima [N, G] in their dtype, not more than they are."""
    rounded = _cast(minima, scheme)
    above = rounded.astype(np.float64) > minima
    bits = _bits(rounded)
    zero, negative = rounded.astype(np.float64) == 0, np.signbit(rounded.astype(np.float64))
    bits[above & negative & ~zero] += 1
    bits[above & ~negative & ~zero] -= 1
    bits[above & zero] = 1 + (1 << (8 * bits.itemsize - 1))  # the least negative one
    _check_finite(rounded, "minimum", scheme, name)
    return rounded


def _cast(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(scheme.dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, whose order is that of positive floats."""
    return x.view(np.uint32 if x.itemsize == 4 else np.uint16)


def _check_finite(rounded: np.ndarray, what: str, scheme: Scheme, name: str) -> None:
    if np.isfinite(rounded.astype(np.float32)).all():
        return
    raise LlmirError(
        f"{name}: a group's {what} is beyond what {scheme.scale_dtype} can hold; "
        f"keep scales in float32: {scheme.name.replace('-bf16', '-f32').replace('-f16', '-f32')!r}"
    )
