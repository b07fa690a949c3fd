"""Models outside of what is promised: refusing them is right, so is a decoder that is equal; a wrong one never is."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo.plain import WIDTH, Params, causal_attention, head_weights, heads_of, merge, toy_lm
from zoo.registry import Built, tricky


def scores_of(p: Params, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled scores [B, H, T, T], the causal mask [T, T] and values [B, T, H, D]."""
    q, k, v = heads_of(p, h)
    t = h.shape[1]
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, jnp.tri(t, dtype=bool), v


def weighted(p: Params, w: jax.Array, v: jax.Array) -> jax.Array:
    return merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v))


@tricky("a temperature learned for each head, on the scores")
def temperature_per_head(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = s * jnp.exp(p["temperature"])[:, None, None]
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"temperature": init.near(0.3, 3)})


@tricky("a scale that is a parameter")
def learned_scale(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * p["scale"]
        mask = jnp.tri(h.shape[1], dtype=bool)
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"scale": init.near(0.5)})


@tricky("a temperature that grows with the query's position")
def scale_by_position(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = s * jnp.log(jnp.arange(h.shape[1], dtype=jnp.float32) + 2.0)[:, None]
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend)


@tricky("relative position bias from a table of buckets (T5)")
def relative_bias_t5(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        back = jnp.maximum(jnp.arange(h.shape[1])[:, None] - jnp.arange(h.shape[1]), 0)
        far = 4 + (jnp.log(jnp.maximum(back, 1) / 4) / np.log(16 / 4) * 4).astype(jnp.int32)
        bucket = jnp.where(back < 4, back, jnp.minimum(far, 7))
        s = s + p["relative"][bucket].transpose(2, 0, 1)
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"relative": init(8, 3, fan_in=1)})


@tricky("ALiBi that is not linear: slope * sqrt(distance)")
def bias_sqrt_distance(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        back = jnp.maximum(jnp.arange(h.shape[1])[:, None] - jnp.arange(h.shape[1]), 0)
        return weighted(p, jax.nn.softmax(jnp.where(mask, s - jnp.sqrt(back), -jnp.inf)), v)

    return toy_lm(seed, attend)


@tricky("ALiBi clipped at a distance beyond the usual prompts")
def bias_clipped(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        back = jnp.arange(h.shape[1])[:, None] - jnp.arange(h.shape[1])
        return weighted(p, jax.nn.softmax(jnp.where(mask, s - 0.2 * jnp.minimum(back, 9), -jnp.inf)), v)

    return toy_lm(seed, attend)


@tricky("ALiBi from a stored table of the keys' biases, sliced")
def alibi_table(seed: int) -> Built:
    table = np.arange(512, dtype=np.float32) * np.array([[0.5], [0.25], [0.125]], np.float32)

    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = s + jnp.asarray(table)[:, None, : h.shape[1]]
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend)


@tricky("ALiBi and positions from the cumulative sum of an all-ones mask (Bloom)")
def alibi_of_ones(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        position = jnp.cumsum(jnp.ones(h.shape[:2]), axis=-1) - 1
        s = s + position[:, None, None, :] * jnp.array([0.5, 0.25, 0.1])[:, None, None]
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend)


@tricky("a bias of each key's content (forgetting attention)")
def bias_by_key_content(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = s + (h @ p["importance"]).swapaxes(1, 2)[:, :, None, :]
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"importance": init(WIDTH, 3)})


@tricky("a bias of each query's content: shifts a row, changes nothing")
def bias_by_query_content(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = s + (h @ p["shift"]).swapaxes(1, 2)[..., None]
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -jnp.inf)), v)

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"shift": init(WIDTH, 3)})


@tricky("local and global heads in one layer")
def windows_by_head(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        back = jnp.arange(h.shape[1])[:, None] - jnp.arange(h.shape[1])
        near = back < jnp.array([3, 1000, 6])[:, None, None]
        return weighted(p, jax.nn.softmax(jnp.where(mask & near, s, -1e30)), v)

    return toy_lm(seed, attend)


@tricky("differential attention: two softmaxes subtracted")
def differential(seed: int) -> Built:
    def attend(p, h):
        first, mask, v = scores_of(p, h)
        second = scores_of(p | {"q": p["k"], "k": p["q"]}, h * 0.7)[0]
        first, second = (jax.nn.softmax(jnp.where(mask, s, -1e30)) for s in (first, second))
        return weighted(p, first - 0.4 * second, v)

    return toy_lm(seed, attend)


@tricky("weights masked by where(mask, p, 0) and normalised again")
def normalised_again(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        w = jnp.where(mask, jax.nn.softmax(s), 0.0)
        return weighted(p, w / w.sum(-1, keepdims=True), v)

    return toy_lm(seed, attend)


@tricky("exp of scores less the maximum over all keys, the future too, then masked")
def maximum_of_all(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        e = jnp.exp(s - s.max(-1, keepdims=True)) * mask
        return weighted(p, e / e.sum(-1, keepdims=True), v)

    return toy_lm(seed, attend)


@tricky("a maximum guarded against rows of -inf")
def guarded_maximum(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = jnp.where(mask, s, -jnp.inf)
        top = s.max(-1, keepdims=True)
        e = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0.0))
        return weighted(p, e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30), v)

    return toy_lm(seed, attend)


@tricky("weights raised by dropout's keep probability", "scaled weights")
def weights_scaled(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -1e30)) * 1.25, v)

    return toy_lm(seed, attend)


