"""Ragged paged attention: prompts in chunks and single tokens of many sequences in one batch, over pages of a cache."""

from pallas_kernels.paged_attention.api import paged_attention as paged_attention
from pallas_kernels.paged_attention.api import unsupported_reason as unsupported_reason
from pallas_kernels.paged_attention.types import KVPages as KVPages
from pallas_kernels.paged_attention.types import Masking as Masking
from pallas_kernels.paged_attention.types import PagedAttentionError as PagedAttentionError
from pallas_kernels.paged_attention.types import RaggedBatch as RaggedBatch
from pallas_kernels.paged_attention.types import Sizes as Sizes
