"""Weights become quantized arguments: what multiplies with them, or looks rows of them up, reads integers.

    @main(%w: tensor<576x1536xf32> {llmir.path = "mlp.up.kernel"}, …)      %y = llm.linear %x, %w
      →  rules="mlp=int4-g32-min"
    @main(%w: !llm.quantized_tensor<1536x576xi4, scale=f16, min=f16, group_size=32>
              {llmir.path = "mlp.up.kernel", llmir.rows = array<i64: 1536, 1>,
               llmir.columns = array<i64: 576, 1536>}, …)
    %y = llm.quantized_matmul(%x, %w) {transpose_w = true}

A weight is a parameter, or a slice, reshape, transpose or convert of one, that is an operand of ``llm.linear`` or of
``stablehlo.dot_general``, or a table whose rows are gathered by token: ``llm.quantized_gather``. One that is read twice
as the same matrix, tied embeddings say, is one argument. Slices of a parameter, one a layer of a stack, become an
argument each: `llmir.offset`, `llmir.rows` and `llmir.columns` tell where its elements lie in the parameter's memory
((size, stride) for each axis, see `analysis.stored_matrix`). A parameter that anything else reads stays as it is, and
`find_weights` says why.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import (
    ArrayAttr,
    DictionaryAttr,
    IntegerAttr,
    IntegerType,
    ModuleOp,
    StringAttr,
    TensorType,
    f32,
    i64,
)
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, BlockArgument, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.transforms.dead_code_elimination import dce
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.evaluate import backward_slice
from llmir_jax.analysis.stored_matrix import Dims, StoredMatrix, strided
from llmir_jax.dense import dtype_element_type
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, dense_i64, ints, shape_of, tensor, type_of
from llmir_jax.dialects.llm.common import bool_of
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import op_name
from llmir_jax.quantization import Plan, Scheme, make_plan
from llmir_jax.transforms import signature
from llmir_jax.transforms.matching import erase_unused, precision

OFFSET, ROWS, COLUMNS = "llmir.offset", "llmir.rows", "llmir.columns"
"""Attributes of a quantized argument: where its matrix lies in the parameter `llmir.path`."""
PARTS = "llmir.parts"
"""Attribute of an argument of rows of several weights: these attributes and the path of each, in order."""

_VIEWS = (
    stablehlo.SliceOp,
    stablehlo.ReshapeOp,
    stablehlo.TransposeOp,
    stablehlo.ConvertOp,
    stablehlo.BroadcastInDimOp,
)
Build = Callable[[OpBuilder, SSAValue], SSAValue]
"""Emits what takes the place of a use, given the quantized weight."""


@dataclass(frozen=True, kw_only=True)
class WeightUse:
    """An operation that reads a parameter as a matrix."""

    op: Operation
    matrix: StoredMatrix
    build: Build
    inputs: Callable[[OpBuilder], SSAValue] | None = None
    """Emits what the matrix is multiplied with, [..., K]; None where rows of it are looked up."""

    def replace(self, weight: SSAValue) -> None:
        """Read the quantized `weight` instead."""
        (root,) = self.op.results
        new = self.build(OpBuilder(self.op), weight)
        assert new.type == root.type, (new.type, root.type)
        new.name_hint = root.name_hint
        root.replace_all_uses_with(new)
        erase_unused([root])


@dataclass(kw_only=True)
class Weights:
    """The parameters of @main: how they are read as matrices, or why they are not."""

    uses: dict[str, list[WeightUse]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of every parameter."""

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the parameters that can be quantized; of several slices, the outputs of all."""
        found = {}
        for path, uses in self.uses.items():
            shapes = [matrix.shape for matrix in dict.fromkeys(use.matrix for use in uses)]
            found[path] = (sum(n for n, _ in shapes), shapes[0][1])
        return found


# -- how a parameter is read -------------------------------------------------------------------------------------------


def _readers(parameter: SSAValue) -> list[tuple[Operation, SSAValue]]:
    """Operations that read a parameter through layout operations, with the operand they read."""
    found, pending = [], [parameter]
    while pending:
        value = pending.pop()
        for use in value.uses:
            if isinstance(use.operation, _VIEWS):
                pending += use.operation.results
            else:
                found.append((use.operation, value))
    return found


def _linear(op: llm.LinearOp, value: SSAValue, parameter: BlockArgument) -> WeightUse | str:
    if value is not op.w or op.x is value:
        return f"it is read by {op.name}, but not as the weight"
    view = strided(value, frozenset({parameter}))
    if view is None:
        return "its elements are laid out anew in a way that no strides tell"
    rows, columns = (0, 1) if bool_of(op.transpose_w) else (1, 0)

    def build(builder: OpBuilder, weight: SSAValue) -> SSAValue:
        output = type_of(op.output)
        if op.b is None:
            return _matmul(builder, op.x, weight, output)
        # As llm.linear does: rounded after the bias is added.
        wide = tensor(output.get_shape(), f32)
        product = _matmul(builder, op.x, weight, wide)
        bias = builder.broadcast(builder.convert(op.b, f32), wide.get_shape(), [len(wide.get_shape()) - 1])
        return builder.convert(builder.op(stablehlo.AddOp, [product, bias], wide), output.get_element_type())

    return WeightUse(
        op=op,
        matrix=StoredMatrix(offset=view.offset, rows=view.axes([rows]), columns=view.axes([columns])),
        build=build,
        inputs=lambda builder: op.x,
    )


def _matmul(builder: OpBuilder, x: SSAValue, weight: SSAValue, result_type: Attribute) -> SSAValue:
    if isinstance(weight.type, TensorType):  # floats, for ``matrix-weights``
        return builder.insert(llm.LinearOp(x, weight, result_type=result_type, transpose_w=True)).results[0]
    return builder.insert(llm.QuantizedMatmulOp(x, weight, result_type=result_type, transpose_w=True)).results[0]


def _dot(op: stablehlo.DotGeneralOp, value: SSAValue, parameter: BlockArgument) -> WeightUse | str:
    numbers = op.dot_dimension_numbers
    if ints(numbers.lhs_batching_dimensions):
        return "it is multiplied as a batch of matrices"
    if op.lhs is value and op.rhs is value:
        return "it is multiplied with itself"
    side = 0 if op.lhs is value else 1
    x = (op.lhs, op.rhs)[1 - side]
    result = type_of(op.result[0])
    if precision(x.type) is None or precision(result) is None:
        return "it is multiplied with what are no floats"
    view = strided(value, frozenset({parameter}))
    if view is None:
        return "its elements are laid out anew in a way that no strides tell"
    contracting = [ints(numbers.lhs_contracting_dimensions), ints(numbers.rhs_contracting_dimensions)]
    if not contracting[0]:
        return "it is multiplied without a sum over its inputs"
    # Inputs in the order of memory, so that groups are the same however the product was written.
    pairs = sorted(zip(contracting[side], contracting[1 - side], strict=True), key=lambda p: -view.dims[p[0]][1])
    kept = [d for d in range(len(view.dims)) if d not in contracting[side]]
    x_shape = shape_of(x)
    x_kept = [d for d in range(len(x_shape)) if d not in contracting[1 - side]]
    matrix = StoredMatrix(offset=view.offset, rows=view.axes(kept), columns=view.axes([d for d, _ in pairs]))
    leading = [x_shape[d] for d in x_kept]

    def inputs(builder: OpBuilder) -> SSAValue:
        laid_out = builder.transpose(op.operands[1 - side], [*x_kept, *(d for _, d in pairs)])
        return builder.reshape(laid_out, [*leading, matrix.shape[1]])

    def build(builder: OpBuilder, weight: SSAValue) -> SSAValue:
        product_type = tensor([*leading, matrix.shape[0]], result.get_element_type())
        product = _matmul(builder, inputs(builder), weight, product_type)
        if side == 0:
            product = builder.transpose(product, [len(leading), *range(len(leading))])
        return builder.reshape(product, result.get_shape())

    return WeightUse(op=op, matrix=matrix, build=build, inputs=inputs)


def _gather(op: stablehlo.GatherOp, value: SSAValue, parameter: BlockArgument, tokens: SSAValue) -> WeightUse | str:
    numbers = op.dimension_numbers
    view = strided(value, frozenset({parameter})) if value is op.operand else None
    if view is None:
        return "its elements are laid out anew in a way that no strides tell"
    shape = shape_of(value)
    mapped, collapsed = ints(numbers.start_index_map), ints(numbers.collapsed_slice_dims)
    whole = [n for d, n in enumerate(shape) if d not in mapped]
    taken = [n for d, n in enumerate(ints(op.slice_sizes)) if d not in mapped]
    if len(mapped) != 1 or mapped != collapsed or whole != taken or ints(numbers.operand_batching_dims):
        return "it is gathered, but not by whole rows"
    if tokens not in backward_slice([op.start_indices], [])[1]:
        return "a table that is not looked up by token"
    indices = shape_of(op.start_indices)
    vector = numbers.index_vector_dim.value.data
    ids_shape = [n for d, n in enumerate(indices) if d != vector]
    offset_dims = ints(numbers.offset_dims)
    result = type_of(op.results[0])
    matrix = StoredMatrix(
        offset=view.offset, rows=view.axes(mapped), columns=view.axes([d for d in range(len(shape)) if d not in mapped])
    )

    def build(builder: OpBuilder, weight: SSAValue) -> SSAValue:
        source = op.start_indices
        while isinstance(source.owner, stablehlo.ReshapeOp):
            source = source.owner.operands[0]
        ids = builder.reshape(source, ids_shape)
        rows_type = tensor([*ids_shape, matrix.shape[1]], result.get_element_type())
        if isinstance(weight.type, TensorType):  # floats, for ``matrix-weights``
            rows = builder.reshape(
                builder.take(weight, builder.reshape(ids, (prod(ids_shape),)), 0), rows_type.get_shape()
            )
        else:
            rows = builder.insert(llm.QuantizedGatherOp(weight, ids, result_type=rows_type)).results[0]
        shaped = builder.reshape(rows, [*ids_shape, *whole])
        ids_first = iter(range(len(ids_shape)))
        offsets = iter(range(len(ids_shape), len(ids_shape) + len(whole)))
        order = [next(offsets) if d in offset_dims else next(ids_first) for d in range(len(result.get_shape()))]
        return builder.transpose(shaped, order)

    return WeightUse(op=op, matrix=matrix, build=build)


def _use(op: Operation, value: SSAValue, parameter: BlockArgument, tokens: SSAValue | None) -> WeightUse | str:
    """How an operation reads a parameter as a matrix, or why it does not."""
    if isinstance(op, llm.LinearOp):
        return _linear(op, value, parameter)
    if isinstance(op, stablehlo.DotGeneralOp):
        return _dot(op, value, parameter)
    if isinstance(op, stablehlo.GatherOp) and tokens is not None:
        return _gather(op, value, parameter, tokens)
    return f"it is read by {op_name(op)}"


def find_uses(parameter: BlockArgument, tokens: SSAValue | None) -> list[WeightUse | str]:
    """How each operation that reads a parameter reads it as a matrix, or why it does not."""
    return [_use(op, value, parameter, tokens) for op, value in _readers(parameter)]


def _uses(parameter: BlockArgument, tokens: SSAValue | None) -> list[WeightUse] | str:
    """All uses of a parameter, which can be quantized together, or why it cannot be."""
    if precision(parameter.type) is None:
        return "no floats"
    readers = find_uses(parameter, tokens)
    if not readers:
        return "the step does not read it"
    uses: list[WeightUse] = []
    for found in readers:
        if isinstance(found, str):
            return found
        uses.append(found)
    matrices = list(dict.fromkeys(use.matrix for use in uses))
    if len({matrix.shape[1] for matrix in matrices}) > 1 or _overlap(matrices, prod(shape_of(parameter))):
        return "it is read as different matrices"
    return uses


def _overlap(matrices: Sequence[StoredMatrix], size: int) -> bool:
    """Whether two of the matrices share an element of the parameter of `size` elements."""
    spans = sorted(span for matrix in matrices if (span := matrix.span) is not None)
    if len(spans) == len(matrices):
        return any(begin + length > following for (begin, length), (following, _) in pairwise(spans))
    taken = np.zeros(size, np.bool_)
    for matrix in matrices:
        elements = matrix.elements(taken)
        if elements.any():
            return True
        elements[...] = True
    return False


def find_weights(module: ModuleOp) -> Weights:
    """Which parameters of @main are weights, and why the others are not. Dead operations are erased first."""
    dce(module)
    main = main_function(module)
    tokens = next(iter(signature.arguments(main, "tokens")), None)
    found = Weights()
    for parameter, path in signature.parameter_paths(main):
        if not isinstance(parameter.type, TensorType):
            continue
        found.shapes[path] = shape_of(parameter)
        uses = _uses(parameter, tokens)
        if isinstance(uses, str):
            found.reasons[path] = uses
        else:
            found.uses[path] = uses
    return found


# -- rewriting ---------------------------------------------------------------------------------------------------------


def quantized_type(scheme: Scheme, shape: tuple[int, int]) -> llm.QuantizedTensorType:
    """The type of a matrix [N, K] in a scheme that fits it."""
    side = dtype_element_type(scheme.dtype)
    return llm.QuantizedTensorType(
        shape,
        IntegerType(scheme.bits),
        side,
        zero_point_type=IntegerType(8) if scheme.kind == "zero_point" else None,
        min_type=side if scheme.kind == "minimum" else None,
        group_size=None if scheme.group_size == shape[1] else scheme.group_size,
    )


def stored_matrices(attributes: Mapping[str, Attribute]) -> list[tuple[str, StoredMatrix]]:
    """The parameters that a quantized argument has the rows of, and where they lie, from the argument's attributes."""
    parts = attributes.get(PARTS)
    if isinstance(parts, ArrayAttr):
        return [pair for part in parts if isinstance(part, DictionaryAttr) for pair in stored_matrices(part.data)]
    path, offset = attributes[signature.PATH], attributes.get(OFFSET)
    assert isinstance(path, StringAttr)
    matrix = StoredMatrix(
        offset=offset.value.data if isinstance(offset, IntegerAttr) else 0,
        rows=_dims(attributes[ROWS]),
        columns=_dims(attributes[COLUMNS]),
    )
    return [(path.data, matrix)]


