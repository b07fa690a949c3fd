"""A model's parameters in a checkpoint, read one at a time: as floats, or as quantized arrays."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llmir_jax.disk_cache import file_identity
from llmir_jax.errors import CheckpointError
from llmir_jax.quantization import (
    Plan,
    QuantizedArray,
    Rounding,
    Rules,
    Scheme,
    make_plan,
    plain_rounding,
    quantize,
)

Parameter = jax.Array | QuantizedArray


class TensorReader(Protocol):
    """The tensors of a checkpoint, on disk."""

    @property
    def path(self) -> Path: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def stored(self) -> Mapping[str, Scheme]:
        """The formats of tensors that are quantized matrices [outputs, inputs]."""

    def check(self, name: str) -> None:
        """Raises CheckpointError for a tensor that cannot be read for what it is."""

    def read(self, name: str) -> np.ndarray:
        """Floating-point values of any type, dequantized if need be."""

    def read_quantized(self, name: str, dtype: DTypeLike) -> QuantizedArray:
        """A tensor of `stored`, bit for bit."""


@runtime_checkable
class PartReader(Protocol):
    """A reader that can read a part of a tensor without the rest."""

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor."""


@runtime_checkable
class QuantizedPartReader(Protocol):
    """A reader that can read a part of a quantized matrix without the rest."""

    def read_quantized_part(self, name: str, dtype: DTypeLike, rows: slice, columns: slice) -> QuantizedArray:
        """Rows of a tensor of `stored`, and of them columns that are whole groups, bit for bit."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter comes from: the tensor's name, and what was done to it that must be undone."""

    name: str
    transposed: bool = False  # stored [out, in]; ours are [in, out]
    interleaved_heads: int | None = None  # rows of this many heads, the channels of each RoPE pair side by side


