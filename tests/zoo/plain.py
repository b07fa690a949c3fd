"""Building blocks of the zoo's models over dict pytrees, and the small language model that hosts one attention form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.registry import Built

Params = dict[str, Any]
VOCAB = 97
WIDTH = 36


class Init:
    """Random weights in a fixed order from one seed, scaled so that activations and attention scores have unit size."""

    def __init__(self, seed: int, dtype: Any = jnp.float32) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, fan_in: int | None = None) -> jax.Array:
        scale = (fan_in or shape[0]) ** -0.5
        return jnp.asarray(self.rng.normal(size=shape) * scale, self.dtype)

    def near(self, value: float, *shape: int) -> jax.Array:
        return jnp.asarray(value + 0.2 * self.rng.normal(size=shape), self.dtype)


def drawn(shapes: Any, seed: int) -> Any:
    """Random weights for a pytree of shapes from a Flax module, by their names; no bias is zero and no scale is one.

    Much faster than the module's own initializers, each of which would be compiled.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        name = next(name for name in reversed(names) if name != "value")
        noise = rng.normal(size=leaf.shape)
        if name == "bias":
            values = 0.2 * noise
        elif leaf.ndim == 1:
            values = 1 + 0.2 * noise
        elif name in ("embedding", "pos"):
            values = noise
        else:  # roughly the fan-in, whether heads have an axis of their own or not
            values = noise / max(leaf.shape[-2], 16) ** 0.5
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


def rms(x: jax.Array, w: jax.Array, eps: float = 1e-6) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w


def layer_norm(x: jax.Array, w: jax.Array, b: jax.Array, eps: float = 1e-5) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + eps) * w + b


def head_weights(init: Init, heads: int = 3, kv_heads: int | None = None, dim: int = 10, width: int = WIDTH) -> Params:
    """Projections with a head axis: q [C, H, D], k and v [C, Hkv, D], o [H, D, C]."""
    kv_heads = kv_heads or heads
    return {
        "q": init(width, heads, dim),
        "k": init(width, kv_heads, dim),
        "v": init(width, kv_heads, dim),
        "o": init(heads, dim, width, fan_in=heads * dim),
    }


def heads_of(p: Params, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [B, T, H, D], k and v [B, T, Hkv, D] of the hidden states [B, T, C]."""
    q, k, v = (jnp.einsum("btc,chd->bthd", h, p[name]) for name in "qkv")
    return q, k, v


def merge(p: Params, o: jax.Array) -> jax.Array:
    """The output projection of [B, T, H, D]."""
    return jnp.einsum("bthd,hdc->btc", o, p["o"])


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The plainest causal attention, for models that are here for something else: all [B, T, H, D]."""
    t = q.shape[1]
    s = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    s = jnp.where(jnp.tril(jnp.ones((t, t), bool)), s, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, axis=-1), v)


def plain_attend(p: Params, h: jax.Array) -> jax.Array:
    return merge(p, causal_attention(*heads_of(p, h)))


def toy_lm(
    seed: int,
    attend: Callable[..., jax.Array] = plain_attend,
    weights: Callable[[Init], Params] = head_weights,
    *,
    embed: Callable[[Params, jax.Array], jax.Array] | None = None,
    extra: Callable[[Init], Params] | None = None,
    finish: Callable[[Params, jax.Array], jax.Array] | None = None,
    mix: Callable[[Params, jax.Array], jax.Array] | None = None,
    layers: int | None = None,
    vocab: int = VOCAB,
    dtype: Any = jnp.float32,
    by_layer: bool = False,
) -> Built:
    """Pre-norm blocks around ``attend(p, h)`` (``attend(p, h, layer)`` where it differs by layer), untied head.

    One block, or two where there is a `mix`, unless `layers` says otherwise.

    `embed(params, tokens)` replaces the table lookup, `mix(params, x)` acts on the hidden states after the first
    block, `finish(params, x)` replaces the head; `extra` makes the parameters they use.
    """
    init = Init(seed, dtype)
    layers = layers or (2 if mix else 1)

    def block() -> Params:
        return {
            "attn": weights(init),
            "norm1": init.near(1.0, WIDTH),
            "norm2": init.near(1.0, WIDTH),
            "up": init(WIDTH, 50),
            "down": init(50, WIDTH),
        }

    params = {
        "embed": init(vocab, WIDTH, fan_in=1),
        "blocks": [block() for _ in range(layers)],
        "norm": init.near(1.0, WIDTH),
        "head": init(WIDTH, vocab),
    } | (extra(init) if extra else {})

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        x = embed(params, tokens) if embed else params["embed"][tokens]
        for i, p in enumerate(params["blocks"]):
            h = rms(x, p["norm1"])
            x = x + (attend(p["attn"], h, i) if by_layer else attend(p["attn"], h))
            x = x + jax.nn.gelu(rms(x, p["norm2"]) @ p["up"]) @ p["down"]
            if mix and i == 0:
                x = mix(params, x)
        x = rms(x, params["norm"])
        return finish(params, x) if finish else x @ params["head"]

    return Built(forward, params, vocab)
