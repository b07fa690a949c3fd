"""The paged KV cache's two operations where tokens and the positions of every page are split along `sequence`.

Each device has some of the step's tokens, with their queries, keys and values, and of every page some positions. New
keys and values go round the ring, and each device writes those whose positions it has. Then queries go round with their
running softmax, and see at each device the keys that it has: those of this step and all before, in pages where they
stay. Since each device has a share of every page, causal masks leave all of them about as much to do (as in Striped
Attention, Brandon et al. 2023, https://arxiv.org/abs/2311.09431). Other axes of the mesh, such as `tensor`, are left
to XLA.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llmir_jax.targets.paged_reference import Pages, QuantizedPages, Softmax, attend_shard, write_shard
from sharding.mesh import SEQUENCE
from sharding.ring import pass_round

_ROWS, _PAGES, _WHOLE = PartitionSpec(SEQUENCE), PartitionSpec(None, SEQUENCE), PartitionSpec()


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Devices along `sequence` of a mesh."""

    mesh: Mesh | AbstractMesh

    @property
    def size(self) -> int:
        return int(self.mesh.shape[SEQUENCE])

    def _map(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        mapped: Callable[..., Any] = jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names={SEQUENCE}, check_vma=False
        )
        return mapped

    def _rows_left(self, num_tokens: Array, rows: int) -> Array:
        """How many of each device's rows are no padding: int32 [size]."""
        before = jnp.arange(self.size, dtype=jnp.int32) * (rows // self.size)
        return jnp.clip(num_tokens - before, 0, rows // self.size)

    def write_pages(
        self,
        k_pages: Pages,
        v_pages: Pages,
        k: Array,
        v: Array,
        seq_ids: Array,
        positions: Array,
        block_tables: Array,
        num_tokens: Array,
    ) -> tuple[Array, ...]:
        """As `paged_reference.write_pages`, of as many shards; the number of rows is a multiple of the ring's size."""
        stored: list[Array] = []
        new: list[Array] = []
        for pages, rows in ((k_pages, k), (v_pages, v)):
            stored += pages.parts if isinstance(pages, QuantizedPages) else [pages]
            new += pages.encode(rows) if isinstance(pages, QuantizedPages) else [rows]
        page_size = k_pages.shape[1]

        def on_each(
            stored: list[Array], shard: Array, travelling: tuple[list[Array], Array, Array, Array], tables: Array
        ) -> list[Array]:
            def visit(come: Any, here: list[Array]) -> tuple[Any, list[Array]]:
                rows, ids, places, left = come
                write = partial(
                    write_shard, seq_ids=ids, positions=places, block_tables=tables, num_tokens=left[0],
                    page_size=page_size, shards=self.size,
                )  # fmt: skip
                return come, [write(array, shard[0], own) for array, own in zip(here, rows, strict=True)]

            return pass_round(visit, travelling, stored, axis=SEQUENCE, size=self.size)[1]

        run = self._map(on_each, (_PAGES, _ROWS, _ROWS, _WHOLE), _PAGES)
        left = self._rows_left(num_tokens, k.shape[0])
        shard = jnp.arange(self.size, dtype=jnp.int32)
        return tuple(run(stored, shard, (new, seq_ids, positions, left), block_tables))

    def attend_pages(
        self,
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
    ) -> Array:
        """As `paged_reference.attend_pages`; the number of rows is a multiple of the ring's size."""
        attend = partial(attend_shard, scale=scale, causal=causal, window=window, softcap=softcap, shards=self.size)
        stored = [pages.parts if isinstance(pages, QuantizedPages) else (pages,) for pages in (k_pages, v_pages)]

        def rebuild(pages: Pages, parts: tuple[Array, ...]) -> Pages:
            if not isinstance(pages, QuantizedPages):
                return parts[0]
            num_pages, page_size, *rest = pages.shape
            return replace(pages, parts=parts, shape=(num_pages, page_size // self.size, *rest))

        def on_each(
            queries: tuple[Array, ...], stored: list[tuple[Array, ...]], shard: Array, whole: tuple[Array, ...]
        ) -> Array:
            tables, lens, *ours = whole
            keys, values = (rebuild(pages, parts) for pages, parts in zip((k_pages, v_pages), stored, strict=True))

            def visit(come: Any, here: None) -> tuple[Any, None]:
                (rows, ids, places, left), softmax = come
                seen = attend(
                    rows, keys, values, shard[0], block_tables=tables, seq_lens=lens, seq_ids=ids, positions=places,
                    num_tokens=left[0], slopes=ours[0] if ours else None,
                )  # fmt: skip
                return ((rows, ids, places, left), softmax.and_of(seen)), None

            num_rows, num_heads, _ = queries[0].shape
            num_kv_heads = keys.shape[2]
            start = Softmax.start((num_rows, num_kv_heads, num_heads // num_kv_heads), v_pages.shape[-1])
            (_, softmax), _ = pass_round(visit, (queries, start), None, axis=SEQUENCE, size=self.size)
            return softmax.finish().reshape(num_rows, num_heads, -1)

        run = self._map(on_each, (_ROWS, _PAGES, _ROWS, _WHOLE), _ROWS)
        queries = (q, seq_ids, positions, self._rows_left(num_tokens, q.shape[0]))
        whole = (block_tables, seq_lens, *([] if slopes is None else [slopes]))
        attended: Array = run(queries, stored, jnp.arange(self.size, dtype=jnp.int32), whole)
        return attended


__all__ = ["Ring"]
