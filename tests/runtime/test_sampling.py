"""Sampling parameters: what is refused, and how the message reads."""

import math

import numpy as np
import pytest

from llmir_jax.errors import RequestError
from llmir_jax.runtime.sampling import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 1.5, "3", True)),
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, 101, "hot", None, True)),
        *(("top_k", value) for value in (0, -1, 2.0)),
        *(("top_p", value) for value in (0, -0.1, 1.01, math.nan, None)),
        *(("min_p", value) for value in (-0.1, 1.01, math.nan)),
        *(("repetition_penalty", value) for value in (0, -1, 1000, math.inf, math.nan)),
        *(("seed", value) for value in (-1, 2**64, 0.5, "x")),
        *(("logprobs", value) for value in (-1, 21, 1.0)),
        *(("stop", value) for value in ("", ["a", ""], [1], 7)),
        *(("stop_token_ids", value) for value in ([-1], ["a"], 3, [1.5])),
        ("ignore_eos", 1),
    ],
)
def test_refused(name: str, value: object):
    with pytest.raises(RequestError, match=rf"^sampling parameter {name} = .* cannot be used: give [^\n]*$"):
        SamplingParams(**{name: value})


def test_message_names_the_range():
    with pytest.raises(RequestError) as caught:
        SamplingParams(top_p=1.5)
    assert str(caught.value) == "sampling parameter top_p = 1.5 cannot be used: give a number above 0 to 1"
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=0)
    assert str(caught.value) == "sampling parameter max_tokens = 0 cannot be used: give an integer from 1 up, or None"


def test_taken():
    params = SamplingParams(
        stop="x", stop_token_ids=[np.int32(3)], max_tokens=None, temperature=np.float32(0.5), top_k=3
    )
    assert params.stop == ("x",)
    assert params.stop_token_ids == (3,)
    assert not params.is_greedy
    assert SamplingParams().is_plain_greedy
    assert SamplingParams(temperature=1e-9).is_greedy
    assert not SamplingParams(logprobs=0).is_plain_greedy
    assert not SamplingParams(repetition_penalty=1.1).is_plain_greedy
    with pytest.raises(TypeError):
        SamplingParams(beams=4)  # type: ignore[call-arg]
