"""How heads lie in a TPU's lanes, and the tiles of paged attention, chosen by the VMEM that a call takes.

Heads whose size is no multiple of 128 lanes come in *lane groups*, the fewest heads that fill whole lanes.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.types import Sizes
from pallas_kernels.tiles import LANES, SUBLANES, native_tile, round_up

HEAD_DIMS = (64, 80, 96, 128, 256)
VMEM_BUDGET_BYTES = 24 << 20
"""What `vmem_bytes` may give; what `tpu.VMEM_LIMIT_BYTES` has beyond it is for the compiler's own."""
SMEM_BUDGET_BYTES = 512 << 10
"""Of 1 MiB of SMEM a core on these chips (get_tpu_info_for_chip of jax.experimental.pallas.tpu, 0.10.2)."""
KEYS_PER_BLOCK = (512, 256, 128, 64, 32, 16, 8)
TILES = (64, 32, 16, 8, 1)


def lanes_per_group(num_kv_heads: int, head_dim: int) -> int:
    """Lanes of the fewest heads that fill whole registers, or of all heads if these are fewer."""
    whole = math.lcm(head_dim, LANES)
    return min(whole, round_up(num_kv_heads * head_dim, LANES))


def page_width(num_kv_heads: int, head_dim: int) -> int:
    """Elements of a token's row in a page: its heads, padded to whole lane groups."""
    return round_up(num_kv_heads * head_dim, lanes_per_group(num_kv_heads, head_dim))


def rows_per_tile(dtype: np.dtype[Any]) -> int:
    """Rows of a tile of memory: a slice of pages must begin and end at multiples of it."""
    return native_tile(dtype)[0]


def layout(sizes: Sizes) -> tuple[int, int, int, int]:
    """A page row's width, lane groups, lanes of each, and rows of queries that a token has in each."""
    width = page_width(sizes.num_kv_heads, sizes.head_dim)
    lanes = lanes_per_group(sizes.num_kv_heads, sizes.head_dim)
    heads = lanes // sizes.head_dim * sizes.queries_per_kv_head
    return width, width // lanes, lanes, round_up(heads, SUBLANES)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile sizes of one call."""

    tile: int  # queries
    keys_per_block: int


def vmem_bytes(sizes: Sizes, config: Config) -> int:
    """VMEM that a call takes: buffers and scratch, counted, and the temporaries of a lane group's step."""
    width, groups, lanes, rows = layout(sizes)
    keys, queries = config.keys_per_block, config.tile * rows
    chunk = rows_per_tile(sizes.page_dtype)
    item = sizes.page_dtype.itemsize
    pages = 2 * 2 * keys * width * item
    staged = 2 * 2 * max(keys, chunk) * width * item
    ends = 2 * 2 * config.tile * groups * rows * lanes * 4  # queries and results
    running = groups * queries * (lanes + 2 * LANES) * 4
    scores = 6 * queries * max(keys, LANES) * 4
    operands = (2 * keys + 4 * queries) * lanes * 4  # keys, values; queries, products, old sums and new
    scales = 0
    if sizes.page_dtype == jnp.int8:
        kv_rows = round_up(sizes.num_kv_heads, SUBLANES)
        scales = 2 * 2 * kv_rows * (keys + keys // chunk * sizes.page_size) * 4
    return pages + staged + ends + running + scores + operands + scales


def choose_config(sizes: Sizes, *, single: bool) -> Config | None:
    """The largest tiles whose VMEM fits, keys first; None if none do. `single`: tiles of one query."""
    longest = sizes.pages_per_seq * sizes.page_size
    for tile in (1,) if single else [t for t in TILES if t <= max(8, sizes.num_tokens)]:
        for keys in KEYS_PER_BLOCK:
            keys_per_block = max(keys // sizes.page_size, 1) * sizes.page_size
            if keys_per_block > max(longest, sizes.page_size):
                continue
            config = Config(tile=tile, keys_per_block=keys_per_block)
            if vmem_bytes(sizes, config) <= VMEM_BUDGET_BYTES:
                return config
    return None


def unsupported_reason(sizes: Sizes) -> str | None:
    """None if the kernel takes arguments of these sizes, else why not, with the numbers."""
    if sizes.head_dim not in HEAD_DIMS:
        return f"head_dim {sizes.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if sizes.q_dtype.name not in ("float32", "bfloat16"):
        return f"queries are {sizes.q_dtype}, not float32 or bfloat16"
    if sizes.page_dtype.name not in ("float32", "bfloat16", "int8"):
        return f"pages are {sizes.page_dtype}, not float32, bfloat16 or int8"
    rows = LANES if sizes.page_dtype == jnp.int8 else rows_per_tile(sizes.page_dtype)
    if sizes.page_size % rows:
        return f"page_size {sizes.page_size} is no multiple of {rows}, which {sizes.page_dtype} pages need"
    tables = 4 * sizes.num_seqs * (sizes.pages_per_seq + 4) + 4 * 5 * sizes.num_tokens
    if tables > SMEM_BUDGET_BYTES:
        return f"block tables and tiles take {tables >> 10} KiB of SMEM, of {SMEM_BUDGET_BYTES >> 10}"
    if choose_config(sizes, single=True) is None:
        smallest = Config(tile=1, keys_per_block=sizes.page_size)
        return (
            f"one query and one page of {sizes.page_size} tokens take {vmem_bytes(sizes, smallest) / 2**20:.1f} MiB of "
            f"VMEM, of {VMEM_BUDGET_BYTES >> 20}"
        )
    return None


__all__ = [
    "VMEM_BUDGET_BYTES",
    "Config",
    "choose_config",
    "lanes_per_group",
    "layout",
    "page_width",
    "rows_per_tile",
    "unsupported_reason",
    "vmem_bytes",
]
