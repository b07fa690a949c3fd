"""Where the parameters of a step lie: one array of bytes, in which each has its place and its layout.

Quantized matrices and the weights of float matmuls are packed for the kernels (see `layout`); others are float32 or
int32, row-major. One array, since every argument of a compiled step costs time at each call.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import FuncOp
from xdsl.ir import BlockArgument, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.dense import element_dtype
from llmir_jax.dense_parameters import Stored, key_of, stored_array
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of
from llmir_jax.dialects.llm.common import bool_of
from llmir_jax.quantization import QuantizedArray
from llmir_jax.targets.cpu.elementwise import is_float
from llmir_jax.targets.cpu.layout import (
    ROWS,
    PackedFormat,
    float_format,
    pack_floats,
    pack_weight,
    packed_format,
    round_up,
    unpack_floats,
    unpack_weight,
)
from llmir_jax.targets.cpu.regions import Split, split
from llmir_jax.targets.cpu.support import stored_weight
from llmir_jax.transforms import signature

ALIGNMENT = 64
"""Bytes."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A parameter's bytes in the array, from `offset` on."""

    argument: int  # of @main
    path: str
    offset: int
    nbytes: int
    layout: PackedFormat | None  # None: row-major, as it is
    shape: tuple[int, ...]
    dtype: Any  # numpy dtype of the elements, where it has no layout


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """The places of the parameters that native code reads, in the order of the arguments."""

    places: tuple[Place, ...]
    apart: tuple[int, ...] = ()
    """Arguments that stay arguments of their own, since operations that XLA computes read them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        last = self.places[-1] if self.places else None
        return ALIGNMENT if last is None else round_up(last.offset + last.nbytes, ALIGNMENT)

    def of(self, argument: int) -> Place:
        """The place of an argument of @main."""
        return next(place for place in self.places if place.argument == argument)

    def as_data(self) -> dict[str, Any]:
        """The places as what JSON holds."""
        places = [{**asdict(place), "dtype": np.dtype(place.dtype).name} for place in self.places]
        return {"places": places, "apart": self.apart}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Arrangement":
        """The inverse of `as_data`."""
        places = tuple(
            Place(
                **{
                    **place,
                    "layout": None if place["layout"] is None else PackedFormat(**place["layout"]),
                    "shape": tuple(place["shape"]),
                    "dtype": jnp.dtype(place["dtype"]),
                }
            )
            for place in data["places"]
        )
        return cls(places=places, apart=tuple(data["apart"]))

    def fill(self, values: Iterator[Any]) -> tuple[jax.Array, list[Any]]:
        """The array uint8[nbytes] of the parameters' values, and those that stay apart.

        The values, of all parameters in order, are taken one at a time, so that no more than one is there beside them.
        """
        content = aligned_bytes(self.nbytes)
        places = {place.argument: place for place in self.places}
        kept = []
        for argument, value in zip(sorted({*places, *self.apart}), values, strict=True):
            if argument in self.apart:
                kept.append(value)
            place = places.get(argument)
            if place is None:
                continue
            target = content[place.offset : place.offset + place.nbytes]
            if place.layout is None:
                target[:] = np.ascontiguousarray(np.asarray(value)).view(np.uint8).reshape(-1)
            elif place.layout.is_float:
                target[:] = pack_floats(np.asarray(value), place.layout)
            else:
                target[:] = pack_weight(value, place.layout)
        array: jax.Array = jax.dlpack.from_dlpack(content)
        return array, kept

    def stored(self, content: jax.Array, apart: Sequence[Any], number: int, described: Any) -> Stored:
        """A parameter, by its number among those of `fill`, as a function of what is stored of it."""
        argument = sorted({*self.apart, *(place.argument for place in self.places)})[number]
        if argument in self.apart:
            return stored_array(apart[self.apart.index(argument)])
        place = self.of(argument)
        whole = np.asarray(content)[place.offset : place.offset + place.nbytes]
        return _stored(whole, place, described)


def _stored(content: np.ndarray[Any, Any], place: Place, described: Any) -> Stored:
    layout = place.layout
    key = (layout, place.shape, np.dtype(place.dtype).name, key_of(described))

    def rows(start: int, stop: int) -> Stored:
        """Of a matrix; a part of a tile only at its end."""
        assert layout is not None and start % ROWS == 0
        begin, end = (tiles * layout.tile_bytes for tiles in (start // ROWS, -(-stop // ROWS)))
        some = replace(place, layout=replace(layout, num_rows=stop - start), shape=(stop - start, *place.shape[1:]))
        like = described
        if isinstance(described, QuantizedArray):
            like = replace(described, shape=(stop - start, described.shape[1]))
        return _stored(content[begin:end], some, like)

    return Stored(
        arrays=content,
        value=lambda raw: unpack(raw, place, described),
        key=key,
        rows=None if layout is None else rows,
    )


def unpack(part: jax.Array, place: Place, described: Any) -> Any:
    """The value, described by `described`, whose bytes `part` are. Traceable."""
    if isinstance(described, QuantizedArray):
        assert place.layout is not None
        return unpack_weight(part, place.layout, described)
    if place.layout is not None:
        return unpack_floats(part, place.layout)
    width = np.dtype(place.dtype).itemsize
    parts = part.reshape(-1, width) if width > 1 else part
    return jax.lax.bitcast_convert_type(parts, place.dtype).reshape(place.shape)


def aligned_bytes(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes at an address that JAX takes as it is, without a copy."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def activation_group(weight: BlockArgument) -> int | None:
    """The group size of the 8-bit activations that a weight is multiplied with, None for floats."""
    for use in weight.uses:
        op = use.operation
        if isinstance(op, llm.QuantizedMatmulOp) and op.activation_bits is not None:
            size = op.activation_group_size
            assert isinstance(weight.type, llm.QuantizedTensorType)
            return weight.type.get_shape()[1] if size is None else int(size.value.data)
    return None


def _is_linear_weight(arg: BlockArgument) -> bool:
    """Whether an argument of floats is the weight [N, K] of a linear layer."""
    uses = [use for value in (arg, *_widened(arg)) for use in value.uses]
    for use in uses:
        op = use.operation
        if isinstance(op, llm.LinearOp) and stored_weight(op.w) is arg and bool_of(op.transpose_w):
            return op.x is not arg and is_float(dtype_of(arg))
    return False


def _widened(arg: BlockArgument) -> list[SSAValue]:
    return [use.operation.results[0] for use in arg.uses if isinstance(use.operation, stablehlo.ConvertOp)]


def arrange(main: FuncOp, found: Split | None = None) -> Arrangement:
    """Places for the parameters of @main.

    Those that XLA reads, of a step that is split so, stay apart; one that native code packs has a place as well.
    """
    found = split(main) if found is None else found
    by_xla, packed = found.arguments(main, parity=1), found.arguments(main, parity=0, packed=True)
    places = []
    apart = []
    offset = 0
    layout: PackedFormat | None
    for arg, path in signature.parameter_paths(main):
        if isinstance(arg.type, llm.QuantizedTensorType):
            layout = packed_format(arg.type, activation_group(arg))
            nbytes, shape, dtype = layout.nbytes, arg.type.get_shape(), np.dtype(np.float32)
        else:
            assert isinstance(arg.type, TensorType)
            shape, dtype = arg.type.get_shape(), element_dtype(arg.type.element_type)
            layout = float_format(shape[0], shape[1], dtype) if _is_linear_weight(arg) else None
            nbytes = layout.nbytes if layout is not None else int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if arg in by_xla:
            apart.append(arg.index)
            if arg not in packed:
                continue
        places.append(
            Place(
                argument=arg.index,
                path=path,
                offset=offset,
                nbytes=nbytes,
                layout=layout,
                shape=tuple(shape),
                dtype=dtype,
            )
        )
        offset = round_up(offset + nbytes, ALIGNMENT)
    return Arrangement(places=tuple(places), apart=tuple(apart))


__all__ = ["Arrangement", "Place", "activation_group", "arrange"]
