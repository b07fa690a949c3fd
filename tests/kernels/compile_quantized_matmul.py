"""Compiles the shapes of `arg_specs` for a TPU that is not here: ``compile_quantized_matmul.py v5e:2x2 [name]``.

With no more VMEM than the model of tiles counts: what it leaves out is an error of the compiler.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.chips import chip_of
from pallas_kernels.quantized_matmul import Hooks, quantized_matmul, tpu
from pallas_kernels.quantized_matmul.arg_specs import SPECS, ArgSpec, random_weight
from pallas_kernels.tiles import total_bytes


def compile_spec(spec: ArgSpec, device: Any) -> None:
    def on_device(shape: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=SingleDeviceSharding(device))

    def make() -> Any:
        return random_weight(
            spec.n, spec.k, bits=spec.bits, group_size=spec.group_size, kind=spec.kind, scale_dtype=spec.scale_dtype,
            layout="columns", seed=0,
        )  # fmt: skip

    x = on_device(jax.ShapeDtypeStruct((spec.m, spec.k), spec.x_dtype))
    residual = on_device(jax.ShapeDtypeStruct((spec.m, spec.n), spec.x_dtype))
    bias = on_device(jax.ShapeDtypeStruct((spec.n,), jnp.float32))
    weight = jax.tree.map(on_device, jax.eval_shape(make))

    def call(x: Any, gate: Any, weight: Any, bias: Any, residual: Any) -> jax.Array:
        hooks = Hooks(gate=gate, bias=bias, residual=residual, activation_group_size=spec.activation_group_size)
        return quantized_matmul(x, weight, hooks, backend="tpu", chip=chip_of(device))

    text = jax.jit(call).lower(x, x, weight, bias, residual).compile().as_text()
    assert text is not None and "tpu_custom_call" in text, spec.name


def limit_vmem() -> None:
    """Give each kernel what its buffers are counted to take."""
    fits = tpu.choose

    def choose(*args: Any) -> tpu.TpuTiles:
        tiles: tpu.TpuTiles = fits(*args)
        buffers, chip = args[2](tiles), args[4]
        tpu.usable_bytes = lambda _: total_bytes(buffers, chip)
        return tiles

    tpu.choose = choose


if __name__ == "__main__":
    limit_vmem()
    found = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
    for each in SPECS:
        if sys.argv[2:] in ([], [each.name]):
            compile_spec(each, found.devices[0])
            print(f"{sys.argv[1]}: {each.name}", flush=True)
