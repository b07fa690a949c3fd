"""The device's side of the engine: the cache, the sampler's state, and the few compiled programs that change them.

The programs are: the model's step with the argmax of its logits, one a bucket; the sampler, run after the step only if
a request wants more than the argmax; steps of decoding that follow each other, with the argmax or the sampler between
them; the fill of a slot's seen tokens; and the copy of pages. The state is donated to each, so that none copies the
cache. A call takes one host array in, or two, and at most one comes back.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from llmir_jax.placement import Placement, run_in_turn
from llmir_jax.runtime import sampler
from llmir_jax.runtime.batch import Cache, StepBatch, StepModel
from llmir_jax.runtime.outputs import TokenLogprobs
from llmir_jax.runtime.packing import Field, Packing
from llmir_jax.runtime.pages import CachePages, PageCopy
from llmir_jax.runtime.request import Request
from llmir_jax.runtime.scheduler import Chunk, Schedule

T = TypeVar("T")

MAX_STEPS = 16
"""The most steps of decoding in one call."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """A program that was compiled: ``bucket`` is a step's number of token rows, None for the programs without one."""

    program: str
    bucket: int | None
    seconds: float  # of tracing and compiling


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """The token sampled for a request; None if its logits are not numbers."""

    request: Request
    token_id: int | None
    logprobs: TokenLogprobs | None


