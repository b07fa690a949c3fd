"""Many small host arrays in one: a step takes one transfer to the device instead of a dozen."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of a packing; its dtype has four bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["int32", "uint32", "float32"] = "int32"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Packing:
    """Arrays laid one after another in an int32 vector."""

    fields: tuple[Field, ...]

    @property
    def size(self) -> int:
        """Of the vector."""
        return sum(field.size for field in self.fields)

    def allocate(self) -> tuple[NDArray[np.int32], dict[str, NDArray[Any]]]:
        """A zeroed vector, and views of it by field name to fill in."""
        buffer = np.zeros(self.size, np.int32)
        return buffer, self.views(buffer)

    def views(self, buffer: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """The fields of a vector on the host, by name; views, not copies."""
        views = {}
        offset = 0
        for field in self.fields:
            views[field.name] = buffer[offset : offset + field.size].view(field.dtype).reshape(field.shape)
            offset += field.size
        return views

    def unpack(self, packed: jax.Array) -> dict[str, jax.Array]:
        """The fields of a packed vector, by name. Traceable."""
        values = {}
        offset = 0
        for field in self.fields:
            flat = lax.slice(packed, (offset,), (offset + field.size,))
            values[field.name] = lax.bitcast_convert_type(flat, np.dtype(field.dtype)).reshape(field.shape)
            offset += field.size
        return values
