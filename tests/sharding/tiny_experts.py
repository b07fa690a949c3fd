"""A mixture of experts in plain JAX: every token is computed by all experts, whose outputs its router weighs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, EXPERTS, CHANNELS, HEADS, HEAD_DIM, LAYERS = 128, 32, 4, 48, 4, 8, 2


def make_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

    def layer() -> dict[str, Any]:
        attention = {name: {"kernel": draw(WIDTH, HEADS * HEAD_DIM)} for name in "qkv"}
        return {
            "attn": {**attention, "o": {"kernel": draw(HEADS * HEAD_DIM, WIDTH)}},
            "router": draw(WIDTH, EXPERTS),
            "experts": {"up": draw(EXPERTS, WIDTH, CHANNELS), "down": draw(EXPERTS, CHANNELS, WIDTH)},
        }

    layers = [layer() for _ in range(LAYERS)]
    return {"embed": {"embedding": draw(VOCAB, WIDTH)}, "layers": layers, "head": {"kernel": draw(WIDTH, VOCAB)}}


def mixture(layer: dict[str, Any], x: jax.Array) -> jax.Array:
    """Two of the experts a token, weighed by the router."""
    scores = x @ layer["router"]
    best = jax.lax.top_k(scores, 2)[0][..., -1:]
    weights = jax.nn.softmax(jnp.where(scores >= best, scores, -jnp.inf))
    hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, layer["experts"]["up"]))
    return jnp.einsum("btef,efd,bte->btd", hidden, layer["experts"]["down"], weights)


def forward(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """tokens int32[B, T] → logits [B, T, VOCAB]."""
    batch, length = tokens.shape
    at = jnp.arange(length)
    x = params["embed"]["embedding"][tokens] * 16
    for layer in params["layers"]:
        q, k, v = ((x @ layer["attn"][name]["kernel"]).reshape(batch, length, HEADS, HEAD_DIM) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
        weights = jax.nn.softmax(jnp.where(at[:, None] >= at[None, :], scores, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, HEADS * HEAD_DIM)
        x = x + mixed @ layer["attn"]["o"]["kernel"]
        x = x + mixture(layer, x)
    return x @ params["head"]["kernel"]
