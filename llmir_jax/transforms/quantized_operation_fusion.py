"""Merges quantized matmuls of one input into one: queries, keys and values, gate and up.

    %q = llm.quantized_matmul(%x, %wq)          %qkv = llm.quantized_matmul(%x, %w)
    %k = llm.quantized_matmul(%x, %wk)    →     %q = slice %qkv [.., 0:576]
    %v = llm.quantized_matmul(%x, %wv)          %k = slice %qkv [.., 576:768]   …

The rows of the weights become one argument, whose attribute `llmir.parts` tells, in order, which parameters they are
of and where they lie in them: whoever fills the arguments puts the rows together once. So a step has fewer and larger
operations, and 8-bit activations are rounded once. Weights of other formats, and weights that something else reads
too, stay.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, IntegerAttr, ModuleOp, NoneAttr, StringAttr
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute, BlockArgument
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from llmir_jax.analysis.align import LENGTH, main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, shape_of, tensor, type_of
from llmir_jax.transforms import signature
from llmir_jax.transforms.matching import sole_use
from llmir_jax.transforms.weight_quantization import COLUMNS, OFFSET, PARTS, ROWS


def _format(op: llm.QuantizedMatmulOp) -> Hashable | None:
    """What matmuls that can be one have in common; None for one that stays as it is."""
    kind = op.w.type
    if not isinstance(op.w, BlockArgument) or not isinstance(kind, llm.QuantizedTensorType) or sole_use(op.w) is None:
        return None
    types = (
        kind.element_type,
        kind.scale_type,
        kind.zero_point_type,
        kind.min_type,
        kind.elements_per_group,
        kind.layout,
    )
    activations = op.activation_bits, op.activation_group_size, op.activation_scales
    return op.x, types, activations, type_of(op.output).get_element_type()


def _num_rows(op: llm.QuantizedMatmulOp) -> int:
    return shape_of(op.output)[-1]


def argument_parts(entry: dict[str, Attribute]) -> list[Attribute]:
    """What an argument is made of."""
    found = entry.get(PARTS)
    if isinstance(found, ArrayAttr):
        return list(found.data)
    keys = (signature.PATH, OFFSET, ROWS, COLUMNS)
    return [DictionaryAttr({key: entry[key] for key in keys if key in entry})]


def _merged_argument(main: FuncOp, ops: list[llm.QuantizedMatmulOp]) -> BlockArgument:
    """An argument with the rows of all weights, before the first of them."""
    attributes = signature.argument_attributes(main)
    weights = [op.w for op in ops]
    first = weights[0]
    assert isinstance(first, BlockArgument)
    kind = first.type
    assert isinstance(kind, llm.QuantizedTensorType)
    parts: list[Attribute] = []
    paths = []
    for weight in weights:
        assert isinstance(weight, BlockArgument)
        entry = attributes[weight.index]
        parts += argument_parts(entry)
        path = entry[signature.PATH]
        assert isinstance(path, StringAttr)
        paths.append(path.data)
    merged = llm.QuantizedTensorType(
        (sum(map(_num_rows, ops)), kind.get_shape()[1]),
        kind.element_type,
        kind.scale_type,
        zero_point_type=kind.zero_point_type,
        min_type=kind.min_type,
        group_size=None if isinstance(kind.group_size, NoneAttr) else kind.group_size.data,
        layout=kind.layout.data,
    )
    new = main.body.block.insert_arg(merged, first.index)
    attributes.insert(new.index, {signature.PATH: StringAttr("+".join(paths)), PARTS: ArrayAttr(parts)})
    signature.store(main, attributes)
    return new


def _merge(main: FuncOp, ops: list[llm.QuantizedMatmulOp]) -> None:
    weight = _merged_argument(main, ops)
    first = ops[0]
    builder = OpBuilder(first)
    *leading, _ = shape_of(first.output)
    num_rows = sum(map(_num_rows, ops))
    merged = llm.QuantizedMatmulOp(
        first.x,
        weight,
        activation_scales=first.activation_scales,
        result_type=tensor([*leading, num_rows], type_of(first.output).get_element_type()),
        transpose_w=True,
    )
    for name in ("activation_bits", "activation_group_size"):
        if name in first.properties:
            merged.properties[name] = first.properties[name]
    product = builder.insert(merged).results[0]
    begin = 0
    old = [op.w for op in ops]
    for op in ops:
        end = begin + _num_rows(op)
        starts, limits = [0] * len(leading) + [begin], [*leading, end]
        op.output.replace_all_uses_with(builder.slice(product, starts, limits))
        begin = end
    for op in ops:
        Rewriter.erase_op(op)
    for arg in old:
        assert isinstance(arg, BlockArgument)
        signature.remove_argument(main, arg)


def merge_matmuls(module: ModuleOp) -> int:
    """Merge the matmuls of @main, in place; returns how many went."""
    main = main_function(module)
    length = module.attributes.get(LENGTH)
    groups: dict[Hashable, list[llm.QuantizedMatmulOp]] = {}
    for op in main.body.block.ops:
        if isinstance(op, llm.QuantizedMatmulOp) and (key := _format(op)) is not None:
            groups.setdefault(key, []).append(op)
    count = 0
    for ops in groups.values():
        # A size that is a multiple of the length would be taken for one that follows the tokens.
        clashes = isinstance(length, IntegerAttr) and sum(map(_num_rows, ops)) % length.value.data == 0
        if len(ops) > 1 and not clashes:
            _merge(main, ops)
            count += len(ops) - 1
    return count


@dataclass(frozen=True)
class QuantizedOperationFusionPass(ModulePass):
    """One matmul for all of one input."""

    name = "quantized-operation-fusion"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        merge_matmuls(op)


__all__ = ["QuantizedOperationFusionPass", "argument_parts", "merge_matmuls"]
