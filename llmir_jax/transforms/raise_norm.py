"""Raises norms over the last dimension to ``llm.rms_norm`` and ``llm.layer_norm``.

    %s = stablehlo.reduce(%x · %x) across dimensions = [2]
    %m = %s / 576 ;  %r = stablehlo.rsqrt %m + 1.0e-5 ;  %y = (%x · %r) · %w
      →
    %y = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32}

Found from the reciprocal square root on: its operand must be a variance of some x plus an epsilon, and a product of
just it, x (or x less its mean) and a vector over the last dimension is the norm. Factors may come in any order and be
rounded to a narrower float on the way, so long as that float is no coarser than the result's. The vector may be 1 + w.
The variance may be mean(x²), mean((x − mean x)²) or mean(x²) − mean(x)². A norm without weights, one whose epsilon is
added elsewhere, or one over another dimension stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, ints, shape_of
from llmir_jax.dialects.stablehlo_ext import SquareOp
from llmir_jax.transforms.matching import (
    Index,
    Rounding,
    constant_of,
    element,
    erase_unused,
    identity,
    is_constant,
    is_vector,
    nontrivial,
    peel,
    precision,
    replace,
    sole_use,
    split_constant,
    widens,
)

_REDUCED = -1
"""In an index: the dim that a statistic sums over."""
_MAX_FACTORS = 3
"""Products between the reciprocal square root and the norm's result: 1 / sqrt, times x, times w."""

