"""Attention of whole sequences to themselves as one Triton kernel.

    out[b, t, h] = Σ_j softmax_j(score(q[b, t, h], k[b, j, h'])) v[b, j, h'],   h' = h // G

A program serves BLOCK_M queries of one head of one sequence: it keeps a running maximum and sum over blocks of the keys
that any of them sees (Milakov & Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). Under a causal mask the
last queries have the most keys, so they come first.

Imports nothing but Triton, for the interpreter.
"""

import triton
import triton.language as tl

from pallas_kernels.paged_attention.triton_kernels import LOWEST, attend_block, load_rows


@triton.jit
def flash_attention(
    q,  # [B, T, HKV * GROUP, D]
    k,  # [B, T, HKV, D]
    v,  # [B, T, HKV, DV]
    slopes,  # float32 [HKV * GROUP], or None
    out,  # [B, T, HKV * GROUP, DV]
    T: tl.constexpr,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, sequence = tl.program_id(1), tl.program_id(2)
    HAS_SLOPES: tl.constexpr = slopes is not None
    DOT_DTYPE: tl.constexpr = tl.float32 if WIDE_DOT else q.dtype.element_ty

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_live = row < T
    place = (sequence.to(tl.int64) * T + row) * (HKV * GROUP) + head
    queries = load_rows(q, place * D, row_live, D, PADDED).to(DOT_DTYPE)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SLOPES:
        slope += tl.load(slopes + head)

    acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_N], 1.0, tl.float32)

    # which keys any of the rows sees
    first_key = 0
    if WINDOW is not None:
        first_key = tl.maximum(tile * BLOCK_M - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    end_key = T
    if CAUSAL:
        end_key = tl.minimum((tile + 1) * BLOCK_M, T)
    for start in range(first_key, end_key, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        live = key < T
        at = (sequence.to(tl.int64) * T + key) * HKV + head // GROUP
        keys = load_rows(k, at * D, live, D, PADDED).to(DOT_DTYPE)
        values = load_rows(v, at * DV, live, DV, PADDED_V).to(DOT_DTYPE)
        acc, largest, total = attend_block(
            acc, largest, total, queries, keys, values, ones, ones, live, key, row_live, row, slope,
            SCALE, CAUSAL, WINDOW, SOFTCAP, HAS_SLOPES,
        )  # fmt: skip

    d = tl.arange(0, PADDED_V)
    mask = row_live[:, None] & (d < DV)[None, :]
    acc = acc / tl.maximum(total, 1e-37)[:, None]
    tl.store(out + place[:, None] * DV + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
