"""A ragged batch as lists that a kernel walks: tiles of queries of one sequence, and chunks of new keys and values.

Computed by XLA before the kernel, from the batch alone: equal for all layers of a step, which XLA then computes once.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.types import Masking, RaggedBatch


class Tiles(NamedTuple):
    """Tiles of at most `tile` queries, each of one sequence; int32, those from `num_tiles` on mean nothing."""

    num_tiles: Array  # [1]
    seq_ids: Array  # [I]
    rows: Array  # [I]: the tile's first row of the batch
    positions: Array  # [I]: of that row in its sequence
    first_blocks: Array  # [I]: first block of keys that the tile sees
    end_blocks: Array  # [I]: and the one after the last


class Chunks(NamedTuple):
    """New tokens in chunks of neighbouring slots, `chunk` tokens that begin at a multiple of it."""

    offsets: Array  # int32 [S]: chunk of a sequence's slot position 0, were it in the list: position // chunk + offset
    rows: Array  # int32 [C, chunk]: the row of the batch for each slot, 0 where there is none
    valid: Array  # bool [C, chunk]


def tiles_of(
    batch: RaggedBatch, include: Array, masking: Masking, *, tile: int, keys_per_block: int, max_tiles: int
) -> Tiles:
    """Tiles of the sequences that `include`, bool [S], names, in the order of their rows.

    A kernel that writes whole tiles relies on the order: what is beyond a tile's own rows is written again by the next.
    """
    lens = jnp.where(include, batch.query_lens, 0)
    order = jnp.argsort(batch.query_starts).astype(jnp.int32)
    counts = -(-lens[order] // tile)
    ends = jnp.cumsum(counts).astype(jnp.int32)
    index = jnp.arange(max_tiles, dtype=jnp.int32)
    place = jnp.minimum(jnp.searchsorted(ends, index, side="right"), lens.shape[0] - 1)
    seqs = order[place]
    skipped = (index - (ends[place] - counts[place])) * tile
    positions = batch.seq_lens[seqs] - lens[seqs] + skipped
    stop = batch.seq_lens[seqs]
    if masking.causal:
        stop = jnp.minimum(stop, positions + tile)
    first = jnp.zeros_like(positions)
    if masking.window is not None:
        first = jnp.maximum(positions - (masking.window - 1), 0) // keys_per_block
    return Tiles(
        num_tiles=ends[-1:],
        seq_ids=seqs,
        rows=batch.query_starts[seqs] + skipped,
        positions=positions,
        first_blocks=first,
        end_blocks=-(-stop // keys_per_block),
    )


def max_chunks(num_tokens: int, num_seqs: int, chunk: int) -> int:
    """At most so many chunks: a sequence of n new tokens touches no more than n, and no more than n / chunk + 2."""
    return min(num_tokens, num_tokens // chunk + 2 * num_seqs)


def chunks_of(batch: RaggedBatch, num_tokens: int, *, chunk: int) -> Chunks:
    """Chunks of all new tokens."""
    old = batch.seq_lens - batch.query_lens
    first = old // chunk
    counts = jnp.where(batch.query_lens > 0, -(-batch.seq_lens // chunk) - first, 0)
    ends = jnp.cumsum(counts)
    index = jnp.arange(max_chunks(num_tokens, old.shape[0], chunk), dtype=jnp.int32)
    seqs = jnp.minimum(jnp.searchsorted(ends, index, side="right"), old.shape[0] - 1)
    starts = ends - counts
    positions = (first[seqs] + index - starts[seqs])[:, None] * chunk + jnp.arange(chunk, dtype=jnp.int32)
    valid = (positions >= old[seqs, None]) & (positions < batch.seq_lens[seqs, None]) & (index < ends[-1])[:, None]
    rows = jnp.where(valid, (batch.query_starts - old)[seqs, None] + positions, 0)
    return Chunks(offsets=(starts - first).astype(jnp.int32), rows=rows.astype(jnp.int32), valid=valid)
