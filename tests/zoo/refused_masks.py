"""Attention that no causal or sliding-window cache can serve. Lines that an error may name are marked."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from zoo.plain import VOCAB, WIDTH, Init, Params, head_weights, heads_of, merge, toy_lm
from zoo.registry import Built, refused


def scores_of(p: Params, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scaled scores [B, H, T, T] and values [B, T, H, D]."""
    q, k, v = heads_of(p, h)
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, v


def seen_by(seed: int, visible: Callable[[jax.Array, jax.Array, int], jax.Array], value: float = -1e30) -> Built:
    """A model whose query q sees key k where ``visible(q, k, T)``, by arange positions."""

    def attend(p, h):
        t = h.shape[1]
        s, v = scores_of(p, h)
        mask = visible(jnp.arange(t)[:, None], jnp.arange(t)[None, :], t)
        w = jax.nn.softmax(jnp.where(mask, s, value), axis=-1)  # refused by all
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused by all

    return toy_lm(seed, attend)


MASK_OP = "attention|mask|softmax|select"


@refused(MASK_OP, "causal|mask|bidirectional|future")
def no_mask(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)  # refused: bidirectional
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))  # refused

    return toy_lm(seed, attend)


@refused(MASK_OP, "causal|mask|bidirectional|future")
def no_mask_library(seed: int) -> Built:
    def attend(p, h):
        return merge(p, jax.nn.dot_product_attention(*heads_of(p, h)))  # refused

    return toy_lm(seed, attend)


@refused(MASK_OP, "causal|mask|window|future")
def prefix_mask(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) | (k < 4))  # refused


@refused(MASK_OP, "causal|mask|window|future")
def one_token_ahead(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: k <= q + 1)  # refused


@refused(MASK_OP, "causal|mask|window|itself|empty|self", effect="nan")
def strictly_before(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: k < q, value=-jnp.inf)  # refused


@refused(MASK_OP, "causal|mask|window|itself|empty|self|future")
def strictly_before_finite(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: k < q, value=-1e9)  # refused: the first row sees all keys evenly


@refused(MASK_OP, "causal|mask|window|future")
def anti_causal(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: k >= q)  # refused


@refused(MASK_OP, "causal|mask|window|future")
def two_sided_window(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: jnp.abs(q - k) < 3)  # refused


