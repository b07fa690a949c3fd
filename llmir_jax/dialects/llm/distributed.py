"""Tensor, pipeline and sequence parallelism: shards, collectives, stages, attention over devices; and what ops cost.

Devices are numbered from 0; a collective's groups are runs of ``group_size`` neighbours, [0, g), [g, 2g), …
"""

from typing import ClassVar

from xdsl.dialects.builtin import BoolAttr, FloatAttr, IntegerAttr, StringAttr, TensorType, i32, i64
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    AnyAttr,
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

from .attention import TRUE, check_heads, check_mask_properties
from .cache import LAYER_0
from .common import (
    Dim,
    LLMOp,
    check_float,
    check_int32,
    check_one_of,
    check_range,
    check_same_type,
    check_shapes,
    dims_agree,
    fail,
    format_dims,
    int_of,
    maybe,
    optional_f32,
    optional_i64,
    tensor_of,
)
from .types import ShardedKVCacheType, ShardedTensorType

REDUCTIONS = ("sum", "max", "min")
SCHEDULES = ("1f1b", "gpipe")
SUM = StringAttr("sum")


def _check_resized(x: SSAValue, output: SSAValue, dim: Attribute, *, multiply: int = 1, divide: int = 1) -> None:
    """Check that the result is x with one dimension multiplied or divided by the size of a group."""
    x_type = tensor_of(x, "x")
    check_range("dim", dim, 0, len(x_type.get_shape()))
    shape = list(x_type.get_shape())
    if shape[int_of(dim)] >= 0:
        if shape[int_of(dim)] % divide:
            fail("group_size", f"a divisor of dimension {int_of(dim)} of x, {shape[int_of(dim)]}", divide)
        shape[int_of(dim)] = shape[int_of(dim)] * multiply // divide
    output_type = tensor_of(output, "result")
    if not dims_agree(shape, output_type.get_shape()):
        fail("result", f"shape {format_dims(shape)}", format_dims(output_type.get_shape()))
    if output_type.element_type != x_type.element_type:
        fail("result", f"the elements of x, {x_type.element_type}", output_type.element_type)


