"""The Triton kernel of quantized matmuls: in Triton's interpreter against the reference, and compiled for GPUs."""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from test_quantized_matmul import arguments, cases, check

from pallas_kernels.chips import chip_named
from pallas_kernels.quantized_matmul import GpuTiles, Hooks, QuantizedWeight, quantized_matmul, unsupported_reason
from pallas_kernels.quantized_matmul.arg_specs import SPECS, ArgSpec, random_weight
from pallas_kernels.quantized_matmul.gpu import buffers, finish, launch_of, plan_of, prepare
from pallas_kernels.tiles import TileError, total_bytes
from pallas_kernels.triton_host import Interpreter, compile_for

H100 = chip_named("h100")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, of the gpu extra (Python 3.12 or later)"
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as made:
        yield made


def run_gpu(case: dict[str, Any], interpreter: Interpreter) -> None:
    x, weight, hooks = arguments(case, "rows")
    assert unsupported_reason("gpu", x, weight, activation_group_size=case["activation_group_size"]) is None
    kernel_x, rest, x_scales = prepare(x, hooks)
    launch = launch_of(
        kernel_x,
        weight,
        rest,
        chip=chip_named("t4" if case["chip"] == "v5e" else "h100"),
        x_scales=x_scales,
        out_dtype=jnp.float32,  # the interpreter cuts bfloat16 off, where a GPU rounds
    )
    if launch.constants["COMPUTE"] == "bfloat16":  # the interpreter multiplies the bits of these
        launch = replace(launch, constants={**launch.constants, "COMPUTE": "float32"})
    (made,) = interpreter.run(launch)
    y = finish(jnp.asarray(made), rest, jnp.float32)
    check(case, y, quantized_matmul(x, weight, hooks, backend="reference", out_dtype=jnp.float32))


@needs_triton
@settings(max_examples=12, deadline=None, derandomize=False)
@given(case=cases())
def test_the_gpu_kernel_agrees_with_the_reference(case: dict[str, Any], interpreter: Interpreter) -> None:
    run_gpu(case, interpreter)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@settings(max_examples=20, deadline=None, derandomize=False)
@given(case=cases())
def test_the_gpu_kernel_agrees_with_the_reference_on_many(
    case: dict[str, Any], part: int, interpreter: Interpreter
) -> None:
    run_gpu(case, interpreter)


def shapes_of(spec: ArgSpec) -> tuple[Any, QuantizedWeight, Any]:
    """x, or int8 and its scales, and a weight, all without data."""
    weight = jax.eval_shape(
        lambda: random_weight(
            spec.n, spec.k, bits=spec.bits, group_size=spec.group_size, kind=spec.kind, scale_dtype=spec.scale_dtype,
            layout="rows", seed=0,
        )
    )  # fmt: skip
    if spec.activation_group_size is None:
        return jax.ShapeDtypeStruct((spec.m, spec.k), spec.x_dtype), weight, None
    scales = jax.ShapeDtypeStruct((spec.m, spec.k // spec.activation_group_size), jnp.float32)
    return jax.ShapeDtypeStruct((spec.m, spec.k), jnp.int8), weight, scales


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.m in (1, 4, 16, 512)], ids=lambda spec: spec.name)
def test_shapes_compile_to_machine_code_within_the_shared_memory_of_the_model(spec: ArgSpec, capability: int) -> None:
    chip = chip_named(f"sm{capability}")
    x, weight, x_scales = shapes_of(spec)
    launch = launch_of(x, weight, chip=chip, x_scales=x_scales, out_dtype=spec.x_dtype)
    binary = compile_for(launch, capability)
    assert binary.cubin[:4] == b"\x7fELF"
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    tiles = GpuTiles(**{name.lower(): launch.constants[name] for name in names}, num_stages=launch.num_stages)
    planned = total_bytes(buffers(plan_of(x, weight, chip=chip, x_scales=x_scales), chip, tiles), chip)
    assert binary.shared_bytes <= planned <= chip.fast_memory_bytes, launch.constants
    if capability >= 80 and not launch.constants["VECTOR"]:
        assert any(name in binary.ptx for name in ("mma.sync", "wgmma", "tcgen05")), launch.constants


def test_tiles_of_gpus_are_checked_before_anything_is_compiled() -> None:
    x, weight, _ = shapes_of(SPECS[4])
    with pytest.raises(TileError, match=r"needs [\d,]+ bytes of shared memory, t4 has 65,536 \(x 3 × bfloat16\[128"):
        tiles = GpuTiles(block_m=128, block_n=128, block_k=128)
        launch_of(x, weight, chip=chip_named("t4"), out_dtype=jnp.bfloat16, tiles=tiles)
    with pytest.raises(ValueError, match="blocks must be powers of two"):
        launch_of(x, weight, chip=H100, out_dtype=jnp.bfloat16, tiles=GpuTiles(block_m=48, block_n=64, block_k=64))
    x, weight, scales = shapes_of(SPECS[7])
    with pytest.raises(ValueError, match="block_k must be within a group, got 64"):
        tiles = GpuTiles(block_m=64, block_n=64, block_k=64)
        launch_of(x, weight, chip=H100, x_scales=scales, out_dtype=jnp.bfloat16, tiles=tiles)
    with pytest.raises(ValueError, match=r"not of one kind"):
        quantized_matmul(jnp.ones((1, 64)), _small(), backend="gpu", chip=chip_named("v5e"))


def _small() -> QuantizedWeight:
    names: dict[str, Any] = {"bits": 4, "group_size": 32, "kind": "symmetric", "scale_dtype": "float16", "seed": 0}
    return random_weight(8, 64, layout="rows", **names)


def test_parts_are_added_with_what_is_added_to_them() -> None:
    parts = jnp.asarray(np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    y = finish(parts, Hooks(bias=jnp.ones(3), residual=jnp.full((2, 3), 0.5, jnp.bfloat16)), jnp.float32)
    np.testing.assert_array_equal(y, np.arange(6).reshape(2, 3) * 2 + 6 + 1.5)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jax-triton, of the gpu extra, and JAX's CUDA plugin to lower with it",
)
@pytest.mark.parametrize("m", [1, 16, 128])
def test_it_is_one_kernel_of_a_jax_program(m: int) -> None:
    weight = random_weight(256, 512, bits=4, group_size=64, kind="minima", scale_dtype="float16", layout="rows", seed=0)

    def call(x: jax.Array, bias: jax.Array, residual: jax.Array) -> jax.Array:
        return quantized_matmul(x, weight, Hooks(gate=x, bias=bias, residual=residual), backend="gpu", chip=H100)

    x = jnp.ones((m, 512), jnp.bfloat16)
    traced = jax.jit(call).trace(x, jnp.ones(256), jnp.ones((m, 256), jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @triton_kernel_call_ffi") == 1


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_on_a_gpu(spec: ArgSpec) -> None:
    case = {name: getattr(spec, name) for name in ArgSpec.__dataclass_fields__} | {"seed": 5, "static": False}
    case |= {"gate_function": "silu", "bias": True, "residual": True}
    x, weight, hooks = arguments(case, "rows")
    y = quantized_matmul(x, weight, hooks, backend="gpu")
    check(case, y, quantized_matmul(x, weight, hooks, backend="reference"))