class Runner:
    """Runs schedules on the device.

    Args:
        model: the step, and the sizes of its batch.
        pages: block tables of the sequences that are scheduled.
        has_bursts: whether schedules have steps that follow each other.
        placement: of the model, if it is on a mesh.
    """

    def __init__(
        self,
        model: StepModel,
        pages: CachePages,
        *,
        has_bursts: bool = False,
        placement: Placement | None = None,
    ) -> None:
        self._placement = placement
        self._is_here = placement is None or placement.is_here
        """Whether logits are in this process. Those of a pipeline are where its last stage is."""
        self.compilations: list[Compilation] = []
        self._model = model
        self._pages = pages
        self._num_traces = 0
        self._rows_packing = sampler.rows_packing(model.max_seqs)
        self._tokens_packing = sampler.tokens_packing(model.max_seqs, model.vocab_size)
        self._step_packings = {bucket: self._step_packing(bucket) for bucket in model.buckets}
        self._steps = {bucket: self._make_step(packing) for bucket, packing in self._step_packings.items()}
        self._bursts = {
            bucket: self._jit(partial(self._trace_burst, packing), donate_argnames=("cache", "seen"))
            for bucket, packing in self._step_packings.items()
            if has_bursts and bucket <= min(b for b in model.buckets if b >= min(model.max_seqs, model.buckets[-1]))
        }
        self._step_seconds: float | None = None  # of a step of decoding, when last measured
        self._sample = self._jit(self._trace_sample, donate_argnames="seen")
        self._fill_seen = jax.jit(self._trace_fill_seen, donate_argnames="seen")
        self._copy_pages = self._make_copy()
        self._cache: Cache | None = model.init_cache()
        self._seen: jax.Array | None = self._init_seen() if self._is_here else None

    @cached_property
    def _in_turn(self) -> bool:
        """Whether each program must end before the next is launched."""
        return self._placement is not None and run_in_turn(self._placement.mesh)

    def _jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return jax.jit(function, compiler_options=self._model.compiler_options or None, **options)

    def _make_step(self, packing: Packing) -> Callable[..., tuple[jax.Array | None, jax.Array | None, Any]]:
        """The model's step: (params, cache, packed batch) → logits, their argmax, new cache."""
        return self._jit(partial(self._trace_step, packing), donate_argnames="cache")

    def _make_copy(self) -> Callable[..., Any]:
        """(cache, pages to copy, where to) → new cache."""
        return jax.jit(self._trace_copy_pages, donate_argnames="cache")

    # Running

    def run(self, schedule: Schedule) -> list[NextToken]:
        """Make the page copies, compute the chunks, and sample a token for each that ends its request's tokens.

        Waits for the device only if a token is sampled.
        """
        return self.read(schedule, self.launch(schedule)())

    def launch(self, schedule: Schedule) -> Callable[[], NDArray[np.int32] | None]:
        """The device's part of `run`, without waiting for it: the function waits, and gives what comes back.

        That is of `result_shape`, or None if no token is sampled.
        """
        if schedule.copies:
            self._run_copies(schedule.copies)
        if schedule.num_steps is not None:
            return self._launch_burst(schedule, schedule.num_steps)
        logits, greedy = self._run_step(self._pack_batch(schedule), schedule.bucket)
        shape = self.result_shape(schedule)
        if shape is None:
            return lambda: None
        if logits is not None and not schedule.is_plain_greedy:
            for chunk in schedule.ending:
                self._ensure_seen(chunk)
            greedy = self._run_sampler(logits, self._pack_rows(schedule.ending))
        return partial(self._fetch, greedy, shape)

    def _fetch(self, chosen: jax.Array | None, shape: tuple[int, ...]) -> NDArray[np.int32]:
        """What has been chosen, of this shape, on the host."""
        assert chosen is not None
        return np.asarray(chosen)

    def result_shape(self, schedule: Schedule) -> tuple[int, ...] | None:
        """Of the int32 that come back; None if there are none."""
        if schedule.num_steps is not None:
            return MAX_STEPS, self._model.max_seqs
        if not schedule.ending:
            return None
        return (self._model.max_seqs,) if schedule.is_plain_greedy else (self._tokens_packing.size,)

    @property
    def sampled_size(self) -> int:
        """Of the int32 that come back where they are not likeliest tokens alone."""
        return self._tokens_packing.size

    def read(self, schedule: Schedule, values: NDArray[np.int32] | None) -> list[NextToken]:
        """The host's part of `run`, of what has come back here or in another process."""
        if values is None:
            return []
        if schedule.num_steps is not None:
            rows = values[: schedule.num_steps]
            return [self._next_token(chunk, row[chunk.slot]) for row in rows for chunk in schedule.chunks]
        if schedule.is_plain_greedy:
            return [self._next_token(chunk, values[chunk.slot]) for chunk in schedule.ending]
        fields = self._tokens_packing.views(values)
        return [
            self._next_token(chunk, *(fields[name][chunk.slot] for name in sampler.SampledTokens._fields))
            for chunk in schedule.ending
        ]

    def num_steps_in(self, seconds: float) -> int:
        """How many steps of decoding fit, by the time that they took last; 1 while that is not known."""
        if self._step_seconds is None:
            return 1
        return max(1, min(MAX_STEPS, int(seconds / self._step_seconds)))

    def run_rows(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        seq_ids: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        logits_rows: NDArray[np.int32],
        block_tables: Sequence[NDArray[np.int32]],
    ) -> NDArray[np.float32]:
        """Run the model's step on a batch made by hand, over pages of its own choice; logits float32[S, vocab].

        For checks of the step: it writes to the pages that it names, so nothing else may be in the cache.
        """
        bucket = min(b for b in self._model.buckets if b >= len(tokens))
        buffer, views = self._step_packings[bucket].allocate()
        for name, values in (("tokens", tokens), ("positions", positions), ("seq_ids", seq_ids)):
            views[name][: len(values)] = values
        views["num_tokens"][...] = len(tokens)
        views["seq_lens"][...] = seq_lens
        views["logits_rows"][...] = logits_rows
        for idx, table in enumerate(block_tables):
            views[_table_name(idx)][...] = table
        logits, _ = self._run_step(buffer, bucket)
        return self._logits_on_host(logits)

    def _logits_on_host(self, logits: jax.Array | None) -> NDArray[np.float32]:
        assert logits is not None
        return np.asarray(logits) if self._placement is None else self._placement.to_host(logits)

    def warmup(self) -> None:
        """Compile every program, by running each on nothing: the cache's contents stay as they are."""
        for bucket in self._model.buckets:
            packed, _ = self._step_packings[bucket].allocate()
            logits, _ = self._run_step(packed, bucket)
        packed, _ = self._rows_packing.allocate()
        if logits is not None:  # else the last stage of a pipeline is another process's
            self._run_sampler(logits, packed).block_until_ready()
        for bucket in self._bursts:
            buffer, _ = self._step_packings[bucket].allocate()
            for rows in (None, packed):
                self._call_burst(buffer, rows, bucket).block_until_ready()
        self._run_copies(())
        if logits is not None:
            self._run_fill_seen(self._model.max_seqs, [])  # a slot that does not exist: nothing is filled

    def drop_state(self) -> None:
        """Throw the device's state away, for example because it may hold NaNs; the next step begins with zeros."""
        self._cache = self._seen = None

    def drop_lost_state(self) -> None:
        """Throw away what was donated to a step that did not come back; the rest stays."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves((self._cache, self._seen))):
            self.drop_state()

    # Calls of the compiled programs. Each puts the new state in place of the one it donated.

    def _run_step(self, packed: NDArray[np.int32], bucket: int) -> tuple[jax.Array | None, jax.Array | None]:
        cache = self._model.init_cache() if self._cache is None else self._cache
        call = partial(self._steps[bucket], self._model.params, cache, packed)
        logits, greedy, self._cache = self._timed("step", bucket, call)
        return logits, greedy

    def _launch_burst(self, schedule: Schedule, num_steps: int) -> Callable[[], NDArray[np.int32]]:
        rows = None
        if not schedule.is_plain_greedy:
            for chunk in schedule.chunks:
                self._ensure_seen(chunk)
            rows = self._pack_rows(list(schedule.chunks))
        packed = self._pack_batch(schedule)
        num_traces, start = self._num_traces, time.perf_counter()
        tokens = self._call_burst(packed, rows, schedule.bucket)
        is_timed = self._num_traces == num_traces

        def fetch() -> NDArray[np.int32]:
            found = np.asarray(tokens)
            if is_timed:
                self._step_seconds = (time.perf_counter() - start) / num_steps
            return found

        return fetch

    def _call_burst(self, packed: NDArray[np.int32], rows: NDArray[np.int32] | None, bucket: int) -> jax.Array:
        """Tokens int32[MAX_STEPS, S]. `rows` are the sampler's, None for argmaxes."""
        cache = self._model.init_cache() if self._cache is None else self._cache
        seen = None
        if rows is not None:
            seen = self._init_seen() if self._seen is None else self._seen
        call = partial(self._bursts[bucket], self._model.params, cache, seen, packed, rows)
        tokens: jax.Array
        tokens, self._cache, seen = self._timed("steps" if rows is None else "steps and samples", bucket, call)
        if seen is not None:
            self._seen = seen
        return tokens

    def _run_sampler(self, logits: jax.Array, packed: NDArray[np.int32]) -> jax.Array:
        seen = self._init_seen() if self._seen is None else self._seen
        tokens: jax.Array
        tokens, self._seen = self._timed("sample", None, partial(self._sample, seen, logits, packed))
        return tokens

    def _run_fill_seen(self, slot: int, tokens: list[int]) -> None:
        seen = self._init_seen() if self._seen is None else self._seen
        padded = np.full(self._model.max_seq_len, self._model.vocab_size, np.int32)
        padded[: len(tokens)] = tokens
        call = partial(self._fill_seen, seen, np.int32(slot), padded)
        self._seen = self._timed("fill seen tokens", None, call)

    def _run_copies(self, copies: tuple[PageCopy, ...]) -> None:
        """At most one page a group and sequence is copied in a step: the one it goes on writing."""
        groups = self._model.cache_groups
        # Rows that are not needed copy to a page past the end, which is dropped.
        targets = np.array([[group.num_pages] * self._model.max_seqs for group in groups], np.int32)
        sources = np.zeros_like(targets)
        num_copies = [0] * len(groups)
        for copy in copies:
            sources[copy.group, num_copies[copy.group]] = copy.source
            targets[copy.group, num_copies[copy.group]] = copy.target
            num_copies[copy.group] += 1
        cache = self._model.init_cache() if self._cache is None else self._cache
        self._cache = self._timed("copy pages", None, partial(self._copy_pages, cache, sources, targets))

    def _timed(self, program: str, bucket: int | None, call: Callable[[], T]) -> T:
        num_traces = self._num_traces
        start = time.perf_counter()
        result = call()
        if self._in_turn:
            jax.block_until_ready(result)
        if self._num_traces != num_traces:
            seconds = time.perf_counter() - start
            self.compilations.append(Compilation(program=program, bucket=bucket, seconds=seconds))
        return result

    # The programs, as they are traced

    def _trace_step(
        self, packing: Packing, params: Any, cache: Cache, packed: jax.Array
    ) -> tuple[jax.Array, jax.Array, Cache]:
        self._num_traces += 1
        _, batch = self._unpack_batch(packing, packed)
        logits, cache = self._model.step(params, cache, batch)
        return logits, self._whole(sampler.greedy(logits)), cache

    def _trace_burst(
        self,
        packing: Packing,
        params: Any,
        cache: Cache,
        seen: jax.Array | None,
        packed: jax.Array,
        packed_rows: jax.Array | None,
    ) -> tuple[jax.Array, Cache, jax.Array | None]:
        self._num_traces += 1
        num_steps, first = self._unpack_batch(packing, packed)
        rows = None if packed_rows is None else sampler.SamplingRows(**self._rows_packing.unpack(packed_rows))

        def one(
            i: jax.Array, state: tuple[jax.Array, Cache, jax.Array | None, jax.Array]
        ) -> tuple[jax.Array, Cache, jax.Array | None, jax.Array]:
            tokens, cache, seen, chosen = state
            batch = first._replace(
                tokens=tokens,
                positions=first.positions + i,
                seq_lens=jnp.where(first.seq_lens > 0, first.seq_lens + i, 0),
            )
            logits, cache = self._model.step(params, cache, batch)
            if rows is None:
                new = sampler.greedy(logits)
            else:
                assert seen is not None
                sampled, seen = self._sample_on_each(logits, seen, rows._replace(token_idx=rows.token_idx + i))
                new = sampled.token
            return new[first.seq_ids], cache, seen, chosen.at[i].set(new)

        chosen = jnp.zeros((MAX_STEPS, self._model.max_seqs), jnp.int32)
        _, cache, seen, chosen = lax.fori_loop(0, num_steps, one, (first.tokens, cache, seen, chosen))
        return self._whole(chosen), cache, seen

    def _unpack_batch(self, packing: Packing, packed: jax.Array) -> tuple[jax.Array, StepBatch]:
        """The number of steps, and the first one's batch."""
        fields = packing.unpack(packed)
        tables = tuple(fields.pop(_table_name(idx)) for idx in range(len(self._model.cache_groups)))
        return fields.pop("num_steps"), StepBatch(**fields, block_tables=tables)

    def _trace_sample(self, seen: jax.Array, logits: jax.Array, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
        self._num_traces += 1
        rows = sampler.SamplingRows(**self._rows_packing.unpack(packed))
        tokens, seen = self._sample_on_each(logits, seen, rows)
        return self._whole(sampler.pack_tokens(tokens)), seen

    def _sample_on_each(
        self, logits: jax.Array, seen: jax.Array, rows: sampler.SamplingRows
    ) -> tuple[sampler.SampledTokens, jax.Array]:
        """On a mesh every device samples for itself: XLA (of JAX 0.10) aborts on a top_k that it partitions on CPUs."""
        if self._placement is None:
            return sampler.sample(logits, seen, rows)
        return self._placement.on_each(sampler.sample)(logits, seen, rows)

    def _trace_fill_seen(self, seen: jax.Array, slot: jax.Array, tokens: jax.Array) -> jax.Array:
        self._num_traces += 1
        return sampler.fill_seen(seen, slot, tokens)

    def _trace_copy_pages(self, cache: Cache, sources: jax.Array, targets: jax.Array) -> Cache:
        self._num_traces += 1
        return tuple(
            jax.tree.map(lambda pages, s=source, t=target: pages.at[t].set(pages[s], mode="drop"), layers)
            for layers, source, target in zip(cache, sources, targets, strict=True)
        )

    # Host arrays

    def _step_packing(self, bucket: int) -> Packing:
        num_seqs = self._model.max_seqs
        return Packing(
            (
                Field(name="tokens", shape=(bucket,)),
                Field(name="positions", shape=(bucket,)),
                Field(name="seq_ids", shape=(bucket,)),
                Field(name="num_tokens", shape=()),
                Field(name="num_steps", shape=()),
                Field(name="seq_lens", shape=(num_seqs,)),
                Field(name="logits_rows", shape=(num_seqs,)),
                *(
                    Field(name=_table_name(idx), shape=(num_seqs, group.table_len))
                    for idx, group in enumerate(self._pages.groups)
                ),
            )
        )

    def _pack_batch(self, schedule: Schedule) -> NDArray[np.int32]:
        buffer, views = self._step_packings[schedule.bucket].allocate()
        begin = 0
        for chunk in schedule.chunks:
            end = begin + chunk.stop - chunk.start
            views["tokens"][begin:end] = chunk.request.tokens[chunk.start : chunk.stop]
            views["positions"][begin:end] = np.arange(chunk.start, chunk.stop)
            views["seq_ids"][begin:end] = chunk.slot
            views["seq_lens"][chunk.slot] = chunk.stop
            views["logits_rows"][chunk.slot] = end - 1 if chunk.is_last else 0
            for idx, group in enumerate(self._pages.groups):
                views[_table_name(idx)][chunk.slot] = group.table(chunk.request.request_id)
            begin = end
        views["num_tokens"][...] = begin
        views["num_steps"][...] = schedule.num_steps or 1
        return buffer

    def _pack_rows(self, chunks: list[Chunk]) -> NDArray[np.int32]:
        buffer, views = self._rows_packing.allocate()
        for chunk in chunks:
            request, params = chunk.request, chunk.request.params
            values = {
                "is_sampled": 1,
                "token_idx": request.num_generated,
                "seed": sampler.seed_words(request.seed),
                "temperature": 0 if params.is_greedy else params.temperature,
                "top_k": min(params.top_k or 0, self._model.vocab_size),
                "top_p": params.top_p if params.top_p < 1 else 0,
                "min_p": params.min_p,
                "repetition_penalty": 0 if params.repetition_penalty == 1 else params.repetition_penalty,
                "wants_logprobs": 0 if params.logprobs is None else 1,
            }
            for name, value in values.items():
                views[name][chunk.slot] = value
        return buffer

    def _ensure_seen(self, chunk: Chunk) -> None:
        """Tell the sampler which tokens a request has had, once each time it gets a slot; later ones it counts."""
        request = chunk.request
        if request.is_seen_filled or request.params.repetition_penalty == 1:
            return
        self._run_fill_seen(chunk.slot, request.tokens)
        request.is_seen_filled = True

    def _next_token(
        self,
        chunk: Chunk,
        token: np.int32,
        logprob: np.float32 | None = None,
        top_ids: NDArray[np.int32] | None = None,
        top_logprobs: NDArray[np.float32] | None = None,
    ) -> NextToken:
        token_id = int(token)
        if token_id >= self._model.vocab_size:
            return NextToken(request=chunk.request, token_id=None, logprobs=None)
        num_top = chunk.request.params.logprobs
        if num_top is None or logprob is None or top_ids is None or top_logprobs is None:
            return NextToken(request=chunk.request, token_id=token_id, logprobs=None)
        top = tuple(zip(top_ids[:num_top].tolist(), top_logprobs[:num_top].tolist(), strict=True))
        logprobs = TokenLogprobs(token_id=token_id, logprob=float(logprob), top=top)
        return NextToken(request=chunk.request, token_id=token_id, logprobs=logprobs)

    def _init_seen(self) -> jax.Array:
        shape = (self._model.max_seqs, self._model.vocab_size)
        return jnp.zeros(shape, bool) if self._placement is None else self._placement.zeros(shape, bool)

    def _whole(self, array: jax.Array) -> jax.Array:
        """A traced result that the host reads: on a mesh, whole on every device."""
        return array if self._placement is None else self._placement.constrain(array)


def _table_name(group_idx: int) -> str:
    return f"block_table_{group_idx}"
