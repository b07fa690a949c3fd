"""Where the heads sit: layouts, packed projections, grouped and multi-query keys and values."""

import jax
import jax.numpy as jnp

from zoo.plain import WIDTH, Init, Params, causal_attention, head_weights, heads_of, merge, rms, toy_lm
from zoo.registry import Built, derivable


def causal_softmax(s: jax.Array) -> jax.Array:
    """Softmax over the last axis of scores [..., T, T]."""
    t = s.shape[-1]
    return jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), s, -jnp.inf), axis=-1)


def gqa_weights(init: Init) -> Params:
    return head_weights(init, heads=6, kv_heads=2, dim=6)


@derivable("bhtd layout by transposes", "matmul with swapaxes", "MHA")
def layout_bhtd(seed: int) -> Built:
    def weights(init):
        return {"q": init(WIDTH, 30), "k": init(WIDTH, 30), "v": init(WIDTH, 30), "o": init(30, WIDTH)}

    def attend(p, h):
        b, t, _ = h.shape
        q, k, v = ((h @ p[n]).reshape(b, t, 3, 10).transpose(0, 2, 1, 3) for n in "qkv")
        w = causal_softmax(q @ k.swapaxes(-1, -2) / 10**0.5)
        return (w @ v).transpose(0, 2, 1, 3).reshape(b, t, 30) @ p["o"]

    return toy_lm(seed, attend, weights)


@derivable("htd layout, no batch axis", "vmapped over the batch", "head transposes")
def layout_htd_vmapped(seed: int) -> Built:
    def attend_one(p, h):  # [T, C]
        q, k, v = (jnp.einsum("tc,chd->htd", h, p[n]) for n in "qkv")
        w = causal_softmax(jnp.einsum("hqd,hkd->hqk", q, k) * 0.3)
        return jnp.einsum("hqd,hdc->qc", jnp.einsum("hqk,hkd->hqd", w, v), p["o"])

    return toy_lm(seed, jax.vmap(attend_one, in_axes=(None, 0)))


@derivable("whole forward vmapped over the batch", "thd layout")
def forward_vmapped(seed: int) -> Built:
    def attend(p, h):
        q, k, v = (jnp.tensordot(h, p[n], 1) for n in "qkv")  # [T, H, D]
        w = causal_softmax(jnp.einsum("ihd,jhd->hij", q, k) / jnp.sqrt(10.0))
        return jnp.einsum("hij,jhd,hdc->ic", w, v, p["o"])

    built = toy_lm(seed, attend)
    return built._replace(forward=jax.vmap(built.forward, in_axes=(None, 0)))


@derivable("sequence-first layout [T, B, C]")
def layout_tbc(seed: int) -> Built:
    def attend(p, h):
        x = h.transpose(1, 0, 2)
        q, k, v = (jnp.einsum("tbc,chd->tbhd", x, p[n]) for n in "qkv")
        w = causal_softmax(jnp.einsum("tbhd,sbhd->hbts", q, k) * 0.3)
        return jnp.einsum("hbts,sbhd,hdc->tbc", w, v, p["o"]).transpose(1, 0, 2)

    return toy_lm(seed, attend)


@derivable("channel-first layout [B, C, T]", "einsum order bhdt")
def layout_bct(seed: int) -> Built:
    def attend(p, h):
        x = jnp.swapaxes(h, 1, 2)
        q, k, v = (jnp.einsum("chd,bct->bhdt", p[n], x) for n in "qkv")
        w = causal_softmax(jnp.einsum("bhdt,bhds->bhts", q, k) * 0.3)
        return jnp.einsum("bhds,bhts,hdc->btc", v, w, p["o"])

    return toy_lm(seed, attend)


@derivable("flattened [T*H, D]", "QK-norm")
def layout_flattened(seed: int) -> Built:
    def weights(init):
        return head_weights(init) | {"q_norm": init.near(1.0, 10), "k_norm": init.near(1.0, 10)}

    def attend(p, h):
        b, t, _ = h.shape
        q, k, v = heads_of(p, h)
        q = rms(q.reshape(b * t * 3, 10), p["q_norm"]).reshape(b, t, 3, 10)
        k = rms(k.reshape(b * t * 3, 10), p["k_norm"]).reshape(b, t, 3, 10)
        return merge(p, causal_attention(q, k, v))

    return toy_lm(seed, attend, weights)


