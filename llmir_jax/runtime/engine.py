"""Requests in, tokens out: the whole engine is `step`: schedule, run, take the tokens.

Between two calls of the device lies work of the host, half a millisecond and more. While all requests decode, a call
computes as many tokens of each as fit `burst` seconds, so that little of that work is left for each token, and nobody
waits longer than that for the next ones. A request that ends within a call has its other tokens thrown away.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from llmir_jax.errors import OutOfPagesError, RequestError
from llmir_jax.placement import Placement
from llmir_jax.runtime.batch import StepModel
from llmir_jax.runtime.outputs import RequestOutput, RequestUpdate
from llmir_jax.runtime.pipeline_runner import PipelinedModel, PipelineRunner
from llmir_jax.runtime.request import Finish, Request, UpdateReader
from llmir_jax.runtime.runner import Compilation, NextToken, Runner
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.runtime.scheduler import Schedule, Scheduler
from llmir_jax.runtime.snapshots import Snapshots
from llmir_jax.runtime.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What the engine holds now. Pages are counted a cache group."""

    num_running: int
    num_waiting: int
    num_preemptions: int  # since the engine was made
    pages_free: tuple[int, ...]
    pages_used: tuple[int, ...]


def make_scheduler(model: StepModel, prefill_chunk: int | None) -> Scheduler:
    """Of the requests and pages of a model; see `Engine`."""
    return Scheduler(
        groups=model.cache_groups,
        max_seqs=model.max_seqs,
        max_seq_len=model.max_seq_len,
        buckets=model.buckets,
        prefill_chunk=prefill_chunk,
    )


def make_runner(model: StepModel, scheduler: Scheduler, burst: float, placement: Placement | None) -> Runner:
    """What runs a model's schedules on its devices; see `Engine`."""
    kind: type[Runner] = PipelineRunner if isinstance(model, PipelinedModel) else Runner
    return kind(model, scheduler.pages, has_bursts=burst > 0, placement=placement)


