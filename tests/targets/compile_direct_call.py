"""Compiles a direct call of two layers of SmolLM2's shapes for a topology; prints the report, and the kernels.

python compile_direct_call.py v5e:2x2
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from compile_derived_steps import SMOLLM2, forward
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import llmir_jax as llmir
from llmir_jax import target_choice
from llmir_jax.models.llama import Llama
from llmir_jax.transforms.lower_to_flash import LowerToFlashPass
from pallas_kernels.chips import chip_of

device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
lower = LowerToFlashPass(chip=chip_of(device).name)
target_choice.flash_lowering = lambda target: lower  # what it is where JAX runs on the device
config = dataclasses.replace(SMOLLM2, num_layers=2, windows=(None, 512))


def make() -> Llama:
    return Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


structure, state = nnx.split(nnx.eval_shape(make))
jitted = llmir.jit(lambda state, tokens: forward(nnx.merge(structure, state), tokens))
placed = SingleDeviceSharding(device)


def on_device(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


shapes = jax.tree.map(on_device, state)
tokens = jax.ShapeDtypeStruct((2, 1100), jnp.int32, sharding=placed)
lowered = jax.jit(lambda state, tokens: jitted(state, tokens)).lower(shapes, tokens)
lowered.compile()
print(jitted.lower(shapes, tokens).report())
print(lowered.as_text().count("@tpu_custom_call"))
