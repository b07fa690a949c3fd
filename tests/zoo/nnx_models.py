"""Whole models in flax.nnx, in the manner of well-known public ones."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from zoo.plain import drawn
from zoo.registry import Built, derivable

VOCAB = 97


def instance(create: Callable[[nnx.Rngs], nnx.Module], seed: int) -> Built:
    model = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    nnx.update(model, drawn(nnx.state(model, nnx.Param), seed))
    return Built(lambda model, tokens: model(tokens), model, VOCAB)


class NanoBlock(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.ln_1 = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.c_attn = nnx.Linear(width, 3 * width, rngs=rngs)
        self.c_proj = nnx.Linear(width, width, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.c_fc = nnx.Linear(width, 4 * width, rngs=rngs)
        self.c_out = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True)
        self.mask = nnx.Variable(jnp.tril(jnp.ones((256, 256))).reshape(1, 1, 256, 256))

    def __call__(self, x):
        b, t, c = x.shape
        q, k, v = jnp.split(self.c_attn(self.ln_1(x)), 3, axis=2)
        q, k, v = (a.reshape(b, t, self.heads, c // self.heads).swapaxes(1, 2) for a in (q, k, v))
        att = (q @ k.swapaxes(-2, -1)) * (1.0 / jnp.sqrt(k.shape[-1]))
        att = jnp.where(self.mask[:, :, :t, :t] == 0, float("-inf"), att)
        att = self.dropout(nnx.softmax(att, axis=-1))
        y = (att @ v).swapaxes(1, 2).reshape(b, t, c)
        x = x + self.c_proj(y)
        return x + self.c_out(nnx.gelu(self.c_fc(self.ln_2(x))))


class NanoGpt(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.wte = nnx.Embed(VOCAB, 36, rngs=rngs)
        self.wpe = nnx.Embed(256, 36, rngs=rngs)
        self.h = nnx.List([NanoBlock(36, 3, rngs) for _ in range(2)])
        self.ln_f = nnx.LayerNorm(36, use_bias=False, rngs=rngs)

    def __call__(self, idx):
        pos = jnp.arange(0, idx.shape[1])[None]
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


@derivable("nnx", "nanoGPT", "stored mask buffer in an nnx.Variable", "tied head", "dropout switched off")
def nnx_nanogpt(seed: int) -> Built:
    built = instance(NanoGpt, seed)
    for block in built.model.h:
        block.mask = nnx.Variable(jnp.tril(jnp.ones((256, 256))).reshape(1, 1, 256, 256))
    return built


class GemmaNorm(nnx.Module):
    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        var = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(var + 1e-6) * (1 + jnp.expand_dims(self.scale[...], axis=range(x.ndim - 1)))


def gemma_rope(x, positions, max_wavelength=100):
    dim = x.shape[-1]
    timescale = max_wavelength ** (2 * jnp.arange(0, dim // 2) / dim)
    angle = (positions[..., jnp.newaxis] / timescale[jnp.newaxis, jnp.newaxis, :])[..., jnp.newaxis, :]
    first, second = jnp.split(x, 2, axis=-1)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class GemmaBlock(nnx.Module):
    """Gemma 2: local or global attention with a soft-cap, norms before and after each branch."""

    def __init__(self, rngs: nnx.Rngs, *, local: bool, heads: int = 6, kv_heads: int = 2, dim: int = 10):
        normal, key = nnx.initializers.normal(36**-0.5), rngs.params
        self.q_einsum = nnx.Param(normal(key(), (heads, 36, dim)))
        self.kv_einsum = nnx.Param(normal(key(), (2, kv_heads, 36, dim)))
        self.out_einsum = nnx.Param(normal(key(), (heads, dim, 36)))
        self.gating = nnx.Param(normal(key(), (2, 36, 44)))
        self.linear = nnx.Param(normal(key(), (44, 36)))
        self.pre_attention, self.post_attention = GemmaNorm(36), GemmaNorm(36)
        self.pre_ffw, self.post_ffw = GemmaNorm(36), GemmaNorm(36)
        self.local = local

    def __call__(self, x, positions, mask):
        h = self.pre_attention(x)
        query = jnp.einsum("BTD,NDH->BTNH", h, self.q_einsum[...])
        key, value = jnp.einsum("BSD,CKDH->CBSKH", h, self.kv_einsum[...])
        query = gemma_rope(query, positions) * 12**-0.5
        key = gemma_rope(key, positions)
        b, t, kg, dim = query.shape
        query = query.reshape(b, t, 2, kg // 2, dim)
        logits = jnp.einsum("BTKGH,BSKH->BTKGS", query, key).reshape(b, t, kg, t)
        logits = jnp.tanh(logits / 2.0) * 2.0
        if self.local:
            ones = jnp.ones_like(mask)
            mask = mask * jnp.triu(ones, -2) * jnp.tril(ones, 2)
        probs = jax.nn.softmax(jnp.where(jnp.expand_dims(mask, -2), logits, -2.3819763e38), axis=-1)
        probs = probs.reshape(b, t, 2, kg // 2, t)
        encoded = jnp.einsum("BTKGS,BSKH->BTKGH", probs, value).reshape(b, t, kg, dim)
        x = x + self.post_attention(jnp.einsum("BTNH,NHD->BTD", encoded, self.out_einsum[...]))
        gate, up = (self.pre_ffw(x) @ self.gating[...][i] for i in range(2))
        return x + self.post_ffw((nnx.gelu(gate) * up) @ self.linear[...])


class Gemma2(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, 36)) * 0.3)
        self.blocks = nnx.List([GemmaBlock(rngs, local=i % 2 == 0) for i in range(3)])
        self.final_norm = GemmaNorm(36)

    def __call__(self, tokens):
        b, t = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
        mask = positions[:, :, None] >= positions[:, None, :]
        x = self.table[...][(tokens,)] * jnp.sqrt(36).astype(jnp.float32)
        for block in self.blocks:
            x = block(x, positions, mask)
        logits = jnp.dot(self.final_norm(x), self.table[...].T)
        return jnp.tanh(logits / 8.0) * 8.0


@derivable(
    "nnx", "Gemma 2", "local and global by turns", "soft-caps", "GQA as BTKGH", "norms after", "tied, scaled embed"
)
def nnx_gemma2(seed: int) -> Built:
    return instance(Gemma2, seed)


class QwenBlock(nnx.Module):
    """Qwen 3: QK-norm, GQA by repeat, rotary; `experts` turns its MLP into a dense top-k mixture."""

    def __init__(self, rngs: nnx.Rngs, *, window: int | None = None, experts: int = 0):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)  # noqa: E731
        self.q, self.k, self.v, self.o = linear(36, 60), linear(36, 20), linear(36, 20), linear(60, 36)
        self.q_norm, self.k_norm = nnx.RMSNorm(10, rngs=rngs), nnx.RMSNorm(10, rngs=rngs)
        self.norm1, self.norm2 = nnx.RMSNorm(36, rngs=rngs), nnx.RMSNorm(36, rngs=rngs)
        self.window = window
        self.router = linear(36, experts) if experts else None
        shape = (experts, 36, 22) if experts else (36, 22)
        self.gate, self.up = (nnx.Param(jax.random.normal(rngs.params(), shape) / 6) for _ in range(2))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (*shape[:-2], 22, 36)) / 5)

    def attend(self, h):
        b, t, _ = h.shape
        q = self.q_norm(self.q(h).reshape(b, t, 6, 10))
        k = self.k_norm(self.k(h).reshape(b, t, 2, 10))
        v = self.v(h).reshape(b, t, 2, 10)
        positions = jnp.arange(t)[None]
        q, k = gemma_rope(q, positions), gemma_rope(k, positions)
        k, v = jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2)
        scores = jnp.einsum("bthd,bshd->bhts", q, k).astype(jnp.float32) / 10**0.5
        mask = jnp.tril(jnp.ones((t, t), dtype=bool))
        if self.window is not None:
            mask = jnp.logical_and(mask, ~jnp.tril(jnp.ones((t, t), dtype=bool), -self.window))
        probs = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e9), axis=-1).astype(q.dtype)
        return self.o(jnp.einsum("bhts,bshd->bthd", probs, v).reshape(b, t, -1))

    def mlp(self, h):
        if self.router is None:
            return (jax.nn.silu(h @ self.gate[...]) * (h @ self.up[...])) @ self.down[...]
        weights = jax.nn.softmax(self.router(h), axis=-1)
        top, chosen = jax.lax.top_k(weights, 2)
        top = top / top.sum(-1, keepdims=True)
        gates = (jax.nn.one_hot(chosen, weights.shape[-1]) * top[..., None]).sum(-2)
        hidden = jnp.einsum("btc,ecf->btef", h, self.gate[...])
        hidden = jax.nn.silu(hidden) * jnp.einsum("btc,ecf->btef", h, self.up[...])
        return jnp.einsum("btef,efc,bte->btc", hidden, self.down[...], gates)

    def __call__(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Qwen(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, remat: bool = False, **options):
        self.embed = nnx.Embed(VOCAB, 36, rngs=rngs)
        self.layers = nnx.List([QwenBlock(rngs, **options) for _ in range(2)])
        self.norm = nnx.RMSNorm(36, rngs=rngs)
        self.lm_head = nnx.Linear(36, VOCAB, use_bias=False, rngs=rngs)
        self.remat = remat

    def __call__(self, tokens):
        x = self.embed(tokens)
        run = nnx.remat(lambda layer, x: layer(x)) if self.remat else lambda layer, x: layer(x)
        for layer in self.layers:
            x = run(layer, x)
        return self.lm_head(self.norm(x))


@derivable("nnx", "Qwen 3", "QK-norm", "nnx.remat", "untied head")
def nnx_qwen3(seed: int) -> Built:
    return instance(partial(Qwen, remat=True), seed)


@derivable("nnx", "Mixtral: top-2 dense experts with a sliding window", "GLU experts")
def nnx_mixtral(seed: int) -> Built:
    return instance(partial(Qwen, window=5, experts=4), seed)


class ScannedQwen(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs):
            return QwenBlock(rngs)

        self.embed = nnx.Embed(VOCAB, 36, rngs=rngs)
        self.layers = create(rngs)
        self.lm_head = nnx.Linear(36, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return self.lm_head(run(self.embed(tokens), self.layers))


@derivable("nnx.scan", "nnx.vmap'd creation of the layers")
def nnx_scanned(seed: int) -> Built:
    return instance(ScannedQwen, seed)
