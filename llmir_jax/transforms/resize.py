"""Gives operations another number of tokens. A size that holds the token axis is a multiple of the traced length, a
prime that divides no other size of the module (whoever traces makes sure of that)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, TensorType
from xdsl.ir import Attribute, Operation

from llmir_jax.dialects.build import dense_i64, ints, shape_of, splat_of
from llmir_jax.errors import UnsupportedModelError
from llmir_jax.interop import dense_from_numpy, op_name

_SIZE_PROPERTIES = {
    "stablehlo.slice": ("limit_indices",),
    "stablehlo.dynamic_slice": ("slice_sizes",),
    "stablehlo.gather": ("slice_sizes",),
}


def resized(sizes: Sequence[int], old: int, new: int) -> tuple[int, ...]:
    """`sizes` with the token axis of `old` tokens made one of `new`."""
    return tuple(n // old * new if n and n % old == 0 else n for n in sizes)


def resized_type(type: Attribute, old: int, new: int) -> Attribute:
    """The tensor type at `new` tokens; any other type as it is."""
    if not isinstance(type, TensorType):
        return type
    shape = type.get_shape()
    return TensorType(type.get_element_type(), resized(shape, old, new)) if any(n % old == 0 for n in shape) else type


def resize_properties(op: Operation, old: int, new: int) -> dict[str, Attribute]:
    """The properties of `op` that change with the number of tokens."""
    name = op_name(op)
    changed: dict[str, Attribute] = {}
    for key in _SIZE_PROPERTIES.get(name, ()):
        before = ints(op.properties[key])
        follows = [bool(n) and n % old == 0 for n in shape_of(op.operands[0])]
        after = tuple(resized((n,), old, new)[0] if f else n for n, f in zip(before, follows, strict=True))
        if before != after:
            changed[key] = dense_i64(after)
    if name == "stablehlo.constant":
        value = op.properties["value"]
        assert isinstance(value, DenseIntOrFPElementsAttr)
        shape = value.get_shape()
        if any(n and n % old == 0 for n in shape):
            changed["value"] = _resized_splat(op, value, resized(shape, old, new))
    return changed


def _resized_splat(op: Operation, value: DenseIntOrFPElementsAttr[Any], shape: Sequence[int]) -> Attribute:
    splat = splat_of(value)
    if splat is None:
        raise UnsupportedModelError(f"{op_name(op)}: a constant of token extent is left after positions were rewritten")
    return dense_from_numpy(np.broadcast_to(splat, shape), splat=True)
