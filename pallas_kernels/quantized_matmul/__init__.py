"""Products with weights of int4 and int8, symmetric or not, per channel or in groups."""

from pallas_kernels.quantized_matmul.api import UnsupportedError, quantized_matmul, unsupported_reason
from pallas_kernels.quantized_matmul.gpu import GpuTiles
from pallas_kernels.quantized_matmul.hooks import Hooks
from pallas_kernels.quantized_matmul.tpu import TpuTiles
from pallas_kernels.quantized_matmul.weight import QuantizedWeight

__all__ = [
    "GpuTiles",
    "Hooks",
    "QuantizedWeight",
    "TpuTiles",
    "UnsupportedError",
    "quantized_matmul",
    "unsupported_reason",
]
