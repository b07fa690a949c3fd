"""What observers see, and the static scales of activations that are found from it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llmir_jax.errors import LlmirError
from llmir_jax.quantization import Calibration, InputStatistics, activation_scales
from llmir_jax.quantization.statistics import NUM_BINS, SMALLEST, histogram_bins, histogram_edges


def fresh() -> np.random.Generator:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


def calibration(**options: Any) -> Calibration:
    return Calibration(tokens=[[0]], **options)


# -- histograms --------------------------------------------------------------------------------------------------------


@given(arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)))
def test_each_value_is_in_its_bin(x: np.ndarray) -> None:
    bins = histogram_bins(x)
    assert bins.dtype == np.int32 and bins.shape == x.shape
    magnitude = np.abs(x).astype(np.float64)
    lower, upper = histogram_edges()[bins], np.append(histogram_edges()[1:], np.inf)[bins]
    assert (lower * (1 - 1e-5) <= magnitude).all() and (magnitude <= upper * (1 + 1e-5)).all()
    assert ((bins == 0) == (magnitude < SMALLEST)).all()


def test_bins_of_special_values() -> None:
    x = np.asarray([0.0, -0.0, np.nan, 1e-30, SMALLEST, 1.0, -1.0, 1.04, 1.1, 1e30, np.inf, -np.inf], np.float32)
    one = 1 + 20 * 8
    expected = [0, 0, 0, 0, 1, one, one, one, one + 1, *[NUM_BINS - 1] * 3]
    np.testing.assert_array_equal(histogram_bins(x), expected)
    np.testing.assert_array_equal(jax.jit(histogram_bins)(jnp.asarray(x)), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_bins_in_jax(dtype: Any) -> None:
    """As in NumPy, but for what lies on an edge; traceable."""
    rng = fresh()
    x = jnp.asarray(rng.normal(size=(50, 40)) * 2.0 ** rng.integers(-14, 14, (50, 40)), dtype)
    bins = jax.jit(histogram_bins)(x)
    assert bins.dtype == jnp.int32
    assert (np.abs(np.asarray(bins) - histogram_bins(np.asarray(x))) <= 1).all()
    assert (np.asarray(bins) == histogram_bins(np.asarray(x))).mean() > 0.99


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_of_parts_add_up() -> None:
    rng = fresh()
    x = rng.normal(size=(50, 6)).astype(np.float32)
    x[:, 2] = 0
    whole, parts = InputStatistics.of(x), InputStatistics.of(x[:20]) + InputStatistics.of(x[20:])
    assert parts.num_rows == 50 and whole.is_finite
    np.testing.assert_array_equal(parts.absmax, np.abs(x).max(0))
    np.testing.assert_allclose(parts.gram, x.T @ x, rtol=1e-5, atol=1e-5)
    assert parts.histogram is not None
    np.testing.assert_array_equal(parts.histogram, whole.histogram)
    assert (parts.histogram.sum(1) == 50).all() and parts.histogram[2, 0] == 50
    np.testing.assert_allclose(parts.mean_square, (x.astype(np.float64) ** 2).mean(0), rtol=1e-5)
    without = dataclasses.replace(whole, gram=None)
    np.testing.assert_allclose(without.mean_square, parts.mean_square, rtol=0.05)
    assert (parts + without).gram is None
    assert dataclasses.replace(without, histogram=None).mean_square is None
    assert InputStatistics.of(x[:0]).mean_square is None


def test_infinite_inputs_are_known_of() -> None:
    for bad in (np.nan, np.inf):
        statistics = InputStatistics(num_rows=1, absmax=np.asarray([1, bad], np.float32))
        assert not statistics.is_finite
        with pytest.raises(LlmirError, match=r"^layers\.0\.mlp\.up: NaN or infinite activations in calibration"):
            activation_scales(statistics, None, calibration(activations="min-max"), name="layers.0.mlp.up")


# -- scales of activations ---------------------------------------------------------------------------------------------


def rounding_error(x: np.ndarray, scales: np.ndarray) -> float:
    groups = x.astype(np.float64).reshape(len(x), len(scales), -1)
    steps = scales.astype(np.float64)[:, None]
    return float(((np.clip(np.rint(groups / steps), -127, 127) * steps - groups) ** 2).sum())


@pytest.mark.parametrize("group_size", [None, 4, 16])
def test_nothing_is_clipped_by_min_max(group_size: int | None) -> None:
    x = fresh().normal(size=(100, 16)).astype(np.float32)
    scales = activation_scales(InputStatistics.of(x), group_size, calibration(activations="min-max"))
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales * 127, np.abs(x).reshape(100, len(scales), -1).max((0, 2)), rtol=1e-6)
    assert len(scales) == 16 // (group_size or 16)


def test_percentile() -> None:
    """As NumPy's, within the width of a bin, and never above the largest value."""
    x = fresh().standard_t(3, size=(4000, 8)).astype(np.float32)
    statistics = InputStatistics.of(x)
    for percentile in (60.0, 99.0, 99.9):
        scales = activation_scales(statistics, 2, calibration(activations="percentile", percentile=percentile))
        exact = np.percentile(np.abs(x).reshape(-1, 4, 2), percentile, axis=(0, 2), method="inverted_cdf")
        assert (scales * 127 > 0.99 * exact).all() and (scales * 127 < 1.11 * exact).all()
    largest = activation_scales(statistics, 2, calibration(activations="percentile", percentile=100))
    np.testing.assert_allclose(largest * 127, np.abs(x).reshape(-1, 4, 2).max((0, 2)), rtol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 300.0])
@pytest.mark.parametrize("group_size", [None, 8])
def test_least_squared_error(group_size: int | None, spread: float) -> None:
    """Close to the best clip there is, found by trying many; with rare outliers far from the largest value."""
    rng = fresh()
    x = rng.normal(size=(20000, 8)).astype(np.float32)
    x[:3] *= spread
    statistics = InputStatistics.of(x)
    found = activation_scales(statistics, group_size, calibration())
    plain = activation_scales(statistics, group_size, calibration(activations="min-max"))
    tried = [rounding_error(x, plain * factor) for factor in np.linspace(0.02, 1, 99)]
    assert rounding_error(x, found) <= 1.05 * min(tried)
    assert rounding_error(x, found) <= 1.01 * rounding_error(x, plain)


def test_channels_that_were_always_zero() -> None:
    """Their group gets the scale of the row, since they may be anything; a row of zeros gets some scale."""
    x = fresh().normal(size=(100, 8)).astype(np.float32)
    x[:, 4:] = 0
    for how in ("mse", "percentile", "min-max"):
        scales = activation_scales(InputStatistics.of(x), 4, calibration(activations=how))
        whole = activation_scales(InputStatistics.of(x), None, calibration(activations=how))
        assert scales[1] == whole[0] > 0
        nothing = activation_scales(InputStatistics.of(0 * x), 4, calibration(activations=how))
        assert np.isfinite(nothing).all() and (nothing > 0).all()
    with pytest.raises(LlmirError, match=r"^w: group_size 3 does not divide its 8 inputs"):
        activation_scales(InputStatistics.of(x), 3, calibration(), name="w")
