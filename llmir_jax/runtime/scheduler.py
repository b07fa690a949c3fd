"""Which tokens of which requests the next step computes.

First come, first served. Every step carries one token of each decoding request, and what room is left goes to chunks
of prompts, in the order of arrival: one flat batch, padded to a bucket. A waiting request is let in when the cache has
room for all of its tokens. When a running one finds no page, the youngest running request gives its pages back and
waits; later its tokens are computed again, so preemption costs time and changes no token. The oldest request can always
go on, hence so does the whole.

Where all running requests decode, one call may compute several tokens of each, one after another: as many as it is told
if no request ends before, and if there are pages for them without a preemption.
"""

import bisect
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from llmir_jax.errors import RequestError
from llmir_jax.runtime.batch import CacheGroup
from llmir_jax.runtime.pages import CachePages, PageCopy
from llmir_jax.runtime.request import Request


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens ``start`` to ``stop`` of a request, computed in one step; the next is sampled if they are its last."""

    request: Request
    slot: int
    start: int
    stop: int
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One call: the page copies to make first, then the chunks side by side, padded to ``bucket`` rows.

    With ``num_steps`` every chunk is a request's last token, and that many steps follow each other, each with the token
    that the one before has sampled. None: one step, after which the last token's log-probabilities are known too.
    """

    copies: tuple[PageCopy, ...]
    chunks: tuple[Chunk, ...]
    bucket: int
    num_steps: int | None = None

    @cached_property
    def ending(self) -> list[Chunk]:
        """Those that end their requests' tokens, after each of which one is sampled."""
        return [chunk for chunk in self.chunks if chunk.is_last]

    @cached_property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest tokens are all that is sampled."""
        return all(chunk.request.params.is_plain_greedy for chunk in self.ending)

    def stop(self, chunk: Chunk) -> int:
        """The end of what the call computes of a request."""
        return chunk.stop + (self.num_steps or 1) - 1


class Scheduler:
    """The requests that run and those that wait, and the pages they hold.

    Args:
        groups: the cache groups.
        max_seqs: requests that run at once (slots).
        max_seq_len: the longest sequence in tokens.
        buckets: row counts a step can have, rising.
        prefill_chunk: the most tokens of one prompt a step computes; None for as many as the largest bucket holds.
    """

    def __init__(
        self,
        *,
        groups: Iterable[CacheGroup],
        max_seqs: int,
        max_seq_len: int,
        buckets: tuple[int, ...],
        prefill_chunk: int | None = None,
    ) -> None:
        assert buckets and list(buckets) == sorted(set(buckets)) and buckets[0] > 0, "buckets rise from 1 or more"
        self.pages = CachePages(groups, max_seq_len=max_seq_len)
        self.running: list[Request] = []  # both lists in the order of arrival
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        self._max_seqs = max_seqs
        self._buckets = buckets
        self._free_slots = list(range(max_seqs))  # a heap: low slots first
        self.prefill_chunk = prefill_chunk

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of one prompt a step computes. May be changed between steps; changes no token."""
        return self._prefill_chunk

    @prefill_chunk.setter
    def prefill_chunk(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise RequestError(f"prefill_chunk = {value} cannot be used: give a number of tokens from 1 up, or None")
        self._prefill_chunk = min(value or self._buckets[-1], self._buckets[-1])

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        bisect.insort(self.waiting, request, key=_arrival)

    def fork(self, parent: Request, child: Request) -> None:
        """Start ``child``, which has ``parent``'s tokens, on shared pages; if no slot is free it waits."""
        if parent.slot is None or not self._free_slots:
            self.add(child)
            return
        self.pages.fork(parent.request_id, child.request_id)
        child.num_computed = parent.num_computed
        self._start(child)

    def remove(self, request: Request) -> None:
        """Forget a request that has finished or was cancelled, and free its pages."""
        if request.slot is not None:
            self._stop(request)
        elif request in self.waiting:  # not if an interrupt came before it was added
            self.waiting.remove(request)

    def reset(self, requests: Iterable[Request]) -> None:
        """Begin again with these requests waiting and all pages free, whatever state an interrupt has left."""
        requests = sorted(requests, key=_arrival)
        for request in requests:
            request.evict()
        self.pages.reset()
        self.running = []
        self.waiting = requests
        self._free_slots = list(range(self._max_seqs))

    def schedule(self, *, max_steps: int | None = None) -> Schedule | None:
        """Choose the next step, or up to `max_steps` of decoding, and reserve pages. None if there is no request."""
        for request in self.running:
            self.pages.slide(request.request_id, request.num_computed)
        chunks: list[Chunk] = []
        copies: list[PageCopy] = []
        num_preempted_before = self.num_preemptions
        num_rows = self._choose_rows()
        for request, num_tokens in self._share_rows(num_rows):
            stop = self._make_room(request, num_tokens)
            if stop > request.num_computed:
                chunks.append(self._reserve(request, stop, copies))
        # Right after a preemption there is no room; letting the same request in again would only thrash.
        if self.num_preemptions == num_preempted_before:
            self._admit(num_rows, chunks, copies)
        if not chunks:
            assert not self.waiting and not self.running, "a request that fits an empty cache is always let in"
            return None
        bucket = self._bucket_for(sum(chunk.stop - chunk.start for chunk in chunks))
        num_steps = None
        if max_steps is not None and all(chunk.is_last and chunk.start + 1 == chunk.stop for chunk in chunks):
            num_steps = self._choose_steps(chunks, max_steps)
        if num_steps is not None:
            for chunk in chunks:
                copies += self.pages.reserve(chunk.request.request_id, chunk.stop, chunk.start + num_steps)
        return Schedule(copies=tuple(copies), chunks=tuple(chunks), bucket=bucket, num_steps=num_steps)

    def _choose_steps(self, chunks: list[Chunk], most: int) -> int | None:
        """How many steps of decoding can follow each other; None where each step's log-probabilities are wanted."""
        if any(chunk.request.params.logprobs is not None for chunk in chunks):
            return None
        num_steps = min(most, *(chunk.request.max_new_tokens - chunk.request.num_generated for chunk in chunks))
        while num_steps > 1 and not self._has_pages(chunks, num_steps):
            num_steps //= 2
        return max(num_steps, 1)

    def _has_pages(self, chunks: list[Chunk], num_steps: int) -> bool:
        """Whether so many steps find pages, after those that the first has taken."""
        return all(
            sum(group.num_needed(c.request.request_id, c.stop, c.start + num_steps) for c in chunks) <= group.num_free
            for group in self.pages.groups
        )

    def _bucket_for(self, num_rows: int) -> int:
        return next((size for size in self._buckets if size >= num_rows), self._buckets[-1])

    def _choose_rows(self) -> int:
        """The most rows this step may have: all that are wanted, or the next lower bucket if that wastes much less.

        70 tokens are better computed as 64 and then 6 than padded to 512. Two steps instead of one is all it may cost.
        """
        candidates = [*self.running, *self.waiting[: len(self._free_slots)]]
        num_wanted = sum(min(request.num_uncomputed, self.prefill_chunk) for request in candidates)
        num_decoding = sum(request.num_uncomputed == 1 for request in self.running)
        bucket = self._bucket_for(num_wanted)
        lower = max((size for size in self._buckets if size < bucket), default=bucket)
        saves_half = num_wanted <= 2 * lower and 4 * lower <= bucket
        return lower if saves_half and 2 * num_decoding <= lower else bucket

    def _share_rows(self, num_rows: int) -> list[tuple[Request, int]]:
        """How many tokens of each running request the step should take: decoding ones first, then prompts."""
        num_left = num_rows
        shares = {}
        for request in sorted(self.running, key=lambda request: request.num_uncomputed > 1):
            shares[request.request_id] = min(request.num_uncomputed, self.prefill_chunk, num_left)
            num_left -= shares[request.request_id]
        return [(request, shares[request.request_id]) for request in self.running if shares[request.request_id]]

    def _make_room(self, request: Request, num_tokens: int) -> int:
        """The end of the longest chunk there are pages for, preempting the youngest while that is no token at all.

        Only requests younger than this one are preempted before it, and they are scheduled after it: what has been
        reserved for this step stays reserved.
        """
        start = request.num_computed
        while request.slot is not None:
            stop = self.pages.longest(request.request_id, start, start + num_tokens)
            if stop > start:
                return stop
            self._preempt(self.running[-1])
        return 0

    def _reserve(self, request: Request, stop: int, copies: list[PageCopy]) -> Chunk:
        assert request.slot is not None
        copies += self.pages.reserve(request.request_id, request.num_computed, stop)
        is_last = stop == request.num_tokens
        return Chunk(request=request, slot=request.slot, start=request.num_computed, stop=stop, is_last=is_last)

    def _admit(self, num_rows: int, chunks: list[Chunk], copies: list[PageCopy]) -> None:
        """Start waiting requests, in order, while there are slots, rows and pages for all of their tokens."""
        num_left = num_rows - sum(chunk.stop - chunk.start for chunk in chunks)
        while self.waiting and self._free_slots and num_left and self._has_room(self.waiting[0]):
            request = self.waiting.pop(0)
            self.pages.add(request.request_id)
            self._start(request)
            wanted = min(request.num_tokens, self.prefill_chunk, num_left)
            stop = self.pages.longest(request.request_id, 0, wanted)
            chunks.append(self._reserve(request, stop, copies))
            num_left -= stop

    def _has_room(self, request: Request) -> bool:
        """Pages are left for all of the request's tokens, after those that the running ones are about to take."""
        if not self.running:
            return True  # the engine takes no request that an empty cache cannot hold
        for group in self.pages.groups:
            num_needed = group.peak_pages(request.num_tokens, chunk=self.prefill_chunk)
            for other in self.running:
                peak = group.peak_pages(other.num_tokens, chunk=self.prefill_chunk)
                # One more than its tokens need now, or its next page would preempt the request let in.
                num_needed += max(0, peak - len(group.pages_of(other.request_id))) + 1
            if num_needed > group.num_free:
                return False
        return True

    def _start(self, request: Request) -> None:
        request.slot = heapq.heappop(self._free_slots)
        bisect.insort(self.running, request, key=_arrival)

    def _stop(self, request: Request) -> None:
        assert request.slot is not None
        self.running.remove(request)
        self.pages.remove(request.request_id)
        heapq.heappush(self._free_slots, request.slot)
        request.evict()

    def _preempt(self, request: Request) -> None:
        self._stop(request)
        self.add(request)
        request.num_preemptions += 1
        self.num_preemptions += 1


def _arrival(request: Request) -> int:
    return request.request_id
