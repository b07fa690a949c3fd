"""Rounds what quantized weights are multiplied with to 8 bits, as the model runs.

    %y = llm.quantized_matmul(%x, %w) {transpose_w = true}
      →  group_size=32
    %y = llm.quantized_matmul(%x, %w) {transpose_w = true, activation_bits = 8 : i32, activation_group_size = 32 : i32}

So a kernel multiplies integers with integers. Each token is rounded by its own values (dynamic), unless the plan has
scales from calibration for the weight, which become a constant (static):

    %y = llm.quantized_matmul(%x, %w) activation_scales(%s) {…} : (…, tensor<18xf32>) -> …

With a `plan` only the weights whose scheme asks for it are concerned, in groups of its size; else all are, in groups of
`group_size` along K, or of a whole row where it is 0. Runs after ``weight-quantization``.
"""

from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i32
from xdsl.ir import BlockArgument, SSAValue
from xdsl.irdl import AttrSizedOperandSegments
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, shape_of
from llmir_jax.errors import InvalidIRError, LlmirError
from llmir_jax.quantization import Plan, Scheme
from llmir_jax.transforms import signature
from llmir_jax.transforms.weight_quantization import stored_matrices

SEGMENTS = AttrSizedOperandSegments.attribute_name


def quantize_activations(module: ModuleOp, plan: Plan | None, group_size: int | None) -> int:
    """Mark the matmuls of @main, in place; returns how many there are.

    Raises LlmirError for a scheme with static activations of which the plan has no scales.
    """
    main = main_function(module)
    attributes = signature.argument_attributes(main)
    constants: dict[tuple[SSAValue, bytes], SSAValue] = {}
    count = 0
    for op in list(main.body.block.ops):
        if not isinstance(op, llm.QuantizedMatmulOp):
            continue
        size, scales = group_size, None
        if plan is not None:
            if not isinstance(op.w, BlockArgument):
                continue
            ((path, matrix),) = stored_matrices(attributes[op.w.index])
            scheme = plan.schemes[path]
            if scheme.activations is None:
                continue
            size = _fitted_group(scheme, op)
            if scheme.static_activations:
                scales = _constant(op, _static_scales(plan, (path, matrix.offset), scheme), constants)
        _quantize(op, size, scales)
        count += 1
    return count


def _quantize(op: llm.QuantizedMatmulOp, group_size: int | None, scales: SSAValue | None) -> None:
    num_in = shape_of(op.x)[-1]
    if group_size is not None and num_in % group_size:
        raise InvalidIRError(
            f"activation-quantization: group_size {group_size} does not divide the {num_in} inputs of a matmul"
        )
    new = llm.QuantizedMatmulOp(
        op.x,
        op.w,
        op.scales,
        op.zero_points,
        activation_scales=scales,
        result_type=op.output.type,
    )
    new.properties |= {name: value for name, value in op.properties.items() if name != SEGMENTS}
    new.attributes |= op.attributes
    new.properties["activation_bits"] = IntegerAttr(8, i32)
    if group_size is not None and group_size != num_in:
        new.properties["activation_group_size"] = IntegerAttr(group_size, i32)
    new.output.name_hint = op.output.name_hint
    Rewriter.replace_op(op, new)


def _fitted_group(scheme: Scheme, op: llm.QuantizedMatmulOp) -> int | None:
    num_in = shape_of(op.x)[-1]
    return scheme.fitted((1, num_in), name="activations").activation_group_size


def _static_scales(plan: Plan, key: tuple[str, int], scheme: Scheme) -> np.ndarray:
    found = plan.activation_scales.get(key)
    if found is None:
        raise LlmirError(
            f"{key[0]}: {scheme.name!r} has static scales for activations, which come from calibration: give "
            "calibration=llmir.Calibration(text=…), or leave out '-static' for each token's own scales"
        )
    return found


def _constant(
    op: llm.QuantizedMatmulOp, scales: np.ndarray, constants: dict[tuple[SSAValue, bytes], SSAValue]
) -> SSAValue:
    """The scales as a value, the same one for all that share an input, so that they can still become one matmul."""
    key = op.x, scales.tobytes()
    if key not in constants:
        constants[key] = OpBuilder(op).constant(scales.astype(np.float32))
    return constants[key]


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
