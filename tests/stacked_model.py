"""A small decoder model in plain JAX: layers stacked and scanned, tied embeddings, a learned table of positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HIDDEN, HEADS, HEAD_DIM, LAYERS = 80, 64, 192, 4, 16, 2


def make_params(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), dtype)

    return {
        "embed": jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), dtype),
        "positions": jnp.asarray(rng.normal(size=(128, WIDTH)) / 4, dtype),
        "layers": {
            "qkv": draw(LAYERS, 3, WIDTH, HEADS * HEAD_DIM),
            "out": jnp.asarray(rng.normal(size=(LAYERS, HEADS, HEAD_DIM, WIDTH)) / 8, dtype),
            "up": draw(LAYERS, WIDTH, HIDDEN),
            "bias": jnp.asarray(rng.normal(size=(LAYERS, HIDDEN)) / 4, dtype),
            "down": draw(LAYERS, HIDDEN, WIDTH),
        },
    }


def forward(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """A stack of layers run by lax.scan, tied embeddings, a learned table of positions."""
    length = tokens.shape[1]
    x = params["embed"][tokens] + params["positions"][:length]
    visible = jnp.tril(jnp.ones((length, length), bool))

    def layer(x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        q, k, v = ((x @ w["qkv"][i]).reshape(*x.shape[:2], HEADS, HEAD_DIM) for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum("bhqk,bkhd,hdc->bqc", weights, v, w["out"])
        return x + jnp.tanh(x @ w["up"] + w["bias"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["embed"].T
