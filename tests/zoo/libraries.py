"""Attention called from a library: jax.nn, flax.linen and flax.nnx functions and modules."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from zoo.plain import Params, drawn, head_weights, heads_of, merge, toy_lm
from zoo.registry import Built, derivable


@derivable("jax.nn.dot_product_attention, is_causal")
def jax_attention_causal(seed: int) -> Built:
    def attend(p, h):
        return merge(p, jax.nn.dot_product_attention(*heads_of(p, h), is_causal=True))

    return toy_lm(seed, attend)


@derivable("jax.nn.dot_product_attention, mask= and scale=", "GQA in the library")
def jax_attention_mask(seed: int) -> Built:
    def attend(p, h):
        t = h.shape[1]
        mask = jnp.tril(jnp.ones((1, 1, t, t), bool))
        return merge(p, jax.nn.dot_product_attention(*heads_of(p, h), mask=mask, scale=0.25))

    return toy_lm(seed, attend, lambda init: head_weights(init, heads=6, kv_heads=2, dim=6))


@derivable("jax.nn.dot_product_attention, local_window_size=")
def jax_attention_window(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        return merge(p, jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(4, 0)))

    return toy_lm(seed, attend)


@derivable("jax.nn.dot_product_attention, bias=")
def jax_attention_bias(seed: int) -> Built:
    def attend(p, h):
        t = h.shape[1]
        bias = jnp.where(jnp.tri(t, dtype=bool), 0.0, -1e30)[None, None]
        return merge(p, jax.nn.dot_product_attention(*heads_of(p, h), bias=bias))

    return toy_lm(seed, attend)


@derivable("nn.dot_product_attention with a mask")
def linen_attention_function(seed: int) -> Built:
    def attend(p, h):
        mask = nn.make_causal_mask(h[..., 0])
        return merge(p, nn.dot_product_attention(*heads_of(p, h), mask=mask, deterministic=True))

    return toy_lm(seed, attend)


@derivable("nnx.dot_product_attention with is_causal")
def nnx_attention_function(seed: int) -> Built:
    def attend(p: Params, h: jax.Array) -> jax.Array:
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        mask = jnp.broadcast_to(jnp.tri(t, dtype=bool), (h.shape[0], 1, t, t))
        return merge(p, nnx.dot_product_attention(q, k, v, mask=mask))

    return toy_lm(seed, attend)


@derivable("nn.MultiHeadDotProductAttention", "linen", "tied head by Embed.attend")
def linen_multi_head(seed: int) -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(97, 36)
            x = embed(tokens)
            mask = nn.make_causal_mask(tokens)
            for _ in range(2):
                h = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=30, use_bias=True)(h, mask=mask)
                h = nn.LayerNorm()(x)
                x = x + nn.Dense(36)(nn.gelu(nn.Dense(50)(h)))
            return embed.attend(nn.LayerNorm()(x))

    net = Model()
    params = drawn(jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32)), seed)
    return Built(lambda params, tokens: net.apply(params, tokens), params, 97)


@derivable("nnx.MultiHeadAttention", "nnx", "QK-norm in the library")
def nnx_multi_head(seed: int) -> Built:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.attention = nnx.MultiHeadAttention(
                num_heads=4, in_features=36, qkv_features=40, decode=False, normalize_qk=True, rngs=rngs
            )
            self.norm1 = nnx.LayerNorm(36, rngs=rngs)
            self.norm2 = nnx.RMSNorm(36, rngs=rngs)
            self.up = nnx.Linear(36, 50, rngs=rngs)
            self.down = nnx.Linear(50, 36, rngs=rngs)

        def __call__(self, x, mask):
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self.down(nnx.silu(self.up(self.norm2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(97, 36, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.head = nnx.Linear(36, 97, rngs=rngs)

        def __call__(self, tokens):
            mask = nnx.make_causal_mask(tokens)
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x, mask)
            return self.head(x)

    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    nnx.update(model, drawn(nnx.state(model, nnx.Param), seed))
    return Built(lambda model, tokens: model(tokens), model, 97)