@refused(MASK_OP, "causal|mask|window|future")
def block_causal(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: k // 4 <= q // 4)  # refused


@refused(MASK_OP, "causal|mask|window", effect="past")
def chunked_mask(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & (k // 4 == q // 4))  # refused


@refused(MASK_OP, "causal|mask|window", effect="past")
def dilated_mask(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & ((q - k) % 2 == 0))  # refused


@refused(MASK_OP, "causal|mask|window", effect="past")
def window_and_first_tokens(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & ((q - k < 4) | (k < 2)))  # refused


@refused(MASK_OP, "causal|mask|window", effect="past")
def window_that_grows(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & (q - k < jnp.where(q < 40, 3, 6)))  # refused


@refused(MASK_OP, "causal|mask|window", effect="past")
def mask_with_one_hole(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & ~((q == 11) & (k == 5)))  # refused


@refused(MASK_OP, "causal|mask|window", effect="past", longest=1000)
def window_and_one_token_far_on(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & ((q - k < 5) | (k == 333)))  # refused


@refused(MASK_OP, "causal|mask|window", effect="past", longest=1000)
def one_hole_far_on(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & ~((q == 555) & (k == 222)))  # refused


@refused(MASK_OP, "causal|mask|window", effect="past", longest=1000)
def chunks_of_500(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & (k // 500 == q // 500))  # refused


@refused(MASK_OP, "causal|mask|window", effect="future")
def stored_mask_with_one_leak(seed: int) -> Built:
    buffer = np.tril(np.ones((1024, 1024), bool))
    buffer[5, 6] = True
    stored = jnp.asarray(buffer)
    return seen_by(seed, lambda q, k, t: stored[:t, :t])  # refused


@refused(MASK_OP, "causal|mask|window|length", effect="length")
def window_of_half_the_length(seed: int) -> Built:
    return seen_by(seed, lambda q, k, t: (k <= q) & (q - k < t // 2))  # refused


@refused(MASK_OP, "causal|mask|bias|future|finite")
def weak_mask(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        s = s + jnp.where(jnp.tri(h.shape[1], dtype=bool), 0.0, -3.0)  # refused: the future still weighs e^-3
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))  # refused

    return toy_lm(seed, attend)


@refused(MASK_OP + "|tanh", "causal|mask|bias|future|cap|finite")
def mask_under_the_soft_cap(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        s = jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30)  # refused
        s = 2.0 * jnp.tanh(s / 2.0)  # refused: masked scores come out as -2
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))  # refused

    return toy_lm(seed, attend)


@refused(MASK_OP + "|sum|reduce|divide|multiply", "causal|mask|future|softmax|normal")
def mask_after_softmax_alone(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        w = jax.nn.softmax(s, axis=-1)  # refused: the sum sees the future
        w = jnp.where(jnp.tri(h.shape[1], dtype=bool), w, 0.0)  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    return toy_lm(seed, attend)


@refused(MASK_OP + "|multiply", "causal|mask|future|score|zero|bias")
def mask_of_zeros(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        s = s * jnp.tri(h.shape[1])  # refused: a zero score is no mask
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))  # refused

    return toy_lm(seed, attend)


@refused(MASK_OP + "|compare", "token|content|mask|depend|value", effect="past")
def padding_mask(seed: int) -> Built:
    def forward(params, tokens):
        real = (tokens != 0)[:, None, None, :]  # refused: which keys are seen depends on their content

        def attend(p, h):
            s, v = scores_of(p, h)
            mask = jnp.tri(h.shape[1], dtype=bool) & real  # refused
            w = jax.nn.softmax(jnp.where(mask, s, -1e9))  # refused
            return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

        return toy_lm(seed, attend).forward(params, tokens)

    return toy_lm(seed)._replace(forward=forward)


@refused(MASK_OP + "|cumsum|reduce_window|pad|slice|concatenate|add|while", effect="past")
def document_mask(seed: int) -> Built:
    def forward(params, tokens):
        document = jnp.cumsum(tokens == 1, axis=1)  # refused

        def attend(p, h):
            s, v = scores_of(p, h)
            mask = jnp.tri(h.shape[1], dtype=bool) & (document[:, :, None] == document[:, None, :])[:, None]  # refused
            w = jax.nn.softmax(jnp.where(mask, s, -1e9))  # refused
            return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

        return toy_lm(seed, attend).forward(params, tokens)

    return toy_lm(seed)._replace(forward=forward)


@refused(MASK_OP + "|gather|bias", "token|content|bias|depend|score", effect="past")
def bias_by_tokens(seed: int) -> Built:
    def forward(params, tokens):
        bias = params["pairs"][tokens[:, :, None], tokens[:, None, :]]  # refused

        def attend(p, h):
            s, v = scores_of(p, h)
            s = s + bias[:, None]  # refused
            w = jax.nn.softmax(jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e9))  # refused
            return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

        return toy_lm(seed, attend).forward(params, tokens)

    return toy_lm(seed, extra=lambda init: {"pairs": init(VOCAB, VOCAB, fan_in=1)})._replace(forward=forward)


@refused("softmax|reduce|attention|max|sum", "axis|quer|token|key|future|softmax")
def softmax_over_queries(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        s = jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30)
        w = jax.nn.softmax(s, axis=-2)  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    return toy_lm(seed, attend)


@refused("concatenate|attention|softmax|pad|reduce", effect="past")
def attention_sinks(seed: int) -> Built:
    def attend(p, h):
        b, t, _ = h.shape
        s, v = scores_of(p, h)
        s = jnp.where(jnp.tri(t, dtype=bool), s, -1e30)
        sinks = jnp.broadcast_to(p["sinks"][None, :, None, None], (b, 3, t, 1))
        w = jax.nn.softmax(jnp.concatenate([s, sinks], axis=-1), axis=-1)[..., :-1]  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    def weights(init: Init) -> Params:
        return head_weights(init) | {"sinks": init.near(0.5, 3)}

    return toy_lm(seed, attend, weights)


@refused("softmax|add|divide|reduce|attention|exp|dot_general", effect="past")
def softmax_plus_one(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        e = jnp.exp(jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -jnp.inf))  # refused
        w = e / (1 + e.sum(-1, keepdims=True))  # refused: rows do not sum to one
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    return toy_lm(seed, attend)


@refused("concatenate|pad", "token|sequence|axis", effect="past")
def null_key(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        b, t = h.shape[:2]
        null = jnp.broadcast_to(p["null"], (b, 1, 3, 10))
        k, v = jnp.concatenate([null, k], axis=1), jnp.concatenate([null, v], axis=1)  # refused
        s = jnp.where(jnp.tri(t, t + 1, 1, dtype=bool), jnp.einsum("bqhd,bkhd->bhqk", q, k), -1e30)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"null": init.near(0.0, 10)})


@refused("dot_general|einsum|contract", "token|softmax|attention|sequence", effect="past")
def sigmoid_attention(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        w = jnp.where(jnp.tri(h.shape[1], dtype=bool), jax.nn.sigmoid(s - 2.0), 0.0)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    return toy_lm(seed, attend)


@refused("dot_general|einsum|contract", "token|softmax|attention|sequence", effect="past")
def retention(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        back = jnp.arange(h.shape[1])[:, None] - jnp.arange(h.shape[1])
        decay = jnp.where(back >= 0, 0.9 ** jnp.maximum(back, 0), 0.0)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", s * decay, v))  # refused

    return toy_lm(seed, attend)


@refused("dot_general|einsum|contract|softmax|attention", effect="past")
def talking_heads(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)  # refused
        s = jnp.einsum("bhqk,hg->bgqk", s, p["talk"])  # refused: scores mix over the heads
        w = jax.nn.softmax(jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30))  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"talk": init(3, 3)})


@refused("reduce|sum|attention|softmax|log|multiply", effect="past")
def attention_weights_escape(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        w = jax.nn.softmax(jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30))  # refused
        entropy = -(w * jnp.log(w + 1e-9)).sum(-1).swapaxes(1, 2)[..., None]  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v) * entropy)  # refused

    return toy_lm(seed, attend)


