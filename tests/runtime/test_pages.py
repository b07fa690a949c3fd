"""The page allocator: examples, and a state machine that checks every page against what its sequences wrote."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from llmir_jax.errors import OutOfPagesError
from llmir_jax.runtime.batch import CacheGroup
from llmir_jax.runtime.pages import CachePages, PageAllocator, PageCopy


def allocator(
    num_pages: int = 8, page_size: int = 4, max_seq_len: int = 64, window: int | None = None
) -> PageAllocator:
    return PageAllocator(num_pages=num_pages, page_size=page_size, max_seq_len=max_seq_len, window=window)


def group(num_pages: int, page_size: int, window: int | None) -> CacheGroup:
    return CacheGroup(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        dtype=np.float32,
        window=window,
        num_pages=num_pages,
        page_size=page_size,
    )


def test_reserve_takes_a_page_only_when_the_last_is_full():
    pages = allocator()
    pages.add(1)
    assert pages.reserve(1, 0, 3) == []
    assert (pages.num_used, pages.num_free) == (1, 7)
    pages.reserve(1, 3, 4)
    assert pages.num_used == 1
    pages.reserve(1, 4, 9)
    assert len(pages.pages_of(1)) == 3
    assert pages.table(1).tolist()[:3] == pages.pages_of(1)
    assert not pages.table(1)[3:].any()
    assert pages.table(1).shape == (16,)


def test_a_failed_reserve_changes_nothing_and_says_the_numbers():
    pages = allocator(num_pages=3)
    pages.add(1)
    pages.reserve(1, 0, 8)
    pages.add(2)
    before = (pages.num_free, pages.table(1).copy(), pages.table(2).copy())
    with pytest.raises(OutOfPagesError, match=r"sequence 2 needs 2 more pages for positions 0 to 7, but 1 of 3 pages"):
        pages.reserve(2, 0, 8)
    assert pages.num_free == before[0]
    np.testing.assert_array_equal(pages.table(1), before[1])
    np.testing.assert_array_equal(pages.table(2), before[2])
    assert pages.longest(2, 0, 8) == 4
    pages.reserve(2, 0, 4)
    assert pages.longest(2, 4, 8) == 4


def test_fork_shares_and_the_first_writer_copies():
    pages = allocator()
    pages.add(1)
    pages.reserve(1, 0, 6)
    first, last = pages.pages_of(1)
    pages.fork(1, 2)
    assert pages.num_used == 2
    assert pages.num_refs(first) == pages.num_refs(last) == 2
    [(source, target)] = pages.reserve(2, 6, 7)
    assert source == last
    assert pages.pages_of(2) == [first, target]
    assert pages.pages_of(1) == [first, last]
    assert (pages.num_refs(first), pages.num_refs(last), pages.num_refs(target)) == (2, 1, 1)
    assert pages.reserve(1, 6, 7) == [], "the last owner writes in place"
    pages.remove(1)
    assert pages.num_used == 2
    pages.remove(2)
    assert pages.num_used == 0


def test_a_full_last_page_is_not_copied():
    pages = allocator()
    pages.add(1)
    pages.reserve(1, 0, 8)
    pages.fork(1, 2)
    assert pages.reserve(2, 8, 9) == []
    assert pages.num_used == 3


def test_window_gives_back_what_no_query_reads():
    pages = allocator(window=6)
    pages.add(1)
    pages.reserve(1, 0, 16)
    # A query at 9 reads positions 4 to 9; one at 10 reads 5 to 10.
    assert pages.slide(1, 8) == 0
    assert pages.slide(1, 9) == 1
    assert pages.slide(1, 12) == 0
    assert pages.slide(1, 13) == 1
    assert pages.table(1).tolist()[:2] == [0, 0]
    assert len(pages.pages_of(1)) == 2
    assert pages.slide(1, 16) == 0
    pages.reserve(1, 16, 17)
    assert pages.slide(1, 17) == 1
    assert pages.num_used == 2


@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, None])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_peak_pages_is_never_passed_and_max_len_is_reached(page_size: int, window: int | None, chunk: int):
    length = 60
    peak = allocator(page_size=page_size, window=window).peak_pages(length, chunk=chunk)
    pages = allocator(num_pages=peak, page_size=page_size, window=window, max_seq_len=length)
    assert pages.max_len == length
    pages.add(1)
    for start in range(0, length, chunk):
        pages.slide(1, start)
        pages.reserve(1, start, min(start + chunk, length))


def test_max_len_of_a_group_too_small():
    assert allocator(num_pages=3).max_len == 12
    assert allocator(num_pages=3, window=6).max_len == 64
    assert allocator(num_pages=2, window=6).max_len == 8


def test_all_groups_or_none():
    pages = CachePages([group(8, 4, None), group(2, 2, 5)], max_seq_len=32)
    pages.add(1)
    with pytest.raises(OutOfPagesError, match="but 2 of 2 pages"):
        pages.reserve(1, 0, 6)
    assert [g.num_used for g in pages.groups] == [0, 0]
    assert pages.longest(1, 0, 6) == 4
    pages.reserve(1, 0, 4)
    assert [g.num_used for g in pages.groups] == [1, 2]
    assert pages.max_len == 4


@dataclass
class Written:
    """A sequence as the test sees it: one value a position."""

    seq: int
    values: list[int] = field(default_factory=list)


class PagesMachine(RuleBasedStateMachine):
    """Sequences are written through their block tables into arrays that stand for the device's pages.

    Whatever a later query may read must be what its own sequence wrote; counts and the free list must add up.
    """

    sequences = Bundle("sequences")

    @initialize(num_pages=st.tuples(st.integers(3, 12), st.integers(3, 12)), page_size=st.integers(1, 5))
    def begin(self, num_pages: tuple[int, int], page_size: int) -> None:
        self.max_seq_len = 40
        self.windows = (None, 5)
        groups = [group(n, page_size, window) for n, window in zip(num_pages, self.windows, strict=True)]
        self.pages = CachePages(groups, max_seq_len=self.max_seq_len)
        self.page_size = page_size
        self.device = [np.full((n, page_size), -1) for n in num_pages]
        self.live: dict[int, Written] = {}
        self.num_seqs = 0
        self.next_value = 0

    def new_written(self, values: list[int]) -> Written:
        self.num_seqs += 1
        written = Written(self.num_seqs, list(values))
        self.live[written.seq] = written
        return written

    @rule(target=sequences)
    def add(self) -> Written:
        written = self.new_written([])
        self.pages.add(written.seq)
        return written

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: Written) -> Written:
        child = self.new_written(parent.values)
        self.pages.fork(parent.seq, child.seq)
        return child

    @rule(written=sequences, num_tokens=st.integers(1, 9))
    def extend(self, written: Written, num_tokens: int) -> None:
        start = len(written.values)
        stop = min(start + num_tokens, self.max_seq_len)
        if stop == start:
            return
        self.pages.slide(written.seq, start)
        longest = self.pages.longest(written.seq, start, stop)
        if longest < stop:
            before = self.snapshot()
            with pytest.raises(OutOfPagesError):
                self.pages.reserve(written.seq, start, longest + 1)
            assert self.snapshot() == before
            if longest == start:
                return
        copies = self.pages.reserve(written.seq, start, longest)
        self.copy(copies)
        for position in range(start, longest):
            written.values.append(self.next_value)
            for pages, table in self.tables(written.seq):
                pages[table[position // self.page_size], position % self.page_size] = self.next_value
            self.next_value += 1

    @rule(written=consumes(sequences))
    def remove(self, written: Written) -> None:
        self.pages.remove(written.seq)
        del self.live[written.seq]

    def copy(self, copies: list[PageCopy]) -> None:
        """As the device does it: all sources are read before a target is written."""
        old = [pages.copy() for pages in self.device]
        targets = [(copy.group, copy.target) for copy in copies]
        assert len(set(targets)) == len(targets)
        for copy in copies:
            self.device[copy.group][copy.target] = old[copy.group][copy.source]

    def tables(self, seq: int):
        return [(pages, group.table(seq)) for pages, group in zip(self.device, self.pages.groups, strict=True)]

    def snapshot(self):
        return [
            (
                group.num_free,
                [group.num_refs(page) for page in range(group.num_pages)],
                {seq: group.table(seq).tolist() for seq in self.live},
            )
            for group in self.pages.groups
        ]

    @invariant()
    @precondition(lambda self: hasattr(self, "pages"))
    def counts_add_up(self) -> None:
        for group_ in self.pages.groups:
            owners: dict[int, int] = {}
            for seq in self.live:
                held = group_.pages_of(seq)
                assert len(set(held)) == len(held)
                for page in held:
                    owners[page] = owners.get(page, 0) + 1
            assert [group_.num_refs(page) for page in range(group_.num_pages)] == [
                owners.get(page, 0) for page in range(group_.num_pages)
            ]
            assert group_.num_used == len(owners)
            assert group_.num_free + group_.num_used == group_.num_pages

    @invariant()
    @precondition(lambda self: hasattr(self, "pages"))
    def what_is_read_is_what_was_written(self) -> None:
        for written in self.live.values():
            num = len(written.values)
            for (pages, table), window in zip(self.tables(written.seq), self.windows, strict=True):
                lowest = 0 if window is None else max(0, num - window + 1)
                for position in range(lowest, num):
                    value = pages[table[position // self.page_size], position % self.page_size]
                    assert value == written.values[position]


TestPages = PagesMachine.TestCase
TestPages.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