class ParameterSource:
    """The parameters of a model, by path ("layers.0.attn.q.kernel"), each read when it is asked for and not kept.

    Attributes:
        parameters: path → shape and dtype, as the model has it.
        matrices: path → (outputs N, inputs K) of what can be quantized: kernels [K, N] and the token table [N, K].
        stored: path → format of those that are quantized already, in the checkpoint or by `replaced`.
        activation_scales: path → static scales, float32 [G], of what is multiplied with those whose scheme has such.
    """

    def __init__(
        self,
        parameters: Mapping[str, jax.ShapeDtypeStruct],
        sources: Mapping[str, Source],
        reader: TensorReader,
        *,
        activation_scales: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Raises CheckpointError for a tensor that is missing, of another shape than its parameter, or of no floats."""
        self.parameters = dict(parameters)
        self.matrices = {
            path: shape
            for path, parameter in parameters.items()
            if (shape := _matrix_shape(path, parameter.shape)) is not None
        }
        self.activation_scales = dict(activation_scales or {})
        self._sources = sources
        self._reader = reader
        self._replaced: dict[str, QuantizedArray] = {}
        for path, parameter in self.parameters.items():
            _check(reader, sources[path], parameter.shape)
        self.stored: dict[str, Scheme] = {
            path: reader.stored[sources[path].name] for path in self.matrices if sources[path].name in reader.stored
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path → shape of every parameter."""
        return {path: tuple(parameter.shape) for path, parameter in self.parameters.items()}

    @property
    def identity(self) -> str | None:
        """Tells these parameters from others and from what they were; None if not all are those of files."""
        return None if self._replaced or self.activation_scales else file_identity([self._reader.path])

    @property
    def num_elements(self) -> int:
        """Of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def plan(self, option: Rules) -> Plan:
        """What the option `quantize` means for these parameters. Raises LlmirError, see `make_plan`."""
        return make_plan(option, self.shapes, matrices=self.matrices, stored=self.stored)

    def read(self, path: str) -> jax.Array:
        """The parameter as floats, of its shape and dtype in the model."""
        dtype = self.parameters[path].dtype
        if path in self._replaced:
            matrix = self._replaced[path].dequantize(dtype)
            return matrix.T if _is_kernel(path) else matrix
        source = self._sources[path]
        array = self._rows_in_order(source, self._reader.read(source.name))
        if source.transposed:
            array = array.T
        # Contiguous and of the right dtype, it is handed to JAX without another copy.
        return jnp.asarray(np.ascontiguousarray(array.astype(dtype, copy=False)))

    def part_reader(self, path: str) -> Callable[[tuple[slice, ...]], np.ndarray] | None:
        """Reads a box of the parameter, of its dtype in the model, without the rest; None where it must be read whole:
        in a checkpoint of orbax, or where it is `replaced`."""
        source, reader = self._sources[path], self._reader
        if path in self._replaced or not isinstance(reader, PartReader):
            return None
        dtype = self.parameters[path].dtype

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if not source.transposed:
                return self._box(reader, source, index).astype(dtype, copy=False)
            return self._box(reader, source, index[::-1]).T.astype(dtype)

        return read

    def quantized_reader(
        self, path: str, scheme: Scheme, rounding: Rounding = plain_rounding
    ) -> Callable[[slice, slice], QuantizedArray] | None:
        """Reads rows of one of `matrices`, and of them columns that are whole groups, without the rest.

        The bits are those of `read_quantized`. None where it must be read whole: as `part_reader` has it, where a scale
        is for all rows, or where the rounding depends on more than the values.
        """
        shape, dtype = self.matrices[path], self.parameters[path].dtype
        scheme = scheme.fitted(shape, name=path)
        source, reader = self._sources[path], self._reader
        if path in self._replaced or scheme.per_tensor:
            return None
        if path in self.stored and self.stored[path].same_storage(scheme, shape):
            if not isinstance(reader, QuantizedPartReader):
                return None
            blocks = reader

            def read_blocks(rows: slice, columns: slice) -> QuantizedArray:
                wide, own = self._heads_of(source, rows)
                array = self._finite(path, blocks.read_quantized_part(source.name, dtype, wide, columns))
                return self._heads_apart(source, array).span(own.start, own.stop)

            return read_blocks
        if rounding is not plain_rounding or not isinstance(reader, PartReader):
            return None
        floats = reader
        is_transposed = _is_kernel(path) and not source.transposed

        def read(rows: slice, columns: slice) -> QuantizedArray:
            if is_transposed:
                box = self._box(floats, source, (columns, rows)).T
            else:
                box = self._box(floats, source, (rows, columns))
            top, left = rows.indices(shape[0])[0], columns.indices(shape[1])[0]
            where = "" if box.shape == shape else f", counted from row {top} and column {left} on"
            return quantize(box, scheme, name=f"{path}{where}", dtype=dtype)

        return read

    def _box(self, reader: PartReader, source: Source, index: tuple[slice, ...]) -> np.ndarray:
        """A box of a tensor as it is stored, but for the order of rows."""
        if source.interleaved_heads is None:
            return reader.read_part(source.name, index)
        wide, own = self._heads_of(source, index[0])
        found = reader.read_part(source.name, (wide, *index[1:]))
        return _split_pairs(found, self._num_heads(source, wide))[own]

    def _heads_of(self, source: Source, rows: slice) -> tuple[slice, slice]:
        """The rows of whole heads that some rows are of, which the file has in another order; and where in them."""
        num_rows = self._reader.shapes[source.name][0]
        start, stop, _ = rows.indices(num_rows)
        if source.interleaved_heads is None:
            return slice(start, stop), slice(0, stop - start)
        size = num_rows // source.interleaved_heads
        first, last = start // size * size, -(-stop // size) * size
        return slice(first, last), slice(start - first, stop - first)

    def _num_heads(self, source: Source, rows: slice) -> int:
        assert source.interleaved_heads is not None
        num_rows = self._reader.shapes[source.name][0]
        return int((rows.stop - rows.start) * source.interleaved_heads // num_rows)

    def read_quantized(self, path: str, scheme: Scheme, rounding: Rounding = plain_rounding) -> QuantizedArray:
        """One of `matrices`, [outputs, inputs]: bit for bit what is `stored` if that is of the scheme's format.

        Raises LlmirError that names the parameter, see `quantize`.
        """
        shape, dtype = self.matrices[path], self.parameters[path].dtype
        scheme = scheme.fitted(shape, name=path)
        if path in self.stored and self.stored[path].same_storage(scheme, shape):
            return self._replaced[path] if path in self._replaced else self._read_stored(path)
        if path in self._replaced:
            return rounding(self._replaced[path].dequantize(), scheme, (path, 0), dtype)
        source = self._sources[path]
        array = self._rows_in_order(source, self._reader.read(source.name))
        if _is_kernel(path) and not source.transposed:
            array = array.T
        return rounding(array, scheme, (path, 0), dtype)

    def load(self, plan: Plan) -> dict[str, Parameter]:
        """Every parameter, quantized where the plan says so. One at a time is in memory as floats.

        Raises LlmirError that names the parameter, see `quantize`.
        """
        schemes = {path: plan.get(path) for path in self.parameters}
        return {
            path: self.read(path) if scheme is None else self.read_quantized(path, scheme)
            for path, scheme in schemes.items()
        }

    def replaced(
        self,
        parameters: Mapping[str, QuantizedArray],
        schemes: Mapping[str, Scheme] | None = None,
        activation_scales: Mapping[str, np.ndarray] | None = None,
    ) -> "ParameterSource":
        """These parameters with some quantized arrays in their place, which are then `stored`.

        `schemes` says which of them are meant to be used with quantized activations, `activation_scales` with which
        static ones. Raises CheckpointError for what is none of `matrices`, or of another shape.
        """
        scales = {**self.activation_scales, **(activation_scales or {})}
        made = ParameterSource(self.parameters, self._sources, self._reader, activation_scales=scales)
        made._replaced, made.stored = dict(self._replaced), dict(self.stored)
        for path, array in parameters.items():
            if path not in self.matrices:
                raise CheckpointError(f"{path!r} is no parameter of this model that can be quantized")
            array.check(path)
            if array.shape != self.matrices[path]:
                raise CheckpointError(
                    f"{path}: quantized {list(array.shape)}; expected {list(self.matrices[path])} (outputs, inputs)"
                )
            made._replaced[path] = array.laid_out("rows")  # as they are saved and merged
            made.stored[path] = (schemes or {}).get(path, array.scheme)
            if not made.stored[path].same_storage(array.scheme, array.shape):
                raise CheckpointError(f"{path}: scheme {made.stored[path].name!r}, but it is {array.scheme.name!r}")
        return made

    def _read_stored(self, path: str) -> QuantizedArray:
        source = self._sources[path]
        array = self._finite(path, self._reader.read_quantized(source.name, self.parameters[path].dtype))
        return self._heads_apart(source, array)

    def _finite(self, path: str, array: QuantizedArray) -> QuantizedArray:
        for what, part in (("scale", array.scales), ("minimum", array.minima)):
            if part is not None and not np.isfinite(np.asarray(part, np.float32)).all():
                raise CheckpointError(
                    f"{self._reader.path}: {path}: a {what} of tensor {self._sources[path].name!r} is not finite; "
                    "fetch it again"
                )
        return array

    def _heads_apart(self, source: Source, array: QuantizedArray) -> QuantizedArray:
        """Rows of whole heads in our order."""
        if source.interleaved_heads is None or array.per_tensor:
            return array
        num_heads = self._num_heads(source, slice(0, array.shape[0]))
        order = _split_pairs(np.arange(array.shape[0]), num_heads)
        made: QuantizedArray = jax.tree.map(lambda part: jnp.asarray(np.asarray(part)[order]), array)
        return made

    def _rows_in_order(self, source: Source, array: np.ndarray) -> np.ndarray:
        return array if source.interleaved_heads is None else _split_pairs(array, source.interleaved_heads)


def _is_kernel(path: str) -> bool:
    return path.rpartition(".")[2] == "kernel"


def _matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(outputs, inputs) of a parameter that can be quantized."""
    if len(shape) != 2:
        return None
    if _is_kernel(path):
        return shape[1], shape[0]
    return (shape[0], shape[1]) if path == "embed.embedding" else None


def _check(reader: TensorReader, source: Source, shape: tuple[int, ...]) -> None:
    stored_shape = tuple(shape[::-1] if source.transposed else shape)
    found = reader.shapes.get(source.name)
    if found is None:
        raise CheckpointError(
            f"{reader.path}: no tensor {source.name!r}, which the model's config asks for; "
            "the file is incomplete or of another model: fetch it again"
        )
    if found != stored_shape:
        raise CheckpointError(
            f"{reader.path}: tensor {source.name!r} has shape {list(found)}, but the model's config asks for "
            f"{list(stored_shape)}; config and weights are not of the same model"
        )
    reader.check(source.name)


def _split_pairs(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from (pair, member) order to (member, pair): what half-split RoPE turns together."""
    half = array.shape[0] // num_heads // 2
    return array.reshape(num_heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
