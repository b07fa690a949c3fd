"""Atoms against NumPy: an array whose elements are numbered goes through the same transpositions and reshapes."""

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmir_jax.analysis.layout import AtomDims, Atoms

Step = tuple[str, list[int]]


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], list[Step]]:
    """A shape, and transpositions and reshapes of it that cut no axis unevenly more often than not."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4))
    steps: list[Step] = []
    current = list(shape)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            order = list(draw(st.permutations(range(len(current)))))
            steps.append(("transpose", order))
            current = [current[d] for d in order]
        else:
            factors = [f for n in current for f in draw(st.sampled_from([[n], _split(n)]))]
            merged = [1]
            for factor in factors:
                if draw(st.booleans()):
                    merged.append(1)
                merged[-1] *= factor
            steps.append(("reshape", merged))
            current = merged
    return shape, steps


def _split(n: int) -> list[int]:
    for factor in (2, 3):
        if n % factor == 0 and n > factor:
            return [factor, n // factor]
    return [n]


def index_of_atoms(atoms: Atoms, dims: AtomDims, order: list[int]) -> np.ndarray:
    """For an array laid out as `dims`, the row-major number over `order` of each element's atoms."""
    numbers = np.arange(prod(atoms.shape(order))).reshape(atoms.shape(order))
    flat = [a for d in dims for a in d]
    assert sorted(flat) == sorted(order)
    arranged = np.transpose(numbers, [order.index(a) for a in flat])
    return arranged.reshape([prod(atoms.shape(d)) for d in dims])


@given(chains())
def test_chain(case: tuple[list[int], list[Step]]) -> None:
    shape, steps = case
    atoms = Atoms()
    start = [atoms.dim(n) for n in shape]
    dims, array = start, np.arange(prod(shape)).reshape(shape)
    for kind, argument in steps:
        if kind == "transpose":
            dims, array = [dims[p] for p in argument], array.transpose(argument)
            continue
        found = atoms.reshape(dims, array.shape, argument)
        if found is None:  # an axis would be cut unevenly: given up, which is always right
            return
        dims, array = found, array.reshape(argument)
    order = [a for d in atoms.refine(start) for a in d]
    np.testing.assert_array_equal(array, index_of_atoms(atoms, atoms.refine(dims), order))


def test_splitting_refines_everywhere() -> None:
    atoms = Atoms()
    heads = atoms.dim(6)
    split = atoms.reshape([heads], (6,), (2, 3))
    assert split is not None
    assert [atoms.shape(d) for d in split] == [[2], [3]]
    assert atoms.refine([heads]) == [[*split[0], *split[1]]]


def test_uneven_cut() -> None:
    atoms = Atoms()
    dims = [atoms.dim(4), atoms.dim(3)]
    assert atoms.reshape(dims, (4, 3), (3, 4)) is None
