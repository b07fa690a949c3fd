"""Float weights become matrices of their own: arguments [outputs, inputs] that an llm.linear or a gather of rows reads.

    @main(%w: tensor<576x1536xf32> {llmir.path = "mlp.up.kernel"}, …)      %y = llm.linear %x, %w, %b
      →
    @main(%w: tensor<1536x576xf32> {llmir.path = "mlp.up.kernel", llmir.rows = array<i64: 1536, 1>,
                                    llmir.columns = array<i64: 576, 1536>}, …)
    %product = llm.linear %x, %w {transpose_w = true}
    %y = stablehlo.add %product, %bias

A weight of 16-bit floats that is multiplied in float32 is widened where it is read. So a target that packs weights
finds all of them in one form, as those that ``weight-quantization`` made. Gated MLPs are taken apart into their linear
layers, and linear layers of one input become one, its weight the rows of all (`llmir.parts`), as
``quantized-operation-fusion`` does. What reads a parameter in another way keeps it as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, BoolAttr, IntegerAttr, ModuleOp, StringAttr, TensorType, i64
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, BlockArgument, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter
from xdsl.transforms.dead_code_elimination import dce
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import LENGTH, main_function
from llmir_jax.analysis.stored_matrix import StoredMatrix
from llmir_jax.dialects import llm, stablehlo_ext
from llmir_jax.dialects.build import OpBuilder, dense_i64, shape_of, tensor, type_of
from llmir_jax.dialects.llm.common import bool_of
from llmir_jax.transforms import signature
from llmir_jax.transforms.matching import precision, widens
from llmir_jax.transforms.quantized_operation_fusion import argument_parts
from llmir_jax.transforms.weight_quantization import COLUMNS, OFFSET, PARTS, ROWS, WeightUse, find_uses


def _linear(builder: OpBuilder, x: SSAValue, w: SSAValue, transposed: Attribute, num_out: int) -> SSAValue:
    kind = type_of(x)
    op = llm.LinearOp(x, w, result_type=tensor([*kind.get_shape()[:-1], num_out], kind.get_element_type()))
    op.properties["transpose_w"] = transposed
    return builder.insert(op).results[0]


def _activation(builder: OpBuilder, name: str, x: SSAValue) -> SSAValue:
    """The activation of a gated MLP, as its reference has it."""
    kind = type_of(x)

    def splat(value: float) -> SSAValue:
        return builder.splat(value, kind)

    if name == "silu":
        return builder.op(stablehlo.MultiplyOp, [x, builder.op(stablehlo.LogisticOp, [x], kind)], kind)
    if name == "relu":
        return builder.op(stablehlo.MaximumOp, [x, splat(0.0)], kind)
    if name == "gelu":
        scaled = builder.op(stablehlo.MultiplyOp, [x, splat(-(0.5**0.5))], kind)
        share = builder.op(stablehlo_ext.ErfcOp, [scaled], kind)
        half = builder.op(stablehlo.MultiplyOp, [x, splat(0.5)], kind)
        return builder.op(stablehlo.MultiplyOp, [half, share], kind)
    square = builder.op(stablehlo.MultiplyOp, [x, x], kind)
    cube = builder.op(stablehlo.MultiplyOp, [square, x], kind)
    term = builder.op(stablehlo.MultiplyOp, [cube, splat(0.044715)], kind)
    inner = builder.op(stablehlo.AddOp, [x, term], kind)
    scaled = builder.op(stablehlo.MultiplyOp, [inner, splat((2 / np.pi) ** 0.5)], kind)
    wave = builder.op(stablehlo.TanhOp, [scaled], kind)
    shifted = builder.op(stablehlo.AddOp, [wave, splat(1.0)], kind)
    half = builder.op(stablehlo.MultiplyOp, [x, splat(0.5)], kind)
    return builder.op(stablehlo.MultiplyOp, [half, shifted], kind)


def split_gated_mlps(main: FuncOp) -> None:
    """Gated MLPs as linear layers and elementwise operations, in place."""
    for op in list(main.body.block.ops):
        if not isinstance(op, llm.GatedMLPOp):
            continue
        builder = OpBuilder(op)
        width = shape_of(op.gate_w)[0 if bool_of(op.transpose_gate) else 1]
        gate = _linear(builder, op.x, op.gate_w, op.transpose_gate, width)
        up = _linear(builder, op.x, op.up_w, op.transpose_up, width)
        opened = _activation(builder, op.activation.data, gate)
        inner = builder.op(stablehlo.MultiplyOp, [opened, up], type_of(up))
        down = _linear(builder, inner, op.down_w, op.transpose_down, shape_of(op.output)[-1])
        op.output.replace_all_uses_with(down)
        Rewriter.erase_op(op)


def _split_bias(op: llm.LinearOp) -> None:
    bias = op.b
    if bias is None:
        return
    plain = llm.LinearOp(op.x, op.w, result_type=op.output.type)
    plain.properties["transpose_w"] = op.transpose_w
    builder = OpBuilder(op)
    product = builder.insert(plain).results[0]
    kind = type_of(op.output)
    wide = builder.broadcast(bias, kind.get_shape(), [len(kind.get_shape()) - 1])
    op.output.replace_all_uses_with(builder.op(stablehlo.AddOp, [product, wide], kind))
    Rewriter.erase_op(op)


def _add_argument(main: FuncOp, parameter: BlockArgument, matrix: StoredMatrix, element: Attribute) -> BlockArgument:
    attributes = signature.argument_attributes(main)
    entry = dict(attributes[parameter.index])
    entry[OFFSET] = IntegerAttr(matrix.offset, i64)
    for name, dims in ((ROWS, matrix.rows), (COLUMNS, matrix.columns)):
        entry[name] = dense_i64([number for axis in dims for number in axis])
    arg = main.body.block.insert_arg(tensor(matrix.shape, element), parameter.index)
    attributes.insert(arg.index, entry)
    signature.store(main, attributes)
    return arg


def _extract(main: FuncOp, parameter: BlockArgument, uses: Sequence[WeightUse]) -> None:
    arguments: dict[tuple[StoredMatrix, Attribute], BlockArgument] = {}
    stored = type_of(parameter).get_element_type()
    for use in uses:
        wanted = _element_of(use.op)
        key = use.matrix, stored if widens(stored, wanted) else wanted
        if key not in arguments:
            arguments[key] = _add_argument(main, parameter, *key)
        use.replace(OpBuilder(use.op).convert(arguments[key], wanted))


def _element_of(op: Operation) -> Attribute:
    """Of the floats that an operation multiplies, or looks up: the parameter may be kept in others."""
    value = op.x if isinstance(op, llm.LinearOp) else op.operands[0]
    element: Attribute = type_of(value).get_element_type()
    return element


def extract_matrices(module: ModuleOp) -> None:
    """Give every matrix of floats that a linear layer reads an argument of its own, in place."""
    main = main_function(module)
    tokens = next(iter(signature.arguments(main, "tokens")), None)
    attributes = signature.argument_attributes(main)
    done = {arg for arg in main.body.block.args if attributes[arg.index].keys() & {ROWS, PARTS}}
    for parameter, _ in signature.parameter_paths(main):
        if not isinstance(parameter.type, TensorType) or precision(parameter.type) is None or parameter in done:
            continue
        found = find_uses(parameter, tokens)
        uses = [use for use in found if isinstance(use, WeightUse)]
        products = [use for use in uses if isinstance(use.op, llm.LinearOp | stablehlo.DotGeneralOp)]
        if products:
            _extract(main, parameter, uses if len(uses) == len(found) else products)
    dce(module)
    for parameter, _ in signature.parameter_paths(main):
        if parameter.first_use is None:
            signature.remove_argument(main, parameter)


def merge_linears(module: ModuleOp) -> int:
    """Merge linear layers of one input whose weights are arguments; returns how many went."""
    main = main_function(module)
    length = module.attributes.get(LENGTH)
    groups: dict[SSAValue, list[llm.LinearOp]] = {}
    for op in main.body.block.ops:
        if (
            isinstance(op, llm.LinearOp)
            and isinstance(op.w, BlockArgument)
            and op.b is None
            and bool_of(op.transpose_w)
        ):
            attributes = signature.argument_attributes(main)[op.w.index]
            if (ROWS in attributes or PARTS in attributes) and len(list(op.w.uses)) == 1:
                groups.setdefault(op.x, []).append(op)
    count = 0
    for ops in groups.values():
        total = sum(shape_of(op.output)[-1] for op in ops)
        # A size that is a multiple of the length would be taken for one that follows the tokens.
        clashes = isinstance(length, IntegerAttr) and total % length.value.data == 0
        if len(ops) > 1 and not clashes:
            _merge(main, ops)
            count += len(ops) - 1
    return count


def _merge(main: FuncOp, ops: list[llm.LinearOp]) -> None:
    attributes = signature.argument_attributes(main)
    first = ops[0]
    weights = [op.w for op in ops]
    parts: list[Attribute] = []
    paths = []
    for weight in weights:
        assert isinstance(weight, BlockArgument)
        parts += argument_parts(attributes[weight.index])
        path = attributes[weight.index][signature.PATH]
        assert isinstance(path, StringAttr)
        paths.append(path.data)
    assert isinstance(first.w, BlockArgument)
    sizes = [shape_of(op.output)[-1] for op in ops]
    kind = type_of(first.output)
    merged = main.body.block.insert_arg(
        tensor((sum(sizes), shape_of(first.w)[1]), type_of(first.w).get_element_type()), first.w.index
    )
    attributes.insert(merged.index, {signature.PATH: StringAttr("+".join(paths)), PARTS: ArrayAttr(parts)})
    signature.store(main, attributes)
    builder = OpBuilder(first)
    *leading, _ = kind.get_shape()
    product = _linear(builder, first.x, merged, BoolAttr.from_bool(True), sum(sizes))
    begin = 0
    for op, size in zip(ops, sizes, strict=True):
        piece = builder.slice(product, [0] * len(leading) + [begin], [*leading, begin + size])
        op.output.replace_all_uses_with(piece)
        begin += size
    for op in ops:
        Rewriter.erase_op(op)
    for weight in weights:
        assert isinstance(weight, BlockArgument)
        signature.remove_argument(main, weight)


@dataclass(frozen=True)
class MatrixWeightsPass(ModulePass):
    """Float weights as arguments [outputs, inputs]."""

    name = "matrix-weights"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        split_gated_mlps(main)
        for linear in list(main.body.block.ops):
            if isinstance(linear, llm.LinearOp):
                _split_bias(linear)
        extract_matrices(op)
        merge_linears(op)


__all__ = ["MatrixWeightsPass", "extract_matrices", "merge_linears", "split_gated_mlps"]
