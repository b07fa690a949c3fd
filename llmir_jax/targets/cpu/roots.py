"""What an operation is to the plan: whether it stores what it makes, and what a matmul reads."""

from xdsl.ir import BlockArgument, Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects import llm
from llmir_jax.dialects.stablehlo_ext import TopKOp
from llmir_jax.targets.cpu.expressions import is_cheap
from llmir_jax.targets.cpu.support import stored_weight

Matmul = llm.QuantizedMatmulOp | llm.LinearOp
Norm = llm.RMSNormOp | llm.LayerNormOp


def is_root_op(op: Operation) -> bool:
    """Whether what an operation makes is stored, whoever reads it."""
    return isinstance(
        op,
        llm.QuantizedMatmulOp
        | llm.LinearOp
        | llm.AttendPagesOp
        | llm.WritePagesOp
        | stablehlo.ReduceOp
        | stablehlo.ConcatenateOp
        | stablehlo.DotGeneralOp
        | TopKOp,
    )


def known_scales(op: Matmul) -> SSAValue | None:
    """Scales of a matmul's activations that are known before."""
    return op.activation_scales if isinstance(op, llm.QuantizedMatmulOp) else None


def weight_of(op: Matmul) -> BlockArgument:
    """The parameter that a matmul's weight is."""
    weight = stored_weight(op.w)
    assert weight is not None
    return weight


def follows_product(value: SSAValue) -> bool:
    """Whether a matmul's input is computed from the product of another element by element: then it is stored there."""
    pending, computes, found = [value], False, False
    while pending:
        op = pending.pop().owner
        if not isinstance(op, Operation):
            continue
        if isinstance(op, Norm):
            return False
        if is_root_op(op):
            found |= isinstance(op, Matmul)
            continue
        computes |= not is_cheap(op)
        pending += op.operands
    return computes and found


__all__ = ["Matmul", "Norm", "follows_product", "is_root_op", "known_scales", "weight_of"]
