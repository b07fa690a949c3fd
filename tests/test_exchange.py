"""What processes exchange arrives bit for bit, whatever its dtype."""

import jax
import ml_dtypes
import numpy as np
import pytest

from llmir_jax.exchange import Exchange


@pytest.mark.parametrize(
    "values",
    [
        np.arange(-3, 4, dtype=np.int8),  # no whole number of words
        np.array([[np.nan, -0.0], [np.inf, 1e-45]], np.float32),
        np.array([1.5, -2, 3], ml_dtypes.bfloat16),
        np.array([-8, 7, 3], ml_dtypes.int4),
        np.array([True, False, True]),
        np.array(2**31 - 1, np.int32),
        np.zeros((0, 4), np.float32),
    ],
    ids=lambda values: values.dtype.name,
)
def test_bits(values: np.ndarray):
    like = jax.ShapeDtypeStruct(values.shape, values.dtype)
    exchange = Exchange(jax.devices())
    found = exchange.shared(values, like)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert found.tobytes() == values.tobytes()
    assert not np.any(exchange.shared(None, like)), "what nobody gives is zeros"
