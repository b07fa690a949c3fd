"""Rounds what quantized weights are multiplied with to 8 bits, as the model runs: each token by its own values.

    %y = llm.quantized_matmul(%x, %w) {transpose_w = true}
      →  group_size=32
    %y = llm.quantized_matmul(%x, %w) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32}

So a kernel multiplies integers with integers. With a `plan` only the weights whose scheme asks for it are concerned, in
groups of its size; else all are, in groups of `group_size` along K, or of a whole row where it is 0. Runs after
``weight-quantization``.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i32
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.errors import InvalidIRError
from llmir_jax.quantization import Plan, Scheme
from llmir_jax.transforms import signature


def quantize_activations(module: ModuleOp, plan: Plan | None, group_size: int | None) -> int:
    """Mark the matmuls of @main, in place; returns how many there are."""
    main = main_function(module)
    paths = dict[SSAValue, str](signature.parameter_paths(main))
    count = 0
    for op in main.body.block.ops:
        if not isinstance(op, llm.QuantizedMatmulOp):
            continue
        size = group_size
        if plan is not None:
            scheme = plan.get(paths[op.w]) if op.w in paths else None
            if scheme is None or scheme.activations is None:
                continue
            size = _fitted_group(scheme, op)
        num_in = shape_of(op.x)[-1]
        if size is not None and num_in % size:
            raise InvalidIRError(
                f"activation-quantization: group_size {size} does not divide the {num_in} inputs of a matmul"
            )
        op.properties["activation_bits"] = IntegerAttr(8, i32)
        if size is not None and size != num_in:
            op.properties["activation_group_size"] = IntegerAttr(size, i32)
        count += 1
    return count


def _fitted_group(scheme: Scheme, op: llm.QuantizedMatmulOp) -> int | None:
    num_in = shape_of(op.x)[-1]
    return scheme.fitted((1, num_in), name="activations").activation_group_size


@dataclass(frozen=True)
class ActivationQuantizationPass(ModulePass):
    """8-bit activations of quantized matmuls."""

    name = "activation-quantization"

    group_size: int = 0
    plan: Plan | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.group_size < 0:
            raise InvalidIRError(f"activation-quantization: group_size must be at least 0, got {self.group_size}")
        quantize_activations(op, self.plan, self.group_size or None)


__all__ = ["ActivationQuantizationPass", "quantize_activations"]
