"""Attention of a ragged batch to paged keys and values, and the writing of new ones, as one Triton kernel.

    out[t, h] = Σ_j softmax_j(score(q[t, h], k[j])) v[j],   j over the positions of t's sequence that it sees

A program serves one tile of rows of one sequence, all query heads of one KV head, and one part of the sequence's old
keys: it keeps a running maximum and sum (Milakov & Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135). Where
sequences are too few to occupy a GPU their keys are cut into parts, whose results are merged afterwards
(Flash-Decoding, Dao et al. 2023). Old keys are read from pages, new ones from where the model left them, so that no
program waits for another's writes: what is read of a page and what is written to it are never the same slots.

Imports nothing but Triton, for the interpreter.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
"""Below any score; finite, so that a row that saw nothing yet is rescaled by exp(0), not exp(inf - inf)."""
ROUNDER = tl.constexpr(12582912.0)
"""1.5 · 2²³: added to a float32 below 2²², and taken away again, it rounds to the nearest even integer."""


@triton.jit
def load_rows(base, offsets, rows_live, LEN: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] of arrays of LEN numbers at `offsets`, with zeros for what is not there."""
    at = tl.arange(0, PADDED)
    mask = rows_live[:, None] & (at < LEN)[None, :]
    return tl.load(base + offsets[:, None] + at[None, :], mask=mask, other=0.0)


@triton.jit
def _quantize(x):
    """Integers, as float32 [rows, D], and their scales, float32 [rows]: as `types.quantize_rows`."""
    x = x.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([x.shape[0]], 127.0, tl.float32))
    divisor = tl.where(scale == 0.0, 1.0, scale)
    divided = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    return (divided + ROUNDER) - ROUNDER, scale


@triton.jit
def attend_block(
    acc,  # float32 [M, PADDED]
    largest,  # float32 [M]
    total,  # float32 [M]
    q,  # [M, PADDED]
    k,  # [N, PADDED]
    v,  # [N, PADDED]
    k_scale,  # float32 [N]
    v_scale,  # float32 [N]
    live,  # bool [N]
    key,  # int32 [N], positions
    row_live,  # bool [M]
    q_position,  # int32 [M]
    slope,  # float32 [M]
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):
    """The running softmax (acc, largest, total) after one more block of keys."""
    distance = key[None, :] - q_position[:, None]
    seen = live[None, :] & row_live[:, None]
    if CAUSAL:
        seen &= distance <= 0
    if WINDOW is not None:
        seen &= distance > -WINDOW
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE * k_scale[None, :]
    if SOFTCAP is not None:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
        scores = SOFTCAP * (1.0 - 2.0 / (tl.exp(scores * (2.0 / SOFTCAP)) + 1.0))
    if HAS_SLOPES:
        scores += slope[:, None] * distance.to(tl.float32)
    scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp(scores - larger[:, None])
    kept = tl.exp(largest - larger)
    total = total * kept + tl.sum(weights, 1)
    weights = (weights * v_scale[None, :]).to(v.dtype)
    acc = acc * kept[:, None] + tl.dot(weights, v, input_precision="ieee")
    return acc, larger, total


