"""Parameters of a checkpoint where they live on a mesh, of which each process reads what its own devices have.

A matrix that is quantized as it is read is rounded a device's part at a time, to the bits that the whole would have:
a part is whole groups, or where a scale is for a whole row, whole rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from xdsl.dialects.builtin import TensorType
from xdsl.ir import Attribute, BlockArgument

from llmir_jax.checkpoint.source import ParameterSource
from llmir_jax.dialects import llm
from llmir_jax.placement import Placement
from llmir_jax.quantization import QuantizedArray, Rounding, Scheme
from llmir_jax.transforms.memory_planning import parts_of
from llmir_jax.transforms.sharding_attributes import of_argument


@dataclass(frozen=True, kw_only=True)
class OwnParts:
    """Reads arguments of @main, whose attributes are `attributes`; None for what must be read whole."""

    placement: Placement
    source: ParameterSource
    attributes: Sequence[Mapping[str, Attribute]]

    def floats(self, arg: BlockArgument, path: str) -> jax.Array | None:
        """A parameter as it is."""
        reader = self.source.part_reader(path)
        spec, kind = of_argument(self.attributes[arg.index]), arg.type
        if reader is None or spec is None or not isinstance(kind, TensorType) or not kind.get_shape():
            return None
        read: Callable[[Any], np.ndarray[Any, Any]] = reader  # JAX's type allows None, which it gives for no array
        return jax.make_array_from_callback(kind.get_shape(), self.placement.sharding(spec), read)

    def quantized(self, arg: BlockArgument, path: str, scheme: Scheme, rounding: Rounding) -> QuantizedArray | None:
        """A matrix [N, K] that is a whole parameter, in a scheme that fits it."""
        spec, kind = of_argument(self.attributes[arg.index]), arg.type
        reader = self.source.quantized_reader(path, scheme, rounding)
        if reader is None or spec is None:
            return None
        assert isinstance(kind, llm.QuantizedTensorType)
        n, k = kind.get_shape()
        parts = [(part.get_shape(), self.placement.sharding(own)) for part, own in parts_of(kind, spec)]
        shape, sharding = parts[0]  # of the integers
        boxes: dict[tuple[int, ...], QuantizedArray] = {}
        shards: list[list[jax.Array]] = [[] for _ in parts]
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            own, inner = index[::-1] if kind.in_columns else index
            rows, columns = slice(*own.indices(n)), _widened(inner, k, shape[0 if kind.in_columns else 1])
            if scheme.group_size is None and columns != slice(0, k, 1):
                return None  # the scale of a row follows from all of it
            key = rows.start, rows.stop, columns.start, columns.stop
            if key not in boxes:
                boxes[key] = reader(rows, columns).laid_out("columns" if kind.in_columns else "rows")
            for leaves, leaf in zip(shards, jax.tree.leaves(boxes[key]), strict=True):
                leaves.append(jax.device_put(leaf, device))
        arrays = [
            jax.make_array_from_single_device_arrays(whole, where, own)
            for (whole, where), own in zip(parts, shards, strict=True)
        ]
        box = next(iter(boxes.values()))
        made: QuantizedArray = jax.tree.unflatten(jax.tree.structure(box), arrays)
        return replace(made, shape=(n, k), group_size=scheme.group_size or k)


def _widened(index: slice, size: int, stored: int) -> slice:
    """A part of an axis of `stored` bytes or elements, in the `size` elements that these hold."""
    start, stop, _ = index.indices(stored)
    return slice(start * size // stored, stop * size // stored, 1)


__all__ = ["OwnParts"]