Located = tuple[SSAValue, Index]


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A reciprocal standard deviation, or its reciprocal: `x_index` is x's in the frame of `value`."""

    value: SSAValue
    x: SSAValue
    x_index: Index
    centred: bool
    epsilon: float
    rounding: Rounding


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm of `x` over the last dimension, with result `root`."""

    root: SSAValue
    x: SSAValue
    centred: bool
    epsilon: float
    weight: SSAValue
    offset: float
    bias: SSAValue | None


# -- statistics --------------------------------------------------------------------------------------------------------


def _is_sum(op: stablehlo.ReduceOp) -> bool:
    """Whether it sums one tensor, from zero."""
    body = op.body.block
    first = body.first_op
    return (
        len(op.inputs) == 1
        and len(ints(op.dimensions)) == 1
        and is_constant(op.init_values[0], 0)
        and isinstance(first, stablehlo.AddOp)
        and set(first.operands) == set(body.args)
        and isinstance(body.last_op, stablehlo.ReturnOp)
        and list(body.last_op.operands) == list(first.results)
    )


def _mean_of(value: SSAValue, index: Index, rounding: Rounding) -> Located | None:
    """What `value` is the mean of, over one dim."""
    value, index = peel(value, index, rounding=rounding)
    op = value.owner
    if not isinstance(op, stablehlo.DivideOp | stablehlo.MultiplyOp):
        return None
    rounding.note(value)
    total, count = op.operands
    if isinstance(op, stablehlo.MultiplyOp) and constant_of(total) is not None:
        total, count = count, total
    total, index = peel(total, index, rounding=rounding)
    reduce = total.owner
    if not isinstance(reduce, stablehlo.ReduceOp) or not _is_sum(reduce):
        return None
    rounding.note(total)
    (dim,) = ints(reduce.dimensions)
    size = shape_of(reduce.inputs[0])[dim]
    got = constant_of(count)
    if got is None:
        return None
    if isinstance(op, stablehlo.DivideOp):
        if got != got.dtype.type(size):
            return None
    elif not is_constant(count, 1 / size):
        return None
    return reduce.inputs[0], (*index[:dim], _REDUCED, *index[dim:])


def _square_of(value: SSAValue, index: Index, rounding: Rounding) -> Located | None:
    """What `value` is the square of."""
    value, index = peel(value, index, rounding=rounding)
    op = value.owner
    rounding.note(value)
    if isinstance(op, SquareOp):
        return op.operands[0], index
    if isinstance(op, stablehlo.PowerOp) and is_constant(op.operands[1], 2):
        return op.operands[0], index
    if isinstance(op, stablehlo.MultiplyOp):
        a, b = (peel(x, index) for x in op.operands)
        return a if a == b else None
    return None


def _less_mean(value: SSAValue, index: Index, rounding: Rounding, dim: int = _REDUCED) -> Located | None:
    """The x that `value` is x − mean(x) of, the mean over what `dim` of the frame indexes."""
    op = value.owner
    if not isinstance(op, stablehlo.SubtractOp):
        return None
    rounding.note(value)
    x = peel(op.operands[0], index)
    mean = _mean_of(op.operands[1], index, rounding)
    if mean is None:
        return None
    of, of_index = peel(*mean)
    expected = tuple(dim if d == _REDUCED else d for d in of_index)
    return x if of is x[0] and expected == x[1] else None


def _less_zero(value: SSAValue, index: Index) -> Located:
    """`value`, or what zero is subtracted from to make it; peeled."""
    value, index = peel(value, index)
    op = value.owner
    if isinstance(op, stablehlo.SubtractOp) and is_constant(op.operands[1], 0):
        return peel(op.operands[0], index)
    return value, index


def _variance_of(value: SSAValue, index: Index, rounding: Rounding) -> tuple[SSAValue, Index, bool] | None:
    """The x whose variance (True), or mean square (False), `value` is."""
    value, index = peel(value, index, rounding=rounding)
    op = value.owner
    if isinstance(op, stablehlo.SelectOp):  # jnp.var: NaN where nothing is averaged
        chosen = constant_of(op.operands[0])
        return _variance_of(op.operands[1], index, rounding) if chosen is not None and bool(chosen) else None
    if isinstance(op, stablehlo.MaximumOp):
        clipped = split_constant(op)
        if clipped is None or clipped[0] != 0:
            return None
        value, index = peel(clipped[1], index, rounding=rounding)
        op = value.owner
        if not isinstance(op, stablehlo.SubtractOp):
            return None
    if isinstance(op, stablehlo.SubtractOp):
        return _fast_variance_of(op, index, rounding)
    mean = _mean_of(value, index, rounding)
    squared = None if mean is None else _square_of(*mean, rounding)
    if squared is None:
        return None
    inner, inner_index = peel(*squared)
    centred = _less_mean(inner, inner_index, rounding)
    if centred is not None:
        return *centred, True
    return *_less_zero(inner, inner_index), False


def _fast_variance_of(op: Operation, index: Index, rounding: Rounding) -> tuple[SSAValue, Index, bool] | None:
    """mean(x²) − mean(x)²."""
    rounding.note(op.results[0])
    mean_square = _mean_of(op.operands[0], index, rounding)
    squared = None if mean_square is None else _square_of(*mean_square, rounding)
    square_mean = _square_of(op.operands[1], index, rounding)
    mean = None if square_mean is None else _mean_of(*square_mean, rounding)
    if squared is None or mean is None or peel(*squared) != peel(*mean):
        return None
    return *peel(*mean), True


def statistic_of(op: Operation) -> Statistic | None:
    """What `op`, a square root or a reciprocal one, is a statistic of."""
    if isinstance(op, stablehlo.PowerOp) and not is_constant(op.operands[1], -0.5):
        return None
    rounding = Rounding()
    rounding.note(op.results[0])
    shape = shape_of(op.results[0])
    value, index = peel(op.operands[0], identity(shape), rounding=rounding)
    if not isinstance(value.owner, stablehlo.AddOp):
        return None
    rounding.note(value)
    parts = split_constant(value.owner)
    if parts is None or not 0 < parts[0] < float("inf"):
        return None
    variance = _variance_of(parts[1], index, rounding)
    if variance is None:
        return None
    x, x_index, centred = variance
    if x_index.count(_REDUCED) != 1:
        return None
    return Statistic(value=op.results[0], x=x, x_index=x_index, centred=centred, epsilon=parts[0], rounding=rounding)


# -- products ----------------------------------------------------------------------------------------------------------


class _Product:
    """The factors of a value: the statistic, its x, and others."""

    def __init__(self, root: SSAValue, statistic: Statistic):
        self.statistic = statistic
        self.rounding = Rounding(statistic.rounding.least)
        self.channel = len(shape_of(root)) - 1
        self.statistics: list[Index] = []
        self.xs: list[Index] = []
        self.others: list[Located] = []
        self.sound = True
        self._collect(root, identity(shape_of(root)))

    def _collect(self, start: SSAValue, start_index: Index) -> None:
        known = self.statistic
        value, index = peel(start, start_index, rounding=self.rounding, stop=(known.x, known.value))
        op = value.owner
        if value is known.value:
            if isinstance(op, stablehlo.SqrtOp):
                self.sound = False
            self.statistics.append(index)
        elif self._is_x(value, index):
            return
        elif isinstance(op, stablehlo.MultiplyOp) and not is_vector(value, index, self.channel):
            self.rounding.note(value)
            for x in op.operands:
                self._collect(x, index)
        elif isinstance(op, stablehlo.DivideOp) and isinstance(known.value.owner, stablehlo.SqrtOp):
            self.rounding.note(value)
            divisor, divisor_index = peel(op.operands[1], index, rounding=self.rounding, stop=(known.value,))
            self.sound &= divisor is known.value
            self.statistics.append(divisor_index)
            self._collect(op.operands[0], index)
        elif not is_constant(value, 1):
            self.others.append(peel(start, start_index))

    def _is_x(self, value: SSAValue, index: Index) -> bool:
        known = self.statistic
        if known.centred:
            centred = _less_mean(value, index, self.rounding, self.channel)
            if centred is None or centred[0] is not known.x:
                return False
            self.xs.append(centred[1])
            return True
        if value is not known.x:
            value, index = _less_zero(value, index)
        if value is not known.x:
            return False
        self.xs.append(index)
        return True

    def weight(self) -> Located | None:
        """The vector that is the third factor, if the factors are those of a norm."""
        if not self.sound or [len(x) for x in (self.statistics, self.xs, self.others)] != [1, 1, 1]:
            return None
        (found,), (x_index,), (weight,) = self.statistics, self.xs, self.others
        for own, outer in zip(self.statistic.x_index, x_index, strict=True):
            expected = self.channel if own == _REDUCED else None if own is None else found[own]
            if own is not None and (outer is None or outer != expected):
                return None
        return weight if is_vector(*weight, self.channel) else None


def _covers(x: SSAValue, index: Index, root: SSAValue) -> bool:
    """Whether `x` has the elements of `root`'s frame, in its order."""
    return [index[d] for d in nontrivial(shape_of(x))] == nontrivial(shape_of(root))