@derivable("batch and heads merged, [B*H, T, D]")
def layout_batch_times_heads(seed: int) -> Built:
    def attend(p, h):
        b, t, _ = h.shape
        q, k, v = (a.transpose(0, 2, 1, 3).reshape(b * 3, t, 10) for a in heads_of(p, h))
        w = causal_softmax(jax.lax.batch_matmul(q, k.transpose(0, 2, 1)) * 0.3)
        o = jax.lax.batch_matmul(w, v).reshape(b, 3, t, 10)
        return merge(p, o.transpose(0, 2, 1, 3))

    return toy_lm(seed, attend)


@derivable("packed qkv split in three", "biases on qkv")
def packed_split(seed: int) -> Built:
    def weights(init):
        return {"qkv": init(WIDTH, 90), "b": init.near(0.0, 90), "o": init(30, WIDTH), "ob": init.near(0.0, WIDTH)}

    def attend(p, h):
        b, t, _ = h.shape
        q, k, v = jnp.split(h @ p["qkv"] + p["b"], 3, axis=-1)
        q, k, v = (a.reshape(b, t, 3, 10) for a in (q, k, v))
        return causal_attention(q, k, v).reshape(b, t, 30) @ p["o"] + p["ob"]

    return toy_lm(seed, attend, weights)


@derivable("packed qkv reshaped to [B, T, 3, H, D]", "unpacked after one transpose")
def packed_reshape(seed: int) -> Built:
    def weights(init):
        return {"qkv": init(WIDTH, 90), "o": init(30, WIDTH)}

    def attend(p, h):
        b, t, _ = h.shape
        q, k, v = (h @ p["qkv"]).reshape(b, t, 3, 5, 6).transpose(2, 0, 3, 1, 4)
        w = causal_softmax(jnp.matmul(q, jnp.moveaxis(k, -1, -2)) * 6**-0.5)
        return jnp.moveaxis(w @ v, 1, 2).reshape(b, t, 30) @ p["o"]

    return toy_lm(seed, attend, weights)


@derivable("packed qkv by head, [B, T, H, 3 * D] (GPT-NeoX)")
def packed_by_head(seed: int) -> Built:
    def weights(init):
        return {"qkv": init(WIDTH, 90), "o": init(30, WIDTH)}

    def attend(p, h):
        b, t, _ = h.shape
        qkv = (h @ p["qkv"]).reshape(b, t, 3, 30)
        q, k, v = qkv[..., :10], qkv[..., 10:20], qkv[..., 20:]
        return causal_attention(q, k, v).reshape(b, t, -1) @ p["o"]

    return toy_lm(seed, attend, weights)


@derivable("packed qkv by group, [B, T, Hkv, G + 2, D] (Falcon)", "GQA")
def packed_by_group(seed: int) -> Built:
    def weights(init):
        return {"qkv": init(WIDTH, 2 * 5 * 6), "o": init(36, WIDTH)}

    def attend(p, h):
        b, t, _ = h.shape
        qkv = (h @ p["qkv"]).reshape(b, t, 2, 5, 6)
        q = qkv[:, :, :, :-2].reshape(b, t, 6, 6)
        k, v = (jnp.broadcast_to(qkv[:, :, :, [i]], (b, t, 2, 3, 6)).reshape(b, t, 6, 6) for i in (-2, -1))
        return causal_attention(q, k, v).reshape(b, t, 36) @ p["o"]

    return toy_lm(seed, attend, weights)


