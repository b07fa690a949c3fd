"""What fills the parameter arguments of a step: arrays of a model, or tensors of a checkpoint, one at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, overload

import jax
import jax.numpy as jnp
import numpy as np
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.ir import Attribute, BlockArgument

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.stored_matrix import StoredMatrix
from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.quantization import Plan, QuantizedArray, Rounding, Scheme, plain_rounding
from llmir_jax.quantization.array import Layout
from llmir_jax.trace import Parameter
from llmir_jax.transforms import signature
from llmir_jax.transforms.weight_quantization import PARTS, ROWS, stored_matrices


class WeightSource(Protocol):
    """Where the values of a model's parameters come from, by path."""

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """(outputs, inputs) of those that `read_quantized` reads: kernels [K, N], and tables [N, K]."""

    @property
    def stored(self) -> Mapping[str, Scheme]:
        """The formats of those that are quantized already."""

    @property
    def activation_scales(self) -> Mapping[str, np.ndarray]:
        """Static scales, float32 [G] each, of what is multiplied with them, where their schemes have such."""

    @property
    def identity(self) -> str | None:
        """Tells these parameters from any others, in other processes too; None if nothing does that costs little."""

    def read(self, path: str) -> jax.Array:
        """The parameter as floats."""

    def read_quantized(self, path: str, scheme: Scheme, rounding: Rounding) -> QuantizedArray:
        """The parameter as a matrix [N, K] in a scheme, rounded where it is not stored so."""


class PartsReader(Protocol):
    """Reads parameters where they live on a mesh, a device's part at a time; None for one that must be read whole."""

    def floats(self, arg: BlockArgument, path: str) -> jax.Array | None:
        """A parameter that stays as it is, for an argument of @main."""

    def quantized(self, arg: BlockArgument, path: str, scheme: Scheme, rounding: Rounding) -> QuantizedArray | None:
        """A parameter that is one matrix [N, K], in a scheme."""


class ModelWeights:
    """The arrays of a model that is in memory."""

    matrices: Mapping[str, tuple[int, int]] = {}
    stored: Mapping[str, Scheme] = {}
    activation_scales: Mapping[str, np.ndarray] = {}
    identity: str | None = None

    def __init__(self, paths: Sequence[str], arrays: Sequence[jax.Array]) -> None:
        self._arrays = dict(zip(paths, arrays, strict=True))

    def read(self, path: str) -> jax.Array:
        """The parameter as it is."""
        return jnp.asarray(self._arrays[path])

    def read_quantized(self, path: str, scheme: Scheme, rounding: Rounding) -> QuantizedArray:
        """Never asked for: it has no `matrices`."""
        raise KeyError(path)


class LazyArrays(Sequence[jax.Array]):
    """The parameters in an order, each read when it is asked for."""

    def __init__(self, source: WeightSource, paths: Sequence[str]) -> None:
        self._source, self._paths = source, paths

    @overload
    def __getitem__(self, index: int) -> jax.Array: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[jax.Array]: ...
    def __getitem__(self, index: int | slice) -> jax.Array | Sequence[jax.Array]:
        if isinstance(index, slice):
            return LazyArrays(self._source, self._paths[index])
        return self._source.read(self._paths[index])

    def __len__(self) -> int:
        return len(self._paths)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows [start, stop) of a quantized argument: a matrix of a parameter."""

    path: str
    matrix: StoredMatrix
    start: int
    stop: int

    def of(self, value: QuantizedArray | jax.Array) -> QuantizedArray | jax.Array:
        """These rows of the argument's value. Traceable."""
        if not isinstance(value, QuantizedArray):
            return value[self.start : self.stop]
        return value.span(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The value of one parameter argument of a step."""

    path: str
    value: jax.Array | QuantizedArray
    pieces: tuple[Piece, ...] = ()
    """What a quantized value is made of."""

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        if isinstance(self.value, QuantizedArray):
            return self.value.nbytes
        return prod(self.value.shape) * jnp.dtype(self.value.dtype).itemsize

    def describe(self, plan: Plan | None) -> Iterator[tuple[str, str]]:
        """Each parameter that it is made of, and what became of it: dtype or format, and shape."""
        if not self.pieces:
            yield self.path, f"{self.value.dtype}{list(self.value.shape)}"
        for piece in self.pieces:
            kind = str(self.value.dtype)
            if isinstance(self.value, QuantizedArray):
                assert plan is not None
                scheme = plan.schemes[piece.path].fitted(piece.matrix.shape, name=piece.path)
                kind = f"{self.value.scheme.name}{scheme.activations_name}{self.value.layout_name}"
            yield piece.path, f"{kind}{list(piece.matrix.shape)}"


def describe(value: jax.Array | QuantizedArray) -> Any:
    """The value with shapes and dtypes in place of its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), value)


