"""A program of its own: compiles quantized matmuls for TPU v5e, where there is none, with both layouts of the weight.

test_tpu_layouts.py starts it, since libtpu wants to be told that there is no TPU before JAX is imported. Prints JSON:
for each case what XLA makes of each layout: bytes, loops, values that are larger than the weight, and copies of the
whole weight that a loop makes each time.
"""

import json
import re
from collections.abc import Iterator
from math import prod
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from xdsl.dialects.builtin import IntegerType, TensorType, f16, f32
from xdsl.utils.test_value import create_ssa_value

from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.targets.reference import decomposition

N, K, GROUP = 4096, 1024, 32
KINDS = {
    "int4": llm.QuantizedTensorType((N, K), IntegerType(4), f16, group_size=GROUP),
    "int4 with minima": llm.QuantizedTensorType((N, K), IntegerType(4), f16, min_type=f16, group_size=GROUP),
    "int8": llm.QuantizedTensorType((N, K), IntegerType(8), f16, group_size=GROUP),
}
VALUE = re.compile(r"\s*(?:ROOT )?%?\S+ = ([a-z]+\d+)\[([\d,]+)\]\S* ([\w-]+)\(")


def values(text: str, *, in_loops: bool = False) -> Iterator[tuple[str, int, str]]:
    """(type, bytes, operation) of the values outside of fusions of a compiled program, or of its loops."""
    for block in text.split("\n\n"):
        head, *lines = block.strip("\n").splitlines() or [""]
        if "fused" in head or "fusion" in head or (in_loops and head.startswith("ENTRY")):
            continue
        for value in filter(None, map(VALUE.match, lines)):
            element_type, dims, operation = value.groups()
            num_bits = int(re.sub(r"\D", "", element_type)) * prod(map(int, dims.split(",")))
            yield f"{element_type}[{dims}]", num_bits // 8, operation


def compiled(kind: llm.QuantizedTensorType, num_rows: int, device: Any) -> dict[str, Any]:
    x, y = (TensorType(f32, (num_rows, n)) for n in (K, N))
    op = llm.QuantizedMatmulOp(create_ssa_value(x), create_ssa_value(kind), result_type=y, transpose_w=True)
    sharding = SingleDeviceSharding(device)
    args = [
        jax.ShapeDtypeStruct(part.get_shape(), element_dtype(part.element_type), sharding=sharding)
        for part in (x, *kind.parts())
    ]
    program = jax.jit(decomposition(op)).lower(*args).compile()
    weight = N * K * kind.integer_type.width.data // 8
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "in_and_out": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "accessed": program.cost_analysis()["bytes accessed"],  # of a loop, its body once
        "temporary": memory.temp_size_in_bytes,
        "loops": len(re.findall(r" while\(", text)),
        "larger_values": [name for name, size, _ in values(text) if size > weight],
        "copies_in_loops": [name for name, size, op in values(text, in_loops=True) if op == "copy" and size == weight],
    }


def main() -> None:
    """Compile every case and print what came of it."""
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    found = {
        f"{name}, {num_rows} rows": {
            layout: compiled(kind.with_layout(layout), num_rows, device) for layout in (llm.ROWS, llm.COLUMNS)
        }
        for name, kind in KINDS.items()
        for num_rows in (1, 8)
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