@derivable("GQA by 5-D einsum, bsngh")
def gqa_5d(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        b, t, n, d = k.shape
        q = q.reshape(b, t, n, -1, d)
        w = causal_softmax(jnp.einsum("bsngh,btnh->bngst", q, k) * d**-0.5)
        return merge(p, jnp.einsum("bngst,btnh->bsngh", w, v).reshape(b, t, -1, d))

    return toy_lm(seed, attend, gqa_weights)


@derivable("GQA by repeat")
def gqa_repeat(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        return merge(p, causal_attention(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2)))

    return toy_lm(seed, attend, gqa_weights)


@derivable("GQA by broadcast_to and reshape, after the transpose to bhtd (Hugging Face repeat_kv)")
def gqa_broadcast(seed: int) -> Built:
    def repeat_kv(a, groups):
        b, n, t, d = a.shape
        return jnp.broadcast_to(a[:, :, None], (b, n, groups, t, d)).reshape(b, n * groups, t, d)

    def attend(p, h):
        q, k, v = (a.transpose(0, 2, 1, 3) for a in heads_of(p, h))
        w = causal_softmax(q @ repeat_kv(k, 3).swapaxes(2, 3) * 6**-0.5)
        return merge(p, (w @ repeat_kv(v, 3)).swapaxes(1, 2))

    return toy_lm(seed, attend, gqa_weights)


@derivable("GQA by tile and reshape")
def gqa_tile(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        b, t, n, d = k.shape
        k, v = (jnp.tile(a[..., None, :], (1, 1, 1, 3, 1)).reshape(b, t, 3 * n, d) for a in (k, v))
        return merge(p, causal_attention(q, k, v))

    return toy_lm(seed, attend, gqa_weights)


@derivable("GQA with groups outermost: query head h reads KV head h % Hkv")
def gqa_groups_first(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        b, t, n, d = k.shape
        q = q.reshape(b, t, 3, n, d)
        w = causal_softmax(jnp.einsum("btgnd,bsnd->bgnts", q, k) * d**-0.5)
        return merge(p, jnp.einsum("bgnts,bsnd->btgnd", w, v).reshape(b, t, 3 * n, d))

    return toy_lm(seed, attend, gqa_weights)


@derivable("GQA by tiling whole heads: query head h reads KV head h % Hkv")
def gqa_tiled_heads(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        return merge(p, causal_attention(q, jnp.tile(k, (1, 1, 3, 1)), jnp.tile(v, (1, 1, 3, 1))))

    return toy_lm(seed, attend, gqa_weights)


@derivable("GQA by gathering heads with a constant index")
def gqa_take(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        reads = jnp.arange(6) // 3
        return merge(p, causal_attention(q, k[:, :, reads], jnp.take(v, reads, axis=2)))

    return toy_lm(seed, attend, gqa_weights)


@derivable("MQA without a KV head axis")
def mqa_squeezed(seed: int) -> Built:
    def weights(init):
        return {"q": init(WIDTH, 3, 10), "kv": init(WIDTH, 20), "o": init(3, 10, WIDTH, fan_in=30)}

    def attend(p, h):
        q = jnp.einsum("btc,chd->bthd", h, p["q"])
        k, v = jnp.split(h @ p["kv"], [10], axis=-1)
        w = causal_softmax(jnp.einsum("bthd,bsd->bhts", q, k) * 0.3)
        return jnp.einsum("bhts,bsd,hdc->btc", w, v, p["o"])

    return toy_lm(seed, attend, weights)


@derivable("MQA as heads stacked along the query axis, [B, H*T, D] @ [B, D, T] (StarCoder)")
def mqa_stacked_queries(seed: int) -> Built:
    def weights(init):
        return {"q": init(WIDTH, 30), "kv": init(WIDTH, 20), "o": init(30, WIDTH)}

    def attend(p, h):
        b, t, _ = h.shape
        q = (h @ p["q"]).reshape(b, t, 3, 10).transpose(0, 2, 1, 3).reshape(b, 3 * t, 10)
        k, v = jnp.split(h @ p["kv"], 2, axis=-1)
        w = causal_softmax((q @ k.swapaxes(1, 2) * 0.3).reshape(b, 3, t, t))
        o = (w.reshape(b, 3 * t, t) @ v).reshape(b, 3, t, 10)
        return o.transpose(0, 2, 1, 3).reshape(b, t, 30) @ p["o"]

    return toy_lm(seed, attend, weights)


@derivable("a single head, no head axis at all")
def one_head(seed: int) -> Built:
    def weights(init):
        return {n: init(WIDTH, 10) for n in "qkv"} | {"o": init(10, WIDTH)}

    def attend(p, h):
        q, k, v = h @ p["q"], h @ p["k"], h @ p["v"]
        return causal_softmax(q @ k.swapaxes(-1, -2) * 0.3) @ v @ p["o"]

    return toy_lm(seed, attend, weights)


@derivable("one head at a time in a Python loop", "outputs concatenated over heads")
def heads_in_a_loop(seed: int) -> Built:
    def weights(init):
        return {"heads": [{n: init(WIDTH, 6) for n in "qkv"} for _ in range(3)], "o": init(18, WIDTH)}

    def attend(p, h):
        outs = []
        for w in p["heads"]:
            s = jnp.einsum("bqd,bkd->bqk", h @ w["q"], h @ w["k"])
            outs.append(causal_softmax(s / 6**0.5) @ (h @ w["v"]))
        return jnp.concatenate(outs, axis=-1) @ p["o"]

    return toy_lm(seed, attend, weights)


@derivable("heads by jax.vmap over the head axis")
def heads_vmapped(seed: int) -> Built:
    def attend(p, h):
        def one(wq, wk, wv, wo):
            w = causal_softmax((h @ wq) @ (h @ wk).swapaxes(1, 2) * 0.3)
            return w @ (h @ wv) @ wo

        return jax.vmap(one, in_axes=(1, 1, 1, 0))(p["q"], p["k"], p["v"], p["o"]).sum(0)

    return toy_lm(seed, attend)


@derivable("values with a head size of their own")
def other_value_size(seed: int) -> Built:
    def weights(init):
        return {
            "q": init(WIDTH, 3, 10),
            "k": init(WIDTH, 3, 10),
            "v": init(WIDTH, 3, 4),
            "o": init(3, 4, WIDTH, fan_in=12),
        }

    return toy_lm(seed, lambda p, h: merge(p, causal_attention(*heads_of(p, h))), weights)


@derivable("GQA with keys changed for each query head after the repeat", "rotary after the repeat")
def gqa_changed_after_repeat(seed: int) -> Built:
    def weights(init):
        return gqa_weights(init) | {"bias": init.near(0.0, 6, 6), "gain": init.near(1.0, 6, 1)}

    def attend(p, h):
        q, k, v = heads_of(p, h)
        k = jnp.repeat(k, 3, axis=2) + p["bias"]
        angle = jnp.arange(h.shape[1])[:, None, None] * jnp.array([1.0, 0.3, 0.1])

        def rotate(x):
            a, b = jnp.split(x, 2, -1)
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

        return merge(p, causal_attention(rotate(q), rotate(k), jnp.repeat(v, 3, axis=2) * p["gain"]))

    return toy_lm(seed, attend, weights)


@derivable("scores that contract two axes", "one head of several parts")
def scores_over_two_axes(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        w = causal_softmax(jnp.einsum("btnd,bsnd->bts", q, k) * 0.2)
        return merge(p, jnp.einsum("bts,bsnd->btnd", w, v))

    return toy_lm(seed, attend)


@derivable("multi-head latent attention with absorbed projections: MQA on the latent, which is also the value")
def latent_absorbed(seed: int) -> Built:
    def weights(init):
        return {
            "q": init(WIDTH, 3, 6),
            "down": init(WIDTH, 8),
            "k": init(8, 3, 6, fan_in=6),
            "v": init(8, 3, 7),
            "o": init(3, 7, WIDTH, fan_in=21),
        }

    def attend(p, h):
        latent = h @ p["down"]
        q = jnp.einsum("bthd,rhd->bthr", jnp.einsum("btc,chd->bthd", h, p["q"]), p["k"])
        w = causal_softmax(jnp.einsum("bthr,bsr->bhts", q, latent) * 0.4)
        o = jnp.einsum("bhts,bsr->bthr", w, latent)
        return merge(p, jnp.einsum("bthr,rhd->bthd", o, p["v"]))

    return toy_lm(seed, attend, weights)
