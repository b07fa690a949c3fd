"""write_pages and attend_pages against a dense NumPy oracle, on ragged batches, over pages of NaN where that may be."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmir_jax.targets import paged_reference
from llmir_jax.targets.paged_reference import attend_pages, write_pages

Array = np.ndarray[Any, Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch: each sequence has `done` tokens in the cache and `new` ones in this step."""

    done: tuple[int, ...]
    new: tuple[int, ...]
    spare_seqs: int  # slots of the block table without a sequence
    padding: int  # rows after the last token
    page_size: int
    kv_heads: int
    group: int  # query heads a KV head
    head_dim: int
    window: int | None
    softcap: float | None
    alibi: bool
    dtype: np.dtype
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_seqs = draw(st.integers(1, 3))
    few = draw(st.booleans())  # at most a row for each slot: the other way through the code
    new = [draw(st.integers(0, 1 if few else 9)) for _ in range(num_seqs)]
    new[0] = max(new[0], 1)
    return Case(
        done=tuple(draw(st.integers(0, 20)) for _ in range(num_seqs)),
        new=tuple(new),
        spare_seqs=draw(st.integers(0, 2)),
        padding=draw(st.integers(0, 3)),
        page_size=draw(st.sampled_from([1, 2, 3, 8, 16])),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 5])),
        window=draw(st.none() | st.integers(1, 12)),
        softcap=draw(st.none() | st.floats(1, 10)),
        alibi=draw(st.booleans()),
        dtype=draw(st.sampled_from([np.dtype(np.float32), BF16])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def dense(q: Array, k: Array, v: Array, query_at: int, case: Case, scale: float, slopes: Array | None) -> Array:
    """One query [H, D] at a position, over the keys and values [L, Hkv, D] of its sequence: [H, D], in float64."""
    positions = np.arange(len(k))
    seen = positions <= query_at
    if case.window is not None:
        seen &= positions > query_at - case.window
    out = np.zeros(q.shape, np.float64)
    for head in range(len(q)):
        kv = head // case.group
        score = scale * (k[:, kv].astype(np.float64) @ q[head].astype(np.float64))
        if case.softcap is not None:
            score = case.softcap * np.tanh(score / case.softcap)
        if slopes is not None:
            score = score + slopes[head] * (positions - query_at)
        weights = np.where(seen, np.exp(score - score[seen].max()), 0)
        out[head] = (weights / weights.sum()) @ np.where(seen[:, None], v[:, kv], 0).astype(np.float64)
    return out


def check(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    num_seqs, heads = len(case.new) + case.spare_seqs, case.kv_heads * case.group
    lens = [a + b for a, b in zip(case.done, case.new, strict=True)]
    pages_per_seq = max(1, -(-max(lens) // case.page_size))
    num_pages = num_seqs * pages_per_seq + 2
    tables = rng.permutation(num_pages)[: num_seqs * pages_per_seq].reshape(num_seqs, pages_per_seq).astype(np.int32)

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(case.dtype)

    k, v = ([normal(n, case.kv_heads, case.head_dim) for n in lens] for _ in range(2))
    pages = [np.full((num_pages, case.page_size, case.kv_heads, case.head_dim), np.nan, case.dtype) for _ in range(2)]
    for array, contents in zip(pages, (k, v), strict=True):
        for seq, content in enumerate(contents):
            for at in range(case.done[seq]):
                array[tables[seq, at // case.page_size], at % case.page_size] = content[at]
    for seq, n in enumerate(lens):  # entries of pages that are not allocated, or were freed behind a window, are 0
        tables[seq, -(-n // case.page_size) :] = 0
        if case.window is not None and case.new[seq]:
            tables[seq, : max(0, case.done[seq] - case.window + 1) // case.page_size] = 0

    rows = [(seq, at) for seq, n in enumerate(lens) for at in range(case.done[seq], n)]
    num_rows = len(rows) + case.padding
    seq_ids, positions = (np.asarray([*column, *[7] * case.padding], np.int32) for column in zip(*rows, strict=True))
    seq_lens = np.zeros(num_seqs, np.int32)
    seq_lens[: len(lens)] = [n if new else 0 for n, new in zip(lens, case.new, strict=True)]
    new_k, new_v = (
        np.concatenate([np.stack([x[s][at] for s, at in rows]), np.full((case.padding, *x[0].shape[1:]), np.nan)])
        for x in (k, v)
    )
    q = normal(num_rows, heads, case.head_dim)
    slopes = rng.uniform(0.01, 0.5, heads).astype(np.float32) if case.alibi else None
    scale = case.head_dim**-0.5

    @jax.jit
    def step(k_pages, v_pages, q, k, v, seq_ids, positions, tables, seq_lens, num_tokens):
        k_pages, v_pages = write_pages(k_pages, v_pages, k, v, seq_ids, positions, tables, num_tokens)
        attend = partial(attend_pages, scale=scale, window=case.window, softcap=case.softcap)
        out = attend(q, k_pages, v_pages, tables, seq_lens, seq_ids, positions, num_tokens, slopes)
        return k_pages, v_pages, out

    new = (q, new_k.astype(case.dtype), new_v.astype(case.dtype))
    written = step(*pages, *new, seq_ids, positions, tables, seq_lens, np.int32(len(rows)))
    for array, before, contents in zip(written, pages, (k, v), strict=False):
        after = np.asarray(array).astype(np.float32)
        for seq, at in rows:
            place = (tables[seq, at // case.page_size], at % case.page_size)
            np.testing.assert_array_equal(after[place], contents[seq][at].astype(np.float32))
            before[place] = contents[seq][at]
        np.testing.assert_array_equal(after, before.astype(np.float32))  # nothing else was written
    out = np.asarray(written[2])
    assert out.dtype == np.float32
    tolerance = 2e-5 if case.dtype == np.float32 else 3e-2
    for row, (seq, at) in enumerate(rows):
        expected = dense(q[row], k[seq], v[seq], at, case, scale, slopes)
        np.testing.assert_allclose(out[row], expected, atol=tolerance, rtol=tolerance)


@given(case=cases())
@settings(max_examples=15, deadline=None)
def test_ragged_batches(case: Case) -> None:
    check(case)


def plain_case(**changes: Any) -> Case:
    fields = {
        "done": (40, 0), "new": (1, 30), "spare_seqs": 0, "padding": 2, "page_size": 4, "kv_heads": 2, "group": 2,
        "head_dim": 4, "window": None, "softcap": None, "alibi": False, "dtype": np.dtype(np.float32), "seed": 3,
    }  # fmt: skip
    return Case(**(fields | changes))


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("new", [(1, 1), (1, 30)], ids=["row by row", "run by run"])
def test_several_blocks_of_keys(monkeypatch: pytest.MonkeyPatch, new: tuple[int, int], window: int | None) -> None:
    """Blocks of 8 keys: the softmax is carried from block to block, and a window begins at a later block."""
    monkeypatch.setattr(paged_reference, "KEYS_PER_BLOCK", 8)
    check(plain_case(new=new, padding=0, window=window))


def test_runs_longer_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 30 rows in tiles of 8, which the end of the batch cuts."""
    monkeypatch.setattr(paged_reference, "ROWS_PER_RUN", 8)
    check(plain_case(padding=1))


def test_window_hides_what_a_step_wrote() -> None:
    """Keys of this very step that a window hides from its later rows."""
    check(plain_case(window=3, done=(2, 5)))
