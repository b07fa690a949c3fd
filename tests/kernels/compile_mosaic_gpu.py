"""Compile paged attention's Mosaic GPU kernel to machine code, for every published shape it takes, without a GPU.

Run with the stub of `cuda_stub.c` as libcuda.so.1 and MOSAIC_GPU_DUMP_PTXAS=1: ptxas says on stderr what it made. The
compiler is a C function in the library of JAX's CUDA plugin; it gives nothing back, for it cannot load what it made.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from jax.experimental.mosaic.gpu import core

from pallas_kernels.chips import chip_named
from pallas_kernels.paged_attention import Masking, Sizes
from pallas_kernels.paged_attention.arg_specs import SPECS, ArgSpec
from pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu, unsupported_reason


def lower(spec: ArgSpec) -> None:
    """Adds the kernel to those that JAX knows."""
    masking = Masking(scale=spec.head_dim**-0.5, window=spec.window, softcap=spec.softcap)

    def call(q: Any, k: Any, v: Any, pages: Any, batch: Any, slopes: Any) -> Any:
        return paged_attention_mosaic_gpu(q, k, v, pages, batch, masking, slopes, chip=chip_named("h100"))

    jax.jit(call).trace(*spec.structs()).lower(lowering_platforms=("cuda",))


if __name__ == "__main__":
    plugin = find_spec("jax_plugins.xla_cuda12")
    assert plugin is not None and plugin.origin is not None
    compile_module = ctypes.CDLL(str(Path(plugin.origin).parent / "xla_cuda_plugin.so")).MosaicGpuCompile
    compile_module.argtypes = [ctypes.c_char_p, ctypes.c_int]
    compile_module.restype = ctypes.c_void_p
    for each in SPECS:
        q, k, _, pages, batch, _ = each.structs()
        if unsupported_reason(Sizes.of(q, k, pages, batch)) is None:
            lower(each)
    for module in core.KNOWN_KERNELS.values():
        compile_module(module, len(module))
    print(f"{len(core.KNOWN_KERNELS)} kernels")
