"""Lowers to the kernels of NVIDIA GPUs: see `lower_to_kernels`.

A kernel is a `stablehlo.custom_call @triton_kernel_call_ffi` that holds PTX for the compute capability of `chip`.
Products with quantized weights have none in this version.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xdsl.ir import Operation

from llmir_jax.dialects import llm
from llmir_jax.targets.gpu import paged_kernel
from llmir_jax.targets.paged_kernels import PagedKernel
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass, chip_of_target
from llmir_jax.transforms.lower_to_reference import Kernel


@dataclass(frozen=True)
class LowerToGpuPass(LowerToKernelsPass):
    """llm ops to Triton's kernels, and where there are none to their reference decompositions."""

    name = "lower-to-gpu"

    chip: str = "h100"

    @property
    def paged_kernel(self) -> PagedKernel:
        return paged_kernel(chip_of_target(self.name, self.chip, "gpu"))

    @property
    def platform(self) -> str | None:
        return "cuda"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.max_tokens, self.chip

    def matmul_reason(self, op: llm.QuantizedMatmulOp) -> str | None:
        return "there is no kernel of it for GPUs in this version"

    def kernel(self, op: Operation) -> Kernel | None:
        return None

    def titles(self) -> Mapping[str, str]:
        attention = f"the Triton kernel of ragged paged attention, compiled for {self.chip}: writes and attends in one"
        matmul = "the Triton kernel of quantized matmul"
        return {"llm.attend_pages": attention, "llm.write_pages": attention, "llm.quantized_matmul": matmul}


__all__ = ["LowerToGpuPass"]
