"""The KV cache as one value: appending to it, looking it up, and attention over it."""

from typing import ClassVar

from xdsl.dialects.builtin import BoolAttr, FloatAttr, IntegerAttr, TensorType, i32, i64
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from .attention import TRUE, check_heads, check_mask_properties, mask_properties
from .common import (
    LLMOp,
    check_float,
    check_int32,
    check_range,
    check_same_type,
    check_shapes,
    fail,
    int_of,
    maybe,
    optional_i32,
    tensor_of,
)
from .types import PagedKVCacheType

LAYER_0 = IntegerAttr(0, i64)


def _cache_type(cache: SSAValue) -> PagedKVCacheType:
    assert isinstance(cache.type, PagedKVCacheType)
    return cache.type


def _check_layer(cache: PagedKVCacheType, layer: Attribute) -> None:
    check_range("layer", layer, 0, cache.num_layers.data)


def _check_agrees(subject: str, attr: Attribute | None, cache_size: int) -> None:
    if attr is not None and int_of(attr) != cache_size:
        fail(subject, f"{cache_size}, as the type of the cache says", int_of(attr))


def _check_all_or_none(group: str, *values: SSAValue | None) -> None:
    num_present = sum(value is not None for value in values)
    if num_present not in (0, len(values)):
        raise VerifyException(f"{group}: expected all {len(values)} operands or none, got {num_present}")


@irdl_op_definition
class AppendKVOp(LLMOp):
    """The cache with new keys and values of one layer, and the block that each of them went to.

    ```mlir
    %c1, %blocks = llm.append_kv %c0, %k, %v, %seq_ids {block_size = 16 : i32, max_seq_len = 4096 : i32}
                     : (!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<7x16x64xf16>, tensor<7x16x64xf16>,
                        tensor<7xi32>) -> (!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<7xi32>)
    %c1, %blocks = llm.append_kv %c0, %k, %v, %seq_ids tokens(%positions, %block_tables, %num_tokens) {layer = 3 : i64}
                     : (…, tensor<7xi32>, tensor<4x256xi32>, tensor<i32>) -> (…, tensor<7xi32>)
    ```

    k and v are [T, KV heads, head dim], converted to the cache's element type; row t belongs to sequence
    ``seq_ids[t]``. With ``tokens`` it is at ``positions[t]`` and goes to block
    ``block_tables[seq_ids[t], positions[t] // block_size]``; rows from ``num_tokens`` on write nothing. Without
    ``tokens`` the rows are appended in order to empty sequences, and sequence s owns the blocks s·P to (s+1)·P − 1,
    P = max_seq_len / block_size rounded up. ``block_size`` and ``max_seq_len``, where given, repeat the cache's type.
    The pass ``kv-cache-allocation`` lowers it.
    """

    name = "llm.append_kv"
    OPERAND_GROUPS: ClassVar = {"tokens": ("positions", "block_tables", "num_tokens")}

    cache = operand_def(PagedKVCacheType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    seq_ids = operand_def(TensorType)
    positions = opt_operand_def(TensorType)
    block_tables = opt_operand_def(TensorType)
    num_tokens = opt_operand_def(TensorType)

    layer = prop_def(IntegerAttr, default_value=LAYER_0)
    block_size = opt_prop_def(IntegerAttr)
    max_seq_len = opt_prop_def(IntegerAttr)

    new_cache = result_def(PagedKVCacheType)
    block_indices = result_def(TensorType)

    traits = traits_def(Pure())
    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        cache: SSAValue,
        k: SSAValue | Operation,
        v: SSAValue | Operation,
        seq_ids: SSAValue,
        *,
        layer: int = 0,
        positions: SSAValue | Operation | None = None,
        block_tables: SSAValue | Operation | None = None,
        num_tokens: SSAValue | Operation | None = None,
    ) -> None:
        cache_type = _cache_type(cache)
        super().__init__(
            operands=[
                cache,
                k,
                v,
                seq_ids,
                maybe(positions),
                maybe(block_tables),
                maybe(num_tokens),
            ],
            result_types=[cache_type, seq_ids.type],
            properties={
                "layer": IntegerAttr(layer, i64),
                "block_size": optional_i32(cache_type.block_size.data),
                "max_seq_len": optional_i32(cache_type.max_seq_len.data),
            },
        )

    def check(self) -> None:
        cache = _cache_type(self.cache)
        _check_layer(cache, self.layer)
        _check_agrees("block_size", self.block_size, cache.block_size.data)
        _check_agrees("max_seq_len", self.max_seq_len, cache.max_seq_len.data)
        _check_all_or_none("tokens", self.positions, self.block_tables, self.num_tokens)
        check_float(k=self.k, v=self.v)
        check_int32(
            seq_ids=self.seq_ids,
            positions=self.positions,
            block_tables=self.block_tables,
            num_tokens=self.num_tokens,
            block_indices=self.block_indices,
        )
        kv_dims = ("T", cache.num_kv_heads.data, cache.head_dim.data)
        check_shapes(
            {
                "k": (self.k, kv_dims),
                "v": (self.v, kv_dims),
                "seq_ids": (self.seq_ids, ("T",)),
                "positions": (self.positions, ("T",)),
                "block_tables": (self.block_tables, ("S", cache.blocks_per_seq)),
                "num_tokens": (self.num_tokens, ()),
                "block_indices": (self.block_indices, ("T",)),
            }
        )
        check_same_type("first result", self.new_cache, "cache", self.cache)


