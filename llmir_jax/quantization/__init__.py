"""Quantized matrices, the schemes by which they are made, and the rules that say which parameter gets which."""

from llmir_jax.quantization.array import QuantizedArray
from llmir_jax.quantization.calibration import Calibration
from llmir_jax.quantization.gptq import quantize_calibrated, weight_rounding
from llmir_jax.quantization.mixed_precision import MixedPrecision, mixed_precision_plan
from llmir_jax.quantization.ranges import activation_scales
from llmir_jax.quantization.rounding import quantize
from llmir_jax.quantization.rules import STORED, Plan, Quantize, make_plan
from llmir_jax.quantization.scheme import PRESETS, Scheme, parse_scheme
from llmir_jax.quantization.statistics import InputStatistics, histogram_bins

__all__ = [
    "PRESETS",
    "STORED",
    "Calibration",
    "InputStatistics",
    "MixedPrecision",
    "Plan",
    "Quantize",
    "QuantizedArray",
    "Scheme",
    "activation_scales",
    "histogram_bins",
    "make_plan",
    "mixed_precision_plan",
    "parse_scheme",
    "quantize",
    "quantize_calibrated",
    "weight_rounding",
]
