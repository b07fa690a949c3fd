"""A program of its own: runs collectives and distributed attention on four CPU devices, against NumPy.

test_collectives.py starts it, since JAX fixes the number of devices when it starts. Prints the names of its checks.
"""

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from xdsl.dialects.builtin import ModuleOp

from llmir_jax.dialects import llm
from llmir_jax.dialects.parser import IRParser
from llmir_jax.interop import call_module, make_context
from llmir_jax.transforms.lower_to_reference import LowerToReferencePass

NUM_DEVICES = 4
Array = np.ndarray[Any, Any]


def lowered(text: str) -> ModuleOp:
    context = make_context()
    context.load_dialect(llm.LLM)
    module = IRParser(context, text).parse_module()
    module.verify()
    LowerToReferencePass(num_devices=NUM_DEVICES).apply(context, module)
    module.verify()
    return module


def run(text: str, *arrays: Array, whole: int = 0) -> list[Array]:
    """Run a module on every device, which gets its row of each array; the first ``whole`` arrays go to all of them.

    Returns the results of each device, stacked.
    """
    module = lowered(text)
    mesh = jax.make_mesh((NUM_DEVICES,), ("i",), axis_types=(AxisType.Auto,))
    specs = tuple(PartitionSpec() if n < whole else PartitionSpec("i") for n in range(len(arrays)))

    def local(*shards: jax.Array) -> list[jax.Array]:
        rows = [shard if n < whole else shard[0] for n, shard in enumerate(shards)]
        return [result[None] for result in call_module(module, *rows)]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("i"), check_vma=False)
    return [np.asarray(result) for result in jax.jit(mapped)(*arrays)]


def check_collectives(rng: np.random.Generator) -> None:
    x = rng.normal(size=(NUM_DEVICES, 4, 6)).astype(np.float32)
    gathered, largest, total, scattered = run(
        """func.func @main(%x: tensor<4x6xf32>)
            -> (tensor<4x12xf32>, tensor<4x6xf32>, tensor<4x6xf32>, tensor<2x6xf32>) {
          %0 = llm.all_gather(%x) {dim = 1 : i32, group_size = 2 : i32} : (tensor<4x6xf32>) -> tensor<4x12xf32>
          %1 = llm.all_reduce(%x) {reduction = "max", group_size = 4 : i32} : (tensor<4x6xf32>) -> tensor<4x6xf32>
          %2 = llm.all_reduce(%x) {reduction = "sum", group_size = 2 : i32} : (tensor<4x6xf32>) -> tensor<4x6xf32>
          %3 = llm.reduce_scatter(%x) {dim = 0 : i32, reduction = "min", group_size = 2 : i32}
            : (tensor<4x6xf32>) -> tensor<2x6xf32>
          func.return %0, %1, %2, %3 : tensor<4x12xf32>, tensor<4x6xf32>, tensor<4x6xf32>, tensor<2x6xf32>
        }""",
        x,
    )
    for device in range(NUM_DEVICES):
        first = device // 2 * 2
        group = x[first : first + 2]
        np.testing.assert_array_equal(gathered[device], np.concatenate(list(group), axis=1))
        np.testing.assert_array_equal(largest[device], x.max(0))
        np.testing.assert_allclose(total[device], group.sum(0), rtol=1e-6)
        place = (device - first) * 2
        np.testing.assert_array_equal(scattered[device], group.min(0)[place : place + 2])


