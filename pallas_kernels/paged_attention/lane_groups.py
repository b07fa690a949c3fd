"""Queries put into the lanes of their KV heads, for one matrix product a lane group, and results taken out of them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.paged_attention.tpu_tiles import layout
from pallas_kernels.paged_attention.types import Sizes


def _head_mask(sizes: Sizes) -> np.ndarray[Any, Any]:
    """bool [rows, lanes]: the lanes of each query row's own head, in a lane group."""
    _, _, lanes, rows = layout(sizes)
    head = np.arange(rows)[:, None] // sizes.queries_per_kv_head
    return np.asarray(head == np.arange(lanes)[None, :] // sizes.head_dim)


def spread(q: Array, sizes: Sizes) -> Array:
    """Queries [T, H, D] as float32 [T, groups, rows, lanes], 0 outside of their own head's lanes."""
    _, groups, lanes, rows = layout(sizes)
    per_group = lanes // sizes.head_dim
    many = sizes.queries_per_kv_head
    grouped = q.astype(jnp.float32).reshape(q.shape[0], sizes.num_kv_heads, many, sizes.head_dim)
    grouped = jnp.pad(grouped, ((0, 0), (0, groups * per_group - sizes.num_kv_heads), (0, 0), (0, 0)))
    flat = grouped.reshape(q.shape[0], groups, per_group * many, sizes.head_dim)
    flat = jnp.pad(flat, ((0, 0), (0, 0), (0, rows - per_group * many), (0, 0)))
    wide = jnp.tile(flat, per_group)
    wide = jnp.pad(wide, ((0, 0), (0, 0), (0, 0), (0, lanes - wide.shape[-1])))
    return jnp.where(_head_mask(sizes), wide, 0)


def spread_slopes(slopes: Array, sizes: Sizes) -> Array:
    """Slopes [H] as float32 [groups, rows], 0 in rows of no head."""
    _, groups, lanes, rows = layout(sizes)
    heads = lanes // sizes.head_dim * sizes.queries_per_kv_head
    flat = jnp.pad(slopes.astype(jnp.float32), (0, groups * heads - sizes.num_heads))
    return jnp.pad(flat.reshape(groups, heads), ((0, 0), (0, rows - heads)))


def gather_heads(out: Array, sizes: Sizes) -> Array:
    """[T, H, D] of [T, groups, rows, lanes]: of each query row the lanes of its own head."""
    _, _, lanes, _ = layout(sizes)
    many, dim = sizes.queries_per_kv_head, sizes.head_dim
    heads = [out[:, :, i * many : (i + 1) * many, i * dim : (i + 1) * dim] for i in range(lanes // dim)]
    joined = jnp.stack(heads, axis=2)  # [T, groups, per_group, many, D]
    return joined.reshape(out.shape[0], -1, dim)[:, : sizes.num_heads]


__all__ = ["gather_heads", "spread", "spread_slopes"]
