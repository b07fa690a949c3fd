"""The option `calibration`: windows of tokens, and what cannot be meant."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir_jax.errors import LlmirError
from llmir_jax.quantization import Calibration


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=9).filter(any), st.integers(1, 20))
def test_windows(tokens: list[list[int]], window: int) -> None:
    stream = [token for text in tokens for token in text]
    found = Calibration(tokens=tokens, window=window).windows()
    length = min(window, len(stream))
    assert found.dtype == np.int32 and found.shape == (-(-len(stream) // length), length)
    before, last = found[:-1].ravel().tolist(), found[-1].tolist()
    assert before == stream[: len(before)] and last == stream[-length:]
    assert len(before) < len(stream) <= len(before) + length  # all are seen, and no window more than needed


def test_text() -> None:
    calibration = Calibration(text="a calm bear", window=4)
    np.testing.assert_array_equal(
        calibration.windows(lambda text: [ord(c) for c in text], vocab_size=128),
        [[ord(c) for c in part] for part in ("a ca", "lm b", "bear")],
    )
    with pytest.raises(LlmirError, match=r"this model has no tokenizer.*Calibration\(tokens="):
        calibration.windows()
    with pytest.raises(LlmirError, match="makes no tokens of the text 'a calm bear'"):
        calibration.windows(lambda _: [])
    with pytest.raises(LlmirError, match="token id 114 is not in the vocabulary of 100 tokens"):
        calibration.windows(lambda text: [ord(c) for c in text], vocab_size=100)


def test_tokens_of_numpy() -> None:
    calibration = Calibration(tokens=np.asarray([[1, 2], [3, 4]], np.int16))  # type: ignore[arg-type]
    assert calibration.tokens == ((1, 2), (3, 4))
    np.testing.assert_array_equal(calibration.windows(vocab_size=5), [[1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of text and tokens, got neither"),
        ({"text": "a", "tokens": [[1]]}, "exactly one of text and tokens, got both"),
        ({"text": ""}, "the text is empty; give some thousand words"),
        ({"text": " \n\t"}, "the text is empty"),
        ({"text": b"abc"}, "text must be a string, got bytes"),
        ({"text": ["abc"]}, "text must be a string, got list"),
        ({"tokens": []}, r"no tokens in it; tokens is a list of lists .*\[\[1, 2, 3\], \[4, 5\]\]"),
        ({"tokens": [[], []]}, "no tokens in it"),
        ({"tokens": [1, 2]}, "a text of tokens must be a list of token ids, got 1"),
        ({"tokens": ["abc"]}, "a text of tokens must be a list of token ids, got 'abc'"),
        ({"tokens": "abc"}, "tokens must be lists of token ids, got 'abc'"),
        ({"tokens": 3}, "tokens must be lists of token ids, got 3"),
        ({"tokens": [[1, -2]]}, "whole number of at least 0, got -2"),
        ({"tokens": [[1, 2.0]]}, "whole number of at least 0, got 2.0"),
        ({"tokens": [[True]]}, "whole number of at least 0, got True"),
        ({"tokens": [[2**31]]}, "whole number of at least 0, got 2147483648"),
        ({"tokens": [["a"]]}, "whole number of at least 0, got 'a'"),
        ({"text": "a", "weights": "awq"}, "weights must be one of gptq, mse, percentile, min-max, got 'awq'"),
        ({"text": "a", "activations": "gptq"}, "activations must be one of mse, percentile, min-max, got 'gptq'"),
        ({"text": "a", "percentile": 0.999}, "percentile must be a number from 50 to 100, got 0.999"),
        ({"text": "a", "percentile": float("nan")}, "percentile must be a number from 50 to 100, got nan"),
        ({"text": "a", "damping": 0}, "damping must be a positive number such as 0.1, got 0"),
        ({"text": "a", "damping": "1%"}, "damping must be a positive number such as 0.1, got '1%'"),
        ({"text": "a", "window": 0}, "window must be a whole number of tokens, at least 1, got 0"),
        ({"text": "a", "window": 2.5}, "window must be a whole number of tokens, at least 1, got 2.5"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmirError, match=f"^calibration: .*{message}") as caught:
        Calibration(**options)
    assert "\n" not in str(caught.value)
