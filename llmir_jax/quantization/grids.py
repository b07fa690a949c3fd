"""The numbers that a group of weights can be stored as, and the search for those with the least squared error.

In here a matrix is transposed, [K, n], so that the elements k of one group are x[k, i], one group a column i, and a
step along k is a sum of whole rows. A grid, in the terms of `QuantizedArray`:

    x[k, i] ≈ u[k, i] · scale[i] + minimum[i]       u integers in [low[i], high[i]]

u is q for `symmetric` and `minimum`, and q - zero_point for `zero_point`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmir_jax.quantization.rounding import group_scales
from llmir_jax.quantization.scheme import Scheme

_SHRINKS = {4: np.linspace(1.0, 0.5, 26), 8: np.linspace(1.0, 0.8, 11)}
"""Of the range of a group, in the order in which they are tried."""
_NUM_REFITS = 2
_CHUNK_ELEMENTS = 1 << 17  # that are in work at once: temporaries stay in the cache


@dataclass(frozen=True, kw_only=True)
class Grids:
    """Of n groups; arrays [n], or [1] for groups that share one."""

    scales: np.ndarray
    """In the scheme's dtype."""
    offsets: np.ndarray | None
    """Zero points int8, or minima in the scheme's dtype."""
    scheme: Scheme

    def encoder(self) -> "Encoder":
        """To round to it."""
        low, high = (np.asarray([bound], np.float32) for bound in self.scheme.storage_range)
        minima = None
        if self.offsets is not None and self.scheme.kind == "minimum":
            minima = self.offsets.astype(np.float32)
        elif self.offsets is not None:
            low, high = low - self.offsets, high - self.offsets
        steps = self.scales.astype(np.float32)
        return Encoder(steps=steps, divisors=np.where(steps == 0, 1, steps), minima=minima, low=low, high=high)

    def integers(self, u: np.ndarray) -> np.ndarray:
        """q of u [..., n], as it is stored."""
        if self.scheme.kind == "zero_point":
            assert self.offsets is not None
            u = u + self.offsets
        return u.astype(np.uint8 if self.scheme.kind == "minimum" else np.int8)

    def take(self, better: np.ndarray, other: "Grids") -> "Grids":
        """This, with the other's where `better` [n] is true."""
        offsets = None
        if self.offsets is not None:
            assert other.offsets is not None
            offsets = np.where(better, other.offsets, self.offsets)
        return Grids(scales=np.where(better, other.scales, self.scales), offsets=offsets, scheme=self.scheme)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Rounds to grids; arrays float32 [n] or [1]."""

    steps: np.ndarray
    divisors: np.ndarray
    """The steps, but 1 where they are 0."""
    minima: np.ndarray | None
    low: np.ndarray
    high: np.ndarray

    def __getitem__(self, columns: slice) -> "Encoder":
        def part(x: np.ndarray) -> np.ndarray:
            return x if len(x) == 1 else x[columns]

        return Encoder(
            steps=part(self.steps),
            divisors=part(self.divisors),
            minima=None if self.minima is None else part(self.minima),
            low=part(self.low),
            high=part(self.high),
        )

    def round(self, x: np.ndarray) -> np.ndarray:
        """u [..., n] of x [..., n], whole numbers in float32."""
        u: np.ndarray = (x if self.minima is None else x - self.minima) / self.divisors
        np.rint(u, out=u)
        np.maximum(u, self.low, out=u)
        np.minimum(u, self.high, out=u)
        return u

    def decode(self, u: np.ndarray) -> np.ndarray:
        """x, in place of u."""
        u *= self.steps
        if self.minima is not None:
            u += self.minima
        return u


def plain_grids(x: np.ndarray, scheme: Scheme, name: str, *, pooled: bool = False) -> Grids:
    """Of plain rounding, for the columns of x [K, n]; `pooled`: one for all of them."""
    least, greatest = _range(x, pooled)
    scales, offsets = group_scales(least, greatest, scheme, name)
    return Grids(scales=scales, offsets=offsets, scheme=scheme)


def best_grids(
    x: np.ndarray, scheme: Scheme, name: str, *, importance: np.ndarray | None = None, pooled: bool = False
) -> Grids:
    """The grids with the least Σ_k importance[k] · (x[k, i] - x̂[k, i])² of those that are tried.

    They are: that of plain rounding; grids of ranges that are smaller and smaller; then, twice, the scale (and minimum)
    that fit the integers of the best one so far in the sense of least squares.

    Args:
        x: float32 [K, n], the elements of n groups.
        importance: float32 [K]; None for 1.
        pooled: one grid for all columns.

    Raises:
        LlmirError: see `group_scales`.
    """

    def error_of(grids: Grids) -> np.ndarray:
        error = np.empty(x.shape[1], np.float32)
        encoder = grids.encoder()
        with np.errstate(over="ignore", invalid="ignore"):  # of scales that overflow, which are never better
            for columns in _column_chunks(x):
                own = encoder[columns]
                u = own.decode(own.round(x[:, columns]))
                u -= x[:, columns]
                u *= u
                if importance is not None:
                    u *= importance[:, None]
                u.sum(0, out=error[columns])  # not a product: BLAS would wake all cores for each of thousands
        return error.sum(keepdims=True, dtype=np.float64) if pooled else error

    best = plain_grids(x, scheme, name, pooled=pooled)
    best_error = error_of(best)

    def consider(grids: Grids) -> None:
        nonlocal best, best_error
        error = error_of(grids)
        better = error < best_error  # false for NaN
        best, best_error = best.take(better, grids), np.where(better, error, best_error)

    for shrunk in _shrunk(x, scheme, name, pooled):
        consider(shrunk)
    for _ in range(_NUM_REFITS):
        consider(_refitted(x, importance, best, pooled))
    return best


def _column_chunks(x: np.ndarray) -> Iterator[slice]:
    step = max(16, _CHUNK_ELEMENTS // len(x))
    return (slice(start, start + step) for start in range(0, x.shape[1], step))


def _range(x: np.ndarray, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    least, greatest = x.min(0).astype(np.float64), x.max(0).astype(np.float64)
    return (least.min(keepdims=True), greatest.max(keepdims=True)) if pooled else (least, greatest)


def _shrunk(x: np.ndarray, scheme: Scheme, name: str, pooled: bool) -> Iterator[Grids]:
    """Grids of ranges that are less than what the values have: at both ends, and of asymmetric ones at either."""
    least, greatest = _range(x, pooled)
    low, high = scheme.storage_range
    factors = _SHRINKS[scheme.bits]
    if scheme.kind == "symmetric":
        # What is farthest from 0 is put on the side that has more levels.
        farthest = np.where(greatest > -least, greatest, least)
        widest = farthest / low if -low > high else np.abs(farthest) / high
        for factor in factors:
            yield Grids(scales=_cast(widest * factor, scheme), offsets=None, scheme=scheme)
        return
    fixed = np.zeros_like(least) if scheme.kind == "zero_point" else (least + greatest) / 2
    for factor in factors[::2]:
        for below, above in ((factor, factor), (factor, 1), (1, factor)):
            ends = fixed + (least - fixed) * below, fixed + (greatest - fixed) * above
            scales, offsets = group_scales(*ends, scheme, name)
            yield Grids(scales=scales, offsets=offsets, scheme=scheme)


def _refitted(x: np.ndarray, importance: np.ndarray | None, grids: Grids, pooled: bool) -> Grids:
    """The same integers with the scales, and minima, that fit best."""
    encoder = grids.encoder()
    weights = np.ones((len(x), 1), np.float32) if importance is None else importance[:, None]
    sums = np.zeros((5, x.shape[1]), np.float64)  # Σ w · (1, u, u², x, u·x)
    sums[0] = weights.sum(dtype=np.float64)
    for columns in _column_chunks(x):
        part = x[:, columns]
        u = encoder[columns].round(part)
        weighted_u, weighted_x = weights * u, weights * part
        for row, terms in enumerate((weighted_u, weighted_u * u, weighted_x, weighted_u * part), start=1):
            sums[row, columns] = terms.sum(0)
    one, u1, u2, x1, ux = sums.sum(1, keepdims=True) if pooled else sums
    scheme = grids.scheme
    old = grids.scales.astype(np.float64)
    if scheme.kind != "minimum":
        scales = _cast(np.divide(ux, u2, out=old, where=u2 > 0), scheme)
        return Grids(scales=scales, offsets=grids.offsets, scheme=scheme)
    determinant = one * u2 - u1 * u1
    fits = determinant > 1e-6 * one * u2
    scales = _cast(np.divide(one * ux - u1 * x1, determinant, out=old, where=fits), scheme)
    # With the scale as it is stored.
    minima = np.divide(x1 - scales.astype(np.float64) * u1, one, out=np.zeros_like(one), where=one > 0)
    return Grids(scales=scales, offsets=_cast(minima, scheme), scheme=scheme)


def _cast(x: np.ndarray, scheme: Scheme) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(scheme.dtype)
