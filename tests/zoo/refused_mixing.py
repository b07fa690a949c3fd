"""Tokens mixed otherwise than by attention, and logits that depend on the sequence's length."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo.plain import VOCAB, WIDTH, Params, drawn, heads_of, merge, toy_lm
from zoo.registry import Built, refused

AXIS = "token|sequence|position"
LENGTH = "length|position|token|sequence"


def mixed_lm(seed: int, mix: Callable[[jax.Array], jax.Array]) -> Built:
    """A model that adds ``mix(x)`` to its hidden states x [B, T, C] after the first block."""
    return toy_lm(seed, mix=lambda params, x: x + 0.5 * mix(x))


@refused("concatenate|pad|slice", AXIS, effect="past")
def token_shift(seed: int) -> Built:
    def mix(x):
        before = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)  # refused
        return before - x

    return mixed_lm(seed, mix)


@refused("pad|concatenate|slice", AXIS, effect="past")
def shift_right(seed: int) -> Built:
    def forward(params, tokens):
        tokens = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]  # refused
        return toy_lm(seed).forward(params, tokens)

    return toy_lm(seed)._replace(forward=forward)


@refused("slice|concatenate|roll", AXIS)
def roll_tokens(seed: int) -> Built:
    return mixed_lm(seed, lambda x: jnp.roll(x, 1, axis=1))  # refused


@refused("convolution", AXIS, effect="past")
def causal_convolution(seed: int) -> Built:
    def mix(params, x):
        return x + lax.conv_general_dilated(  # refused
            x, params["kernel"], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC")
        )

    return toy_lm(seed, mix=mix, extra=lambda init: {"kernel": init(3, WIDTH, WIDTH, fan_in=3 * WIDTH)})


@refused("convolution", AXIS, effect="past")
def linen_convolution(seed: int) -> Built:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(VOCAB, WIDTH)(tokens)
            x = x + nn.Conv(WIDTH, kernel_size=(4,), padding="CAUSAL", feature_group_count=WIDTH)(x)  # refused
            x = x + nn.MultiHeadDotProductAttention(num_heads=3)(x, mask=nn.make_causal_mask(tokens))
            return nn.Dense(VOCAB)(x)

    net = Model()
    params = drawn(jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32)), seed)
    return Built(lambda params, tokens: net.apply(params, tokens), params, VOCAB)


@refused("cumsum|reduce_window|pad|slice|concatenate|add|while", AXIS, effect="past")
def cumulative_mean(seed: int) -> Built:
    return mixed_lm(seed, lambda x: jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None])  # refused


@refused("reduce|mean|sum", AXIS)
def mean_over_tokens(seed: int) -> Built:
    return mixed_lm(seed, lambda x: x - x.mean(axis=1, keepdims=True))  # refused


@refused("reduce|max", AXIS)
def max_over_tokens(seed: int) -> Built:
    return mixed_lm(seed, lambda x: jnp.max(x, axis=-2, keepdims=True) * x)  # refused


@refused("reduce_window|pool", AXIS)
def max_pool(seed: int) -> Built:
    return mixed_lm(seed, lambda x: nn.max_pool(x, (3,), strides=(1,), padding="SAME"))  # refused


@refused("reverse", AXIS)
def reversed_tokens(seed: int) -> Built:
    return mixed_lm(seed, lambda x: x[:, ::-1])  # refused


@refused("sort", AXIS)
def sorted_tokens(seed: int) -> Built:
    return mixed_lm(seed, lambda x: jnp.sort(x, axis=1))  # refused


@refused("gather|slice|index", AXIS)
def gathered_tokens(seed: int) -> Built:
    def mix(x):
        other = jnp.arange(x.shape[1]) ^ 1
        return x[:, jnp.minimum(other, x.shape[1] - 1)]  # refused

    return mixed_lm(seed, mix)


@refused("gather|index", AXIS)
def gathered_by_content(seed: int) -> Built:
    def forward(params, tokens):
        def mix(params, x):
            return x + jnp.take_along_axis(x, (tokens % x.shape[1])[..., None], axis=1)  # refused

        return toy_lm(seed, mix=mix).forward(params, tokens)

    return toy_lm(seed, layers=2)._replace(forward=forward)


@refused("scatter|slice|pad|concatenate|dynamic_update_slice", AXIS, effect="past")
def scattered_to_the_next(seed: int) -> Built:
    return mixed_lm(seed, lambda x: x.at[:, 1:].add(x[:, :-1]))  # refused


@refused("slice|broadcast|gather", AXIS, effect="past")
def first_token_everywhere(seed: int) -> Built:
    return mixed_lm(seed, lambda x: jnp.broadcast_to(x[:, :1], x.shape))  # refused


@refused("slice|broadcast|gather", AXIS)
def last_token_everywhere(seed: int) -> Built:
    return mixed_lm(seed, lambda x: x[:, -1:] * x)  # refused


@refused("while|scan|slice|loop|concatenate|dynamic", AXIS + "|time|iteration", effect="past")
def recurrence(seed: int) -> Built:
    def mix(x):
        def cell(state, now):
            state = jnp.tanh(0.5 * state + now)
            return state, state

        return lax.scan(cell, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[1].swapaxes(0, 1)  # refused

    return mixed_lm(seed, mix)


@refused("slice|concatenate|pad|interleave|reshape|add", AXIS, effect="past")
def associative_recurrence(seed: int) -> Built:
    def mix(x):
        decay = jnp.full_like(x, 0.8)
        join = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # noqa: E731
        return lax.associative_scan(join, (decay, x), axis=1)[1]  # refused

    return mixed_lm(seed, mix)


@refused("reduce|mean|norm|sum", AXIS)
def batch_statistics(seed: int) -> Built:
    def mix(x):
        mean, var = x.mean((0, 1)), x.var((0, 1))  # refused
        return (x - mean) / jnp.sqrt(var + 1e-5)

    return mixed_lm(seed, mix)


@refused("reduce|mean|norm|sum", AXIS)
def norm_over_everything(seed: int) -> Built:
    return mixed_lm(seed, lambda x: 30 * x / jnp.linalg.norm(x, axis=(1, 2), keepdims=True))  # refused


@refused("reduce|max", AXIS)
def scale_by_largest_activation(seed: int) -> Built:
    def mix(x):
        scale = jnp.max(jnp.abs(x)) / 127  # refused
        return jnp.round(x / scale) * scale

    return mixed_lm(seed, mix)


@refused("fft", AXIS)
def fourier_mixing(seed: int) -> Built:
    return mixed_lm(seed, lambda x: jnp.fft.fft2(x, axes=(-2, -1)).real / 30)  # refused


@refused("reshape", AXIS)
def reshape_for_transpose(seed: int) -> Built:
    return mixed_lm(seed, lambda x: x.reshape(x.shape[0], WIDTH, -1).swapaxes(1, 2))  # refused


@refused("dot_general|einsum|contract", AXIS, effect="past")
def mixer_matrix(seed: int) -> Built:
    def mix(params, x):
        t = x.shape[1]
        return x + jnp.einsum("qk,bkc->bqc", jnp.tril(params["mixer"][:t, :t]), x) / 10  # refused

    return toy_lm(seed, mix=mix, extra=lambda init: {"mixer": init(256, 256, fan_in=1)})


@refused("dot_general|cumsum|reduce_window|pad|slice|concatenate|einsum|add|while", AXIS, effect="past")
def linear_attention(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        state = jnp.cumsum(jnp.einsum("bthd,bthe->bthde", k, v), axis=1)  # refused
        total = jnp.einsum("bthd,bthd->bth", q, jnp.cumsum(k, axis=1))[..., None]  # refused
        return merge(p, jnp.einsum("bthd,bthde->bthe", q, state) / total)

    return toy_lm(seed, attend)


@refused("dot_general|einsum|contract", AXIS)
def linear_attention_over_all(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        state = jnp.einsum("bthd,bthe->bhde", jax.nn.softmax(k), v)  # refused
        return merge(p, jnp.einsum("bthd,bhde->bthe", jax.nn.softmax(q), state))

    return toy_lm(seed, attend)


@refused("sort|top_k|topk", AXIS)
def experts_choose_tokens(seed: int) -> Built:
    def mix(params, x):
        score = jax.nn.softmax(x @ params["router"], -1)
        least = lax.top_k(score.swapaxes(1, 2), 3)[0][:, :, -1]  # refused
        return x + jnp.where(score >= least[:, None], score, 0.0) @ params["experts"]

    return toy_lm(seed, mix=mix, extra=lambda init: {"router": init(WIDTH, 5), "experts": init(5, WIDTH)})


@refused("concatenate|scatter|pad|dynamic_update_slice", AXIS, effect="past")
def soft_prompt(seed: int) -> Built:
    built = toy_lm(seed, extra=lambda init: {"prompt": init(2, WIDTH, fan_in=1)})

    def embed(params, tokens):
        prompt = jnp.broadcast_to(params["prompt"], (tokens.shape[0], 2, WIDTH))
        return jnp.concatenate([prompt, params["embed"][tokens]], axis=1)  # refused

    host = toy_lm(seed, embed=embed)
    return built._replace(forward=lambda params, tokens: host.forward(params, tokens)[:, 2:])


def positioned(seed: int, position_of: Callable[[Params, jax.Array], jax.Array]) -> Built:
    """A model with ``position_of(params, tokens)`` [.., T] as positions of its table of 256 rows."""

    def embed(params, tokens):
        return params["embed"][tokens] + params["pos"][position_of(params, tokens)]

    return toy_lm(seed, embed=embed, extra=lambda init: {"pos": init(256, WIDTH, fan_in=1)})


@refused("subtract|iota|gather|reverse|constant|position", LENGTH, effect="length", located=False)
def positions_from_the_end(seed: int) -> Built:
    return positioned(seed, lambda params, tokens: tokens.shape[1] - 1 - jnp.arange(tokens.shape[1]))


@refused("", LENGTH, effect="length", located=False)
def positions_from_the_middle(seed: int) -> Built:
    return positioned(seed, lambda params, tokens: jnp.abs(jnp.arange(tokens.shape[1]) - tokens.shape[1] // 2))


@refused("", LENGTH, effect="length", located=False)
def last_rows_of_the_table(seed: int) -> Built:
    def embed(params, tokens):
        return params["embed"][tokens] + params["pos"][-tokens.shape[1] :]

    return toy_lm(seed, embed=embed, extra=lambda init: {"pos": init(256, WIDTH, fan_in=1)})


@refused("", LENGTH, effect="length", located=False)
def positions_as_fractions(seed: int) -> Built:
    def embed(params, tokens):
        return params["embed"][tokens] + jnp.linspace(0, 1, tokens.shape[1])[:, None] * params["pos"]

    return toy_lm(seed, embed=embed, extra=lambda init: {"pos": init(WIDTH, fan_in=1)})


@refused("", LENGTH, effect="length", located=False)
def logits_over_length(seed: int) -> Built:
    built = toy_lm(seed)
    return built._replace(forward=lambda params, tokens: built.forward(params, tokens) / tokens.shape[1])


@refused("", LENGTH, effect="length", located=False)
def log_length_scaling(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q * (np.log(t + 1) / np.log(16)), k)
        w = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), s, -1e30))
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))

    return toy_lm(seed, attend)


@refused("", LENGTH, effect="length", located=False)
def dynamic_rope_base(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        base = 100.0 * max(1.0, t / 5) ** 1.25
        angle = jnp.outer(jnp.arange(t), base ** -(np.arange(5) / 5))[:, None]

        def rotate(x):
            a, b = jnp.split(x, 2, -1)
            sin, cos = jnp.sin(angle), jnp.cos(angle)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

        s = jnp.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k))
        w = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), s, -1e30))
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))

    return toy_lm(seed, attend)


@refused("cumsum|reduce_window|pad|slice|concatenate|gather|add|while", LENGTH, effect="past")
def positions_by_content(seed: int) -> Built:
    return positioned(seed, lambda params, tokens: jnp.cumsum(tokens != 0, axis=1))  # refused


@refused("reshape", "length|reshape|131|trace|shape", effect="trace", located=False)
def even_lengths_alone(seed: int) -> Built:
    def mix(params, x):
        b, t, c = x.shape
        pairs = x.reshape(b, t // 2, 2, c)
        return x + jnp.broadcast_to(pairs[:, :, :1], pairs.shape).reshape(x.shape)

    return toy_lm(seed, mix=mix)


OUTPUT = "logits|shape|output|return|reduce|slice|token"


@refused(OUTPUT, OUTPUT, effect="shape", located=False)
def pooled_output(seed: int) -> Built:
    return toy_lm(seed, finish=lambda params, x: x.mean(1) @ params["head"])


@refused(OUTPUT, OUTPUT, effect="shape", located=False)
def last_logits_alone(seed: int) -> Built:
    return toy_lm(seed, finish=lambda params, x: x[:, -1] @ params["head"])


@refused(OUTPUT, OUTPUT, effect="shape", located=False)
def logits_transposed(seed: int) -> Built:
    return toy_lm(seed, finish=lambda params, x: (x @ params["head"]).swapaxes(1, 2))


@refused(OUTPUT, OUTPUT, effect="shape", located=False)
def two_outputs(seed: int) -> Built:
    return toy_lm(seed, finish=lambda params, x: (x @ params["head"], x))


@refused(OUTPUT + "|integer|dtype|int32", effect="shape", located=False)
def tokens_for_logits(seed: int) -> Built:
    return toy_lm(seed, finish=lambda params, x: jnp.argmax(x @ params["head"], axis=-1))


@refused(OUTPUT, OUTPUT, effect="shape", located=False)
def logits_shifted_by_one(seed: int) -> Built:
    return toy_lm(seed, finish=lambda params, x: (x @ params["head"])[:, :-1])