@irdl_op_definition
class ShardedLinearOp(LLMOp):
    """One device's share of a linear layer whose weight is split along a dimension.

    ```mlir
    %y = llm.sharded_linear(%x, %w, %b) {shard_dim = 1 : i32, num_shards = 8 : i32, shard_id = 2 : i32}
           : (tensor<16x1024xf16>, tensor<1024x4096xf16>, tensor<4096xf16>) -> tensor<16x512xf16>
    %y = llm.sharded_linear(%x, %w) {shard_dim = 0 : i32, num_shards = 8 : i32, shard_id = 2 : i32}
           : (tensor<16x512xf16>, !llm.sharded_tensor<tensor<4096x1024xf16>, 0, 8, 2>) -> tensor<16x1024xf16>
    ```

    w is the whole weight [K, N], of which the op takes its shard, or the shard itself as a sharded tensor. b is [N].

    - ``shard_dim = 1``: x is [..., K], the result this shard's columns of x·w + b, [..., N / num_shards]; an
      `AllGatherOp` completes it.
    - ``shard_dim = 0``: x is this shard's columns [..., K / num_shards], the result its term of the sum, [..., N]; an
      `AllReduceOp` completes it. Only shard 0 adds b.
    """

    name = "llm.sharded_linear"
    PARENTHESIZED: ClassVar = True

    x = operand_def(TensorType)
    w = operand_def(TensorType | ShardedTensorType)
    b = opt_operand_def(TensorType)

    shard_dim = prop_def(IntegerAttr)
    num_shards = prop_def(IntegerAttr)
    shard_id = prop_def(IntegerAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        x: SSAValue | Operation,
        w: SSAValue | Operation,
        b: SSAValue | Operation | None = None,
        *,
        result_type: Attribute,
        shard_dim: int,
        num_shards: int,
        shard_id: int,
    ) -> None:
        super().__init__(
            operands=[x, w, maybe(b)],
            result_types=[result_type],
            properties={
                "shard_dim": IntegerAttr(shard_dim, i32),
                "num_shards": IntegerAttr(num_shards, i32),
                "shard_id": IntegerAttr(shard_id, i32),
            },
        )

    def check(self) -> None:
        check_float(x=self.x, b=self.b, result=self.output)
        check_range("shard_dim", self.shard_dim, 0, 2)
        check_range("num_shards", self.num_shards, 1)
        num_shards = int_of(self.num_shards)
        check_range("shard_id", self.shard_id, 0, num_shards)
        w_type = self.w.type
        if isinstance(w_type, ShardedTensorType):
            shard = (w_type.dim.data, w_type.num_shards.data, w_type.shard_id.data)
            stated = (int_of(self.shard_dim), num_shards, int_of(self.shard_id))
            if shard != stated:
                fail("w", f"shard_dim, num_shards and shard_id {stated}, as the op says", shard)
            w_type = w_type.original
        assert isinstance(w_type, TensorType)
        w_shape = w_type.get_shape()
        if len(w_shape) != 2 or min(w_shape) < 0:
            fail("w", "a matrix [K, N] of static shape", format_dims(w_shape))
        split = w_shape[int_of(self.shard_dim)]
        if split % num_shards:
            fail("num_shards", f"a divisor of dimension {int_of(self.shard_dim)} of w, {split}", num_shards)
        k, n = w_shape
        is_column = int_of(self.shard_dim) == 1
        check_shapes(
            {
                "x": (self.x, ("...", k if is_column else k // num_shards)),
                "b": (self.b, (n,)),
                "result": (self.output, ("...", n // num_shards if is_column else n)),
            }
        )


@irdl_op_definition
class AllGatherOp(LLMOp):
    """The values of all devices of a group, put together along a dimension, on each of them.

    ```mlir
    %y = llm.all_gather(%x) {dim = 1 : i32, group_size = 8 : i32} : (tensor<16x128xf16>) -> tensor<16x1024xf16>
    ```
    """

    name = "llm.all_gather"
    PARENTHESIZED: ClassVar = True

    x = operand_def(TensorType)

    dim = prop_def(IntegerAttr)
    group_size = prop_def(IntegerAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, *, dim: int, group_size: int) -> None:
        x_type = tensor_of(x, "x")
        shape = list(x_type.get_shape())
        shape[dim] *= group_size
        super().__init__(
            operands=[x],
            result_types=[TensorType(x_type.element_type, shape)],
            properties={"dim": IntegerAttr(dim, i32), "group_size": IntegerAttr(group_size, i32)},
        )

    def check(self) -> None:
        check_range("group_size", self.group_size, 1)
        _check_resized(self.x, self.output, self.dim, multiply=int_of(self.group_size))


@irdl_op_definition
class AllReduceOp(LLMOp):
    """The sum (or ``max``, ``min``) over the devices of a group, on each of them.

    ```mlir
    %y = llm.all_reduce(%x) {reduction = "sum", group_size = 8 : i32} : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
    ```
    """

    name = "llm.all_reduce"
    PARENTHESIZED: ClassVar = True

    x = operand_def(TensorType)

    reduction = prop_def(StringAttr)
    group_size = prop_def(IntegerAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, *, reduction: str, group_size: int) -> None:
        super().__init__(
            operands=[x],
            result_types=[x.type],
            properties={"reduction": StringAttr(reduction), "group_size": IntegerAttr(group_size, i32)},
        )

    def check(self) -> None:
        check_range("group_size", self.group_size, 1)
        check_one_of("reduction", self.reduction, REDUCTIONS)
        check_same_type("result", self.output, "x", self.x)


@irdl_op_definition
class ReduceScatterOp(LLMOp):
    """The sum (or ``max``, ``min``) over the devices of a group, of which device i of the group keeps the i-th part.

    ```mlir
    %y = llm.reduce_scatter(%x) {dim = 1 : i32, reduction = "sum", group_size = 8 : i32}
           : (tensor<16x1024xf16>) -> tensor<16x128xf16>
    ```
    """

    name = "llm.reduce_scatter"
    PARENTHESIZED: ClassVar = True

    x = operand_def(TensorType)

    dim = prop_def(IntegerAttr)
    reduction = prop_def(StringAttr, default_value=SUM)
    group_size = prop_def(IntegerAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, *, dim: int, group_size: int, reduction: str = "sum") -> None:
        x_type = tensor_of(x, "x")
        shape = list(x_type.get_shape())
        shape[dim] //= group_size
        super().__init__(
            operands=[x],
            result_types=[TensorType(x_type.element_type, shape)],
            properties={
                "dim": IntegerAttr(dim, i32),
                "reduction": StringAttr(reduction),
                "group_size": IntegerAttr(group_size, i32),
            },
        )

    def check(self) -> None:
        check_range("group_size", self.group_size, 1)
        check_one_of("reduction", self.reduction, REDUCTIONS)
        _check_resized(self.x, self.output, self.dim, divide=int_of(self.group_size))


@irdl_op_definition
class PipelineStageOp(LLMOp):
    """The value with which a pipeline stage begins; the ops after it, up to the next such op, are of that stage.

    ```mlir
    %y = llm.pipeline_stage(%x) {stage_id = 2 : i32, num_stages = 4 : i32, schedule = "1f1b"}
           : (tensor<16x1024xf16>) -> tensor<16x1024xf16>
    ```

    The value itself is unchanged. ``schedule`` is the order in which stages take microbatches: 1f1b or gpipe.
    """

    name = "llm.pipeline_stage"
    PARENTHESIZED: ClassVar = True

    x = operand_def(TensorType)

    stage_id = prop_def(IntegerAttr)
    num_stages = prop_def(IntegerAttr)
    schedule = prop_def(StringAttr, default_value=StringAttr("1f1b"))

    output = result_def(TensorType)

    def __init__(self, x: SSAValue, *, stage_id: int, num_stages: int, schedule: str = "1f1b") -> None:
        super().__init__(
            operands=[x],
            result_types=[x.type],
            properties={
                "stage_id": IntegerAttr(stage_id, i32),
                "num_stages": IntegerAttr(num_stages, i32),
                "schedule": StringAttr(schedule),
            },
        )

    def check(self) -> None:
        check_range("num_stages", self.num_stages, 1)
        check_range("stage_id", self.stage_id, 0, int_of(self.num_stages))
        check_one_of("schedule", self.schedule, SCHEDULES)
        check_same_type("result", self.output, "x", self.x)


@irdl_op_definition
class PipelineSendOp(LLMOp):
    """Sends a value from the stage it is in to another.

    ```mlir
    llm.pipeline_send(%x) {dest_stage = 3 : i32} : (tensor<16x1024xf16>) -> ()
    ```
    """

    name = "llm.pipeline_send"
    PARENTHESIZED: ClassVar = True

    x = operand_def(TensorType)

    dest_stage = prop_def(IntegerAttr)

    def __init__(self, x: SSAValue | Operation, *, dest_stage: int) -> None:
        super().__init__(operands=[x], properties={"dest_stage": IntegerAttr(dest_stage, i32)})

    def check(self) -> None:
        check_range("dest_stage", self.dest_stage, 0)


@irdl_op_definition
class PipelineRecvOp(LLMOp):
    """Receives the value that another stage sent to the stage whose `PipelineStageOp` takes it.

    ```mlir
    %x = llm.pipeline_recv() {source_stage = 1 : i32} : () -> tensor<16x1024xf16>
    ```
    """

    name = "llm.pipeline_recv"
    PARENTHESIZED: ClassVar = True

    source_stage = prop_def(IntegerAttr)

    output = result_def(TensorType)

    def __init__(self, *, source_stage: int, result_type: Attribute) -> None:
        super().__init__(result_types=[result_type], properties={"source_stage": IntegerAttr(source_stage, i32)})

    def check(self) -> None:
        check_range("source_stage", self.source_stage, 0)


@irdl_op_definition
class SequenceParallelAttentionOp(LLMOp):
    """Attention of one device's part of a sequence to the whole of it.

    ```mlir
    %o = llm.sequence_parallel_attention(%q, %k, %v)
           {seq_start = 1024 : i32, seq_length = 1024 : i32, total_length = 8192 : i32}
           : (tensor<1024x16x64xf16>, tensor<8192x16x64xf16>, tensor<8192x16x64xf16>) -> tensor<1024x16x64xf16>
    ```

    q is [seq_length, H, D], at positions from ``seq_start``; k is [total_length, Hkv, D], v [total_length, Hkv, Dv] (an
    `AllGatherOp` puts them together). All may have the same leading batch dimension. Visibility and scores are as in
    `AttentionOp`; ``scale`` is 1/√D unless said otherwise. The result is [seq_length, H, Dv].
    """

    name = "llm.sequence_parallel_attention"
    PARENTHESIZED: ClassVar = True

    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)

    seq_start = prop_def(IntegerAttr)
    seq_length = prop_def(IntegerAttr)
    total_length = prop_def(IntegerAttr)
    scale = opt_prop_def(FloatAttr)
    causal = prop_def(BoolAttr, default_value=TRUE)
    window = opt_prop_def(IntegerAttr)
    softcap = opt_prop_def(FloatAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        q: SSAValue | Operation,
        k: SSAValue | Operation,
        v: SSAValue | Operation,
        *,
        result_type: Attribute,
        seq_start: int,
        seq_length: int,
        total_length: int,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            operands=[q, k, v],
            result_types=[result_type],
            properties={
                "seq_start": IntegerAttr(seq_start, i32),
                "seq_length": IntegerAttr(seq_length, i32),
                "total_length": IntegerAttr(total_length, i32),
                "scale": optional_f32(scale),
                "causal": BoolAttr.from_bool(causal),
                "window": optional_i64(window),
                "softcap": optional_f32(softcap),
            },
        )

    def check(self) -> None:
        check_float(q=self.q, k=self.k, v=self.v, result=self.output)
        check_mask_properties(self.scale, self.window, self.softcap)
        check_range("total_length", self.total_length, 1)
        total = int_of(self.total_length)
        check_range("seq_length", self.seq_length, 1, total + 1)
        length = int_of(self.seq_length)
        check_range("seq_start", self.seq_start, 0, total - length + 1)
        rank = len(tensor_of(self.q, "q").get_shape())
        if rank not in (3, 4):
            fail("q", "shape [seq_length, H, D], or that with a leading batch dimension", self.q.type)
        batch: tuple[Dim, ...] = ("B",) if rank == 4 else ()
        sizes = check_shapes(
            {
                "q": (self.q, (*batch, length, "H", "D")),
                "k": (self.k, (*batch, total, "Hkv", "D")),
                "v": (self.v, (*batch, total, "Hkv", "Dv")),
                "result": (self.output, (*batch, length, "H", "Dv")),
            }
        )
        check_heads(sizes["H"], sizes["Hkv"])


@irdl_op_definition
class DistributedAttentionOp(LLMOp):
    """Attention of a long sequence's last tokens to its KV cache, whose positions are split over devices.

    ```mlir
    %o = llm.distributed_attention(%q, %cache, %seq_len)
           {num_heads = 16 : i32, head_dim = 64 : i32, scale = 0.125 : f32}
           : (tensor<2x16x64xf16>, !llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=4>, tensor<i32>)
           -> tensor<2x16x64xf16>
    ```

    q is [T, H, head dim], the queries of positions seq_len − T to seq_len − 1, the same on each device of a group;
    device i of the group holds shard i of the cache. Without ``seq_len`` the cache is full. Each device attends to its
    own positions, and the partial results are combined by their softmax statistics. Visibility and scores are as in
    `AttentionOp`. ``num_heads`` and ``head_dim``, where given, repeat the shape of q.
    """

    name = "llm.distributed_attention"
    PARENTHESIZED: ClassVar = True

    q = operand_def(TensorType)
    cache = operand_def(ShardedKVCacheType)
    seq_len = opt_operand_def(TensorType)

    layer = prop_def(IntegerAttr, default_value=LAYER_0)
    num_heads = opt_prop_def(IntegerAttr)
    head_dim = opt_prop_def(IntegerAttr)
    scale = prop_def(FloatAttr)
    causal = prop_def(BoolAttr, default_value=TRUE)
    window = opt_prop_def(IntegerAttr)
    softcap = opt_prop_def(FloatAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        q: SSAValue | Operation,
        cache: SSAValue | Operation,
        seq_len: SSAValue | Operation | None = None,
        *,
        result_type: Attribute,
        scale: float,
        layer: int = 0,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            operands=[q, cache, maybe(seq_len)],
            result_types=[result_type],
            properties={
                "layer": IntegerAttr(layer, i64),
                "scale": optional_f32(scale),
                "causal": BoolAttr.from_bool(causal),
                "window": optional_i64(window),
                "softcap": optional_f32(softcap),
            },
        )

    def check(self) -> None:
        cache = self.cache.type
        assert isinstance(cache, ShardedKVCacheType)
        check_float(q=self.q, result=self.output)
        check_int32(seq_len=self.seq_len)
        check_mask_properties(self.scale, self.window, self.softcap)
        check_range("layer", self.layer, 0, cache.num_layers.data)
        head_dim = cache.head_dim.data
        sizes = check_shapes(
            {
                "q": (self.q, ("T", "H", head_dim)),
                "seq_len": (self.seq_len, ()),
                "result": (self.output, ("T", "H", head_dim)),
            }
        )
        check_heads(sizes["H"], cache.num_kv_heads.data)
        for subject, attr, size in (("num_heads", self.num_heads, sizes["H"]), ("head_dim", self.head_dim, head_dim)):
            if attr is not None and size >= 0 and int_of(attr) != size:
                fail(subject, f"{size}, as q has", int_of(attr))


@irdl_op_definition
class CostAnnotationOp(LLMOp):
    """What the cost model found for the op that makes a value; it computes nothing, and lowering drops it.

    ```mlir
    llm.cost_annotation(%y)
      {compute_flops = 2147483648 : i64, memory_bytes = 4194304 : i64, communication_bytes = 0 : i64}
      : (tensor<16x1024xf16>) -> ()
    ```

    ``compute_flops`` counts floating-point operations, the other two bytes; each may be left out, but not all.
    """

    name = "llm.cost_annotation"
    PARENTHESIZED: ClassVar = True

    value = operand_def(AnyAttr())

    compute_flops = opt_prop_def(IntegerAttr)
    memory_bytes = opt_prop_def(IntegerAttr)
    communication_bytes = opt_prop_def(IntegerAttr)

    def __init__(
        self,
        value: SSAValue | Operation,
        *,
        compute_flops: int | None = None,
        memory_bytes: int | None = None,
        communication_bytes: int | None = None,
    ) -> None:
        super().__init__(
            operands=[value],
            properties={
                "compute_flops": optional_i64(compute_flops),
                "memory_bytes": optional_i64(memory_bytes),
                "communication_bytes": optional_i64(communication_bytes),
            },
        )

    def check(self) -> None:
        check_range("compute_flops", self.compute_flops, 0)
        check_range("memory_bytes", self.memory_bytes, 0)
        check_range("communication_bytes", self.communication_bytes, 0)
        if self.compute_flops is None and self.memory_bytes is None and self.communication_bytes is None:
            raise VerifyException(
                "cost: expected at least one of compute_flops, memory_bytes and communication_bytes, got none"
            )
