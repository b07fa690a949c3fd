"""The types of the llm dialect: KV caches, quantized tensors and shards. Their printed forms are an interface."""

import math
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.dialects.builtin import (
    AnyFloat,
    ArrayAttr,
    IntAttr,
    IntegerType,
    NoneAttr,
    Signedness,
    StringAttr,
    TensorType,
)
from xdsl.ir import Attribute, ParametrizedAttribute, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from .common import fail, format_dims

NONE = NoneAttr()


def _int(value: int | IntAttr) -> IntAttr:
    return value if isinstance(value, IntAttr) else IntAttr(value)


def _check_positive(type_name: str, **sizes: IntAttr) -> None:
    for subject, size in sizes.items():
        if size.data <= 0:
            fail(f"!{type_name}: {subject}", "a positive number", size.data)


def _check_float_type(subject: str, element_type: Attribute) -> None:
    if not isinstance(element_type, AnyFloat):
        fail(subject, "a floating-point type", element_type)


def unsigned(storage: Attribute) -> IntegerType:
    """The unsigned integer type of the same width."""
    assert isinstance(storage, IntegerType)
    return IntegerType(storage.width.data, Signedness.UNSIGNED)


def _parse_int_after_comma(parser: AttrParser) -> IntAttr:
    parser.parse_punctuation(",")
    return IntAttr(parser.parse_integer(allow_boolean=False))


# -- KV caches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)  # without it xDSL would compare two types without looking at these fields
class _KVCacheType(ParametrizedAttribute, TypeAttribute, ABC):
    """What the two cache types share: the sizes, in the order they are printed."""

    element_type: Attribute
    num_layers: IntAttr
    num_kv_heads: IntAttr
    head_dim: IntAttr
    block_size: IntAttr
    max_seq_len: IntAttr

    @property
    def blocks_per_seq(self) -> int:
        """Blocks a sequence of the maximum length has."""
        return math.ceil(self.max_seq_len.data / self.block_size.data)

    def _check(self) -> None:
        _check_float_type(f"!{self.name}: element type", self.element_type)
        _check_positive(
            self.name,
            **{
                "number of layers": self.num_layers,
                "number of KV heads": self.num_kv_heads,
                "head dim": self.head_dim,
                "block size": self.block_size,
                "maximum sequence length": self.max_seq_len,
            },
        )

    def _print_sizes(self, printer: Printer) -> None:
        printer.print_attribute(self.element_type)
        sizes = (self.num_layers, self.num_kv_heads, self.head_dim, self.block_size, self.max_seq_len)
        for size in sizes:
            printer.print_string(f", {size.data}")


@irdl_attr_definition
class PagedKVCacheType(_KVCacheType):
    """The keys and values of all layers of all sequences, in blocks of ``block_size`` positions.

    ``!llm.paged_kv_cache<f16, 12, 16, 64, 16, 4096>``: element type, layers, KV heads, head dim, tokens a block,
    maximum sequence length. How many blocks there are is decided by the pass ``kv-cache-allocation``, not by the type.
    """

    name = "llm.paged_kv_cache"

    def __init__(
        self,
        element_type: Attribute,
        num_layers: int | IntAttr,
        num_kv_heads: int | IntAttr,
        head_dim: int | IntAttr,
        block_size: int | IntAttr,
        max_seq_len: int | IntAttr,
    ) -> None:
        sizes = (num_layers, num_kv_heads, head_dim, block_size, max_seq_len)
        super().__init__(element_type, *(_int(size) for size in sizes))

    def verify(self) -> None:
        self._check()

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            return [parser.parse_type(), *(_parse_int_after_comma(parser) for _ in range(5))]

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            self._print_sizes(printer)


