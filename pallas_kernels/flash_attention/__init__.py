"""Attention of whole sequences to themselves, without a cache and without a matrix of scores in memory."""

from pallas_kernels.flash_attention.api import flash_attention as flash_attention
from pallas_kernels.flash_attention.api import unsupported_reason as unsupported_reason
from pallas_kernels.flash_attention.types import FlashAttentionError as FlashAttentionError
from pallas_kernels.flash_attention.types import Masking as Masking
from pallas_kernels.flash_attention.types import Sizes as Sizes
