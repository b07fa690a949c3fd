"""Paged attention through Mosaic GPU: interpreted against the reference, and lowered for CUDA, with no GPU."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from test_paged_attention import lengths

from pallas_kernels.chips import chip_named
from pallas_kernels.paged_attention import PagedAttentionError, Sizes, paged_attention
from pallas_kernels.paged_attention import unsupported_reason as reason_of_backend
from pallas_kernels.paged_attention.arg_specs import SPECS, ArgSpec, random_arguments
from pallas_kernels.paged_attention.mosaic_gpu import (
    LEAST_JAX,
    Tiles,
    chip_reason,
    choose_tiles,
    paged_attention_mosaic_gpu,
    unsupported_reason,
)
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.types import Masking
from pallas_kernels.tiles import TileError

H100 = chip_named("h100")
needs_jax = pytest.mark.skipif(
    jax.__version_info__ < LEAST_JAX, reason=f"needs the Mosaic GPU of JAX {'.'.join(map(str, LEAST_JAX))}"
)
HAS_COMPILER = (
    importlib.util.find_spec("jax_plugins") is not None
    and importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    and all(map(shutil.which, ("cc", "ptxas")))
)
pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = ArgSpec(
    name="small", num_heads=2, num_kv_heads=1, head_dim=64, num_tokens=5, num_seqs=3, seq_len=160, page_size=16
)
FORMS = (
    (replace(SMALL, window=70), True, Tiles(block_q=3, stages=2)),
    (replace(SMALL, num_heads=6, num_kv_heads=2, page_size=64, seq_len=128, alibi=True), True,
     Tiles(block_q=2, stages=2, splits=2)),
)  # fmt: skip
"""What batches run on, each traced once: sizes and masks, causal or not, tiles."""
HALF = {"dtype": "float16", "page_dtype": "float16"}
MORE_FORMS = (
    (replace(SMALL, num_heads=1, head_dim=128, page_size=8, seq_len=72, softcap=4.0), True, Tiles(block_q=4, stages=3)),
    (replace(SMALL, num_tokens=3, num_heads=4, **HALF), True, Tiles(block_q=1, stages=2, splits=2)),
    (replace(SMALL, page_size=128, seq_len=256, **HALF), False, Tiles(block_q=5, stages=2)),
    (replace(SMALL, num_tokens=20, num_seqs=2, num_heads=16, page_size=32, window=17), True,
     Tiles(block_q=4, stages=2, splits=1)),
    (replace(SMALL, head_dim=128, alibi=True, window=5), True, Tiles(block_q=5, stages=2, splits=2)),
)  # fmt: skip
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3}
Form = tuple[ArgSpec, bool, Tiles]


def masking_of(spec: ArgSpec, causal: bool = True) -> Masking:
    return Masking(scale=spec.head_dim**-0.5, causal=causal, window=spec.window, softcap=spec.softcap)


@functools.cache
def compiled(form: Form) -> tuple[Any, Any]:
    """The kernel, interpreted, and the reference."""
    spec, causal, tiles = form
    masking = masking_of(spec, causal)

    def kernel(q: Any, k: Any, v: Any, pages: Any, batch: Any, slopes: Any) -> Any:
        return paged_attention_mosaic_gpu(
            q, k, v, pages, batch, masking, slopes, chip=H100, tiles=tiles, interpret=True
        )

    def reference(q: Any, k: Any, v: Any, pages: Any, batch: Any, slopes: Any) -> Any:
        return paged_attention_reference(q, k, v, pages, batch, masking, slopes)

    return jax.jit(kernel), jax.jit(reference)


def check(form: Form, seq_lens: list[int], query_lens: list[int], seed: int = 0) -> None:
    spec = form[0]
    kernel, reference = compiled(form)
    arguments = random_arguments(spec, seq_lens, query_lens, seed=seed)
    out, pages = kernel(*arguments)
    expected, expected_pages = reference(*arguments)
    tolerance = TOLERANCE[spec.dtype]
    np.testing.assert_allclose(np.float32(out), np.float32(expected), rtol=tolerance, atol=tolerance)
    for mine, its in zip(pages[:2], expected_pages[:2], strict=True):
        np.testing.assert_array_equal(np.float32(mine), np.float32(its))


def check_random(form: Form, examples: int) -> None:
    checks = [HealthCheck.too_slow]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    @given(lengths(form[0]))
    def drawn(lens: tuple[list[int], list[int], int]) -> None:
        check(form, lens[0], lens[1], lens[2])

    drawn()


@needs_jax
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_batches(form: Form) -> None:
    check_random(form, 8)


@needs_jax
@pytest.mark.slow
@pytest.mark.parametrize("form", MORE_FORMS, ids=str)
def test_many_batches(form: Form) -> None:
    check_random(form, 40)  # 5 forms: 200 cases


def _sizes(spec: ArgSpec) -> Sizes:
    q, k, _, pages, batch, _ = spec.structs()
    return Sizes.of(q, k, pages, batch)


@needs_jax
@pytest.mark.parametrize("spec", [spec for spec in SPECS if unsupported_reason(_sizes(spec)) is None], ids=str)
@pytest.mark.parametrize("stages", [None, 2])
def test_is_lowered_for_cuda_within_the_shared_memory_of_the_model(spec: ArgSpec, stages: int | None) -> None:
    """JAX's lowering counts shared memory itself, and refuses what is more than a block of threads may have."""
    tiles = choose_tiles(_sizes(spec), H100)
    tiles = tiles if stages is None else replace(tiles, stages=stages)

    def step(q: Any, k: Any, v: Any, pages: Any, batch: Any, slopes: Any) -> Any:
        return paged_attention_mosaic_gpu(q, k, v, pages, batch, masking_of(spec), slopes, chip=H100, tiles=tiles)

    lowered = jax.jit(step, donate_argnums=3).trace(*spec.structs()).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu_v2") == 1


