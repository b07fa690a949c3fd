"""Softmax as different people write it, and the scale and soft-cap before it."""

import jax
import jax.numpy as jnp

from zoo.plain import Params, heads_of, merge, toy_lm
from zoo.registry import Built, derivable


def masked_scores(p: Params, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores [B, H, T, T] with -inf for the future, the mask [T, T], the values [B, T, H, D]."""
    q, k, v = heads_of(p, h)
    t = h.shape[1]
    mask = jnp.tril(jnp.ones((t, t), bool))
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.where(mask, s, -jnp.inf), mask, v


def weighted(p: Params, w: jax.Array, v: jax.Array) -> jax.Array:
    return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))


@derivable("jax.nn.softmax", "division by sqrt(d)", "MHA")
def softmax_library(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        return weighted(p, jax.nn.softmax(s, axis=-1), v)

    return toy_lm(seed, attend)


@derivable("softmax by hand, max subtracted")
def softmax_shifted(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        e = jnp.exp(s - s.max(axis=-1, keepdims=True))
        return weighted(p, e / e.sum(axis=-1, keepdims=True), v)

    return toy_lm(seed, attend)


@derivable("softmax by hand, nothing subtracted")
def softmax_unshifted(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        return weighted(p, jnp.exp(s) / jnp.sum(jnp.exp(s), -1)[..., None], v)

    return toy_lm(seed, attend)


@derivable("exp times the reciprocal of the sum")
def softmax_reciprocal(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        e = jnp.exp(s - jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True)))
        return weighted(p, e * jnp.reciprocal(e.sum(-1, keepdims=True)), v)

    return toy_lm(seed, attend)


@derivable("exp of log_softmax")
def softmax_of_log(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        return weighted(p, jnp.exp(jax.nn.log_softmax(s, axis=-1)), v)

    return toy_lm(seed, attend)


@derivable("exp(s - logsumexp(s))")
def softmax_logsumexp(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        return weighted(p, jnp.exp(s - jax.nn.logsumexp(s, axis=-1, keepdims=True)), v)

    return toy_lm(seed, attend)


@derivable("late normalisation, (exp @ v) / sum")
def softmax_late(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        e = jnp.exp(s - s.max(-1, keepdims=True))
        o = jnp.einsum("bhqk,bkhd->bqhd", e, v)
        total = e.sum(-1).swapaxes(1, 2)[..., None]
        return merge(p, o / total)

    return toy_lm(seed, attend)


@derivable("late normalisation by a sum made with ones", "MHA")
def softmax_late_by_matmul(seed: int) -> Built:
    def attend(p, h):
        s, _, v = masked_scores(p, h)
        e = jnp.exp(s - s.max(-1, keepdims=True))
        total = e @ jnp.ones((s.shape[-1], 1))
        return merge(p, (jnp.einsum("bhqk,bkhd->bhqd", e, v) / total).transpose(0, 2, 1, 3))

    return toy_lm(seed, attend)


@derivable("softmax over the first axis of keys-first scores")
def softmax_keys_first(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bkhd,bqhd->kbqh", k, q) * 0.3
        later = jnp.arange(t)[:, None, None, None] > jnp.arange(t)[None, None, :, None]
        w = jax.nn.softmax(jnp.where(later, -1e30, s), axis=0)
        return merge(p, jnp.einsum("kbqh,bkhd->bqhd", w, v))

    return toy_lm(seed, attend)


@derivable("jax.nn.softmax with where=")
def softmax_where(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        mask = jnp.tri(t, dtype=bool)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        return weighted(p, jax.nn.softmax(s, axis=-1, where=mask), v)

    return toy_lm(seed, attend)


@derivable("where(mask, p, 0) after the softmax")
def softmax_masked_twice(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = masked_scores(p, h)
        w = jax.nn.softmax(s, axis=-1)
        return weighted(p, jnp.where(mask, w, 0.0), v)

    return toy_lm(seed, attend)


@derivable("mask multiplied into exp")
def softmax_exp_times_mask(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        keep = jnp.tril(jnp.ones((t, t)))
        e = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.31) * keep
        return weighted(p, e / jnp.sum(e, -1, keepdims=True), v)

    return toy_lm(seed, attend)


@derivable("scale split over q and k", "scale on q", "negative scale folded in the weights")
def scale_split(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t, d = h.shape[1], q.shape[-1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q * d**-0.25, -(k * d**-0.25))
        s = jnp.where(jnp.tri(t, dtype=bool), -s, -jnp.inf)
        return weighted(p, jax.nn.softmax(s), v)

    return toy_lm(seed, attend)


@derivable("attention soft-cap", "final soft-cap")
def soft_caps(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        s = 1.5 * jnp.tanh(s / 1.5)
        s = s + jnp.where(jnp.tri(t, dtype=bool), 0.0, -jnp.inf)
        return weighted(p, jax.nn.softmax(s, -1), v)

    return toy_lm(seed, attend, finish=lambda params, x: 3.0 * jnp.tanh(x @ params["head"] / 3.0))


@derivable("soft-cap before the scale", "scores times a reciprocal cap")
def soft_cap_of_raw_scores(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q, k) * (1 / 7.0)) * 7.0 * 0.4
        s = jnp.where(jnp.tri(t, dtype=bool), s, jnp.finfo(s.dtype).min)
        return weighted(p, jax.nn.softmax(s, -1), v)

    return toy_lm(seed, attend)
