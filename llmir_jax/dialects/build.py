"""Short constructors for the StableHLO operations that passes emit. What would change nothing emits nothing."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from xdsl.dialects.builtin import ArrayAttr, DenseArrayBase, DenseIntOrFPElementsAttr, IntegerAttr, TensorType, i32, i64
from xdsl.ir import Attribute, Block, Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.interop import dense_from_numpy, dense_to_numpy, dtype_element_type, element_dtype

AnyTensor = TensorType[Any]


def tensor(shape: Sequence[int], element: Attribute) -> AnyTensor:
    """The ranked tensor type of `shape` and `element` type."""
    return TensorType(element, shape)


def type_of(value: SSAValue) -> AnyTensor:
    """The tensor type of `value`; it is an internal error if it is no tensor."""
    assert isinstance(value.type, TensorType), value.type
    return value.type


def shape_of(value: SSAValue) -> tuple[int, ...]:
    """The static shape of `value`."""
    return tuple(type_of(value).get_shape())


def dtype_of(value: SSAValue) -> np.dtype[Any]:
    """The NumPy (or ml_dtypes) dtype of the elements of `value`."""
    return element_dtype(type_of(value).get_element_type())


def ints(attribute: Attribute) -> tuple[int, ...]:
    """The integers of a dense i64 array or of an array of integer attributes."""
    if isinstance(attribute, DenseArrayBase):
        return tuple(int(x) for x in attribute.get_values())
    return tuple(int(x.value.data) for x in attribute)  # type: ignore[attr-defined]


def dense_i64(values: Sequence[int]) -> DenseArrayBase[Any]:
    """`array<i64: …>`."""
    return DenseArrayBase.from_list(i64, list(values))


class OpBuilder:
    """Emits operations before `anchor`, or at the end of a block, stamping each with one source location."""

    def __init__(self, anchor: Operation | Block, loc: Attribute | None = None):
        self._anchor = anchor
        if loc is None and isinstance(anchor, Operation):
            loc = anchor.attributes.get("llmir.loc")
        self._attributes: Mapping[str, Attribute] = {} if loc is None else {"llmir.loc": loc}

    def insert(self, op: Operation) -> Operation:
        """Insert `op` at this builder's place."""
        for name, attribute in self._attributes.items():
            op.attributes.setdefault(name, attribute)
        if isinstance(self._anchor, Block):
            self._anchor.add_op(op)
            return op
        block = self._anchor.parent_block()
        assert block is not None
        block.insert_op_before(op, self._anchor)
        return op

    def op(
        self,
        kind: type[Operation],
        operands: Sequence[SSAValue],
        result_type: Attribute,
        **properties: Attribute,
    ) -> SSAValue:
        """Emit an operation of one result."""
        return self.insert(
            kind.create(operands=operands, result_types=[result_type], properties=dict(properties))
        ).results[0]

    def constant(self, array: np.ndarray[Any, Any]) -> SSAValue:
        """A dense constant of `array`, exact to the byte."""
        value = dense_from_numpy(array)
        return self.op(stablehlo.ConstantOp, [], value.type, value=value)

    def splat(self, value: float | bool, like: AnyTensor) -> SSAValue:
        """`value` in every element of a tensor of type `like`."""
        element = like.get_element_type()
        scalar = self.constant(np.asarray(value, element_dtype(element)))
        return self.broadcast(scalar, like.get_shape(), ())

    def reshape(self, x: SSAValue, shape: Sequence[int]) -> SSAValue:
        """`x` in row-major order as `shape`."""
        if shape_of(x) == tuple(shape):
            return x
        assert prod(shape_of(x)) == prod(shape), (shape_of(x), shape)
        return self.op(stablehlo.ReshapeOp, [x], tensor(shape, type_of(x).get_element_type()))

    def transpose(self, x: SSAValue, permutation: Sequence[int]) -> SSAValue:
        """Result dim i is dim permutation[i] of `x`."""
        if list(permutation) == list(range(len(permutation))):
            return x
        shape = [shape_of(x)[i] for i in permutation]
        return self.op(
            stablehlo.TransposeOp,
            [x],
            tensor(shape, type_of(x).get_element_type()),
            permutation=dense_i64(permutation),
        )

    def broadcast(self, x: SSAValue, shape: Sequence[int], dims: Sequence[int]) -> SSAValue:
        """Dim i of `x` becomes dim dims[i] of the result."""
        if shape_of(x) == tuple(shape) and list(dims) == list(range(len(shape))):
            return x
        return self.op(
            stablehlo.BroadcastInDimOp,
            [x],
            tensor(shape, type_of(x).get_element_type()),
            broadcast_dimensions=dense_i64(dims),
        )

    def convert(self, x: SSAValue, element: Attribute) -> SSAValue:
        """`x` with elements of type `element`."""
        if type_of(x).get_element_type() == element:
            return x
        return self.op(stablehlo.ConvertOp, [x], tensor(shape_of(x), element))

    def slice(self, x: SSAValue, start: Sequence[int], limit: Sequence[int]) -> SSAValue:
        """`x[start:limit]` in each dim, stride 1."""
        if not any(start) and tuple(limit) == shape_of(x):
            return x
        shape = [b - a for a, b in zip(start, limit, strict=True)]
        return self.op(
            stablehlo.SliceOp,
            [x],
            tensor(shape, type_of(x).get_element_type()),
            start_indices=dense_i64(start),
            limit_indices=dense_i64(limit),
            strides=dense_i64([1] * len(shape)),
        )

    def concatenate(self, xs: Sequence[SSAValue], dim: int) -> SSAValue:
        """The `xs` one after the other along `dim`."""
        shape = list(shape_of(xs[0]))
        shape[dim] = sum(shape_of(x)[dim] for x in xs)
        return self.op(
            stablehlo.ConcatenateOp,
            xs,
            tensor(shape, type_of(xs[0]).get_element_type()),
            dimension=IntegerAttr(dim, i64),
        )

    def take(self, x: SSAValue, indices: SSAValue, dim: int) -> SSAValue:
        """Rows of `x` along `dim` by `indices` (int32 [N]): dim `dim` of the result has N elements."""
        (count,) = shape_of(indices)
        shape = list(shape_of(x))
        sizes = [1 if d == dim else n for d, n in enumerate(shape)]
        shape[dim] = count
        rank = len(shape)
        none = stablehlo.GatherDimensionNumbers(
            *(_dims(v) for v in ([d for d in range(rank) if d != dim], [dim], [], [], [dim])), IntegerAttr(1, i64)
        )
        return self.op(
            stablehlo.GatherOp,
            [x, self.reshape(indices, (count, 1))],
            tensor(shape, type_of(x).get_element_type()),
            dimension_numbers=none,
            slice_sizes=dense_i64(sizes),
        )

    def zeros(self, shape: Sequence[int], element: Attribute) -> SSAValue:
        """A tensor of zeros."""
        return self.splat(0, tensor(shape, element))


