"""What an entry of the model zoo is: a forward written the textbook way, and what the compiler must make of it.

A module of the zoo holds builder functions decorated with one of

- `derivable`: a decoder must come out, equal to the forward in logits and in greedy tokens;
- `refused`: `UnsupportedModelError` must be raised, at a line marked ``# refused`` in the builder;
- `tricky`: outside what is promised, so refusing is right, and so is a decoder that is equal; a wrong one never is.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax

Forward = Callable[[Any, jax.Array], Any]


class Built(NamedTuple):
    """One instance of a model: ``forward(model, tokens int32[B, T])`` gives logits [B, T, vocab_size]."""

    forward: Forward
    model: Any
    vocab_size: int


Builder = Callable[[int], Built]


@dataclass(frozen=True, kw_only=True)
class Derivable:
    """`covers` names the forms that the model is here for; `longest` is its longest prompt in the tests, in tokens."""

    name: str
    build: Builder
    covers: tuple[str, ...]
    dtype: str
    longest: int


@dataclass(frozen=True, kw_only=True)
class Refused:
    """`op` and `because` are regular expressions that the message must match.

    `effect` is how the model breaks the rules, which its own forward shows without any compiler: "future" (later
    tokens change earlier logits), "past" (causal, but mixed otherwise than by attention), "length" (logits depend on
    the sequence length), "shape" (not logits [B, T, V]), "trace" (some lengths fail), "nan". `located` is False where
    no line of the model is at fault. `longest` is the max_seq_len of the decoder asked for, in tokens.
    """

    name: str
    build: Builder
    op: str
    because: str
    effect: str
    located: bool
    longest: int


@dataclass(frozen=True, kw_only=True)
class Tricky:
    """A model that may be refused or derived, but never derived wrong."""

    name: str
    build: Builder
    covers: tuple[str, ...]


def derivable(*covers: str, dtype: str = "float32", longest: int = 17) -> Callable[[Builder], Derivable]:
    """Register a builder of a model that a decoder must be derived from."""

    def register(build: Builder) -> Derivable:
        return Derivable(name=build.__name__, build=build, covers=covers, dtype=dtype, longest=longest)

    return register


def refused(
    op: str, because: str = ".", *, effect: str = "future", located: bool = True, longest: int = 40
) -> Callable[[Builder], Refused]:
    """Register a builder of a model that must be refused."""

    def register(build: Builder) -> Refused:
        return Refused(
            name=build.__name__,
            build=build,
            op=op,
            because=because,
            effect=effect,
            located=located,
            longest=longest,
        )

    return register


def tricky(*covers: str) -> Callable[[Builder], Tricky]:
    """Register a builder of a model that must not be derived wrong."""

    def register(build: Builder) -> Tricky:
        return Tricky(name=build.__name__, build=build, covers=covers)

    return register


def entries(modules: tuple[ModuleType, ...], kind: type) -> tuple[Any, ...]:
    """Every entry of one kind in the given modules, in their order."""
    return tuple(value for module in modules for value in vars(module).values() if isinstance(value, kind))


def marked_lines(entry: Refused) -> tuple[str, set[int]]:
    """The file name of a refused model ("masks.py") and the lines at fault.

    Those are the lines of its builder with the comment ``# refused``, and those of the file with ``# refused by all``.
    """
    path = Path(inspect.getsourcefile(entry.build) or "")
    lines, first = inspect.getsourcelines(entry.build)
    own = {first + i for i, line in enumerate(lines) if "# refused" in line}
    shared = {i for i, line in enumerate(path.read_text().splitlines(), 1) if "# refused by all" in line}
    return path.name, own | shared
