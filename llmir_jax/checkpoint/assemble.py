"""Build a model and put a checkpoint's tensors into it: one tensor in flight at a time, no random weights first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from llmir_jax.checkpoint.source import ParameterSource, Source, TensorReader
from llmir_jax.models.gpt2 import GPT2, GPT2Config
from llmir_jax.models.llama import Llama, LlamaConfig

ModelConfig = LlamaConfig | GPT2Config

# No model is near these; beyond them a size is damage, which must not be taken for a wish to allocate.
MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 12


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


def open_source(
    abstract: nnx.Module,
    sources: Mapping[str, Source],
    reader: TensorReader,
    *,
    activation_scales: Mapping[str, np.ndarray] | None = None,
) -> ParameterSource:
    """The parameters of a model of shapes, in a checkpoint. Raises CheckpointError, see `ParameterSource`."""
    flat = nnx.to_flat_state(nnx.state(abstract))
    parameters = {parameter_path(key): variable.get_value() for key, variable in flat}
    return ParameterSource(parameters, sources, reader, activation_scales=activation_scales)


def assemble(abstract: nnx.Module, source: ParameterSource) -> nnx.Module:
    """The model of shapes with each parameter read from its source. Raises CheckpointError for a damaged file."""
    graph, state = nnx.split(abstract)
    filled = [(key, variable.replace(source.read(parameter_path(key)))) for key, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def parameter_path(key: tuple[Any, ...]) -> str:
    """A key of nnx's flat state as a person writes it: layers.0.attn.q.kernel."""
    return ".".join(map(str, key))
