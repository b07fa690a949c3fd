"""What observers see of the inputs of a matmul, and a histogram that one pass over them can fill."""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)

BINS_PER_OCTAVE = 8
NUM_BINS = 320
SMALLEST = 2.0**-20
"""Absolute values below it are in bin 0."""


def histogram_edges() -> np.ndarray:
    """The least absolute value of each bin, float64 [NUM_BINS]: 0, then SMALLEST · 2^(i / BINS_PER_OCTAVE), i = 0, 1, …

    The last bin, from about 2^19.8 on, has no upper edge.
    """
    return np.concatenate([[0.0], SMALLEST * 2.0 ** (np.arange(NUM_BINS - 1) / BINS_PER_OCTAVE)])


def histogram_bins(x: AnyArray) -> AnyArray:
    """The bin of each value of |x|, int32 of x's shape: floats of any dtype, NumPy's or JAX's. Traceable.

    A value within float32's rounding of an edge may be in either bin. NaN is in bin 0: `absmax` tells of it.
    """
    xp = np if isinstance(x, np.ndarray) else jnp
    magnitude = xp.abs(x.astype(np.float32))
    largest = SMALLEST * 2.0 ** (NUM_BINS / BINS_PER_OCTAVE)
    inside = xp.where(magnitude >= SMALLEST, xp.minimum(magnitude, np.float32(largest)), np.float32(SMALLEST))
    octaves = xp.log2(inside / np.float32(SMALLEST))
    bins = 1 + xp.floor(octaves * BINS_PER_OCTAVE).astype(np.int32)
    found: AnyArray = xp.where(magnitude >= SMALLEST, xp.clip(bins, 1, NUM_BINS - 1), 0).astype(np.int32)
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """Of the rows x [num_rows, K] that went into a matmul, K channels each:

        absmax[k]      max over rows of |x[r, k]|
        gram[j, k]     Σ over rows of x[r, j] · x[r, k]
        histogram[k]   how many |x[r, k]| are in each bin, see `histogram_bins`

    Add those of several batches.
    """

    num_rows: int
    absmax: np.ndarray
    """float32 [K]."""
    gram: np.ndarray | None = None
    """float32 [K, K]; None where it was not asked for."""
    histogram: np.ndarray | None = None
    """Integers [K, NUM_BINS]; None where it was not asked for."""

    def __post_init__(self) -> None:
        k = len(self.absmax)
        assert self.num_rows >= 0 and self.absmax.shape == (k,), self.absmax.shape
        assert self.gram is None or self.gram.shape == (k, k), self.gram.shape
        assert self.histogram is None or self.histogram.shape == (k, NUM_BINS), self.histogram.shape

    @classmethod
    def of(cls, x: np.ndarray) -> "InputStatistics":
        """All statistics of rows [num_rows, K]: what a compiled observer must agree with."""
        wide = np.asarray(x, np.float32)
        histogram = np.zeros((wide.shape[1], NUM_BINS), np.int64)
        np.add.at(histogram, (np.arange(wide.shape[1]), histogram_bins(wide)), 1)
        absmax = np.abs(wide).max(0, initial=0)
        return cls(num_rows=len(wide), absmax=absmax, gram=wide.T @ wide, histogram=histogram)

    def __add__(self, other: "InputStatistics") -> "InputStatistics":
        """Of the rows of both. A part that one of them lacks, the sum lacks."""
        assert len(self.absmax) == len(other.absmax), "inputs of different matmuls"
        return InputStatistics(
            num_rows=self.num_rows + other.num_rows,
            absmax=np.maximum(self.absmax, other.absmax),
            gram=None if self.gram is None or other.gram is None else self.gram + other.gram,
            histogram=None
            if self.histogram is None or other.histogram is None
            else self.histogram.astype(np.int64) + other.histogram,
        )

    @property
    def is_finite(self) -> bool:
        """Whether no NaN or infinite value was seen."""
        return bool(np.isfinite(self.absmax).all()) and (self.gram is None or bool(np.isfinite(self.gram).all()))

    @cached_property
    def mean_square(self) -> np.ndarray | None:
        """Of each channel, float64 [K]; from the histogram, within some percent, where there is no gram.

        None where neither is there, or no rows were seen.
        """
        if not self.num_rows:
            return None
        if self.gram is not None:
            return np.asarray(np.diagonal(self.gram), np.float64) / self.num_rows
        if self.histogram is not None:
            middle = np.minimum(bin_values(1)[:, 0], self.absmax[:, None].astype(np.float64))
            return np.asarray((self.histogram * middle**2).sum(1) / self.num_rows)
        return None


def bin_values(num_points: int) -> np.ndarray:
    """Some values of each bin, float64 [NUM_BINS, num_points], evenly on the logarithmic scale; of bin 0, zeros."""
    octaves = (np.arange(num_points) + 0.5) / num_points / BINS_PER_OCTAVE
    return np.asarray(histogram_edges()[:, None] * 2.0**octaves)
