"""Quantizing, dequantizing, and matmuls with quantized weights."""

from collections.abc import Sequence
from typing import ClassVar

from xdsl.dialects.builtin import (
    AnyFloat,
    BoolAttr,
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    FloatAttr,
    IntegerAttr,
    IntegerType,
    Signedness,
    StringAttr,
    TensorType,
    f32,
    i64,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    BaseAttr,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from llmir_jax.quantization.statistics import NUM_BINS

from .common import (
    Dim,
    LLMOp,
    bool_of,
    check_float,
    check_int32,
    check_one_of,
    check_shapes,
    dims_agree,
    fail,
    format_dims,
    int_of,
    maybe,
    optional_i32,
    tensor_of,
)
from .layers import FALSE
from .types import MixedQuantizedTensorType, QuantizedTensorType

SCALE = BaseAttr(FloatAttr) | BaseAttr(DenseIntOrFPElementsAttr)
ZERO_POINT = BaseAttr(IntegerAttr) | BaseAttr(DenseIntOrFPElementsAttr)

QuantizedType = QuantizedTensorType | MixedQuantizedTensorType


def _storage_width(quantized: Attribute, subject: str) -> int:
    """Bits of the stored integers, the wide ones of a mixed tensor."""
    element_type: Attribute
    if isinstance(quantized, MixedQuantizedTensorType):
        element_type = quantized.element_type.wide
    elif isinstance(quantized, QuantizedTensorType | TensorType):
        element_type = quantized.element_type
    else:
        fail(subject, "a tensor of integers or a quantized tensor", quantized)
    if not isinstance(element_type, IntegerType):
        fail(subject, "integer elements", element_type)
    return int(element_type.width.data)


def _check_bits(bits: Attribute | None, width: int) -> None:
    if bits is not None and int_of(bits) != width:
        fail("bits", f"{width}, the width of the stored integers", int_of(bits))


def _check_channel_values(subject: str, attr: Attribute, num_channels: int, is_float: bool) -> None:
    """Check a number, or a dense tensor of one number a channel (the last dimension) or of one for all."""
    if not isinstance(attr, DenseIntOrFPElementsAttr):
        return
    if isinstance(attr.type.element_type, AnyFloat) != is_float:
        fail(subject, "floating-point numbers" if is_float else "integers", attr.type)
    shape = attr.type.get_shape()
    if shape and not dims_agree(shape, (num_channels,)):
        fail(subject, f"one number, or one for each of the {num_channels} channels", format_dims(shape))


def _numbers(attr: Attribute) -> Sequence[int | float]:
    if isinstance(attr, IntegerAttr):
        return [int_of(attr)]
    if isinstance(attr, FloatAttr):
        return [attr.value.data]
    assert isinstance(attr, DenseIntOrFPElementsAttr)
    return [value for value in attr.get_values() if isinstance(value, int | float)]


def _check_scale_attributes(
    scale: Attribute | None, zero_point: Attribute | None, values: SSAValue, storage: IntegerType
) -> None:
    """Check the scale and zero point of a plain tensor of integers, given as attributes."""
    if scale is None:
        raise VerifyException("scale: expected a number or a tensor of them for a plain tensor of integers, got none")
    num_channels = tensor_of(values, "x").get_shape()[-1] if tensor_of(values, "x").get_shape() else 1
    _check_channel_values("scale", scale, num_channels, True)
    if not all(0 < number < float("inf") for number in _numbers(scale)):
        fail("scale", "positive finite numbers", scale)
    if zero_point is None:
        return
    _check_channel_values("zero_point", zero_point, num_channels, False)
    low, high = storage_range(storage)
    if not all(low <= number <= high for number in _numbers(zero_point)):
        fail("zero_point", f"between {low} and {high}, as {storage} stores", zero_point)


def storage_range(storage: IntegerType) -> tuple[int, int]:
    """The least and the greatest integer that a storage type holds; signless integers are signed."""
    width = storage.width.data
    if storage.signedness.data == Signedness.UNSIGNED:
        return 0, 2**width - 1
    return -(2 ** (width - 1)), 2 ** (width - 1) - 1


@irdl_op_definition
class QuantizeOp(LLMOp):
    """Floats to integers, by scales that are given or that are found from the values.

    ```mlir
    %q = llm.quantize(%x) {scale = dense<0.01> : tensor<256xf32>, zero_point = dense<-2> : tensor<256xi8>,
                           bits = 8 : i32, symmetric = false} : (tensor<4x256xf16>) -> tensor<4x256xi8>
    %q = llm.quantize(%x) : (tensor<4x1024xf32>)
           -> !llm.quantized_tensor<4x1024xi8, scale=f32, zp=i8, group_size=128>
    %q = llm.quantize(%x) {wide_rows = array<i64: 0, 3>}
           : (tensor<4x1024xf32>) -> !llm.mixed_quantized_tensor<4x1024x!llm.mixed<i8,i4>, scale=f32>
    ```

    To a plain tensor: q = clamp(round(x / scale) + zero_point), rounding half to even, with one ``scale`` and
    ``zero_point`` for all or one for each index of the last dimension. ``symmetric = true`` promises no zero point.

    To a quantized tensor, each group by its own values, with b bits stored: symmetric, s = max|x| / (2^(b-1) − 1);
    with ``zp``, s = (max(x, 0) − min(x, 0)) / (2^b − 1) and z puts min(x, 0) at −2^(b-1); with ``min``, m = min(x) and
    s = (max(x) − m) / (2^b − 1). To a mixed tensor: symmetric, a scale a row, where the rows ``wide_rows`` use the
    wide type's range and all others the narrow one's. ``bits`` and ``symmetric``, where given, repeat the result's
    type.
    """

    name = "llm.quantize"
    PARENTHESIZED: ClassVar = True

    x = operand_def(TensorType)

    scale = opt_prop_def(SCALE)
    zero_point = opt_prop_def(ZERO_POINT)
    bits = opt_prop_def(IntegerAttr)
    symmetric = opt_prop_def(BoolAttr)
    wide_rows = opt_prop_def(DenseArrayBase)

    output = result_def(TensorType | QuantizedTensorType | MixedQuantizedTensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        x: SSAValue | Operation,
        *,
        result_type: Attribute,
        scale: float | DenseIntOrFPElementsAttr | None = None,
        zero_point: IntegerAttr[IntegerType] | DenseIntOrFPElementsAttr | None = None,
        wide_rows: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            operands=[x],
            result_types=[result_type],
            properties={
                "scale": FloatAttr(scale, f32) if isinstance(scale, int | float) else scale,
                "zero_point": zero_point,
                "bits": optional_i32(_storage_width(result_type, "result")),
                "wide_rows": None if wide_rows is None else DenseArrayBase.from_list(i64, wide_rows),
            },
        )

    def check(self) -> None:
        check_float(x=self.x)
        output_type = self.output.type
        _check_bits(self.bits, _storage_width(output_type, "result"))
        if (self.wide_rows is not None) != isinstance(output_type, MixedQuantizedTensorType):
            fail("wide_rows", "row numbers for a mixed quantized tensor, and for nothing else", output_type)
        if isinstance(output_type, TensorType):
            self._verify_given()
        else:
            assert isinstance(output_type, QuantizedTensorType | MixedQuantizedTensorType)
            self._verify_found(output_type)

    def _verify_given(self) -> None:
        output = tensor_of(self.output, "result")
        assert isinstance(output.element_type, IntegerType)
        shape = tensor_of(self.x, "x").get_shape()
        if not dims_agree(shape, output.get_shape()):
            fail("result", f"the shape of x, {format_dims(shape)}", format_dims(output.get_shape()))
        _check_scale_attributes(self.scale, self.zero_point, self.x, output.element_type)
        if self.symmetric is None:
            return
        has_zero_point = self.zero_point is not None and any(_numbers(self.zero_point))
        if bool_of(self.symmetric) == has_zero_point:
            expected = "no zero_point, or zero" if has_zero_point else "a zero_point that is not all zero"
            fail(f"symmetric = {str(bool_of(self.symmetric)).lower()}", expected, self.zero_point or "none")

    def _verify_found(self, output_type: QuantizedType) -> None:
        if self.scale is not None or self.zero_point is not None:
            raise VerifyException(f"scale: expected none for {output_type}, whose scales are found from the values")
        check_shapes({"x": (self.x, output_type.get_shape())})
        is_symmetric = isinstance(output_type, MixedQuantizedTensorType) or output_type.is_symmetric
        if self.symmetric is not None and bool_of(self.symmetric) != is_symmetric:
            fail("symmetric", f"{str(is_symmetric).lower()}, as the result's type says", self.symmetric)
        if self.wide_rows is None:
            return
        num_rows = output_type.get_shape()[0]
        rows = self.wide_rows.get_values()
        if len(set(rows)) != len(rows) or not all(0 <= row < num_rows for row in rows):
            fail("wide_rows", f"different numbers between 0 and {num_rows - 1}", list(rows))


@irdl_op_definition
class DequantizeOp(LLMOp):
    """Integers back to floats: the inverse of `QuantizeOp`, up to rounding.

    ```mlir
    %x = llm.dequantize(%q) {scale = dense<0.01> : tensor<256xf32>, zero_point = dense<-2> : tensor<256xi8>}
           : (tensor<4x256xi8>) -> tensor<4x256xf16>
    %x = llm.dequantize(%q)
           : (!llm.quantized_tensor<4x1024xi4, scale=f32, min=f32, group_size=32>) -> tensor<4x1024xf32>
    ```

    From a plain tensor x = (q − zero_point)·scale; from a quantized tensor as its type says. The arithmetic is in
    float32.
    """

    name = "llm.dequantize"
    PARENTHESIZED: ClassVar = True

    q = operand_def(TensorType | QuantizedTensorType | MixedQuantizedTensorType)

    scale = opt_prop_def(SCALE)
    zero_point = opt_prop_def(ZERO_POINT)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        q: SSAValue | Operation,
        *,
        result_type: Attribute,
        scale: float | DenseIntOrFPElementsAttr | None = None,
        zero_point: IntegerAttr[IntegerType] | DenseIntOrFPElementsAttr | None = None,
    ) -> None:
        super().__init__(
            operands=[q],
            result_types=[result_type],
            properties={
                "scale": FloatAttr(scale, f32) if isinstance(scale, int | float) else scale,
                "zero_point": zero_point,
            },
        )

    def check(self) -> None:
        check_float(result=self.output)
        q_type = self.q.type
        if isinstance(q_type, TensorType):
            _storage_width(q_type, "q")
            check_shapes({"result": (self.output, q_type.get_shape())})
            assert isinstance(q_type.element_type, IntegerType)
            _check_scale_attributes(self.scale, self.zero_point, self.q, q_type.element_type)
            return
        assert isinstance(q_type, QuantizedTensorType | MixedQuantizedTensorType)
        if self.scale is not None or self.zero_point is not None:
            raise VerifyException(f"scale: expected none for {q_type}, which has its own")
        check_shapes({"result": (self.output, q_type.get_shape())})


