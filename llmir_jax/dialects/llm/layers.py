"""The layers around attention that later passes fuse: norms, rotary positions, linear layers, gated MLPs."""

from xdsl.dialects.builtin import BoolAttr, FloatAttr, IntegerAttr, StringAttr, TensorType, f32, i64
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    prop_def,
    result_def,
    traits_def,
)
from xdsl.traits import Pure

from .common import (
    LLMOp,
    bool_of,
    check_finite,
    check_float,
    check_one_of,
    check_positive_float,
    check_same_type,
    check_shapes,
    fail,
    int_of,
    maybe,
)

FALSE = BoolAttr.from_bool(False)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@irdl_op_definition
class RMSNormOp(LLMOp):
    """Root-mean-square norm over the last dimension: x / sqrt(mean(x²) + epsilon) · (offset + w), in float32.

    ```mlir
    %y = llm.rms_norm %x, %w {epsilon = 1.000000e-05 : f32}
           : (tensor<7x576xbf16>, tensor<576xf32>) -> tensor<7x576xbf16>
    ```

    x is [..., C], w [C]. ``offset`` is 0 unless said otherwise; Gemma's norms multiply by 1 + w.
    """

    name = "llm.rms_norm"

    x = operand_def(TensorType)
    w = operand_def(TensorType)

    epsilon = prop_def(FloatAttr)
    offset = prop_def(FloatAttr, default_value=FloatAttr(0.0, f32))

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, w: SSAValue | Operation, *, epsilon: float, offset: float = 0.0) -> None:
        super().__init__(
            operands=[x, w],
            result_types=[x.type],
            properties={"epsilon": FloatAttr(epsilon, f32), "offset": FloatAttr(offset, f32)},
        )

    def check(self) -> None:
        check_float(x=self.x, w=self.w)
        check_positive_float("epsilon", self.epsilon)
        check_finite("offset", self.offset)
        check_shapes({"x": (self.x, ("...", "C")), "w": (self.w, ("C",))})
        check_same_type("output", self.output, "x", self.x)


