"""Replaces what a TPU has kernels for by their calls, and all other llm ops by their reference decompositions.

    %kp1, %vp1 = llm.write_pages %kp, %vp, %k, %v, … : (tensor<512x16x8x128xbf16>, …)
    %o = llm.attend_pages %q, %kp1, %vp1, …
      →
    %o, %kp1, %vp1 = func.call @llm_paged_attention(%q, %k, %v, %kp, %vp, …) : (…, tensor<512x16x1024xbf16>, …)

The function holds the Pallas kernel: `stablehlo.custom_call @tpu_custom_call`, or with `interpret` what interprets it
on any device. Pages that it serves change their type, of @main's arguments and results too (`targets.tpu`).
`llm.quantized_matmul` becomes a call of its kernel in the same way, compiled for `chip`. What no kernel serves,
`unserved` tells why.

`max_tokens` is the largest number of tokens the step is made for, and 0 for those of the module: the choice must be the
same for all of them, since they share the pages.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.tpu import find_attention, served_pages
from llmir_jax.targets.tpu_matmul import matmul_kernel, matmul_reason
from llmir_jax.transforms import signature
from llmir_jax.transforms.lower_to_reference import Kernel, Lowering, lower_module
from pallas_kernels.chips import Chip, UnknownChipError, chip_named

Unserved = Mapping[str, Mapping[str, int]]
"""By the name of the operation: why some have no kernel, and how many each reason is of."""


@dataclass(frozen=True)
class LowerToTpuPass(ModulePass):
    """llm ops to the TPU's kernels, and where there are none to their reference decompositions."""

    name = "lower-to-tpu"

    max_tokens: int = 0
    interpret: bool = False
    chip: str = "v5e"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        lowering = Lowering(module=op, num_devices=None, kernel=self._kernel)
        platform = None if self.interpret else "tpu"
        for fused in find_attention(list(main.body.block.ops)):
            attend, write = fused.attend, fused.write
            if fused.reason(self.max_tokens or shape_of(attend.q)[0]) is not None:
                continue
            for pages in (write.k_pages, write.v_pages):
                signature.retype(pages, served_pages(pages.type))
            results = lowering.call(
                attend,
                "llm.paged_attention",
                fused.function(self.interpret),
                fused.operands,
                [attend.output.type, write.k_pages.type, write.v_pages.type],
                platform=platform,
            )
            for old, new in zip((attend.output, write.new_k_pages, write.new_v_pages), results, strict=True):
                new.name_hint = old.name_hint
                old.replace_all_uses_with(new)
            Rewriter.erase_op(attend)
            Rewriter.erase_op(write)
        signature.sync(main)
        lower_module(lowering)

    def unserved(self, module: ModuleOp) -> Unserved:
        """What the pass would leave to reference decompositions though there are kernels of its kind, and why."""
        found: dict[str, Counter[str]] = {}
        ops = list(main_function(module).body.block.ops)
        reasons = [("llm.attend_pages", fused.reason(self.max_tokens)) for fused in find_attention(ops)]
        reasons += [(op.name, matmul_reason(op, self._chip)) for op in ops if isinstance(op, llm.QuantizedMatmulOp)]
        for name, reason in reasons:
            if reason is not None:
                found.setdefault(name, Counter())[reason] += 1
        return found

    @property
    def _chip(self) -> Chip:
        try:
            found = chip_named(self.chip)
        except UnknownChipError as error:
            raise InvalidIRError(f"lower-to-tpu: {error}") from None
        if found.platform != "tpu":
            raise InvalidIRError(f"lower-to-tpu: chip must be a TPU, got {self.chip!r}")
        return found

    def _kernel(self, op: Operation) -> Kernel | None:
        if not isinstance(op, llm.QuantizedMatmulOp) or matmul_reason(op, self._chip) is not None:
            return None
        return Kernel(matmul_kernel(op, self._chip, self.interpret), None if self.interpret else "tpu")


__all__ = ["LowerToTpuPass", "Unserved"]
