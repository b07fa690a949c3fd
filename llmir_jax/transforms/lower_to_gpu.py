"""Lowers to the kernels of NVIDIA GPUs: see `lower_to_kernels`.

A kernel is a `stablehlo.custom_call @triton_kernel_call_ffi` that holds PTX for the compute capability of `chip`.
`attention="mosaic_gpu"` takes the Pallas kernel of attention in its place, `stablehlo.custom_call @mosaic_gpu_v2`; it
is not the default, since no measurement says that it is faster.
`llm.quantized_matmul` has a kernel too, for weights in rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.gpu import paged_kernel
from llmir_jax.targets.paged_kernels import PagedKernel
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass


@dataclass(frozen=True)
class LowerToGpuPass(LowerToKernelsPass):
    """llm ops to Triton's kernels, and where there are none to their reference decompositions."""

    name = "lower-to-gpu"

    chip: str = "h100"
    attention: str = "triton"
    """Whose kernel of attention: "triton" or "mosaic_gpu"."""

    target: ClassVar[str] = "gpu"

    @property
    def paged_kernel(self) -> PagedKernel:
        if self.attention not in ("triton", "mosaic_gpu"):
            raise InvalidIRError(f"{self.name}: attention must be triton or mosaic_gpu, got {self.attention!r}")
        return paged_kernel(self.known_chip, self.attention)

    @property
    def platform(self) -> str | None:
        return "cuda"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.max_tokens, self.chip, self.attention

    def titles(self) -> Mapping[str, str]:
        attention = f"the Triton kernel of ragged paged attention, compiled for {self.chip}: writes and attends in one"
        if self.attention == "mosaic_gpu":
            attention = f"the Mosaic GPU kernel of ragged paged attention, for {self.chip}, after a scatter to pages"
        matmul = f"the Triton kernel of quantized matmul, compiled for {self.chip}"
        return {"llm.attend_pages": attention, "llm.write_pages": attention, "llm.quantized_matmul": matmul}


__all__ = ["LowerToGpuPass"]
