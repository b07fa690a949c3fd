"""Paged attention's Triton kernel: interpreted against the reference, and compiled for every GPU, with no GPU."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.chips import chip_named
from pallas_kernels.paged_attention.arg_specs import SPECS, ArgSpec, random_arguments
from pallas_kernels.paged_attention.gpu import (
    Tiles,
    choose_tiles,
    is_wide,
    make_launch,
    merge,
    paged_attention_gpu,
    shared_buffers,
    unsupported_reason,
)
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.types import KVPages, Masking, RaggedBatch, Sizes
from pallas_kernels.tiles import TileError, total_bytes
from pallas_kernels.triton_host import Interpreter, Launch, compile_for

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, of the gpu extra (Python 3.12 or later)"
)
SMALL = ArgSpec(
    name="small",
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_tokens=24,
    num_seqs=3,
    seq_len=96,
    page_size=8,
    dtype="float32",
    page_dtype="float32",
)
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3, "int8": 2e-2}
"""Of results of about 1: float32's rounding over a hundred keys; 8 and 11 bits; int8 pages as their dtype's."""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running


def check_pages(got: KVPages, expected: KVPages) -> None:
    """Floats are equal bit for bit. XLA may divide by 127 in another way: integers at a tie may round either way."""
    if got.k_scales is None:
        for array, wanted in zip(got[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(np.asarray(array, np.float32), np.asarray(wanted, np.float32))
        return
    for array, wanted in zip(got[2:], expected[2:], strict=True):
        np.testing.assert_allclose(np.asarray(array), np.asarray(wanted), rtol=3e-7)
    for array, wanted in zip(got[:2], expected[:2], strict=True):
        off = np.abs(np.asarray(array, np.int32) - np.asarray(wanted, np.int32))
        assert off.max() <= 1
        assert np.count_nonzero(off) <= 0.02 * off.size


def check(
    interpreter: Interpreter, spec: ArgSpec, seq_lens: list[int], query_lens: list[int], tiles: Tiles, *,
    causal: bool = True, seed: int = 0,
) -> None:  # fmt: skip
    """One batch: results and pages as the reference's."""
    q, k, v, pages, batch, slopes = random_arguments(spec, seq_lens, query_lens, seed=seed)
    masking = Masking(scale=spec.head_dim**-0.5, causal=causal, window=spec.window, softcap=spec.softcap)
    wide = spec.dtype == "bfloat16"  # Triton's interpreter multiplies matrices of bfloat16 bit by bit
    launch = make_launch(q, k, v, pages, batch, masking, slopes, tiles, wide=wide)
    results = tuple(map(jnp.asarray, interpreter.run(launch)))
    out, new_pages = merge(results, batch, q.dtype, len(launch.updated))
    expected, expected_pages = paged_attention_reference(q, k, v, pages, batch, masking, slopes)
    tolerance = TOLERANCE[spec.dtype]
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
    )
    check_pages(new_pages, expected_pages)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[ArgSpec, list[int], list[int], Tiles, bool, int]:
    """A batch of up to three sequences: chunks of prompts, single tokens, sequences without any."""
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1), (1, 4)]))
    dtypes = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "int8")]
    dtype, page_dtype = draw(st.sampled_from(dtypes))
    spec = replace(
        SMALL,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 20, 32])),
        page_size=draw(st.sampled_from([1, 4, 16])),
        dtype=dtype,
        page_dtype=page_dtype,
        window=draw(st.sampled_from([None, 1, 7, 30])),
        softcap=draw(st.sampled_from([None, 2.0])),
        alibi=draw(st.booleans()),
    )
    query_lens = [draw(st.sampled_from([0, 1, 1, 2, 5, 8])) for _ in range(spec.num_seqs)]
    seq_lens = [length + draw(st.sampled_from([0, 1, 9, 40, 80])) for length in query_lens]
    tiles = Tiles(
        block_q=draw(st.sampled_from([1, 2, 4])),
        block_n=draw(st.sampled_from([16, 32])),
        num_warps=4,
        num_stages=1,
        splits=draw(st.sampled_from([1, 2, 4])),
    )
    return spec, seq_lens, query_lens, tiles, draw(st.booleans()), draw(st.integers(0, 999))


@needs_triton
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=ragged())
def test_random_batches(interpreter: Interpreter, case: tuple[ArgSpec, list[int], list[int], Tiles, bool, int]) -> None:
    spec, seq_lens, query_lens, tiles, causal, seed = case
    check(interpreter, spec, seq_lens, query_lens, tiles, causal=causal, seed=seed)


@needs_triton
@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=ragged())
def test_many_random_batches(
    interpreter: Interpreter, case: tuple[ArgSpec, list[int], list[int], Tiles, bool, int]
) -> None:
    spec, seq_lens, query_lens, tiles, causal, seed = case
    check(interpreter, spec, seq_lens, query_lens, tiles, causal=causal, seed=seed)


