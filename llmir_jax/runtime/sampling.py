"""How the next token is chosen, as a request asks for it."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from llmir_jax.errors import RequestError

MAX_LOGPROBS = 20
"""The most alternatives a request can ask log-probabilities of, a token (OpenAI's limit)."""

MIN_TEMPERATURE = 1e-5
"""Below this a temperature counts as 0: the logits would overflow, and the most likely token has all the mass."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    The order is: repetition penalty, temperature, then the filters top_k, top_p (over what top_k left, renormalised)
    and min_p, then a draw from what is left. A filter keeps all tokens that tie at its threshold, so that a result
    never depends on the order of equal logits.

    Attributes:
        max_tokens: the most new tokens; None for as many as the model's length and the cache allow.
        temperature: divides the logits; 0 takes the most likely token (greedy). From 0 to 100.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this; in (0, 1], 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; in [0, 1], 0 keeps all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of the tokens in the prompt and the
            output so far; 1 does nothing. From 0.01 to 100.
        seed: makes the draws the same whatever else is in the batch; 0 to 2**64 - 1. None takes a fresh random one,
            which the output reports.
        stop: strings that end the text; the text is cut before them. Needs an engine with a tokenizer.
        stop_token_ids: tokens that end the output, beside the model's own end-of-sequence tokens. The token is the
            last of the output's token ids and not part of its text.
        ignore_eos: go on past the model's own end-of-sequence tokens.
        logprobs: None for no log-probabilities, else how many of the most likely tokens to report beside the chosen
            one; 0 to 20. They are those of the model's own distribution, before penalties, temperature and filters.

    Raises:
        RequestError: a value of the wrong kind or out of range.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._require_int("max_tokens", self.max_tokens, 1, None)
        self._require_int("top_k", self.top_k, 1, None)
        self._require_int("seed", self.seed, 0, 2**64 - 1)
        self._require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._require_real("temperature", self.temperature, 0, 100)
        self._require_real("min_p", self.min_p, 0, 1)
        self._require_real("repetition_penalty", self.repetition_penalty, 0.01, 100)
        # 0 would keep nothing; the smallest positive number still keeps the most likely token.
        self._require_real("top_p", self.top_p, 0, 1, above=True)
        if not isinstance(self.ignore_eos, bool):
            raise self._error("ignore_eos", self.ignore_eos, "True or False")
        # A list or a single string is fine to write; kept as tuples so that the dataclass stays immutable.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise self._error("stop", self.stop, "a string or a list of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        if not isinstance(ids, Sequence) or not all(_is_int(token) and token >= 0 for token in ids):
            raise self._error("stop_token_ids", ids, "a list of token ids, none of them negative")
        object.__setattr__(self, "stop_token_ids", tuple(int(token) for token in ids))

    @property
    def is_greedy(self) -> bool:
        """The most likely token is taken, after the penalty."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def is_plain_greedy(self) -> bool:
        """The argmax of the raw logits is all that is wanted: no penalty, no draw, no log-probabilities."""
        return self.is_greedy and self.repetition_penalty == 1 and self.logprobs is None

    def _require_int(self, name: str, value: object, low: int, high: int | None) -> None:
        if value is None or (_is_int(value) and low <= value and (high is None or value <= high)):
            return
        upper = "up" if high is None else f"to {high}"
        raise self._error(name, value, f"an integer from {low} {upper}, or None")

    def _require_real(self, name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
        if not isinstance(value, bool) and isinstance(value, numbers.Real):
            number = float(value)
            # Written so that NaN, of which every comparison is false, is refused.
            if low <= number <= high and not (above and number == low):
                return
        raise self._error(name, value, f"a number {'above' if above else 'from'} {low} to {high}")

    @staticmethod
    def _error(name: str, value: object, expected: str) -> RequestError:
        return RequestError(f"sampling parameter {name} = {value!r} cannot be used: give {expected}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
