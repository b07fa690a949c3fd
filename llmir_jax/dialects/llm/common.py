"""What the ops of the llm dialect share: their assembly syntax, and the checks of their verifiers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NoReturn, Self, cast

from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    AnyFloat,
    FloatAttr,
    IntegerAttr,
    IntegerType,
    StringAttr,
    TensorType,
    i32,
    i64,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.irdl import AttrSizedOperandSegments, IRDLOperation, OptionalDef
from xdsl.parser import Parser, UnresolvedOperand
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

Dim = int | str
"""A dimension that a verifier expects: a size, or a letter that stands for the same size throughout an op."""


class LLMOp(IRDLOperation, ABC):
    """An op of the dialect, in the one syntax that all of them share.

        name %x, %y, … group(%a, %b) … {properties and attributes} : (operand types) -> result types

    The operands that every op of the kind has come first, then optional ones in named groups, each all or none. Both
    spellings of published IR are read: the first operands with and without parentheses around them, and also operand
    types without. Properties that have their default value are not printed.
    """

    OPERAND_GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Optional operands by the name of the group they are written in; others are written after the required ones."""
    PARENTHESIZED: ClassVar[bool] = False
    """Whether the first operands are printed in parentheses."""

    @abstractmethod
    def check(self) -> None:
        """Raise VerifyException where shapes, dtypes or attributes are not what the op needs."""

    def verify_(self) -> None:
        try:
            self.check()
        except VerifyException as error:
            raise VerifyException(f"{self.name}: {error}") from None

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        definition = cls.get_irdl_definition()
        grouped = {name for names in cls.OPERAND_GROUPS.values() for name in names}
        leading = [name for name, _ in definition.operands if name not in grouped]
        num_required = sum(
            not isinstance(kind, OptionalDef) for name, kind in definition.operands if name not in grouped
        )
        start = parser.pos
        operands = _parse_operands(parser)
        if not num_required <= len(operands) <= len(leading):
            expected = f"{num_required} to {len(leading)}" if num_required < len(leading) else str(num_required)
            message = f"{cls.name}: expected {expected} operands ({', '.join(leading)}), got {len(operands)}"
            parser.raise_error(message, start, parser.pos)
        found = dict(zip(leading, operands, strict=False))
        while (keyword := parser.parse_optional_keyword_in(cls.OPERAND_GROUPS)) is not None:
            names = cls.OPERAND_GROUPS[keyword]
            if names[0] in found:
                parser.raise_error(f"{cls.name}: expected one {keyword}(…), got two", start, parser.pos)
            group = parser.parse_comma_separated_list(parser.Delimiter.PAREN, parser.parse_unresolved_operand)
            if len(group) != len(names):
                message = f"{cls.name}: expected {len(names)} operands ({', '.join(names)}) in {keyword}(…), "
                parser.raise_error(message + f"got {len(group)}", start, parser.pos)
            found |= zip(names, group, strict=True)
        attributes = parser.parse_optional_attr_dict()
        parser.parse_punctuation(":")
        start = parser.pos
        operand_types, result_types = _parse_signature(parser)
        ordered = [(name, found[name]) for name, _ in definition.operands if name in found]
        if len(operand_types) != len(ordered):
            message = (
                f"{cls.name}: expected {len(ordered)} operand types, one for each operand, got {len(operand_types)}"
            )
            parser.raise_error(message, start, parser.pos)
        if len(result_types) != len(definition.results):
            message = f"{cls.name}: expected {len(definition.results)} result types, got {len(result_types)}"
            parser.raise_error(message, start, parser.pos)
        values = {
            name: parser.resolve_operand(operand, operand_type)
            for (name, operand), operand_type in zip(ordered, operand_types, strict=True)
        }
        properties = {name: attributes.pop(name) for name in definition.properties if name in attributes}
        return cls.build(
            operands=[
                maybe(values.get(name)) if isinstance(kind, OptionalDef) else values[name]
                for name, kind in definition.operands
            ],
            result_types=result_types,
            properties=properties,
            attributes=attributes,
        )

    def print(self, printer: Printer) -> None:
        definition = self.get_irdl_definition()
        grouped = {name for names in self.OPERAND_GROUPS.values() for name in names}
        leading = [getattr(self, name) for name, _ in definition.operands if name not in grouped]
        printer.print_string("(" if self.PARENTHESIZED else " ")
        printer.print_list([value for value in leading if value is not None], printer.print_ssa_value)
        printer.print_string(")" if self.PARENTHESIZED else "")
        for keyword, names in self.OPERAND_GROUPS.items():
            group = [getattr(self, name) for name in names]
            if None in group:
                continue
            printer.print_string(f" {keyword}")
            with printer.in_parens():
                printer.print_list(group, printer.print_ssa_value)
        shown = {
            name: self.properties[name]
            for name, kind in definition.properties.items()
            if name in self.properties
            and name != AttrSizedOperandSegments.attribute_name
            and self.properties[name] != kind.default_value
        }
        printer.print_op_attributes({**shown, **self.attributes})
        printer.print_string(" : ")
        printer.print_function_type(self.operand_types, self.result_types)