@refused("dot_general|attention|softmax|gather|slice|scores|synthe", effect="past")
def synthesizer(seed: int) -> Built:
    def attend(p, h):
        t = h.shape[1]
        _, _, v = heads_of(p, h)
        s = jnp.where(jnp.tri(t, dtype=bool), p["fixed"][:t, :t], -1e30)  # refused: scores that are no product q k
        return merge(p, jnp.einsum("qk,bkhd->bqhd", jax.nn.softmax(s), v))  # refused

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"fixed": init(256, 256, fan_in=1)})


@refused("reverse|attention|mask|dot_general|transpose", "token|sequence|axis|mask|revers|future")
def cross_attention_reversed(seed: int) -> Built:
    def attend(p, h):
        q, _, _ = heads_of(p, h)
        _, k, v = heads_of(p, h[:, ::-1])  # refused
        s = jnp.where(jnp.tri(h.shape[1], dtype=bool), jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e30)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))

    return toy_lm(seed, attend)


@refused("reshape|pad", "token|sequence|axis", effect="past")
def blocks_by_reshape(seed: int) -> Built:
    def attend(p, h):
        b, t, _ = h.shape
        blocks = -(-t // 4)
        padded = jnp.pad(h, ((0, 0), (0, 4 * blocks - t), (0, 0))).reshape(b * blocks, 4, WIDTH)  # refused
        q, k, v = heads_of(p, padded)
        s = jnp.where(jnp.tri(4, dtype=bool), jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e30)
        o = merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))
        return o.reshape(b, blocks * 4, WIDTH)[:, :t]  # refused

    return toy_lm(seed, attend)


@refused("attention|dot_general|sequence", effect="past")
def two_softmaxes_multiplied(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        w = jax.nn.softmax(jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30))  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w * w, v))  # refused

    return toy_lm(seed, attend)


@refused("attention|dot_general|sequence|softmax|topk|top_k|sort", effect="past")
def top_k_attention(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        s = jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30)
        least = jax.lax.top_k(s, 4)[0][..., -1:]  # refused
        w = jax.nn.softmax(jnp.where(s >= least, s, -1e30))  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    return toy_lm(seed, attend)


@refused("attention|dot_general|softmax", "quer|key|token|axis|sequence")
def contracted_over_queries(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        w = jax.nn.softmax(jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30))  # refused
        return merge(p, jnp.einsum("bhqk,bqhd->bkhd", w, v))  # refused: each key sums over later queries

    return toy_lm(seed, attend)


@refused("reduce|divide|attention|softmax|dot_general")
def scores_standardised(seed: int) -> Built:
    def attend(p, h):
        s, v = scores_of(p, h)
        s = s / s.std(-1, keepdims=True)  # refused: over all keys, the later ones too
        w = jax.nn.softmax(jnp.where(jnp.tri(h.shape[1], dtype=bool), s, -1e30))  # refused
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))  # refused

    return toy_lm(seed, attend)
