"""Ragged paged attention: the reference against attention written out, the TPU's kernel, interpreted, against that."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import KVPages, PagedAttentionError, Sizes, paged_attention, unsupported_reason
from pallas_kernels.paged_attention.arg_specs import SPECS, ArgSpec, random_arguments
from pallas_kernels.paged_attention.tpu_tiles import Config, choose_config, page_width, vmem_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = ArgSpec(
    name="small",
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    num_tokens=24,
    num_seqs=4,
    seq_len=64,
    page_size=16,
    dtype="float32",
    page_dtype="float32",
)
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Of results that are weighted means of about-normal values: a few roundings of the dtype."""


@functools.cache
def compiled(spec: ArgSpec, backend: str, causal: bool, config: Config | None) -> Any:
    options = {"interpret": True, "config": config} if backend == "tpu" else {}
    masks = {"causal": causal, "window": spec.window, "softcap": spec.softcap, "scale": spec.head_dim**-0.5}

    def call(q: Any, k: Any, v: Any, pages: Any, batch: Any, slopes: Any) -> Any:
        return paged_attention(q, k, v, pages, batch, slopes=slopes, backend=backend, **masks, **options)

    return jax.jit(call)


def run(
    spec: ArgSpec, arguments: tuple[Any, ...], backend: str, causal: bool = True, config: Config | None = None
) -> Any:
    return compiled(spec, backend, causal, config)(*arguments)