def _parse_operands(parser: Parser) -> list[UnresolvedOperand]:
    """``%x, %y`` or ``(%x, %y)``."""
    parenthesized = parser.parse_optional_punctuation("(") is not None
    operands = parser.parse_optional_undelimited_comma_separated_list(
        parser.parse_optional_unresolved_operand, parser.parse_unresolved_operand
    )
    if parenthesized:
        parser.parse_punctuation(")")
    return operands or []


def _parse_signature(parser: Parser) -> tuple[Sequence[Attribute], Sequence[Attribute]]:
    """``(a, b) -> c``, ``a, b -> (c, d)`` and the like."""
    parenthesized = parser.parse_optional_punctuation("(") is not None
    operand_types = parser.parse_optional_undelimited_comma_separated_list(
        parser.parse_optional_type, parser.parse_type
    )
    if parenthesized:
        parser.parse_punctuation(")")
    parser.parse_punctuation("->")
    result_types = parser.parse_optional_comma_separated_list(parser.Delimiter.PAREN, parser.parse_type)
    return operand_types or [], [parser.parse_type()] if result_types is None else result_types


def maybe(value: SSAValue | Operation | None) -> Sequence[SSAValue | Operation]:
    """An optional operand, as xDSL's constructors take it."""
    return () if value is None else (value,)


# -- reading attributes ------------------------------------------------------------------------------------------------


def int_of(attr: Attribute) -> int:
    """The value of an integer attribute."""
    assert isinstance(attr, IntegerAttr)
    return attr.value.data


def optional_int_of(attr: Attribute | None) -> int | None:
    """The value of an integer attribute that an op may lack."""
    return None if attr is None else int_of(attr)


def bool_of(attr: Attribute) -> bool:
    """The value of an ``i1`` attribute (xDSL keeps ``true`` as 1 or as −1)."""
    return int_of(attr) != 0


def float_of(attr: Attribute) -> float:
    """The value of a float attribute."""
    assert isinstance(attr, FloatAttr)
    return attr.value.data


def optional_float_of(attr: Attribute | None) -> float | None:
    """The value of a float attribute that an op may lack."""
    return None if attr is None else float_of(attr)


# -- making attributes -------------------------------------------------------------------------------------------------


def optional_i64(value: int | None) -> IntegerAttr[IntegerType] | None:
    """``value : i64``."""
    return None if value is None else IntegerAttr(value, i64)


def optional_i32(value: int | None) -> IntegerAttr[IntegerType] | None:
    """``value : i32``."""
    return None if value is None else IntegerAttr(value, i32)


def optional_f32(value: float | None) -> FloatAttr[AnyFloat] | None:
    """``value : f32``."""
    return None if value is None else FloatAttr(value, 32)


# -- checks of verifiers -----------------------------------------------------------------------------------------------


def fail(subject: str, expected: str, got: object) -> NoReturn:
    """Refuse an op: what is wrong, what it had to be, what it is."""
    raise VerifyException(f"{subject}: expected {expected}, got {got}")


def tensor_of(value: SSAValue, subject: str) -> TensorType[Attribute]:
    """The type of a value that must be a ranked tensor."""
    if not isinstance(value.type, TensorType):
        fail(subject, "a ranked tensor", value.type)
    return cast("TensorType[Attribute]", value.type)


def format_dims(dims: Sequence[int]) -> str:
    """``4x?x64``."""
    return "x".join("?" if dim == DYNAMIC_INDEX else str(dim) for dim in dims) if dims else "a scalar"


