"""Compiles a model's step for meshes of eight virtual CPU devices, in a process of its own, beside what the cost model
says of it; prints both as JSON.

python compiled_on_eight.py '[["tensor=8", {"quantize": "int8-g16"}], …]'
"""

import json
import os
import sys
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from llmir_jax.ahead_of_time import compile_step
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.planning import ModelPlan
from sharding.cost import CostModel, Layout, Workload
from sharding.mesh import make_mesh, parse_axes
from sharding.topologies import topology

CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    max_seq_len=256,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    windows=(None,) * 3,
)
BATCH, CONTEXT = 16, 128
SLICES = {1: "v5e:1x1", 4: "v5e:2x2", 8: "v5e:2x4"}


def case(axes: str, options: dict[str, Any]) -> dict[str, Any]:
    """What is compiled, and what is said, of one layout."""
    plan = ModelPlan(config=CONFIG, batch=BATCH, context=CONTEXT, dtype="float32", **options)
    layout = Layout.of(parse_axes(axes))
    mesh = make_mesh(layout.axes, devices=jax.devices()[: layout.num_devices])
    program = compile_step(plan.derive(CONFIG.num_layers, CONTEXT), mesh, tokens=BATCH)
    costs = CostModel(plan.cost, topology(SLICES[layout.num_devices]))
    estimate = costs.estimate(layout, Workload(batch=BATCH, context=CONTEXT))
    return {
        "compiled": {
            "kept": program.argument_bytes,
            "operations": program.operations,
            "collectives": sorted([kind, size, count] for (kind, size), count in program.collectives.items()),
        },
        "said": {
            "kept": estimate.memory.parameters + estimate.memory.cache,
            "operations": sum(part.operations for part in estimate.parts.values()),
            "collectives": sorted([each.kind, each.nbytes, each.count] for each in estimate.collectives),
        },
    }


if __name__ == "__main__":
    print(json.dumps([case(*each) for each in json.loads(sys.argv[1])]))
