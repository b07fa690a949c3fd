"""Quantized matrices, the schemes by which they are made, and the rules that say which parameter gets which."""

from llmir_jax.quantization.array import QuantizedArray
from llmir_jax.quantization.rounding import MatrixKey, Rounding, plain_rounding, quantize
from llmir_jax.quantization.rules import STORED, Plan, Quantize, make_plan
from llmir_jax.quantization.scheme import PRESETS, Scheme, parse_scheme

__all__ = [
    "PRESETS",
    "STORED",
    "MatrixKey",
    "Plan",
    "Quantize",
    "QuantizedArray",
    "Rounding",
    "Scheme",
    "make_plan",
    "parse_scheme",
    "plain_rounding",
    "quantize",
]
