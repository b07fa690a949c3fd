"""Dims as lists of atoms: follows heads, queries and keys through any transposition, merge or split.

An atom is an axis that no reshape seen so far splits: a KV head, a group of query heads, the queries, the keys. A dim
is the row-major product of its atoms (none for a dim of size 1). When a reshape splits an atom, it is refined into two
everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from llmir_jax.analysis.reshape import groups

AtomDims = list[list[int]]
"""For each dim of a value, its atoms in row-major order."""


@dataclass
class Atoms:
    """The atoms made so far, with their sizes, and what split ones became."""

    sizes: list[int] = field(default_factory=list)
    parts: dict[int, tuple[int, int]] = field(default_factory=dict)

    def new(self, size: int) -> int:
        """A new atom of `size`."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def dim(self, size: int) -> list[int]:
        """The atoms of a new dim."""
        return [] if size == 1 else [self.new(size)]

    def refined(self, atoms: Sequence[int]) -> list[int]:
        """`atoms` with those that were split replaced by their parts."""
        result: list[int] = []
        for atom in atoms:
            result += self.refined(self.parts[atom]) if atom in self.parts else [atom]
        return result

    def refine(self, dims: AtomDims) -> AtomDims:
        """`dims` in the atoms of now."""
        return [self.refined(d) for d in dims]

    def shape(self, atoms: Sequence[int]) -> list[int]:
        """Sizes of `atoms`."""
        return [self.sizes[a] for a in atoms]

    def _split(self, atom: int, first: int) -> tuple[int, int] | None:
        size = self.sizes[atom]
        if size % first:
            return None
        self.parts[atom] = (self.new(first), self.new(size // first))
        return self.parts[atom]

    def reshape(self, dims: AtomDims, before: Sequence[int], after: Sequence[int]) -> AtomDims | None:
        """Dims after a reshape, or None if an axis would have to be cut unevenly."""
        result: AtomDims = [[] for _ in after]
        dims = self.refine(dims)
        for sources, targets in groups(before, after):
            queue = [a for d in sources for a in dims[d]]
            for target in targets:
                need = after[target]
                while need > 1:
                    if not queue:
                        return None
                    atom = queue.pop(0)
                    size = self.sizes[atom]
                    if need % size == 0:
                        result[target].append(atom)
                        need //= size
                        continue
                    pieces = self._split(atom, need)
                    if pieces is None:
                        return None
                    result[target].append(pieces[0])
                    queue.insert(0, pieces[1])
                    need = 1
            assert not queue or prod(self.shape(queue)) == 1
        return self.refine(result)
