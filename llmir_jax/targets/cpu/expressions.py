"""Values of the module as code: one element, or some lanes of them, computed from what is in memory.

An `Evaluator` walks from a value up to what is stored, turning layout operations into index maps and elementwise
operations into vector instructions, so that a region of any shape becomes the body of one loop. Where lanes would have
to be fetched from all over memory it raises `NotAVector`, and the loop is made of single elements instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.dialects.builtin import TensorType
from xdsl.ir import BlockArgument, Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import location
from llmir_jax.dense import dense_to_numpy
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, ints, shape_of, splat_of
from llmir_jax.dialects.llm.common import bool_of, float_of
from llmir_jax.interop import op_name
from llmir_jax.targets.cpu.elementwise import (
    ELEMENTS,
    STORED_ONLY,
    elementwise,
    elementwise_reason,
    is_float,
    loaded,
    memory_element,
    rounded,
)
from llmir_jax.targets.cpu.halves import WIDTHS, widen
from llmir_jax.targets.cpu.host import Host
from llmir_jax.targets.cpu.index import Index, Var, dynamic, linear, unravel
from llmir_jax.targets.cpu.layout import ROWS, PackedFormat
from llmir_jax.targets.cpu.llvm import Function, Number, Value, constant, constants, element_of, vector


class NotAVector(Exception):
    """The lanes of a value are not side by side in memory."""


@dataclass(eq=False, kw_only=True)
class Buffer:
    """Where a value is in memory: `strides` in elements, and a place that the plan gives it."""

    shape: tuple[int, ...]
    element: str  # LLVM type in memory; booleans are bytes
    strides: tuple[int, ...]
    nbytes: int
    place: str = "scratch"  # or "argument", "result", "weights", "private" (one for each thread)
    offset: int = 0  # number of the argument or result, else bytes
    scales: "Buffer | None" = None  # of pages of integers: float16 [pages, page size, heads, 1]
    minima: "Buffer | None" = None  # of pages of 4 bits, two elements a byte: the same

    @property
    def parts(self) -> "list[Buffer]":
        """The arrays that hold pages."""
        return [part for part in (self, self.scales, self.minima) if part is not None]

    @staticmethod
    def of(shape: Sequence[int], element: str, *, row_stride: int | None = None, place: str = "scratch") -> "Buffer":
        """A row-major array; with `row_stride` the last dimension is so many elements apart."""
        strides = []
        stride = 1
        for d, size in enumerate(reversed(shape)):
            strides.append(stride)
            stride *= row_stride if d == 0 and row_stride is not None else size
        width = WIDTHS[element]
        return Buffer(
            shape=tuple(shape), element=element, strides=tuple(reversed(strides)), nbytes=stride * width, place=place
        )

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return WIDTHS[self.element]


def scratch_element(dtype: np.dtype[Any]) -> str:
    """LLVM type of a dtype in memory of the step's own: floats keep all digits."""
    return "float" if is_float(dtype) else memory_element(dtype)


@dataclass(kw_only=True)
class Stored:
    """What the code of a step finds in memory."""

    buffers: dict[SSAValue, Buffer] = field(default_factory=dict)
    statistics: dict[Operation, Buffer] = field(default_factory=dict)
    """Of norms: [rows, 1] (1/σ) or [rows, 2] (mean, 1/σ)."""
    formats: dict[SSAValue, PackedFormat] = field(default_factory=dict)
    """Layouts of weights."""


_VIEWS = (stablehlo.ReshapeOp, stablehlo.TransposeOp, stablehlo.BroadcastInDimOp, stablehlo.SliceOp)
_CHEAP = (*_VIEWS, stablehlo.ConstantOp, stablehlo.IotaOp, stablehlo.ConvertOp)


def is_cheap(op: Operation) -> bool:
    """Whether to compute an operation's result again wherever it is read costs nothing worth storing it for."""
    return isinstance(op, _CHEAP)


def row_gather(op: stablehlo.GatherOp) -> int | None:
    """The dimension whose slices of size 1 a gather takes, if that is what it does."""
    numbers = op.dimension_numbers
    dims = [ints(getattr(numbers, name)) for name in ("collapsed_slice_dims", "start_index_map")]
    if len(dims[0]) != 1 or dims[0] != dims[1] or ints(numbers.operand_batching_dims):
        return None
    dim = dims[0][0]
    shape = shape_of(op.operands[0])
    sizes = tuple(1 if d == dim else n for d, n in enumerate(shape))
    if ints(op.slice_sizes) != sizes:
        return None
    index_shape = shape_of(op.operands[1])
    vector_dim = numbers.index_vector_dim.value.data
    if vector_dim != len(index_shape) and not (vector_dim == len(index_shape) - 1 and index_shape[-1] == 1):
        return None
    return dim


