"""Quantized matrices, the schemes by which they are made, and the rules that say which parameter gets which."""

from llmir_jax.quantization.array import QuantizedArray
from llmir_jax.quantization.calibration import Calibration
from llmir_jax.quantization.gptq import quantize_calibrated, weight_rounding
from llmir_jax.quantization.mixed_precision import MixedPrecision, Quantize, check_quantize, mixed_precision_plan
from llmir_jax.quantization.ranges import activation_scales
from llmir_jax.quantization.rounding import MatrixKey, Rounding, plain_rounding, quantize
from llmir_jax.quantization.rules import STORED, Plan, Rules, make_plan
from llmir_jax.quantization.scheme import PRESETS, Scheme, parse_scheme
from llmir_jax.quantization.statistics import InputStatistics

__all__ = [
    "PRESETS",
    "STORED",
    "Calibration",
    "InputStatistics",
    "MatrixKey",
    "MixedPrecision",
    "Plan",
    "Quantize",
    "QuantizedArray",
    "Rounding",
    "Rules",
    "Scheme",
    "activation_scales",
    "check_quantize",
    "make_plan",
    "mixed_precision_plan",
    "parse_scheme",
    "plain_rounding",
    "quantize",
    "quantize_calibrated",
    "weight_rounding",
]