def _dims(attribute: Attribute) -> Dims:
    numbers = ints(attribute)
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _add_argument(main: FuncOp, parameter: BlockArgument, matrix: StoredMatrix, scheme: Scheme) -> BlockArgument:
    """A quantized argument before the parameter that it takes a matrix of."""
    attributes = signature.argument_attributes(main)
    entry = dict(attributes[parameter.index])
    if matrix.offset:
        entry[OFFSET] = IntegerAttr(matrix.offset, i64)
    entry[ROWS], entry[COLUMNS] = (
        dense_i64([n for axis in dims for n in axis]) for dims in (matrix.rows, matrix.columns)
    )
    attributes.insert(parameter.index, entry)
    new = main.body.block.insert_arg(quantized_type(scheme, matrix.shape), parameter.index)
    new.name_hint = parameter.name_hint
    signature.store(main, attributes)
    return new


def quantize_weights(module: ModuleOp, weights: Weights, schemes: dict[str, Scheme]) -> int:
    """Quantize the parameters that have a scheme, in place; returns how many arguments that gives."""
    main = main_function(module)
    count = 0
    for parameter, path in signature.parameter_paths(main):
        scheme = schemes.get(path)
        if scheme is None:
            continue
        if path not in weights.uses:
            raise InvalidIRError(f"weight-quantization: {path} cannot be quantized: {weights.reasons.get(path)}")
        arguments: dict[StoredMatrix, BlockArgument] = {}
        for use in weights.uses[path]:
            if use.matrix not in arguments:
                fitted = scheme.fitted(use.matrix.shape, name=path)
                arguments[use.matrix] = _add_argument(main, parameter, use.matrix, fitted)
            use.replace(arguments[use.matrix])
        count += len(arguments)
        signature.remove_argument(main, parameter)
    return count


