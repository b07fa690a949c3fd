"""Keys and values are kept as integers, with a scale for each token and head; those of 4 bits with a minimum too.

    %k_pages : tensor<512x16x3x64xf32>
      →  bits=8
    %k_pages : !llm.quantized_tensor<512x16x3x64xi8, scale=f16, symmetric=true>

They are rows of bytes on every target, for tokens are written one by one, and each must own whole bytes. The
`target` says what scales are: float32 for those of 8 bits where a kernel reads them, else float16. Runs after
``kv-cache-allocation``: ``llm.write_pages`` then rounds, and ``llm.attend_pages`` reads back. Pages that
anything else reads, as what ``llm.lookup_kv`` became does, are refused.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerType, ModuleOp, TensorType, f16, f32
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.errors import InvalidIRError, LlmirError
from llmir_jax.transforms.hardware_specific_quantization import LAYOUTS
from llmir_jax.transforms.page_types import retype_pages

_WITH_KERNELS = ("tpu", "gpu")


def _quantized(kind: TensorType, bits: int, target: str) -> llm.QuantizedTensorType:
    """The type of pages of integers. Raises LlmirError for heads that do not fill whole bytes."""
    head_dim = kind.get_shape()[-1]
    if head_dim * bits % 8:
        raise LlmirError(
            f"kv_cache='int{bits}' packs two numbers into a byte, but keys or values have an odd number, {head_dim}, a "
            "head: use 'int8'"
        )
    # With few levels none may be wasted: keys of a head are far from symmetric.
    minimum = f16 if bits == 4 else None
    scale = f32 if bits == 8 and target in _WITH_KERNELS else f16
    return llm.QuantizedTensorType(kind.get_shape(), IntegerType(bits), scale, min_type=minimum)


@dataclass(frozen=True)
class KVCacheQuantizationPass(ModulePass):
    """Pages of integers of `bits`, 8 or 4, for a `target` of `hardware_specific_quantization.LAYOUTS`."""

    name = "kv-cache-quantization"

    bits: int = 8
    target: str = "reference"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.bits not in (4, 8):
            raise InvalidIRError(f"kv-cache-quantization: bits must be 4 or 8, got {self.bits}")
        if self.target not in LAYOUTS:
            raise InvalidIRError(
                f"kv-cache-quantization: target must be one of {', '.join(LAYOUTS)}, got {self.target!r}"
            )
        retype_pages(main_function(op), lambda kind: _quantized(kind, self.bits, self.target), by=self.name)


__all__ = ["KVCacheQuantizationPass"]
