"""Whole models in flax.linen, in the manner of well-known public ones."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.plain import drawn
from zoo.registry import Built, derivable

VOCAB = 97


def instance(net: nn.Module, seed: int) -> Built:
    params = drawn(jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 7), jnp.int32)), seed)
    return Built(lambda params, tokens: net.apply(params, tokens), params, VOCAB)


class Gpt2Block(nn.Module):
    heads: int
    width: int
    positions: int

    def setup(self) -> None:
        self.ln_1 = nn.LayerNorm(epsilon=1e-5)
        self.c_attn = nn.Dense(3 * self.width)
        self.c_proj = nn.Dense(self.width)
        self.ln_2 = nn.LayerNorm(epsilon=1e-5)
        self.c_fc = nn.Dense(4 * self.width)
        self.c_out = nn.Dense(self.width)
        self.causal_mask = nn.make_causal_mask(jnp.ones((1, self.positions), dtype="bool"), dtype="bool")

    def __call__(self, hidden, attention_mask):
        batch, length = hidden.shape[:2]
        query, key, value = jnp.split(self.c_attn(self.ln_1(hidden)), 3, axis=2)
        query, key, value = (x.reshape(batch, length, self.heads, -1) for x in (query, key, value))
        causal_mask = jnp.broadcast_to(self.causal_mask[:, :, :length, :length], (batch, 1, length, length))
        mask = nn.combine_masks(jnp.expand_dims(attention_mask, (-3, -2)), causal_mask)
        bias = jax.lax.select(mask > 0, jnp.full(mask.shape, 0.0), jnp.full(mask.shape, jnp.finfo(jnp.float32).min))
        weights = nn.attention.dot_product_attention_weights(
            query, key, bias=bias, dropout_rate=0.1, deterministic=True, precision=None
        )
        out = jnp.einsum("...hqk,...khd->...qhd", weights, value).reshape(batch, length, -1)
        hidden = hidden + self.c_proj(out)
        return hidden + self.c_out(nn.gelu(self.c_fc(self.ln_2(hidden)), approximate=True))


class Gpt2(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        attention_mask = jnp.ones_like(tokens)
        position_ids = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        wte = nn.Embed(VOCAB, 36, name="wte")
        hidden = wte(tokens.astype("i4")) + nn.Embed(256, 36, name="wpe")(position_ids.astype("i4"))
        hidden = nn.Dropout(0.1)(hidden, deterministic=True)
        for i in range(2):
            hidden = Gpt2Block(heads=3, width=36, positions=256, name=f"h_{i}")(hidden, attention_mask)
        hidden = nn.LayerNorm(name="ln_f")(hidden)
        kernel = wte.variables["params"]["embedding"].T
        return nn.Dense(VOCAB, use_bias=False).apply({"params": {"kernel": kernel}}, hidden)


@derivable(
    "linen", "GPT-2 as Hugging Face's Flax code has it", "tied head through Dense.apply", "all-ones padding mask"
)
def linen_gpt2(seed: int) -> Built:
    return instance(Gpt2(), seed)


def sinusoids(max_len: int, width: int) -> np.ndarray:
    table = np.zeros((max_len, width), np.float32)
    position = np.arange(max_len)[:, None]
    scale = np.exp(np.arange(0, width // 2) * (-np.log(10000.0) / (width // 2 - 1)))
    table[:, : width // 2] = np.sin(position * scale)
    table[:, width // 2 :] = np.cos(position * scale)
    return table[None]


class Lm1b(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, 36, embedding_init=nn.initializers.normal(stddev=1.0))
        mask = nn.combine_masks(
            nn.make_attention_mask(tokens < VOCAB, tokens < VOCAB, dtype=jnp.float32), nn.make_causal_mask(tokens)
        )
        y = embed(tokens.astype("int32")) + sinusoids(256, 36)[:, : tokens.shape[1], :]
        for i in range(2):
            x = nn.LayerNorm(name=f"norm_a{i}")(y)
            y = y + nn.MultiHeadDotProductAttention(
                num_heads=4, qkv_features=24, use_bias=False, deterministic=True, name=f"attention{i}"
            )(x, mask=mask)
            x = nn.LayerNorm(name=f"norm_b{i}")(y)
            y = y + nn.Dense(36, name=f"out{i}")(nn.relu(nn.Dense(72, name=f"in{i}")(x)))
        y = nn.LayerNorm(name="encoderdecoder_norm")(y)
        return embed.attend(y.astype(jnp.float32)) / jnp.sqrt(y.shape[-1])


@derivable("linen", "the lm1b example without its shift", "sinusoidal positions in numpy", "tied head by Embed.attend")
def linen_lm1b(seed: int) -> Built:
    return instance(Lm1b(), seed)


def precompute_freqs_cis(dim: int, end: int, theta: float = 100.0) -> jax.Array:
    freqs = 1.0 / (theta ** (np.arange(0, dim, 2)[: (dim // 2)].astype(np.float32) / dim))
    freqs = np.outer(np.arange(end), freqs).astype(np.float32)
    return jnp.asarray(np.complex64(np.cos(freqs) + 1j * np.sin(freqs)))


def apply_rotary_emb(xq, xk, freqs_cis):
    def turn(x):
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * freqs_cis[:, :, None]
        return jnp.stack((jnp.real(turned), jnp.imag(turned)), axis=-1).reshape(*x.shape[:-1], -1)

    return turn(xq).astype(xq.dtype), turn(xk).astype(xk.dtype)


class RmsNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("kernel", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * w


class EasyBlock(nn.Module):
    heads: int = 6
    kv_heads: int = 2
    dim: int = 6

    @nn.compact
    def __call__(self, x, attention_mask, position_ids):
        dense = partial(nn.Dense, use_bias=False)
        h = RmsNorm()(x)
        b, t, _ = h.shape
        xq = dense(self.heads * self.dim, name="wq")(h).reshape(b, t, self.heads, self.dim)
        xk = dense(self.kv_heads * self.dim, name="wk")(h).reshape(b, t, self.kv_heads, self.dim)
        xv = dense(self.kv_heads * self.dim, name="wv")(h).reshape(b, t, self.kv_heads, self.dim)
        freqs_cis = jnp.take(precompute_freqs_cis(self.dim, 256), position_ids, axis=0)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        xk, xv = (
            jnp.broadcast_to(a[:, :, :, None], (*a.shape[:3], self.heads // self.kv_heads, a.shape[-1])).reshape(
                b, t, self.heads, self.dim
            )
            for a in (xk, xv)
        )
        causal = nn.make_causal_mask(jnp.ones((1, 256), dtype="bool"), dtype="bool")[:, :, :t, :t]
        mask = nn.combine_masks(attention_mask[:, None, None], jnp.broadcast_to(causal, (b, 1, t, t)))
        bias = jnp.where(mask > 0, 0.0, jnp.finfo(jnp.float32).min)
        weights = nn.dot_product_attention_weights(xq, xk, bias=bias, deterministic=True)
        out = jnp.einsum("...hqk,...khd->...qhd", weights, xv)
        x = x + dense(x.shape[-1], name="wo")(out.reshape(b, t, -1))
        h = RmsNorm()(x)
        return x + dense(x.shape[-1], name="w2")(nn.silu(dense(44, name="w1")(h)) * dense(44, name="w3")(h))


class EasyLlama(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        attention_mask = jnp.ones_like(tokens)
        position_ids = jnp.clip(jnp.arange(tokens.shape[1])[None] + jnp.zeros_like(tokens), 0)
        x = nn.Embed(VOCAB, 36)(tokens)
        for _ in range(2):
            x = nn.remat(EasyBlock)()(x, attention_mask, position_ids)
        return nn.Dense(VOCAB, use_bias=False)(RmsNorm()(x))


@derivable("linen", "nn.remat", "Llama as EasyLM has it", "rotary, complex table taken at position ids", "GQA")
def linen_easylm_llama(seed: int) -> Built:
    return instance(EasyLlama(), seed)


class DenseGeneral(nn.Module):
    """The t5x layer: a kernel stored in two dimensions, contracted over several axes."""

    features: tuple[int, ...]
    axis: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, x):
        axis = tuple(a % x.ndim for a in self.axis)
        fan_in = int(np.prod([x.shape[a] for a in axis]))
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        kernel = self.param("kernel", init, (fan_in, int(np.prod(self.features))))
        kernel = kernel.reshape(*(x.shape[a] for a in axis), *self.features)
        return jax.lax.dot_general(x, kernel, ((axis, tuple(range(len(axis)))), ((), ())))


class T5Norm(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = jnp.asarray(x, jnp.float32)
        y = jnp.asarray(x * jax.lax.rsqrt(jnp.mean(jax.lax.square(x), axis=-1, keepdims=True) + 1e-6), self.dtype)
        return y * jnp.asarray(self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.dtype)


class T5xBlock(nn.Module):
    """One decoder layer; ``scan_with`` gives nn.scan what it wants back."""

    scan_with: bool = False
    window: int | None = None

    @nn.compact
    def __call__(self, x, mask):
        h = T5Norm()(x)
        query = DenseGeneral((3, 10), name="query")(h) / jnp.sqrt(10.0)
        key, value = DenseGeneral((3, 10), name="key")(h), DenseGeneral((3, 10), name="value")(h)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) + jax.lax.select(
            mask > 0, jnp.full(mask.shape, 0.0), jnp.full(mask.shape, -1e10)
        )
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(jnp.float32), value)
        x = x + DenseGeneral((x.shape[-1],), axis=(-2, -1), name="out")(out)
        h = T5Norm()(x)
        gated = nn.gelu(DenseGeneral((50,), name="wi_0")(h)) * DenseGeneral((50,), name="wi_1")(h)
        x = x + DenseGeneral((x.shape[-1],), name="wo")(gated)
        return (x, None) if self.scan_with else x


class T5x(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        mask = nn.make_causal_mask(tokens)
        x = nn.Embed(VOCAB, 36, embedding_init=nn.initializers.normal(1.0))(tokens)
        for _ in range(2):
            x = T5xBlock()(x, mask)
        return DenseGeneral((VOCAB,), name="logits_dense")(T5Norm()(x))


@derivable("linen", "t5x layers: DenseGeneral over several axes, rms norm", "gated gelu", "no positions at all")
def linen_t5x(seed: int) -> Built:
    return instance(T5x(), seed)


class Scanned(nn.Module):
    remat: bool = True

    @nn.compact
    def __call__(self, tokens):
        mask = nn.make_causal_mask(tokens)
        x = nn.Embed(VOCAB, 36, embedding_init=nn.initializers.normal(1.0))(tokens)
        x = x + self.param("pos", nn.initializers.normal(0.5), (256, 36))[None, : tokens.shape[1]]
        body = nn.remat(T5xBlock, prevent_cse=False) if self.remat else T5xBlock
        layers = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(scan_with=True, name="layers")(x, mask)
        return nn.Dense(VOCAB, use_bias=False)(T5Norm()(x))


@derivable("nn.scan over layers with nn.remat", "linen", "MaxText's layer stack", "parameters in partitioning boxes")
def linen_scanned(seed: int) -> Built:
    return instance(Scanned(), seed)
