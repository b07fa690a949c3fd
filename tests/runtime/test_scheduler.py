"""The scheduler without a device: what each step reads through the block tables must be what was written there."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmir_jax.errors import RequestError
from llmir_jax.runtime.batch import CacheGroup
from llmir_jax.runtime.request import Request
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.runtime.scheduler import Schedule, Scheduler

WINDOWS = (None, 5)
MAX_LEN = 40


def make_scheduler(
    *,
    num_pages=(20, 20),
    page_size=4,
    max_seqs=3,
    buckets=(2, 8, 32),
    prefill_chunk=None,
    windows=WINDOWS,
    max_seq_len=MAX_LEN,
) -> Scheduler:
    groups = [
        CacheGroup(
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            dtype=np.float32,
            window=window,
            num_pages=num,
            page_size=page_size,
        )
        for num, window in zip(num_pages, windows, strict=True)
    ]
    return Scheduler(
        groups=groups, max_seqs=max_seqs, max_seq_len=max_seq_len, buckets=buckets, prefill_chunk=prefill_chunk
    )


def make_request(request_id: int, num_prompt: int, num_new: int) -> Request:
    return Request(
        request_id=request_id,
        prompt_idx=0,
        prompt=[1000 * request_id + i for i in range(num_prompt)],
        params=SamplingParams(),
        seed=0,
        max_new_tokens=num_new,
        stop_token_ids=frozenset(),
        tokenizer=None,
    )


@dataclass
class FakeDevice:
    """Pages that hold the token of each position. Taking a step checks all that its queries may read."""

    scheduler: Scheduler
    pages: list[np.ndarray] = field(init=False)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.pages = [np.full((g.num_pages, g.page_size), -1) for g in self.scheduler.pages.groups]

    def step(self) -> Schedule | None:
        schedule = self.scheduler.schedule()
        if schedule is None:
            return None
        self.num_steps += 1
        old = [pages.copy() for pages in self.pages]
        for copy in schedule.copies:
            self.pages[copy.group][copy.target] = old[copy.group][copy.source]
        assert len({chunk.slot for chunk in schedule.chunks}) == len(schedule.chunks)
        assert 0 < sum(chunk.stop - chunk.start for chunk in schedule.chunks) <= schedule.bucket
        for chunk in schedule.chunks:
            assert chunk.start == chunk.request.num_computed < chunk.stop <= chunk.request.num_tokens
            self.compute(chunk, chunk.start, chunk.stop, write=True)
        for chunk in schedule.chunks:  # after all writes of the step, as on the device
            self.compute(chunk, chunk.start, chunk.stop, write=False)
        for chunk in schedule.chunks:
            chunk.request.num_computed = chunk.stop
            if chunk.is_last:
                chunk.request.append(hash(tuple(chunk.request.tokens)) % 1000)
                if chunk.request.finish is not None:
                    self.scheduler.remove(chunk.request)
        return schedule

    def compute(self, chunk, start: int, stop: int, *, write: bool) -> None:
        tokens = np.array(chunk.request.tokens)
        for pages, group in zip(self.pages, self.scheduler.pages.groups, strict=True):
            table, size = group.table(chunk.request.request_id), group.page_size
            lowest = 0 if group.window is None else max(0, start - group.window + 1)
            positions = np.arange(start, stop) if write else np.arange(lowest, stop)
            if write:
                pages[table[positions // size], positions % size] = tokens[positions]
            else:
                np.testing.assert_array_equal(pages[table[positions // size], positions % size], tokens[positions])

    def finish(self, *requests: Request) -> None:
        """Run to the end; every request's tokens are those it would have alone."""
        while self.step() is not None:
            assert self.num_steps < 5000
        for group in self.scheduler.pages.groups:
            assert group.num_free == group.num_pages
        assert not self.scheduler.running and not self.scheduler.waiting
        for request in requests:
            assert request.finish is not None
            tokens = request.tokens[: request.num_prompt]
            while len(tokens) < request.num_tokens:
                tokens.append(hash(tuple(tokens)) % 1000)
            assert tokens == request.tokens


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_mix_is_computed_right_and_frees_all_pages(data: st.DataObject):
    page_size = data.draw(st.integers(1, 6), "page size")
    least = -(-MAX_LEN // page_size)
    num_pages = data.draw(st.tuples(st.integers(least, 2 * least), st.integers(-(-5 // page_size) + 2, least)), "pages")
    scheduler = make_scheduler(
        num_pages=num_pages,
        page_size=page_size,
        max_seqs=data.draw(st.integers(1, 4), "slots"),
        buckets=data.draw(st.sampled_from([(1,), (2, 8, 32), (4, 64), (8,)]), "buckets"),
        prefill_chunk=data.draw(st.sampled_from([None, 1, 3, 7]), "chunk"),
    )
    assert scheduler.pages.max_len == MAX_LEN
    device = FakeDevice(scheduler)
    numbers = itertools.count(1)
    requests: list[Request] = []
    for _ in range(data.draw(st.integers(1, 25), "actions")):
        live = [request for request in requests if request.finish is None]
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "fork", "remove", "reset"]))
        if action == "add" and len(requests) < 8:
            num_prompt = data.draw(st.integers(1, MAX_LEN - 1))
            requests.append(make_request(next(numbers), num_prompt, data.draw(st.integers(1, MAX_LEN - num_prompt))))
            scheduler.add(requests[-1])
        elif action == "step":
            device.step()
        elif action == "fork" and live and len(requests) < 8:
            parent = data.draw(st.sampled_from(live))
            child = make_request(next(numbers), parent.num_prompt, parent.max_new_tokens)
            child.tokens[:] = parent.tokens[: parent.num_prompt]
            child.continue_from(parent)
            requests.append(child)
            scheduler.fork(parent, child)
        elif action == "remove" and live:
            request = data.draw(st.sampled_from(live))
            scheduler.remove(request)
            requests.remove(request)
        elif action == "reset":
            scheduler.reset(live)
        for group in scheduler.pages.groups:
            held = {page for request in scheduler.running for page in group.pages_of(request.request_id)}
            assert group.num_used == len(held)
    device.finish(*requests)


def test_decoding_goes_on_beside_a_long_prompt():
    scheduler = make_scheduler(buckets=(8,), max_seqs=2, num_pages=(20, 20))
    device = FakeDevice(scheduler)
    short, long = make_request(1, 2, 20), make_request(2, 30, 5)
    scheduler.add(short)
    device.step()
    scheduler.add(long)
    sizes = []
    for _ in range(4):
        schedule = device.step()
        assert schedule is not None
        sizes.append([chunk.stop - chunk.start for chunk in schedule.chunks])
    assert sizes == [[1, 7], [1, 7], [1, 7], [1, 7]]
    device.finish(short, long)


def test_prefill_chunk_limits_each_prompt():
    scheduler = make_scheduler(buckets=(32,), prefill_chunk=7)
    device = FakeDevice(scheduler)
    requests = [make_request(i, 20, 2) for i in (1, 2)]
    for request in requests:
        scheduler.add(request)
    schedule = device.step()
    assert schedule is not None
    assert [(chunk.start, chunk.stop) for chunk in schedule.chunks] == [(0, 7), (0, 7)]
    device.finish(*requests)
    with pytest.raises(RequestError, match="prefill_chunk = 0 cannot be used"):
        scheduler.prefill_chunk = 0


@pytest.mark.parametrize(
    ("num_prompt", "buckets"),
    [(2, [4]), (4, [4]), (5, [4, 4]), (8, [4, 4]), (9, [16]), (17, [16, 4]), (30, [16, 16]), (40, [64]), (64, [64])],
)
def test_a_step_is_not_padded_to_many_times_its_rows(num_prompt: int, buckets: list[int]):
    scheduler = make_scheduler(buckets=(4, 16, 64), num_pages=(20,), windows=(None,), max_seq_len=80)
    scheduler.add(make_request(1, num_prompt, 1))
    device = FakeDevice(scheduler)
    got = []
    while (schedule := device.step()) is not None:
        got.append(schedule.bucket)
    assert got == buckets


def test_the_youngest_is_preempted_and_comes_back():
    scheduler = make_scheduler(num_pages=(10, 10), max_seqs=3)
    device = FakeDevice(scheduler)
    requests = [make_request(i, 4, 30) for i in (1, 2, 3)]
    for request in requests:
        scheduler.add(request)
    first_preempted = None
    while device.step() is not None:
        if first_preempted is None and scheduler.num_preemptions:
            first_preempted = [request.num_preemptions for request in requests]
            assert scheduler.waiting == [requests[2]]
            assert scheduler.running == requests[:2]
    assert first_preempted == [0, 0, 1]
    assert requests[0].num_preemptions == 0
    # Not let in again until there is room to go on: every preemption is for a page that another request grew into.
    assert scheduler.num_preemptions <= 3
    device.finish(*requests)


def test_forks_share_pages_and_copy_when_they_write():
    scheduler = make_scheduler(windows=(None,), num_pages=(20,), max_seqs=3)
    device = FakeDevice(scheduler)
    parent = make_request(1, 9, 10)
    scheduler.add(parent)
    device.step()
    device.step()
    assert scheduler.pages.groups[0].num_used == 3
    children = [make_request(i, 9, 10) for i in (2, 3)]
    for child in children:
        child.tokens[:9] = parent.tokens[:9]
        child.continue_from(parent)
        scheduler.fork(parent, child)
    assert scheduler.pages.groups[0].num_used == 3
    schedule = device.step()
    assert schedule is not None
    # Three owners of the last page: two copy, the third writes in place.
    assert len(schedule.copies) == 2
    assert scheduler.pages.groups[0].num_used == 5
    late = make_request(4, 9, 10)
    late.tokens[:9] = parent.tokens[:9]
    late.continue_from(parent)
    scheduler.fork(parent, late)
    assert scheduler.waiting == [late], "no slot is free: it waits and is computed by itself"
    device.finish(parent, *children, late)


def test_a_window_group_needs_few_pages():
    scheduler = make_scheduler(num_pages=(10, 3), max_seqs=1, buckets=(32,))
    device = FakeDevice(scheduler)
    request = make_request(1, 20, 20)
    scheduler.add(request)
    starts = []
    while (schedule := device.step()) is not None:
        starts.append(schedule.chunks[0].start)
    # The first chunk fills the three pages; what has left the window makes room for the next.
    assert starts == [0, 12, *range(20, 39)]
    device.finish(request)