@irdl_attr_definition
class ShardedKVCacheType(_KVCacheType):
    """One device's share of the KV cache of one long sequence: shard i holds positions [i·L/n, (i+1)·L/n).

    ``!llm.sharded_kv_cache<f16, 12, 16, 64, 16, 32768, shards=4>``: as `PagedKVCacheType`, then the number of shards n
    that the L positions are split over. In a lowered function a value of this type is two tensors, the keys and the
    values, each [layers, L/n, KV heads, head dim].
    """

    name = "llm.sharded_kv_cache"
    num_shards: IntAttr

    def __init__(
        self,
        element_type: Attribute,
        num_layers: int | IntAttr,
        num_kv_heads: int | IntAttr,
        head_dim: int | IntAttr,
        block_size: int | IntAttr,
        max_seq_len: int | IntAttr,
        num_shards: int | IntAttr,
    ) -> None:
        sizes = (num_layers, num_kv_heads, head_dim, block_size, max_seq_len, num_shards)
        super().__init__(element_type, *(_int(size) for size in sizes))

    @property
    def shard_len(self) -> int:
        """Positions that one shard holds."""
        return self.max_seq_len.data // self.num_shards.data

    def parts(self) -> tuple[TensorType[Attribute], ...]:
        """The tensors that hold such a value: keys, values."""
        shape = (self.num_layers.data, self.shard_len, self.num_kv_heads.data, self.head_dim.data)
        return TensorType(self.element_type, shape), TensorType(self.element_type, shape)

    def verify(self) -> None:
        self._check()
        _check_positive(self.name, shards=self.num_shards)
        if self.max_seq_len.data % (self.num_shards.data * self.block_size.data):
            fail(
                f"!{self.name}: maximum sequence length",
                f"a multiple of shards x block size = {self.num_shards.data} x {self.block_size.data}",
                self.max_seq_len.data,
            )

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            params = [parser.parse_type(), *(_parse_int_after_comma(parser) for _ in range(5))]
            parser.parse_punctuation(",")
            parser.parse_keyword("shards")
            parser.parse_punctuation("=")
            params.append(IntAttr(parser.parse_integer(allow_boolean=False)))
            return params

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            self._print_sizes(printer)
            printer.print_string(f", shards={self.num_shards.data}")


# -- quantized tensors -------------------------------------------------------------------------------------------------

ROWS, COLUMNS = "rows", "columns"
"""Layouts of the tensors that hold a quantized tensor."""


def _check_quantized_shape(type_name: str, shape: Sequence[int]) -> None:
    if not shape or any(dim <= 0 for dim in shape):
        fail(f"!{type_name}: shape", "at least one dimension, all positive", format_dims(shape))


def _check_storage(type_name: str, element_type: Attribute) -> None:
    if not isinstance(element_type, IntegerType) or element_type.width.data not in (2, 4, 8):
        fail(f"!{type_name}: element type", "an integer of 2, 4 or 8 bits", element_type)


