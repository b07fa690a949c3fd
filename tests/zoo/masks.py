"""The causal mask and the sliding window, as different people write them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.plain import Init, Params, head_weights, heads_of, merge, toy_lm
from zoo.registry import Built, derivable


def masked_lm(seed: int, mask_scores: Callable[[jax.Array], jax.Array], **options: Any) -> Built:
    """A model whose scaled scores [B, H, T, T] go through `mask_scores`."""

    def attend(p, h):
        q, k, v = heads_of(p, h)
        s = mask_scores(jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, axis=-1), v))

    return toy_lm(seed, attend, **options)


@derivable("additive mask of -inf")
def mask_additive_inf(seed: int) -> Built:
    return masked_lm(seed, lambda s: s + jnp.triu(jnp.full(s.shape[-2:], -jnp.inf), k=1))


@derivable("additive mask of -1e9 times one minus tril")
def mask_additive_1e9(seed: int) -> Built:
    return masked_lm(seed, lambda s: s - 1e9 * (1 - jnp.tril(jnp.ones(s.shape[-2:])))[None, None])


@derivable("additive mask of finfo.min")
def mask_additive_finfo(seed: int) -> Built:
    def mask_scores(s):
        t = s.shape[-1]
        allowed = jnp.arange(t)[None, :] <= jnp.arange(t)[:, None]
        return s + jnp.where(allowed, 0.0, jnp.finfo(s.dtype).min)[None, None]

    return masked_lm(seed, mask_scores)


@derivable("additive mask of -1e4")
def mask_additive_1e4(seed: int) -> Built:
    return masked_lm(seed, lambda s: s + jnp.where(jnp.tri(s.shape[-1]) == 0, -1e4, 0.0))


@derivable("mask added before the scale")
def mask_before_scale(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) + jnp.where(jnp.tri(t, dtype=bool), 0.0, -1e9)
        w = jax.nn.softmax(s / jnp.sqrt(10.0).astype(s.dtype), axis=-1)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))

    return toy_lm(seed, attend)


@derivable("mask multiplied into the scores, then -1e10 added (the original GPT-2)")
def mask_multiplied(seed: int) -> Built:
    def mask_scores(s):
        nd, ns = s.shape[-2:]
        i = jnp.arange(nd)[:, None]
        j = jnp.arange(ns)
        b = (i >= j - ns + nd).astype(s.dtype).reshape(1, 1, nd, ns)
        return s * b - 1e10 * (1 - b)

    return masked_lm(seed, mask_scores)


@derivable("select by tril of ones")
def mask_select_tril(seed: int) -> Built:
    return masked_lm(seed, lambda s: jnp.where(jnp.tril(jnp.ones_like(s[0, 0])) == 0, float("-inf"), s))


@derivable("np.tril constant of [T, T]")
def mask_numpy_tril(seed: int) -> Built:
    def mask_scores(s):
        mask = np.tril(np.ones((s.shape[-1], s.shape[-1]), dtype=bool))
        return jnp.where(mask, s, np.float32(-3.4e38))

    return masked_lm(seed, mask_scores)


@derivable("stored [1024, 1024] buffer sliced [:T, :T], a closed-over constant")
def mask_buffer_constant(seed: int) -> Built:
    buffer = jnp.tril(jnp.ones((1, 1, 1024, 1024), jnp.int8))

    def mask_scores(s):
        t = s.shape[-1]
        return jnp.where(buffer[:, :, :t, :t] == 1, s, -1e9)

    return masked_lm(seed, mask_scores)


@derivable("stored [1024, 1024] buffer sliced [:T, :T], a leaf of the model")
def mask_buffer_leaf(seed: int) -> Built:
    def weights(init):
        return head_weights(init) | {"bias": jnp.tril(jnp.ones((1024, 1024), bool))}

    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        s = jnp.where(p["bias"][:t, :t], s, -jnp.inf)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, axis=-1), v))

    return toy_lm(seed, attend, weights)


@derivable("stored additive buffer taken by dynamic_slice")
def mask_buffer_dynamic_slice(seed: int) -> Built:
    buffer = np.triu(np.full((256, 256), -np.inf, np.float32), 1)

    def mask_scores(s):
        t = s.shape[-1]
        return s + jax.lax.dynamic_slice(jnp.asarray(buffer), (0, 0), (t, t))

    return masked_lm(seed, mask_scores)


@derivable("mask as iota comparisons")
def mask_iota(seed: int) -> Built:
    def mask_scores(s):
        rows = jax.lax.broadcasted_iota(jnp.int32, s.shape, 2)
        cols = jax.lax.broadcasted_iota(jnp.int32, s.shape, 3)
        return jax.lax.select(rows >= cols, s, jnp.full_like(s, -1e30))

    return masked_lm(seed, mask_scores)


@derivable("nn.make_causal_mask", "nn.combine_masks")
def mask_flax_helpers(seed: int) -> Built:
    def forward(params, tokens):
        mask = nn.combine_masks(nn.make_causal_mask(tokens), nn.make_attention_mask(tokens >= 0, tokens >= 0))
        bias = jax.lax.select(mask > 0, jnp.zeros(mask.shape), jnp.full(mask.shape, -1e10))

        def attend(p, h):
            q, k, v = heads_of(p, h)
            s = jnp.einsum("bqhd,bkhd->bhqk", q / jnp.sqrt(10.0), k) + bias
            return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))

        return toy_lm(seed, attend).forward(params, tokens)

    return toy_lm(seed)._replace(forward=forward)


@derivable("nn.make_causal_mask alone")
def mask_flax_causal(seed: int) -> Built:
    def mask_scores(s):
        mask = nn.make_causal_mask(jnp.ones((1, s.shape[-1])), dtype=bool)
        return jnp.where(mask, s, jnp.finfo(jnp.float32).min)

    return masked_lm(seed, mask_scores)


@derivable("mask passed in by the wrapper")
def mask_from_wrapper(seed: int) -> Built:
    def net(params, tokens, mask):
        def attend(p, h):
            q, k, v = heads_of(p, h)
            s = jnp.where(mask[:, None], jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e9)
            return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))

        return toy_lm(seed, attend).forward(params, tokens)

    def forward(params, tokens):
        b, t = tokens.shape
        return net(params, tokens, jnp.broadcast_to(jnp.tril(jnp.ones((t, t), bool)), (b, t, t)))

    return toy_lm(seed)._replace(forward=forward)


@derivable("sliding window of 3, tril and triu")
def window_tril_triu(seed: int) -> Built:
    def mask_scores(s):
        ones = jnp.ones(s.shape[-2:], bool)
        return jnp.where(jnp.tril(ones) & jnp.triu(ones, -2), s, -jnp.inf)

    return masked_lm(seed, mask_scores)


@derivable("sliding window of 5, differences of positions")
def window_difference(seed: int) -> Built:
    def mask_scores(s):
        position = jnp.arange(s.shape[-1])
        back = position[:, None] - position[None, :]
        return jnp.where((back >= 0) & (back < 5), s, -2.0e38)

    return masked_lm(seed, mask_scores)


@derivable("sliding window of 5, two additive masks")
def window_two_masks(seed: int) -> Built:
    def mask_scores(s):
        i, j = jnp.indices(s.shape[-2:])
        return s + jnp.where(j > i, -1e9, 0.0) + jnp.where(i - j > 4, -1e9, 0.0)

    return masked_lm(seed, mask_scores)


@derivable("sliding window of 160, wider than the analysis looks", longest=190)
def window_wide(seed: int) -> Built:
    def mask_scores(s):
        i, j = jnp.indices(s.shape[-2:])
        return jnp.where((j <= i) & (j > i - 160), s, -jnp.inf)

    return masked_lm(seed, mask_scores)


@derivable("sliding window of 1: each token sees itself alone")
def window_one(seed: int) -> Built:
    return masked_lm(seed, lambda s: jnp.where(jnp.eye(s.shape[-1], dtype=bool), s, -1e30))


@derivable("local and global layers by turns (Gemma 2)")
def window_alternating(seed: int) -> Built:
    def attend(p, h, layer):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        mask = jnp.tri(t, dtype=bool)
        if layer % 2 == 0:
            mask &= jnp.triu(jnp.ones((t, t), bool), 1 - 3)
        s = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e30)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))

    return toy_lm(seed, attend, layers=4, by_layer=True)


@derivable("three different windows, KV heads and head sizes in one model")
def window_every_layer_its_own(seed: int) -> Built:
    windows, kv_heads, dims = (3, None, 7), iter((1, 3, 6)), iter((6, 10, 4))

    def weights(init: Init) -> Params:
        return head_weights(init, heads=6, kv_heads=next(kv_heads), dim=next(dims))

    def attend(p, h, layer):
        q, k, v = heads_of(p, h)
        groups = q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
        back = jnp.arange(h.shape[1])[:, None] - jnp.arange(h.shape[1])
        mask = back >= 0 if windows[layer] is None else (back >= 0) & (back < windows[layer])
        s = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.4, -1e30)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))

    return toy_lm(seed, attend, weights, layers=3, by_layer=True)
