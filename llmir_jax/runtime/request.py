"""One request while it is being served: its tokens are the truth, everything else can be computed from them anew."""

from dataclasses import dataclass

from llmir_jax.runtime.outputs import FinishReason, RequestOutput, RequestUpdate, TokenLogprobs
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.runtime.text import TextStream, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Why a request ended, and the stop token or string if one ended it."""

    reason: FinishReason
    stop: int | str | None = None


class Request:
    """A request and how far it has come.

    Args:
        request_id: number of the request; requests are served in its order.
        prompt_idx: which prompt of its `stream` or `generate` call this is.
        prompt: token ids; the request appends to a copy.
        params: how its tokens are chosen.
        seed: what its draws are seeded with.
        max_new_tokens: the most new tokens.
        stop_token_ids: tokens that end it, the model's end-of-sequence tokens included unless they are ignored.
        tokenizer: makes its text; None for token ids only.
    """

    def __init__(
        self,
        *,
        request_id: int,
        prompt_idx: int,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.request_id = request_id
        self.prompt_idx = prompt_idx
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.params = params
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.finish: Finish | None = None
        self.num_preemptions = 0
        self._stop_token_ids = stop_token_ids
        self._logprobs: dict[int, TokenLogprobs] = {}  # by index in tokens
        self._text = (
            None
            if tokenizer is None
            else TextStream(tokenizer.decode, self.tokens, start=self.num_prompt, stop=params.stop)
        )
        # On the device. `evict` resets these.
        self.slot: int | None = None  # row of the block tables and of the sampler's state; None while it waits
        self.num_computed = 0  # leading tokens whose keys and values are in the cache
        self.is_seen_filled = False  # the sampler knows which tokens it has had

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are not in the cache: 1 while decoding."""
        return len(self.tokens) - self.num_computed

    def evict(self) -> None:
        """It has lost its place on the device: all its tokens must be computed again."""
        self.slot = None
        self.num_computed = 0
        self.is_seen_filled = False

    def continue_from(self, parent: "Request") -> None:
        """Take over the tokens that a request with the same prompt has generated, and note it if they end this one."""
        self.tokens += parent.tokens[self.num_prompt :]
        self._logprobs = dict(parent._logprobs)
        self.update_finish()

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Take the next token, and note it if that ends the request."""
        if logprobs is not None:
            self._logprobs[len(self.tokens)] = logprobs
        self.tokens.append(token_id)  # the one change that counts: an interrupt before or after it does no harm
        self.update_finish()

    def update_finish(self) -> None:
        """Note whether the tokens so far end the request. A stop token goes before a stop string before the length."""
        if self.finish is not None or not self.num_generated:
            return
        if self.tokens[-1] in self._stop_token_ids:
            self.finish = Finish(reason="stop", stop=self.tokens[-1])
            return
        if self._text is not None and self.params.stop:
            self._text.advance(len(self.tokens))
            if self._text.stop_string is not None:
                self.finish = Finish(reason="stop", stop=self._text.stop_string)
                return
        if self.num_generated >= self.max_new_tokens:
            self.finish = Finish(reason="length")

    def text(self) -> str | None:
        """The text that can be shown by now."""
        if self._text is None:
            return None
        has_stop_token = self.finish is not None and isinstance(self.finish.stop, int)
        num_tokens = len(self.tokens) - has_stop_token
        if self.finish is None:
            self._text.advance(num_tokens)
        else:
            self._text.finish(num_tokens)
        return self._text.text

    def logprobs(self, start: int) -> list[TokenLogprobs] | None:
        """Those of the tokens from index ``start`` on; None if they were not asked for."""
        if self.params.logprobs is None:
            return None
        return [self._logprobs[idx] for idx in range(start, len(self.tokens))]

    def output(self) -> RequestOutput:
        """The result of a finished request."""
        assert self.finish is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.tokens[: self.num_prompt],
            token_ids=self.tokens[self.num_prompt :],
            text=self.text(),
            logprobs=self.logprobs(self.num_prompt),
            finish_reason=self.finish.reason,
            stop_reason=self.finish.stop,
            seed=self.seed,
            num_preemptions=self.num_preemptions,
        )


class UpdateReader:
    """Reads what a request produced since the last read. Each reader has its own place."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._num_tokens = request.num_tokens
        self._num_chars = len(request.text() or "")
        self._is_done = False

    def read(self) -> RequestUpdate | None:
        """The news; None if there are none."""
        request = self.request
        if self._is_done or (request.num_tokens == self._num_tokens and request.finish is None):
            return None
        text = request.text()
        update = RequestUpdate(
            request_id=request.request_id,
            prompt_idx=request.prompt_idx,
            token_ids=request.tokens[self._num_tokens :],
            text=None if text is None else text[self._num_chars :],
            logprobs=request.logprobs(self._num_tokens),
            output=None if request.finish is None else request.output(),
        )
        self._num_tokens = request.num_tokens
        self._num_chars = len(text or "")
        self._is_done = request.finish is not None
        return update
