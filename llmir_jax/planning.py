"""What a model needs and does on a slice of accelerators, from its shapes alone: no weights, no accelerator.

The step is derived as it is for serving, of the model with its first layers only, and its cost is counted on it: all
others cost what the first one does. A model whose layers differ is derived as a whole.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from llmir_jax.auto_mesh import cost_of, derive_from_shapes, one_device
from llmir_jax.checkpoint.assemble import ModelConfig, abstract_model
from llmir_jax.checkpoint.hf_config import read_hf_config
from llmir_jax.checkpoint.safetensors import read_json
from llmir_jax.derive import Derived
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.quantization import Quantize
from sharding.step_cost import StepCost

NUM_DERIVED = 2
"""Layers that are derived of a model whose layers are alike: one that others follow, and the last."""
SHORT_CONTEXT = 512  # tokens: masks of longer ones take long to evaluate
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def read_config(name: str) -> ModelConfig:
    """The config of a model: of a config.json, alone or in a directory, or of whatever `llmir.load` takes.

    Raises CheckpointError for a file that is missing, incomplete or of an unknown kind.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        return read_hf_config(read_json(path), where=str(path))
    from llmir_jax.load import load  # here, since a config needs no checkpoint

    return load(name).config


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model's step for so many sequences of so many tokens."""

    config: ModelConfig
    batch: int
    context: int
    dtype: str = "bfloat16"
    quantize: Quantize = None
    kv_cache: str | None = None
    page_size: int = 16

    @cached_property
    def cost(self) -> StepCost:
        """Of a step of the whole model. Raises LlmirError for weights that cannot be quantized so."""
        num_layers = self.config.num_layers
        num_derived = min(NUM_DERIVED, num_layers) if self.is_uniform else num_layers
        # what a token costs does not depend on how long sequences may be, unless windows are shorter than that
        is_windowed = isinstance(self.config, LlamaConfig) and any(self.config.windows)
        derived = self.derive(num_derived, self.context if is_windowed else min(self.context, SHORT_CONTEXT))
        cost = cost_of(derived, self.batch)
        return cost.with_layers(num_layers, of=num_derived, layer_of=layer_of)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are alike."""
        return not isinstance(self.config, LlamaConfig) or len(set(self.config.windows)) == 1

    def derive(self, num_layers: int, context: int) -> Derived:
        """The step of the model's first layers, over as many pages as sequences of `context` tokens fill.

        Nothing is partitioned. Raises LlmirError for weights that cannot be quantized as asked.
        """
        config = self.config
        if isinstance(config, LlamaConfig):
            config = replace(config, num_layers=num_layers, windows=config.windows[:num_layers])
        else:
            config = replace(config, num_layers=num_layers)
        model = abstract_model(config, dtype=self.dtype, param_dtype=self.dtype)
        return derive_from_shapes(
            _forward,
            model,
            self.quantize,
            context,
            one_device(),
            max_seqs=self.batch,
            page_size=self.page_size,
            num_pages=self.batch * -(-context // self.page_size),
            kv_cache=self.kv_cache,
        )


def layer_of(path: str) -> int | None:
    """The number of the layer that a parameter of our models is in."""
    match = _LAYER.search(path)
    return None if match is None else int(match[1])


def _forward(model: Any, tokens: jax.Array) -> Any:
    return model(tokens)


__all__ = ["ModelPlan", "layer_of", "read_config"]
