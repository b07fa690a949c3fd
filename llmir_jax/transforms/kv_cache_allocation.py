"""Sizes the KV cache and lays it out: each layer's keys and values become an array of pages, updated in place.

    %cache : !llm.paged_kv_cache<f32, 2, 3, 64, 16, 8192>
      →  %k0, %v0, %k1, %v1 : tensor<512x16x3x64xf32>         (num_pages = 512)
    llm.append_kv %cache …      →  llm.write_pages %k0, %v0 …
    llm.paged_attention …       →  llm.attend_pages …
    llm.lookup_kv …             →  a gather of pages

An argument array of pages carries `llmir.result = i`: result i of @main is its new content, and the caller donates it,
so that XLA writes in place (one array a layer keeps every update's only reader next to it; with one array for all
layers XLA has to copy). `num_pages = 0` gives every sequence of the block table its maximum length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i32, i64
from xdsl.dialects.func import FuncOp
from xdsl.ir import BlockArgument, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import AnyTensor, OpBuilder, dtype_of, shape_of, tensor, type_of
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import LOC, lower_to_module
from llmir_jax.transforms import signature
from llmir_jax.transforms.kv_cache_pruning import WINDOW

LAYER = "llmir.layer"
RESULT = "llmir.result"

Pages = list[tuple[SSAValue, SSAValue]]
"""Keys and values of each layer."""


def _emit_jax(build: OpBuilder, fn: Callable[..., Any], *operands: SSAValue) -> list[SSAValue]:
    """Emit what `fn` computes of `operands`."""
    shapes = [jax.ShapeDtypeStruct(shape_of(x), dtype_of(x)) for x in operands]
    block = main_function(lower_to_module(fn, *shapes)).body.block
    mapping: dict[SSAValue, SSAValue] = dict(zip(block.args, operands, strict=True))
    ops = list(block.ops)
    for op in ops[:-1]:
        build.insert(op.clone(mapping))
    return [mapping[x] for x in ops[-1].operands]


@dataclass(frozen=True)
class _TokenInputs:
    seq_ids: SSAValue
    positions: SSAValue
    block_tables: SSAValue
    num_tokens: SSAValue


def _append_inputs(build: OpBuilder, op: llm.AppendKVOp, kind: llm.PagedKVCacheType, num_seqs: int) -> _TokenInputs:
    if op.positions is not None and op.block_tables is not None and op.num_tokens is not None:
        return _TokenInputs(op.seq_ids, op.positions, op.block_tables, op.num_tokens)
    pages = kind.blocks_per_seq

    def appended_in_order(seq_ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        same = seq_ids[:, None] == seq_ids[None, :]
        positions = jnp.tril(same, -1).sum(1).astype(jnp.int32)
        tables = jnp.arange(num_seqs * pages, dtype=jnp.int32).reshape(num_seqs, pages)
        return positions, tables, jnp.int32(seq_ids.shape[0])

    positions, tables, num_tokens = _emit_jax(build, appended_in_order, op.seq_ids)
    return _TokenInputs(op.seq_ids, positions, tables, num_tokens)


@dataclass(frozen=True)
class KVCacheAllocationPass(ModulePass):
    """Caches become arrays of `num_pages` pages a layer."""

    name = "kv-cache-allocation"

    num_pages: int = 0

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.num_pages < 0:
            raise InvalidIRError(f"kv-cache-allocation: num_pages must be at least 0, got {self.num_pages}")
        main = main_function(op)
        pages: dict[SSAValue, Pages] = {}
        caches = [a for a in main.body.block.args if isinstance(a.type, llm.PagedKVCacheType)]
        for cache in caches:
            pages[cache] = self._add_arrays(main, cache)
        for inner in list(main.body.block.ops):
            self._rewrite(inner, pages)
        results: list[SSAValue] = []
        place: dict[SSAValue, int] = {}
        for value in signature.results(main):
            if value in pages:
                for i, array in enumerate(x for pair in pages[value] for x in pair):
                    place[array] = len(results) + i
                results += [x for pair in pages[value] for x in pair]
            else:
                results.append(value)
        signature.set_results(main, results)
        self._mark_results(main, caches, pages, place)
        for inner in reversed(list(main.body.block.ops)):
            if isinstance(inner, llm.AppendKVOp | llm.LookupKVOp | llm.PagedAttentionOp):
                Rewriter.erase_op(inner)
        for cache in caches:
            signature.remove_argument(main, cache)

    def _add_arrays(self, main: FuncOp, cache: BlockArgument) -> Pages:
        kind = cache.type
        assert isinstance(kind, llm.PagedKVCacheType)
        num_pages = self.num_pages or kind.blocks_per_seq * self._num_seqs(cache)
        array: AnyTensor = tensor(
            (num_pages, kind.block_size.data, kind.num_kv_heads.data, kind.head_dim.data), kind.element_type
        )
        inherited = {
            k: v for k, v in signature.argument_attributes(main)[cache.index].items() if k in (signature.GROUP, WINDOW)
        }
        made = []
        for layer in range(kind.num_layers.data):
            pair = []
            for role in ("k_pages", "v_pages"):
                arg = signature.add_argument(main, role, array, index=cache.index)
                attributes = signature.argument_attributes(main)
                attributes[arg.index] |= {**inherited, LAYER: IntegerAttr(layer, i64)}
                signature.store(main, attributes)
                pair.append(arg)
            made.append((pair[0], pair[1]))
        return [(k, v) for k, v in made]

    @staticmethod
    def _num_seqs(cache: SSAValue) -> int:
        """How many sequences the cache serves, from the block tables that its users read."""
        seen = [cache]
        while seen:
            value = seen.pop()
            for use in value.uses:
                op = use.operation
                if isinstance(op, llm.LookupKVOp | llm.PagedAttentionOp):
                    return shape_of(op.block_indices)[0]
                if isinstance(op, llm.AppendKVOp):
                    if op.block_tables is not None:
                        return shape_of(op.block_tables)[0]
                    seen.append(op.new_cache)
        raise InvalidIRError(
            "kv-cache-allocation: nothing tells how many sequences a cache serves (no block table reads or writes it); "
            "give num_pages"
        )

    def _rewrite(self, op: Operation, pages: dict[SSAValue, Pages]) -> None:
        build = OpBuilder(op)
        if isinstance(op, llm.AppendKVOp):
            arrays = list(pages[op.cache])
            kind = op.cache.type
            assert isinstance(kind, llm.PagedKVCacheType)
            layer = op.layer.value.data
            k_pages, v_pages = arrays[layer]
            num_seqs = max(1, shape_of(k_pages)[0] // kind.blocks_per_seq)
            inputs = _append_inputs(build, op, kind, num_seqs)
            write = llm.WritePagesOp(
                k_pages,
                v_pages,
                op.k,
                op.v,
                seq_ids=inputs.seq_ids,
                positions=inputs.positions,
                block_tables=inputs.block_tables,
                num_tokens=inputs.num_tokens,
            )
            new_k, new_v = build.insert(write).results
            arrays[layer] = (new_k, new_v)
            pages[op.new_cache] = arrays
            if op.block_indices.uses:
                size = kind.block_size.data
                (blocks,) = _emit_jax(
                    build, lambda t, s, p: t[s, p // size], inputs.block_tables, inputs.seq_ids, inputs.positions
                )
                op.block_indices.replace_all_uses_with(blocks)
        elif isinstance(op, llm.LookupKVOp):
            for array, result in zip(pages[op.cache][op.layer.value.data], op.results, strict=True):
                seqs, length, heads, dim = shape_of(result)
                (gathered,) = _emit_jax(build, lambda a, t: a[t], array, op.block_indices)
                shaped = build.reshape(gathered, (seqs, shape_of(gathered)[1] * shape_of(gathered)[2], heads, dim))
                result.replace_all_uses_with(build.slice(shaped, (0, 0, 0, 0), (seqs, length, heads, dim)))
        elif isinstance(op, llm.PagedAttentionOp):
            self._rewrite_attention(build, op, pages[op.cache][op.layer.value.data])

    @staticmethod
    def _rewrite_attention(build: OpBuilder, op: llm.PagedAttentionOp, arrays: tuple[SSAValue, SSAValue]) -> None:
        seq_ids, positions, num_tokens = op.seq_ids, op.positions, op.num_tokens
        if seq_ids is None or positions is None or num_tokens is None:
            seq_ids, positions, num_tokens = _emit_jax(
                build,
                lambda n: (jnp.arange(n.shape[0], dtype=jnp.int32), n - 1, jnp.int32(n.shape[0])),
                op.seq_lens,
            )
        attend = llm.AttendPagesOp(
            op.q,
            *arrays,
            block_tables=op.block_indices,
            seq_lens=op.seq_lens,
            seq_ids=seq_ids,
            positions=positions,
            num_tokens=num_tokens,
            result_type=op.output.type,
            scale=op.scale.value.data,
            causal=bool(op.causal.value.data),
            window=None if op.window is None else op.window.value.data,
            softcap=None if op.softcap is None else op.softcap.value.data,
            slopes=op.slopes,
        )
        if LOC in op.attributes:
            attend.attributes[LOC] = op.attributes[LOC]
        op.output.replace_all_uses_with(build.insert(attend).results[0])

    @staticmethod
    def _mark_results(
        main: FuncOp, caches: list[BlockArgument], pages: dict[SSAValue, Pages], place: dict[SSAValue, int]
    ) -> None:
        attributes = signature.argument_attributes(main)
        newest: dict[SSAValue, SSAValue] = {}
        for cache in caches:
            value: SSAValue = cache
            while appends := [u.operation for u in value.uses if isinstance(u.operation, llm.AppendKVOp)]:
                append = appends[0]
                assert isinstance(append, llm.AppendKVOp)
                value = append.new_cache
            old = [x for pair in pages[cache] for x in pair]
            new = [x for pair in pages[value] for x in pair]
            newest.update(zip(old, new, strict=True))
        for old_array, new_array in newest.items():
            if new_array in place:
                assert isinstance(old_array, BlockArgument)
                attributes[old_array.index][RESULT] = IntegerAttr(place[new_array], i64)
        signature.store(main, attributes)


__all__ = ["LAYER", "RESULT", "KVCacheAllocationPass", "i32", "type_of"]