def check_tensor_parallel_mlp(rng: np.random.Generator) -> None:
    """Columns, then rows, then an all-reduce: the whole layer, one shard a device (each its own program here)."""
    x, up, down = (rng.normal(size=s).astype(np.float32) for s in ((3, 8), (8, 16), (16, 8)))
    b = rng.normal(size=8).astype(np.float32)
    parts = []
    for shard in range(NUM_DEVICES):
        shards = f"num_shards = {NUM_DEVICES} : i32, shard_id = {shard} : i32"
        module = lowered(f"""func.func @main(
            %x: tensor<3x8xf32>, %u: tensor<8x16xf32>, %d: tensor<16x8xf32>, %b: tensor<8xf32>) -> tensor<3x8xf32> {{
          %0 = llm.sharded_linear(%x, %u) {{shard_dim = 1 : i32, {shards}}}
            : (tensor<3x8xf32>, tensor<8x16xf32>) -> tensor<3x4xf32>
          %1 = llm.sharded_linear(%0, %d, %b) {{shard_dim = 0 : i32, {shards}}}
            : (tensor<3x4xf32>, tensor<16x8xf32>, tensor<8xf32>) -> tensor<3x8xf32>
          func.return %1 : tensor<3x8xf32>
        }}""")
        parts.append(np.asarray(call_module(module, x, up, down, b)[0]))
    (total,) = run(
        """func.func @main(%x: tensor<3x8xf32>) -> tensor<3x8xf32> {
          %0 = llm.all_reduce(%x) {reduction = "sum", group_size = 4 : i32} : (tensor<3x8xf32>) -> tensor<3x8xf32>
          func.return %0 : tensor<3x8xf32>
        }""",
        np.stack(parts),
    )
    for device in range(NUM_DEVICES):
        np.testing.assert_allclose(total[device], x @ up @ down + b, rtol=1e-4, atol=1e-4)


def check_distributed_attention(rng: np.random.Generator, *, seq_len: int | None, options: str) -> None:
    layers, length, heads, kv_heads, dim, rows = 2, 32, 4, 2, 8, 3
    cache = f"!llm.sharded_kv_cache<f32, {layers}, {kv_heads}, {dim}, 4, {length}, shards={NUM_DEVICES}>"
    q = rng.normal(size=(rows, heads, dim)).astype(np.float32)
    k, v = (rng.normal(size=(layers, length, kv_heads, dim)).astype(np.float32) for _ in range(2))
    n = [] if seq_len is None else [np.array(seq_len, np.int32)]
    argument, operand, operand_type = (", %n: tensor<i32>", ", %n", ", tensor<i32>") if n else ("", "", "")
    text = f"""func.func @main(%q: tensor<3x4x8xf32>{argument}, %cache: {cache}) -> tensor<3x4x8xf32> {{
      %0 = llm.distributed_attention(%q, %cache{operand}) {{layer = 1, scale = 0.5 : f32{options}}}
        : (tensor<3x4x8xf32>, {cache}{operand_type}) -> tensor<3x4x8xf32>
      func.return %0 : tensor<3x4x8xf32>
    }}"""
    shards = [np.stack(np.split(x, NUM_DEVICES, axis=1)) for x in (k, v)]
    (got,) = run(text, q, *n, *shards, whole=1 + len(n))

    total = length if seq_len is None else seq_len
    expected = np.zeros((rows, heads, dim))
    for t in range(rows):
        q_pos, k_pos = total - rows + t, np.arange(length)
        seen = (k_pos < total) & (k_pos <= q_pos)
        if "window" in options:
            seen &= k_pos > q_pos - 5
        for h in range(heads):
            scores = 0.5 * (k[1][seen][:, h // 2].astype(np.float64) @ q[t, h])
            if "softcap" in options:
                scores = 2 * np.tanh(scores / 2)
            weights = np.exp(scores - scores.max())
            expected[t, h] = weights / weights.sum() @ v[1][seen][:, h // 2]
    for device in range(NUM_DEVICES):
        np.testing.assert_allclose(got[device], expected, rtol=1e-4, atol=1e-5)


def main(seed: int) -> None:
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    rng = np.random.default_rng(seed)
    check_collectives(rng)
    print("collectives")
    check_tensor_parallel_mlp(rng)
    print("tensor-parallel MLP")
    check_distributed_attention(rng, seq_len=None, options="")
    check_distributed_attention(rng, seq_len=19, options=", window = 5 : i64")
    check_distributed_attention(rng, seq_len=3, options=", softcap = 2.0 : f32")
    print("distributed attention")


if __name__ == "__main__":
    main(int(sys.argv[1]))
