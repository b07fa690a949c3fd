"""What fills the parameter arguments of a step: arrays of a model, or tensors of a checkpoint, one at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import jax
import jax.numpy as jnp
from xdsl.dialects.builtin import ModuleOp

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.stored_matrix import StoredMatrix
from llmir_jax.dialects import llm
from llmir_jax.quantization import Plan, QuantizedArray, Scheme, quantize
from llmir_jax.trace import Parameter
from llmir_jax.transforms import signature
from llmir_jax.transforms.weight_quantization import stored_matrix


class WeightSource(Protocol):
    """Where the values of a model's parameters come from, by path."""

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """(outputs, inputs) of those that `read_quantized` reads: kernels [K, N], and tables [N, K]."""

    @property
    def stored(self) -> Mapping[str, Scheme]:
        """The formats of those that are quantized already."""

    def read(self, path: str) -> jax.Array:
        """The parameter as floats."""

    def read_quantized(self, path: str, scheme: Scheme) -> QuantizedArray:
        """The parameter as a matrix [N, K] in a scheme."""


class ModelWeights:
    """The arrays of a model that is in memory."""

    matrices: Mapping[str, tuple[int, int]] = {}
    stored: Mapping[str, Scheme] = {}

    def __init__(self, paths: Sequence[str], arrays: Sequence[jax.Array]) -> None:
        self._arrays = dict(zip(paths, arrays, strict=True))

    def read(self, path: str) -> jax.Array:
        """The parameter as it is."""
        return jnp.asarray(self._arrays[path])

    def read_quantized(self, path: str, scheme: Scheme) -> QuantizedArray:
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
class Weight:
    """The value of one parameter argument of a step."""

    path: str
    value: jax.Array | QuantizedArray
    matrix: StoredMatrix | None
    """Where a quantized value lies in the parameter."""


def fill(module: ModuleOp, plan: Plan | None, source: WeightSource) -> list[Weight]:
    """A value for each parameter argument of @main, in order.

    Raises LlmirError, which names the parameter, for weights that cannot be quantized.
    """
    main = main_function(module)
    attributes = signature.argument_attributes(main)
    weights: list[Weight] = []
    last: tuple[str, jax.Array] | None = None  # slices of one parameter come one after the other
    for arg, path in signature.parameter_paths(main):
        if not isinstance(arg.type, llm.QuantizedTensorType):
            weights.append(Weight(path=path, value=source.read(path), matrix=None))
            continue
        assert plan is not None
        matrix = stored_matrix(attributes[arg.index])
        scheme = plan.schemes[path].fitted(matrix.shape, name=path)
        if _is_whole(path, matrix, source):
            value = source.read_quantized(path, scheme)
        else:
            if last is None or last[0] != path:
                last = None  # before the next one is read
                last = path, source.read(path)
            value = quantize(matrix.read(last[1]), scheme, name=path)
        weights.append(Weight(path=path, value=value, matrix=matrix))
    return weights


def _is_whole(path: str, matrix: StoredMatrix, source: WeightSource) -> bool:
    """Whether the step reads the parameter as the matrix that the source has."""
    if source.matrices.get(path) != matrix.shape:
        return False
    n, k = matrix.shape
    # `ParameterSource` has the same rule of names.
    return matrix.is_kernel((k, n)) if path.rpartition(".")[2] == "kernel" else matrix.is_table((n, k))


Parts = tuple[tuple[StoredMatrix, QuantizedArray], ...]


def dense_sources(parameters: Sequence[Parameter], weights: Sequence[Weight], source: WeightSource) -> list[Any]:
    """For each parameter of the forward what `dense` makes it of: an array, or quantized matrices and where they lie.

    A parameter that the step does not read is read from the source: the forward may (a mask that it has stored).
    """
    by_path: dict[str, list[Weight]] = {}
    for weight in weights:
        by_path.setdefault(weight.path, []).append(weight)
    found: list[Any] = []
    for parameter in parameters:
        own = by_path.get(parameter.path)
        if own is None:
            found.append(source.read(parameter.path))
        elif own[0].matrix is None:
            found.append(own[0].value)
        else:
            found.append([weight.value for weight in own])
    return found


def dense(
    parameters: Sequence[Parameter], matrices: Mapping[str, list[StoredMatrix]], given: Sequence[Any]
) -> list[Any]:
    """The forward's parameters as floats, of what `dense_sources` gives. Traceable; inside jit not all are kept."""
    return [
        _assembled(parameter, matrices[parameter.path], value) if isinstance(value, list) else value
        for parameter, value in zip(parameters, given, strict=True)
    ]


def matrices_of(weights: Sequence[Weight]) -> dict[str, list[StoredMatrix]]:
    """Where the quantized weights lie, by path."""
    found: dict[str, list[StoredMatrix]] = {}
    for weight in weights:
        if weight.matrix is not None:
            found.setdefault(weight.path, []).append(weight.matrix)
    return found


def _assembled(parameter: Parameter, matrices: Sequence[StoredMatrix], values: Sequence[QuantizedArray]) -> jax.Array:
    """A parameter put together from the matrices that lie in it; zeros where there is none."""
    pairs = sorted(zip(matrices, values, strict=True), key=lambda pair: pair[0].offset)
    size = 1
    for n in parameter.shape:
        size *= n
    if all(matrix.span is not None for matrix in matrices):
        flat = jnp.concatenate(list(_runs(pairs, size, parameter.dtype)))
        return flat.reshape(parameter.shape)
    whole = jnp.zeros(size, parameter.dtype)
    for matrix, value in pairs:
        whole = whole.at[matrix.places()].set(value.dequantize(parameter.dtype))
    return whole.reshape(parameter.shape)


def _runs(pairs: Sequence[tuple[StoredMatrix, QuantizedArray]], size: int, dtype: Any) -> Iterator[jax.Array]:
    """The parameter's memory, run by run."""
    at = 0
    for matrix, value in pairs:
        assert matrix.span is not None
        begin, length = matrix.span
        if begin > at:
            yield jnp.zeros(begin - at, dtype)
        yield matrix.in_memory_order(value.dequantize(dtype))
        at = begin + length
    if at < size:
        yield jnp.zeros(size - at, dtype)


__all__ = ["LazyArrays", "ModelWeights", "Weight", "WeightSource", "dense", "dense_sources", "fill", "matrices_of"]
