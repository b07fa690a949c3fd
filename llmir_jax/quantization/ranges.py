"""Static scales of int8 activations, from what was seen of them."""

import numpy as np

from llmir_jax.errors import LlmirError
from llmir_jax.quantization.calibration import Calibration
from llmir_jax.quantization.statistics import NUM_BINS, InputStatistics, bin_values, histogram_edges

_HIGH = 127  # int8, symmetric
_CLIPS = 2.0 ** (-np.arange(128) / 16)
"""That "mse" tries, relative to the largest value."""
_POINTS = 4
"""Values of each bin that "mse" rounds."""


def activation_scales(
    statistics: InputStatistics, group_size: int | None, calibration: Calibration, *, name: str = "activations"
) -> np.ndarray:
    """Scales float32 [K / group_size] of groups of channels, or [1] for all of them: x ≈ clip(round(x / s)) · s.

    `calibration.activations` says how: "min-max" clips nothing that was seen; "percentile" clips above that percentile
    of |x|, as finely as the histogram has it (9%, a bin's width); "mse" takes the clip with the least squared error.

    A group in which only zeros were seen gets the scale of the whole row, since its values are not known.

    Raises LlmirError, which names `name`, where NaN or infinite values were seen, and for groups that do not divide K.
    """
    k = len(statistics.absmax)
    if group_size is not None and k % group_size:
        raise LlmirError(f"{name}: group_size {group_size} does not divide its {k} inputs; choose a divisor")
    if not statistics.is_finite:
        raise LlmirError(
            f"{name}: NaN or infinite activations in calibration; the model overflows on this text: "
            "load it in float32 or bfloat16, or calibrate with other text"
        )
    scales = _scales(statistics, group_size or k, calibration)
    if not scales.all():
        (whole,) = _scales(statistics, k, calibration)
        scales[scales == 0] = whole or 1 / _HIGH
    return scales.astype(np.float32)


def _scales(statistics: InputStatistics, group_size: int, calibration: Calibration) -> np.ndarray:
    """float64 [G]; 0 for a group of zeros."""
    absmax = statistics.absmax.astype(np.float64).reshape(-1, group_size).max(1)
    if calibration.activations == "min-max":
        return np.asarray(absmax / _HIGH)
    assert statistics.histogram is not None, "an observer that fills no histogram"
    counts = statistics.histogram.reshape(len(absmax), group_size, NUM_BINS).sum(1)
    if calibration.activations == "percentile":
        return _percentile_clip(counts, absmax, calibration.percentile) / _HIGH
    return _least_error_clip(counts, absmax) / _HIGH


def _percentile_clip(counts: np.ndarray, absmax: np.ndarray, percentile: float) -> np.ndarray:
    """The upper edge of the bin that the percentile is in, at most absmax; [G]."""
    upper = np.append(histogram_edges()[1:], np.inf)
    cumulative = counts.cumsum(1)
    reached = cumulative >= percentile / 100 * cumulative[:, -1:]
    return np.asarray(np.minimum(upper[reached.argmax(1)], absmax))


def _least_error_clip(counts: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """Of absmax and some smaller ones, the clip that gives the least squared error; [G]."""
    values = np.minimum(bin_values(_POINTS), absmax[:, None, None])  # [G, B, points]
    errors = np.stack([_clip_error(counts, values, absmax * factor) for factor in _CLIPS])
    return np.asarray(absmax * _CLIPS[errors.argmin(0)])


def _clip_error(counts: np.ndarray, values: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """The sum of squared errors of counts [G, B] of values [G, B, points] in steps of clip [G] / 127; [G]."""
    step = np.where(clip > 0, clip, 1)[:, None, None] / _HIGH
    rounded = np.minimum(np.rint(values / step), _HIGH) * step
    return np.asarray(np.einsum("gb,gbp->g", counts, (values - rounded) ** 2))
