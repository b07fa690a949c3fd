"""The ``llm`` dialect: what a served language model is made of. Its parsed and printed forms are an interface."""

from xdsl.ir import Dialect

from .attention import AttendPagesOp, AttentionOp, WritePagesOp
from .cache import AppendKVOp, LookupKVOp, PagedAttentionOp
from .distributed import (
    AllGatherOp,
    AllReduceOp,
    CostAnnotationOp,
    DistributedAttentionOp,
    PipelineRecvOp,
    PipelineSendOp,
    PipelineStageOp,
    ReduceScatterOp,
    SequenceParallelAttentionOp,
    ShardedLinearOp,
)
from .layers import ACTIVATIONS, GatedMLPOp, LayerNormOp, LinearOp, RMSNormOp, RopeOp
from .quantization import DequantizeOp, QuantizedMatmulOp, QuantizeOp, storage_range
from .types import (
    CompositeType,
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
        AllGatherOp,
        AllReduceOp,
        AppendKVOp,
        AttendPagesOp,
        AttentionOp,
        CostAnnotationOp,
        DequantizeOp,
        DistributedAttentionOp,
        GatedMLPOp,
        LayerNormOp,
        LinearOp,
        LookupKVOp,
        PagedAttentionOp,
        PipelineRecvOp,
        PipelineSendOp,
        PipelineStageOp,
        QuantizeOp,
        QuantizedMatmulOp,
        RMSNormOp,
        ReduceScatterOp,
        RopeOp,
        SequenceParallelAttentionOp,
        ShardedLinearOp,
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
    "AllGatherOp",
    "AllReduceOp",
    "AppendKVOp",
    "AttendPagesOp",
    "AttentionOp",
    "CompositeType",
    "CostAnnotationOp",
    "DequantizeOp",
    "DistributedAttentionOp",
    "GatedMLPOp",
    "LayerNormOp",
    "LinearOp",
    "LookupKVOp",
    "MixedQuantizedTensorType",
    "MixedType",
    "PagedAttentionOp",
    "PagedKVCacheType",
    "PipelineRecvOp",
    "PipelineSendOp",
    "PipelineStageOp",
    "QuantizeOp",
    "QuantizedMatmulOp",
    "QuantizedTensorType",
    "RMSNormOp",
    "ReduceScatterOp",
    "RopeOp",
    "SequenceParallelAttentionOp",
    "ShardedKVCacheType",
    "ShardedLinearOp",
    "ShardedTensorType",
    "WritePagesOp",
    "storage_range",
]