def read_matrix(
    source: WeightSource,
    path: str,
    matrix: StoredMatrix,
    scheme: Scheme,
    read: Callable[[str], jax.Array],
    rounding: Rounding,
) -> QuantizedArray:
    """A matrix of a parameter in a scheme that fits it; `read` gives the parameter as floats if they are needed."""
    if _is_whole(path, matrix, source):
        return source.read_quantized(path, scheme, rounding)
    return rounding(matrix.read(read(path)), scheme, (path, matrix.offset), None)


def fill(
    module: ModuleOp,
    plan: Plan | None,
    source: WeightSource,
    rounding: Rounding = plain_rounding,
    own: PartsReader | None = None,
) -> Iterator[Weight]:
    """A value for each parameter argument of @main, in order, each made when it is asked for.

    `own` reads the parts of a mesh's devices, or gives None where that cannot be.

    Raises LlmirError, which names the parameter, for weights that cannot be quantized.
    """
    main = main_function(module)
    attributes = signature.argument_attributes(main)
    floats = _LastRead(source)
    for arg, path in signature.parameter_paths(main):
        if not isinstance(arg.type, llm.QuantizedTensorType):
            assert isinstance(arg.type, TensorType)
            dtype = element_dtype(arg.type.get_element_type())
            value = None if own is None or _pieces(attributes[arg.index]) else own.floats(arg, path)
            if value is not None:
                yield Weight(path=path, value=value)
                continue
            yield _float_weight(path, attributes[arg.index], source, floats, dtype)
            continue
        assert plan is not None
        pieces = _pieces(attributes[arg.index])
        schemes = [plan.schemes[piece.path].fitted(piece.matrix.shape, name=piece.path) for piece in pieces]
        if own is not None and len(pieces) == 1 and _is_whole(pieces[0].path, pieces[0].matrix, source):
            parts = own.quantized(arg, pieces[0].path, schemes[0], rounding)
            if parts is not None:
                yield Weight(path=path, value=parts, pieces=pieces)
                continue
        values = []
        for piece, scheme in zip(pieces, schemes, strict=True):
            values.append(read_matrix(source, piece.path, piece.matrix, scheme, floats.read, rounding))
        whole = _rows_of_all(values).laid_out("columns" if arg.type.in_columns else "rows")
        yield Weight(path=path, value=whole, pieces=pieces)


def shapes_of_weights(module: ModuleOp, plan: Plan | None) -> Iterator[Weight]:
    """What `fill` gives, with shapes and dtypes in place of arrays: nothing is read."""
    main = main_function(module)
    attributes = signature.argument_attributes(main)
    for arg, path in signature.parameter_paths(main):
        pieces = _pieces(attributes[arg.index])
        value: Any
        if isinstance(arg.type, llm.QuantizedTensorType):
            assert plan is not None
            matrices = []
            for piece in pieces:
                scheme = plan.schemes[piece.path].fitted(piece.matrix.shape, name=piece.path)
                matrices.append(QuantizedArray.shapes(scheme, piece.matrix.shape))
            layout: Layout = "columns" if arg.type.in_columns else "rows"
            value = jax.eval_shape(lambda own, layout=layout: _rows_of_all(own).laid_out(layout), matrices)
        else:
            assert isinstance(arg.type, TensorType)
            value = jax.ShapeDtypeStruct(arg.type.get_shape(), element_dtype(arg.type.get_element_type()))
        yield Weight(path=path, value=value, pieces=pieces)


def _pieces(attributes: Mapping[str, Attribute]) -> tuple[Piece, ...]:
    """The matrices that an argument has the rows of, one after the other; none where it is a parameter as it is."""
    pieces: list[Piece] = []
    for part, matrix in stored_matrices(attributes) if ROWS in attributes or PARTS in attributes else ():
        start = pieces[-1].stop if pieces else 0
        pieces.append(Piece(path=part, matrix=matrix, start=start, stop=start + matrix.shape[0]))
    return tuple(pieces)


