"""StableHLO and CHLO operations that xdsl-jax does not define, or defines wrongly, and that passes must understand.

``StableHLO`` here is xdsl-jax's dialect with ours added to it; load this one in place of xdsl-jax's. ``PadOp`` replaces
xdsl-jax's, which refuses to pad anything but 32-bit integers.
Specification: https://github.com/openxla/stablehlo/blob/main/docs/spec.md
"""

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

from xdsl.dialects.builtin import AnyTensorType, DenseArrayBase, IntegerAttr, TensorType, i32, i64
from xdsl.ir import Attribute, Dialect, SSAValue
from xdsl.irdl import (
    AtLeast,
    IRDLOperation,
    VarConstraint,
    base,
    eq,
    irdl_op_definition,
    operand_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException
from xdsl_jax.dialects.stablehlo import StableHLO as BaseStableHLO


def _tensor(value: SSAValue) -> TensorType[Attribute]:
    assert isinstance(value.type, TensorType)
    return value.type


@irdl_op_definition
class DynamicUpdateSliceOp(IRDLOperation):
    """
    `operand` with the slice that starts at `start_indices` replaced by `update`. Indices are clamped so that the
    slice lies inside the operand.

    See: https://github.com/openxla/stablehlo/blob/main/docs/spec.md#dynamic_update_slice

    Example:
    ```mlir
    %result = stablehlo.dynamic_update_slice %operand, %update, %i, %j
        : (tensor<4x4xi32>, tensor<2x2xi32>, tensor<i64>, tensor<i64>) -> tensor<4x4xi32>
    ```
    """

    name = "stablehlo.dynamic_update_slice"

    operand = operand_def(AnyTensorType)
    update = operand_def(AnyTensorType)
    start_indices = var_operand_def(AnyTensorType)
    result = result_def(AnyTensorType)

    traits = traits_def(Pure())

    assembly_format = "operands attr-dict `:` functional-type(operands, results)"

    def __init__(self, operand: SSAValue, update: SSAValue, start_indices: Sequence[SSAValue]):
        super().__init__(operands=(operand, update, start_indices), result_types=(operand.type,))

    def verify_(self) -> None:
        operand, update, result = _tensor(self.operand), _tensor(self.update), _tensor(self.result)
        if result != operand:
            raise VerifyException(f"result type {result} must be the operand's type {operand}")
        if update.element_type != operand.element_type:
            raise VerifyException(f"update elements {update.element_type} must be {operand.element_type}")
        rank = len(operand.get_shape())
        if len(update.get_shape()) != rank or len(self.start_indices) != rank:
            raise VerifyException(
                f"operand of rank {rank} needs an update of that rank and as many start indices, "
                f"got rank {len(update.get_shape())} and {len(self.start_indices)} indices"
            )
        if any(u > o >= 0 for u, o in zip(update.get_shape(), operand.get_shape(), strict=True)):
            raise VerifyException(f"update {update} does not fit into operand {operand}")


@irdl_op_definition
class PadOp(IRDLOperation):
    """
    `operand` with `padding_value` around and between its elements. Negative edge padding removes elements.

    See: https://github.com/openxla/stablehlo/blob/main/docs/spec.md#pad

    Example:
    ```mlir
    %result = stablehlo.pad %operand, %padding_value, low = [0, 1], high = [2, 1], interior = [1, 0]
        : (tensor<2x3xf32>, tensor<f32>) -> tensor<5x5xf32>
    ```
    """

    name = "stablehlo.pad"

    operand = operand_def(AnyTensorType)
    padding_value = operand_def(AnyTensorType)
    edge_padding_low = prop_def(DenseArrayBase.constr(i64))
    edge_padding_high = prop_def(DenseArrayBase.constr(i64))
    interior_padding = prop_def(DenseArrayBase.constr(i64))
    result = result_def(AnyTensorType)

    traits = traits_def(Pure())

    assembly_format = (
        "$operand `,` $padding_value `,` `low` `=` $edge_padding_low `,` `high` `=` $edge_padding_high `,` "
        "`interior` `=` $interior_padding attr-dict `:` functional-type(operands, results)"
    )

    def __init__(
        self,
        operand: SSAValue,
        padding_value: SSAValue,
        edge_padding_low: Sequence[int],
        edge_padding_high: Sequence[int],
        interior_padding: Sequence[int],
    ):
        operand_type = _tensor(operand)
        paddings = zip(operand_type.get_shape(), edge_padding_low, edge_padding_high, interior_padding, strict=True)
        shape = [_padded(*padding) for padding in paddings]
        super().__init__(
            operands=(operand, padding_value),
            properties={
                "edge_padding_low": DenseArrayBase.from_list(i64, edge_padding_low),
                "edge_padding_high": DenseArrayBase.from_list(i64, edge_padding_high),
                "interior_padding": DenseArrayBase.from_list(i64, interior_padding),
            },
            result_types=(TensorType(operand_type.element_type, shape),),
        )

    def verify_(self) -> None:
        operand, value = _tensor(self.operand), _tensor(self.padding_value)
        low, high = self.edge_padding_low.get_values(), self.edge_padding_high.get_values()
        interior, shape = self.interior_padding.get_values(), operand.get_shape()
        if value != TensorType(operand.element_type, []):
            raise VerifyException(f"padding_value must be a scalar of {operand.element_type}, got {value}")
        if not len(low) == len(high) == len(interior) == len(shape):
            raise VerifyException(
                f"low, high and interior must have one value for each of the {len(shape)} dimensions, "
                f"got {len(low)}, {len(high)} and {len(interior)}"
            )
        if any(inner < 0 for inner in interior):
            raise VerifyException(f"interior padding {list(interior)} must not be negative")
        padded = [_padded(*padding) for padding in zip(shape, low, high, interior, strict=True)]
        if self.result.type != TensorType(operand.element_type, padded):
            raise VerifyException(
                f"result must be {TensorType(operand.element_type, padded)} for operand {operand}, "
                f"got {self.result.type}"
            )


def _padded(dim: int, low: int, high: int, interior: int) -> int:
    return dim if dim < 0 else low + dim + max(dim - 1, 0) * interior + high


@irdl_op_definition
class ReverseOp(IRDLOperation):
    """
    `operand` with the order of its elements reversed along `dimensions`.

    See: https://github.com/openxla/stablehlo/blob/main/docs/spec.md#reverse

    Example:
    ```mlir
    %result = stablehlo.reverse %operand, dims = [1] : tensor<3x2xi32>
    ```
    """

    name = "stablehlo.reverse"

    T: ClassVar = VarConstraint("T", base(TensorType))

    operand = operand_def(T)
    dimensions = prop_def(DenseArrayBase.constr(i64))
    result = result_def(T)

    traits = traits_def(Pure())

    assembly_format = "$operand `,` `dims` `=` $dimensions attr-dict `:` type($result)"

    def __init__(self, operand: SSAValue, dimensions: Sequence[int]):
        super().__init__(
            operands=(operand,),
            properties={"dimensions": DenseArrayBase.from_list(i64, dimensions)},
            result_types=(operand.type,),
        )

    def verify_(self) -> None:
        rank, dims = len(_tensor(self.operand).get_shape()), self.dimensions.get_values()
        if len(set(dims)) != len(dims) or any(not 0 <= dim < rank for dim in dims):
            raise VerifyException(f"dimensions {list(dims)} must be unique and inside rank {rank}")


@irdl_op_definition
class TopKOp(IRDLOperation):
    """
    The `k` largest elements along the last dimension, in descending order, and their indices (i32).

    See: https://openxla.org/stablehlo/generated/chlo#chlotop_k_chlotopkop

    Example:
    ```mlir
    %values, %indices = chlo.top_k(%operand, k = 8) : tensor<16x16xf32> -> (tensor<16x8xf32>, tensor<16x8xi32>)
    ```
    """

    name = "chlo.top_k"

    operand = operand_def(AnyTensorType)
    k = prop_def(IntegerAttr.constr(type=eq(i64), value=AtLeast(0)))
    values = result_def(AnyTensorType)
    indices = result_def(AnyTensorType)

    traits = traits_def(Pure())

    assembly_format = (
        "`(` $operand `,` `k` `=` $k `)` attr-dict `:` type($operand) `->` `(` type($values) `,` type($indices) `)`"
    )

    def __init__(self, operand: SSAValue, k: int):
        operand_type = _tensor(operand)
        shape = (*operand_type.get_shape()[:-1], k)
        super().__init__(
            operands=(operand,),
            properties={"k": IntegerAttr(k, i64)},
            result_types=(TensorType(operand_type.element_type, shape), TensorType(i32, shape)),
        )

    def verify_(self) -> None:
        operand, k = _tensor(self.operand), self.k.value.data
        shape = operand.get_shape()
        if not shape or 0 <= shape[-1] < k:
            raise VerifyException(f"k = {k} exceeds the last dimension of {operand}")
        expected = (*shape[:-1], k)
        for name, result, element_type in (
            ("values", self.values, operand.element_type),
            ("indices", self.indices, i32),
        ):
            if result.type != TensorType(element_type, expected):
                raise VerifyException(
                    f"{name} must be {TensorType(element_type, expected)} for operand {operand}, got {result.type}"
                )


class _ElementwiseUnaryOp(IRDLOperation, ABC):
    operand = operand_def(AnyTensorType)
    result = result_def(AnyTensorType)

    traits = traits_def(Pure())

    assembly_format = "$operand attr-dict `:` type($operand) `->` type($result)"

    def __init__(self, operand: SSAValue):
        super().__init__(operands=(operand,), result_types=(operand.type,))

    def verify_(self) -> None:
        if self.result.type != self.operand.type:
            raise VerifyException(f"result type {self.result.type} must be the operand's type {self.operand.type}")


@irdl_op_definition
class ErfOp(_ElementwiseUnaryOp):
    """
    Gauss error function of each element.

    See: https://openxla.org/stablehlo/generated/chlo#chloerf_chloerfop

    Example:
    ```mlir
    %result = chlo.erf %operand : tensor<4xf32> -> tensor<4xf32>
    ```
    """

    name = "chlo.erf"


@irdl_op_definition
class ErfcOp(_ElementwiseUnaryOp):
    """
    `1 - erf(x)` of each element, without the cancellation for large x.

    See: https://openxla.org/stablehlo/generated/chlo#chloerfc_chloerfcop

    Example:
    ```mlir
    %result = chlo.erfc %operand : tensor<4xf32> -> tensor<4xf32>
    ```
    """

    name = "chlo.erfc"


@irdl_op_definition
class SquareOp(_ElementwiseUnaryOp):
    """
    `x * x` of each element.

    See: https://openxla.org/stablehlo/generated/chlo#chlosquare_chlosquareop

    Example:
    ```mlir
    %result = chlo.square %operand : tensor<4xf32> -> tensor<4xf32>
    ```
    """

    name = "chlo.square"


StableHLO = Dialect(
    "stablehlo",
    [
        *(op for op in BaseStableHLO.operations if op.name != PadOp.name),
        DynamicUpdateSliceOp,
        PadOp,
        ReverseOp,
    ],
    [*BaseStableHLO.attributes],
)

CHLO = Dialect("chlo", [ErfOp, ErfcOp, SquareOp, TopKOp])