@irdl_op_definition
class QuantizedMatmulOp(LLMOp):
    """x·w, or x·wᵀ where ``transpose_w``, for a weight of integers with its scales.

    ```mlir
    %y = llm.quantized_matmul(%x, %w, %scales, %zero_points) {bits = 4 : i32, group_size = 128 : i32}
           : (tensor<7x1024xf16>, tensor<1024x512xi4>, tensor<8x512xf32>, tensor<8x512xi8>) -> tensor<7x512xf16>
    %y = llm.quantized_matmul(%x, %w) {transpose_w = true}
           : (tensor<7x1024xf16>, !llm.quantized_tensor<512x1024xi4, scale=f32, symmetric=true, group_size=128>)
           -> tensor<7x512xf16>
    ```

    x is [..., K], w [K, N] ([N, K] where ``transpose_w``), the result [..., N]. Scales and zero points are [K / g, N]
    ([N, K / g] where ``transpose_w``) with a ``group_size`` of g, [N] without: weight = (w − zero_point)·scale. A
    weight of a quantized type has its own scales; its groups run along its last dimension, so ``transpose_w`` must
    hold. ``bits``, where given, repeats the width of w's integers. The sum is accumulated in float32.

    With ``activation_bits = 8`` x is quantized first, each row by its own values, or each ``activation_group_size``
    elements of it along K: s = max|x| / 127, q = round(x / s), and q·s takes the place of x. Scales that were found
    before, in ``activation_scales(%s)``, a float32 for each group (one for all without groups), serve every row; what
    is beyond 127·s is clipped.
    """

    name = "llm.quantized_matmul"
    PARENTHESIZED: ClassVar = True
    OPERAND_GROUPS: ClassVar = {"activation_scales": ("activation_scales",)}

    x = operand_def(TensorType)
    w = operand_def(TensorType | QuantizedTensorType | MixedQuantizedTensorType)
    scales = opt_operand_def(TensorType)
    zero_points = opt_operand_def(TensorType)
    activation_scales = opt_operand_def(TensorType)

    bits = opt_prop_def(IntegerAttr)
    group_size = opt_prop_def(IntegerAttr)
    transpose_w = prop_def(BoolAttr, default_value=FALSE)
    activation_bits = opt_prop_def(IntegerAttr)
    activation_group_size = opt_prop_def(IntegerAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())
    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        x: SSAValue | Operation,
        w: SSAValue,
        scales: SSAValue | Operation | None = None,
        zero_points: SSAValue | Operation | None = None,
        *,
        result_type: Attribute,
        activation_scales: SSAValue | Operation | None = None,
        group_size: int | None = None,
        transpose_w: bool = False,
    ) -> None:
        super().__init__(
            operands=[x, w, maybe(scales), maybe(zero_points), maybe(activation_scales)],
            result_types=[result_type],
            properties={
                "bits": optional_i32(_storage_width(w.type, "w")),
                "group_size": optional_i32(group_size),
                "transpose_w": BoolAttr.from_bool(transpose_w),
            },
        )

    def check(self) -> None:
        check_float(x=self.x, scales=self.scales, result=self.output)
        _check_bits(self.bits, _storage_width(self.w.type, "w"))
        self._verify_activations()
        if isinstance(self.w.type, TensorType):
            self._verify_plain()
        else:
            self._verify_quantized()

    def _verify_activations(self) -> None:
        if self.activation_bits is None:
            for name in ("activation_group_size", "activation_scales"):
                if getattr(self, name) is not None:
                    raise VerifyException(f"{name}: expected activation_bits beside it, got none")
            return
        if int_of(self.activation_bits) != 8:
            fail("activation_bits", "8", int_of(self.activation_bits))
        num_groups: Dim = 1
        if self.activation_group_size is not None:
            num_in, size = tensor_of(self.x, "x").get_shape()[-1], int_of(self.activation_group_size)
            if size <= 0 or (num_in >= 0 and num_in % size):
                fail("activation_group_size", f"a divisor of K={num_in}", size)
            num_groups = num_in // size if num_in >= 0 else "A"
        check_shapes({"activation_scales": (self.activation_scales, (num_groups,))})
        check_float(activation_scales=self.activation_scales)

    def _verify_plain(self) -> None:
        if self.scales is None:
            raise VerifyException("scales: expected a tensor of them for a plain tensor of integers, got none")
        if self.zero_points is not None:
            _storage_width(self.zero_points.type, "zero_points")
        transposed = bool_of(self.transpose_w)
        sizes = check_shapes(
            {
                "x": (self.x, ("...", "K")),
                "w": (self.w, ("N", "K") if transposed else ("K", "N")),
                "result": (self.output, ("...", "N")),
            }
        )
        scale_dims: tuple[Dim, ...] = ("N",)
        if self.group_size is not None:
            num_groups = self._num_groups(int_of(self.group_size), sizes["K"])
            scale_dims = ("N", num_groups) if transposed else (num_groups, "N")
        check_shapes({"scales": (self.scales, scale_dims), "zero_points": (self.zero_points, scale_dims)}, N=sizes["N"])

    @staticmethod
    def _num_groups(group_size: int, k: int) -> Dim:
        if group_size <= 0 or (k >= 0 and k % group_size):
            fail("group_size", f"a divisor of K={k}", group_size)
        return k // group_size if k >= 0 else "G"

    def _verify_quantized(self) -> None:
        w_type = self.w.type
        assert isinstance(w_type, QuantizedTensorType | MixedQuantizedTensorType)
        if self.scales is not None:
            raise VerifyException(f"scales: expected none for {w_type}, which has its own")
        if self.group_size is not None and not (
            isinstance(w_type, QuantizedTensorType) and w_type.elements_per_group == int_of(self.group_size)
        ):
            fail("group_size", f"that of {w_type}", int_of(self.group_size))
        if not bool_of(self.transpose_w):
            fail("transpose_w", "true for a weight of a quantized type, with groups along its last dimension", False)
        shape = w_type.get_shape()
        if len(shape) != 2:
            fail("w", "a matrix [N, K]", format_dims(shape))
        check_shapes({"x": (self.x, ("...", shape[1])), "result": (self.output, ("...", shape[0]))})