@needs_triton
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(interpreter: Interpreter, head_dim: int) -> None:
    spec = replace(SMALL, head_dim=head_dim)
    check(interpreter, spec, [40, 9, 96], [3, 9, 1], choose_tiles(_sizes(spec), chip_named("sm90")))


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiles_within_the_shared_memory_that_was_planned(spec: ArgSpec, capability: int) -> None:
    launch, planned, chip_bytes = _planned(spec, capability)
    binary = compile_for(launch, capability)
    assert binary.cubin[:4] == b"\x7fELF"
    assert binary.shared_bytes <= planned <= chip_bytes


def _sizes(spec: ArgSpec) -> Sizes:
    q, k, _, pages, batch, _ = spec.structs()
    return Sizes.of(q, k, pages, batch)


def _planned(spec: ArgSpec, capability: int) -> tuple[Launch, int, int]:
    q, k, v, pages, batch, slopes = spec.structs()
    sizes, chip = _sizes(spec), chip_named(f"sm{capability}")
    tiles = choose_tiles(sizes, chip)
    masking = Masking(scale=spec.head_dim**-0.5, window=spec.window, softcap=spec.softcap)
    launch = make_launch(q, k, v, pages, batch, masking, slopes, tiles, wide=is_wide(sizes, chip))
    return launch, total_bytes(shared_buffers(tiles, sizes, chip), chip), chip.fast_memory_bytes


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_are_tiles_for_every_head_dim_on_every_chip(capability: int, head_dim: int, dtype: str) -> None:
    spec = replace(SMALL, head_dim=head_dim, dtype=dtype, page_dtype=dtype, num_heads=16, num_tokens=256)
    _, planned, chip_bytes = _planned(spec, capability)
    assert planned <= chip_bytes


def test_more_programs_where_few_sequences_are_decoded() -> None:
    chip = chip_named("h100")
    one = replace(SMALL, num_tokens=1, num_seqs=1, seq_len=4096)
    many = replace(one, num_tokens=512, num_seqs=512)
    assert choose_tiles(_sizes(one), chip).splits == 32  # 4,096 keys in parts of 128
    assert choose_tiles(_sizes(many), chip).splits == 1


def test_what_no_kernel_takes_is_said_with_numbers() -> None:
    assert unsupported_reason(_sizes(SMALL)) is None
    assert unsupported_reason(_sizes(replace(SMALL, head_dim=320))) == "head_dim 320 is larger than 256"
    wrong = replace(_sizes(SMALL), q_dtype=np.dtype("float64"))
    assert unsupported_reason(wrong) == "queries are float64, not float32 or bfloat16 or float16"
    wrong = replace(_sizes(SMALL), page_dtype=np.dtype("uint8"))
    assert unsupported_reason(wrong) == "pages are uint8, not float32, bfloat16, float16 or int8"
    huge = replace(SMALL, num_heads=512, num_kv_heads=1, head_dim=256, page_dtype="float32", dtype="float32")
    with pytest.raises(TileError, match=r"needs [\d,]+ bytes of shared memory, t4 has 65,536"):
        choose_tiles(_sizes(huge), chip_named("t4"))


@needs_triton
@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jax-triton and JAX's CUDA plugin, which need no GPU",
)
def test_is_part_of_a_jax_program_that_updates_pages_in_place() -> None:
    q, k, v, pages, batch, _ = replace(SMALL, page_dtype="int8").structs()
    chip, masking = chip_named("h100"), Masking(scale=0.25)

    def step(q: jax.Array, k: jax.Array, v: jax.Array, pages: KVPages, batch: RaggedBatch) -> object:
        return paged_attention_gpu(q, k, v, pages, batch, masking, chip=chip)

    traced = jax.jit(step, donate_argnums=3).trace(q, k, v, pages, batch)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (kernel,) = (line for line in text.splitlines() if "@triton_kernel_call_ffi" in line)
    assert kernel.count("output_operand_alias<") == 4  # keys, values, scales of both


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_on_a_gpu(spec: ArgSpec) -> None:
    rest = spec.num_tokens - spec.num_seqs + 1
    query_lens = [1] * (spec.num_seqs - 1) + [min(rest, spec.seq_len)]
    seq_lens = [min(spec.seq_len, 100 * seq + query_lens[seq]) for seq in range(spec.num_seqs)]
    q, k, v, pages, batch, slopes = random_arguments(spec, seq_lens, query_lens)
    masking = Masking(scale=spec.head_dim**-0.5, window=spec.window, softcap=spec.softcap)
    expected, expected_pages = paged_attention_reference(q, k, v, pages, batch, masking, slopes)
    out, new_pages = jax.jit(paged_attention_gpu, static_argnums=5)(q, k, v, pages, batch, masking, slopes)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-2)
    check_pages(new_pages, expected_pages)
