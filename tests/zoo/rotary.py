"""Rotary positions in their common forms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from zoo.plain import Params, causal_attention, head_weights, heads_of, merge, rms, toy_lm
from zoo.registry import Built, derivable

THETA = 100.0
DIM = 10
INV_FREQ = (THETA ** -(np.arange(0, DIM, 2) / DIM)).astype(np.float32)


def rotary_lm(seed: int, rotate: Callable[[jax.Array], jax.Array], **options) -> Built:
    """A model whose queries and keys [B, T, H, D] go through `rotate`."""

    def attend(p, h):
        q, k, v = heads_of(p, h)
        return merge(p, causal_attention(rotate(q), rotate(k), v))

    return toy_lm(seed, attend, **options)


def half_split(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate [B, T, H, D] by tables [T, D / 2]."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@derivable("rotary, half-split by rotate_half", "angles by jnp.outer")
def rotary_rotate_half(seed: int) -> Built:
    def rotate(x):
        freqs = jnp.outer(jnp.arange(x.shape[1]), INV_FREQ)
        emb = jnp.concatenate((freqs, freqs), axis=-1)[None, :, None, :]
        rotated = jnp.concatenate((-x[..., DIM // 2 :], x[..., : DIM // 2]), axis=-1)
        return x * jnp.cos(emb) + rotated * jnp.sin(emb)

    return rotary_lm(seed, rotate)


@derivable("rotary, half-split", "angles by einsum", "frequencies computed in jnp")
def rotary_einsum(seed: int) -> Built:
    def rotate(x):
        timescale = THETA ** (2 * jnp.arange(DIM // 2) / DIM)
        angle = jnp.einsum("i,j->ij", jnp.arange(x.shape[1], dtype=jnp.float32), 1.0 / timescale)
        return half_split(x, jnp.cos(angle), jnp.sin(angle))

    return rotary_lm(seed, rotate)


@derivable("rotary, interleaved by strided slices and stack")
def rotary_interleaved(seed: int) -> Built:
    def rotate(x):
        angle = (jnp.arange(x.shape[1])[:, None] * INV_FREQ)[:, None]
        even, odd = x[..., ::2], x[..., 1::2]
        turned = (even * jnp.cos(angle) - odd * jnp.sin(angle), even * jnp.sin(angle) + odd * jnp.cos(angle))
        return jnp.stack(turned, axis=-1).reshape(x.shape)

    return rotary_lm(seed, rotate)


@derivable("rotary, interleaved by rotate_every_two and repeat (GPT-J)")
def rotary_every_two(seed: int) -> Built:
    def rotate_every_two(x):
        return jnp.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)

    def rotate(x):
        angle = np.einsum("i,j->ij", np.arange(x.shape[1]), INV_FREQ).astype(np.float32)
        sin, cos = (np.repeat(f(angle)[None, :, None], 2, axis=-1) for f in (np.sin, np.cos))
        return x * cos + rotate_every_two(x) * sin

    return rotary_lm(seed, rotate)


@derivable("rotary, complex by lax.complex and a table of exp(i angle)", "real and imag")
def rotary_complex(seed: int) -> Built:
    angle = np.outer(np.arange(512), INV_FREQ)
    table = (np.cos(angle) + 1j * np.sin(angle)).astype(np.complex64)

    def rotate(x):
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        z = jax.lax.complex(pairs[..., 0], pairs[..., 1])
        z = z * jnp.asarray(table)[: x.shape[1]][None, :, None, :]
        return jnp.stack((jnp.real(z), jnp.imag(z)), axis=-1).reshape(x.shape).astype(x.dtype)

    return rotary_lm(seed, rotate)


@derivable("rotary, complex by jnp.exp(1j * angle)", "half-split")
def rotary_complex_exp(seed: int) -> Built:
    def rotate(x):
        phase = jnp.exp(1j * jnp.arange(x.shape[1])[:, None, None] * INV_FREQ)
        z = jax.lax.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * phase
        return jnp.concatenate([z.real, z.imag], -1)

    return rotary_lm(seed, rotate)


@derivable("rotary, tables sliced [:T], a closed-over constant")
def rotary_table_constant(seed: int) -> Built:
    angle = np.outer(np.arange(300), INV_FREQ)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return rotary_lm(seed, lambda x: half_split(x, cos[: x.shape[1]], sin[: x.shape[1]]))


@derivable("rotary, tables sliced [:T], leaves of the model")
def rotary_table_leaf(seed: int) -> Built:
    angle = np.outer(np.arange(300), INV_FREQ).astype(np.float32)

    def weights(init):
        return head_weights(init) | {"cos_sin": jnp.stack([jnp.cos(angle), jnp.sin(angle)])}

    def attend(p: Params, h: jax.Array) -> jax.Array:
        q, k, v = heads_of(p, h)
        cos, sin = p["cos_sin"][:, : h.shape[1]]
        return merge(p, causal_attention(half_split(q, cos, sin), half_split(k, cos, sin), v))

    return toy_lm(seed, attend, weights)


@derivable("rotary, table taken at position ids [B, T]")
def rotary_table_take(seed: int) -> Built:
    angle = np.outer(np.arange(300), INV_FREQ).astype(np.float32)
    table = np.concatenate([np.sin(angle), np.cos(angle)], -1)

    def rotate(x):
        position_ids = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        sin, cos = jnp.split(jnp.take(table, position_ids, axis=0)[:, :, None], 2, axis=-1)
        a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    return rotary_lm(seed, rotate)


@derivable("rotary on a part of each head", "QK-norm before it")
def rotary_partial(seed: int) -> Built:
    def rotate(x):
        turned, kept = x[..., :4], x[..., 4:]
        angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * jnp.array([1.0, 0.2])
        turned = half_split(turned, jnp.cos(angle), jnp.sin(angle))
        return jnp.concatenate([turned, kept], axis=-1)

    def attend(p, h):
        q, k, v = heads_of(p, h)
        q, k = rotate(rms(q, p["q_norm"])), rotate(rms(k, p["k_norm"]))
        return merge(p, causal_attention(q, k, v))

    def weights(init):
        return head_weights(init) | {"q_norm": init.near(1.0, DIM), "k_norm": init.near(1.0, DIM)}

    return toy_lm(seed, attend, weights)


@derivable("rotary, positions [B, T] passed in by the wrapper")
def rotary_from_wrapper(seed: int) -> Built:
    def net(params, tokens, positions):
        def rotate(x):
            angle = positions[:, :, None, None].astype(jnp.float32) * INV_FREQ
            a, b = jnp.split(x, 2, -1)
            sin, cos = jnp.sin(angle), jnp.cos(angle)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        return rotary_lm(seed, rotate).forward(params, tokens)

    def forward(params, tokens):
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None].repeat(tokens.shape[0], 0)
        return net(params, tokens, positions)

    return toy_lm(seed)._replace(forward=forward)


@derivable("rotary after the transpose to bhtd", "positions scaled down (linear scaling)")
def rotary_bhtd(seed: int) -> Built:
    def rotate(x):  # [B, H, T, D]
        angle = (jnp.arange(x.shape[2]) / 4.0)[:, None] * jnp.tile(INV_FREQ, 2)
        turned = jnp.roll(x, DIM // 2, axis=-1) * jnp.where(jnp.arange(DIM) < DIM // 2, -1.0, 1.0)
        return x * jnp.cos(angle) + turned * jnp.sin(angle)

    def attend(p, h):
        q, k, v = (a.swapaxes(1, 2) for a in heads_of(p, h))
        q, k = rotate(q), rotate(k)
        t = h.shape[1]
        s = jnp.where(jnp.tri(t, dtype=bool), q @ k.swapaxes(2, 3) * 0.3, -jnp.inf)
        return merge(p, (jax.nn.softmax(s) @ v).swapaxes(1, 2))

    return toy_lm(seed, attend)


@derivable("rotary as a rotation matrix a position, [T, D, D]")
def rotary_matrices(seed: int) -> Built:
    def rotate(x):
        angle = jnp.arange(x.shape[1])[:, None] * INV_FREQ
        c, s = jnp.cos(angle), jnp.sin(angle)
        rotation = jnp.stack([jnp.stack([c, -s], -1), jnp.stack([s, c], -1)], -2)  # [T, D/2, 2, 2]
        pairs = x.reshape(*x.shape[:-1], DIM // 2, 2)
        return jnp.einsum("tfij,bthfj->bthfi", rotation, pairs).reshape(x.shape)

    return rotary_lm(seed, rotate)


@derivable("rotary with a base of its own in local and in global layers (Gemma 3)")
def rotary_two_bases(seed: int) -> Built:
    def attend(p, h, layer):
        q, k, v = heads_of(p, h)
        t = h.shape[1]
        angle = jnp.outer(jnp.arange(t), (10.0 if layer % 2 else 1000.0) ** -(np.arange(0, DIM, 2) / DIM))
        q, k = (half_split(a, jnp.cos(angle), jnp.sin(angle)) for a in (q, k))
        back = jnp.arange(t)[:, None] - jnp.arange(t)
        mask = (back >= 0) & (back < 3) if layer % 2 else back >= 0
        s = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e30)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))

    return toy_lm(seed, attend, layers=3, by_layer=True)


@derivable("multi-head latent attention: a rotary part shared by the heads, joined to a part that is not (DeepSeek)")
def rotary_latent(seed: int) -> Built:
    def weights(init):
        return {
            "q": init(36, 3, 10),
            "down": init(36, 8),
            "norm": init.near(1.0, 8),
            "k_rope": init(36, 4),
            "k": init(8, 3, 6),
            "v": init(8, 3, 7),
            "o": init(3, 7, 36, fan_in=21),
        }

    def rotate(x):
        angle = jnp.arange(x.shape[1])[:, None] * jnp.array([1.0, 0.1])
        return half_split(x, jnp.cos(angle), jnp.sin(angle))

    def attend(p, h):
        b, t, _ = h.shape
        q = jnp.einsum("btc,chd->bthd", h, p["q"])
        latent = rms(h @ p["down"], p["norm"])
        k_rope = rotate((h @ p["k_rope"])[:, :, None, :])
        k = jnp.concatenate(
            [jnp.einsum("btr,rhd->bthd", latent, p["k"]), jnp.broadcast_to(k_rope, (b, t, 3, 4))], axis=-1
        )
        v = jnp.einsum("btr,rhd->bthd", latent, p["v"])
        q = jnp.concatenate([q[..., :6], rotate(q[..., 6:])], axis=-1)
        return merge(p, causal_attention(q, k, v))

    return toy_lm(seed, attend, weights)


@derivable("rotary, frequencies a leaf of the model", "queries scaled by their position (Llama 4)")
def rotary_frequency_leaf(seed: int) -> Built:
    def weights(init):
        return head_weights(init) | {"inv_freq": jnp.asarray(INV_FREQ)}

    def attend(p: Params, h: jax.Array) -> jax.Array:
        q, k, v = heads_of(p, h)
        position = jnp.arange(h.shape[1], dtype=jnp.float32)
        angle = position[:, None] * p["inv_freq"]
        q, k = (half_split(a, jnp.cos(angle), jnp.sin(angle)) for a in (q, k))
        q = q * (1 + 0.3 * jnp.log(jnp.floor((position + 1) / 4) + 1))[:, None, None]
        return merge(p, causal_attention(q, k, v))

    return toy_lm(seed, attend, weights)
