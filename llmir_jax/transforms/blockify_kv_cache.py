"""Cuts contiguous KV caches into pages of `page_size` tokens.

    %cache : !llm.paged_kv_cache<f32, 30, 3, 64, 8192, 8192>    →    !llm.paged_kv_cache<f32, 30, 3, 64, 16, 8192>
    %block_tables : tensor<8x1xi32>                             →    tensor<8x512xi32>

A contiguous cache is one whose block holds a whole sequence. Caches in pages already are left alone. The maximum length
is rounded up to whole pages.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i32
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of, tensor
from llmir_jax.errors import InvalidIRError
from llmir_jax.transforms import signature


@dataclass(frozen=True)
class BlockifyKVCachePass(ModulePass):
    """Contiguous caches become paged ones."""

    name = "blockify-kv-cache"

    page_size: int = 16

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.page_size < 1:
            raise InvalidIRError(f"blockify-kv-cache: page_size must be at least 1 token, got {self.page_size}")
        main = main_function(op)
        caches, tables = (signature.arguments(main, role) for role in ("cache", "block_tables"))
        for cache, table in zip(caches, tables, strict=True):
            kind = cache.type
            assert isinstance(kind, llm.PagedKVCacheType)
            if kind.block_size != kind.max_seq_len:
                continue
            pages = -(-kind.max_seq_len.data // self.page_size)
            paged = llm.PagedKVCacheType(
                kind.element_type,
                kind.num_layers,
                kind.num_kv_heads,
                kind.head_dim,
                self.page_size,
                pages * self.page_size,
            )
            signature.retype(table, tensor((shape_of(table)[0], pages), i32))
            self._retype_chain(cache, paged)
        signature.sync(main)

    def _retype_chain(self, cache: SSAValue, paged: llm.PagedKVCacheType) -> None:
        signature.retype(cache, paged)
        for use in list(cache.uses):
            user = use.operation
            if isinstance(user, llm.AppendKVOp):
                user.properties["block_size"] = IntegerAttr(paged.block_size.data, i32)
                user.properties["max_seq_len"] = IntegerAttr(paged.max_seq_len.data, i32)
                self._retype_chain(user.new_cache, paged)
            if isinstance(user, llm.LookupKVOp):
                for result in user.results:
                    seqs, _, heads, dim = shape_of(result)
                    signature.retype(result, tensor((seqs, paged.max_seq_len.data, heads, dim), paged.element_type))
