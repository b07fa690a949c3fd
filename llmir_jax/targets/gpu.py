"""What the GPU target has kernels for: Triton's, which jax-triton brings into a JAX program, and one of Mosaic GPU."""

import importlib.util
from functools import partial

import jax

from llmir_jax.targets.paged_kernels import PagedKernel
from pallas_kernels.chips import Chip, UnknownChipError, limits_of
from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.gpu import paged_attention_gpu, tiles_reason, unsupported_reason
from pallas_kernels.paged_attention.types import Sizes


def paged_kernel(chip: Chip, attention: str = "triton") -> PagedKernel:
    """Ragged paged attention for a chip, by "triton" or "mosaic_gpu"."""
    if attention == "mosaic_gpu":
        return PagedKernel(
            run=partial(mosaic_gpu.paged_attention_mosaic_gpu, chip=chip),
            page_width=lambda num_kv_heads, head_dim: num_kv_heads * head_dim,
            unsupported_reason=partial(mosaic_gpu.chip_reason, chip=chip),
        )

    def reason(sizes: Sizes) -> str | None:
        return unsupported_reason(sizes) or tiles_reason(sizes, chip)

    return PagedKernel(
        run=partial(paged_attention_gpu, chip=chip),
        page_width=lambda num_kv_heads, head_dim: num_kv_heads * head_dim,
        unsupported_reason=reason,
    )


def missing_triton() -> str | None:
    """Why no Triton kernel can be part of a JAX program; None if one can."""
    if importlib.util.find_spec("jax_triton") is not None:
        return None
    return "jax-triton is not installed: pip install 'llmir-jax[gpu]', with Python 3.12 or later and JAX 0.11"


def kernels_for(device: jax.Device) -> Chip | str:
    """The chip that kernels are chosen for on a device, or why there are none."""
    if (reason := missing_triton()) is not None:
        return reason
    try:
        return limits_of(device)
    except UnknownChipError as error:
        return str(error)


__all__ = ["kernels_for", "missing_triton", "paged_kernel"]
