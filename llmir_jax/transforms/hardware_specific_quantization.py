"""Lays out quantized weights for the target that runs the step.

    @main(%w: !llm.quantized_tensor<4096x1024xi4, scale=f16, symmetric=true, group_size=32> {llmir.path = "up"}, …)
      →  target="tpu"
    @main(%w: !llm.quantized_tensor<4096x1024xi4, scale=f16, symmetric=true, group_size=32, layout=columns> …)

In rows, two 4-bit integers share a byte along K: what is loaded on a CPU. In columns the tensors are [K, N] and the
integers of their own width, so that XLA converts and scales them within the product, with the outputs along the lanes.
Compiled for TPU v5e (libtpu 0.0.52), int4, K = 1024, N = 4096, groups of 32, a product of one row takes and gives
2.4 MB; XLA has it access 3.4 MB in columns, and 60.6 MB in rows, which it unpacks to 32-bit values first. For several
rows, the loop over blocks that keeps such values small copies the whole weight in each of its 16 turns. In int8 it is
5.5 MB for 13.9. `tests/targets/test_tpu_layouts.py` compiles them.

GPUs have a kernel that takes rows (`pallas_kernels.quantized_matmul`). Without it ("gpu-reference") a loop of small
blocks would leave most of one idle; in columns the product is one operation, in a form of int4 that XLA:GPU's own tests
cover (FuseSubchannelDequantization). Where XLA does not fuse it, one weight at a time is there as floats. Nothing of
this is measured.

Only parameters of @main that nothing but llm ops read are concerned. KV caches stay rows of bytes on every target:
tokens are written to them one by one, and a token must own whole bytes. Whoever fills the arguments moves the integers
(`QuantizedArray.laid_out`). Runs after ``quantized-operation-fusion``, which puts rows together.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import BlockArgument
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.errors import InvalidIRError
from llmir_jax.transforms import signature

LAYOUTS = {
    "cpu": llm.ROWS,
    "gpu": llm.ROWS,
    "gpu-reference": llm.COLUMNS,
    "reference": llm.ROWS,
    "tpu": llm.COLUMNS,
}
"""For each target, the layout of its weights."""
_READERS = llm.DequantizeOp | llm.QuantizedGatherOp | llm.QuantizedMatmulOp


def _laid_out(weight: BlockArgument, layout: str) -> llm.QuantizedTensorType | None:
    """The type that a parameter gets, or None where it keeps its own."""
    kind = weight.type
    if not isinstance(kind, llm.QuantizedTensorType) or kind.layout.data == layout:
        return None
    if len(kind.get_shape()) != 2 or kind.integer_type.width.data not in (4, 8):
        return None
    if not all(isinstance(use.operation, _READERS) for use in weight.uses):
        return None
    return kind.with_layout(layout)


def lay_out_weights(module: ModuleOp, target: str) -> int:
    """Retype the quantized parameters of @main, in place; returns how many changed."""
    if target not in LAYOUTS:
        raise InvalidIRError(
            f"hardware-specific-quantization: target must be one of {', '.join(LAYOUTS)}, got {target!r}"
        )
    main = main_function(module)
    count = 0
    for weight, _ in signature.parameter_paths(main):
        kind = _laid_out(weight, LAYOUTS[target])
        if kind is not None:
            signature.retype(weight, kind)
            count += 1
    signature.sync(main)
    return count


@dataclass(frozen=True)
class HardwareSpecificQuantizationPass(ModulePass):
    """The layout of quantized weights for a `target`, one of `LAYOUTS`."""

    name = "hardware-specific-quantization"

    target: str

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        lay_out_weights(op, self.target)


__all__ = ["LAYOUTS", "HardwareSpecificQuantizationPass", "lay_out_weights"]
