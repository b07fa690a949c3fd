"""What raising StableHLO to llm ops needs to recognise it: values seen through broadcasts, reshapes and converts.

An *index* tells, for each dim of a value, by which dim of a frame it is indexed: None for a dim of size 1, which
nothing indexes. `peel` looks through operations that only lay a value out anew and keeps the index right, so two values
can be compared by what they hold, not by how they were broadcast.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from xdsl.dialects.builtin import BFloat16Type, Float16Type, Float32Type, Float64Type, TensorType
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, Block, Operation, SSAValue, Use
from xdsl.traits import is_side_effect_free
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects.build import dtype_of, ints, shape_of, splat_of, type_of
from llmir_jax.transforms import signature

Index = tuple[int | None, ...]

_PRECISION: dict[type[Attribute], int] = {BFloat16Type: 8, Float16Type: 11, Float32Type: 24, Float64Type: 53}


def precision(type_: Attribute) -> int | None:
    """Bits of the significand of a float type, or of a tensor's element type; None for anything else."""
    element = type_.get_element_type() if isinstance(type_, TensorType) else type_
    return _PRECISION.get(type(element))


def widens(source: Attribute, target: Attribute) -> bool:
    """Whether every float of `source` is one of `target` too."""
    a, b = precision(source), precision(target)
    return a is not None and b is not None and ((a < b and b >= 24) or source == target)


def element(value: SSAValue) -> Attribute:
    """The element type of a tensor."""
    found: Attribute = type_of(value).get_element_type()
    return found


@dataclass
class Rounding:
    """The coarsest float that a matched computation goes through, in bits of significand."""

    least: int = 64

    def note(self, value: SSAValue) -> None:
        """The computation holds `value`."""
        bits = precision(value.type)
        self.least = min(self.least, 0 if bits is None else bits)

    def allows(self, result: SSAValue) -> bool:
        """Whether computing it more precisely changes `result` by no more than its own rounding."""
        bits = precision(result.type)
        return bits is not None and self.least >= bits


# -- layout ------------------------------------------------------------------------------------------------------------


def identity(shape: Sequence[int]) -> Index:
    """The index of a value in its own frame."""
    return tuple(None if n == 1 else d for d, n in enumerate(shape))


def nontrivial(shape: Sequence[int]) -> list[int]:
    """Dims of a size other than 1."""
    return [d for d, n in enumerate(shape) if n != 1]


def _through(op: Operation, index: Index) -> Index | None:
    """The index of the operand of a layout operation whose result has `index`; None if `op` is none."""
    if isinstance(op, stablehlo.BroadcastInDimOp):
        dims = ints(op.broadcast_dimensions)
        return tuple(None if n == 1 else index[d] for n, d in zip(shape_of(op.operands[0]), dims, strict=True))
    if isinstance(op, stablehlo.ReshapeOp):
        before, after = shape_of(op.operands[0]), shape_of(op.results[0])
        if [n for n in before if n != 1] != [n for n in after if n != 1]:
            return None
        kept = iter(nontrivial(after))
        return tuple(None if n == 1 else index[next(kept)] for n in before)
    if isinstance(op, stablehlo.TransposeOp):
        permutation = ints(op.permutation)
        operand: list[int | None] = [None] * len(permutation)
        for d, source in enumerate(permutation):
            operand[source] = index[d]
        return tuple(operand)
    return None


def peel(
    value: SSAValue, index: Index, *, rounding: Rounding | None = None, stop: Collection[SSAValue] = ()
) -> tuple[SSAValue, Index]:
    """What `value` is a layout of, and its index in the same frame.

    Exact converts of floats are looked through; with `rounding` every convert of floats is, and noted there.
    """
    while value not in stop:
        op = value.owner
        if not isinstance(op, Operation):
            break
        if isinstance(op, stablehlo.ConvertOp):
            source = op.operands[0]
            if not widens(element(source), element(value)):
                if rounding is None or precision(source.type) is None or precision(value.type) is None:
                    break
                rounding.note(value)
            value = source
            continue
        inner = _through(op, index)
        if inner is None:
            break
        value, index = op.operands[0], inner
    return value, index


def is_vector(value: SSAValue, index: Index, dim: int) -> bool:
    """Whether `value` varies along `dim` of the frame and nothing else."""
    return [index[d] for d in nontrivial(shape_of(value))] == [dim]


# -- constants ---------------------------------------------------------------------------------------------------------