def _float_weight(
    path: str, attributes: Mapping[str, Attribute], source: WeightSource, floats: "_LastRead", dtype: np.dtype[Any]
) -> Weight:
    """A parameter as it is, or the matrix that an argument has of one or of several."""
    pieces = _pieces(attributes)
    if not pieces:
        return Weight(path=path, value=source.read(path))
    values = [piece.matrix.read(floats.read(piece.path)) for piece in pieces]
    return Weight(path=path, value=jnp.asarray(np.concatenate(values).astype(dtype)), pieces=pieces)


class _LastRead:
    """Keeps the parameter that was read last: slices of one come one after the other."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._last: tuple[str, jax.Array] | None = None

    def read(self, path: str) -> jax.Array:
        if self._last is None or self._last[0] != path:
            self._last = None  # before the next one is in memory
            self._last = path, self._source.read(path)
        return self._last[1]


def _rows_of_all(values: Sequence[QuantizedArray]) -> QuantizedArray:
    """One matrix of the rows of several of the same format."""
    if len(values) == 1:
        return values[0]

    def joined(parts: Iterator[jax.Array | None]) -> jax.Array | None:
        # One scale for a whole matrix becomes one a row.
        found = [
            jnp.broadcast_to(part, (value.shape[0], *part.shape[1:]))
            for part, value in zip(parts, values, strict=True)
            if part is not None
        ]
        return jnp.concatenate(found) if found else None

    scales = joined(value.scales for value in values)
    assert scales is not None
    return replace(
        values[0],
        values=jnp.concatenate([value.values for value in values]),
        scales=scales,
        zero_points=joined(value.zero_points for value in values),
        minima=joined(value.minima for value in values),
        shape=(sum(value.shape[0] for value in values), values[0].shape[1]),
    )


def _is_whole(path: str, matrix: StoredMatrix, source: WeightSource) -> bool:
    """Whether the step reads the parameter as the matrix that the source has."""
    if source.matrices.get(path) != matrix.shape:
        return False
    n, k = matrix.shape
    # `ParameterSource` has the same rule of names.
    return matrix.is_kernel((k, n)) if path.rpartition(".")[2] == "kernel" else matrix.is_table((n, k))


def unread(parameters: Sequence[Parameter], weights: Sequence[Weight], source: WeightSource) -> dict[str, jax.Array]:
    """Parameters that the step does not read, but the forward may: a mask that it has stored, say."""
    known = {piece.path for weight in weights for piece in weight.pieces} | {weight.path for weight in weights}
    return {p.path: source.read(p.path) for p in parameters if p.path not in known}


def assembled(parameter: Parameter, parts: Sequence[tuple[StoredMatrix, QuantizedArray | jax.Array]]) -> jax.Array:
    """A parameter put together from the matrices that lie in it; zeros where there is none."""
    pairs = sorted(parts, key=lambda pair: pair[0].offset)
    size = prod(parameter.shape)
    spans = [matrix.span for matrix, _ in pairs]
    ends = [0, *(begin + length for begin, length in filter(None, spans))]
    if None not in spans and all(span[0] >= end for span, end in zip(filter(None, spans), ends, strict=False)):
        return jnp.concatenate(list(_runs(pairs, size, parameter.dtype))).reshape(parameter.shape)
    whole = jnp.zeros(size, parameter.dtype)
    for matrix, value in pairs:
        whole = whole.at[matrix.places()].set(floats(value, parameter.dtype))
    return whole.reshape(parameter.shape)


def floats(value: QuantizedArray | jax.Array, dtype: Any) -> jax.Array:
    """The value in a floating-point dtype. Traceable."""
    return value.dequantize(dtype) if isinstance(value, QuantizedArray) else value.astype(dtype)


def _runs(
    pairs: Sequence[tuple[StoredMatrix, QuantizedArray | jax.Array]], size: int, dtype: Any
) -> Iterator[jax.Array]:
    """The parameter's memory, run by run."""
    at = 0
    for matrix, value in pairs:
        assert matrix.span is not None
        begin, length = matrix.span
        if begin > at:
            yield jnp.zeros(begin - at, dtype)
        yield matrix.in_memory_order(floats(value, dtype))
        at = begin + length
    if at < size:
        yield jnp.zeros(size - at, dtype)


__all__ = [
    "LazyArrays",
    "ModelWeights",
    "Weight",
    "WeightSource",
    "assembled",
    "describe",
    "fill",
    "floats",
    "read_matrix",
    "shapes_of_weights",
    "unread",
]