def _rules(text: str) -> dict[str, str | Scheme | None]:
    """The rules of a pass option: "path-regex=scheme,…"; "none" keeps floats."""
    rules: dict[str, str | Scheme | None] = {}
    for rule in filter(None, (part.strip() for part in text.split(","))):
        pattern, equals, scheme = rule.rpartition("=")
        if not equals:
            raise InvalidIRError(f"weight-quantization: expected rules of the form path-regex=scheme, got {rule!r}")
        rules[pattern] = None if scheme == "none" else scheme
    return rules


@dataclass(frozen=True)
class WeightQuantizationPass(ModulePass):
    """Parameters that are weights become quantized arguments, by `plan` or by `rules` ("mlp=int4,lm_head=int8")."""

    name = "weight-quantization"

    rules: str = ""
    plan: Plan | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = find_weights(op)
        plan = self.plan
        if plan is None:
            rules: Any = _rules(self.rules)
            plan = make_plan(rules, weights.shapes, matrices=weights.matrices)
        quantize_weights(op, weights, dict(plan.schemes))


__all__ = [
    "COLUMNS",
    "OFFSET",
    "PARTS",
    "ROWS",
    "WeightQuantizationPass",
    "Weights",
    "find_weights",
    "quantize_weights",
    "quantized_type",
    "stored_matrices",
]
