"""Attention of whole sequences in plain JAX, with a matrix of scores. For checking, and where no kernel serves.

out[b, t, h] = Σ_j softmax_j(softcap(scale · q[b, t, h] · k[b, j, h']) + slope_h · (j − t)) · v[b, j, h'],   h' = h // G
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.flash_attention.types import Masking


def flash_attention_reference(q: Array, k: Array, v: Array, masking: Masking, slopes: Array | None = None) -> Array:
    """As `api.flash_attention`, without its checks. Scores, softmax and sums are float32."""
    batch, seq_len, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, seq_len, k.shape[2], -1, head_dim).astype(jnp.float32)
    precision = lax.Precision.HIGHEST
    scores = jnp.einsum("btgmd,bsgd->bgmts", grouped, k.astype(jnp.float32), precision=precision) * masking.scale
    if masking.softcap is not None:
        scores = masking.softcap * jnp.tanh(scores / masking.softcap)
    at = jnp.arange(seq_len, dtype=jnp.int32)
    distance = at[None, :] - at[:, None]  # [T, S], of a key from a query
    if slopes is not None:
        per_head = slopes.astype(jnp.float32).reshape(k.shape[2], -1, 1, 1)
        scores += per_head * distance.astype(jnp.float32)
    seen = jnp.ones_like(distance, bool)
    if masking.causal:
        seen &= distance <= 0
    if masking.window is not None:
        seen &= distance > -masking.window
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bgmts,bsgd->btgmd", weights, v.astype(jnp.float32), precision=precision)
    return out.reshape(batch, seq_len, num_heads, -1).astype(q.dtype)


__all__ = ["flash_attention_reference"]
