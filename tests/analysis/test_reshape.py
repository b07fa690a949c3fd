"""Reshapes against NumPy: every element is labelled with its token, and the labels are looked at after the reshape."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir_jax.analysis.reshape import TokenDim, agree, groups, reshape_dims

LENGTH = 5  # tokens; no other size below is a multiple of it


@st.composite
def factored(draw: st.DrawFn, order: list[int]) -> list[int]:
    """Sizes that multiply out to those of `order`, neighbours merged at random, with dims of size 1 in between."""
    sizes = [1]
    for factor in order:
        if draw(st.booleans()):
            sizes.append(1)
        sizes[-1] *= factor
    return sizes


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], int, TokenDim, list[int]]:
    """(sizes before, index of the token dim, what it is, sizes after)."""
    left = draw(st.lists(st.integers(1, 4), max_size=2))
    right = draw(st.lists(st.integers(1, 4), max_size=2))
    outer, inner = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    before = [*left, outer * LENGTH * inner, *right]
    order = [*left, outer, LENGTH, inner, *right]
    if draw(st.booleans()):
        order = draw(st.permutations(order))
    return before, len(left), TokenDim(outer, inner), draw(factored(order))


def token_of_index(dim: TokenDim, size: int) -> np.ndarray:
    return (np.arange(size) // dim.inner) % LENGTH


def runs_over_tokens(labels: np.ndarray, dim: int) -> bool:
    """Whether the index along `dim` alone tells the token, as some (outer, inner) would have it."""
    size = labels.shape[dim]
    along = np.moveaxis(labels, dim, -1).reshape(-1, size)
    return (along == along[0]).all() and len(set(along[0])) == LENGTH


@given(reshapes())
def test_against_labels(case: tuple[list[int], int, TokenDim, list[int]]) -> None:
    before, place, dim, after = case
    shape = [1] * len(before)
    shape[place] = before[place]
    labels = np.broadcast_to(token_of_index(dim, before[place]).reshape(shape), before).reshape(after)
    dims, reason = reshape_dims(before, tuple(dim if d == place else None for d in range(len(before))), after, LENGTH)
    if reason is not None:
        assert reason == "splits the token axis"
        assert not any(runs_over_tokens(labels, d) for d in range(len(after)))
        return
    (found,) = (d for d, x in enumerate(dims) if x is not None)
    token_dim = dims[found]
    assert token_dim is not None
    assert token_dim.outer * token_dim.inner * LENGTH == after[found]
    shape = [1] * len(after)
    shape[found] = after[found]
    expected = np.broadcast_to(token_of_index(token_dim, after[found]).reshape(shape), after)
    np.testing.assert_array_equal(labels, expected)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_groups_have_equal_products(factors: list[int], data: st.DataObject) -> None:
    before, after = data.draw(factored(factors)), data.draw(factored(factors))
    found = groups(before, after)
    assert [d for sources, _ in found for d in sources] == list(range(len(before)))
    assert [d for _, targets in found for d in targets] == list(range(len(after)))
    assert all(prod(before[d] for d in a) == prod(after[d] for d in b) for a, b in found)


def test_two_token_axes_do_not_merge() -> None:
    _, reason = reshape_dims((5, 5), (TokenDim(), TokenDim()), (25,), LENGTH)
    assert reason == "merges two token axes into one"


def test_a_dim_that_is_the_same_along_takes_any_order() -> None:
    free = TokenDim(1, 4, free=True)
    assert reshape_dims((20,), (free,), (4, 5), LENGTH) == ((None, TokenDim()), None)
    assert reshape_dims((20,), (TokenDim(1, 4),), (4, 5), LENGTH)[1] == "splits the token axis"
    # flattened with a dim that it is not the same along, it is free no more
    (merged,), reason = reshape_dims((5, 4), (TokenDim(free=True), None), (20,), LENGTH)
    assert reason is None
    assert merged == TokenDim(1, 4)
    assert not merged.free


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (TokenDim(1, 4), TokenDim(1, 4), (TokenDim(1, 4), True)),
        (TokenDim(1, 4), TokenDim(4, 1), (TokenDim(1, 4), False)),
        (TokenDim(1, 4, free=True), TokenDim(4, 1), (TokenDim(4, 1), True)),
        (TokenDim(4, 1), TokenDim(1, 4, free=True), (TokenDim(4, 1), True)),
        (None, TokenDim(), (TokenDim(), True)),
    ],
)
def test_agree(a: TokenDim | None, b: TokenDim | None, expected: tuple[TokenDim | None, bool]) -> None:
    assert agree(a, b) == expected
