"""Lowers to the kernels of NVIDIA GPUs: see `lower_to_kernels`.

A kernel is a `stablehlo.custom_call @triton_kernel_call_ffi` that holds PTX for the compute capability of `chip`.
`llm.quantized_matmul` has a kernel too, for weights in rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xdsl.ir import Operation

from llmir_jax.dialects import llm
from llmir_jax.targets.gpu import paged_kernel
from llmir_jax.targets.paged_kernels import PagedKernel
from llmir_jax.targets.quantized_kernels import matmul_kernel, matmul_reason
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass, chip_of_target
from llmir_jax.transforms.lower_to_reference import Kernel
from pallas_kernels.chips import Chip


@dataclass(frozen=True)
class LowerToGpuPass(LowerToKernelsPass):
    """llm ops to Triton's kernels, and where there are none to their reference decompositions."""

    name = "lower-to-gpu"

    chip: str = "h100"

    @property
    def paged_kernel(self) -> PagedKernel:
        return paged_kernel(self._chip)

    @property
    def platform(self) -> str | None:
        return "cuda"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.max_tokens, self.chip

    def matmul_reason(self, op: llm.QuantizedMatmulOp) -> str | None:
        return matmul_reason(op, self._chip)

    def kernel(self, op: Operation) -> Kernel | None:
        if not isinstance(op, llm.QuantizedMatmulOp) or self.matmul_reason(op) is not None:
            return None
        return Kernel(matmul_kernel(op, self._chip, False), self.platform)

    def titles(self) -> Mapping[str, str]:
        attention = f"the Triton kernel of ragged paged attention, compiled for {self.chip}: writes and attends in one"
        matmul = f"the Triton kernel of quantized matmul, compiled for {self.chip}"
        return {"llm.attend_pages": attention, "llm.write_pages": attention, "llm.quantized_matmul": matmul}

    @property
    def _chip(self) -> Chip:
        return chip_of_target(self.name, self.chip, "gpu")


__all__ = ["LowerToGpuPass"]
