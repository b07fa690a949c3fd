"""Attention to looked-up keys and values reads the pages in place.

    %k, %v = llm.lookup_kv %cache, %table {layer = 0}
    %o = llm.attention %q, %k, %v tokens(%seq_ids, %positions) {…}
      →
    %o = llm.paged_attention %q, %cache, %table, %seq_lens tokens(%seq_ids, %positions, %num_tokens) {layer = 0, …}

A lookup that something else reads too stays for that reader.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass
from xdsl.pattern_rewriter import PatternRewriter, PatternRewriteWalker, RewritePattern, op_type_rewrite_pattern

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.interop import LOC
from llmir_jax.transforms import signature


@dataclass
class ReadPagesInPlace(RewritePattern):
    """One attention over one lookup."""

    seq_lens: SSAValue
    num_tokens: SSAValue

    @op_type_rewrite_pattern
    def match_and_rewrite(self, op: llm.AttentionOp, rewriter: PatternRewriter) -> None:
        lookup = op.k.owner
        if not isinstance(lookup, llm.LookupKVOp) or op.v.owner is not lookup or op.seq_ids is None:
            return
        attention = llm.PagedAttentionOp(
            op.q,
            lookup.cache,
            lookup.block_indices,
            self.seq_lens,
            result_type=op.output.type,
            scale=op.scale.value.data,
            layer=lookup.layer.value.data,
            causal=bool(op.causal.value.data),
            window=None if op.window is None else op.window.value.data,
            softcap=None if op.softcap is None else op.softcap.value.data,
            seq_ids=op.seq_ids,
            positions=op.positions,
            num_tokens=self.num_tokens,
            slopes=op.slopes,
        )
        if LOC in op.attributes:
            attention.attributes[LOC] = op.attributes[LOC]
        rewriter.replace(op, attention)
        if not any(result.uses for result in lookup.results):
            rewriter.erase(lookup)


@dataclass(frozen=True)
class PagedAttentionRewritePass(ModulePass):
    """Attention over a lookup becomes paged attention."""

    name = "paged-attention-rewrite"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main: FuncOp = main_function(op)
        pattern = ReadPagesInPlace(signature.argument(main, "seq_lens"), signature.argument(main, "num_tokens"))
        PatternRewriteWalker(pattern, apply_recursively=False).rewrite_module(op)
