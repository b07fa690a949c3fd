"""What a request gives back: all at once (`RequestOutput`) or as it comes (`RequestUpdate`)."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""A stop token or string came; the request's max_tokens were reached; it was cancelled; its logits were not numbers."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural log-probabilities under the model's own distribution, at one position of the output.

    ``top`` holds (token id, log-probability) of the most likely tokens, most likely first, as many as were asked for;
    the chosen token is among them only if it is that likely.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        request_id: the engine's number for the request.
        prompt_token_ids: the prompt as it was given.
        token_ids: the new tokens. A stop token that ended the output is the last of them.
        text: the new tokens as text, without the stop token and cut before the stop string; None without a tokenizer.
        logprobs: one entry a new token if they were asked for, else None.
        finish_reason: why it ended.
        stop_reason: the stop token's id or the stop string that ended it; None for another reason.
        seed: what the draws were seeded with: give it again to get the same tokens.
        num_preemptions: times the request lost its pages to older ones and was computed anew.
    """

    request_id: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    seed: int
    num_preemptions: int


@dataclass(frozen=True, kw_only=True)
class RequestUpdate:
    """What one request produced since its last update.

    Attributes:
        request_id: the engine's number for the request.
        prompt_idx: which prompt of the `stream` call it answers; 0 for a request added by itself.
        token_ids: new tokens since the last update, usually one.
        text: new text; complete characters only, and never a part of a stop string. "" while a character or a possible
            stop string is incomplete; None without a tokenizer. All updates joined are the output's text.
        logprobs: one entry for each of ``token_ids`` if they were asked for, else None.
        output: the whole result, in the last update only.
    """

    request_id: int
    prompt_idx: int
    token_ids: list[int]
    text: str | None
    logprobs: list[TokenLogprobs] | None
    output: RequestOutput | None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it goes on."""
        return None if self.output is None else self.output.finish_reason
