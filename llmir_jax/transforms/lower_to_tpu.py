"""Lowers to the TPU's kernels: see `lower_to_kernels`.

A kernel is a `stablehlo.custom_call @tpu_custom_call`, or with `interpret` what interprets it on any device.
`llm.quantized_matmul` has a kernel too, compiled for `chip`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llmir_jax.targets.paged_kernels import PagedKernel
from llmir_jax.targets.tpu import paged_kernel
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass


@dataclass(frozen=True)
class LowerToTpuPass(LowerToKernelsPass):
    """llm ops to the TPU's kernels, and where there are none to their reference decompositions."""

    name = "lower-to-tpu"

    chip: str = "v5e"
    interpret: bool = False

    target: ClassVar[str] = "tpu"

    @property
    def paged_kernel(self) -> PagedKernel:
        return paged_kernel(interpret=self.interpret)

    @property
    def platform(self) -> str | None:
        return None if self.interpret else "tpu"

    @property
    def interprets(self) -> bool:
        return self.interpret

    @property
    def key(self) -> tuple[Any, ...]:
        return self.name, self.max_tokens, self.interpret, self.chip

    def titles(self) -> Mapping[str, str]:
        how = "interpreted" if self.interpret else f"compiled for {self.chip}"
        attention = f"the Pallas kernel of ragged paged attention, {how}: writes and attends in one"
        matmul = f"the Pallas kernel of quantized matmul, {how}"
        return {"llm.attend_pages": attention, "llm.write_pages": attention, "llm.quantized_matmul": matmul}


__all__ = ["LowerToTpuPass"]
