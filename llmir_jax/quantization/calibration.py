"""What a user gives for calibration: text to run through the model, and what to make of what is seen.

loaded.quantize("int4-g64", calibration=llmir.Calibration(text=Path("book.txt").read_text()))
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from llmir_jax.errors import LlmirError

WeightRounding = Literal["gptq", "mse", "percentile", "min-max"]
ActivationRange = Literal["mse", "percentile", "min-max"]

_LARGEST_ID = 2**31 - 1
_TEXT_REMEDY = "give some thousand words of the kind of text the model is to work on"
_TOKENS_REMEDY = "tokens is a list of lists of token ids, such as [[1, 2, 3], [4, 5]]"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Text for calibration, exactly one of `text` and `tokens`, and how its statistics are used.

    Raises LlmirError for options that cannot be meant, empty text, and what are no token ids.
    """

    text: str | None = None
    """Encoded by the model's tokenizer."""
    tokens: Sequence[Sequence[int]] | None = None
    """Token ids of one or several texts, for a model without a tokenizer."""
    weights: WeightRounding = "gptq"
    """How weights are rounded to the format they get:

    "gptq" makes up for the error of each column in the columns after it (Frantar et al. 2022, arXiv:2210.17323);
    "mse" chooses scales by the squared error, weighted by how large inputs are;
    "percentile" clips the weights of each group at `percentile`; "min-max" is plain rounding, without calibration.
    """
    activations: ActivationRange = "mse"
    """How static scales of activations are found: by the least squared error, a percentile, or the largest value."""
    percentile: float = 99.99
    """Of absolute values, above which "percentile" clips: 50 to 100."""
    damping: float = 0.1
    """Of "gptq": what is added to the mean square of each input, relative to their mean. More trusts the text less."""
    window: int = 512
    """Tokens that are run through the model at a time, each window by itself."""

    def __post_init__(self) -> None:
        for field, allowed in (("weights", get_args(WeightRounding)), ("activations", get_args(ActivationRange))):
            value = getattr(self, field)
            if value not in allowed:
                raise LlmirError(f"calibration: {field} must be one of {', '.join(allowed)}, got {value!r}")
        if not _is_number(self.percentile) or not 50 <= self.percentile <= 100:
            raise LlmirError(f"calibration: percentile must be a number from 50 to 100, got {self.percentile!r}")
        if not _is_number(self.damping) or not 0 < self.damping < math.inf:
            raise LlmirError(f"calibration: damping must be a positive number such as 0.1, got {self.damping!r}")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise LlmirError(f"calibration: window must be a whole number of tokens, at least 1, got {self.window!r}")
        if (self.text is None) == (self.tokens is None):
            given = "neither" if self.text is None else "both"
            raise LlmirError(f"calibration: give exactly one of text and tokens, got {given}; {_TEXT_REMEDY}")
        if self.text is not None:
            _check_text(self.text)
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _checked_tokens(self.tokens))

    def windows(
        self, encode: Callable[[str], Sequence[int]] | None = None, *, vocab_size: int | None = None
    ) -> np.ndarray:
        """Token ids int32 [num_windows, T], T = min(window, number of tokens), to run through the model.

        All texts are one stream, cut into windows. The last one starts earlier, in what the one before it has, so that
        it is full.

        Args:
            encode: the tokenizer's; None where the model has none.
            vocab_size: of the model, which the ids must be less than.

        Raises:
            LlmirError: text but no `encode`, text that gives no tokens, ids that are not in the vocabulary.
        """
        if self.text is None:
            assert self.tokens is not None
            ids = [token for text in self.tokens for token in text]
        elif encode is None:
            raise LlmirError(
                "calibration: this model has no tokenizer, so that it cannot read text; "
                "give token ids: Calibration(tokens=[[…], …])"
            )
        else:
            ids = list(encode(self.text))
        if not ids:
            raise LlmirError(
                f"calibration: the tokenizer makes no tokens of the text {self.text!r:.60}; {_TEXT_REMEDY}"
            )
        stream = np.asarray(ids, np.int64)
        if vocab_size is not None and stream.max() >= vocab_size:
            raise LlmirError(
                f"calibration: token id {stream.max()} is not in the vocabulary of {vocab_size:,} tokens; "
                "encode the text with this model's own tokenizer"
            )
        length = min(self.window, len(stream))
        starts = np.minimum(np.arange(0, len(stream), length), len(stream) - length)
        return stream[starts[:, None] + np.arange(length)].astype(np.int32)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise LlmirError(f"calibration: text must be a string, got {type(text).__name__}; {_TEXT_REMEDY}")
    if not text.strip():
        raise LlmirError(f"calibration: the text is empty; {_TEXT_REMEDY}")


def _checked_tokens(tokens: Any) -> tuple[tuple[int, ...], ...]:
    """The token ids of each text, as Python's integers."""
    if isinstance(tokens, str | bytes) or not hasattr(tokens, "__iter__"):
        raise LlmirError(f"calibration: tokens must be lists of token ids, got {tokens!r:.60}; {_TOKENS_REMEDY}")
    texts = []
    for text in tokens:
        if isinstance(text, str | bytes) or not hasattr(text, "__iter__"):
            raise LlmirError(
                f"calibration: a text of tokens must be a list of token ids, got {text!r}; {_TOKENS_REMEDY}"
            )
        texts.append(tuple(_checked_id(token) for token in text))
    if not any(texts):
        raise LlmirError(f"calibration: there are no tokens in it; {_TOKENS_REMEDY}")
    return tuple(texts)


def _checked_id(token: Any) -> int:
    try:
        value = -1 if isinstance(token, bool) else operator.index(token)
    except TypeError:
        value = -1
    if not 0 <= value <= _LARGEST_ID:
        raise LlmirError(
            f"calibration: a token id must be a whole number of at least 0, got {token!r}; {_TOKENS_REMEDY}"
        )
    return value
