"""Rounding of weights by what calibration saw of their inputs: GPTQ, and simpler ways.

The output of a matmul changes by E x for the error E = W - Ŵ of its weight [N, K], so that what counts is not the sum
of the squares of E, but, with H = Σ x xᵀ over the inputs seen,

    tr(E H Eᵀ) = Σ ‖E x‖²

GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds column by column, and makes up for the error of each in the columns
after it. It is written here in the form of LDLQ, which Chee et al. (2023, arXiv:2307.13304, theorem 6) show to give the
same: with H = U D Uᵀ, U upper triangular with ones on its diagonal,

    Ŵ[:, k] = round(W[:, k] + Σ_{j<k} E[:, j] · U[j, k])

It needs one Cholesky factorization and no inverse, and channels that are always zero need no care.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike, DTypeLike

from llmir_jax.errors import LlmirError
from llmir_jax.quantization.array import QuantizedArray
from llmir_jax.quantization.calibration import Calibration, WeightRounding
from llmir_jax.quantization.grids import Grids, best_grids, plain_grids
from llmir_jax.quantization.rounding import group_ranges, quantize
from llmir_jax.quantization.scheme import Scheme
from llmir_jax.quantization.statistics import InputStatistics

_CHUNK_ELEMENTS = 1 << 22  # of rows of a matrix that are rounded at once
_LEAF = 16  # columns that are rounded one by one before their errors go on by a matrix product
_DAMPINGS = 10.0 ** np.arange(5)  # as multiples of the one asked for, until the factorization exists


def weight_rounding(
    statistics: InputStatistics | None, calibration: Calibration | None
) -> tuple[WeightRounding, str | None]:
    """How a weight is rounded, and why not as `calibration.weights` says, for the report."""
    if calibration is None:
        return "min-max", None
    if calibration.weights in ("percentile", "min-max"):
        return calibration.weights, None
    if statistics is None:
        return "mse", "it is multiplied with nothing that was observed: all its inputs count alike"
    if calibration.weights == "gptq" and (statistics.gram is None or not statistics.gram.any()):
        return "mse", "no products of its inputs were observed"
    return calibration.weights, None


def quantize_calibrated(
    array: ArrayLike,
    scheme: Scheme,
    *,
    statistics: InputStatistics | None,
    calibration: Calibration | None,
    name: str = "array",
    dtype: DTypeLike | None = None,
) -> QuantizedArray:
    """A matrix [N, K] rounded to a scheme as `calibration` says (see `weight_rounding`), a few rows at a time.

    Under "gptq" no row has a greater error (above) than plain rounding gives it: where it would, it is rounded plainly.

    Args:
        array: floats of any dtype.
        scheme: fitted to the shape here.
        statistics: of the K inputs; None where they were not observed, as those of a table of rows.
        calibration: None for plain rounding.
        name: of the parameter, for errors.
        dtype: that the result stands for; by default the array's.

    Raises:
        LlmirError: what `quantize` raises; statistics of another number of inputs, or that are not finite; no Cholesky
            factorization even with much damping.
    """
    x = np.asarray(array)
    scheme = scheme.fitted(x.shape, name=name)
    method, _ = weight_rounding(statistics, calibration)
    if statistics is not None and method != "min-max":
        _check_statistics(statistics, x.shape[1], name)
    if method == "min-max" or calibration is None:
        return quantize(x, scheme, name=name, dtype=dtype)
    group_ranges(x, scheme.group_size or x.shape[1], name)  # refuses what is not finite
    if method == "percentile":
        ranges = _percentile_ranges(x, scheme, calibration.percentile)
        return quantize(x, scheme, name=name, dtype=dtype, ranges=ranges)
    importance = _importance(statistics, calibration.damping)

    def find(group: np.ndarray, start: int) -> Grids:
        own = None if importance is None else importance[start : start + len(group)]
        return best_grids(group, scheme, name, importance=own, pooled=scheme.per_tensor)

    if method == "mse":
        return _rounded(x, scheme, find).stored(scheme, name, x.dtype if dtype is None else dtype)
    assert statistics is not None and statistics.gram is not None
    feedback = feedback_factor(statistics.gram, calibration.damping, name)
    gram = statistics.gram.astype(np.float32)
    made = _rounded(x, scheme, find, feedback=feedback, gram=gram)
    plain = _rounded(x, scheme, lambda group, _: plain_grids(group, scheme, name, pooled=scheme.per_tensor), gram=gram)
    return made.or_better(plain).stored(scheme, name, x.dtype if dtype is None else dtype)


def feedback_factor(gram: np.ndarray, damping: float, name: str) -> np.ndarray:
    """U float32 [K, K] of gram + damping · mean(diagonal) · 1 = U D Uᵀ, upper triangular with ones on its diagonal."""
    wide = gram.astype(np.float64)
    mean = wide.trace() / len(wide)
    for factor in _DAMPINGS:
        damped = wide + np.diag(np.full(len(wide), damping * factor * mean))
        try:
            # Reversed in both axes, the lower triangular factor is an upper triangular one.
            upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            continue
        unit: np.ndarray = (upper / np.diagonal(upper)).astype(np.float32)
        return np.ascontiguousarray(unit)
    raise LlmirError(
        f"{name}: the products of its inputs are no positive matrix, even with a damping of {damping * factor:g}; "
        "calibrate with other text, or with weights='mse'"
    )


Find = Callable[[np.ndarray, int], Grids]
"""The grids of groups [K, n], float32, whose first element along K is at this place in the matrix."""


@dataclass(frozen=True, kw_only=True)
class _Rounded:
    """A matrix in the parts of `QuantizedArray`, before packing."""

    integers: np.ndarray
    """int8 or uint8 [N, K]."""
    scales: np.ndarray
    offsets: np.ndarray | None
    errors: np.ndarray | None
    """float64 [N]: E H Eᵀ of each row."""

    def or_better(self, other: "_Rounded") -> "_Rounded":
        """This, with rows of the other that have a smaller error; where all rows share a scale, all or none."""
        assert self.errors is not None and other.errors is not None
        per_tensor = len(self.scales) < len(self.integers)
        better = other.errors < self.errors
        if per_tensor:
            better = np.full_like(better, other.errors.sum() < self.errors.sum())

        def choose(own: np.ndarray, others: np.ndarray) -> np.ndarray:
            return np.where(better[: len(own), None], others, own)

        offsets = None
        if self.offsets is not None:
            assert other.offsets is not None
            offsets = choose(self.offsets, other.offsets)
        return _Rounded(
            integers=choose(self.integers, other.integers),
            scales=choose(self.scales, other.scales),
            offsets=offsets,
            errors=np.where(better, other.errors, self.errors),
        )

    def stored(self, scheme: Scheme, name: str, dtype: DTypeLike) -> QuantizedArray:
        """Packed."""
        return QuantizedArray.from_integers(
            self.integers,
            self.scales,
            bits=scheme.bits,
            zero_points=self.offsets if scheme.kind == "zero_point" else None,
            minima=self.offsets if scheme.kind == "minimum" else None,
            dtype=dtype,
            name=name,
        )


def _rounded(
    x: np.ndarray, scheme: Scheme, find: Find, *, feedback: np.ndarray | None = None, gram: np.ndarray | None = None
) -> _Rounded:
    """x [N, K] rounded, some rows at a time: with `feedback` by GPTQ; errors are found if `gram` [K, K] is given."""
    n, k = x.shape
    shared = find(np.ascontiguousarray(x.T, np.float32), 0) if scheme.per_tensor else None
    sweeps: list[_Rounded] = []
    for start in range(0, n, max(1, _CHUNK_ELEMENTS // k)):
        rows = x[start : start + max(1, _CHUNK_ELEMENTS // k)]
        sweep = _Sweep(np.ascontiguousarray(rows.T, np.float32), scheme.group_size or k, find, shared, feedback)
        sweep.run(0, k)
        sweeps.append(sweep.result(gram))
    parts = sweeps[:1] if shared is not None else sweeps
    return _Rounded(
        integers=np.concatenate([part.integers for part in sweeps]),
        scales=np.concatenate([part.scales for part in parts]),
        offsets=None
        if parts[0].offsets is None
        else np.concatenate([p.offsets for p in parts if p.offsets is not None]),
        errors=None if gram is None else np.concatenate([p.errors for p in sweeps if p.errors is not None]),
    )


class _Sweep:
    """Rounds the columns of some rows, in order; all arrays are transposed, [K, n].

    Halves: the left one is rounded, its errors go on to the right one by a matrix product, then that is rounded. Groups
    are halved only when there is one left, so that all errors before a group have reached it when its grid is found.
    """

    def __init__(
        self, weight: np.ndarray, group_size: int, find: Find, shared: Grids | None, feedback: np.ndarray | None
    ) -> None:
        self._weight = weight
        self._work = weight if feedback is None else weight.copy()
        self._group_size = group_size
        self._find = find
        self._feedback = feedback
        self._errors = np.empty_like(weight)
        self._integers: list[np.ndarray] = []
        self._grids = [] if shared is None else [shared]
        self._shared = shared is not None
        self._encoder = self._grids[0].encoder() if self._grids else None

    def run(self, start: int, stop: int) -> None:
        """Round columns [start, stop) of the matrix, which have the errors of all columns before them."""
        size, group_size = stop - start, self._group_size
        if self._feedback is None and size <= group_size:
            self._round(start, stop)
            return
        if self._feedback is not None and size <= _LEAF:
            self._round_one_by_one(start, stop)
            return
        middle = start + (size // group_size // 2 * group_size if size > group_size else size // 2)
        self.run(start, middle)
        if self._feedback is not None:
            self._work[middle:stop] += self._feedback[start:middle, middle:stop].T @ self._errors[start:middle]
        self.run(middle, stop)

    def result(self, gram: np.ndarray | None) -> _Rounded:
        """After `run` of all."""
        offsets = [grids.offsets for grids in self._grids if grids.offsets is not None]
        errors = self._errors
        return _Rounded(
            integers=np.concatenate(self._integers).T,
            scales=np.stack([grids.scales for grids in self._grids], 1),
            offsets=np.stack(offsets, 1) if offsets else None,
            errors=None if gram is None else np.einsum("kn,kn->n", errors, gram @ errors).astype(np.float64),
        )

    def _round_one_by_one(self, start: int, stop: int) -> None:
        assert self._feedback is not None
        for k in range(start, stop):
            self._round(k, k + 1)
            self._work[k + 1 : stop] += self._feedback[k, k + 1 : stop, None] * self._errors[k]

    def _round(self, start: int, stop: int) -> None:
        """Columns of one group."""
        if not self._shared and start % self._group_size == 0:
            self._grids.append(self._find(self._work[start : start + self._group_size], start))
            self._encoder = self._grids[-1].encoder()
        assert self._encoder is not None
        u = self._encoder.round(self._work[start:stop])
        self._integers.append(self._grids[-1].integers(u))
        np.subtract(self._weight[start:stop], self._encoder.decode(u), out=self._errors[start:stop])


def _importance(statistics: InputStatistics | None, damping: float) -> np.ndarray | None:
    """How much the square of an error in each channel counts, float32 [K], their mean 1; None for all alike."""
    squares = None if statistics is None else statistics.mean_square
    if squares is None or not squares.any():
        return None
    relative = squares / squares.mean()
    # As GPTQ's, so that channels that were always zero count a little.
    return np.asarray((relative + damping) / (1 + damping), np.float32)


def _percentile_ranges(x: np.ndarray, scheme: Scheme, percentile: float) -> tuple[np.ndarray, np.ndarray]:
    """(least, greatest) float [N, G], without the share of values that lies beyond the percentile of absolute values.

    Of asymmetric schemes half of that share at either end.
    """
    (n, k), tail = x.shape, 100 - percentile
    num_groups = k // (scheme.group_size or k)
    least, greatest = (np.empty((n, num_groups), np.float32) for _ in range(2))

    def clip(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if scheme.kind == "symmetric":
            top = np.percentile(np.abs(groups), percentile, axis=-1)
            return -top, top
        low, high = np.percentile(groups, [tail / 2, 100 - tail / 2], axis=-1)
        return low, high

    if scheme.per_tensor:
        least[:], greatest[:] = clip(x.astype(np.float32).ravel())
        return least, greatest
    step = max(1, _CHUNK_ELEMENTS // k)
    for rows in (slice(start, start + step) for start in range(0, n, step)):
        groups = x[rows].astype(np.float32).reshape(-1, num_groups, k // num_groups)
        least[rows], greatest[rows] = clip(groups)
    return least, greatest


def _check_statistics(statistics: InputStatistics, num_inputs: int, name: str) -> None:
    if len(statistics.absmax) != num_inputs:
        raise LlmirError(f"{name}: statistics of {len(statistics.absmax)} inputs; expected {num_inputs}")
    if not statistics.is_finite:
        raise LlmirError(
            f"{name}: its inputs were NaN, infinite or too large in calibration; "
            "load the model in float32 or bfloat16, or calibrate with other text"
        )