def _offset_of(weight: SSAValue, index: Index, root: SSAValue) -> tuple[float, SSAValue]:
    """Of c + w: c and w. A sum that is rounded more than the norm's result is a weight of its own."""
    parts = split_constant(weight.owner) if isinstance(weight.owner, stablehlo.AddOp) else None
    rounding = Rounding()
    rounding.note(weight)
    if parts is None or not rounding.allows(root) or not _is_float32(parts[0]):
        return 0.0, weight
    return parts[0], peel(parts[1], index)[0]


def _is_float32(number: float) -> bool:
    return float(np.float32(number)) == number and bool(np.isfinite(number))


def _types_fit(statistic: Statistic, root: SSAValue) -> bool:
    """Whether a norm of x's type or of the result's gives the result, its epsilon a float32."""
    bits, wanted = precision(statistic.x.type), precision(root.type)
    assert bits is not None and wanted is not None
    exact = bool(np.float32(statistic.epsilon) > 0) and (wanted <= 24 or _is_float32(statistic.epsilon))
    return exact and (bits > wanted or widens(element(statistic.x), element(root)))


def _narrowed(value: SSAValue) -> SSAValue:
    """The convert to a narrower float that alone reads `value`, or `value`."""
    use = sole_use(value)
    if use is None or not isinstance(use.operation, stablehlo.ConvertOp):
        return value
    converted = use.operation.results[0]
    bits, before = precision(converted.type), precision(value.type)
    return converted if bits is not None and before is not None and bits < before else value