@irdl_op_definition
class QuantizedGatherOp(LLMOp):
    """Rows of a quantized matrix, dequantized: an embedding.

    ```mlir
    %x = llm.quantized_gather(%w, %ids)
           : (!llm.quantized_tensor<49152x576xi4, scale=f16, min=f16, group_size=32>, tensor<7xi32>)
           -> tensor<7x576xf32>
    ```

    w is [N, K], ids [...], the result [..., K]: row ids[i] of w, as its type says, in float32, converted to the
    result's element type. Ids outside of [0, N) take the nearest row, as ``stablehlo.gather`` does.
    """

    name = "llm.quantized_gather"
    PARENTHESIZED: ClassVar = True

    w = operand_def(QuantizedTensorType | MixedQuantizedTensorType)
    ids = operand_def(TensorType)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, w: SSAValue, ids: SSAValue | Operation, *, result_type: Attribute) -> None:
        super().__init__(operands=[w, ids], result_types=[result_type])

    def check(self) -> None:
        check_float(result=self.output)
        w_type = self.w.type
        assert isinstance(w_type, QuantizedTensorType | MixedQuantizedTensorType)
        shape = w_type.get_shape()
        if len(shape) != 2:
            fail("w", "a matrix [N, K]", format_dims(shape))
        ids_type = tensor_of(self.ids, "ids")
        if not isinstance(ids_type.element_type, IntegerType):
            fail("ids", "integer elements", ids_type.element_type)
        check_shapes({"ids": (self.ids, ("...",)), "result": (self.output, ("...", shape[1]))})