def check_shapes(expected: Mapping[str, tuple[SSAValue | None, Sequence[Dim]]], **known: int) -> dict[str, int]:
    """Check that each named value is a tensor of the shape given as sizes and letters.

    A letter stands for one size in the whole op; a dynamic dimension agrees with any. ``"..."`` as the first dimension
    stands for the same leading dimensions everywhere it occurs. Absent (None) values are skipped.

    Returns the size of each letter. Raises VerifyException naming the value, the shape expected and the one found.
    """
    sizes: dict[str, int] = dict(known)
    leading: tuple[int, ...] | None = None
    for subject, (value, dims) in expected.items():
        if value is None:
            continue
        shape = tensor_of(value, subject).get_shape()
        has_leading = bool(dims) and dims[0] == "..."
        trailing_dims = dims[1:] if has_leading else dims
        num_leading = len(shape) - len(trailing_dims)
        if num_leading < 0 or (num_leading and not has_leading):
            fail(subject, f"shape {_describe(dims, sizes)}", format_dims(shape))
        if has_leading:
            if leading is not None and not dims_agree(leading, shape[:num_leading]):
                fail(subject, f"leading dimensions {format_dims(leading)}", format_dims(shape[:num_leading]))
            leading = leading or shape[:num_leading]
        found = dict(sizes)
        for dim, size in zip(trailing_dims, shape[num_leading:], strict=True):
            bound = dim if isinstance(dim, int) else found.get(dim, DYNAMIC_INDEX)
            if DYNAMIC_INDEX not in (bound, size) and bound != size:
                fail(subject, f"shape {_describe(dims, sizes)}", format_dims(shape))
            if isinstance(dim, str) and bound == DYNAMIC_INDEX:
                found[dim] = size
        sizes = found
    return sizes


def _describe(dims: Sequence[Dim], sizes: Mapping[str, int]) -> str:
    """``[T=4, H, 64]``: the letters, with the size each has so far."""
    known = {dim: size for dim, size in sizes.items() if size != DYNAMIC_INDEX}
    return "[" + ", ".join(f"{dim}={known[dim]}" if dim in known else str(dim) for dim in map(str, dims)) + "]"


def dims_agree(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes can be the same: a dynamic dimension agrees with any."""
    return len(a) == len(b) and all(x == y or DYNAMIC_INDEX in (x, y) for x, y in zip(a, b, strict=True))


def check_float(**values: SSAValue | None) -> None:
    """Check that each named value is a tensor of floating-point numbers."""
    for subject, value in values.items():
        if value is None:
            continue
        tensor = tensor_of(value, subject)
        if not isinstance(tensor.element_type, AnyFloat):
            fail(subject, "floating-point elements", tensor.element_type)


def check_int32(**values: SSAValue | None) -> None:
    """Check that each named value is a tensor of 32-bit integers."""
    for subject, value in values.items():
        if value is None:
            continue
        tensor = tensor_of(value, subject)
        if tensor.element_type != i32:
            fail(subject, "elements of type i32", tensor.element_type)


def check_same_type(subject: str, value: SSAValue, like_subject: str, like: SSAValue) -> None:
    """Check that a value has the type of another."""
    if value.type != like.type:
        fail(subject, f"the type of {like_subject}, {like.type}", value.type)


def check_range(subject: str, attr: Attribute | None, low: int, high: int | None = None) -> None:
    """Check an integer attribute, where present, against ``low <= value`` and, where given, ``value < high``."""
    if attr is None:
        return
    if not isinstance(attr, IntegerAttr) or (isinstance(attr.type, IntegerType) and attr.type.width.data == 1):
        fail(subject, "an integer", attr)
    value = attr.value.data
    if value < low or (high is not None and value >= high):
        fail(subject, f"at least {low}" if high is None else f"between {low} and {high - 1}", value)


def check_positive_float(subject: str, attr: Attribute | None) -> None:
    """Check that a float attribute, where present, is a positive finite number."""
    if attr is None:
        return
    value = float_of(attr)
    if not 0 < value < float("inf"):
        fail(subject, "a positive finite number", value)


def check_finite(subject: str, attr: Attribute | None) -> None:
    """Check that a float attribute, where present, is finite."""
    if attr is not None and not abs(float_of(attr)) < float("inf"):
        fail(subject, "a finite number", float_of(attr))


def check_one_of(subject: str, attr: StringAttr, allowed: Sequence[str]) -> None:
    """Check a string attribute against the words it may be."""
    if attr.data not in allowed:
        fail(subject, f"one of {', '.join(allowed)}", f'"{attr.data}"')
