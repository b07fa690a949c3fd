"""Collectives of the llm dialect as StableHLO, and attention over a sequence that is split over devices.

Modules run as one program on many partitions (``jax.shard_map``, or ``jit`` of a manually partitioned module): groups
are of partitions, and a device's place in its group is its partition's number modulo the size of the group.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from xdsl.dialects.builtin import TensorType

from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.llm.common import int_of
from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.reference import Reference, Scoring, accumulator

Collective = llm.AllGatherOp | llm.AllReduceOp | llm.ReduceScatterOp

_COMBINERS = {"sum": "add", "max": "maximum", "min": "minimum"}


def replica_groups(group_size: int, num_devices: int | None) -> str:
    """Groups of neighbours, as a dense constant; one group where the number of devices is not given.

    Raises:
        InvalidIRError: the groups do not divide the devices.
    """
    devices = group_size if num_devices is None else num_devices
    if devices % group_size:
        raise InvalidIRError(f"num_devices: expected a multiple of the group size {group_size}, got {devices}")
    rows = [list(range(start, start + group_size)) for start in range(0, devices, group_size)]
    return f"dense<{rows}> : tensor<{len(rows)}x{group_size}xi64>"


def collective_function(op: Collective, num_devices: int | None) -> str:
    """The text of a private function @collective that is the collective, on each partition of a program."""
    operand, result = op.x.type, op.output.type
    assert isinstance(operand, TensorType)
    groups = replica_groups(int_of(op.group_size), num_devices)
    attributes = (
        "channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, "
        f"replica_groups = {groups}, use_global_device_ids"
    )
    region = ""
    if isinstance(op, llm.AllGatherOp):
        name, attributes = "all_gather", f"all_gather_dim = {int_of(op.dim)} : i64, {attributes}"
    else:
        name = "all_reduce"
        if isinstance(op, llm.ReduceScatterOp):
            name, attributes = "reduce_scatter", f"scatter_dimension = {int_of(op.dim)} : i64, {attributes}"
        scalar = f"tensor<{operand.element_type}>"
        region = f"""({{
          ^bb0(%a: {scalar}, %b: {scalar}):
            %c = "stablehlo.{_COMBINERS[op.reduction.data]}"(%a, %b) : ({scalar}, {scalar}) -> {scalar}
            "stablehlo.return"(%c) : ({scalar}) -> ()
        }})"""
    return f"""func.func private @collective(%x: {operand}) -> {result} {{
        %0 = "stablehlo.{name}"(%x) {region} {{{attributes}}} : ({operand}) -> {result}
        func.return %0 : {result}
    }}"""


PARTITION_ID = """func.func private @partition_id() -> tensor<i32> {
    %0 = "stablehlo.partition_id"() : () -> tensor<ui32>
    %1 = "stablehlo.convert"(%0) : (tensor<ui32>) -> tensor<i32>
    func.return %1 : tensor<i32>
}"""


@dataclass(frozen=True, kw_only=True)
class DistributedAttention:
    """The three local steps of `llm.DistributedAttentionOp`, between which devices agree on the softmax's statistics.

    partial(q, keys, values, partition[, seq_len]) → sums [T, H, D], largest [T, H], total [T, H]
                                                         largest is reduced by max
    rescale(sums, total, largest, largest of all)  → sums, total
                                                         both are reduced by sum
    finish(sums, total)                            → output [T, H, D]
    """

    partial: Reference
    rescale: Reference
    finish: Reference

    @staticmethod
    def of(op: llm.DistributedAttentionOp) -> "DistributedAttention":
        """The steps of an op."""
        cache, output = op.cache.type, op.output.type
        assert isinstance(cache, llm.ShardedKVCacheType)
        assert isinstance(output, TensorType)
        dtype = element_dtype(output.element_type)
        return DistributedAttention(
            partial=_partial(cache, Scoring.of(op, cache.head_dim.data), int_of(op.layer)),
            rescale=_rescale,
            finish=lambda sums, total: (sums / total[..., None]).astype(dtype),
        )


def _partial(cache: llm.ShardedKVCacheType, scoring: Scoring, layer: int) -> Reference:
    shard_len, num_shards = cache.shard_len, cache.num_shards.data

    def run(
        q: Array, keys: Array, values: Array, partition: Array, seq_len: Array | None = None
    ) -> tuple[Array, Array, Array]:
        num_rows, num_heads, head_dim = q.shape
        num_kv_heads = keys.shape[2]
        dtype = accumulator(q.dtype)
        length = jnp.int32(cache.max_seq_len.data) if seq_len is None else seq_len
        q_pos = (length - num_rows + jnp.arange(num_rows, dtype=jnp.int32))[:, None]
        first = lax.rem(partition, jnp.int32(num_shards)) * shard_len
        k_pos = (first + jnp.arange(shard_len, dtype=jnp.int32))[None, :]
        grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim).astype(dtype)
        products = jnp.einsum("tgmd,lgd->tgml", grouped, keys[layer].astype(dtype))
        seen = (scoring.visible(q_pos, k_pos) & (k_pos < length))[:, None, None, :]
        scores = jnp.where(seen, scoring.scores(products, k_pos - q_pos, None), -jnp.inf)
        largest = jnp.maximum(scores.max(-1), np.finfo(dtype).min)
        weights = jnp.exp(scores - largest[..., None])
        sums = jnp.einsum("tgml,lgd->tgmd", weights, values[layer].astype(dtype))
        rows = (num_rows, num_heads)
        return sums.reshape(*rows, -1), largest.reshape(rows), weights.sum(-1).reshape(rows)

    return run


def _rescale(sums: Array, total: Array, largest: Array, largest_of_all: Array) -> tuple[Array, Array]:
    factor = jnp.exp(largest - largest_of_all)
    return sums * factor[..., None], total * factor
