"""Raises three linear layers around a gate to ``llm.gated_mlp``.

    %g = llm.linear %x, %gate ;  %u = llm.linear %x, %up
    %h = %g · (1 / (1 + exp −%g)) · %u
    %y = llm.linear %h, %down
      →
    %y = llm.gated_mlp %x, %gate, %up, %down {activation = "silu"}

Runs after ``raise-linear``. The activation is silu, gelu by erf or erfc, gelu by tanh, or relu, of the type of x; its
constants are checked to the last place. Layers with biases, and layers that something else reads too, stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import pi, sqrt

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, dtype_of
from llmir_jax.dialects.llm.common import bool_of
from llmir_jax.dialects.stablehlo_ext import ErfcOp, ErfOp
from llmir_jax.transforms.matching import constant_of, element, is_constant, last_place, replace

_ELEMENTWISE = (
    stablehlo.AddOp,
    stablehlo.DivideOp,
    stablehlo.ExponentialOp,
    stablehlo.LogisticOp,
    stablehlo.MaximumOp,
    stablehlo.MultiplyOp,
    stablehlo.NegateOp,
    stablehlo.TanhOp,
    ErfcOp,
    ErfOp,
)

Factors = tuple[float, list[SSAValue]]


def _operand(value: SSAValue, kind: type[Operation]) -> SSAValue | None:
    """The operand of the operation of `kind` that makes `value`, if one does."""
    return value.owner.operands[0] if isinstance(value.owner, kind) else None


def _factors(value: SSAValue) -> Factors:
    """`value` as a constant times other values."""
    op = value.owner
    constant = constant_of(value)
    if constant is not None:
        return float(constant), []
    if isinstance(op, stablehlo.NegateOp):
        scale, others = _factors(op.operands[0])
        return -scale, others
    if isinstance(op, stablehlo.MultiplyOp):
        (a, left), (b, right) = (_factors(x) for x in op.operands)
        return a * b, left + right
    if isinstance(op, stablehlo.DivideOp) and (divisor := constant_of(op.operands[1])) is not None and divisor != 0:
        scale, others = _factors(op.operands[0])
        return scale / float(divisor), others
    return 1.0, [value]


def _terms(value: SSAValue) -> list[SSAValue]:
    """The two values that `value` is the sum of, a constant first; or nothing."""
    if not isinstance(value.owner, stablehlo.AddOp):
        return []
    a, b = value.owner.operands
    return [b, a] if constant_of(b) is not None else [a, b]


def _close(value: SSAValue, got: float, expected: float) -> bool:
    """Whether a scale, a constant of the type of `value` or one over it, is `expected`, rounded."""
    return abs(got - expected) <= 0.51 * last_place(dtype_of(value)) * abs(expected)


def _is_scaled(value: SSAValue, scale: float, *expected: SSAValue) -> bool:
    """Whether `value` is `scale` times the `expected` values."""
    got, others = _factors(value)
    return _close(value, got, scale) and len(others) == len(expected) and set(others) == set(expected)


def _is_logistic(value: SSAValue, of: SSAValue) -> bool:
    if _operand(value, stablehlo.LogisticOp) is of:
        return True
    op = value.owner
    return isinstance(op, stablehlo.DivideOp) and is_constant(op.operands[0], 1) and _is_divisor(op.operands[1], of)


def _is_divisor(value: SSAValue, of: SSAValue) -> bool:
    """1 + exp(−x)."""
    terms = _terms(value)
    if not terms or not is_constant(terms[0], 1):
        return False
    exponent = _operand(terms[1], stablehlo.ExponentialOp)
    return exponent is not None and _operand(exponent, stablehlo.NegateOp) is of


def _is_erfc_gate(value: SSAValue, of: SSAValue) -> bool:
    """erfc(−x / √2), or 1 + erf(x / √2)."""
    argument = _operand(value, ErfcOp)
    if argument is not None:
        return _is_scaled(argument, -sqrt(0.5), of)
    terms = _terms(value)
    argument = _operand(terms[1], ErfOp) if terms and is_constant(terms[0], 1) else None
    return argument is not None and _is_scaled(argument, sqrt(0.5), of)


def _is_tanh_gate(value: SSAValue, of: SSAValue) -> bool:
    """1 + tanh(√(2 / π) · (x + 0.044715 · x³))."""
    terms = _terms(value)
    argument = _operand(terms[1], stablehlo.TanhOp) if terms and is_constant(terms[0], 1) else None
    if argument is None:
        return False
    scale, inner = _factors(argument)
    if len(inner) != 1 or not _close(argument, scale, sqrt(2 / pi)):
        return False
    summed = _terms(inner[0])
    if of not in summed:
        return False
    cube = summed[1 - summed.index(of)]
    scale, others = _factors(cube)
    return _close(cube, scale, 0.044715) and others == [of, of, of]


def activation_of(factors: Factors, value: SSAValue, of: SSAValue) -> str | None:
    """The activation of `of` that a product, of the type of `value`, is."""
    scale, others = factors
    if len(others) == 1 and scale == 1 and isinstance(others[0].owner, stablehlo.MaximumOp):
        a, b = others[0].owner.operands
        is_relu = (a is of and is_constant(b, 0)) or (b is of and is_constant(a, 0))
        return "relu" if is_relu else None
    if len(others) == 1 and scale == 1 and isinstance(others[0].owner, stablehlo.DivideOp):
        dividend, divisor = others[0].owner.operands
        return "silu" if dividend is of and _is_divisor(divisor, of) else None
    if len(others) != 2 or of not in others:
        return None
    gate = others[1 - others.index(of)]
    if scale == 1 and _is_logistic(gate, of):
        return "silu"
    if scale == 0.5 and _is_erfc_gate(gate, of):
        return "gelu"
    if scale == 0.5 and _is_tanh_gate(gate, of):
        return "gelu_tanh"
    return None


def _between(root: SSAValue, leaves: Iterable[SSAValue]) -> set[Operation] | None:
    """Operations from `leaves` to `root`, constants left out; None if one is not elementwise."""
    stop, found, pending = set(leaves), set[Operation](), [root]
    while pending:
        value = pending.pop()
        op = value.owner
        if value in stop or op in found or constant_of(value) is not None:
            continue
        if not isinstance(op, _ELEMENTWISE):
            return None
        found.add(op)
        pending += op.operands
    return found


@dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """down of activation(gate) · up."""

    down: llm.LinearOp
    gate: llm.LinearOp
    up: llm.LinearOp
    activation: str


def _plain_linear(value: SSAValue) -> llm.LinearOp | None:
    op = value.owner
    return op if isinstance(op, llm.LinearOp) and op.b is None else None


def _linears_below(value: SSAValue) -> list[llm.LinearOp]:
    """The linear layers without biases that `value` is computed from by elementwise operations."""
    found: dict[llm.LinearOp, None] = {}
    seen: set[SSAValue] = set()
    pending = [value]
    while pending:
        top = pending.pop()
        if top in seen:
            continue
        seen.add(top)
        linear = _plain_linear(top)
        if linear is not None:
            found[linear] = None
        elif isinstance(top.owner, _ELEMENTWISE):
            pending += top.owner.operands
    return list(found)


def gated_mlp_of(down: llm.LinearOp) -> GatedMLP | None:
    """The gated MLP that ends with `down`."""
    if down.b is not None or not isinstance(down.x.owner, stablehlo.MultiplyOp):
        return None
    linears = _linears_below(down.x)
    if len(linears) != 2 or linears[0].x is not linears[1].x:
        return None
    for gate, up in (linears, linears[::-1]):
        if up.output.type != gate.output.type or element(up.output) != element(up.x):
            continue
        scale, others = _factors(down.x)
        if others.count(up.output) != 1:
            continue
        others.remove(up.output)
        activation = activation_of((scale, others), down.x, gate.output)
        if activation is not None and _serve_only(down, gate, up):
            return GatedMLP(down=down, gate=gate, up=up, activation=activation)
    return None


def _serve_only(down: llm.LinearOp, gate: llm.LinearOp, up: llm.LinearOp) -> bool:
    """Whether nothing but `down` reads what lies between it and the other two."""
    inner = _between(down.x, (gate.output, up.output))
    if inner is None:
        return False
    readers = {down, *inner}
    return all(use.operation in readers for op in (gate, up, *inner) for result in op.results for use in result.uses)


def build(mlp: GatedMLP) -> None:
    """Put the op in the place of the last layer."""
    op = llm.GatedMLPOp(
        mlp.gate.x,
        mlp.gate.w,
        mlp.up.w,
        mlp.down.w,
        result_type=mlp.down.output.type,
        activation=mlp.activation,
        transpose_gate=bool_of(mlp.gate.transpose_w),
        transpose_up=bool_of(mlp.up.transpose_w),
        transpose_down=bool_of(mlp.down.transpose_w),
    )
    OpBuilder(mlp.down).insert(op)
    replace(mlp.down.output, op.output)


def raise_gated_mlps(module: ModuleOp) -> int:
    """Raise every gated MLP of @main, in place; returns how many were raised."""
    count = 0
    for op in [op for op in main_function(module).body.block.ops if isinstance(op, llm.LinearOp)]:
        mlp = gated_mlp_of(op) if op.parent is not None else None
        if mlp is not None:
            build(mlp)
            count += 1
    return count


@dataclass(frozen=True)
class RaiseGatedMLPPass(ModulePass):
    """Gated MLPs."""

    name = "raise-gated-mlp"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        raise_gated_mlps(op)