class Evaluator:
    """Emits values into a function.

    Args:
        f: the function.
        stored: what is in memory.
        pointer: the pointer to a buffer.
        variables: values of loop variables.
        lane: the variable that lanes run along, with the value of the first lane in `variables`.
        lanes: how many.
    """

    def __init__(
        self,
        f: Function,
        stored: Stored,
        pointer: Callable[[Buffer], Value],
        variables: Mapping[Var, Number],
        lane: Var,
        lanes: int,
        seen: Callable[[Buffer, Index], None] | None = None,
    ):
        self.f, self.stored, self.pointer = f, stored, pointer
        self.variables, self.lane, self.lanes = variables, lane, lanes
        self.seen = seen
        self._done: dict[tuple[SSAValue, tuple[Index, ...]], Value] = {}

    def at(self, value: SSAValue, indices: Sequence[Index]) -> Value:
        """The element at these indices, in each lane."""
        key = (value, tuple(indices))
        if key not in self._done:
            self._done[key] = self._make(value, list(indices))
        return self._done[key]

    def load(self, buffer: Buffer, indices: Sequence[Index]) -> Value:
        """What a buffer has at these indices."""
        place = Index()
        for index, stride in zip(indices, buffer.strides, strict=True):
            place = place + index * stride
        step = 0 if self.lanes == 1 else place.stride(self.lane, self.lanes)
        if step not in (0, 1):
            raise NotAVector
        if self.seen is not None:
            self.seen(buffer, place)
        offset = self.f.mul(place.emit(self.f, self.variables), buffer.width)
        base = self.pointer(buffer)
        if step == 1:
            return self.f.load(vector(buffer.element, self.lanes), base, offset, align=buffer.width)
        return self.f.splat(self.f.load(buffer.element, base, offset, align=buffer.width), self.lanes)

    def _constant(self, value: float | int, like: Value) -> Value:
        return constant(element_of(like.type), value, self.lanes)

    def _make(self, value: SSAValue, indices: list[Index]) -> Value:
        if value in self.stored.buffers:
            buffer = self.stored.buffers[value]
            if value in self.stored.formats:
                n, k = indices
                layout = self.stored.formats[value]
                tile, together = (n // ROWS) * (ROWS * layout.padded_block), layout.columns_together
                column = (k // together) * (together * ROWS) + k % together
                place = tile + column + (n % ROWS) * together
                return loaded(self.f, self.load(buffer, [place]), dtype_of(value))
            return loaded(self.f, self.load(buffer, indices), dtype_of(value))
        assert not isinstance(value, BlockArgument), value
        op = value.owner
        assert isinstance(op, Operation)
        if isinstance(op, _VIEWS):
            return self.at(op.operands[0], _through(op, indices))
        handler = _HANDLERS.get(type(op))
        if handler is not None:
            return handler(self, op, indices)
        operands = [self.at(operand, indices if shape_of(operand) else []) for operand in op.operands]
        return elementwise(self.f, op, operands)

    def _dense(self, op: stablehlo.ConstantOp, indices: list[Index]) -> Value:
        element = ELEMENTS[dtype_of(op.results[0]).name]
        splat = splat_of(op.value)
        if splat is not None:
            return constant(element, splat.item(), self.lanes)
        array = np.ascontiguousarray(dense_to_numpy(op.value))
        memory = memory_element(array.dtype)
        place = linear(indices, array.shape)
        step = 0 if self.lanes == 1 else place.stride(self.lane, self.lanes)
        if step not in (0, 1):
            raise NotAVector
        base = self.f.module.data(array.tobytes())
        offset = self.f.mul(place.emit(self.f, self.variables), array.dtype.itemsize)
        lanes = self.lanes if step == 1 else 1
        found = loaded(self.f, self.f.load(vector(memory, lanes), base, offset), array.dtype)
        return self.f.splat(found, self.lanes if step == 0 else 1)

    def number(self, index: Index) -> Value:
        """An index as i64 lanes."""
        step = 0 if self.lanes == 1 else index.stride(self.lane, self.lanes)
        if step is None:
            raise NotAVector
        base = self.f.splat(self.f.value(index.emit(self.f, self.variables)), self.lanes)
        if not step:
            return base
        return self.f.binary("add", base, constants("i64", [step * i for i in range(self.lanes)]))

    def _iota(self, op: stablehlo.IotaOp, indices: list[Index]) -> Value:
        number = self.number(indices[op.iota_dimension.value.data])
        dtype = dtype_of(op.results[0])
        element = ELEMENTS[dtype.name]
        if element == "float":
            return rounded(self.f, self.f.cast("sitofp", number, element), dtype)
        return number if element == "i64" else self.f.cast("trunc", number, element)

    def _dynamic(self, ids: SSAValue, indices: list[Index], size: int) -> Index:
        """An id that is read when the code runs, clamped to [0, size)."""
        scalar = Evaluator(self.f, self.stored, self.pointer, self.variables, self.lane, 1, self.seen)
        if self.lanes > 1 and any(index.stride(self.lane, self.lanes) != 0 for index in indices):
            raise NotAVector
        number = scalar.at(ids, indices)
        wide = number if number.type == "i64" else self.f.cast("sext", number, "i64")
        bounded = self.f.minimum(self.f.maximum(wide, 0), size - 1)
        assert isinstance(bounded, Value)
        return dynamic(bounded, size)

    def _dynamic_slice(self, op: stablehlo.DynamicSliceOp, indices: list[Index]) -> Value:
        sizes = zip(shape_of(op.operand), shape_of(op.result), strict=True)
        starts = [
            self._dynamic(start, [], whole - taken + 1) if whole > taken else Index()
            for start, (whole, taken) in zip(op.start_indices, sizes, strict=True)
        ]
        return self.at(op.operand, [index + start for index, start in zip(indices, starts, strict=True)])

    def _gather(self, op: stablehlo.GatherOp, indices: list[Index]) -> Value:
        dim = row_gather(op)
        assert dim is not None
        operand, ids = op.operands[0], op.operands[1]
        offset_dims = ints(op.dimension_numbers.offset_dims)
        batch = [index for d, index in enumerate(indices) if d not in offset_dims]
        window = [indices[d] for d in offset_dims]
        if len(shape_of(ids)) > len(batch):
            batch.append(Index())
        row = self._dynamic(ids, batch, shape_of(operand)[dim])
        return self.at(operand, [*window[:dim], row, *window[dim:]])

    def _quantized_gather(self, op: llm.QuantizedGatherOp, indices: list[Index]) -> Value:
        if self.lanes > 1:
            raise NotAVector
        layout = self.stored.formats[op.w]
        row = self._dynamic(op.ids, indices[:-1], layout.num_rows)
        k = indices[-1]
        f, variables, base = self.f, self.variables, self.pointer(self.stored.buffers[op.w])
        block, j = k // layout.block, k % layout.block
        start = ((row // ROWS) * layout.num_blocks + block) * layout.block_bytes
        i = row % ROWS
        half = layout.padded_block // 2
        h = j % half if layout.bits == 4 else j
        place = start + (h // 4) * 64 + i * 4 + h % 4
        byte = f.cast("zext", f.load("i8", base, place.emit(f, variables)), "i32")
        if layout.bits == 4:
            shift = f.mul((j // half).emit(f, variables), 4)
            low = f.cast("trunc", f.value(shift), "i32")
            byte = f.binary("and", f.binary("lshr", byte, low), constant("i32", 15))
        u = f.cast("sitofp", f.binary("sub", byte, constant("i32", layout.bias)), "float")
        width = layout.side_bytes // ROWS

        def side(number: int) -> Value:
            at = start + i * width + (layout.value_bytes + number * layout.side_bytes)
            return widen(f, f.load(layout.side, base, at.emit(f, variables), align=width))

        scaled = f.binary("fmul", u, side(0))
        return f.binary("fadd", scaled, side(1)) if layout.has_minima else scaled

    def _rms_norm(self, op: llm.RMSNormOp, indices: list[Index]) -> Value:
        f = self.f
        inverse = self.load(self.stored.statistics[op], [linear(indices[:-1], shape_of(op.x)[:-1]), Index()])
        weight = self.at(op.w, indices[-1:])
        if offset := float_of(op.offset):
            weight = f.binary("fadd", weight, self._constant(offset, weight))
        return f.binary("fmul", f.binary("fmul", self.at(op.x, indices), inverse), weight)

    def _layer_norm(self, op: llm.LayerNormOp, indices: list[Index]) -> Value:
        f = self.f
        row = linear(indices[:-1], shape_of(op.x)[:-1])
        mean, inverse = (self.load(self.stored.statistics[op], [row, Index(i)]) for i in (0, 1))
        scaled = f.binary("fmul", f.binary("fsub", self.at(op.x, indices), mean), inverse)
        return f.fma(scaled, self.at(op.w, indices[-1:]), self.at(op.b, indices[-1:]))

    def _rope(self, op: llm.RopeOp, indices: list[Index]) -> Value:
        f = self.f
        row, head, d = indices
        half = shape_of(op.cos)[-1]
        rotary, dim = 2 * half, shape_of(op.x)[-1]
        interleaved = bool_of(op.interleaved)
        if interleaved:
            partner = d + (d % 2) * -2 + 1
            angle = (d // 2) % half
            second = d % 2
        else:
            partner = (d + half) % rotary if rotary == dim else ((d % rotary) + half) % rotary
            angle = d % half
            second = (d // half) % 2
        own = self.at(op.x, indices)
        if self.lanes > 1 and second.stride(self.lane, self.lanes) != 0:
            raise NotAVector
        other = self.at(op.x, [row, head, partner])
        cos, sin = (self.at(table, [row, angle]) for table in (op.cos, op.sin))
        is_second = f.compare("ne", second.emit(f, self.variables), 0)
        sign = f.select(is_second, constant("float", 1.0), constant("float", -1.0))
        signed = f.binary("fmul", sin, f.splat(sign, self.lanes))
        turned = f.fma(other, signed, f.binary("fmul", own, cos))
        if rotary == dim:
            return turned
        if self.lanes > 1 and (d // rotary).stride(self.lane, self.lanes) != 0:
            raise NotAVector
        kept = f.compare("sge", d.emit(f, self.variables), rotary)
        return f.select(f.splat(kept, self.lanes), own, turned)


_Handler = Callable[[Evaluator, Any, list[Index]], Value]
_HANDLERS: dict[type[Operation], _Handler] = {
    stablehlo.ConstantOp: Evaluator._dense,
    stablehlo.IotaOp: Evaluator._iota,
    stablehlo.DynamicSliceOp: Evaluator._dynamic_slice,
    stablehlo.GatherOp: Evaluator._gather,
    llm.QuantizedGatherOp: Evaluator._quantized_gather,
    llm.RMSNormOp: Evaluator._rms_norm,
    llm.LayerNormOp: Evaluator._layer_norm,
    llm.RopeOp: Evaluator._rope,
}


def _through(op: Operation, indices: list[Index]) -> list[Index]:
    """Indices into the operand of a layout operation."""
    operand = op.operands[0]
    shape = shape_of(operand)
    if isinstance(op, stablehlo.ReshapeOp):
        return unravel(linear(indices, shape_of(op.results[0])), shape)
    if isinstance(op, stablehlo.TransposeOp):
        found = [Index()] * len(shape)
        for d, source in enumerate(ints(op.permutation)):
            found[source] = indices[d]
        return found
    if isinstance(op, stablehlo.BroadcastInDimOp):
        return [Index() if n == 1 else indices[d] for n, d in zip(shape, ints(op.broadcast_dimensions), strict=True)]
    assert isinstance(op, stablehlo.SliceOp)
    starts, strides = ints(op.start_indices), ints(op.strides)
    return [index * stride + start for index, start, stride in zip(indices, starts, strides, strict=True)]


def unsupported_reason(op: Operation, host: Host) -> str | None:
    """Why an operation cannot be part of a region of elementwise operations; None if it can."""
    for value in (*op.operands, *op.results):
        if not isinstance(value.type, TensorType):
            continue
        name = dtype_of(value).name
        if name not in ELEMENTS or (name in STORED_ONLY and not is_cheap(op)):
            return f"{op_name(op)} at {location(op)}: of {name}"
        if name == "float16" and not host.has_half:
            return f"{op_name(op)} at {location(op)}: of float16 on a machine without instructions for it"
    if isinstance(op, stablehlo.GatherOp):
        return None if row_gather(op) is not None else f"{op_name(op)} at {location(op)}: takes no whole rows"
    if type(op) in _HANDLERS or isinstance(op, _VIEWS):
        return None
    reason = elementwise_reason(op)
    where = f"{op_name(op)} at {location(op)}"
    return f"{where}: {reason}" if reason else None if reason is None else where


__all__ = [
    "Buffer",
    "Evaluator",
    "NotAVector",
    "Stored",
    "is_cheap",
    "memory_element",
    "row_gather",
    "scratch_element",
    "unsupported_reason",
]
