"""What every backend of flash attention takes: masking, and the sizes that choose a kernel."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jax import Array

from pallas_kernels.paged_attention.types import Masking as Masking


class FlashAttentionError(ValueError):
    """Arguments that no backend can serve, or that the one asked for cannot: says what was expected and found."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All that a backend's `unsupported_reason` looks at besides `Masking`."""

    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype[Any]
    has_slopes: bool = False

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, slopes: Array | None = None) -> "Sizes":
        """The sizes of these arguments, or of ShapeDtypeStructs of them."""
        batch, seq_len, num_heads, head_dim = q.shape
        return cls(
            batch=batch,
            seq_len=seq_len,
            num_heads=num_heads,
            num_kv_heads=k.shape[2],
            head_dim=head_dim,
            value_dim=v.shape[3],
            dtype=np.dtype(q.dtype),
            has_slopes=slopes is not None,
        )

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads


__all__ = ["FlashAttentionError", "Masking", "Sizes"]
