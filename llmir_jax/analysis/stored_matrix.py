"""Where the elements of a matrix lie in a parameter, through slices, reshapes and transposes.

A kernel [K, N] is the matrix [N, K] at strides (1, N). The third layer of kernels that are stacked [L, K, N] is that at
offset 2·K·N. Two operands that are equal as `StoredMatrix` are the same matrix, however the program got at them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from xdsl.ir import Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects.build import ints, shape_of

Dims = tuple[tuple[int, int], ...]
"""(size, stride) of axes, outermost first; strides in elements."""


@dataclass(frozen=True)
class Strided:
    """A value as a strided view of the parameter `root`: element i is at offset + Σ i[d] · stride[d]."""

    root: SSAValue
    offset: int
    dims: Dims  # one for each dim of the value

    def axes(self, which: Sequence[int]) -> Dims:
        """Some dims, in the order given, merged where they are one run of memory."""
        return _merged([self.dims[d] for d in which])


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """A matrix [N, K] (outputs, inputs) in a parameter: element (n, k) is at offset + n · rows + k · columns."""

    offset: int
    rows: Dims
    columns: Dims

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return prod(n for n, _ in self.rows), prod(n for n, _ in self.columns)

    @property
    def _sizes(self) -> list[int]:
        return [n for n, _ in (*self.rows, *self.columns)]

    def is_kernel(self, shape: Sequence[int]) -> bool:
        """Whether it is all of a parameter [K, N], transposed."""
        n, k = self.shape
        return tuple(shape) == (k, n) and self == StoredMatrix(
            offset=0, rows=_merged([(n, 1)]), columns=_merged([(k, n)])
        )

    def is_table(self, shape: Sequence[int]) -> bool:
        """Whether it is all of a parameter [N, K]."""
        n, k = self.shape
        return tuple(shape) == (n, k) and self == StoredMatrix(
            offset=0, rows=_merged([(n, k)]), columns=_merged([(k, 1)])
        )

    def elements(self, flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Its elements in the parameter's memory `flat`, an axis for each of `rows` and `columns`; no copy."""
        strides = [s * flat.itemsize for _, s in (*self.rows, *self.columns)]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self._sizes, strides)

    def read(self, parameter: Any) -> np.ndarray[Any, Any]:
        """The matrix [N, K], of the parameter's values."""
        return self.elements(np.asarray(parameter).reshape(-1)).reshape(self.shape)

    @property
    def _order(self) -> list[int] | None:
        """Its axes in the order of memory, if it is one run of it."""
        axes = (*self.rows, *self.columns)
        order = sorted(range(len(axes)), key=lambda d: -axes[d][1])
        step = prod(self.shape)
        for d in order:
            size, stride = axes[d]
            step //= size
            if stride != step:
                return None
        return order

    @property
    def span(self) -> tuple[int, int] | None:
        """(offset, number of elements) of the run of memory that it is, if it is one."""
        return None if self._order is None else (self.offset, prod(self.shape))

    def in_memory_order(self, matrix: jax.Array) -> jax.Array:
        """The elements [N · K] of such a matrix as they lie in memory; only if it has a `span`. Traceable."""
        assert self._order is not None
        return matrix.reshape(self._sizes).transpose(self._order).reshape(-1)

    def places(self) -> jax.Array:
        """int32 [N, K]: which element of the flat parameter each element is. Traceable."""
        places = jnp.full((1,) * len(self._sizes), self.offset, jnp.int32)
        for d, (size, stride) in enumerate((*self.rows, *self.columns)):
            shape = [size if i == d else 1 for i in range(len(self._sizes))]
            places = places + (stride * jnp.arange(size, dtype=jnp.int32)).reshape(shape)
        return places.reshape(self.shape)


def _merged(axes: Sequence[tuple[int, int]]) -> Dims:
    """Axes without those of size 1, neighbours of one run of memory made one."""
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


def _reshaped(dims: Dims, shape: Sequence[int]) -> Dims | None:
    """The same elements in row-major order as `shape`; None where strides cannot tell them."""
    left = [list(axis) for axis in _merged(dims)]
    result = []
    for size in shape:
        if size == 1:
            result.append((1, 0))
            continue
        if not left or left[0][0] % size:
            return None
        left[0][0] //= size
        result.append((size, left[0][1] * left[0][0]))
        if left[0][0] == 1:
            left.pop(0)
    return tuple(result)


def strided(value: SSAValue, roots: frozenset[SSAValue]) -> Strided | None:
    """`value` as a view of one of `roots`, through converts too; None if it is none."""
    chain: list[Operation] = []
    while value not in roots:
        op = value.owner
        if not isinstance(
            op,
            stablehlo.SliceOp
            | stablehlo.ReshapeOp
            | stablehlo.TransposeOp
            | stablehlo.ConvertOp
            | stablehlo.BroadcastInDimOp,
        ):
            return None
        chain.append(op)
        value = op.operands[0]
    shape = shape_of(value)
    if not all(shape):
        return None
    steps = [prod(shape[d + 1 :]) for d in range(len(shape))]
    offset, dims = 0, tuple(zip(shape, steps, strict=True))
    for op in reversed(chain):
        found = _through(op, offset, dims)
        if found is None:
            return None
        offset, dims = found
    return Strided(value, offset, dims)


def _through(op: Operation, offset: int, dims: Dims) -> tuple[int, Dims] | None:
    """A view, seen through one operation."""
    if isinstance(op, stablehlo.SliceOp):
        starts, steps = ints(op.start_indices), ints(op.strides)
        offset += sum(start * stride for start, (_, stride) in zip(starts, dims, strict=True))
        sizes = shape_of(op.results[0])
        return offset, tuple((n, stride * step) for n, step, (_, stride) in zip(sizes, steps, dims, strict=True))
    if isinstance(op, stablehlo.TransposeOp):
        return offset, tuple(dims[d] for d in ints(op.permutation))
    if isinstance(op, stablehlo.ConvertOp):
        return offset, dims
    shape = shape_of(op.results[0])
    if isinstance(op, stablehlo.BroadcastInDimOp):
        placed = dict(zip(ints(op.broadcast_dimensions), dims, strict=True))
        if any(n != placed.get(d, (1, 0))[0] for d, n in enumerate(shape)):
            return None  # elements are repeated
        if any(a > b for a, b in pairwise(ints(op.broadcast_dimensions))):
            return None
        return offset, tuple(placed.get(d, (1, 0)) for d in range(len(shape)))
    reshaped = _reshaped(dims, shape)
    return None if reshaped is None else (offset, reshaped)


__all__ = ["Dims", "StoredMatrix", "Strided", "strided"]
