"""How a reshape carries axes: grouping of dims, and where the token axis goes. A dim of the token axis has
outer * T * inner elements in row-major order, T being the number of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class TokenDim:
    """A dim that runs over tokens: its index is (o * T + token) * inner + i, with o < outer and i < inner."""

    outer: int = 1
    inner: int = 1
    free: bool = field(default=False, compare=False)
    """Whether the value is the same all along the dim, so that it agrees with any order."""

    @property
    def plain(self) -> bool:
        """Whether the dim is the token index and nothing else."""
        return self.outer == 1 and self.inner == 1


Dims = tuple[TokenDim | None, ...]


def agree(a: TokenDim | None, b: TokenDim | None) -> tuple[TokenDim | None, bool]:
    """The dim of what is made of `a` and `b` element by element, and whether both run over the tokens in one order."""
    if a is None or b is None:
        return a or b, True
    if a == b:
        return (b if a.free else a), True
    if a.free or b.free:
        return (b if a.free else a), True
    return a, False


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Minimal runs of dims of `before` and `after` with equal products, in order (row-major reshape)."""
    found: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        a = b = 1
        if i < len(before):
            a, i = before[i], i + 1
        if j < len(after):
            b, j = after[j], j + 1
        while a != b:
            if (a < b and i < len(before)) or j >= len(after):
                a, i = a * before[i], i + 1
            else:
                b, j = b * after[j], j + 1
        found.append((range(start_i, i), range(start_j, j)))
    return found


def reshape_dims(before: Sequence[int], dims: Dims, after: Sequence[int], length: int) -> tuple[Dims, str | None]:
    """The token dims of a reshape's result at `length` tokens, and the reason if the token axis does not survive it."""
    result: list[TokenDim | None] = [None] * len(after)
    reason = None
    for sources, targets in groups(before, after):
        tokens = [d for d in sources if dims[d] is not None]
        if not tokens:
            continue
        if len(tokens) > 1:
            reason = "merges two token axes into one"
            continue
        source = dims[tokens[0]]
        assert source is not None
        outer = prod(before[d] for d in sources if d < tokens[0]) * source.outer
        inner = prod(before[d] for d in sources if d > tokens[0]) * source.inner
        sizes = [after[d] for d in targets]
        if source.free and all(before[d] == 1 for d in sources if d != tokens[0]):
            place = next(((i, TokenDim(1, n // length, True)) for i, n in enumerate(sizes) if n % length == 0), None)
        else:
            place = _place(outer, inner, sizes, length)
        if place is None:
            reason = "splits the token axis"
            continue
        result[targets[place[0]]] = place[1]
    return tuple(result), reason


def _place(outer: int, inner: int, sizes: Sequence[int], length: int) -> tuple[int, TokenDim] | None:
    before = 1
    for index, size in enumerate(sizes):
        if size % length == 0 and outer % before == 0:
            own_outer = outer // before
            own_inner, rest = divmod(size, length * own_outer)
            if rest == 0 and own_inner and inner == own_inner * prod(sizes[index + 1 :]):
                return index, TokenDim(own_outer, own_inner)
        before *= size
    return None