def _dims(values: Sequence[int]) -> Any:
    return ArrayAttr([IntegerAttr(v, i64) for v in values])


def splat_of(attribute: Attribute) -> np.ndarray[Any, Any] | None:
    """The one element [] of a dense attribute that repeats it, or None."""
    assert isinstance(attribute, DenseIntOrFPElementsAttr)
    array = dense_to_numpy(attribute)
    if array.size == 0:
        return None
    first = array.reshape(-1)[:1]
    if array.size > 1 and any(array.strides) and array.tobytes() != first.tobytes() * array.size:
        return None
    return first.reshape(())


def scalar_constant(value: SSAValue) -> np.ndarray[Any, Any] | None:
    """The constant that every element of `value` equals, through broadcasts, reshapes and converts; else None."""
    op = value.owner
    if isinstance(op, stablehlo.ConstantOp):
        return splat_of(op.value)
    if isinstance(op, stablehlo.BroadcastInDimOp | stablehlo.ReshapeOp):
        return scalar_constant(op.operands[0])
    if isinstance(op, stablehlo.ConvertOp):
        inner = scalar_constant(op.operands[0])
        return None if inner is None else inner.astype(dtype_of(value))
    return None


__all__ = [
    "AnyTensor",
    "OpBuilder",
    "dense_i64",
    "dtype_element_type",
    "dtype_of",
    "i32",
    "ints",
    "scalar_constant",
    "shape_of",
    "splat_of",
    "tensor",
    "type_of",
]
