"""Replaces what a target has kernels for by their calls, and all other llm ops by their reference decompositions.

    %kp1, %vp1 = llm.write_pages %kp, %vp, %k, %v, … : (tensor<512x16x8x128xbf16>, …)
    %o = llm.attend_pages %q, %kp1, %vp1, …
      →
    %o, %kp1, %vp1 = func.call @llm_paged_attention(%q, %k, %v, %kp, %vp, …) : (…, tensor<512x16x1024xbf16>, …)

The function holds the kernel, as a `stablehlo.custom_call`. Pages that it serves change their type, of @main's
arguments and results too (`targets.paged_kernels`). What no kernel serves, `unserved` tells why.

`max_tokens` is the largest number of tokens the step is made for, and 0 for those of the module: the choice must be the
same for all of them, since they share the pages. A pass of a target says which kernels these are.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.ir import Attribute, BlockArgument, Operation
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.paged_kernels import FusedAttention, PagedKernel, find_attention, served_pages
from llmir_jax.targets.quantized_kernels import matmul_kernel, matmul_reason
from llmir_jax.transforms import signature
from llmir_jax.transforms.lower_to_reference import Kernel, Lowering, lower_module
from pallas_kernels.chips import Chip, UnknownChipError, chip_named

Unserved = Mapping[str, Mapping[str, int]]
"""By the name of the operation: why some have no kernel, and how many each reason is of."""


@dataclass(frozen=True)
class LowerToKernelsPass(ModulePass, ABC):
    """llm ops to a target's kernels, and where there are none to their reference decompositions."""

    max_tokens: int = 0
    chip: str = ""
    """The name of what kernels are compiled for."""

    target: ClassVar[str]

    @property
    @abstractmethod
    def paged_kernel(self) -> PagedKernel:
        """The target's kernel of ragged paged attention."""

    @property
    @abstractmethod
    def platform(self) -> str | None:
        """What kernels are lowered for, in JAX's words; None for the device that JAX uses."""

    @property
    @abstractmethod
    def key(self) -> tuple[Any, ...]:
        """Whatever the choice of kernels depends on."""

    @abstractmethod
    def titles(self) -> Mapping[str, str]:
        """By the name of the operation: the kernel, in the report."""

    @property
    def interprets(self) -> bool:
        """Whether kernels are interpreted, on any device."""
        return False

    @property
    def known_chip(self) -> Chip:
        """The chip of that name. Raises InvalidIRError for one that is not known, or of another target."""
        try:
            found = chip_named(self.chip)
        except UnknownChipError as error:
            raise InvalidIRError(f"{self.name}: {error}") from None
        if found.platform != self.target:
            raise InvalidIRError(f"{self.name}: chip must be a {self.target.upper()}, got {self.chip!r}")
        return found

    def kernel(self, op: Operation) -> Kernel | None:
        """The target's kernel for an operation that is no attention; None where its decomposition serves."""
        if not isinstance(op, llm.QuantizedMatmulOp) or matmul_reason(op, self.known_chip) is not None:
            return None
        return Kernel(matmul_kernel(op, self.known_chip, self.interprets), self.platform)

    def _attention(self, module: ModuleOp) -> list[tuple[FusedAttention, str | None]]:
        """Attention over pages that one write has just filled, and why the kernel does not serve it."""
        kernel = self.paged_kernel
        return [
            (fused, fused.reason(kernel, self.max_tokens or shape_of(fused.attend.q)[0]))
            for fused in find_attention(list(main_function(module).body.block.ops))
        ]

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        lowering = Lowering(module=op, num_devices=None, kernel=self.kernel)
        kernel = self.paged_kernel
        served = [fused for fused, reason in self._attention(op) if reason is None]
        for fused in served:
            _retype_pages(lowering, fused, kernel)
        lowering.expand_arguments(main)
        for fused in served:
            _fuse(lowering, fused, kernel, self.platform)
        main.update_function_type()
        lower_module(lowering)

    def unserved(self, module: ModuleOp) -> Unserved:
        """What the pass would leave to reference decompositions though there are kernels of its kind, and why."""
        found: dict[str, Counter[str]] = {}
        ops = list(main_function(module).body.block.ops)
        attention = self._attention(module)
        paired = {fused.attend for fused, _ in attention}
        reasons = [("llm.attend_pages", reason) for _, reason in attention]
        reasons += [
            (op.name, "its keys and values are not of one write")
            for op in ops
            if isinstance(op, llm.AttendPagesOp) and op not in paired
        ]
        reasons += [
            (op.name, matmul_reason(op, self.known_chip)) for op in ops if isinstance(op, llm.QuantizedMatmulOp)
        ]
        for name, reason in reasons:
            if reason is not None:
                found.setdefault(name, Counter())[reason] += 1
        return found

    def kernel_pages(self, module: ModuleOp) -> frozenset[int]:
        """The arguments of @main that hold pages as a kernel wants them."""
        return frozenset(
            pages.index
            for fused, reason in self._attention(module)
            if reason is None
            for pages in (fused.write.k_pages, fused.write.v_pages)
            if isinstance(pages, BlockArgument)
        )

    def page_types(self, kind: Attribute) -> tuple[TensorType[Any], ...]:
        """The arrays that hold pages of this type where a kernel serves them."""
        return served_pages(kind, self.paged_kernel)


def _retype_pages(lowering: Lowering, fused: FusedAttention, kernel: PagedKernel) -> None:
    for pages in (fused.write.k_pages, fused.write.v_pages):
        kinds = served_pages(pages.type, kernel)
        if isinstance(pages.type, llm.QuantizedTensorType):
            lowering.part_types[pages] = kinds
        else:
            (kind,) = kinds
            signature.retype(pages, kind)


def _fuse(lowering: Lowering, fused: FusedAttention, kernel: PagedKernel, platform: str | None) -> None:
    attend, write = fused.attend, fused.write
    pages = lowering.flat([write.k_pages, write.v_pages])
    output, *new = lowering.call(
        attend,
        "llm.paged_attention",
        fused.function(kernel),
        lowering.flat(fused.operands),
        [attend.output.type, *(array.type for array in pages)],
        platform=platform,
    )
    output.name_hint = attend.output.name_hint
    attend.output.replace_all_uses_with(output)
    half = len(new) // 2
    for old, arrays in ((write.new_k_pages, new[:half]), (write.new_v_pages, new[half:])):
        for array in arrays:
            array.name_hint = old.name_hint
        if isinstance(old.type, llm.QuantizedTensorType):
            lowering.parts[old] = arrays
        else:
            old.replace_all_uses_with(arrays[0])
    lowering.lowered += [write, attend]


__all__ = ["LowerToKernelsPass", "Unserved"]
