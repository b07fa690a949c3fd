"""Build a model and put a checkpoint's tensors into it: one tensor in flight at a time, no random weights first."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from llmir_jax.errors import CheckpointError
from llmir_jax.models.gpt2 import GPT2, GPT2Config
from llmir_jax.models.llama import Llama, LlamaConfig

ModelConfig = LlamaConfig | GPT2Config

# No model is near these; beyond them a size is damage, which must not be taken for a wish to allocate.
MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 12


class TensorReader(Protocol):
    """The tensors of a checkpoint, on disk. `read` gives floating-point values of any type, dequantized if need be."""

    @property
    def path(self) -> Path: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter comes from: the tensor's name, and what was done to it that must be undone."""

    name: str
    transposed: bool = False  # stored [out, in]; ours are [in, out]
    interleaved_heads: int | None = None  # rows of this many heads, the channels of each RoPE pair side by side


@dataclass(frozen=True)
class _OneKey:
    """Stands for nnx.Rngs where no number is drawn: counting keys would take most of the time of an abstract build."""

    key: jax.Array

    def params(self) -> jax.Array:
        return self.key


def abstract_model(config: ModelConfig, *, dtype: DTypeLike, param_dtype: DTypeLike) -> nnx.Module:
    """The model with a shape and dtype in place of every array."""

    def build() -> nnx.Module:
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": _OneKey(jax.random.key(0))}
        return GPT2(config, **options) if isinstance(config, GPT2Config) else Llama(config, **options)

    return nnx.eval_shape(build)


def assemble(
    config: ModelConfig,
    sources: Mapping[str, Source],
    reader: TensorReader,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> nnx.Module:
    """The model of `config` with each parameter read from its source (keys of `sources`: "layers.0.attn.q.kernel").

    Raises CheckpointError for a tensor that is missing or has another shape than the config asks for.
    """
    graph, state = nnx.split(abstract_model(config, dtype=dtype, param_dtype=param_dtype))
    filled: list[tuple[tuple[Any, ...], Any]] = []
    for key, variable in nnx.to_flat_state(state):
        source = sources[".".join(map(str, key))]
        wanted = variable.get_value()
        filled.append((key, variable.replace(_read(reader, source, wanted.shape, wanted.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _read(reader: TensorReader, source: Source, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    stored_shape = shape[::-1] if source.transposed else shape
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
    array = reader.read(source.name)
    if source.interleaved_heads is not None:
        array = _split_pairs(array, source.interleaved_heads)
    if source.transposed:
        array = array.T
    # Contiguous and of the right dtype, it is handed to JAX without another copy.
    return jnp.asarray(np.ascontiguousarray(array.astype(dtype, copy=False)))


def _split_pairs(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from (pair, member) order to (member, pair): what half-split RoPE turns together."""
    half = array.shape[0] // num_heads // 2
    return array.reshape(num_heads, half, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
