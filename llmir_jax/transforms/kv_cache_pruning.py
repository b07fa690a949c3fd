"""Gives sliding-window layers a cache of their own, whose pages are freed once no later query can read them.

    %cache : layers 0 (window 128), 1 (no window)    →    %cache0 : layer 0 of window 128,  %cache1 : layer 0, no window

Each new cache has its own block table, so the page allocator can drop the pages of a window's past while layers that
read everything keep theirs. A cache whose layers all have one window, or none, is left whole; what is pruned is told to
the runtime by the argument attribute `llmir.window`.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i64
from xdsl.dialects.func import FuncOp
from xdsl.ir import BlockArgument, SSAValue
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.transforms import signature

WINDOW = "llmir.window"


def _chain(cache: SSAValue) -> list[llm.AppendKVOp]:
    """The appends to one cache, in order."""
    found: list[llm.AppendKVOp] = []
    while True:
        appends = [u.operation for u in cache.uses if isinstance(u.operation, llm.AppendKVOp)]
        if not appends:
            return found
        (op,) = appends
        assert isinstance(op, llm.AppendKVOp)
        found.append(op)
        cache = op.new_cache


def _reader(append: llm.AppendKVOp, layer: int) -> llm.PagedAttentionOp:
    (op,) = (
        u.operation
        for u in append.new_cache.uses
        if isinstance(u.operation, llm.PagedAttentionOp) and u.operation.layer.value.data == layer
    )
    assert isinstance(op, llm.PagedAttentionOp)
    return op


@dataclass(frozen=True)
class KVCachePruningPass(ModulePass):
    """Split caches by window and mark the windows."""

    name = "kv-cache-pruning"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        pairs = list(zip(*(signature.arguments(main, role) for role in ("cache", "block_tables")), strict=True))
        for cache, table in pairs:
            self._split(main, cache, table)
        for group, (cache, table) in enumerate(
            zip(*(signature.arguments(main, role) for role in ("cache", "block_tables")), strict=True)
        ):
            attributes = signature.argument_attributes(main)
            for arg in (cache, table):
                attributes[arg.index][signature.GROUP] = IntegerAttr(group, i64)
            signature.store(main, attributes)

    def _split(self, main: FuncOp, cache: BlockArgument, table: BlockArgument) -> None:
        chain = _chain(cache)
        if not chain:
            return
        kind = cache.type
        assert isinstance(kind, llm.PagedKVCacheType)
        by_window: dict[int | None, list[tuple[llm.AppendKVOp, llm.PagedAttentionOp]]] = {}
        for append in chain:
            reader = _reader(append, append.layer.value.data)
            window = None if reader.window is None else reader.window.value.data
            by_window.setdefault(window, []).append((append, reader))
        final = chain[-1].new_cache
        outputs = []
        for number, (window, members) in enumerate(by_window.items()):
            if number == 0:
                new_cache, new_table = cache, table
            else:
                new_table = signature.add_argument(main, "block_tables", table.type)
                new_cache = signature.add_argument(main, "cache", cache.type)
            outputs.append(self._rebuild(new_cache, new_table, kind, members))
            if window is not None:
                attributes = signature.argument_attributes(main)
                attributes[new_cache.index][WINDOW] = IntegerAttr(window, i64)
                signature.store(main, attributes)
        returned = signature.results(main)
        place = next(i for i, x in enumerate(returned) if x is final or x in outputs)
        signature.set_results(main, [*returned[:place], outputs[0], *returned[place + 1 :], *outputs[1:]])

    def _rebuild(
        self,
        cache: BlockArgument,
        table: BlockArgument,
        kind: llm.PagedKVCacheType,
        members: list[tuple[llm.AppendKVOp, llm.PagedAttentionOp]],
    ) -> SSAValue:
        new_type = llm.PagedKVCacheType(
            kind.element_type, len(members), kind.num_kv_heads, kind.head_dim, kind.block_size, kind.max_seq_len
        )
        signature.retype(cache, new_type)
        current: SSAValue = cache
        for layer, (append, reader) in enumerate(members):
            append.operands[0] = current
            append.operands[5] = table
            append.properties["layer"] = IntegerAttr(layer, i64)
            signature.retype(append.new_cache, new_type)
            reader.operands[1] = append.new_cache
            reader.operands[2] = table
            reader.properties["layer"] = IntegerAttr(layer, i64)
            current = append.new_cache
        return current