@irdl_op_definition
class LookupKVOp(LLMOp):
    """The keys and values of one layer, gathered from the blocks of each sequence into contiguous tensors.

    ```mlir
    %k, %v = llm.lookup_kv %cache, %block_indices {layer = 3 : i64}
               : (!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<4x256xi32>)
               -> (tensor<4x4096x16x64xf16>, tensor<4x4096x16x64xf16>)
    ```

    ``block_indices`` is [S, P], the block table of S sequences; the results are [S, max_seq_len, KV heads, head dim] in
    the cache's element type. The pass ``kv-cache-allocation`` lowers it.
    """

    name = "llm.lookup_kv"

    cache = operand_def(PagedKVCacheType)
    block_indices = operand_def(TensorType)

    layer = prop_def(IntegerAttr, default_value=LAYER_0)

    k = result_def(TensorType)
    v = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, cache: SSAValue, block_indices: SSAValue, *, layer: int = 0) -> None:
        cache_type = _cache_type(cache)
        num_seqs = tensor_of(block_indices, "block_indices").get_shape()[0]
        shape = (num_seqs, cache_type.max_seq_len.data, cache_type.num_kv_heads.data, cache_type.head_dim.data)
        gathered = TensorType(cache_type.element_type, shape)
        super().__init__(
            operands=[cache, block_indices],
            result_types=[gathered, gathered],
            properties={"layer": IntegerAttr(layer, i64)},
        )

    def check(self) -> None:
        cache = _cache_type(self.cache)
        _check_layer(cache, self.layer)
        check_int32(block_indices=self.block_indices)
        gathered = ("S", cache.max_seq_len.data, cache.num_kv_heads.data, cache.head_dim.data)
        check_shapes(
            {
                "block_indices": (self.block_indices, ("S", cache.blocks_per_seq)),
                "first result": (self.k, gathered),
                "second result": (self.v, gathered),
            }
        )
        for subject, value in (("first result", self.k), ("second result", self.v)):
            if tensor_of(value, subject).element_type != cache.element_type:
                fail(subject, f"elements of the cache's type {cache.element_type}", value.type)


