"""Gives every attention a cache: keys and values are appended to it and read back from it.

    %o = llm.attention %q, %k, %v {…}
      →
    %c1, %b = llm.append_kv %c0, %k, %v, %seq_ids tokens(%positions, %table, %num_tokens) {layer = 0}
    %ks, %vs = llm.lookup_kv %c1, %table {layer = 0}
    %o = llm.attention %q, %ks, %vs tokens(%seq_ids, %positions) {…}

The caches are new arguments and results of @main, one for the layers of each shape and element type. They are
contiguous so far: a block holds a whole sequence. `blockify-kv-cache` cuts it into pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, i32
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, dtype_element_type, dtype_of, shape_of, tensor, type_of
from llmir_jax.transforms import signature


@dataclass(frozen=True)
class _Shape:
    num_kv_heads: int
    head_dim: int
    element: Attribute


def _cache_shape(op: llm.AttentionOp) -> _Shape:
    """What the cache of a layer holds: an element type that holds both exactly, the larger of the two head dims."""
    _, num_kv_heads, key_dim = shape_of(op.k)
    value_dim = shape_of(op.v)[2]
    common = np.dtype(jnp.promote_types(dtype_of(op.k), dtype_of(op.v)))
    return _Shape(num_kv_heads, max(key_dim, value_dim), dtype_element_type(common))


def _padded(build: OpBuilder, x: SSAValue, size: int) -> SSAValue:
    """`x` [.., D] with zeros up to [.., size]: they add nothing to a score and are cut from a result."""
    *rest, dim = shape_of(x)
    if dim == size:
        return x
    return build.concatenate([x, build.zeros((*rest, size - dim), type_of(x).get_element_type())], len(rest))


@dataclass(frozen=True)
class InsertKVCachePass(ModulePass):
    """Add caches for sequences of at most `max_seq_len` tokens, `max_seqs` of them."""

    name = "insert-kv-cache"

    max_seqs: int = 8
    max_seq_len: int = 4096

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        attentions = [x for x in main.body.block.ops if isinstance(x, llm.AttentionOp) and x.seq_ids is None]
        layers: dict[_Shape, list[llm.AttentionOp]] = {}
        for attention in attentions:
            layers.setdefault(_cache_shape(attention), []).append(attention)
        for group, (shape, members) in enumerate(layers.items()):
            self._insert(main, group, shape, members)

    def _insert(self, main: FuncOp, group: int, shape: _Shape, members: Sequence[llm.AttentionOp]) -> None:
        cache_type = llm.PagedKVCacheType(
            shape.element, len(members), shape.num_kv_heads, shape.head_dim, self.max_seq_len, self.max_seq_len
        )
        table = signature.add_argument(main, "block_tables", tensor((self.max_seqs, 1), i32), group=group)
        cache: SSAValue = signature.add_argument(main, "cache", cache_type, group=group)
        positions, seq_ids, num_tokens = (signature.argument(main, r) for r in ("positions", "seq_ids", "num_tokens"))
        for layer, op in enumerate(members):
            build = OpBuilder(op)
            k, v, q = (_padded(build, x, shape.head_dim) for x in (op.k, op.v, op.q))
            append = llm.AppendKVOp(
                cache, k, v, seq_ids, layer=layer, positions=positions, block_tables=table, num_tokens=num_tokens
            )
            cache = build.insert(append).results[0]
            keys, values = build.insert(llm.LookupKVOp(cache, table, layer=layer)).results
            out_shape = (*shape_of(op.output)[:2], shape.head_dim)
            attention = llm.AttentionOp(
                q,
                keys,
                values,
                result_type=tensor(out_shape, type_of(op.output).get_element_type()),
                scale=op.scale.value.data,
                causal=bool(op.causal.value.data),
                window=None if op.window is None else op.window.value.data,
                softcap=None if op.softcap is None else op.softcap.value.data,
                slopes=op.slopes,
                seq_ids=seq_ids,
                positions=positions,
                precise=op.is_precise,
            )
            attended = build.insert(attention).results[0]
            out = build.slice(attended, (0, 0, 0), shape_of(op.output))
            op.output.replace_all_uses_with(out)
            Rewriter.erase_op(op)
        signature.set_results(main, [*signature.results(main), cache])
