"""What has native code: why an operation of a step is not computed natively, or None if it is."""

from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import BlockArgument, Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import location
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of
from llmir_jax.dialects.llm.common import bool_of
from llmir_jax.dialects.stablehlo_ext import TopKOp
from llmir_jax.interop import op_name
from llmir_jax.targets.cpu import expressions
from llmir_jax.targets.cpu.elementwise import ELEMENTS, FLOATS, is_float
from llmir_jax.targets.cpu.host import Host, this_host
from llmir_jax.targets.cpu.loops import reduce_reason
from llmir_jax.targets.cpu.page_rows import pages_reason
from llmir_jax.targets.cpu.selection import top_k_reason


def unsupported_reason(op: Operation, host: Host | None = None) -> str | None:
    """Why an operation of a step is not computed natively on a host (this one, if none is given); None if it is."""
    host = this_host() if host is None else host
    where = f"{op_name(op)} at {location(op)}"
    if isinstance(op, ReturnOp):
        return None
    if isinstance(op, llm.WritePagesOp | llm.AttendPagesOp):
        kinds = [op.k_pages.type, op.v_pages.type]
        other = op.q if isinstance(op, llm.AttendPagesOp) else op.k
        found = [reason for kind in kinds if (reason := pages_reason(kind, host)) is not None]
        if not found and not is_float(dtype_of(other)):
            found = [f"of {dtype_of(other).name}"]
        return f"{where}: {found[0]}" if found else _half_reason(op, where, host)
    if isinstance(op, stablehlo.ReduceOp):
        reason = reduce_reason(op)
        if reason is not None:
            return f"{where}: {reason}"
        names = {dtype_of(value).name for value in op.operands}
        odd = names - {*FLOATS, "int32", "bool"}
        return f"{where}: of {', '.join(sorted(odd))}" if odd else _half_reason(op, where, host)
    if isinstance(op, TopKOp):
        reason = top_k_reason(op)
        return f"{where}: {reason}" if reason is not None else _half_reason(op, where, host)
    if isinstance(op, stablehlo.ConcatenateOp):
        kind = dtype_of(op.results[0]).name
        return _half_reason(op, where, host) if kind in ELEMENTS else f"{where}: of {kind}"
    if isinstance(op, llm.QuantizedMatmulOp):
        return _matmul_reason(op, where) or _half_reason(op, where, host)
    if isinstance(op, stablehlo.DotGeneralOp):
        names = {dtype_of(value).name for value in (op.lhs, op.rhs, op.results[0])}
        odd = names - set(FLOATS)
        return f"{where}: of {', '.join(sorted(odd))}" if odd else _half_reason(op, where, host)
    if isinstance(op, llm.LinearOp):
        plain = stored_weight(op.w) is not None and op.b is None and bool_of(op.transpose_w)
        if not plain:
            return f"{where}: its weight is no parameter"
        names = {dtype_of(value).name for value in (op.x, op.w, op.output)}
        odd = names - set(FLOATS)
        return f"{where}: of {', '.join(sorted(odd))}" if odd else _half_reason(op, where, host)
    if isinstance(op, llm.QuantizedGatherOp):
        is_weight = isinstance(op.w, BlockArgument) and isinstance(op.w.type, llm.QuantizedTensorType)
        if not is_weight or not is_float(dtype_of(op.results[0])):
            return f"{where}: of something else than a parameter, or not to floats"
        return _half_reason(op, where, host)
    return expressions.unsupported_reason(op, host)


def stored_weight(weight: SSAValue) -> BlockArgument | None:
    """The parameter that a product's weight is, widened to float32 or as it is; None if it is none."""
    if isinstance(weight.owner, stablehlo.ConvertOp) and dtype_of(weight).name == "float32":
        weight = weight.owner.operands[0]
    return weight if isinstance(weight, BlockArgument) else None


def _half_reason(op: Operation, where: str, host: Host) -> str | None:
    if host.has_half:
        return None
    values = [value for value in (*op.operands, *op.results) if isinstance(value.type, TensorType)]
    has_any = any(dtype_of(value).name == "float16" for value in values)
    return f"{where}: of float16 on a machine without instructions for it" if has_any else None


def _matmul_reason(op: llm.QuantizedMatmulOp, where: str) -> str | None:
    kind = op.w.type
    if not isinstance(op.w, BlockArgument) or not isinstance(kind, llm.QuantizedTensorType):
        return f"{where}: its weight is no quantized parameter"
    if not is_float(dtype_of(op.x)) or not is_float(dtype_of(op.output)):
        return f"{where}: of {dtype_of(op.x).name}"
    if op.activation_bits is not None:
        size = op.activation_group_size
        group, own = kind.get_shape()[1] if size is None else int(size.value.data), kind.elements_per_group
        if group % own and own % group:
            return f"{where}: groups of {own} weights and of {group} activations do not fit"
    return None


def reasons(main: FuncOp, host: Host | None = None) -> list[str]:
    """Why a step cannot be computed natively: one line for each kind of operation that is in the way."""
    found: dict[str, str] = {}
    for op in main.body.block.ops:
        reason = unsupported_reason(op, host)
        if reason is not None:
            found.setdefault(op_name(op), reason)
    return list(found.values())


__all__ = ["reasons", "stored_weight", "unsupported_reason"]
