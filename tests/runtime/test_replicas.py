"""Copies of a model: what must be the same in all of them."""

from typing import Any

import numpy as np
import pytest

from llmir_jax.errors import LlmirError
from llmir_jax.runtime.replicas import _Runners


class FakeRunner:
    """Has rows of logits."""

    def __init__(self, *row: float) -> None:
        self.row = row

    def run_rows(self) -> np.ndarray[Any, Any]:
        return np.array([self.row], np.float32)


def test_a_copy_that_differs_is_named() -> None:
    runners: Any = [FakeRunner(1, 0), FakeRunner(1.000001, 0)]
    np.testing.assert_array_equal(_Runners(runners).run_rows(), [[1, 0]])
    with pytest.raises(LlmirError, match=r"^copy 2 of the model differs from the first$"):
        _Runners([*runners, FakeRunner(1.0, 1e-9)]).run_rows()
