"""What happens token by token, outside of attention: embeddings, MLPs, experts, heads, layouts, number formats."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from zoo.plain import (
    VOCAB,
    WIDTH,
    Init,
    Params,
    causal_attention,
    head_weights,
    heads_of,
    merge,
    plain_attend,
    rms,
    toy_lm,
)
from zoo.registry import Built, derivable


@derivable("one-hot embedding matmul", "tied head by einsum")
def embed_one_hot(seed: int) -> Built:
    return toy_lm(
        seed,
        embed=lambda params, tokens: jax.nn.one_hot(tokens, VOCAB) @ params["embed"],
        finish=lambda params, x: jnp.einsum("btc,vc->btv", x, params["embed"]) * WIDTH**-0.5,
    )


@derivable("embedding by jnp.take, scaled by sqrt(C)", "tied head by a transpose")
def embed_take_scaled(seed: int) -> Built:
    return toy_lm(
        seed,
        embed=lambda params, tokens: jnp.take(params["embed"], tokens, axis=0) * jnp.sqrt(WIDTH).astype(jnp.float32),
        finish=lambda params, x: x @ params["embed"].T / 6.0,
    )


@derivable("padded vocabulary sliced away", "head with a bias")
def head_padded(seed: int) -> Built:
    return toy_lm(
        seed,
        extra=lambda init: {"wide": init(WIDTH, 128), "bias": init.near(0.0, 128)},
        finish=lambda params, x: (x @ params["wide"] + params["bias"])[..., :VOCAB],
    )


@derivable("log-probabilities as the output", "logits scaled and biased by token frequency")
def head_log_softmax(seed: int) -> Built:
    return toy_lm(
        seed,
        extra=lambda init: {"prior": init.near(0.0, VOCAB)},
        finish=lambda params, x: jax.nn.log_softmax(x @ params["head"] * 1.5 + params["prior"], axis=-1),
    )


@derivable("factorised embedding", "hashed second embedding", "embedding of token zero set to zero")
def embed_factorised(seed: int) -> Built:
    def embed(params, tokens):
        x = params["narrow"][tokens] @ params["widen"] + params["hash"][(tokens * 31 + 7) % 13]
        return jnp.where((tokens == 0)[..., None], 0.0, x)

    def extra(init):
        return {"narrow": init(VOCAB, 9, fan_in=1), "widen": init(9, WIDTH), "hash": init(13, WIDTH, fan_in=4)}

    return toy_lm(seed, embed=embed, extra=extra)


@derivable("tokens flattened to [B*T, C] for the MLP and the head")
def flattened_tokens(seed: int) -> Built:
    def mix(params, x):
        b, t, c = x.shape
        flat = x.reshape(-1, c)
        gate, up = jnp.split(flat @ params["gate_up"], 2, axis=1)
        return x + ((jax.nn.silu(gate) * up) @ params["gate_down"]).reshape(b, t, c)

    def finish(params, x):
        return (x.reshape(-1, WIDTH) @ params["head"]).reshape(*x.shape[:2], VOCAB)

    def extra(init):
        return {"gate_up": init(WIDTH, 80), "gate_down": init(40, WIDTH)}

    return toy_lm(seed, mix=mix, finish=finish, extra=extra)


@derivable("work along the channels that would be refused along the tokens: cumsum, sort, flip, roll, FFT, softmax")
def channel_mixing(seed: int) -> Built:
    def mix(params, x):
        y = jnp.cumsum(x, axis=-1) * 0.1 + jnp.sort(x, axis=-1) + jnp.flip(x, -1) + jnp.roll(x, 2, axis=-1)
        y = y + jnp.fft.fft(x, axis=-1).real * 0.1 + jax.nn.softmax(x, axis=-1) * jnp.max(x, -1, keepdims=True)
        return x + 0.3 * y + jax.lax.top_k(x, 1)[0]

    return toy_lm(seed, mix=mix)


@derivable("convolution along the channels")
def channel_convolution(seed: int) -> Built:
    def mix(params, x):
        b, t, c = x.shape
        y = jax.lax.conv_general_dilated(
            x.reshape(b * t, c, 1), params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x + y.reshape(b, t, c)

    return toy_lm(seed, mix=mix, extra=lambda init: {"kernel": init(3, 1, 1)})


@derivable("parallel attention and MLP from one norm (GPT-J, Phi)")
def parallel_block(seed: int) -> Built:
    def weights(init):
        return head_weights(init) | {"up": init(WIDTH, 44), "bias": init.near(0.0, 44), "down": init(44, WIDTH)}

    def attend(p, h):
        mlp = jax.nn.gelu(h @ p["up"] + p["bias"], approximate=False) @ p["down"]
        return merge(p, causal_attention(*heads_of(p, h))) + mlp

    return toy_lm(seed, attend, weights)


@derivable("gated attention output", "squared relu", "residual scaling", "post-norm of each branch")
def gates_and_scales(seed: int) -> Built:
    def weights(init):
        return head_weights(init) | {"gate": init(WIDTH, 3), "post": init.near(1.0, WIDTH), "a": init(WIDTH, WIDTH)}

    def attend(p, h):
        o = causal_attention(*heads_of(p, h)) * jax.nn.sigmoid(h @ p["gate"])[..., None]
        squared = jnp.square(jax.nn.relu(h @ p["a"]))
        return 0.22 * rms(merge(p, o) + squared, p["post"])

    return toy_lm(seed, attend, weights)


@derivable("two attentions in a layer, one local and one global, summed")
def two_attentions(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        near = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(2, 0))
        return merge(p, near + causal_attention(k, q, v))

    return toy_lm(seed, attend)


def expert_weights(init: Init) -> Params:
    return {"router": init(WIDTH, 5), "w_in": init(5, WIDTH, 20, fan_in=WIDTH), "w_out": init(5, 20, WIDTH, fan_in=20)}


@derivable("dense mixture of experts, softmax router over all of them")
def experts_soft(seed: int) -> Built:
    def mix(params, x):
        share = jax.nn.softmax(x @ params["router"], axis=-1)
        hidden = jax.nn.gelu(jnp.einsum("btc,ecf->btef", x, params["w_in"]))
        return x + jnp.einsum("btef,efc,bte->btc", hidden, params["w_out"], share)

    return toy_lm(seed, mix=mix, extra=expert_weights)


@derivable("dense mixture of experts, top-2 router with one-hot masks (Mixtral)")
def experts_top_k(seed: int) -> Built:
    def mix(params, x):
        top, chosen = jax.lax.top_k(x @ params["router"], 2)
        gates = jnp.einsum("btk,btke->bte", jax.nn.softmax(top, -1), jax.nn.one_hot(chosen, 5))
        outs = jax.vmap(lambda w_in, w_out: jax.nn.silu(x @ w_in) @ w_out)(params["w_in"], params["w_out"])
        return x + jnp.einsum("ebtc,bte->btc", outs, gates)

    return toy_lm(seed, mix=mix, extra=expert_weights)


@derivable("dense mixture of experts, router by threshold", "experts in a scan", "scatter over experts")
def experts_scanned(seed: int) -> Built:
    def mix(params, x):
        flat = x.reshape(-1, WIDTH)
        score = jax.nn.sigmoid(flat @ params["router"])
        chosen = jnp.argsort(-score, axis=-1)[:, :2]
        gates = (
            jnp.zeros_like(score)
            .at[jnp.arange(flat.shape[0])[:, None], chosen]
            .set(jnp.take_along_axis(score, chosen, axis=-1))
        )

        def expert(total, weights):
            w_in, w_out, gate = weights
            return total + gate[:, None] * (jax.nn.relu(flat @ w_in) @ w_out), None

        total, _ = jax.lax.scan(expert, jnp.zeros_like(flat), (params["w_in"], params["w_out"], gates.T))
        return x + total.reshape(x.shape)

    return toy_lm(seed, mix=mix, extra=expert_weights)


@derivable("experts chosen by gathering their weights for each token")
def experts_gathered(seed: int) -> Built:
    def mix(params, x):
        best = jnp.argmax(x @ params["router"], axis=-1)
        hidden = jax.nn.relu(jnp.einsum("btc,btcf->btf", x, params["w_in"][best]))
        return x + jnp.einsum("btf,btfc->btc", hidden, params["w_out"][best])

    return toy_lm(seed, mix=mix, extra=expert_weights)


@derivable("sizes that equal the usual length of analysis, 131", "unused parameters")
def sizes_of_131(seed: int) -> Built:
    def mix(params, x):
        return x + jax.nn.gelu(x @ params["up"]) @ params["down"] + params["pos"][: x.shape[1]] @ params["square"]

    def extra(init):
        return {
            "up": init(WIDTH, 131),
            "down": init(131, WIDTH),
            "pos": init(131, WIDTH, fan_in=9),
            "square": init(WIDTH, WIDTH),
            "never_used": init(131, 131),
        }

    return toy_lm(seed, mix=mix, extra=extra, vocab=131)


@derivable("sizes of 131 and 262 that no parameter has")
def sizes_of_131_inside(seed: int) -> Built:
    def mix(params, x):
        wide = jnp.pad(x, ((0, 0), (0, 0), (0, 131 - WIDTH))) + jnp.sin(jnp.arange(131))
        twice = jnp.concatenate([wide, wide[..., ::-1]], axis=-1)
        return x + twice[..., 100 : 100 + WIDTH] * jnp.tanh(twice.mean(-1, keepdims=True))

    return toy_lm(seed, mix=mix)


@derivable("int8 weights dequantized by hand", "jnp.einsum with preferred_element_type")
def weights_int8(seed: int) -> Built:
    def extra(init):
        return {"w8": jnp.asarray(init.rng.integers(-127, 128, (WIDTH, WIDTH)), jnp.int8), "s": init(WIDTH, fan_in=90)}

    def mix(params, x):
        w = params["w8"].astype(jnp.float32) * params["s"] / 20
        return x + jnp.einsum("btc,cd->btd", x, w, preferred_element_type=jnp.float32)

    return toy_lm(seed, mix=mix, extra=extra)


def cast_lm(seed: int, compute: type, attend, params_dtype: type) -> Built:
    """A model with `params_dtype` parameters that computes in `compute` and whose logits are in `compute` too."""
    built = toy_lm(seed, attend, dtype=params_dtype)

    def forward(params, tokens):
        return built.forward(jax.tree.map(lambda leaf: leaf.astype(compute), params), tokens)

    return Built(forward, built.model, built.vocab_size)


@derivable("bfloat16 parameters and compute", "softmax in float32", dtype="bfloat16")
def bf16_softmax_f32(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * 0.3
        w = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), s, -jnp.inf), -1).astype(v.dtype)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))

    return cast_lm(seed, jnp.bfloat16, attend, jnp.bfloat16)


@derivable("bfloat16 compute with float32 parameters", "softmax in bfloat16, mask of finfo.min", dtype="bfloat16")
def bf16_softmax_bf16(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(10).astype(q.dtype)
        w = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), s, jnp.finfo(jnp.bfloat16).min), -1)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))

    return cast_lm(seed, jnp.bfloat16, attend, jnp.float32)


@derivable("float16 parameters and compute", "scores in float32 by preferred_element_type", dtype="float16")
def f16_scores_f32(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * 0.3
        w = jax.nn.softmax(jnp.where(jnp.tri(t, dtype=bool), s, -1e9), -1)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w.astype(jnp.float16), v))

    return cast_lm(seed, jnp.float16, attend, jnp.float16)


@derivable("batch of one taken off at the start, put on at the end")
def batch_of_one(seed: int) -> Built:
    built = toy_lm(seed, lambda p, h: plain_attend(p, h[None])[0])
    return built._replace(forward=lambda params, tokens: built.forward(params, tokens[0])[None])


@derivable("whole forward in a lax.map over the batch")
def batch_mapped(seed: int) -> Built:
    built = toy_lm(seed)

    def forward(params, tokens):
        return jax.lax.map(lambda row: built.forward(params, row[None])[0], tokens)

    return built._replace(forward=forward)


@derivable("parameters in a registered dataclass with static fields, the forward its method")
def dataclass_model(seed: int) -> Built:
    built = toy_lm(seed, layers=2)

    @jax.tree_util.register_dataclass
    @dataclass
    class Model:
        weights: Params
        gain: float
        scale: float = field(metadata={"static": True})

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return self.scale * self.gain * built.forward(self.weights, tokens)

    return Built(lambda model, tokens: model(tokens), Model(built.model, 0.75, 1.5), VOCAB)


@derivable("attention in float32, the rest in bfloat16", dtype="bfloat16")
def mixed_precision(seed: int) -> Built:
    def attend(p: Params, h: jax.Array) -> jax.Array:
        return plain_attend(p, h.astype(jnp.float32)).astype(h.dtype)

    def weights(init: Init) -> Params:
        return jax.tree.map(lambda w: w.astype(jnp.float32), head_weights(init))

    built = toy_lm(seed, attend, weights, dtype=jnp.bfloat16)
    return Built(built.forward, built.model, VOCAB)
