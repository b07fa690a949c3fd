"""Lowers to the TPU's kernels: see `lower_to_kernels`.

A kernel is a `stablehlo.custom_call @tpu_custom_call`, or with `interpret` what interprets it on any device.
`llm.quantized_matmul` has a kernel too, compiled for `chip`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xdsl.ir import Operation

from llmir_jax.dialects import llm
from llmir_jax.targets.paged_kernels import PagedKernel
from llmir_jax.targets.quantized_kernels import matmul_kernel, matmul_reason
from llmir_jax.targets.tpu import paged_kernel
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass, Unserved, chip_of_target
from llmir_jax.transforms.lower_to_reference import Kernel
from pallas_kernels.chips import Chip


@dataclass(frozen=True)
class LowerToTpuPass(LowerToKernelsPass):
    """llm ops to the TPU's kernels, and where there are none to their reference decompositions."""

    name = "lower-to-tpu"

    interpret: bool = False
    chip: str = "v5e"

    @property
    def paged_kernel(self) -> PagedKernel:
        return paged_kernel(interpret=self.interpret)

    @property
    def platform(self) -> str | None:
        return None if self.interpret else "tpu"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.max_tokens, self.interpret, self.chip

    def matmul_reason(self, op: llm.QuantizedMatmulOp) -> str | None:
        return matmul_reason(op, self._chip)

    def kernel(self, op: Operation) -> Kernel | None:
        if not isinstance(op, llm.QuantizedMatmulOp) or self.matmul_reason(op) is not None:
            return None
        return Kernel(matmul_kernel(op, self._chip, self.interpret), self.platform)

    def titles(self) -> Mapping[str, str]:
        how = "interpreted" if self.interpret else f"compiled for {self.chip}"
        attention = f"the Pallas kernel of ragged paged attention, {how}: writes and attends in one"
        matmul = f"the Pallas kernel of quantized matmul, {how}"
        return {"llm.attend_pages": attention, "llm.write_pages": attention, "llm.quantized_matmul": matmul}

    @property
    def _chip(self) -> Chip:
        return chip_of_target(self.name, self.chip, "tpu")


__all__ = ["LowerToTpuPass", "Unserved"]
