"""The ``llm`` dialect: what a served language model is made of. Its parsed and printed forms are an interface."""

from xdsl.ir import Dialect

from .attention import AttendPagesOp, AttentionOp, WritePagesOp
from .cache import AppendKVOp, LookupKVOp, PagedAttentionOp
from .layers import ACTIVATIONS, GatedMLPOp, LayerNormOp, LinearOp, RMSNormOp, RopeOp
from .types import (
    MixedQuantizedTensorType,
    MixedType,
    PagedKVCacheType,
    QuantizedTensorType,
    ShardedKVCacheType,
    ShardedTensorType,
)

LLM = Dialect(
    "llm",
    [
        AppendKVOp,
        AttendPagesOp,
        AttentionOp,
        GatedMLPOp,
        LayerNormOp,
        LinearOp,
        LookupKVOp,
        PagedAttentionOp,
        RMSNormOp,
        RopeOp,
        WritePagesOp,
    ],
    [
        MixedQuantizedTensorType,
        MixedType,
        PagedKVCacheType,
        QuantizedTensorType,
        ShardedKVCacheType,
        ShardedTensorType,
    ],
)

__all__ = [
    "ACTIVATIONS",
    "LLM",
    "AppendKVOp",
    "AttendPagesOp",
    "AttentionOp",
    "GatedMLPOp",
    "LayerNormOp",
    "LinearOp",
    "LookupKVOp",
    "MixedQuantizedTensorType",
    "MixedType",
    "PagedAttentionOp",
    "PagedKVCacheType",
    "QuantizedTensorType",
    "RMSNormOp",
    "RopeOp",
    "ShardedKVCacheType",
    "ShardedTensorType",
    "WritePagesOp",
]
