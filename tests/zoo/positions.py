"""Learned and sinusoidal positions, ALiBi, and other functions of the position alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from zoo.plain import WIDTH, Init, Params, head_weights, heads_of, merge, toy_lm
from zoo.registry import Built, derivable


def positioned_lm(seed: int, position_of: Callable[[Params, jax.Array], jax.Array], rows: int = 256) -> Built:
    """A model that adds ``position_of(params, tokens)`` to the embedding; params["pos"] is a table [rows, C]."""

    def embed(params, tokens):
        return params["embed"][tokens] + position_of(params, tokens)

    return toy_lm(seed, embed=embed, extra=lambda init: {"pos": init(rows, WIDTH, fan_in=1)})


@derivable("learned positions, table[:T]")
def learned_slice(seed: int) -> Built:
    return positioned_lm(seed, lambda params, tokens: params["pos"][: tokens.shape[1]])


@derivable("learned positions, param[None, :T, :] of [1, rows, C]")
def learned_slice_3d(seed: int) -> Built:
    return positioned_lm(seed, lambda params, tokens: params["pos"][None][:, : tokens.shape[1], :])


@derivable("learned positions, a table shorter than the analysis would like")
def learned_short_table(seed: int) -> Built:
    return positioned_lm(seed, lambda params, tokens: params["pos"][: tokens.shape[1]], rows=64)


@derivable("learned positions, take with arange")
def learned_take(seed: int) -> Built:
    return positioned_lm(seed, lambda params, tokens: jnp.take(params["pos"], jnp.arange(tokens.shape[1]), axis=0))


@derivable("learned positions, indexed by positions broadcast over the batch, offset by two (OPT)")
def learned_broadcast_offset(seed: int) -> Built:
    def position_of(params, tokens):
        position_ids = jnp.broadcast_to(jnp.arange(tokens.shape[-1])[None, :], tokens.shape)
        return params["pos"][position_ids + 2]

    return positioned_lm(seed, position_of)


@derivable("learned positions, one-hot matmul")
def learned_one_hot(seed: int) -> Built:
    return positioned_lm(seed, lambda params, tokens: jax.nn.one_hot(jnp.arange(tokens.shape[1]), 256) @ params["pos"])


@derivable("learned positions, dynamic_slice at zero")
def learned_dynamic_slice(seed: int) -> Built:
    def position_of(params, tokens):
        return jax.lax.dynamic_slice_in_dim(params["pos"], 0, tokens.shape[1])

    return positioned_lm(seed, position_of)


@derivable("learned positions, offset slice table[2:T + 2]")
def learned_offset_slice(seed: int) -> Built:
    return positioned_lm(seed, lambda params, tokens: params["pos"][2 : tokens.shape[1] + 2])


@derivable("sinusoidal positions computed in jnp")
def sinusoidal_jnp(seed: int) -> Built:
    def position_of(params, tokens):
        angle = jnp.arange(tokens.shape[1])[:, None] / 10000 ** (jnp.arange(0, WIDTH, 2) / WIDTH)
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[None]

    return positioned_lm(seed, position_of)


@derivable("sinusoidal positions computed in numpy at trace time")
def sinusoidal_numpy(seed: int) -> Built:
    def position_of(params, tokens):
        t = tokens.shape[1]
        table = np.zeros((t, WIDTH), np.float32)
        angle = np.arange(t)[:, None] * np.exp(np.arange(0, WIDTH, 2) * -(np.log(10000.0) / WIDTH))
        table[:, 0::2] = np.sin(angle)
        table[:, 1::2] = np.cos(angle)
        return jnp.array(table)

    return positioned_lm(seed, position_of)


@derivable("sinusoidal table of 512 rows, a closed-over constant, sliced")
def sinusoidal_table(seed: int) -> Built:
    angle = np.arange(512)[:, None] * np.exp(np.arange(0, WIDTH, 2) * -(np.log(1000.0) / WIDTH))
    table = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(512, WIDTH).astype(np.float32)
    return positioned_lm(seed, lambda params, tokens: table[: tokens.shape[1]])


@derivable("a special vector at position zero, by where")
def first_position(seed: int) -> Built:
    def position_of(params, tokens):
        return jnp.where(jnp.arange(tokens.shape[1])[:, None] == 0, params["pos"][0], 0.0)

    return positioned_lm(seed, position_of, rows=1)


@derivable("positions wrapped around the table, remainder of arange")
def wrapped_positions(seed: int) -> Built:
    return positioned_lm(seed, lambda params, tokens: params["pos"][jnp.arange(tokens.shape[1]) % 7], rows=7)


def slopes_of(heads: int) -> np.ndarray:
    return (2.0 ** (-4.0 * np.arange(1, heads + 1) / heads)).astype(np.float32)


def biased_lm(seed: int, bias_scores: Callable[[Params, jax.Array], jax.Array], **options) -> Built:
    """A model whose raw scores [B, H, T, T] go through `bias_scores`, which masks them too."""

    def attend(p, h):
        q, k, v = heads_of(p, h)
        s = bias_scores(p, jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, axis=-1), v))

    def weights(init: Init) -> Params:
        return head_weights(init) | {"slopes": init.near(0.5, 3)}

    return toy_lm(seed, attend, weights, **options)


@derivable("ALiBi, slope * (k - q)")
def alibi_relative(seed: int) -> Built:
    def bias_scores(p, s):
        position = jnp.arange(s.shape[-1])
        relative = position[None, :] - position[:, None]
        s = s * 10**-0.5 + slopes_of(3)[:, None, None] * relative
        return jnp.where(relative <= 0, s, -jnp.inf)

    return biased_lm(seed, bias_scores)


@derivable("ALiBi, slope * k alone (Bloom)")
def alibi_keys(seed: int) -> Built:
    def bias_scores(p, s):
        t = s.shape[-1]
        alibi = jnp.einsum("h,k->hk", slopes_of(3), jnp.arange(t, dtype=jnp.float32))[None, :, None, :]
        return alibi + s * 10**-0.5 + jnp.where(jnp.tri(t, dtype=bool), 0, jnp.finfo(jnp.float32).min)

    return biased_lm(seed, bias_scores)


@derivable("ALiBi, -slope * |distance|")
def alibi_distance(seed: int) -> Built:
    def bias_scores(p, s):
        t = s.shape[-1]
        distance = jnp.abs(jnp.arange(t)[:, None] - jnp.arange(t)[None, :]).astype(jnp.float32)
        return jnp.where(jnp.tri(t, dtype=bool), s / 10**0.5 - distance * slopes_of(3).reshape(3, 1, 1), -1e30)

    return biased_lm(seed, bias_scores)


@derivable("ALiBi and mask in one numpy constant [H, T, T]")
def alibi_numpy(seed: int) -> Built:
    def bias_scores(p, s):
        t = s.shape[-1]
        bias = slopes_of(3)[:, None, None] * np.arange(1 - t, 1, dtype=np.float32)
        bias = np.broadcast_to(bias, (3, t, t)) + np.triu(np.full((t, t), -np.inf, np.float32), 1)
        return s * 10**-0.5 + bias

    return biased_lm(seed, bias_scores)


@derivable("ALiBi inside the scale (Falcon)")
def alibi_before_scale(seed: int) -> Built:
    def bias_scores(p, s):
        t = s.shape[-1]
        s = (s + slopes_of(3)[None, :, None, None] * jnp.arange(t)) * 10**-0.5
        return jnp.where(jnp.tri(t, dtype=bool), s, -jnp.inf)

    return biased_lm(seed, bias_scores)


@derivable("ALiBi with learned slopes", "sliding window")
def alibi_learned(seed: int) -> Built:
    def bias_scores(p, s):
        t = s.shape[-1]
        back = jnp.arange(t)[:, None] - jnp.arange(t)
        s = s * 10**-0.5 - jnp.exp(p["slopes"])[:, None, None] * back
        return jnp.where((back >= 0) & (back < 5), s, -jnp.inf)

    return biased_lm(seed, bias_scores)


@derivable("ALiBi after a soft-cap", "slopes computed in jnp")
def alibi_and_soft_cap(seed: int) -> Built:
    def bias_scores(p, s):
        t = s.shape[-1]
        slopes = jnp.exp2(-jnp.arange(1, 4, dtype=jnp.float32))
        s = 2.0 * jnp.tanh(s / 2.0) + slopes[:, None, None] * (jnp.arange(t) - jnp.arange(t)[:, None])
        return jnp.where(jnp.tri(t, dtype=bool), s, -jnp.inf)

    return biased_lm(seed, bias_scores)