_FOLDED: dict[type[Operation], Any] = {
    stablehlo.AddOp: np.add,
    stablehlo.SubtractOp: np.subtract,
    stablehlo.MultiplyOp: np.multiply,
    stablehlo.DivideOp: np.divide,
    stablehlo.MaximumOp: np.maximum,
    stablehlo.NegateOp: np.negative,
    stablehlo.SqrtOp: np.sqrt,
}
_COMPARED: dict[str, Any] = {"GT": np.greater, "GE": np.greater_equal, "LT": np.less, "LE": np.less_equal}


def constant_of(value: SSAValue) -> np.ndarray[Any, Any] | None:
    """The constant that every element of `value` equals, with simple arithmetic on constants done; else None."""
    op = value.owner
    if not isinstance(op, Operation):
        return None
    if isinstance(op, stablehlo.ConstantOp):
        return splat_of(op.value)
    if isinstance(op, stablehlo.BroadcastInDimOp | stablehlo.ReshapeOp | stablehlo.TransposeOp):
        return constant_of(op.operands[0])
    if isinstance(op, stablehlo.ConvertOp):
        inner = constant_of(op.operands[0])
        return None if inner is None else inner.astype(dtype_of(value))
    function = _FOLDED.get(type(op))
    if isinstance(op, stablehlo.CompareOp):
        function = _COMPARED.get(op.comparison_direction.data.value)
    # Arithmetic on scalars only: walking down every sum of a model would cost too much, and integers divide otherwise.
    if function is None or shape_of(value) or dtype_of(op.operands[0]).kind in "iu":
        return None
    operands = []
    for x in op.operands:
        operand = constant_of(x)
        if operand is None:
            return None
        operands.append(operand)
    with np.errstate(all="ignore"):
        return np.asarray(function(*operands)).astype(dtype_of(value))


def last_place(dtype: np.dtype[Any]) -> float:
    """The difference between 1 and the next number of a float dtype."""
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def is_constant(value: SSAValue, expected: float) -> bool:
    """Whether every element is `expected`, rounded to its type."""
    got = constant_of(value)
    return got is not None and precision(value.type) is not None and bool(got == np.asarray(expected).astype(got.dtype))


def split_constant(op: Operation) -> tuple[float, SSAValue] | None:
    """The constant operand of a commutative operation, and the other one; None if neither or both are constant."""
    a, b = op.operands
    constants = [constant_of(a), constant_of(b)]
    if (constants[0] is None) == (constants[1] is None):
        return None
    if constants[0] is not None:
        return float(constants[0]), b
    assert constants[1] is not None
    return float(constants[1]), a


# -- uses and parameters -----------------------------------------------------------------------------------------------


def sole_use(value: SSAValue) -> Use | None:
    """The only use of `value`, if it has one."""
    uses = list(value.uses)
    return uses[0] if len(uses) == 1 else None


def erase_unused(values: Iterable[SSAValue]) -> None:
    """Erase the operations of `values` that nothing uses, and what only they used."""
    pending = [v.owner for v in values]
    while pending:
        op = pending.pop()
        if not isinstance(op, Operation) or op.parent is None or any(r.first_use is not None for r in op.results):
            continue
        if not is_side_effect_free(op):
            continue
        pending += [x.owner for x in op.operands]
        op.detach()
        op.erase()


def replace(root: SSAValue, new: SSAValue) -> None:
    """`new` in the place of `root` everywhere; what only served `root` is erased."""
    assert root.type == new.type, (root.type, new.type)
    new.name_hint = root.name_hint
    root.replace_all_uses_with(new)
    erase_unused([root])


_STORED = (
    stablehlo.ReshapeOp,
    stablehlo.TransposeOp,
    stablehlo.SliceOp,
    stablehlo.DynamicSliceOp,
    stablehlo.ConvertOp,
    stablehlo.BroadcastInDimOp,
)


@dataclass
class Parameters:
    """Which values are parameters of the model, or a layout, a slice or a convert of one."""

    arguments: frozenset[SSAValue]
    _known: dict[SSAValue, bool] = field(default_factory=dict)

    @staticmethod
    def of(main: FuncOp) -> "Parameters":
        """The parameters of a function: its arguments that have an `llmir.path`."""
        return Parameters(frozenset(arg for arg, _ in signature.parameter_paths(main)))

    def __contains__(self, value: SSAValue) -> bool:
        if value not in self._known:
            op = value.owner
            if isinstance(op, Block):
                self._known[value] = value in self.arguments
            else:
                self._known[value] = isinstance(op, _STORED) and op.operands[0] in self
        return self._known[value]
