"""Whole models as plain functions, in the manner of well-known public ones."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.plain import Init, Params, layer_norm, rms
from zoo.registry import Built, derivable

VOCAB = 97


def norm_weights(init: Init, width: int) -> Params:
    return {"w": init.near(1.0, width), "b": init.near(0.0, width)}


def rotate_first(x: jax.Array, rotary: int) -> jax.Array:
    """Half-split rotary on the first `rotary` channels of [B, T, H, D]."""
    turned, kept = x[..., :rotary], x[..., rotary:]
    inv_freq = 1.0 / 100.0 ** (jnp.arange(0, rotary, 2, dtype=jnp.float32) / rotary)
    freqs = jnp.einsum("i , j -> i j", jnp.arange(x.shape[1], dtype=jnp.float32), inv_freq)
    emb = jnp.concatenate([freqs, freqs], axis=-1)[:, None]
    half = jnp.concatenate([-turned[..., rotary // 2 :], turned[..., : rotary // 2]], axis=-1)
    return jnp.concatenate([turned * jnp.cos(emb) + half * jnp.sin(emb), kept], axis=-1)


@derivable("GPT-NeoX: parallel residual with two norms, qkv packed by head, partial rotary", "biases everywhere")
def family_neox(seed: int) -> Built:
    init = Init(seed)

    def layer():
        return {
            "ln1": norm_weights(init, 30),
            "ln2": norm_weights(init, 30),
            "qkv": {"kernel": init(30, 90), "bias": init.near(0.0, 90)},
            "dense": {"kernel": init(30, 30), "bias": init.near(0.0, 30)},
            "h_to_4h": {"kernel": init(30, 120), "bias": init.near(0.0, 120)},
            "4h_to_h": {"kernel": init(120, 30), "bias": init.near(0.0, 30)},
        }

    def linear(p, x):
        return x @ p["kernel"] + p["bias"]

    def attention(p, x):
        b, t, _ = x.shape
        q, k, v = jnp.split(linear(p["qkv"], x).reshape(b, t, 3, 30), 3, axis=-1)
        q, k = rotate_first(q, 4), rotate_first(k, 4)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(10)
        causal = jnp.arange(t)[None, :] > jnp.arange(t)[:, None]
        scores = jnp.where(causal, jnp.finfo(scores.dtype).min, scores)
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)
        return linear(p["dense"], out.reshape(b, t, 30))

    def forward(params, tokens):
        x = params["embed_in"][tokens]
        for p in params["layers"]:
            mlp = linear(p["4h_to_h"], jax.nn.gelu(linear(p["h_to_4h"], layer_norm(x, **p["ln2"]))))
            x = x + attention(p, layer_norm(x, **p["ln1"])) + mlp
        return layer_norm(x, **params["final"]) @ params["embed_out"]

    params = {
        "embed_in": init(VOCAB, 30, fan_in=1),
        "layers": [layer() for _ in range(2)],
        "final": norm_weights(init, 30),
        "embed_out": init(30, VOCAB),
    }
    return Built(forward, params, VOCAB)


@derivable("Bloom: ALiBi on keys, norm of the embedding, tied head", "residual from after the norm")
def family_bloom(seed: int) -> Built:
    init = Init(seed)
    heads, dim = 4, 6
    slopes = np.array([2 ** (-(2 ** -(np.log2(heads) - 3)) * (i + 1)) for i in range(heads)], np.float32)

    def forward(params, tokens):
        b, t = tokens.shape
        x = layer_norm(params["embed"][tokens], **params["embed_norm"])
        alibi = slopes[None, :, None, None] * jnp.arange(t, dtype=jnp.float32)[None, None, None, :]
        for p in params["layers"]:
            h = layer_norm(x, **p["ln"])
            q, k, v = (h @ p["qkv"]).reshape(b, t, heads, 3, dim).transpose(3, 0, 2, 1, 4)
            scores = jnp.matmul(q, k.transpose(0, 1, 3, 2)) * dim**-0.5 + alibi
            scores = jnp.where(jnp.triu(jnp.ones((t, t), bool), 1), jnp.finfo(jnp.float32).min, scores)
            out = jnp.matmul(jax.nn.softmax(scores), v).transpose(0, 2, 1, 3).reshape(b, t, heads * dim)
            x = h + out @ p["dense"]
            x = x + jax.nn.gelu(layer_norm(x, **p["ln2"]) @ p["up"]) @ p["down"]
        return layer_norm(x, **params["final"]) @ params["embed"].T * 0.2

    params = {
        "embed": init(VOCAB, 36, fan_in=1),
        "embed_norm": norm_weights(init, 36),
        "final": norm_weights(init, 36),
        "layers": [
            {
                "ln": norm_weights(init, 36),
                "ln2": norm_weights(init, 36),
                "qkv": init(36, 72),
                "dense": init(24, 36),
                "up": init(36, 48),
                "down": init(48, 36),
            }
            for _ in range(2)
        ],
    }
    return Built(forward, params, VOCAB)


@derivable("OLMo 2: norm after each branch, QK-norm over all heads at once, rotary, SwiGLU")
def family_olmo2(seed: int) -> Built:
    init = Init(seed)

    def forward(params, tokens):
        b, t = tokens.shape
        x = jnp.take(params["wte"], tokens, axis=0, mode="clip")
        for p in params["layers"]:
            q = rms(x @ p["q"], p["q_norm"]).reshape(b, t, 5, 6)
            k = rms(x @ p["k"], p["k_norm"]).reshape(b, t, 5, 6)
            v = (x @ p["v"]).reshape(b, t, 5, 6)
            q, k = rotate_first(q, 6), rotate_first(k, 6)
            a = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, 30)
            x = x + rms(a @ p["o"], p["norm1"])
            x = x + rms((jax.nn.silu(x @ p["w1"]) * (x @ p["w3"])) @ p["w2"], p["norm2"])
        return rms(x, params["norm"]) @ params["head"]

    def layer():
        names = {"q": (36, 30), "k": (36, 30), "v": (36, 30), "o": (30, 36), "w1": (36, 40), "w3": (36, 40)}
        norms = {"q_norm": 30, "k_norm": 30, "norm1": 36, "norm2": 36}
        return (
            {n: init(*shape) for n, shape in names.items()}
            | {n: init.near(1.0, size) for n, size in norms.items()}
            | {"w2": init(40, 36)}
        )

    params = {
        "wte": init(VOCAB, 36, fan_in=1),
        "layers": [layer() for _ in range(2)],
        "norm": init.near(1.0, 36),
        "head": init(36, VOCAB),
    }
    return Built(forward, params, VOCAB)


@derivable("Falcon: MQA, parallel block, rotary on [B*H, T, D], dot_general by hand", "bfloat16", dtype="bfloat16")
def family_falcon(seed: int) -> Built:
    init = Init(seed, jnp.bfloat16)

    def attention(p, h):
        b, t, _ = h.shape
        fused = (h @ p["qkv"]).reshape(b, t, 6, 6)
        q, k, v = fused[..., :-2, :], fused[..., -2:-1, :], fused[..., -1:, :]
        q, k = rotate_first(q, 6).astype(h.dtype), rotate_first(k, 6).astype(h.dtype)
        q = q.transpose(0, 2, 1, 3).reshape(b * 4, t, 6)
        k, v = (jnp.broadcast_to(a, (b, t, 4, 6)).transpose(0, 2, 1, 3).reshape(b * 4, t, 6) for a in (k, v))
        scores = jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.tri(t, dtype=bool), scores * 6**-0.5, -1e9)
        weights = jax.nn.softmax(scores, axis=-1).astype(h.dtype)
        out = jax.lax.dot_general(weights, v, (((2,), (1,)), ((0,), (0,))))
        return out.reshape(b, 4, t, 6).transpose(0, 2, 1, 3).reshape(b, t, 24) @ p["dense"]

    def forward(params, tokens):
        x = params["embed"][tokens]
        for p in params["layers"]:
            h = layer_norm(x.astype(jnp.float32), **p["ln"]).astype(x.dtype)
            x = x + attention(p, h) + jax.nn.gelu(h @ p["up"]) @ p["down"]
        x = layer_norm(x.astype(jnp.float32), **params["final"]).astype(x.dtype)
        return (x @ params["head"]).astype(jnp.float32)

    params = {
        "embed": init(VOCAB, 36, fan_in=1),
        "layers": [
            {
                "ln": norm_weights(init, 36),
                "qkv": init(36, 36),
                "dense": init(24, 36),
                "up": init(36, 48),
                "down": init(48, 36),
            }
            for _ in range(2)
        ],
        "final": norm_weights(init, 36),
        "head": init(36, VOCAB),
    }
    return Built(forward, params, VOCAB)


@derivable("a modern speedrun: QK-norm without weights, squared relu, value residual, soft-capped head, layer scales")
def family_speedrun(seed: int) -> Built:
    init = Init(seed)

    def unit(x):
        return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)

    def forward(params, tokens):
        x = x0 = unit(params["wte"][tokens])
        for i, p in enumerate(params["layers"]):
            x = params["scale"][i, 0] * x + params["scale"][i, 1] * x0
            h = unit(x)
            q, k, v = jnp.einsum("btc,nchd->nbhtd", h, p["qkv"])
            v = 0.7 * v + 0.3 * p["values"][tokens].reshape(*tokens.shape, 3, 10).swapaxes(1, 2)
            q, k = (rotate_first(unit(a).swapaxes(1, 2), 10).swapaxes(1, 2) for a in (q, k))
            t = tokens.shape[1]
            scores = jnp.einsum("bhtd,bhsd->bhts", q, k) * 0.12 * 4
            w = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), scores, -jnp.inf))
            x = x + jnp.einsum("bhts,bhsd,hdc->btc", w, v, p["o"])
            x = x + jnp.square(jax.nn.relu(unit(x) @ p["up"])) @ p["down"]
        return 5 * jax.nn.tanh(unit(x) @ params["head"] / 5)

    params = {
        "wte": init(VOCAB, 36, fan_in=1),
        "scale": init.near(0.5, 2, 2),
        "layers": [
            {
                "qkv": init(3, 36, 3, 10, fan_in=36),
                "values": init(VOCAB, 30, fan_in=1),
                "o": init(3, 10, 36, fan_in=30),
                "up": init(36, 72),
                "down": init(72, 36, fan_in=200),
            }
            for _ in range(2)
        ],
        "head": init(36, VOCAB),
    }
    return Built(forward, params, VOCAB)
