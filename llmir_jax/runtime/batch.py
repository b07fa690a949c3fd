"""What the compiler and the runtime agree on: the step's batch, its cache, and the model that takes the step."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.typing import DTypeLike

Pages = jax.Array | tuple[jax.Array, ...]
"""[num_pages, page_size, num_kv_heads, head_dim], or [num_pages, page_size, row_width] where a kernel wants that; of
quantized ones (integers, scales [..., num_kv_heads, 1]), or with a row_width scales [num_pages, num_kv_heads,
page_size]; integers of 4 bits are packed into bytes [..., head_dim / 2], and have minima [..., num_kv_heads, 1] too."""

Cache = tuple[tuple[tuple[Pages, Pages], ...], ...]
"""Per cache group, per layer of it: (k_pages, v_pages)."""


@dataclass(frozen=True, kw_only=True)
class CacheGroup:
    """Layers whose KV cache shares one page table.

    A sliding-window layer is in a group with its window (in tokens), so that pages no later query can read are freed.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DTypeLike
    window: int | None
    num_pages: int
    page_size: int
    quantized_bits: int | None = None
    """4 or 8 where keys and values are integers with a scale (4: and minimum) for each token and head."""
    side_bytes: int = 0
    """Of a token's scale and minimum, for each head."""
    row_width: int | None = None
    """Elements that a token's keys, or values, take where pages are [num_pages, page_size, row_width]."""

    @property
    def nbytes(self) -> int:
        """Of all its page arrays."""
        numbers = self.num_kv_heads * self.head_dim if self.row_width is None else self.row_width
        bits = 8 * np.dtype(self.dtype).itemsize if self.quantized_bits is None else self.quantized_bits
        tokens = 2 * self.num_layers * self.num_pages * self.page_size
        return tokens * (numbers * bits // 8 + self.num_kv_heads * self.side_bytes)


class StepBatch(NamedTuple):
    """One step's flat ragged batch: T token rows of up to S sequences, all int32.

    The rows of one sequence are contiguous and in rising position order. Rows from ``num_tokens`` on are padding:
    they write nothing to the cache and their results are not read.
    """

    tokens: jax.Array  # [T]
    positions: jax.Array  # [T]
    seq_ids: jax.Array  # [T], row of the block tables
    num_tokens: jax.Array  # []
    block_tables: tuple[
        jax.Array, ...
    ]  # per cache group [S, P]; entry p holds positions [p*page_size, (p+1)*page_size)
    seq_lens: jax.Array  # [S], context length including this step's tokens; 0 for a row that is not in use
    logits_rows: jax.Array  # [S], the row of `tokens` whose logits each sequence wants; 0 for one that wants none


class StepModel(Protocol):
    """A decoder as the engine sees it. `step` is traceable: the engine jits it with an argmax and donates the cache."""

    @property
    def params(self) -> Any: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seqs(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def buckets(self) -> tuple[int, ...]: ...
    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]: ...
    @property
    def compiler_options(self) -> dict[str, bool]:
        """XLA's, for the programs that the step is part of, and for the sampler; see `jax.jit`."""
        ...

    def init_cache(self) -> Cache: ...
    def step(self, params: Any, cache: Cache, batch: StepBatch) -> tuple[jax.Array, Cache]:
        """Logits float32[S, vocab_size] of the rows asked for, and the cache with the new keys and values."""
        ...