@irdl_op_definition
class LayerNormOp(LLMOp):
    """Layer norm over the last dimension: (x − mean(x)) / sqrt(var(x) + epsilon) · w + b, in float32.

    ```mlir
    %y = llm.layer_norm %x, %w, %b {epsilon = 1.000000e-05 : f32}
           : (tensor<7x768xf32>, tensor<768xf32>, tensor<768xf32>) -> tensor<7x768xf32>
    ```

    x is [..., C], w and b [C].
    """

    name = "llm.layer_norm"

    x = operand_def(TensorType)
    w = operand_def(TensorType)
    b = operand_def(TensorType)

    epsilon = prop_def(FloatAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(self, x: SSAValue, w: SSAValue | Operation, b: SSAValue | Operation, *, epsilon: float) -> None:
        super().__init__(
            operands=[x, w, b],
            result_types=[x.type],
            properties={"epsilon": FloatAttr(epsilon, f32)},
        )

    def check(self) -> None:
        check_float(x=self.x, w=self.w, b=self.b)
        check_positive_float("epsilon", self.epsilon)
        check_shapes({"x": (self.x, ("...", "C")), "w": (self.w, ("C",)), "b": (self.b, ("C",))})
        check_same_type("output", self.output, "x", self.x)


@irdl_op_definition
class RopeOp(LLMOp):
    """Rotary positions: the first ``rotary_dim`` features of each head are rotated in pairs by each row's angles.

    ```mlir
    %y = llm.rope %x, %cos, %sin {interleaved = false, rotary_dim = 64 : i64}
           : (tensor<7x9x64xf32>, tensor<7x32xf32>, tensor<7x32xf32>) -> tensor<7x9x64xf32>
    ```

    x is [T, H, D], cos and sin [T, rotary_dim / 2]. A pair (a, b) becomes (a·cos − b·sin, b·cos + a·sin). Pair i is
    features i and i + rotary_dim / 2, or, where ``interleaved``, 2i and 2i + 1. Features from ``rotary_dim`` on stay.
    """

    name = "llm.rope"

    x = operand_def(TensorType)
    cos = operand_def(TensorType)
    sin = operand_def(TensorType)

    interleaved = prop_def(BoolAttr, default_value=FALSE)
    rotary_dim = prop_def(IntegerAttr)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        x: SSAValue,
        cos: SSAValue | Operation,
        sin: SSAValue | Operation,
        *,
        rotary_dim: int,
        interleaved: bool = False,
    ) -> None:
        super().__init__(
            operands=[x, cos, sin],
            result_types=[x.type],
            properties={
                "interleaved": BoolAttr.from_bool(interleaved),
                "rotary_dim": IntegerAttr(rotary_dim, i64),
            },
        )

    def check(self) -> None:
        check_float(x=self.x, cos=self.cos, sin=self.sin)
        rotary_dim = int_of(self.rotary_dim)
        if rotary_dim <= 0 or rotary_dim % 2:
            fail("rotary_dim", "a positive even number", rotary_dim)
        sizes = check_shapes(
            {
                "x": (self.x, ("T", "H", "D")),
                "cos": (self.cos, ("T", rotary_dim // 2)),
                "sin": (self.sin, ("T", rotary_dim // 2)),
            }
        )
        if 0 <= sizes["D"] < rotary_dim:
            fail("rotary_dim", f"at most the head dim {sizes['D']}", rotary_dim)
        check_same_type("output", self.output, "x", self.x)


@irdl_op_definition
class LinearOp(LLMOp):
    """A linear layer: x·w + b, or x·wᵀ + b where ``transpose_w``.

    ```mlir
    %y = llm.linear %x, %w, %b : (tensor<7x576xbf16>, tensor<576x1536xbf16>, tensor<1536xf32>) -> tensor<7x1536xf32>
    %y = llm.linear %x, %w {transpose_w = true} : (tensor<7x576xbf16>, tensor<1536x576xbf16>) -> tensor<7x1536xbf16>
    ```

    x is [..., K], w [K, N] ([N, K] where ``transpose_w``), b [N], the result [..., N]. The sum is accumulated in
    float32 or the result's element type, whichever is wider, and converted to the latter after the bias is added.
    """

    name = "llm.linear"

    x = operand_def(TensorType)
    w = operand_def(TensorType)
    b = opt_operand_def(TensorType)

    transpose_w = prop_def(BoolAttr, default_value=FALSE)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        x: SSAValue | Operation,
        w: SSAValue | Operation,
        b: SSAValue | Operation | None = None,
        *,
        result_type: Attribute,
        transpose_w: bool = False,
    ) -> None:
        super().__init__(
            operands=[x, w, maybe(b)],
            result_types=[result_type],
            properties={"transpose_w": BoolAttr.from_bool(transpose_w)},
        )

    def check(self) -> None:
        check_float(x=self.x, w=self.w, b=self.b, output=self.output)
        check_shapes(
            {
                "x": (self.x, ("...", "K")),
                "w": (self.w, ("N", "K") if bool_of(self.transpose_w) else ("K", "N")),
                "b": (self.b, ("N",)),
                "output": (self.output, ("...", "N")),
            }
        )


@irdl_op_definition
class GatedMLPOp(LLMOp):
    """A gated MLP: (activation(x·gate) ⊙ (x·up))·down, without biases.

    ```mlir
    %y = llm.gated_mlp %x, %gate, %up, %down {activation = "silu"}
           : (tensor<7x576xf32>, tensor<576x1536xf32>, tensor<576x1536xf32>, tensor<1536x576xf32>) -> tensor<7x576xf32>
    ```

    x is [..., C], gate and up [C, F], down [F, O], the result [..., O]; where ``transpose_gate``, ``transpose_up`` or
    ``transpose_down``, that weight is stored the other way round. ``activation`` is silu, gelu (exact, by erf),
    gelu_tanh or relu. Products are accumulated in float32 and rounded to x's element type; the activation and its
    product with x·up are of that type too.
    """

    name = "llm.gated_mlp"

    x = operand_def(TensorType)
    gate_w = operand_def(TensorType)
    up_w = operand_def(TensorType)
    down_w = operand_def(TensorType)

    activation = prop_def(StringAttr)
    transpose_gate = prop_def(BoolAttr, default_value=FALSE)
    transpose_up = prop_def(BoolAttr, default_value=FALSE)
    transpose_down = prop_def(BoolAttr, default_value=FALSE)

    output = result_def(TensorType)

    traits = traits_def(Pure())

    def __init__(
        self,
        x: SSAValue | Operation,
        gate_w: SSAValue | Operation,
        up_w: SSAValue | Operation,
        down_w: SSAValue | Operation,
        *,
        result_type: Attribute,
        activation: str,
        transpose_gate: bool = False,
        transpose_up: bool = False,
        transpose_down: bool = False,
    ) -> None:
        super().__init__(
            operands=[x, gate_w, up_w, down_w],
            result_types=[result_type],
            properties={
                "activation": StringAttr(activation),
                "transpose_gate": BoolAttr.from_bool(transpose_gate),
                "transpose_up": BoolAttr.from_bool(transpose_up),
                "transpose_down": BoolAttr.from_bool(transpose_down),
            },
        )

    def check(self) -> None:
        check_float(x=self.x, gate_w=self.gate_w, up_w=self.up_w, down_w=self.down_w, output=self.output)
        check_one_of("activation", self.activation, ACTIVATIONS)
        check_shapes(
            {
                "x": (self.x, ("...", "C")),
                "gate_w": (self.gate_w, ("F", "C") if bool_of(self.transpose_gate) else ("C", "F")),
                "up_w": (self.up_w, ("F", "C") if bool_of(self.transpose_up) else ("C", "F")),
                "down_w": (self.down_w, ("O", "F") if bool_of(self.transpose_down) else ("F", "O")),
                "output": (self.output, ("...", "O")),
            }
        )
