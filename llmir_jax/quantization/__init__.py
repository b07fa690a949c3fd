"""Quantized matrices, the schemes by which they are made, and the rules that say which parameter gets which."""

from llmir_jax.quantization.array import QuantizedArray
from llmir_jax.quantization.rounding import quantize
from llmir_jax.quantization.scheme import PRESETS, Scheme, parse_scheme

__all__ = ["PRESETS", "QuantizedArray", "Scheme", "parse_scheme", "quantize"]