@needs_jax
@pytest.mark.skipif(not HAS_COMPILER, reason="needs JAX's CUDA plugin (jax[cuda12]), ptxas and a C compiler; no GPU")
def test_compiles_to_machine_code_without_spilling(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", folder / "cuda_stub.c"], check=True)
    done = subprocess.run(
        [sys.executable, folder / "compile_mosaic_gpu.py"],
        env=os.environ
        | {
            "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    (count,) = re.findall(r"^(\d+) kernels$", said, re.MULTILINE)
    assert int(count) >= 4
    assert said.count("Compiling entry function") == said.count("for 'sm_90a'") == int(count)
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"] * int(count)


def test_tiles_fill_products_and_occupy_the_chip() -> None:
    one = replace(SMALL, num_tokens=1, num_seqs=1, seq_len=4096)
    assert choose_tiles(_sizes(one), H100) == Tiles(block_q=1, stages=4, splits=32)
    prompt = replace(SMALL, num_heads=24, num_kv_heads=8, num_tokens=4096, num_seqs=1)
    assert choose_tiles(_sizes(prompt), H100) == Tiles(block_q=21, stages=4)  # 63 rows


@needs_jax
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 80}, "head_dim 80 is none of 64, 128"),
        ({"dtype": "float32"}, "queries are float32, not bfloat16 or float16"),
        ({"page_dtype": "int8"}, "pages are int8, not bfloat16 as the queries"),
        ({"page_size": 48}, "page_size 48 is not 8, 16, 32 or a multiple of 64"),
        ({"num_heads": 65}, "65 query heads a KV head are more than the 64 rows of a product"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take(change: dict[str, Any], words: str) -> None:
    assert reason_of_backend(_sizes(SMALL), "mosaic_gpu") is None
    assert reason_of_backend(_sizes(replace(SMALL, **change)), "mosaic_gpu") == words


@needs_jax
def test_what_a_chip_does_not_take() -> None:
    words = "b200 is of compute capability 10.0, Mosaic GPU's kernel is for 9.0"
    assert chip_reason(_sizes(SMALL), chip_named("b200")) == words
    q, k, v, pages, batch, _ = random_arguments(SMALL, [17, 40, 0], [2, 1, 0])
    with pytest.raises(PagedAttentionError, match=f"{words}; use the Triton kernel"):
        paged_attention(q, k, v, pages, batch, scale=0.1, backend="mosaic_gpu", chip=chip_named("b200"))
    tiles = Tiles(block_q=1, stages=12)
    with pytest.raises(TileError, match=r"needs [\d,]+ bytes of shared memory, h100 has 232,448 \(queries bfloat16"):
        paged_attention(q, k, v, pages, batch, scale=0.1, backend="mosaic_gpu", chip=H100, tiles=tiles)


@pytest.mark.skipif(jax.__version_info__ >= LEAST_JAX, reason="of the JAX that it is too old for")
def test_an_old_jax_is_said() -> None:
    assert reason_of_backend(_sizes(SMALL), "mosaic_gpu") == (
        f"Mosaic GPU's kernel needs JAX 0.11 or later, this is {jax.__version__}"
    )


@needs_jax
@pytest.mark.gpu
@pytest.mark.parametrize("spec", [spec for spec in SPECS if unsupported_reason(_sizes(spec)) is None], ids=str)
def test_on_a_gpu(spec: ArgSpec) -> None:
    rest = spec.num_tokens - spec.num_seqs + 1
    query_lens = [1] * (spec.num_seqs - 1) + [min(rest, spec.seq_len)]
    seq_lens = [min(spec.seq_len, 100 * seq + query_lens[seq]) for seq in range(spec.num_seqs)]
    arguments = random_arguments(spec, seq_lens, query_lens)
    expected, _ = paged_attention_reference(*arguments[:5], masking_of(spec), arguments[5])
    out, _ = jax.jit(paged_attention_mosaic_gpu, static_argnums=5)(*arguments[:5], masking_of(spec), arguments[5])
    assert out.dtype == expected.dtype == jnp.dtype(spec.dtype)
    np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=2e-2, rtol=2e-2)