class Engine:
    """Serves generation requests with a paged KV cache: many at once, in one flat batch a step.

    At most ``max_seqs`` of the model's requests run at a time; more wait for their turn, first come, first served. The
    tokens of a request do not depend on the others: not on the batch, the chunks, the page size or preemption. (The
    logits can differ in the last bits between batch shapes, as XLA compiles each on its own; two tokens that tie to
    that precision can change places.)

    An engine belongs to one thread: no call may be made while another is under way in a different thread.

    Whatever ends a `step` early, an error or Ctrl-C, leaves the engine usable: requests that are still wanted are
    computed again from their tokens, and `generate` and `stream` cancel theirs, so that their pages are free again.

    Args:
        model: the step to run.
        tokenizer: makes text of token ids, for the outputs' ``text`` and for stop strings; None for token ids only.
        eos_token_ids: tokens that end a request unless it says ``ignore_eos``.
        prefill_chunk: the most tokens of one prompt a step computes; None for as many as the largest bucket holds.
        max_waiting: the most requests that may wait for a slot; None for no limit.
        burst: seconds that the tokens of one call may take while all requests decode; 0 for one token a call.
        placement: of the model, if it is on a mesh.
        draw_seed: seeds of 32 bits of requests that give none.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        prefill_chunk: int | None = None,
        max_waiting: int | None = None,
        burst: float = 0.0,
        placement: Placement | None = None,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(32),
    ) -> None:
        if not 0 <= burst < float("inf"):
            raise RequestError(f"burst = {burst} cannot be used: give seconds, or 0 for one token a call")
        self._burst = burst
        self._draw_seed = draw_seed
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_waiting = max_waiting
        self._scheduler = make_scheduler(model, prefill_chunk)
        self._runner = make_runner(model, self._scheduler, burst, placement)
        self._next_id = 0
        self._live: dict[int, Request] = {}  # neither finished nor cancelled
        self._readers: dict[int, UpdateReader] = {}  # of the requests that `step` reports on

    # All at once

    def generate(
        self,
        prompts: Sequence[ArrayLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        snapshots: Snapshots | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt and return the outputs in the prompts' order.

        Args:
            prompts: a list of token ids for each request.
            params: for all requests, or one for each; None for the defaults (greedy).
            snapshots: where to go on from, if a call with these arguments was cut off, and where to keep how far it is.

        Raises:
            CheckpointError: the snapshots are of other requests.
            RequestError: a prompt is empty, has ids outside the vocabulary, or is too long with its max_tokens.
            OutOfPagesError: a request would not fit an empty cache.
        """
        requests = self._make_requests(prompts, params)
        if snapshots is not None:
            snapshots.restore(requests)
        try:
            self._add([request for request in requests if request.finish is None])
            while any(request.finish is None for request in requests):
                self._advance()
                _raise_errors(requests)
                if snapshots is not None:
                    snapshots.take(requests)
            if snapshots is not None:
                snapshots.finish()
        finally:
            self._cancel(requests)
        return [request.output() for request in requests]

    def stream(
        self,
        prompts: Sequence[ArrayLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        snapshots: Snapshots | None = None,
    ) -> Iterator[RequestUpdate]:
        """Answer every prompt and yield what comes, as it comes; ``prompt_idx`` says whose it is.

        Arguments and errors are those of `generate`; they are checked by this call, and the requests are added when the
        iterator is first advanced. Closing the iterator cancels what is unfinished. What a snapshot has comes first.
        """
        return self._stream(self._make_requests(prompts, params), snapshots)

    def _stream(self, requests: list[Request], snapshots: Snapshots | None) -> Iterator[RequestUpdate]:
        readers = [UpdateReader(request) for request in requests]
        if snapshots is not None:
            snapshots.restore(requests)
        try:
            self._add([request for request in requests if request.finish is None])
            while True:
                for reader in readers:
                    if (update := reader.read()) is not None:
                        yield update
                _raise_errors(requests)
                if all(request.finish is not None for request in requests):
                    if snapshots is not None:
                        snapshots.finish()
                    return
                self._advance()
                if snapshots is not None:
                    snapshots.take(requests)
        finally:
            self._cancel(requests)

    # Step by step

    def add_request(self, prompt: ArrayLike, params: SamplingParams | None = None) -> int:
        """Add a request for `step` to work on, and return its number. Errors are those of `generate`."""
        requests = self._make_requests([prompt], params)
        self._add(requests)
        return self._report_on(requests[0])

    def step(self) -> list[RequestUpdate]:
        """Compute one call, for all requests, and return what is new of those that `add_request` and `fork` made."""
        self._advance()
        updates = [update for reader in self._readers.values() if (update := reader.read()) is not None]
        for update in updates:
            if update.output is not None:
                del self._readers[update.request_id]
        return updates

    def fork(self, request_id: int, params: SamplingParams | None = None) -> int:
        """Start a copy of an unfinished request that goes on from its tokens so far, and return its number.

        The copy shares the pages computed so far; who first writes into a shared page gets its own. Its output has the
        tokens before the fork too, and they count towards its max_tokens.

        Args:
            request_id: the request to copy.
            params: of the copy; None for the same, with a fresh random seed.

        Raises:
            RequestError: no such request, or it has had as many tokens as the copy may have.
        """
        parent = self._live.get(request_id)
        if parent is None:
            raise RequestError(f"request {request_id} cannot be forked: it has finished, was cancelled, or never was")
        child = self._make_request(parent.tokens[: parent.num_prompt], params or replace(parent.params, seed=None))
        if child.params.logprobs is not None and parent.params.logprobs is None:
            raise RequestError(f"request {request_id} cannot be forked with log-probabilities: it has none of its own")
        child.continue_from(parent)
        if child.finish is not None:
            raise RequestError(
                f"request {request_id} cannot be forked with these sampling parameters: the {parent.num_generated} "
                f"tokens it has generated already end the copy ({child.finish.reason})"
            )
        with self._recovering():
            self._live[child.request_id] = child
            self._scheduler.fork(parent, child)
        return self._report_on(child)

    def abort(self, request_id: int) -> bool:
        """Cancel a request and free its pages. Its next update says "abort". False if it is not live (any more)."""
        request = self._live.get(request_id)
        if request is None:
            return False
        self._cancel([request])
        return True

    # State

    @property
    def has_requests(self) -> bool:
        """Something is unfinished, or finished and not yet reported by `step`."""
        return bool(self._live or self._readers)

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of one prompt a step computes. May be changed between steps; None for the largest bucket."""
        return self._scheduler.prefill_chunk

    @prefill_chunk.setter
    def prefill_chunk(self, value: int | None) -> None:
        self._scheduler.prefill_chunk = value

    @property
    def compilations(self) -> tuple[Compilation, ...]:
        """Every program compiled so far."""
        return tuple(self._runner.compilations)

    @property
    def num_replicas(self) -> int:
        """Copies of the model, each with `max_seqs` requests at once."""
        return 1

    def stats(self) -> EngineStats:
        groups = self._scheduler.pages.groups
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_preemptions=self._scheduler.num_preemptions,
            pages_free=tuple(group.num_free for group in groups),
            pages_used=tuple(group.num_used for group in groups),
        )

    def warmup(self) -> tuple[Compilation, ...]:
        """Compile everything that serving can need: a step for each bucket, the sampler, and two small programs.

        Nothing is compiled after it. Returns what this call compiled, with the seconds each took.
        """
        num_before = len(self._runner.compilations)
        self._runner.warmup()
        return self.compilations[num_before:]

    def run_rows(self, *batch: Any) -> np.ndarray[Any, Any]:
        """Logits float32[S, vocab] of a batch made by hand, see `Runner.run_rows`; only while there are no requests."""
        if self.has_requests:
            raise RequestError("no step can be run by hand while requests are in flight: finish or abort them first")
        return self._runner.run_rows(*batch)

    # The step

    def _advance(self) -> None:
        with self._recovering():
            max_steps = self._runner.num_steps_in(self._burst) if self._burst else None
            schedule = self._scheduler.schedule(max_steps=max_steps)
            if schedule is not None:
                self._take(schedule, self._runner.run(schedule))

    def _take(self, schedule: Schedule, next_tokens: list[NextToken]) -> None:
        for chunk in schedule.chunks:
            chunk.request.num_computed = schedule.stop(chunk)
        for next_token in next_tokens:
            request = next_token.request
            if request.finish is not None:
                continue  # an earlier token of this call has ended it
            if next_token.token_id is None:
                request.finish = Finish(reason="error")
            else:
                request.append(next_token.token_id, next_token.logprobs)
            if request.finish is not None:
                del self._live[request.request_id]
                self._scheduler.remove(request)
        if any(next_token.token_id is None for next_token in next_tokens):
            # NaN times a masked weight of 0 is NaN: pages that hold one must not reach another request.
            self._runner.drop_state()
            self._scheduler.reset(self._live.values())

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """For changes of the scheduler's or the device's state: if one is cut short, go back to a sound state."""
        try:
            yield
        except BaseException:
            self._recover()
            raise

    def _recover(self) -> None:
        """Begin again from the tokens of the live requests, wherever the interrupt came."""
        self._scheduler.reset(self._live.values())
        self._runner.drop_lost_state()
        # An interrupt may have come between a request's last token and the check that it is the last.
        for request in list(self._live.values()):
            request.update_finish()
            if request.finish is not None:
                del self._live[request.request_id]
                self._scheduler.remove(request)

    # Requests

    def _make_requests(
        self, prompts: Sequence[ArrayLike], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        """Checked requests, not yet added. All are made or none."""
        if params is None or isinstance(params, SamplingParams):
            each: Sequence[SamplingParams] = [params or SamplingParams()] * len(prompts)
        else:
            each = params
        if len(each) != len(prompts):
            raise RequestError(
                f"there are {len(prompts)} prompts and {len(each)} sampling parameters: "
                "give one for each prompt, or one for all"
            )
        return [
            self._make_request(prompt, one, prompt_idx=idx)
            for idx, (prompt, one) in enumerate(zip(prompts, each, strict=True))
        ]

    def _make_request(self, prompt: ArrayLike, params: SamplingParams, *, prompt_idx: int = 0) -> Request:
        tokens = self._check_prompt(prompt, prompt_idx)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need an engine with a tokenizer: give one, or use stop_token_ids")
        eos_token_ids: frozenset[int] = frozenset() if params.ignore_eos else self._eos_token_ids
        return Request(
            request_id=self._new_id(),
            prompt_idx=prompt_idx,
            prompt=tokens,
            params=params,
            seed=self._draw_seed() if params.seed is None else params.seed,
            max_new_tokens=self._check_length(len(tokens), params.max_tokens, prompt_idx),
            stop_token_ids=eos_token_ids.union(params.stop_token_ids),
            tokenizer=self._tokenizer,
        )

    def _check_prompt(self, prompt: ArrayLike, prompt_idx: int) -> list[int]:
        try:
            ids: np.ndarray[Any, Any] = np.asarray(prompt)
        except ValueError:
            ids = np.empty((0, 0))
        vocab_size = self._model.vocab_size
        if ids.size == 0 and ids.ndim == 1:
            raise RequestError(f"prompt {prompt_idx} is empty: give at least one token id")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError(
                f"prompt {prompt_idx} is not a list of token ids: give whole numbers from 0 to {vocab_size - 1}, "
                "a list of them for each prompt"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if outside.size:
            raise RequestError(
                f"prompt {prompt_idx} has token id {ids[outside[0]]} at index {outside[0]}: "
                f"the model's vocabulary has ids from 0 to {vocab_size - 1}"
            )
        tokens: list[int] = ids.tolist()
        return tokens

    def _check_length(self, num_prompt: int, max_tokens: int | None, prompt_idx: int) -> int:
        """The most new tokens. The last one is only sampled: its keys and values never enter the cache."""
        max_seq_len, max_cached = self._model.max_seq_len, self._scheduler.pages.max_len
        num_new = max_tokens or max(1, min(max_seq_len, max_cached + 1) - num_prompt)
        if num_prompt + num_new > max_seq_len:
            raise RequestError(
                f"prompt {prompt_idx} has {num_prompt} tokens, which with {num_new} new ones are more than "
                f"max_seq_len = {max_seq_len}: shorten the prompt or lower max_tokens"
            )
        if num_prompt + num_new - 1 > max_cached:
            raise OutOfPagesError(
                f"prompt {prompt_idx} has {num_prompt} tokens, which with {num_new} new ones are more than the "
                f"{max_cached} that the KV cache holds: build the decoder with a larger num_pages or lower max_tokens"
            )
        return num_new

    def _add(self, requests: list[Request]) -> None:
        num_free_slots = self._model.max_seqs - len(self._live)
        if self._max_waiting is not None and len(requests) > num_free_slots + self._max_waiting:
            raise RequestError(
                f"{len(requests)} requests are more than the {max(0, num_free_slots)} free of max_seqs = "
                f"{self._model.max_seqs} slots and max_waiting = {self._max_waiting} allow: send fewer at once"
            )
        with self._recovering():
            for request in requests:
                self._live[request.request_id] = request
                self._scheduler.add(request)

    def _cancel(self, requests: list[Request]) -> None:
        """Cancel those that are still live."""
        with self._recovering():
            for request in requests:
                if self._live.pop(request.request_id, None) is not None:
                    request.finish = Finish(reason="abort")
                    self._scheduler.remove(request)

    def _report_on(self, request: Request) -> int:
        self._readers[request.request_id] = UpdateReader(request)
        return request.request_id

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id


def _raise_errors(requests: list[Request]) -> None:
    broken = [str(request.request_id) for request in requests if request.finish == Finish(reason="error")]
    if broken:
        raise RequestError(
            f"the model's logits for request {', '.join(broken)} are not numbers (NaN or infinity), so no token can be "
            "chosen: check the weights, or compute in a wider dtype"
        )