@triton.jit
def ragged_paged_attention(
    k_pages,  # [N, PAGE_SIZE, PAGE_WIDTH], of which the first HKV * D are the heads
    v_pages,  # as k_pages
    k_scales,  # float32 [N, HKV, PAGE_SIZE] of int8 pages, or None
    v_scales,  # as k_scales
    q,  # [NUM_ROWS, HKV * GROUP, D]
    new_k,  # [NUM_ROWS, HKV, D]
    new_v,  # [NUM_ROWS, HKV, D]
    tables,  # int32 [S, PAGES_PER_SEQ]
    tiles,  # int32 [tiles, 8]: first row, rows, sequence, its first row, its old keys, all its keys, 0, 0
    slopes,  # float32 [HKV * GROUP], or None
    out,  # [SPLITS, NUM_ROWS, HKV * GROUP, D]
    stats,  # float32 [2, SPLITS, NUM_ROWS, HKV * GROUP], largest score and sum of weights; None for one split
    NUM_ROWS: tl.constexpr,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_WIDTH: tl.constexpr,
    PAGES_PER_SEQ: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(tiles + tile * 8)
    num_rows = tl.load(tiles + tile * 8 + 1)
    seq = tl.load(tiles + tile * 8 + 2)
    run_start = tl.load(tiles + tile * 8 + 3)
    num_old = tl.load(tiles + tile * 8 + 4)  # in pages before this step
    seq_len = tl.load(tiles + tile * 8 + 5)
    if num_rows == 0:
        return

    HAS_SCALES: tl.constexpr = k_scales is not None
    HAS_SLOPES: tl.constexpr = slopes is not None
    DOT_DTYPE: tl.constexpr = tl.float32 if WIDE_DOT else q.dtype.element_ty

    # queries [BLOCK_M, D]: the heads of a row side by side
    m = tl.arange(0, BLOCK_M)
    row_live = (m // GROUP < num_rows) & (m < BLOCK_Q * GROUP)
    row = tl.where(row_live, first_row + m // GROUP, first_row)
    head = kv_head * GROUP + m % GROUP
    place = row.to(tl.int64) * (HKV * GROUP) + head
    queries = load_rows(q, place * D, row_live, D, PADDED).to(DOT_DTYPE)
    q_position = num_old + row - run_start
    slope = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes + head)

    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    n = tl.arange(0, BLOCK_N)

    # which keys any of the rows sees, and this part of the old ones
    first_key = 0
    if WINDOW is not None:
        first_key = tl.maximum(num_old + first_row - run_start - WINDOW + 1, 0)
    last_key = seq_len
    if CAUSAL:
        last_key = tl.minimum(num_old + first_row - run_start + num_rows, seq_len)
    old_end = tl.minimum(num_old, last_key)
    blocks = (tl.maximum(old_end - first_key, 0) + BLOCK_N - 1) // BLOCK_N
    part_len = (blocks + SPLITS - 1) // SPLITS * BLOCK_N
    part_start = first_key + part * part_len
    part_end = tl.minimum(part_start + part_len, old_end)

    for start in range(part_start, part_end, BLOCK_N):
        key = start + n
        live = key < part_end
        page = tl.load(tables + seq * PAGES_PER_SEQ + key // PAGE_SIZE, mask=live, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + key % PAGE_SIZE
        keys = load_rows(k_pages, slot * PAGE_WIDTH + kv_head * D, live, D, PADDED).to(DOT_DTYPE)
        values = load_rows(v_pages, slot * PAGE_WIDTH + kv_head * D, live, D, PADDED).to(DOT_DTYPE)
        k_scale = tl.full([BLOCK_N], 1.0, tl.float32)
        v_scale = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_SCALES:
            at = (page * HKV + kv_head) * PAGE_SIZE + key % PAGE_SIZE
            k_scale = tl.load(k_scales + at, mask=live, other=0.0)
            v_scale = tl.load(v_scales + at, mask=live, other=0.0)
        acc, largest, total = attend_block(
            acc, largest, total, queries, keys, values, k_scale, v_scale, live, key, row_live, q_position, slope,
            SCALE, CAUSAL, WINDOW, SOFTCAP, HAS_SLOPES,
        )  # fmt: skip

    if part == SPLITS - 1:
        for start in range(tl.maximum(first_key, num_old), last_key, BLOCK_N):
            key = start + n
            live = key < last_key
            at = ((run_start + key - num_old).to(tl.int64) * HKV + kv_head) * D
            keys = load_rows(new_k, at, live, D, PADDED)
            values = load_rows(new_v, at, live, D, PADDED)
            k_scale = tl.full([BLOCK_N], 1.0, tl.float32)
            v_scale = tl.full([BLOCK_N], 1.0, tl.float32)
            if HAS_SCALES:  # as they will be read back
                keys, k_scale = _quantize(keys)
                values, v_scale = _quantize(values)
            keys = keys.to(k_pages.dtype.element_ty).to(DOT_DTYPE)
            values = values.to(v_pages.dtype.element_ty).to(DOT_DTYPE)
            acc, largest, total = attend_block(
                acc, largest, total, queries, keys, values, k_scale, v_scale, live, key, row_live, q_position, slope,
                SCALE, CAUSAL, WINDOW, SOFTCAP, HAS_SLOPES,
            )  # fmt: skip

    if part == 0:  # this tile's own keys and values, to their pages
        r = tl.arange(0, BLOCK_Q)
        mine = r < num_rows
        position = num_old + first_row - run_start + r
        page = tl.load(tables + seq * PAGES_PER_SEQ + position // PAGE_SIZE, mask=mine, other=0).to(tl.int64)
        at = ((first_row + r).to(tl.int64) * HKV + kv_head) * D
        k = load_rows(new_k, at, mine, D, PADDED)
        v = load_rows(new_v, at, mine, D, PADDED)
        if HAS_SCALES:
            k, k_scale = _quantize(k)
            v, v_scale = _quantize(v)
            scale_at = (page * HKV + kv_head) * PAGE_SIZE + position % PAGE_SIZE
            tl.store(k_scales + scale_at, k_scale, mask=mine)
            tl.store(v_scales + scale_at, v_scale, mask=mine)
        d = tl.arange(0, PADDED)
        mask = mine[:, None] & (d < D)[None, :]
        slot = (page * PAGE_SIZE + position % PAGE_SIZE) * PAGE_WIDTH + kv_head * D
        tl.store(k_pages + slot[:, None] + d[None, :], k.to(k_pages.dtype.element_ty), mask=mask)
        tl.store(v_pages + slot[:, None] + d[None, :], v.to(v_pages.dtype.element_ty), mask=mask)

    # results, or this part's share of them
    d = tl.arange(0, PADDED)
    mask = row_live[:, None] & (d < D)[None, :]
    place += part * (NUM_ROWS * HKV * GROUP)
    if SPLITS == 1:
        acc = acc / tl.maximum(total, 1e-37)[:, None]
    else:
        tl.store(stats + place, largest, mask=row_live)
        tl.store(stats + SPLITS * NUM_ROWS * HKV * GROUP + place, total, mask=row_live)
    tl.store(out + place[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