OBSERVED = ("absmax", "gram", "histogram")


@irdl_op_definition
class ObserveOp(LLMOp):
    """What calibration wants to know of the values that flow through a model.

    ```mlir
    %m = llm.observe %x {statistic = "absmax"} : (tensor<1x512x576xf32>) -> tensor<576xf32>
    %g = llm.observe %x {statistic = "gram"} : (tensor<1x512x576xf32>) -> tensor<576x576xf32>
    %h = llm.observe %x {statistic = "histogram"} : (tensor<1x512x576xf32>) -> tensor<576x320xi32>
    ```

    x is [..., K]; every row counts. ``absmax`` is the greatest |x| of each channel, ``gram`` the sum over rows of x·xᵀ,
    ``histogram`` how many of a channel's |x| are in each of the bins of `llmir_jax.quantization.statistics`.
    """

    name = "llm.observe"

    x = operand_def(TensorType)

    statistic = prop_def(StringAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, x: SSAValue | Operation, statistic: str, *, result_type: Attribute) -> None:
        super().__init__(operands=[x], result_types=[result_type], properties={"statistic": StringAttr(statistic)})

    def check(self) -> None:
        check_float(x=self.x)
        check_one_of("statistic", self.statistic, OBSERVED)
        dims: dict[str, tuple[Dim, ...]] = {"absmax": ("K",), "gram": ("K", "K"), "histogram": ("K", NUM_BINS)}
        check_shapes({"x": (self.x, ("...", "K")), "result": (self.output, dims[self.statistic.data])})
        if self.statistic.data == "histogram":
            check_int32(result=self.output)
        else:
            check_float(result=self.output)
