"""Flash attention on NVIDIA GPUs, with no GPU: the Triton kernel interpreted against the reference, and compiled for
every generation; cuDNN's lowered for CUDA, with its presence pretended."""

import dataclasses
import importlib.util
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.chips import chip_named
from pallas_kernels.flash_attention import Sizes, unsupported_reason
from pallas_kernels.flash_attention.arg_specs import SPECS, ArgSpec, random_arguments
from pallas_kernels.flash_attention.cudnn import flash_attention_cudnn
from pallas_kernels.flash_attention.gpu import (
    Tiles,
    choose_tiles,
    flash_attention_gpu,
    is_wide,
    make_launch,
    shared_buffers,
)
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.tiles import total_bytes
from pallas_kernels.triton_host import Interpreter, compile_for

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, of the gpu extra (Python 3.12 or later)"
)
SMALL = ArgSpec(name="small", num_heads=4, num_kv_heads=2, head_dim=16, seq_len=40, batch=2, dtype="float32")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 5e-3}
"""Of results of about 1: float32's rounding over a hundred keys; 8 and 11 bits."""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running


@st.composite
def cases(draw: st.DrawFn) -> tuple[ArgSpec, Tiles, int]:
    """Short sequences of any length, and tiles that need not divide them."""
    num_kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    spec = dataclasses.replace(
        SMALL,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 20])),
        value_dim=draw(st.sampled_from([None, 8, 24])),
        seq_len=draw(st.integers(1, 50)),
        batch=draw(st.sampled_from([1, 2])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 1, 7, 30])),
        softcap=draw(st.sampled_from([None, 2.0])),
        alibi=draw(st.booleans()),
    )
    block_m, block_n = draw(st.sampled_from([16, 32])), draw(st.sampled_from([16, 32]))
    return spec, Tiles(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1), draw(st.integers(0, 999))


def check(interpreter: Interpreter, spec: ArgSpec, tiles: Tiles, seed: int) -> None:
    q, k, v, slopes = random_arguments(spec, seed=seed)
    wide = spec.dtype == "bfloat16"  # Triton's interpreter multiplies matrices of bfloat16 bit by bit
    (got,) = interpreter.run(make_launch(q, k, v, spec.masking, slopes, tiles, wide=wide))
    expected = flash_attention_reference(q, k, v, spec.masking, slopes)
    tolerance = TOLERANCE[spec.dtype]
    np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=tolerance, atol=tolerance)


@needs_triton
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_random_sequences(interpreter: Interpreter, case: tuple[ArgSpec, Tiles, int]) -> None:
    check(interpreter, *case)


@needs_triton
@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_many_random_sequences(interpreter: Interpreter, case: tuple[ArgSpec, Tiles, int]) -> None:
    check(interpreter, *case)


def sizes_of(spec: ArgSpec) -> Sizes:
    return Sizes.of(*spec.structs())


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("spec", SPECS[1:3] + SPECS[5:7], ids=lambda spec: spec.name)
def test_compiles_within_the_shared_memory_that_was_planned(spec: ArgSpec, capability: int) -> None:
    q, k, v, slopes = spec.structs()
    chip = chip_named(f"sm{capability}")
    tiles = choose_tiles(sizes_of(spec), chip)
    launch = make_launch(q, k, v, spec.masking, slopes, tiles, wide=is_wide(sizes_of(spec), chip))
    binary = compile_for(launch, capability)
    assert binary.cubin[:4] == b"\x7fELF"
    planned = total_bytes(shared_buffers(tiles, sizes_of(spec), chip), chip)
    assert binary.shared_bytes <= planned <= chip.fast_memory_bytes


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_are_tiles_for_every_head_dim_on_every_chip(capability: int, head_dim: int, dtype: str) -> None:
    spec = dataclasses.replace(SMALL, head_dim=head_dim, dtype=dtype, seq_len=2048)
    chip = chip_named(f"sm{capability}")
    assert unsupported_reason(sizes_of(spec), spec.masking, "gpu", chip) is None


