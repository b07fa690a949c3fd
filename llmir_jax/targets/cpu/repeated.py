"""Kernels that were emitted before for operations of the same structure: those of a layer serve all layers like it.

Equal text is one function in any case (see `kernel`); this saves making the text. Two computations are alike if their
operations, attributes and types are, down to the buffers that they read, and if these are alike and shared in the
same way. What is remembered names buffers by the order in which they are met.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from xdsl.ir import Attribute, Operation, SSAValue

from llmir_jax.interop import op_name
from llmir_jax.targets.cpu.expressions import Buffer, Stored

T = TypeVar("T")
Kernel = tuple[str, list[Buffer]]
"""A function's name, and the buffers that it takes pointers to."""


class Structure:
    """Numbers the buffers and the values of a computation, and keeps what they are like."""

    def __init__(self, stored: Stored):
        self.buffers: list[Buffer] = []
        self._stored = stored
        self._facts: list[Any] = []
        self._buffer_numbers: dict[int, int] = {}
        self._value_numbers: dict[SSAValue, int] = {}

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for computations that are alike."""
        return tuple(self._facts)

    def buffer(self, buffer: Buffer) -> int:
        """The number of a buffer."""
        if id(buffer) not in self._buffer_numbers:
            for part in buffer.parts:
                self._buffer_numbers[id(part)] = len(self.buffers)
                self.buffers.append(part)
                kind = (part.element, part.shape, part.strides, part.nbytes, part.place)
                self._facts.append(("buffer", len(buffer.parts), kind))
        return self._buffer_numbers[id(buffer)]

    def value(self, value: SSAValue) -> int:
        """The number of a value that is read, after those of all that it is computed from."""
        known = self._value_numbers.get(value)
        if known is not None:
            return known
        held = self._stored.buffers.get(value)
        op = value.owner
        if held is not None:
            fact: Any = ("stored", self.buffer(held), self._stored.formats.get(value), value.type)
        elif isinstance(op, Operation):
            fact = (*self.operation(op), list(op.results).index(value), value.type)  # type: ignore[arg-type]
        else:
            fact = ("unknown", id(value))
        self._facts.append(fact)
        self._value_numbers[value] = len(self._value_numbers)
        return self._value_numbers[value]

    def operation(self, op: Operation) -> tuple[Any, ...]:
        """What an operation computes."""
        statistics = self._stored.statistics.get(op)
        return (
            op_name(op),
            _sorted(op.properties),
            _sorted({name: value for name, value in op.attributes.items() if not name.startswith("llmir.")}),
            tuple(map(self.value, op.operands)),
            None if statistics is None else self.buffer(statistics),
            tuple(id(region) for region in op.regions),  # with a region of its own, it is like no other
        )


def _sorted(attributes: dict[str, Attribute]) -> tuple[tuple[str, Attribute], ...]:
    return tuple(sorted(attributes.items(), key=lambda pair: pair[0]))


class Repeated:
    """What was found out for computations, for those that are alike."""

    def __init__(self, stored: Stored):
        self._stored = stored
        self._kernels: dict[Any, tuple[str, list[int]]] = {}
        self._facts: dict[Any, Any] = {}

    def structure(self, buffers: Sequence[Buffer] = (), values: Sequence[SSAValue | None] = ()) -> Structure:
        """Of a computation that reads or writes these."""
        structure = Structure(self._stored)
        for buffer in buffers:
            structure.buffer(buffer)
        for value in values:
            if value is not None:
                structure.value(value)
        return structure

    def kernel(self, what: Any, structure: Structure, emit: Callable[[], Kernel]) -> Kernel:
        """The kernel of a computation: one that `emit` made for one alike, where there is one."""
        key = (what, structure.key)
        if key in self._kernels:
            name, numbers = self._kernels[key]
            return name, [structure.buffers[number] for number in numbers]
        name, buffers = emit()
        numbers_of = {id(buffer): number for number, buffer in enumerate(structure.buffers)}
        if all(id(buffer) in numbers_of for buffer in buffers):
            self._kernels[key] = name, [numbers_of[id(buffer)] for buffer in buffers]
        return name, buffers

    def fact(self, what: Any, structure: Structure, find: Callable[[], T]) -> T:
        """What holds for all computations that are alike, of which no buffer is a part."""
        key = (what, structure.key)
        if key not in self._facts:
            self._facts[key] = find()
        found: T = self._facts[key]
        return found


__all__ = ["Repeated", "Structure"]
