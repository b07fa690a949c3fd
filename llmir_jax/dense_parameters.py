"""The parameters of a plain forward as floats, each made when it is needed of what the step has in its place.

All of them as floats take eight times what int4 takes. A parameter is therefore a function of stored arrays, to be
traced into the program that uses it, and a large matrix can be had some rows at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmir_jax.analysis.stored_matrix import StoredMatrix
from llmir_jax.quantization import QuantizedArray
from llmir_jax.trace import Parameter
from llmir_jax.weights import Weight, assembled, describe, floats


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One weight of a step: how its value is made of arrays, and some rows of it."""

    arrays: Any
    """A pytree of arrays."""
    value: Callable[[Any], jax.Array | QuantizedArray]
    """Of `arrays`. Traceable."""
    key: Any
    """Hashable. Equal for weights whose `value` is the same function."""
    rows: Callable[[int, int], "Stored"] | None = None
    """Rows [start, stop) of a matrix, where these are to be had by themselves."""


StoredAt = Callable[[int], Stored]
"""What a step stores of its weights, by their number."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A parameter, or rows of it: a traceable function of arrays."""

    arrays: Any
    make: Callable[[Any], jax.Array]
    key: Any


class DenseParameters:
    """The parameters of a forward, in the order of its arguments.

    Args:
        stored: of the weights of the step.
        others: parameters that the step does not read, by path.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        weights: Sequence[Weight],
        stored: StoredAt,
        others: Mapping[str, jax.Array],
    ) -> None:
        self._parameters, self._weights, self._stored, self._others = parameters, weights, stored, others
        self._whole = {weight.path: at for at, weight in enumerate(weights) if not weight.pieces}
        self._parts: dict[str, list[tuple[int, Any]]] = {}
        for at, weight in enumerate(weights):
            for piece in weight.pieces:
                self._parts.setdefault(piece.path, []).append((at, piece))

    def nbytes(self, index: int) -> int:
        """Of a parameter as the forward takes it."""
        parameter = self._parameters[index]
        return prod(parameter.shape) * parameter.dtype.itemsize

    def dense(self, index: int) -> Dense:
        """A parameter."""
        parameter = self._parameters[index]
        path, form = parameter.path, (parameter.shape, parameter.dtype.name)
        if path in self._others:
            return Dense(arrays=self._others[path], make=lambda array: array, key=form)
        if path in self._whole:
            whole = self._stored(self._whole[path])
            return Dense(
                arrays=whole.arrays, make=lambda arrays: jnp.asarray(whole.value(arrays)), key=(form, whole.key)
            )
        parts = self._parts[path]
        pieces = [piece for _, piece in parts]
        kept = [self._stored(at) for at, _ in parts]

        def make(arrays: Sequence[Any]) -> jax.Array:
            values = [own.value(array) for own, array in zip(kept, arrays, strict=True)]
            return assembled(parameter, [(piece.matrix, piece.of(v)) for piece, v in zip(pieces, values, strict=True)])

        places = tuple((piece.matrix, piece.start, piece.stop) for piece in pieces)
        return Dense(arrays=[own.arrays for own in kept], make=make, key=(form, places, tuple(own.key for own in kept)))

    def row_axis(self, index: int) -> int | None:
        """The axis of a parameter [V, D] or [K, N] that rows of its stored matrix lie along, if it is one matrix."""
        parameter = self._parameters[index]
        parts = self._parts.get(parameter.path, [])
        if len(parts) != 1 or len(parameter.shape) != 2:
            return None
        matrix: StoredMatrix = parts[0][1].matrix
        if self._stored(parts[0][0]).rows is None:
            return None
        return 0 if matrix.is_table(parameter.shape) else 1 if matrix.is_kernel(parameter.shape) else None

    def span(self, index: int, start: int, stop: int) -> Dense:
        """Indices [start, stop) of a parameter along its `row_axis`."""
        parameter, axis = self._parameters[index], self.row_axis(index)
        ((at, piece),) = self._parts[parameter.path]
        rows = self._stored(at).rows
        assert rows is not None and axis is not None
        some = rows(piece.start + start, piece.start + stop)

        def make(arrays: Any) -> jax.Array:
            value = some.value(arrays)
            matrix = floats(value, parameter.dtype)
            return matrix if axis == 0 else matrix.T

        return Dense(arrays=some.arrays, make=make, key=(axis, parameter.dtype.name, some.key))


def stored_array(value: jax.Array | QuantizedArray) -> Stored:
    """Of a weight that the step has as an array of its own."""
    leaves, structure = jax.tree.flatten(value)
    shapes = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
    rows = None
    if isinstance(value, QuantizedArray) or value.ndim == 2:
        rows = partial(_some_rows, value)
    return Stored(arrays=value, value=lambda own: own, key=(str(structure), shapes), rows=rows)


def _some_rows(value: jax.Array | QuantizedArray, start: int, stop: int) -> Stored:
    return stored_array(value.span(start, stop) if isinstance(value, QuantizedArray) else value[start:stop])


def key_of(value: Any) -> Any:
    """Shapes, dtypes and static fields of a value or of a description."""
    leaves, structure = jax.tree.flatten(describe(value))
    return str(structure), tuple((leaf.shape, np.dtype(leaf.dtype).name) for leaf in leaves)


__all__ = ["Dense", "DenseParameters", "Stored", "StoredAt", "key_of", "stored_array"]
