"""Ragged paged attention in plain JAX: gathers every sequence's pages whole. For checking, and where no kernel serves.

out[t, h] = Σ_j softmax_j(softcap(scale · q[t, h] · k[j, h']) + slope_h · (j − pos_t)) · v[j, h'],   h' = h // (H / Hkv)
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.paged_attention.types import KVPages, Masking, RaggedBatch, quantize_rows


def paged_attention_reference(
    q: Array, k: Array, v: Array, pages: KVPages, batch: RaggedBatch, masking: Masking, slopes: Array | None = None
) -> tuple[Array, KVPages]:
    """As `api.paged_attention`, without its checks. Scores, softmax and sums are float32."""
    seq_ids, positions, valid = rows_of(batch, q.shape[0])
    new_pages = write_pages(k, v, pages, batch, seq_ids, positions, valid)
    out = _attend(q, new_pages, batch, masking, slopes, seq_ids, positions, valid, num_kv_heads=k.shape[1])
    return out, new_pages


def rows_of(batch: RaggedBatch, num_tokens: int) -> tuple[Array, Array, Array]:
    """For each row its sequence and position, int32 [T] (0 for padding), and whether it is a token, bool [T]."""
    rows = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    starts, lens = batch.query_starts[None, :], batch.query_lens[None, :]
    mine = (rows >= starts) & (rows < starts + lens)  # [T, S]
    valid = mine.any(1)
    seq_ids = jnp.argmax(mine, 1).astype(jnp.int32)
    first = batch.seq_lens - batch.query_lens - batch.query_starts
    return seq_ids, jnp.where(valid, first[seq_ids] + rows[:, 0], 0), valid


def write_pages(
    k: Array, v: Array, pages: KVPages, batch: RaggedBatch, seq_ids: Array, positions: Array, valid: Array
) -> KVPages:
    """The pages with new keys and values [T, Hkv, D]; the last three arguments are what `rows_of` gives."""
    num_pages, page_size, _ = pages.k.shape
    page = batch.block_tables[seq_ids, positions // page_size]
    page = jnp.where(valid, page, num_pages)  # beyond the last page: dropped
    slot = positions % page_size

    def written(array: Array, new: Array) -> Array:
        flat = new.reshape(new.shape[0], -1).astype(array.dtype)
        return array.at[page, slot, : flat.shape[1]].set(flat, mode="drop")

    if pages.k_scales is None or pages.v_scales is None:
        return KVPages(written(pages.k, k), written(pages.v, v))
    (k_ints, k_scales), (v_ints, v_scales) = quantize_rows(k), quantize_rows(v)
    return KVPages(
        written(pages.k, k_ints),
        written(pages.v, v_ints),
        pages.k_scales.at[page, :, slot].set(k_scales, mode="drop"),
        pages.v_scales.at[page, :, slot].set(v_scales, mode="drop"),
    )


def _attend(
    q: Array,
    pages: KVPages,
    batch: RaggedBatch,
    masking: Masking,
    slopes: Array | None,
    seq_ids: Array,
    positions: Array,
    valid: Array,
    *,
    num_kv_heads: int,
) -> Array:
    num_tokens, num_heads, head_dim = q.shape

    def gathered(array: Array, scales: Array | None) -> Array:
        """Floats [S, L, Hkv, D] of all positions that the tables have room for."""
        whole = array[batch.block_tables, :, : num_kv_heads * head_dim]  # [S, P, PS, Hkv * D]
        floats = whole.reshape(*whole.shape[:3], num_kv_heads, head_dim).astype(jnp.float32)
        if scales is not None:
            floats *= scales[batch.block_tables].swapaxes(2, 3)[..., None]
        return floats.reshape(whole.shape[0], -1, num_kv_heads, head_dim)

    keys, values = gathered(pages.k, pages.k_scales), gathered(pages.v, pages.v_scales)
    k_pos = jnp.arange(keys.shape[1], dtype=jnp.int32)
    live = k_pos[None, :] < batch.seq_lens[:, None]  # [S, L]; a page may hold anything elsewhere, NaN too
    values = jnp.where(live[..., None, None], values, 0)
    grouped = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)
    precision = lax.Precision.HIGHEST
    scores = jnp.einsum("tgmd,tlgd->tgml", grouped, keys[seq_ids], precision=precision) * masking.scale
    if masking.softcap is not None:
        scores = masking.softcap * jnp.tanh(scores / masking.softcap)
    distance = k_pos[None, :] - positions[:, None]  # [T, L]
    if slopes is not None:
        per_head = slopes.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1)
        scores += per_head * distance.astype(jnp.float32)[:, None, None, :]
    seen = live[seq_ids] & valid[:, None]
    if masking.causal:
        seen &= distance <= 0
    if masking.window is not None:
        seen &= distance > -masking.window
    seen = seen[:, None, None, :]
    largest = jnp.max(jnp.where(seen, scores, -jnp.inf), axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(largest), largest, 0)), 0)
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-37)
    out = jnp.einsum("tgml,tlgd->tgmd", weights, values[seq_ids], precision=precision)
    return out.reshape(num_tokens, num_heads, head_dim).astype(q.dtype)