@irdl_op_definition
class PagedAttentionOp(LLMOp):
    """Attention of tokens to the cached keys and values of their sequences, in one layer.

    ```mlir
    %o = llm.paged_attention %q, %cache, %block_indices, %seq_lens
           {num_heads = 16 : i32, head_dim = 64 : i32, scale = 0.125 : f32}
           : (tensor<4x16x64xf16>, !llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>, tensor<4x256xi32>, tensor<4xi32>)
           -> tensor<4x16x64xf16>
    %o = llm.paged_attention %q, %cache, %block_indices, %seq_lens tokens(%seq_ids, %positions, %num_tokens) slopes(%s)
           {layer = 3 : i64, scale = 0.125 : f32, window = 128 : i64} : (…) -> tensor<7x16x64xf16>
    ```

    ``block_indices`` is [S, P], the block table of S sequences, and ``seq_lens`` [S] their lengths with the step's
    tokens. With ``tokens``, q is [T, H, head dim] and query t is at ``positions[t]`` of sequence ``seq_ids[t]``; rows
    from ``num_tokens`` on are padding. Without, q is [S, H, head dim]: one query a sequence, at its last position. What
    is visible to a query, and its score, are as in `AttentionOp`. ``num_heads`` (query heads) and ``head_dim``, where
    given, repeat the shape of q. The pass ``kv-cache-allocation`` lowers it.
    """

    name = "llm.paged_attention"
    OPERAND_GROUPS: ClassVar = {"tokens": ("seq_ids", "positions", "num_tokens"), "slopes": ("slopes",)}

    q = operand_def(TensorType)
    cache = operand_def(PagedKVCacheType)
    block_indices = operand_def(TensorType)
    seq_lens = operand_def(TensorType)
    seq_ids = opt_operand_def(TensorType)
    positions = opt_operand_def(TensorType)
    num_tokens = opt_operand_def(TensorType)
    slopes = opt_operand_def(TensorType)

    layer = prop_def(IntegerAttr, default_value=LAYER_0)
    num_heads = opt_prop_def(IntegerAttr)
    head_dim = opt_prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)
    causal = prop_def(BoolAttr, default_value=TRUE)
    window = opt_prop_def(IntegerAttr)
    softcap = opt_prop_def(FloatAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())
    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        q: SSAValue,
        cache: SSAValue,
        block_indices: SSAValue | Operation,
        seq_lens: SSAValue | Operation,
        *,
        result_type: Attribute,
        scale: float,
        layer: int = 0,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        seq_ids: SSAValue | Operation | None = None,
        positions: SSAValue | Operation | None = None,
        num_tokens: SSAValue | Operation | None = None,
        slopes: SSAValue | Operation | None = None,
    ) -> None:
        _, num_heads, head_dim = tensor_of(q, "q").get_shape()
        super().__init__(
            operands=[
                q,
                cache,
                block_indices,
                seq_lens,
                maybe(seq_ids),
                maybe(positions),
                maybe(num_tokens),
                maybe(slopes),
            ],
            result_types=[result_type],
            properties={
                "layer": IntegerAttr(layer, i64),
                "num_heads": IntegerAttr(num_heads, i32),
                "head_dim": IntegerAttr(head_dim, i32),
                **mask_properties(scale=scale, causal=causal, window=window, softcap=softcap),
            },
        )

    def check(self) -> None:
        cache = _cache_type(self.cache)
        _check_layer(cache, self.layer)
        check_mask_properties(self.scale, self.window, self.softcap)
        _check_all_or_none("tokens", self.seq_ids, self.positions, self.num_tokens)
        check_float(q=self.q, slopes=self.slopes, output=self.output)
        check_int32(
            block_indices=self.block_indices,
            seq_lens=self.seq_lens,
            seq_ids=self.seq_ids,
            positions=self.positions,
            num_tokens=self.num_tokens,
        )
        rows = "S" if self.seq_ids is None else "T"
        sizes = check_shapes(
            {
                "q": (self.q, (rows, "H", cache.head_dim.data)),
                "block_indices": (self.block_indices, ("S", cache.blocks_per_seq)),
                "seq_lens": (self.seq_lens, ("S",)),
                "seq_ids": (self.seq_ids, ("T",)),
                "positions": (self.positions, ("T",)),
                "num_tokens": (self.num_tokens, ()),
                "slopes": (self.slopes, ("H",)),
                "output": (self.output, (rows, "H", cache.head_dim.data)),
            }
        )
        check_heads(sizes["H"], cache.num_kv_heads.data)
        if self.num_heads is not None and sizes["H"] >= 0 and int_of(self.num_heads) != sizes["H"]:
            fail("num_heads", f"{sizes['H']}, the query heads of q", int_of(self.num_heads))
        _check_agrees("head_dim", self.head_dim, cache.head_dim.data)