def test_what_triton_does_not_take_is_said() -> None:
    wrong = dataclasses.replace(SMALL, head_dim=320)
    reason = unsupported_reason(sizes_of(wrong), wrong.masking, "gpu", chip_named("h100"))
    assert reason == "heads of 320 and values of 320: more than 256"
    wrong = dataclasses.replace(SMALL, dtype="int8")
    reason = unsupported_reason(sizes_of(wrong), wrong.masking, "gpu", chip_named("h100"))
    assert reason == "queries are int8, not float32, bfloat16, float16"


HALF = dataclasses.replace(SMALL, dtype="bfloat16", head_dim=64, seq_len=300)


@pytest.mark.parametrize(
    ("changes", "chip", "reason"),
    [
        ({"dtype": "float32"}, "h100", "cuDNN's queries are bfloat16 or float16, not float32"),
        ({"dtype": "float16"}, "t4", "t4: cuDNN's attention needs compute capability 8.0 or later"),
        ({"softcap": 2.0}, "h100", "JAX gives cuDNN no soft caps"),
        ({"alibi": True}, "h100", "JAX gives cuDNN no ALiBi slopes"),
        ({"causal": False, "window": 9}, "h100", "cuDNN has windows under a causal mask only"),
        ({"value_dim": 8}, "h100", "JAX gives cuDNN values of the size of keys: 8 are not 64"),
        ({}, "v5e", "v5e: cuDNN's attention needs compute capability 8.0 or later"),
        ({}, "h100", "cuDNN: cuDNN is not detected."),
    ],
)
def test_what_cudnn_does_not_take_is_said(changes: dict[str, object], chip: str, reason: str) -> None:
    if reason.endswith("detected.") and importlib.util.find_spec("jax_cuda12_plugin") is not None:
        pytest.skip("there is a CUDA plugin, which knows a cuDNN")
    spec = dataclasses.replace(HALF, **changes)
    assert unsupported_reason(sizes_of(spec), spec.masking, "cudnn", chip_named(chip)) == reason


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cuDNN, so that programs can be lowered for it."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("window", [None, 128])
def test_cudnn_is_called(window: int | None) -> None:
    spec = dataclasses.replace(HALF, window=window)
    q, k, v, _ = spec.structs()
    assert unsupported_reason(sizes_of(spec), spec.masking, "cudnn", chip_named("a100-40gb")) is None
    traced = jax.jit(lambda q, k, v: flash_attention_cudnn(q, k, v, spec.masking)).trace(q, k, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax") == 1
    assert r"\22mask_type\22: \22CAUSAL\22" in text
    assert rf"\22sliding_window_length\22: {window or 0}" in text
    wrong = dataclasses.replace(spec, head_dim=320)
    reason = unsupported_reason(sizes_of(wrong), wrong.masking, "cudnn", chip_named("a100-40gb"))
    assert reason == "cuDNN: The head dim must be <= 128 and a multiple of 8, but got 320."  # JAX, of no Hopper


@needs_triton
@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jax-triton and JAX's CUDA plugin, which need no GPU",
)
def test_triton_is_part_of_a_jax_program() -> None:
    q, k, v, slopes = dataclasses.replace(SMALL, alibi=True).structs()

    def call(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
        return flash_attention_gpu(q, k, v, SMALL.masking, slopes, chip=chip_named("h100"))

    text = jax.jit(call).trace(q, k, v, slopes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == 1


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "gpu"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_on_a_gpu(spec: ArgSpec, backend: str) -> None:
    spec = dataclasses.replace(spec, seq_len=min(spec.seq_len, 2048))
    if (reason := unsupported_reason(sizes_of(spec), spec.masking, backend)) is not None:
        pytest.skip(reason)
    q, k, v, slopes = random_arguments(spec)
    call = {"cudnn": flash_attention_cudnn, "gpu": flash_attention_gpu}[backend]
    got = jax.jit(lambda q, k, v: call(q, k, v, spec.masking, slopes))(q, k, v)
    expected = flash_attention_reference(q, k, v, spec.masking, slopes)
    np.testing.assert_allclose(jnp.float32(got), jnp.float32(expected), atol=2e-2, rtol=2e-2)
