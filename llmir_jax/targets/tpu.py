"""What the TPU target has kernels for."""

from functools import partial

from llmir_jax.targets.paged_kernels import PagedKernel
from pallas_kernels.paged_attention.tpu import paged_attention_tpu
from pallas_kernels.paged_attention.tpu_tiles import page_width, unsupported_reason


def paged_kernel(*, interpret: bool) -> PagedKernel:
    """Ragged paged attention by Pallas."""
    run = partial(paged_attention_tpu, interpret=interpret)
    return PagedKernel(run=run, page_width=page_width, unsupported_reason=unsupported_reason)


__all__ = ["paged_kernel"]