def _bias_of(value: SSAValue, channel: int) -> tuple[SSAValue, SSAValue] | None:
    """The vector that `value` alone is added to, and the sum."""
    use = sole_use(value)
    if use is None or not isinstance(use.operation, stablehlo.AddOp):
        return None
    other = use.operation.operands[1 - use.index]
    vector, index = peel(other, identity(shape_of(other)))
    return (vector, use.operation.results[0]) if is_vector(vector, index, channel) else None


def norm_of(root: SSAValue, statistic: Statistic) -> Norm | None:
    """The norm that `root`, a product, is the value of."""
    shape = shape_of(root)
    if not shape or shape[-1] == 1:
        return None
    product = _Product(root, statistic)
    weight = product.weight()
    if weight is None or not _covers(statistic.x, product.xs[0], root):
        return None
    rounding = product.rounding
    bias = None
    if statistic.centred:
        for before in (root, _narrowed(root)):
            found = _bias_of(before, product.channel)
            if found is not None:
                rounding.note(before)
                bias, root = found
                break
    narrowed = _narrowed(root)
    root = narrowed if rounding.allows(narrowed) else root
    if not rounding.allows(root) or not _types_fit(statistic, root):
        return None
    offset, vector = (0.0, weight[0]) if statistic.centred else _offset_of(*weight, root)
    return Norm(
        root=root,
        x=statistic.x,
        centred=statistic.centred,
        epsilon=statistic.epsilon,
        weight=vector,
        offset=offset,
        bias=bias,
    )


# -- rewriting ---------------------------------------------------------------------------------------------------------


def _products_after(value: SSAValue, depth: int = 0) -> Iterator[Operation]:
    """Products and quotients that `value` is a factor of, the nearest first."""
    for use in list(value.uses):
        op = use.operation
        if op.parent is None:
            continue
        if isinstance(op, stablehlo.MultiplyOp | stablehlo.DivideOp):
            if depth == _MAX_FACTORS:
                continue
            yield op
            if op.parent is not None:
                yield from _products_after(op.results[0], depth + 1)
        elif isinstance(
            op, stablehlo.BroadcastInDimOp | stablehlo.ReshapeOp | stablehlo.ConvertOp | stablehlo.TransposeOp
        ):
            yield from _products_after(op.results[0], depth)


def build(norm: Norm) -> None:
    """Put the op in the place of `norm.root`."""
    assert isinstance(norm.root.owner, Operation)
    builder = OpBuilder(norm.root.owner)
    shape, wanted = shape_of(norm.root), element(norm.root)
    x = builder.reshape(norm.x, shape)
    if widens(element(x), wanted):
        x = builder.convert(x, wanted)
    weight = builder.reshape(norm.weight, shape[-1:])
    op: llm.LayerNormOp | llm.RMSNormOp
    if norm.centred:
        if norm.bias is None:
            bias = builder.zeros(shape[-1:], element(weight))
        else:
            bias = builder.reshape(norm.bias, shape[-1:])
        op = llm.LayerNormOp(x, weight, bias, epsilon=norm.epsilon)
    else:
        op = llm.RMSNormOp(x, weight, epsilon=norm.epsilon, offset=norm.offset)
    builder.insert(op)
    replace(norm.root, builder.convert(op.output, wanted))


def raise_norms(module: ModuleOp) -> int:
    """Raise every norm of @main, in place; returns how many were raised."""
    roots = (stablehlo.RsqrtOp, stablehlo.SqrtOp, stablehlo.PowerOp)
    count = 0
    for op in [op for op in main_function(module).body.block.ops if isinstance(op, roots)]:
        if op.parent is None or precision(op.results[0].type) is None:
            continue
        statistic = statistic_of(op)
        if statistic is None:
            continue
        for product in _products_after(op.results[0]):
            norm = norm_of(product.results[0], statistic)
            if norm is not None:
                build(norm)
                count += 1
        erase_unused([op.results[0]])
    return count


@dataclass(frozen=True)
class RaiseNormPass(ModulePass):
    """RMS and layer norms."""

    name = "raise-norm"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        raise_norms(op)
