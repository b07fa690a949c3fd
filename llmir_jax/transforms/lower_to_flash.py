"""Lowers attention of whole sequences to flash attention, where a kernel of the target serves it.

    %o = llm.attention %q, %k, %v {scale = 0.125 : f32} : (tensor<512x9x64xbf16>, tensor<512x3x64xbf16>, …)
      →
    %o = func.call @llm_attention(%q, %k, %v) : (tensor<512x9x64xbf16>, …) -> tensor<512x9x64xbf16>

The function holds the kernel, as a custom call. Sequences of a batch are among the heads, each of which attends by
itself. What no kernel serves becomes its reference decomposition; `choice` tells why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.flash_kernels import FlashChoice, choose_flash, flash_function
from llmir_jax.transforms.lower_to_reference import Kernel, Lowering, lower_module
from pallas_kernels.chips import Chip, UnknownChipError, chip_named

TITLES: Mapping[str, str] = {
    "tpu": "JAX's splash attention, a Pallas kernel, compiled for {}",
    "cudnn": "cuDNN's attention, on {}",
    "gpu": "the Triton kernel of flash attention, compiled for {}",
}
"""In the report, by the backend of `pallas_kernels.flash_attention`."""


@dataclass(frozen=True)
class LowerToFlashPass(ModulePass):
    """llm.attention to flash attention compiled for `chip`, or with `interpret` interpreted on any device.

    `batch` sequences are among its heads, which kernels are given as they were.
    """

    name = "lower-to-flash"

    chip: str = "v5e"
    interpret: bool = False
    batch: int = 1

    @property
    def known_chip(self) -> Chip:
        """The chip of that name. Raises InvalidIRError for one that is not known."""
        try:
            return chip_named(self.chip)
        except UnknownChipError as error:
            raise InvalidIRError(f"{self.name}: {error}") from None

    @property
    def platform(self) -> str | None:
        """What kernels are lowered for, in JAX's words; None for the device that JAX uses."""
        if self.interpret:
            return None
        return "tpu" if self.known_chip.platform == "tpu" else "cuda"

    def choice(self, op: llm.AttentionOp) -> FlashChoice:
        """What serves an attention, and why no kernel does where none does."""
        return choose_flash(op, self.known_chip, self.batch)

    def title(self, choice: FlashChoice) -> str:
        """What serves an attention, in the report."""
        if choice.backend is None:
            return f"XLA, with a matrix of scores: {choice.reason}"
        title = TITLES[choice.backend].format(self.chip)
        if self.interpret:
            title += ", interpreted here"
        return f"{title} ({choice.reason})" if choice.reason else title

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        lower_module(Lowering(module=op, num_devices=None, kernel=self._kernel))

    def _kernel(self, op: Operation) -> Kernel | None:
        if not isinstance(op, llm.AttentionOp) or self.choice(op).backend is None:
            return None
        function: Any = flash_function(op, self.choice(op), self.known_chip, interpret=self.interpret, batch=self.batch)
        return Kernel(function, self.platform)


def attentions_of(module: ModuleOp) -> list[llm.AttentionOp]:
    """The attention of whole sequences in @main."""
    ops = main_function(module).body.block.ops
    return [op for op in ops if isinstance(op, llm.AttentionOp) and op.seq_ids is None]


__all__ = ["LowerToFlashPass", "attentions_of"]
