"""Compiles shapes of `arg_specs` for one topology, all without names; prints each with its Mosaic kernels.

python compile_flash_attention.py v5e:2x2 gemma-2-9b gemma-2-9b-gradients
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.chips import chip_of
from pallas_kernels.flash_attention.arg_specs import SPECS, ArgSpec
from pallas_kernels.flash_attention.tpu import flash_attention_tpu, unsupported_reason
from pallas_kernels.flash_attention.types import Sizes

GRADIENTS = "-gradients"
device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
chip = chip_of(device)


def kernels(spec: ArgSpec, *, backward: bool) -> int:
    """In the program, of the results or of gradients."""
    q, k, v, _ = spec.structs(sharding=SingleDeviceSharding(device))
    assert unsupported_reason(Sizes.of(q, k, v), spec.masking, chip) is None

    def call(q: Any, k: Any, v: Any) -> Any:
        return flash_attention_tpu(q, k, v, spec.masking, chip=chip)

    def gradients(q: Any, k: Any, v: Any) -> Any:
        return jax.grad(lambda *args: jnp.sum(call(*args).astype(jnp.float32)), argnums=(0, 1, 2))(q, k, v)

    lowered = jax.jit(gradients if backward else call).lower(q, k, v)
    lowered.compile()
    return lowered.as_text().count("@tpu_custom_call")


specs = {spec.name: spec for spec in SPECS}
for name in sys.argv[2:] or [*specs, f"llama-3-8b-odd{GRADIENTS}", f"gemma-2-9b{GRADIENTS}"]:
    backward = name.endswith(GRADIENTS)
    print(name, kernels(specs[name.removesuffix(GRADIENTS)], backward=backward), flush=True)
