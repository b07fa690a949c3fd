"""`llm.quantized_matmul` by the kernels of `pallas_kernels.quantized_matmul`: in columns for TPUs, in rows for GPUs."""

from typing import Any

import jax
from jax import Array
from xdsl.dialects.builtin import NoneAttr, TensorType
from xdsl.ir import Attribute

from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.llm.common import optional_int_of
from llmir_jax.targets.reference import Reference
from pallas_kernels.chips import Chip
from pallas_kernels.quantized_matmul import Hooks, quantized_matmul, unsupported_reason
from pallas_kernels.quantized_matmul.weight import QuantizedWeight
from pallas_kernels.tiles import TileError


def _struct(kind: Attribute) -> jax.ShapeDtypeStruct:
    assert isinstance(kind, TensorType)
    return jax.ShapeDtypeStruct(kind.get_shape(), element_dtype(kind.element_type))


def _weight(kind: llm.QuantizedTensorType, parts: list[Any]) -> QuantizedWeight:
    """The weight that these parts hold."""
    offset = None if kind.is_symmetric else parts[2]
    has_minima = not isinstance(kind.min_type, NoneAttr)
    return QuantizedWeight(
        values=parts[0],
        scales=parts[1],
        zero_points=None if has_minima else offset,
        minima=offset if has_minima else None,
        bits=kind.integer_type.width.data,
        layout="columns" if kind.in_columns else "rows",
    )


def matmul_kernel(op: llm.QuantizedMatmulOp, chip: Chip, interpret: bool) -> Reference:
    """The function of x, the parts of the weight, and scales of activations where they are given."""
    kind = op.w.type
    assert isinstance(kind, llm.QuantizedTensorType)
    num_parts = len(kind.parts())
    dtype = _struct(op.output.type).dtype
    group_size = _activation_group_size(op)

    def run(x: Array, *operands: Array) -> Array:
        weight = _weight(kind, list(operands[:num_parts]))
        scales = operands[num_parts] if len(operands) > num_parts else None
        if scales is not None:
            scales = scales.reshape(-1)
        return quantized_matmul(
            x,
            weight,
            Hooks(activation_group_size=group_size, activation_scales=scales),
            out_dtype=dtype,
            backend=chip.platform,
            chip=chip,
            interpret=interpret,
        )

    return run


def _activation_group_size(op: llm.QuantizedMatmulOp) -> int | None:
    if op.activation_bits is None:
        return None
    return optional_int_of(op.activation_group_size) or _struct(op.x.type).shape[-1]


def matmul_reason(op: llm.QuantizedMatmulOp, chip: Chip) -> str | None:
    """None if the kernel computes it on a chip, else why not, with the numbers."""
    kind = op.w.type
    if not isinstance(kind, llm.QuantizedTensorType):
        return f"the weight is {kind}, not of one width with its scales"
    if kind.in_columns != (chip.platform == "tpu"):
        return f"the weight is in {kind.layout.data}: something else than products reads it"
    x, parts = _struct(op.x.type), [_struct(part) for part in kind.parts()]
    weight = _weight(kind, parts)
    if (problem := weight.problem()) is not None:
        return problem
    if (
        reason := unsupported_reason(chip.platform, x, weight, activation_group_size=_activation_group_size(op))
    ) is not None:
        return reason
    scales = [] if op.activation_scales is None else [_struct(op.activation_scales.type)]
    try:
        jax.eval_shape(matmul_kernel(op, chip, False), x, *parts, *scales)
    except TileError as error:
        return str(error)
    return None


__all__ = ["matmul_kernel", "matmul_reason"]
