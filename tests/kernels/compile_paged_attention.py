"""Compiles every shape of `arg_specs` for one topology; prints its name, its Mosaic kernels, and if pages stay put.

With no more VMEM than the model counts for each call: what it leaves out is an error of the compiler.
"""

import sys
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.paged_attention import paged_attention, tpu
from pallas_kernels.paged_attention.arg_specs import SPECS
from pallas_kernels.paged_attention.tpu_tiles import Config, vmem_bytes
from pallas_kernels.paged_attention.types import Sizes

launch = tpu._call


def limited(*args: Any, sizes: Sizes, config: Config, **options: Any) -> Any:
    """A launch whose limit is what the model counts for it."""
    tpu.VMEM_LIMIT_BYTES = vmem_bytes(sizes, config)
    return launch(*args, sizes=sizes, config=config, **options)


tpu._call = limited
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
device = SingleDeviceSharding(topology.devices[0])
for spec in SPECS:
    arguments = spec.structs(sharding=device)

    def call(q, k, v, pages, batch, slopes, spec=spec):
        masks = {"window": spec.window, "softcap": spec.softcap, "slopes": slopes}
        return paged_attention(q, k, v, pages, batch, scale=spec.head_dim**-0.5, backend="tpu", **masks)

    program = jax.jit(call, donate_argnums=3).lower(*arguments).compile()
    kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
    page_bytes = sum(x.size * x.dtype.itemsize for x in arguments[3] if x is not None)
    stays = program.memory_analysis().alias_size_in_bytes >= page_bytes
    print(spec.name, kernels, "in-place" if stays else "copied", flush=True)
