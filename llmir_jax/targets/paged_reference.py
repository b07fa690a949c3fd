"""Reference of the paged KV cache's two operations, in plain JAX: correct for any ragged batch, on any backend.

Attention is the online softmax of Milakov & Gimelshein (arXiv:1805.02867) over blocks of keys, so that its cost follows
the context that is there, not the longest one possible. Few tokens (at most one a sequence, as in decoding) are served
each on its own; many are cut into runs of rows of one sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

KEYS_PER_BLOCK = 256
"""About how many keys are read at once, in tokens."""
LOWEST = -3.4e38
"""Below any score; finite, so that a query that saw nothing yet is rescaled by exp(0), not exp(inf - inf)."""
ROWS_PER_RUN = 128
"""At most how many rows of one sequence are served at once."""


@dataclass(frozen=True, kw_only=True)
class QuantizedPages:
    """Page arrays of integers [N, PS, Hkv, D], packed if they are of 4 bits, with scales for each token and head."""

    parts: tuple[Array, ...]  # integers, scales …, [N, PS, Hkv, …] each
    encode: Callable[[Array], tuple[Array, ...]]  # floats [..., Hkv, D] → integers, scales …
    decode: Callable[..., Array]  # and back, float32
    shape: tuple[int, ...]

    def __getitem__(self, pages: Array) -> Array:
        """Whole pages as floats [..., PS, Hkv, D]."""
        return self.decode(*(part[pages] for part in self.parts))


Pages = Array | QuantizedPages


def _split(array: Array, shards: int) -> Array:
    """[num_pages, page_size, …] as [num_pages, shards, page_size / shards, …]."""
    return array.reshape(array.shape[0], shards, array.shape[1] // shards, *array.shape[2:])


def write_pages(
    k_pages: Pages,
    v_pages: Pages,
    k: Array,
    v: Array,
    seq_ids: Array,
    positions: Array,
    block_tables: Array,
    num_tokens: Array,
    *,
    shards: int = 1,
) -> tuple[Array, ...]:
    """Write new keys and values to their pages: the new arrays of k_pages, then of v_pages.

    Args:
        k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim].
        k, v: [T, num_kv_heads, head_dim].
        seq_ids, positions: int32 [T].
        block_tables: int32 [S, P].
        num_tokens: int32 []; rows from it on are padding and are not written.
        shards: parts that the positions of each page are in, one after the other, see `attend_pages`.
    """
    if k.shape[0] == 1:
        # XLA makes a scatter of one row a read, a choice and an update, and copies the whole array for the read
        k, v = (jnp.concatenate([x, x]) for x in (k, v))
        seq_ids, positions = (jnp.concatenate([x, x]) for x in (seq_ids, positions))
        num_tokens = jnp.minimum(num_tokens, 1)
    write_to = partial(
        write_shard,
        seq_ids=seq_ids,
        positions=positions,
        block_tables=block_tables,
        num_tokens=num_tokens,
        page_size=k_pages.shape[1],
        shards=shards,
    )

    def write(array: Array, new: Array) -> Array:
        if shards == 1:
            return write_to(array, 0, new)
        split = _split(array, shards)
        written = jax.vmap(write_to, in_axes=(1, 0, None), out_axes=1)(split, jnp.arange(shards), new)
        return written.reshape(array.shape)

    written: list[Array] = []
    for pages, new in ((k_pages, k), (v_pages, v)):
        if isinstance(pages, QuantizedPages):
            written += map(write, pages.parts, pages.encode(new))
        else:
            written.append(write(pages, new))
    return tuple(written)


def write_shard(
    array: Array,
    shard: Array | int,
    new: Array,
    *,
    seq_ids: Array,
    positions: Array,
    block_tables: Array,
    num_tokens: Array,
    page_size: int,
    shards: int,
) -> Array:
    """Write rows `new` [T, …] to [num_pages, page_size / shards, …], where their positions are in this shard."""
    num_pages, size = array.shape[:2]
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)
    valid = rows < num_tokens
    page = block_tables[jnp.where(valid, seq_ids, 0), jnp.where(valid, positions // page_size, 0)]
    within = positions % page_size
    mine = valid if shards == 1 else valid & (within // size == shard)
    slot = jnp.where(mine, page * size + within % size, num_pages * size + rows)
    flat = array.reshape(num_pages * size, *array.shape[2:])
    flat = flat.at[slot].set(new.astype(array.dtype), mode="drop", unique_indices=True)
    return flat.reshape(array.shape)


class Softmax(NamedTuple):
    """Running softmax of some queries: weighted values, sum of weights, largest score."""

    values: Array  # float32 [..., Dv]
    total: Array  # float32 [...]
    largest: Array  # float32 [...]

    @staticmethod
    def start(shape: Sequence[int], value_dim: int) -> "Softmax":
        """Of queries [...] that have seen nothing."""
        return Softmax(
            jnp.zeros((*shape, value_dim), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, LOWEST)
        )

    def finish(self) -> Array:
        """Weighted mean of the values; zeros for a query that saw nothing."""
        return self.values / jnp.maximum(self.total, 1e-37)[..., None]

    def and_of(self, other: "Softmax") -> "Softmax":
        """Of the keys of both, which have none in common."""
        return Softmax(*map(jnp.stack, zip(self, other, strict=True))).merged()

    def merged(self) -> "Softmax":
        """Of softmaxes over parts of the keys, along the first axis, the one over all of them."""
        largest = self.largest.max(0)
        kept = jnp.exp(self.largest - largest)
        return Softmax((self.values * kept[..., None]).sum(0), (self.total * kept).sum(0), largest)


def attend_pages(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    block_tables: Array,
    seq_lens: Array,
    seq_ids: Array,
    positions: Array,
    num_tokens: Array,
    slopes: Array | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    shards: int = 1,
) -> Array:
    """Attention of tokens to the pages of their sequences: float32 [T, num_heads, head_dim of the values].

    Args:
        q: [T, num_heads, head_dim].
        k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim].
        block_tables: int32 [S, P].
        seq_lens: int32 [S], positions that exist.
        seq_ids, positions: int32 [T].
        num_tokens: int32 []; rows from it on are padding.
        slopes: float32 [num_heads], added times (key position - query position).
        scale, softcap: score = softcap * tanh(scale * q·k / softcap), or scale * q·k.
        window: a query sees that many positions, its own included.
        shards: parts that the positions of each page are in, one after the other. Each is attended to by itself, and
            then they are merged, so that they can be on as many devices: of what these hold only a row of values, a
            sum and a maximum for each query and head go between them, once.
    """
    attend = partial(
        attend_shard,
        q,
        block_tables=block_tables,
        seq_lens=seq_lens,
        seq_ids=seq_ids,
        positions=positions,
        num_tokens=num_tokens,
        slopes=slopes,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        shards=shards,
    )
    num_rows, num_heads, _ = q.shape
    if shards == 1:
        out = attend(k_pages, v_pages, 0).finish()
    else:
        parts, rebuild = zip(*map(partial(_parts, shards=shards), (k_pages, v_pages)), strict=True)

        def attend_parts(k_parts: tuple[Array, ...], v_parts: tuple[Array, ...], shard: Array) -> Softmax:
            return attend(rebuild[0](k_parts), rebuild[1](v_parts), shard)

        each = jax.vmap(attend_parts, in_axes=(1, 1, 0))(parts[0], parts[1], jnp.arange(shards, dtype=jnp.int32))
        out = each.merged().finish()
    return out.reshape(num_rows, num_heads, -1)


def _parts(pages: Pages, *, shards: int) -> tuple[tuple[Array, ...], Callable[[tuple[Array, ...]], Pages]]:
    """The arrays of pages with an axis 1 of shards, and what makes pages of the arrays of one of these."""
    if not isinstance(pages, QuantizedPages):
        return (_split(pages, shards),), lambda parts: parts[0]
    shape = (pages.shape[0], pages.shape[1] // shards, *pages.shape[2:])
    return tuple(_split(part, shards) for part in pages.parts), lambda parts: replace(pages, parts=parts, shape=shape)


def attend_shard(
    q: Array,
    k_pages: Pages,
    v_pages: Pages,
    shard: Array | int,
    *,
    block_tables: Array,
    seq_lens: Array,
    seq_ids: Array,
    positions: Array,
    num_tokens: Array,
    slopes: Array | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    shards: int,
) -> Softmax:
    """Attention to one of the shards of each page [num_pages, page_size / shards, num_kv_heads, head_dim]."""
    num_rows, num_heads, _ = q.shape
    size, num_kv_heads = k_pages.shape[1:3]
    page_size = size * shards
    pages_per_seq = block_tables.shape[1]
    pages_per_block = min(pages_per_seq, max(1, KEYS_PER_BLOCK // page_size))
    padding = -pages_per_seq % pages_per_block
    tables = jnp.pad(block_tables, ((0, 0), (0, padding)))
    keys_per_block = pages_per_block * page_size  # of all shards: so many positions, of which each has its share
    own_keys = pages_per_block * size
    num_blocks = tables.shape[1] // pages_per_block
    head_slopes = None if slopes is None else slopes.reshape(num_kv_heads, -1)
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, -1)

    def positions_of(block: Array) -> Array:
        """Where the keys [own_keys] of a block of pages are in their sequence."""
        if shards == 1:
            return block * keys_per_block + jnp.arange(keys_per_block, dtype=jnp.int32)
        page = jnp.arange(pages_per_block, dtype=jnp.int32)[:, None] * page_size
        within = jnp.arange(size, dtype=jnp.int32) + shard * size
        return block * keys_per_block + (page + within).reshape(-1)

    def visible(query_positions: Array, key_positions: Array, lens: Array) -> Array:
        """[rows, keys] of query positions [rows, 1], key positions [keys] and lengths [rows, 1]."""
        seen = key_positions < lens
        if causal:
            seen &= key_positions <= query_positions
        if window is not None:
            seen &= key_positions > query_positions - window
        return seen

    def only_live(values: Array, seen: Array) -> Array:
        """Zeros for values that no query sees: a page may hold anything there, and a weight of 0 times NaN is NaN."""
        return jnp.where(seen[..., None, None], values, jnp.zeros((), values.dtype))

    def update(state: Softmax, scores: Array, seen: Array, distance: Array, weigh: Callable[[Array], Array]) -> Softmax:
        """One block of keys. scores [rows, G, M, keys] (KV heads, queries a head); seen, distance [rows, keys]."""
        scores = scores * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if head_slopes is not None:
            scores = scores + head_slopes[:, :, None] * distance[:, None, None, :]
        scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
        largest = jnp.maximum(state.largest, scores.max(-1))
        weights = jnp.exp(scores - largest[..., None])
        kept = jnp.exp(state.largest - largest)
        return Softmax(state.values * kept[..., None] + weigh(weights), state.total * kept + weights.sum(-1), largest)

    def start(rows: int) -> Softmax:
        return Softmax.start((rows, *grouped.shape[1:3]), v_pages.shape[-1])

    def block_range(query_positions: Array, lens: Array) -> tuple[Array, Array]:
        """Blocks of keys that any of the queries can see."""
        last = jnp.max(jnp.minimum(query_positions + 1, lens) if causal else lens)
        stop = jnp.minimum(-(-last // keys_per_block), num_blocks)
        if window is None:
            return jnp.int32(0), stop
        return jnp.maximum(jnp.min(query_positions) - window + 1, 0) // keys_per_block, stop

    def over_blocks(first: Array, stop: Array, body: Callable[[Array, Softmax], Softmax], state: Softmax) -> Softmax:
        if num_blocks == 1:
            return body(jnp.int32(0), state)
        done: Softmax = lax.fori_loop(first, stop, body, state)
        return done

    def one_by_one() -> Softmax:
        """Each row reads its own sequence's pages."""
        valid = jnp.arange(num_rows, dtype=jnp.int32) < num_tokens
        ids = jnp.where(valid, seq_ids, 0)
        place = jnp.where(valid, positions, 0)[:, None]
        lens = jnp.where(valid, seq_lens[ids], 1)[:, None]
        row_tables = tables[ids]

        def body(block: Array, state: Softmax) -> Softmax:
            pages = lax.dynamic_slice_in_dim(row_tables, block * pages_per_block, pages_per_block, 1)
            keys = k_pages[pages].reshape(num_rows, own_keys, num_kv_heads, -1)
            key_positions = positions_of(block)
            seen = visible(place, key_positions, lens)
            values = v_pages[pages].reshape(num_rows, own_keys, num_kv_heads, -1)
            values = only_live(values, seen)
            scores = jnp.einsum("tgmd,tkgd->tgmk", grouped, keys, preferred_element_type=jnp.float32)

            def weigh(weights: Array) -> Array:
                return jnp.einsum("tgmk,tkgd->tgmd", weights, values, preferred_element_type=jnp.float32)

            return update(state, scores, seen, (key_positions - place).astype(jnp.float32), weigh)

        first, stop = block_range(place, lens)
        return over_blocks(first, stop, body, start(num_rows))

    def run_by_run() -> Softmax:
        """Runs of rows of one sequence, one after the other."""
        rows = min(num_rows, ROWS_PER_RUN)

        def serve(carry: tuple[Array, Softmax]) -> tuple[Array, Softmax]:
            begin, out = carry
            seq = seq_ids[begin]
            offset = jnp.minimum(begin, num_rows - rows)
            index = offset + jnp.arange(rows, dtype=jnp.int32)
            ids = lax.dynamic_slice_in_dim(seq_ids, offset, rows)
            mine = (ids == seq) & (index >= begin) & (index < num_tokens)
            place = jnp.where(mine, lax.dynamic_slice_in_dim(positions, offset, rows), positions[begin])[:, None]
            queries = lax.dynamic_slice_in_dim(grouped, offset, rows)
            lens = jnp.broadcast_to(seq_lens[seq], (rows, 1))

            def body(block: Array, state: Softmax) -> Softmax:
                pages = lax.dynamic_slice(tables, (seq, block * pages_per_block), (1, pages_per_block))[0]
                keys = k_pages[pages].reshape(own_keys, num_kv_heads, -1)
                key_positions = positions_of(block)
                seen = visible(place, key_positions, lens)
                values = only_live(v_pages[pages].reshape(own_keys, num_kv_heads, -1), seen.any(0))
                scores = jnp.einsum("tgmd,kgd->tgmk", queries, keys, preferred_element_type=jnp.float32)

                def weigh(weights: Array) -> Array:
                    return jnp.einsum("tgmk,kgd->tgmd", weights, values, preferred_element_type=jnp.float32)

                return update(state, scores, seen, (key_positions - place).astype(jnp.float32), weigh)

            first, stop = block_range(place, lens)
            served = over_blocks(first, stop, body, start(rows))

            def put(all_rows: Array, new: Array) -> Array:
                before = lax.dynamic_slice_in_dim(all_rows, offset, rows)
                chosen = jnp.where(mine.reshape(-1, *[1] * (new.ndim - 1)), new, before)
                return lax.dynamic_update_slice_in_dim(all_rows, chosen, offset, 0)

            return begin + jnp.sum(mine, dtype=jnp.int32), jax.tree.map(put, out, served)

        done: tuple[Array, Softmax] = lax.while_loop(
            lambda c: c[0] < num_tokens, serve, (jnp.int32(0), start(num_rows))
        )
        return done[1]

    return one_by_one() if num_rows <= block_tables.shape[0] else run_by_run()


__all__ = ["Pages", "QuantizedPages", "Softmax", "attend_pages", "attend_shard", "write_pages", "write_shard"]
