"""A model of 8 heads and 2 KV heads, small enough to compile for many meshes, and what it says on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmir_jax.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=128,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    windows=(None, None, 16),
    tie_embeddings=True,
)
SHALLOW = dataclasses.replace(CONFIG, num_layers=2, windows=(None, 16))
"""With the fewest layers that two stages need."""
PROMPTS = [list(range(3, 45)), [5, 9, 2], [7] * 20]
SHORT = [prompt[:10] for prompt in PROMPTS]


def make_model(seed: int = 0, config: LlamaConfig = CONFIG) -> nnx.Module:
    """Random weights, large enough that greedy tokens differ from each other."""
    model = Llama(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.2 if x.ndim > 1 else 0.1), x.dtype) + (x.ndim == 1),
        nnx.state(model),
    )
    nnx.update(model, state)
    return model


def forward(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    """The plain forward."""
    return model(tokens)