@tricky("queries and keys of the position alone")
def attention_of_positions(seed: int) -> Built:
    def attend(p, h):
        t = h.shape[1]
        q, k, v = heads_of(p, h)
        wave = jnp.sin(jnp.outer(jnp.arange(t), jnp.array([1.0, 0.3] * 5)))
        return merge(p, causal_attention(q, jnp.broadcast_to(wave[None, :, None], k.shape), v))

    return toy_lm(seed, attend)


@tricky("the whole sequence padded to 256 tokens and cut again")
def padded_to_a_fixed_length(seed: int) -> Built:
    built = toy_lm(seed)

    def forward(params, tokens):
        t = tokens.shape[1]
        return built.forward(params, jnp.pad(tokens, ((0, 0), (0, 256 - t))))[:, :t]

    return built._replace(forward=forward)


@tricky("keys in blocks with a running softmax (flash attention in jnp)")
def blockwise_attention(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        b, t, n, d = q.shape
        blocks = -(-t // 8)
        pad = ((0, 0), (0, 8 * blocks - t), (0, 0), (0, 0))
        keys, values = (jnp.pad(a, pad).reshape(b, blocks, 8, n, d).swapaxes(0, 1) for a in (k, v))

        def step(carry, block):
            top, total, out = carry
            i, kb, vb = block
            s = jnp.einsum("bqhd,bkhd->bhqk", q, kb) * d**-0.5
            s = jnp.where(i * 8 + jnp.arange(8) <= jnp.arange(t)[:, None], s, -1e30)
            new = jnp.maximum(top, s.max(-1, keepdims=True))
            e, fade = jnp.exp(s - new), jnp.exp(top - new)
            return (
                new,
                total * fade + e.sum(-1, keepdims=True),
                out * fade + jnp.einsum("bhqk,bkhd->bhqd", e, vb),
            ), None

        start = jnp.full((b, n, t, 1), -1e30), jnp.zeros((b, n, t, 1)), jnp.zeros((b, n, t, d))
        (_, total, out), _ = lax.scan(step, start, (jnp.arange(blocks), keys, values))
        return merge(p, (out / total).swapaxes(1, 2))

    return toy_lm(seed, attend)


@tricky("heads in lax.map, one after another")
def heads_mapped(seed: int) -> Built:
    def attend(p, h):
        def one(w):
            q, k, v = (h @ w[n] for n in "qkv")
            s = jnp.where(jnp.tri(h.shape[1], dtype=bool), q @ k.swapaxes(1, 2) * 0.3, -1e30)
            return jax.nn.softmax(s) @ v @ w["o"]

        weights = {n: p[n].swapaxes(0, 1) for n in "qkv"} | {"o": p["o"]}
        return lax.map(one, weights).sum(0)

    return toy_lm(seed, attend)


@tricky("a bias for the first position by .at[].add")
def scatter_at_first(seed: int) -> Built:
    return toy_lm(
        seed,
        embed=lambda params, tokens: params["embed"][tokens].at[:, 0].add(params["first"]),
        extra=lambda init: {"first": init(WIDTH, fan_in=1)},
    )


@tricky("a convolution of width one, which mixes nothing")
def convolution_of_one(seed: int) -> Built:
    def mix(params, x):
        return x + lax.conv_general_dilated(x, params["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    return toy_lm(seed, mix=mix, extra=lambda init: {"w": init(1, WIDTH, WIDTH, fan_in=WIDTH)})


@tricky("tokens reversed twice")
def reversed_twice(seed: int) -> Built:
    return toy_lm(seed, mix=lambda params, x: (x[:, ::-1] * 2)[:, ::-1])


@tricky("tokens in a lax.map, one after another")
def tokens_mapped(seed: int) -> Built:
    def mix(params, x):
        return x + lax.map(lambda row: jax.nn.gelu(row @ params["square"]), x.swapaxes(0, 1)).swapaxes(0, 1)

    return toy_lm(seed, mix=mix, extra=lambda init: {"square": init(WIDTH, WIDTH)})


@tricky("a loop over the layers that stops by content")
def early_exit(seed: int) -> Built:
    def mix(params, x):
        def more(state):
            return (state[0] < 4) & (jnp.abs(state[1]).max() < 30.0)

        return lax.while_loop(more, lambda state: (state[0] + 1, state[1] * 1.7), (0, x))[1]

    return toy_lm(seed, mix=mix)


@tricky("values that are the embedding itself, keys shared with values")
def keys_are_values(seed: int) -> Built:
    def attend(p, h):
        q, k, _ = heads_of(p, h)
        return merge(p, causal_attention(q, k, k))

    return toy_lm(seed, attend)


@tricky("no attention at all")
def no_attention(seed: int) -> Built:
    return toy_lm(seed, lambda p, h: jnp.tanh(h @ p["w"]), lambda init: {"w": init(WIDTH, WIDTH)})


@tricky("two heads, one causal and one strictly local, summed after separate softmaxes on packed scores")
def scores_split_after_softmax(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        w = jax.nn.softmax(jnp.where(mask, s, -1e30))
        a, b = w[:, :1], w[:, 1:]
        o = jnp.concatenate([a @ v.swapaxes(1, 2)[:, :1], b @ v.swapaxes(1, 2)[:, 1:]], axis=1)
        return merge(p, o.swapaxes(1, 2))

    return toy_lm(seed, attend)


@tricky("a length beyond which positions are halved, longer than the analysis looks")
def threshold_of_length(seed: int) -> Built:
    def embed(params, tokens):
        t = tokens.shape[1]
        return params["embed"][tokens] + params["pos"][jnp.arange(t) // (2 if t > 9 else 1)]

    return toy_lm(seed, embed=embed, extra=lambda init: {"pos": init(256, WIDTH, fan_in=1)})


@tricky("row means of all scores subtracted before the mask: shifts a row, changes nothing")
def scores_centred(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = s - s.mean(-1, keepdims=True)
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -1e30)), v)

    return toy_lm(seed, attend)


@tricky("scores clipped at a height that random scores rarely reach")
def scores_clipped(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        s = jnp.clip(25 * s, -20, 20)
        return weighted(p, jax.nn.softmax(jnp.where(mask, s, -1e30)), v)

    return toy_lm(seed, attend)


@tricky("a mask of -40 under scores of that size")
def mask_too_weak_for_its_scores(seed: int) -> Built:
    def attend(p, h):
        s, mask, v = scores_of(p, h)
        return weighted(p, jax.nn.softmax(25 * s + jnp.where(mask, 0.0, -40.0)), v)

    return toy_lm(seed, attend)


@tricky("scores from two products, of a part with positions and of one without (DeepSeek)")
def scores_of_two_products(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        angle = jnp.arange(h.shape[1])[:, None, None]

        def rotate(x):
            return jnp.concatenate([x[..., :2] * jnp.cos(angle) - x[..., 2:] * jnp.sin(angle), x[..., :2]], -1)

        s = jnp.einsum("bqhd,bkhd->bhqk", q[..., 4:], k[..., 4:])
        s = s + jnp.einsum("bqhd,bkhd->bhqk", rotate(q[..., :4]), rotate(k[..., :4]))
        mask = jnp.tri(h.shape[1], dtype=bool)
        return weighted(p, jax.nn.softmax(jnp.where(mask, s * 0.3, -1e30)), v)

    return toy_lm(seed, attend)


@tricky("keys and values repeated by different counts")
def groups_of_keys_and_values_differ(seed: int) -> Built:
    def weights(init):
        return head_weights(init, heads=6, kv_heads=2, dim=6) | {"v": init(WIDTH, 3, 6)}

    def attend(p, h):
        q, k, v = heads_of(p, h)
        return merge(p, causal_attention(q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 2, axis=2)))

    return toy_lm(seed, attend, weights)


@tricky("mixing that is multiplied by zero")
def mixed_by_nothing(seed: int) -> Built:
    return toy_lm(seed, mix=lambda params, x: x + 0.0 * x.mean(1, keepdims=True))


@tricky("an offset of all positions that is a leaf of the model, in the rotary angle and in the mask")
def offset_leaf(seed: int) -> Built:
    def attend(p, h):
        q, k, v = heads_of(p, h)
        position = jnp.arange(h.shape[1]) + p["offset"]
        wave = jnp.sin(position[:, None, None] * jnp.linspace(0.1, 1, 10))
        s = jnp.einsum("bqhd,bkhd->bhqk", q + wave, k + wave) * 0.3
        s = jnp.where(position[:, None] >= position[None], s, -1e30)
        return weighted(p, jax.nn.softmax(s), v)

    return toy_lm(seed, attend, lambda init: head_weights(init) | {"offset": jnp.int32(3)})


@tricky("a length above which positions are halved, between the lengths that are looked at")
def threshold_of_25(seed: int) -> Built:
    def embed(params, tokens):
        t = tokens.shape[1]
        return params["embed"][tokens] + params["pos"][jnp.arange(t) // (2 if t > 25 else 1)]

    return toy_lm(seed, embed=embed, extra=lambda init: {"pos": init(256, WIDTH, fan_in=1)})


@tricky("an einsum of three, whose order of contraction JAX chooses by the sequence length")
def order_by_length(seed: int) -> Built:
    def mix(params, x):
        return x + jnp.einsum("btc,cr,rd->btd", x, params["down"], params["up"])

    return toy_lm(seed, mix=mix, extra=lambda init: {"down": init(WIDTH, 20), "up": init(20, WIDTH)})
