"""An MLIR parser that reads hexadecimal floats in dense constants as the bits that they are.

xDSL 0.73 and 0.74 read ``dense<0xFF800000> : tensor<f32>`` as the number 4286578688; MLIR, which prints infinities and
NaNs that way, means −inf.
"""

from dataclasses import dataclass
from typing import cast

from xdsl.dialects.builtin import AnyFloat, ComplexType, IndexType, IntegerType
from xdsl.parser import AttrParser, Parser
from xdsl.utils.lexer import Span


class _Hexadecimal(int):
    """An integer literal that was written in hexadecimal."""


def _float_of_bits(parser: AttrParser, value: object, element_type: AnyFloat, span: Span) -> float:
    """The float that a literal stands for: its bits where it is hexadecimal, its value otherwise."""
    if not isinstance(value, _Hexadecimal):
        return float(cast(float, value))
    try:
        raw = value.to_bytes(element_type.compile_time_size, "little")
    except OverflowError:
        parser.raise_error(f"hexadecimal float: expected the bits of one {element_type}, got {value:#x}", span)
    return float(element_type.unpack(raw, 1)[0])


@dataclass
class _Element(AttrParser._TensorLiteralElement):
    def to_type(
        self, parser: AttrParser, type: AnyFloat | IntegerType | IndexType | ComplexType
    ) -> int | float | tuple[int, int] | tuple[float, float]:
        if isinstance(type, AnyFloat) and isinstance(self.value, _Hexadecimal):
            return _float_of_bits(parser, self.value, type, self.span)
        if isinstance(type, ComplexType) and isinstance(type.element_type, AnyFloat) and isinstance(self.value, tuple):
            real, imag = self.value
            return (
                _float_of_bits(parser, real, type.element_type, self.span),
                _float_of_bits(parser, imag, type.element_type, self.span),
            )
        return cast("int | float | tuple[int, int] | tuple[float, float]", super().to_type(parser, type))


class IRParser(Parser):
    """xDSL's parser, exact for hexadecimal floats in dense constants."""

    def _parse_optional_bool_int_or_float(
        self,
    ) -> tuple[bool, Span] | tuple[int, Span] | tuple[float, Span] | None:
        is_hexadecimal = self._current_token.text[:2] in ("0x", "0X")
        parsed = super()._parse_optional_bool_int_or_float()
        if parsed is None or not is_hexadecimal:
            return parsed
        value, span = parsed
        return _Hexadecimal(value), span

    def _parse_optional_complex(
        self,
    ) -> tuple[tuple[float, float] | tuple[int, int] | tuple[bool, bool], Span] | None:
        """As xDSL's, but one part may be hexadecimal and the other a decimal float."""
        start = self.pos
        if self.parse_optional_punctuation("(") is None:
            return None
        real, _ = self._parse_bool_int_or_float()
        self.parse_punctuation(",")
        imag, _ = self._parse_bool_int_or_float()
        self.parse_punctuation(")")
        return (real, imag), Span(start, self.pos, self._current_token.span.input)

    def _parse_tensor_literal_element(self) -> _Element:
        element = super()._parse_tensor_literal_element()
        return _Element(element.is_negative, element.value, element.span)
