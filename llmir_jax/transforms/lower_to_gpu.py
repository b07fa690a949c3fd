"""Lowers to the kernels of NVIDIA GPUs: see `lower_to_kernels`.

A kernel is a `stablehlo.custom_call @triton_kernel_call_ffi` that holds PTX for the compute capability of `chip`.
`llm.quantized_matmul` has a kernel too, for weights in rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llmir_jax.targets.gpu import paged_kernel
from llmir_jax.targets.paged_kernels import PagedKernel
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass


@dataclass(frozen=True)
class LowerToGpuPass(LowerToKernelsPass):
    """llm ops to Triton's kernels, and where there are none to their reference decompositions."""

    name = "lower-to-gpu"

    chip: str = "h100"

    target: ClassVar[str] = "gpu"

    @property
    def paged_kernel(self) -> PagedKernel:
        return paged_kernel(self.known_chip)

    @property
    def platform(self) -> str | None:
        return "cuda"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.max_tokens, self.chip

    def titles(self) -> Mapping[str, str]:
        attention = f"the Triton kernel of ragged paged attention, compiled for {self.chip}: writes and attends in one"
        matmul = f"the Triton kernel of quantized matmul, compiled for {self.chip}"
        return {"llm.attend_pages": attention, "llm.write_pages": attention, "llm.quantized_matmul": matmul}


__all__ = ["LowerToGpuPass"]
