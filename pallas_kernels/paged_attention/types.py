"""What every backend of ragged paged attention takes: pages, the ragged batch, and the sizes that choose a kernel."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array


class PagedAttentionError(ValueError):
    """Arguments that no backend can serve, or that the one asked for cannot: says what was expected and found."""


class KVPages(NamedTuple):
    """One layer's keys and values, a token of all KV heads a row.

    float32, bfloat16 or float16, or int8 with scales: value = integer · scale, symmetric, one scale for each token and
    head. Rows may be wider than their heads, which stand first, with zeros after them; `tpu_tiles.page_width` is what a
    TPU wants.
    """

    k: Array  # [num_pages, page_size, num_kv_heads * head_dim or more]
    v: Array  # as k
    k_scales: Array | None = None  # float32 [num_pages, num_kv_heads, page_size], of int8 pages
    v_scales: Array | None = None


class RaggedBatch(NamedTuple):
    """Whose tokens a step holds. The tokens of a sequence are neighbours, and the last of its `seq_lens` positions.

    No two sequences share a page that either of them writes to in this step.
    """

    block_tables: Array  # int32 [S, P]: position j of sequence s is in page block_tables[s, j // page_size]
    seq_lens: Array  # int32 [S]: tokens of each sequence, this step's included
    query_starts: Array  # int32 [S]: its first row of this step; of no meaning where it has none
    query_lens: Array  # int32 [S]: its rows of this step, 0 for none


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How scores are made and what is visible: softcap(scale · q·k) + slope · (k_pos − q_pos).

    Keys at k_pos ≤ q_pos are visible if `causal`, and at k_pos > q_pos − window if there is a `window`.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that a backend's `unsupported_reason` looks at."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int
    num_seqs: int
    pages_per_seq: int
    q_dtype: np.dtype[Any]
    page_dtype: np.dtype[Any]

    @classmethod
    def of(cls, q: Array, k: Array, pages: KVPages, batch: RaggedBatch) -> "Sizes":
        """The sizes of these arguments, or of ShapeDtypeStructs of them."""
        (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, k.shape[1]
        num_seqs, pages_per_seq = batch.block_tables.shape
        return cls(
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_pages=pages.k.shape[0],
            page_size=pages.k.shape[1],
            num_seqs=num_seqs,
            pages_per_seq=pages_per_seq,
            q_dtype=np.dtype(q.dtype),
            page_dtype=np.dtype(pages.k.dtype),
        )

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """int8 [..., D] and scales float32 [...] of floats [..., D]: scale = largest / 127, round to nearest even."""
    wide = x.astype(jax.numpy.float32)
    scales = jax.numpy.max(jax.numpy.abs(wide), axis=-1) / 127
    safe = jax.numpy.where(scales == 0, 1, scales)
    return jax.numpy.round(wide / safe[..., None]).astype(jax.numpy.int8), scales
