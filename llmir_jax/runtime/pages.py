"""Who owns which page of the KV cache.

A page holds the keys and values of ``page_size`` consecutive positions of one sequence, in every layer of a cache
group. A sequence's block table lists its pages by position. Forked sequences share pages: each page counts the
sequences that refer to it, and a sequence about to write into a shared page first gets a copy of its own
(copy-on-write). A sliding-window group gives back the pages that lie wholly below its window's reach.

Nothing here touches the device: the caller carries out the copies that `CachePages.reserve` returns before it writes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmir_jax.errors import OutOfPagesError
from llmir_jax.runtime.batch import CacheGroup


@dataclass(frozen=True, kw_only=True)
class PageCopy:
    """A copy the device must make before the next step: page ``source`` of cache group ``group`` to page ``target``."""

    group: int
    source: int
    target: int


@dataclass(kw_only=True)
class _BlockTable:
    """Pages ``row[first:stop]`` are the sequence's; entries below ``first`` were given back, the rest never taken."""

    row: NDArray[np.int32]  # [P], 0 outside first:stop
    first: int = 0
    stop: int = 0

    def pages(self) -> list[int]:
        return [int(page) for page in self.row[self.first : self.stop]]


@dataclass(kw_only=True)
class PageAllocator:
    """The pages of one cache group: a free list, a block table a sequence, a reference count a page.

    Invariants: a page is on the free list exactly if its count is 0; its count is the number of block tables it is in.
    An allocation that fails changes nothing.

    Args:
        num_pages: pages in the group.
        page_size: positions (tokens) a page.
        max_seq_len: the longest sequence, in tokens; a block table has ``ceil(max_seq_len / page_size)`` entries.
        window: reach of the group's sliding window in tokens (a query sees itself and ``window - 1`` positions before);
            None for full attention.
    """

    num_pages: int
    page_size: int
    max_seq_len: int
    window: int | None = None
    _free: list[int] = field(init=False)
    _num_refs: list[int] = field(init=False)
    _tables: dict[int, _BlockTable] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every sequence: all pages are free."""
        self._free = list(range(self.num_pages))[::-1]
        self._num_refs = [0] * self.num_pages
        self._tables = {}

    # Accounting

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    @property
    def table_len(self) -> int:
        """Entries of a block table."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def max_len(self) -> int:
        """The longest sequence, in positions, that this group can hold when it holds no other."""
        if self.window is not None and self.peak_pages(self.max_seq_len, chunk=1) <= self.num_pages:
            return self.max_seq_len
        return min(self.max_seq_len, self.num_pages * self.page_size)

    def pages_of(self, seq: int) -> list[int]:
        """Pages the sequence holds, shared ones included, in position order."""
        return self._tables[seq].pages()

    def num_refs(self, page: int) -> int:
        """Sequences that hold the page."""
        return self._num_refs[page]

    def table(self, seq: int) -> NDArray[np.int32]:
        """The sequence's block table, int32[P]; a view that later calls change. Entries without a page are 0."""
        return self._tables[seq].row

    def peak_pages(self, num_positions: int, *, chunk: int) -> int:
        """The most pages that one sequence of that length holds at once if it is computed ``chunk`` tokens a step."""
        total = -(-num_positions // self.page_size)
        if self.window is None:
            return total
        # A step reads and writes window - 1 + chunk consecutive positions, which may begin anywhere in a page.
        reach = self.window - 1 + chunk
        return min(total, (reach + self.page_size - 2) // self.page_size + 1)

    def num_needed(self, seq: int, start: int, stop: int) -> int:
        """Free pages that `reserve` of the same arguments takes."""
        return sum(self._page_costs(seq, start, stop))

    def longest(self, seq: int, start: int, stop: int) -> int:
        """The largest end, up to ``stop``, for which `reserve` from ``start`` succeeds now; ``start`` if none does."""
        num_left = self.num_free
        end = start
        for cost in self._page_costs(seq, start, stop):
            if cost > num_left:
                break
            num_left -= cost
            end = (end // self.page_size + 1) * self.page_size
        return min(end, stop)

    def _page_costs(self, seq: int, start: int, stop: int) -> Iterator[int]:
        """For each page of positions start:stop, the free pages that writing into it takes: 0 or 1."""
        table = self._tables[seq]
        assert table.first <= start / self.page_size <= table.stop, "a gap, or a page that was given back"
        for entry in range(start // self.page_size, -(-stop // self.page_size)):
            is_own = entry < table.stop and self._num_refs[table.row[entry]] == 1
            yield 0 if is_own else 1

    # Changes

    def add(self, seq: int) -> None:
        """Begin an empty sequence."""
        assert seq not in self._tables, "the sequence is there already"
        self._tables[seq] = _BlockTable(row=np.zeros(self.table_len, np.int32))

    def reserve(self, seq: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Make the pages of positions ``start`` to ``stop`` the sequence's own, so that it can write there.

        Returns the page copies (source, target) that the device must make first: one for each shared page.

        Raises:
            OutOfPagesError: too few free pages; nothing has changed then.
        """
        num_needed = self.num_needed(seq, start, stop)
        if num_needed > self.num_free:
            raise OutOfPagesError(
                f"sequence {seq} needs {num_needed} more pages for positions {start} to {stop - 1}, "
                f"but {self.num_free} of {self.num_pages} pages ({self.page_size} tokens each) are free: "
                "build the decoder with a larger num_pages, or run fewer sequences at once"
            )
        table = self._tables[seq]
        copies = []
        for entry in range(start // self.page_size, -(-stop // self.page_size)):
            if entry == table.stop:
                table.row[entry] = self._take()
                table.stop += 1
            elif self._num_refs[table.row[entry]] > 1:
                source = int(table.row[entry])
                table.row[entry] = self._take()
                self._drop(source)
                copies.append((source, int(table.row[entry])))
        return copies

    def fork(self, parent: int, child: int) -> None:
        """Begin ``child`` as a copy of ``parent`` that shares all its pages; takes no page."""
        assert child not in self._tables, "the sequence is there already"
        table = self._tables[parent]
        for page in table.pages():
            self._num_refs[page] += 1
        self._tables[child] = _BlockTable(row=table.row.copy(), first=table.first, stop=table.stop)

    def slide(self, seq: int, position: int) -> int:
        """Give back the pages that no query at ``position`` or later can read. Returns how many the sequence let go."""
        if self.window is None:
            return 0
        table = self._tables[seq]
        lowest_read = max(0, position - self.window + 1)
        first = min(max(table.first, lowest_read // self.page_size), table.stop)
        num_released = first - table.first
        for page in table.row[table.first : first]:
            self._drop(int(page))
        table.row[table.first : first] = 0
        table.first = first
        return num_released

    def remove(self, seq: int) -> None:
        """End a sequence and give back its pages; those that others share stay theirs."""
        for page in self._tables.pop(seq).pages():
            self._drop(page)

    def _take(self) -> int:
        page = self._free.pop()
        self._num_refs[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._num_refs[page] -= 1
        if self._num_refs[page] == 0:
            self._free.append(page)


class CachePages:
    """The pages of all cache groups together: every change is made in all groups, or in none."""

    def __init__(self, groups: Iterable[CacheGroup], *, max_seq_len: int) -> None:
        self.groups = tuple(
            PageAllocator(
                num_pages=group.num_pages, page_size=group.page_size, window=group.window, max_seq_len=max_seq_len
            )
            for group in groups
        )
        self._max_seq_len = max_seq_len

    @property
    def max_len(self) -> int:
        """The longest sequence, in positions, that the cache can hold when it holds no other."""
        return min((group.max_len for group in self.groups), default=self._max_seq_len)

    def add(self, seq: int) -> None:
        for group in self.groups:
            group.add(seq)

    def reserve(self, seq: int, start: int, stop: int) -> list[PageCopy]:
        """`PageAllocator.reserve` in every group. Raises OutOfPagesError, and changes nothing, if one has too few."""
        for group in self.groups:
            if group.num_needed(seq, start, stop) > group.num_free:
                group.reserve(seq, start, stop)  # raises, with this group's numbers
        return [
            PageCopy(group=group_idx, source=source, target=target)
            for group_idx, group in enumerate(self.groups)
            for source, target in group.reserve(seq, start, stop)
        ]

    def longest(self, seq: int, start: int, stop: int) -> int:
        """The largest end, up to ``stop``, for which `reserve` from ``start`` succeeds now; ``start`` if none does."""
        return min((group.longest(seq, start, stop) for group in self.groups), default=stop)

    def fork(self, parent: int, child: int) -> None:
        for group in self.groups:
            group.fork(parent, child)

    def slide(self, seq: int, position: int) -> int:
        """Give back, in the sliding-window groups, what no query at ``position`` or later can read."""
        return sum(group.slide(seq, position) for group in self.groups)

    def remove(self, seq: int) -> None:
        for group in self.groups:
            group.remove(seq)

    def reset(self) -> None:
        for group in self.groups:
            group.reset()