@irdl_attr_definition
class QuantizedTensorType(ParametrizedAttribute, TypeAttribute):
    """Integers with the numbers that turn them back into floats, a set for each group of the last dimension.

    Exactly one of three kinds, for stored integers q, scale s, zero point z and minimum m of the group:

    - ``!llm.quantized_tensor<4x1024xi8, scale=f32, symmetric=true>``: x = q·s
    - ``!llm.quantized_tensor<4x1024xi8, scale=f32, zp=i8, group_size=128>``: x = (q − z)·s
    - ``!llm.quantized_tensor<4x1024xi4, scale=f32, min=f32, group_size=32>``: x = q·s + m, q unsigned (GGUF's Q4_1)

    Without ``group_size`` a group is the whole last dimension: a scale per channel. In a lowered function a value of
    this type is two or three tensors: the integers, the scales [..., groups], the zero points or minima [..., groups].
    Integers of fewer than 8 bits are packed along the last dimension, the first in the lowest bits of a byte: those of
    ``4x1024xi4`` are ``4x512xui8``, byte i of a row holding q[2i] mod 16 + 16 · (q[2i + 1] mod 16).

    A matrix of 4 or 8 bits may have ``layout=columns``: its tensors are transposed, and the integers, in a type of
    their own width, are packed by the device: those of ``4x1024xi4`` are ``1024x4xi4``, their scales [groups, 4].
    """

    name = "llm.quantized_tensor"

    shape: ArrayAttr[IntAttr]
    element_type: Attribute
    scale_type: Attribute
    zero_point_type: Attribute
    min_type: Attribute
    group_size: IntAttr | NoneAttr
    layout: StringAttr

    def __init__(
        self,
        shape: Sequence[int],
        element_type: Attribute,
        scale_type: Attribute,
        *,
        zero_point_type: Attribute | None = None,
        min_type: Attribute | None = None,
        group_size: int | None = None,
        layout: str = ROWS,
    ) -> None:
        super().__init__(
            ArrayAttr(IntAttr(dim) for dim in shape),
            element_type,
            scale_type,
            zero_point_type or NONE,
            min_type or NONE,
            NONE if group_size is None else IntAttr(group_size),
            StringAttr(layout),
        )

    def get_shape(self) -> tuple[int, ...]:
        """The shape of the tensor of floats that this stands for."""
        return tuple(dim.data for dim in self.shape.data)

    @property
    def in_columns(self) -> bool:
        """Whether the tensors that hold it are transposed."""
        return self.layout.data == COLUMNS

    def with_layout(self, layout: str) -> "QuantizedTensorType":
        """The same matrix in tensors that are laid out otherwise."""
        return QuantizedTensorType.new([*self.parameters[:-1], StringAttr(layout)])

    @property
    def is_symmetric(self) -> bool:
        """Whether x = q·s."""
        return self.zero_point_type == NONE and self.min_type == NONE

    @property
    def elements_per_group(self) -> int:
        """How many elements of the last dimension share a scale."""
        return self.get_shape()[-1] if isinstance(self.group_size, NoneAttr) else self.group_size.data

    def parts(self) -> tuple[TensorType[Attribute], ...]:
        """The tensors that hold such a value: integers, scales, and zero points or minima where it has them."""
        shape = self.get_shape()
        groups = (*shape[:-1], shape[-1] // self.elements_per_group)
        if self.in_columns:
            groups = groups[::-1]
        parts = [self._stored(), TensorType(self.scale_type, groups)]
        parts += [TensorType(offset, groups) for offset in (self.zero_point_type, self.min_type) if offset != NONE]
        return tuple(parts)

    @property
    def integer_type(self) -> IntegerType:
        """Of the integers q: signless ones are signed, those with minima are unsigned."""
        if self.min_type != NONE:
            return unsigned(self.element_type)
        assert isinstance(self.element_type, IntegerType)
        return self.element_type

    def _stored(self) -> TensorType[Attribute]:
        """The tensor of the integers."""
        *leading, last = self.get_shape()
        num_bits = self.integer_type.width.data
        if self.in_columns:
            return TensorType(self.integer_type, (last, *leading))
        if num_bits == 8:
            return TensorType(self.integer_type, (*leading, last))
        return TensorType(IntegerType(8, Signedness.UNSIGNED), (*leading, last * num_bits // 8))

    def verify(self) -> None:
        shape = self.get_shape()
        _check_quantized_shape(self.name, shape)
        _check_storage(self.name, self.element_type)
        assert isinstance(self.element_type, IntegerType)
        a_byte = 8 // self.element_type.width.data
        if self.layout.data not in (ROWS, COLUMNS):
            fail(f"!{self.name}: layout", f"{ROWS} or {COLUMNS}", self.layout.data)
        if self.in_columns and (len(shape) != 2 or self.element_type.width.data not in (4, 8)):
            got = f"{format_dims(shape)} of {self.element_type}"
            fail(f"!{self.name}: layout={COLUMNS}", "a matrix of integers of 4 or 8 bits", got)
        if shape[-1] % a_byte:
            fail(f"!{self.name}: last dimension", f"a multiple of {a_byte}, which share a byte", shape[-1])
        _check_float_type(f"!{self.name}: scale", self.scale_type)
        if self.zero_point_type != NONE and self.min_type != NONE:
            raise VerifyException(f"!{self.name}: expected one of zp and min, got both")
        if self.zero_point_type != NONE:
            self._check_zero_point()
        if self.min_type != NONE:
            _check_float_type(f"!{self.name}: min", self.min_type)
        if isinstance(self.group_size, NoneAttr):
            return
        if self.group_size.data <= 0 or shape[-1] % self.group_size.data:
            fail(f"!{self.name}: group_size", f"a divisor of the last dimension {shape[-1]}", self.group_size.data)

    def _check_zero_point(self) -> None:
        assert isinstance(self.element_type, IntegerType)
        width = self.element_type.width.data
        if not isinstance(self.zero_point_type, IntegerType) or self.zero_point_type.width.data < width:
            fail(f"!{self.name}: zp", f"an integer type of at least {width} bits", self.zero_point_type)

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        found: dict[str, Attribute] = {}
        with parser.in_angle_brackets():
            shape, element_type = parser.parse_ranked_shape()
            while parser.parse_optional_punctuation(","):
                start = parser.pos
                key = parser.parse_identifier()
                parser.parse_punctuation("=")
                if key in found:
                    parser.raise_error(f"!{cls.name}: {key} is given twice", start, parser.pos)
                found[key] = cls._parse_value(parser, key, start)
            if "scale" not in found:
                parser.raise_error(f"!{cls.name}: expected scale=, the type of the scales")
            if sum(key in found for key in ("symmetric", "zp", "min")) != 1:
                parser.raise_error(f"!{cls.name}: expected exactly one of symmetric=true, zp= and min=")
        return (
            ArrayAttr(IntAttr(dim) for dim in shape),
            element_type,
            found["scale"],
            found.get("zp", NONE),
            found.get("min", NONE),
            found.get("group_size", NONE),
            found.get("layout", StringAttr(ROWS)),
        )

    @staticmethod
    def _parse_value(parser: AttrParser, key: str, start: int) -> Attribute:
        if key in ("scale", "zp", "min"):
            return parser.parse_type()
        if key == "group_size":
            return IntAttr(parser.parse_integer(allow_boolean=False))
        if key == "layout":
            return StringAttr(parser.parse_identifier())
        if key != "symmetric":
            message = f"unknown parameter {key}: expected scale, zp, min, symmetric, group_size or layout"
            parser.raise_error(message, start, parser.pos)
        if not parser.parse_boolean():
            parser.raise_error("symmetric: expected true (leave it out and give zp= or min=)", start, parser.pos)
        return NONE

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_dimension_list(self.get_shape())
            printer.print_string("x")
            printer.print_attribute(self.element_type)
            for key, value in (("scale", self.scale_type), ("zp", self.zero_point_type), ("min", self.min_type)):
                if value != NONE:
                    printer.print_string(f", {key}=")
                    printer.print_attribute(value)
            if self.is_symmetric:
                printer.print_string(", symmetric=true")
            if isinstance(self.group_size, IntAttr):
                printer.print_string(f", group_size={self.group_size.data}")
            if self.layout.data != ROWS:
                printer.print_string(f", layout={self.layout.data}")


@irdl_attr_definition
class MixedType(ParametrizedAttribute, TypeAttribute):
    """The element type of a tensor some of whose rows are wide integers, the others narrow: ``!llm.mixed<i8,i4>``."""

    name = "llm.mixed"

    wide: Attribute
    narrow: Attribute

    def __init__(self, wide: Attribute, narrow: Attribute) -> None:
        super().__init__(wide, narrow)

    def verify(self) -> None:
        for element_type in (self.wide, self.narrow):
            _check_storage(self.name, element_type)
        assert isinstance(self.wide, IntegerType)
        assert isinstance(self.narrow, IntegerType)
        if self.wide.width.data <= self.narrow.width.data:
            fail(f"!{self.name}", "the wider type first", f"{self.wide}, {self.narrow}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            wide = parser.parse_type()
            parser.parse_punctuation(",")
            return wide, parser.parse_type()

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_attribute(self.wide)
            printer.print_string(",")
            printer.print_attribute(self.narrow)


@irdl_attr_definition
class MixedQuantizedTensorType(ParametrizedAttribute, TypeAttribute):
    """A matrix quantized symmetrically, a scale a row, whose rows are of two widths; x = q·s.

    ``!llm.mixed_quantized_tensor<4x1024x!llm.mixed<i8,i4>, scale=f32>``. Which rows are wide is said where the tensor
    is made (`QuantizeOp`'s ``wide_rows``). In a lowered function a value of this type is two tensors: the integers, all
    in the wide type, and the scales [rows, 1].
    """

    name = "llm.mixed_quantized_tensor"

    shape: ArrayAttr[IntAttr]
    element_type: MixedType
    scale_type: Attribute

    def __init__(self, shape: Sequence[int], element_type: MixedType, scale_type: Attribute) -> None:
        super().__init__(ArrayAttr(IntAttr(dim) for dim in shape), element_type, scale_type)

    def get_shape(self) -> tuple[int, ...]:
        """The shape of the tensor of floats that this stands for."""
        return tuple(dim.data for dim in self.shape.data)

    def parts(self) -> tuple[TensorType[Attribute], ...]:
        """The tensors that hold such a value: integers, scales."""
        shape = self.get_shape()
        return TensorType(self.element_type.wide, shape), TensorType(self.scale_type, (shape[0], 1))

    def verify(self) -> None:
        _check_quantized_shape(self.name, self.get_shape())
        if len(self.get_shape()) != 2:
            fail(f"!{self.name}: shape", "a matrix", format_dims(self.get_shape()))
        _check_float_type(f"!{self.name}: scale", self.scale_type)

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            shape, element_type = parser.parse_ranked_shape()
            parser.parse_punctuation(",")
            parser.parse_keyword("scale")
            parser.parse_punctuation("=")
            return ArrayAttr(IntAttr(dim) for dim in shape), element_type, parser.parse_type()

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_dimension_list(self.get_shape())
            printer.print_string("x")
            printer.print_attribute(self.element_type)
            printer.print_string(", scale=")
            printer.print_attribute(self.scale_type)


# -- shards ------------------------------------------------------------------------------------------------------------


@irdl_attr_definition
class ShardedTensorType(ParametrizedAttribute, TypeAttribute):
    """One shard of a tensor that is split evenly along a dimension.

    ``!llm.sharded_tensor<tensor<4096x4096xf16>, 1, 4, 2>``: the whole tensor's type, the dimension, the number of
    shards, which shard. In a lowered function a value of this type is one tensor, the shard.
    """

    name = "llm.sharded_tensor"

    original: TensorType[Attribute]
    dim: IntAttr
    num_shards: IntAttr
    shard_id: IntAttr

    def __init__(
        self,
        original: TensorType[Attribute],
        dim: int | IntAttr,
        num_shards: int | IntAttr,
        shard_id: int | IntAttr,
    ) -> None:
        super().__init__(original, _int(dim), _int(num_shards), _int(shard_id))

    def parts(self) -> tuple[TensorType[Attribute], ...]:
        """The tensor that holds such a value: the shard."""
        shape = list(self.original.get_shape())
        shape[self.dim.data] //= self.num_shards.data
        return (TensorType(self.original.element_type, shape),)

    def verify(self) -> None:
        shape = self.original.get_shape()
        if not 0 <= self.dim.data < len(shape):
            fail(f"!{self.name}: dim", f"a dimension of {self.original}", self.dim.data)
        _check_positive(self.name, **{"number of shards": self.num_shards})
        if shape[self.dim.data] % self.num_shards.data:
            fail(f"!{self.name}: number of shards", f"a divisor of {shape[self.dim.data]}", self.num_shards.data)
        if not 0 <= self.shard_id.data < self.num_shards.data:
            fail(f"!{self.name}: shard", f"between 0 and {self.num_shards.data - 1}", self.shard_id.data)

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            return [parser.parse_type(), *(_parse_int_after_comma(parser) for _ in range(3))]

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_attribute(self.original)
            printer.print_string(f", {self.dim.data}, {self.num_shards.data}, {self.shard_id.data}")


CompositeType = QuantizedTensorType | MixedQuantizedTensorType | ShardedKVCacheType | ShardedTensorType
"""Types of values that are held by the tensors of their ``parts()``."""
