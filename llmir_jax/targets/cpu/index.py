"""Whole numbers computed from loop variables: the index maps of reshapes, transposes, slices and broadcasts.

An `Index` is a constant plus a sum of atoms times coefficients. An atom is a loop variable, or the quotient or the
remainder of an index by a constant. What can be simplified is, so that a chain of layout operations becomes the one
map that it is: 64·(c // 64) + c mod 64 = c. Everything is at least 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Union

import numpy as np

from llmir_jax.targets.cpu.llvm import Function, Number, Value


@dataclass(frozen=True)
class Var:
    """A loop variable in [0, extent). Lanes of a vector run along one of them, from a multiple of `multiple` on."""

    name: str
    extent: int
    multiple: int = 1


@dataclass(frozen=True)
class Dynamic:
    """A number in [0, extent) that is read when the code runs."""

    value: Value
    extent: int


@dataclass(frozen=True)
class Quotient:
    """index // divisor."""

    index: "Index"
    divisor: int


@dataclass(frozen=True)
class Remainder:
    """index mod divisor."""

    index: "Index"
    divisor: int


Atom = Union[Var, Dynamic, Quotient, Remainder]  # noqa: UP007  (names that are not defined yet)


@dataclass(frozen=True)
class Index:
    """constant + Σ coefficient · atom."""

    constant: int = 0
    terms: tuple[tuple[Atom, int], ...] = ()

    @cached_property
    def last(self) -> int:
        """The largest value that it can have."""
        return self.constant + sum(c * (_extent(atom) - 1) for atom, c in self.terms if c > 0)

    def __add__(self, other: "Index | int") -> "Index":
        if isinstance(other, int):
            return Index(self.constant + other, self.terms)
        terms = dict(self.terms)
        for atom, coefficient in other.terms:
            terms[atom] = terms.get(atom, 0) + coefficient
        return _simplified(self.constant + other.constant, terms)

    def __mul__(self, factor: int) -> "Index":
        if factor == 0:
            return Index()
        return Index(self.constant * factor, tuple((atom, c * factor) for atom, c in self.terms))

    def _split(self, divisor: int) -> tuple["Index", "Index"]:
        """(a, b) with self = a · divisor + b, b the terms that the divisor does not divide."""
        high = [(atom, c // divisor) for atom, c in self.terms if c % divisor == 0]
        low = tuple((atom, c) for atom, c in self.terms if c % divisor)
        return _simplified(self.constant // divisor, dict(high)), Index(self.constant % divisor, low)

    def _coarse(self, divisor: int) -> tuple["Index", "Index", int] | None:
        """(a, b, unit) with self = a · unit + b and b < unit, a divisor of `divisor` above 1; None if there is none.

        Then self // divisor = a // (divisor / unit): (512·c + r) // 32768 = c // 64 for r < 512.
        """
        units = {int(np.gcd(coefficient, divisor)) for _, coefficient in self.terms} - {1, divisor}
        for unit in sorted(units, reverse=True):
            whole, rest = self._split(unit)
            if rest.last < unit:
                return whole, rest, unit
        return None

    def __floordiv__(self, divisor: int) -> "Index":
        if divisor == 1:
            return self
        high, low = self._split(divisor)
        if low.last < divisor:
            return high
        if not low.constant and len(low.terms) == 1 and low.terms[0][1] == 1:
            atom = low.terms[0][0]
            if isinstance(atom, Quotient):
                return high + atom.index // (atom.divisor * divisor)
        coarse = low._coarse(divisor)
        if coarse is not None:
            whole, _, unit = coarse
            return high + whole // (divisor // unit)
        return high + Index(0, ((Quotient(low, divisor), 1),))

    def __mod__(self, divisor: int) -> "Index":
        if divisor == 1:
            return Index()
        _, low = self._split(divisor)
        if low.last < divisor:
            return low
        coarse = low._coarse(divisor)
        if coarse is not None:
            whole, rest, unit = coarse
            return whole % (divisor // unit) * unit + rest
        return Index(0, ((Remainder(low, divisor), 1),))

    @property
    def is_constant(self) -> bool:
        """Whether it is known now."""
        return not self.terms

    def stride(self, variable: Var, lanes: int) -> int | None:
        """By how much it grows from lane to lane, the same for all lanes; None if it does not."""
        total = 0
        for atom, coefficient in self.terms:
            step = _atom_stride(atom, variable, lanes)
            if step is None:
                return None
            total += coefficient * step
        return total

    def emit(self, f: Function, variables: Mapping[Var, Number]) -> Number:
        """The number, for these values of the variables."""
        total: Number = self.constant
        for atom, coefficient in self.terms:
            total = f.add(total, f.mul(_emit_atom(atom, f, variables), coefficient))
        return total

    def evaluate(self, variables: Mapping[Var, Any]) -> Any:
        """The numbers, for arrays of values of the variables; what is read when the code runs counts as 0."""
        total = np.asarray(self.constant)
        for atom, coefficient in self.terms:
            if isinstance(atom, Var):
                total = total + coefficient * np.asarray(variables[atom])
            elif isinstance(atom, Quotient):
                total = total + coefficient * (atom.index.evaluate(variables) // atom.divisor)
            elif isinstance(atom, Remainder):
                total = total + coefficient * (atom.index.evaluate(variables) % atom.divisor)
        return total

    @property
    def is_dynamic(self) -> bool:
        """Whether some of it is read when the code runs."""
        return any(
            isinstance(atom, Dynamic) or (isinstance(atom, Quotient | Remainder) and atom.index.is_dynamic)
            for atom, _ in self.terms
        )


def variable(var: Var) -> Index:
    """A loop variable as an index."""
    return Index(0, ((var, 1),)) if var.extent > 1 else Index()


def dynamic(value: Value, extent: int) -> Index:
    """A number that is read when the code runs."""
    return Index(0, ((Dynamic(value, extent), 1),))


def linear(indices: "list[Index]", shape: tuple[int, ...]) -> Index:
    """The place of an element in row-major order."""
    total = Index()
    stride = 1
    for index, size in zip(reversed(indices), reversed(shape), strict=True):
        total = total + index * stride
        stride *= size
    return total


def unravel(place: Index, shape: tuple[int, ...]) -> list[Index]:
    """The indices of the element at a place in row-major order."""
    found = []
    stride = int(np.prod(shape, dtype=np.int64))
    for size in shape:
        stride //= max(size, 1)
        found.append(Index() if size == 1 else (place // stride) % size)
    return found


def _extent(atom: Atom) -> int:
    if isinstance(atom, Var | Dynamic):
        return atom.extent
    if isinstance(atom, Remainder):
        return min(atom.divisor, atom.index.last + 1)
    return atom.index.last // atom.divisor + 1


def _simplified(constant: int, terms: dict[Atom, int]) -> Index:
    changed = True
    while changed:
        changed = False
        for atom, coefficient in list(terms.items()):
            if coefficient == 0:
                del terms[atom]
            elif isinstance(atom, Remainder):
                # k·(x mod d) + k·d·(x // d) = k·x
                quotient = atom.index // atom.divisor
                if len(quotient.terms) != 1 or quotient.constant or quotient.terms[0][1] != 1:
                    continue
                whole = quotient.terms[0][0]
                if terms.get(whole) != coefficient * atom.divisor:
                    continue
                del terms[atom], terms[whole]
                constant += coefficient * atom.index.constant
                for inner, c in atom.index.terms:
                    terms[inner] = terms.get(inner, 0) + coefficient * c
                changed = True
                break
    order = sorted(terms.items(), key=lambda item: (-item[1], repr(item[0])))
    return Index(constant, tuple(order))


def _multiple(index: Index, variable: Var) -> int:
    """What divides the index at the first lane."""
    result = abs(index.constant)
    for atom, coefficient in index.terms:
        factor = atom.multiple if isinstance(atom, Var) else 1
        if isinstance(atom, Remainder):
            factor = int(np.gcd(_multiple(atom.index, variable), atom.divisor))
        result = int(np.gcd(result, coefficient * factor))
    return result


def _atom_stride(atom: Atom, variable: Var, lanes: int) -> int | None:
    if isinstance(atom, Var):
        return int(atom == variable)
    if isinstance(atom, Dynamic):
        return 0
    inner = atom.index.stride(variable, lanes)
    if inner == 0 or inner is None:
        return inner
    # Lanes stay within one block of the divisor if they begin at a multiple of what they span together.
    span = inner * lanes
    known = _multiple(atom.index, variable)
    if inner < 0 or atom.divisor % span or (known % span and known != 0):
        return None
    return inner if isinstance(atom, Remainder) else 0


def _emit_atom(atom: Atom, f: Function, variables: Mapping[Var, Number]) -> Number:
    if isinstance(atom, Var):
        return variables[atom]
    if isinstance(atom, Dynamic):
        return atom.value
    inner = atom.index.emit(f, variables)
    return f.div(inner, atom.divisor) if isinstance(atom, Quotient) else f.rem(inner, atom.divisor)


__all__ = ["Dynamic", "Index", "Var", "dynamic", "linear", "unravel", "variable"]
