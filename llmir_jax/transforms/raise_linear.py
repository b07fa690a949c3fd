"""Raises products with a parameter to ``llm.linear``, the addition of a bias included.

    %0 = stablehlo.dot_general %x, %w, contracting_dims = [2] x [0] : (tensor<1x7x36xf32>, tensor<36x50xf32>) -> …
    %y = %0 + broadcast %b
      →
    %y = llm.linear %x, %w, %b : (tensor<1x7x36xf32>, tensor<36x50xf32>, tensor<50xf32>) -> tensor<1x7x50xf32>

The weight must be an argument with `llmir.path`, or a reshape, transpose, slice or convert of one, and the other
operand must not. Several contracted or several kept dims of the weight are folded into one each where a reshape can; a
weight whose contracted dims lie between kept ones, batched products and products of a set precision stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, ints, shape_of, tensor
from llmir_jax.transforms.matching import (
    Parameters,
    element,
    identity,
    nontrivial,
    peel,
    precision,
    replace,
    sole_use,
)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """x, laid out with its contracted dims last, times a weight of two dims."""

    root: SSAValue
    x: SSAValue
    x_kept: tuple[int, ...]
    x_contracted: tuple[int, ...]
    weight: SSAValue
    transpose_w: bool
    num_in: int
    num_out: int
    converted_to: Attribute
    bias: SSAValue | None
    weight_first: bool


def _is_default(op: stablehlo.DotGeneralOp) -> bool:
    """Whether the product has no precision or algorithm of its own."""
    return op.algorithm is None and all(p.data.value == "DEFAULT" for p in op.precision_config or ())


def _stored(weight: SSAValue, contracted: Sequence[int]) -> tuple[SSAValue, tuple[int, ...], Attribute]:
    """The weight before it was transposed, where its contracted dims were, and the type it was converted to."""
    dims = tuple(contracted)
    wanted = element(weight)
    if isinstance(weight.owner, stablehlo.ConvertOp) and isinstance(
        weight.owner.operands[0].owner, stablehlo.TransposeOp
    ):
        weight = weight.owner.operands[0]  # a convert and a transpose may change places
    while isinstance(weight.owner, stablehlo.TransposeOp):
        permutation = ints(weight.owner.permutation)
        dims = tuple(permutation[d] for d in dims)
        weight = weight.owner.operands[0]
    return weight, dims, wanted


def linear_of(op: stablehlo.DotGeneralOp, parameters: Parameters) -> Linear | None:
    """The linear layer that `op` is, without a bias."""
    numbers = op.dot_dimension_numbers
    sides = [op.lhs, op.rhs]
    contracted = [ints(numbers.lhs_contracting_dimensions), ints(numbers.rhs_contracting_dimensions)]
    if ints(numbers.lhs_batching_dimensions) or not contracted[0] or not _is_default(op):
        return None
    is_parameter = [side in parameters for side in sides]
    if is_parameter[0] == is_parameter[1]:
        return None
    weight_side = 0 if is_parameter[0] else 1
    x, root = sides[1 - weight_side], op.result[0]
    if element(x) != element(sides[weight_side]) or None in (precision(x.type), precision(root.type)):
        return None
    weight, dims, wanted = _stored(sides[weight_side], contracted[weight_side])
    # dims that are contracted together, in the order that the weight stores them
    pairs = sorted(zip(dims, contracted[1 - weight_side], strict=True))
    dims = tuple(d for d, _ in pairs)
    shape = shape_of(weight)
    first, last = dims == tuple(range(len(dims))), dims == tuple(range(len(shape) - len(dims), len(shape)))
    kept_in_order = _kept_stay_in_order(sides[weight_side], weight, contracted[weight_side], dims)
    if not (first or last) or not kept_in_order:
        return None
    num_in = prod(shape[d] for d in dims)
    x_contracted = tuple(d for _, d in pairs)
    return Linear(
        root=root,
        x=x,
        x_kept=tuple(d for d in range(len(shape_of(x))) if d not in x_contracted),
        x_contracted=x_contracted,
        weight=weight,
        transpose_w=not first,
        num_in=num_in,
        num_out=prod(shape) // num_in,
        converted_to=wanted,
        bias=None,
        weight_first=weight_side == 0,
    )


def _kept_stay_in_order(operand: SSAValue, weight: SSAValue, contracted: Sequence[int], stored: Sequence[int]) -> bool:
    """Whether the kept dims of `operand` are in the order that `weight`, what it is a transpose of, stores them."""
    if operand is weight or len(shape_of(weight)) - len(stored) <= 1:
        return True
    positions = list(range(len(shape_of(operand))))
    value = operand
    while value is not weight:
        op = value.owner
        if isinstance(op, stablehlo.TransposeOp):
            permutation = ints(op.permutation)
            positions = [permutation[d] for d in positions]
        assert not isinstance(op, stablehlo.ReshapeOp)
        value = op.operands[0]  # type: ignore[union-attr]
    kept = [position for d, position in enumerate(positions) if d not in contracted]
    return kept == sorted(kept)


def _bias_of(linear: Linear, parameters: Parameters) -> tuple[SSAValue, SSAValue] | None:
    """A parameter [num_out] that is added to the product and nothing else reads the product; and the sum."""
    root = linear.root
    use = sole_use(root)
    if use is not None and isinstance(use.operation, stablehlo.ConvertOp):
        before, root = precision(root.type) or 0, use.operation.results[0]
        bits = precision(root.type)
        use = sole_use(root) if bits is not None and bits <= before else None
    if use is None or not isinstance(use.operation, stablehlo.AddOp) or linear.weight_first:
        return None
    shape = shape_of(root)
    vector, index = peel(use.operation.operands[1 - use.index], identity(shape))
    if vector not in parameters or precision(vector.type) is None:
        return None
    kept = [d for d in nontrivial(shape) if d >= len(linear.x_kept)]
    if prod(shape_of(vector)) != linear.num_out or [index[d] for d in nontrivial(shape_of(vector))] != kept:
        return None
    return vector, use.operation.results[0]


def _flat(builder: OpBuilder, value: SSAValue, shape: Sequence[int]) -> SSAValue:
    """`value` as `shape`, without a reshape of a reshape."""
    if shape_of(value) == tuple(shape):
        return value
    while isinstance(value.owner, stablehlo.ReshapeOp):
        value = value.owner.operands[0]
    return builder.reshape(value, shape)


def build(linear: Linear, bias: SSAValue | None, root: SSAValue) -> None:
    """Put the op in the place of `root`: the product, or its sum with the bias."""
    op = root.owner
    assert isinstance(op, stablehlo.DotGeneralOp | stablehlo.AddOp)
    product = linear.root.owner
    assert isinstance(product, stablehlo.DotGeneralOp)
    builder = OpBuilder(op, product.attributes.get("llmir.loc"))
    leading = [shape_of(linear.x)[d] for d in linear.x_kept]
    x = builder.transpose(linear.x, [*linear.x_kept, *linear.x_contracted])
    x = builder.reshape(x, [*leading, linear.num_in])
    sizes = (linear.num_in, linear.num_out)
    weight = _flat(builder, linear.weight, sizes[::-1] if linear.transpose_w else sizes)
    result = llm.LinearOp(
        x,
        builder.convert(weight, linear.converted_to),
        None if bias is None else _flat(builder, bias, sizes[1:]),
        result_type=tensor([*leading, linear.num_out], element(root)),
        transpose_w=linear.transpose_w,
    )
    value: SSAValue = builder.insert(result).results[0]
    if linear.weight_first:
        value = builder.transpose(value, [len(leading), *range(len(leading))])
    replace(root, builder.reshape(value, shape_of(root)))


def raise_linears(module: ModuleOp) -> int:
    """Raise every product of @main with a parameter, in place; returns how many were raised."""
    main = main_function(module)
    parameters = Parameters.of(main)
    count = 0
    for op in [op for op in main.body.block.ops if isinstance(op, stablehlo.DotGeneralOp)]:
        linear = linear_of(op, parameters)
        if linear is None:
            continue
        with_bias = _bias_of(linear, parameters)
        if with_bias is None:
            build(linear, None, linear.root)
        else:
            build(linear, *with_bias)
        count += 1
    return count


@dataclass(frozen=True)
class RaiseLinearPass(ModulePass):
    """Products with a parameter."""

    name = "raise-linear"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        raise_linears(op)