def live_slots(spec: ArgSpec, batch: Any) -> np.ndarray[Any, Any]:
    """bool [num_pages, page_size]: slots that hold a token."""
    live = np.zeros((spec.num_seqs * spec.pages_per_seq, spec.page_size), bool)
    tables = np.asarray(batch.block_tables)
    for seq, length in enumerate(np.asarray(batch.seq_lens)):
        at = np.arange(length)
        live[tables[seq, at // spec.page_size], at % spec.page_size] = True
    return live


def check(
    spec: ArgSpec,
    seq_lens: list[int],
    query_lens: list[int],
    *,
    causal: bool = True,
    config: Config | None = None,
    seed: int = 0,
) -> None:
    """The kernel, interpreted, gives what the reference gives: results, and every slot that holds a token."""
    arguments = random_arguments(spec, seq_lens, query_lens, seed=seed)
    expected, expected_pages = run(spec, arguments, "reference", causal)
    got, pages = run(spec, arguments, "tpu", causal, config)
    tolerance = TOLERANCE[spec.dtype] * (1 if spec.page_dtype != "int8" else 2)
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=tolerance, atol=tolerance)
    live = live_slots(spec, arguments[4])
    for mine, its in zip(pages[:2], expected_pages[:2], strict=True):
        np.testing.assert_array_equal(np.float32(mine)[live], np.float32(its)[live])
    if pages.k_scales is not None:
        for mine, its in zip(pages[2:], expected_pages[2:], strict=True):
            np.testing.assert_array_equal(np.asarray(mine).swapaxes(1, 2)[live], np.asarray(its).swapaxes(1, 2)[live])


def test_reference_is_attention_written_out() -> None:
    spec = dataclasses.replace(SMALL, window=9, softcap=3.0, alibi=True)
    seq_lens, query_lens = [17, 40, 1, 0], [5, 16, 1, 0]
    arguments = random_arguments(spec, seq_lens, query_lens)
    q, k, v, pages, batch, slopes = (jax.tree.map(np.asarray, x) for x in arguments)
    out, new = run(spec, arguments, "reference")
    heads, dim = spec.num_kv_heads, spec.head_dim
    for seq, (length, count) in enumerate(zip(seq_lens, query_lens, strict=True)):
        start = batch.query_starts[seq]
        at = np.arange(length)
        slots = (batch.block_tables[seq, at // spec.page_size], at % spec.page_size)
        keys = pages.k[slots][:, : heads * dim].reshape(length, heads, dim)
        values = pages.v[slots][:, : heads * dim].reshape(length, heads, dim)
        keys[length - count :], values[length - count :] = k[start : start + count], v[start : start + count]
        np.testing.assert_array_equal(np.asarray(new.k)[slots][:, : heads * dim], keys.reshape(length, heads * dim))
        for i in range(count):
            position = length - count + i
            low = max(0, position - 8)
            for head in range(spec.num_heads):
                own = head // (spec.num_heads // heads)
                scores = keys[low : position + 1, own] @ q[start + i, head] * dim**-0.5
                scores = 3.0 * np.tanh(scores / 3.0) + slopes[head] * (np.arange(low, position + 1) - position)
                weights = np.exp(scores - scores.max())
                expected = weights / weights.sum() @ values[low : position + 1, own]
                np.testing.assert_allclose(np.asarray(out)[start + i, head], expected, rtol=1e-4, atol=1e-5)
    padding = np.ones(spec.num_tokens, bool)
    for seq, count in enumerate(query_lens):
        padding[batch.query_starts[seq] : batch.query_starts[seq] + count] = False
    assert padding.any()
    assert not np.asarray(out)[padding].any()


def small(**changes: Any) -> ArgSpec:
    return dataclasses.replace(SMALL, **changes)


BF16 = {"dtype": "bfloat16", "page_dtype": "bfloat16"}
INT8 = {"page_dtype": "int8", "page_size": 128, "seq_len": 256}
SMALL_TILES = Config(tile=8, keys_per_block=16)
FORMS = (
    (small(num_heads=6, num_kv_heads=3, window=11), True, SMALL_TILES),
    (small(num_heads=4, num_kv_heads=1, head_dim=128, alibi=True, **BF16), True, None),
    (small(**INT8, dtype="bfloat16", softcap=4.0), True, Config(tile=8, keys_per_block=128)),
)
"""What batches run on by default, each compiled once: sizes and masks, causal or not, tiles."""
MORE_FORMS = (
    (small(head_dim=80, num_heads=3, num_kv_heads=3), True, None),
    (small(head_dim=96, num_kv_heads=4, window=30, softcap=9.0), True, SMALL_TILES),
    (small(head_dim=256, num_kv_heads=1, **BF16), True, SMALL_TILES),
    (small(num_heads=9, num_kv_heads=3, alibi=True, window=5, **BF16), True, Config(tile=4, keys_per_block=32)),
    (small(head_dim=128, page_dtype="bfloat16"), False, SMALL_TILES),
    (small(num_tokens=4, head_dim=128, window=17), True, None),
    (small(**INT8, alibi=True, window=100), True, None),
    (small(dtype="bfloat16", page_size=32, seq_len=96), True, Config(tile=16, keys_per_block=32)),
)
"""And slowly: head dims, two dtypes in one call, no more tokens than sequences."""


def odd_batches(spec: ArgSpec) -> list[tuple[list[int], list[int]]]:
    """Lengths and new tokens of four sequences: none, the ends of pages, prompts in chunks, single tokens."""
    page, longest = spec.page_size, spec.seq_len
    few, many = min(2, spec.num_tokens), min(spec.num_tokens, page)
    return [
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([0, 0, 1, 0], [0, 0, 1, 0]),
        ([page, 2 * page, longest, longest], [1, 1, 1, 1]),
        ([page + 1, longest, longest - page + 1, 1], [1, 1, 1, 1]),
        ([many, page + 1, page + 2, longest], [many - few, few, 0, 0]),
        ([longest, longest, longest, longest], [spec.num_tokens, 0, 0, 0]),
    ]


@st.composite
def lengths(draw: st.DrawFn, spec: ArgSpec) -> tuple[list[int], list[int], int]:
    """Lengths, new tokens and a seed: page boundaries and their neighbours more often than chance has them."""
    left, seq_lens, query_lens = spec.num_tokens, [], []
    boundaries = [n + d for n in range(0, spec.seq_len + 1, spec.page_size) for d in (-1, 0, 1)]
    for _ in range(spec.num_seqs):
        count = min(left, draw(st.sampled_from([0, 1, 1, 2, 5, 8, 16, 17, 24])))
        left -= count
        length = draw(st.sampled_from(boundaries) | st.integers(0, spec.seq_len))
        query_lens.append(count)
        seq_lens.append(min(max(length, count), spec.seq_len))
    return seq_lens, query_lens, draw(st.integers(0, 2**31))


def check_random(form: tuple[ArgSpec, bool, Config | None], examples: int) -> None:
    spec, causal, config = form

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(lengths(spec))
    def drawn(lens: tuple[list[int], list[int], int]) -> None:
        check(spec, lens[0], lens[1], causal=causal, config=config, seed=lens[2])

    drawn()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_batches(form: tuple[ArgSpec, bool, Config | None]) -> None:
    spec, causal, config = form
    for seq_lens, query_lens in odd_batches(spec):
        check(spec, seq_lens, query_lens, causal=causal, config=config)
    check_random(form, 12)


@pytest.mark.slow
@pytest.mark.parametrize("form", MORE_FORMS, ids=str)
def test_many_batches(form: tuple[ArgSpec, bool, Config | None]) -> None:
    spec, causal, config = form
    for seq_lens, query_lens in odd_batches(spec):
        check(spec, seq_lens, query_lens, causal=causal, config=config)
    check_random(form, 26)  # 8 forms: 208 cases


def _sizes(spec: ArgSpec) -> Sizes:
    q, k, _, pages, batch, _ = spec.structs()
    return Sizes.of(q, k, pages, batch)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_published_models_are_supported(spec: ArgSpec) -> None:
    sizes = _sizes(spec)
    assert unsupported_reason(sizes, "tpu") is None
    config = choose_config(sizes, single=False)
    assert config is not None
    assert config.keys_per_block >= 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 72}, "head_dim 72"),
        ({"dtype": "float16"}, "queries are float16"),
        ({"page_dtype": "float16"}, "pages are float16"),
        ({"page_size": 12}, "page_size 12 is no multiple of 8"),
        ({"page_size": 64, "page_dtype": "int8"}, "page_size 64 is no multiple of 128"),
        ({"num_seqs": 4096, "seq_len": 16384}, "KiB of SMEM"),
        ({"num_kv_heads": 128, "num_heads": 128, "head_dim": 256, "page_size": 512}, "MiB of VMEM"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take(change: dict[str, Any], words: str) -> None:
    reason = unsupported_reason(_sizes(dataclasses.replace(SMALL, **change)), "tpu")
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": np.zeros((24, 5, 64), np.float32)}, "a multiple of the 2 KV heads, got 5"),
        ({"k": np.zeros((24, 2, 32), np.float32)}, r"k: expected shape \[24, 2, 64\], got \[24, 2, 32\]"),
        ({"v": np.zeros((24, 2, 64), np.int32)}, "v: expected float32, got int32"),
        ({"q": np.zeros((24, 64), np.float32)}, "q: expected 3 dimensions"),
        ({"pages": KVPages(np.zeros((4, 16, 64), np.float32), np.zeros((4, 16, 64), np.float32))}, "k pages: expected"),
        ({"pages": KVPages(np.zeros((4, 16, 128), np.int8), np.zeros((4, 16, 128), np.int8))}, "k_scales: expected"),
        ({"window": 0}, "window: expected at least 1"),
        ({"softcap": -1.0}, "softcap: expected a positive"),
        ({"scale": float("nan")}, "scale: expected a finite"),
        ({"slopes": np.zeros(3, np.float32)}, r"slopes: expected shape \[4\], got \[3\]"),
        ({"backend": "npu"}, "backend: expected one of"),
        ({"backend": "reference", "tile": 3}, "has no option tile"),
        ({"config": Config(tile=4096, keys_per_block=64)}, "MiB of VMEM, of 24"),
        ({"config": Config(tile=8, keys_per_block=24)}, "whole pages of 16 keys"),
    ],
    ids=str,
)
def test_bad_arguments(change: dict[str, Any], words: str) -> None:
    q, k, v, pages, batch, _ = random_arguments(SMALL, [17, 40, 1, 0], [5, 16, 1, 0])
    arguments = {"q": q, "k": k, "v": v, "pages": pages, "batch": batch, "scale": 0.125, "backend": "tpu", **change}
    with pytest.raises(PagedAttentionError, match=words):
        paged_attention(**arguments)


def test_rows_of_pages_of_another_width() -> None:
    spec = dataclasses.replace(SMALL, num_heads=3, num_kv_heads=3)
    q, k, v, pages, batch, _ = random_arguments(spec, [17, 40, 1, 0], [5, 16, 1, 0])
    narrow = KVPages(pages.k[..., :192], pages.v[..., :192])
    assert page_width(3, 64) == 256
    with pytest.raises(PagedAttentionError, match="expected rows of 256 elements"):
        paged_attention(q, k, v, narrow, batch, scale=0.125, backend="tpu")
    out, _ = paged_attention(q, k, v, narrow, batch, scale=0.125)
    assert jnp.isfinite(out).all()


def test_vmem_model_grows_with_tiles() -> None:
    sizes = _sizes(SMALL)
    small, large = Config(tile=8, keys_per_block=16), Config(tile=8, keys_per_block=64)
    assert vmem_bytes(sizes, small) < vmem_bytes(sizes, large)
