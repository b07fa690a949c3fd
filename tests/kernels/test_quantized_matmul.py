"""Quantized matmuls: the reference against NumPy, and every kernel against the reference on random inputs."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmir_jax.libtpu_environment import ENVIRONMENT
from pallas_kernels.chips import chip_named
from pallas_kernels.quantized_matmul import (
    Hooks,
    QuantizedWeight,
    TpuTiles,
    UnsupportedError,
    quantized_matmul,
    unsupported_reason,
)
from pallas_kernels.quantized_matmul.arg_specs import random_weight
from pallas_kernels.tiles import TileError

pytestmark = pytest.mark.usefixtures("quick_compilation")
KINDS = ("symmetric", "zero_points", "minima")
V5E = chip_named("v5e")


DRAWS = 5
"""Random data that a compiled form is run on."""


@st.composite
def forms(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of any kind but for their data: odd rows and columns, inputs in groups that do not fill a chunk."""
    group_size = draw(st.sampled_from([None, 32, 64, 128]))
    k = draw(st.integers(1, 5)) * (group_size or 32) * draw(st.sampled_from([1, 2, 3]))
    activations = [None, None, k]
    if group_size is not None:
        activations += [size for size in (32, 64, group_size) if k % size == 0]
    return {
        "m": draw(st.sampled_from([1, 3, 8, 17, 70])),
        "n": draw(st.sampled_from([1, 40, 128, 130, 300])),
        "k": k,
        "bits": draw(st.sampled_from([4, 8])),
        "group_size": group_size,
        "kind": draw(st.sampled_from(KINDS)),
        "scale_dtype": draw(st.sampled_from(["float16", "bfloat16", "float32"])),
        "x_dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "activation_group_size": draw(st.sampled_from(activations)),
        "static": draw(st.booleans()),
        "gate_function": draw(st.sampled_from([None, "silu", "gelu_tanh", "relu"])),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "tile": draw(st.sampled_from([None, (32, 128), (96, 256)])),
        "chip": draw(st.sampled_from(["v5e", "tpu7x"])),
    }


SEEDS = st.integers(0, 2**31)
DRAWN = st.lists(SEEDS, min_size=DRAWS, max_size=DRAWS, unique=True)


def cases() -> st.SearchStrategy[dict[str, Any]]:
    """Forms with a seed for their data."""
    return st.builds(lambda form, seed: form | {"seed": seed}, forms(), SEEDS)


def arguments(case: dict[str, Any], layout: Any) -> tuple[jax.Array, QuantizedWeight, Hooks]:
    """x [m, k], a weight, and what is done around their product."""
    rng = np.random.default_rng(case["seed"])
    m, n, k = case["m"], case["n"], case["k"]

    def floats(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), case["x_dtype"])

    names = ("bits", "group_size", "kind", "scale_dtype", "seed")
    weight = random_weight(n, k, layout=layout, **{name: case[name] for name in names})
    rest: dict[str, Any] = {"activation_group_size": case["activation_group_size"]}
    if case["gate_function"]:
        rest |= {"gate": floats(m, k), "gate_function": case["gate_function"]}
    if case["activation_group_size"] and case["static"]:
        rest["activation_scales"] = jnp.asarray(
            rng.uniform(0.01, 0.03, k // case["activation_group_size"]), jnp.float32
        )
    if case["bias"]:
        rest["bias"] = floats(n)
    if case["residual"]:
        rest["residual"] = floats(m, n)
    return floats(m, k), weight, Hooks(**rest)


def check(case: dict[str, Any], y: jax.Array, expected: jax.Array) -> None:
    """Within rounding of the weights or of y to x's dtype: errors of weights add up to a part of what y is of."""
    assert y.dtype == expected.dtype and y.shape == expected.shape
    error = np.abs(np.asarray(y, np.float32) - np.asarray(expected, np.float32))
    exact = np.abs(np.asarray(expected, np.float32))
    # bfloat16 has 8 bits: half of the last is 2^-8 at most, of each weight, and of y and of what is expected of it.
    # float32 as for 2,000 terms in any order.
    epsilon, roundings = (2**-8, 2) if case["x_dtype"] == "bfloat16" else (2e-5, 1)
    bound = epsilon * (roundings * exact + 2.5)
    assert (error <= bound).all(), (case, float((error / bound).max()))


def check_tpu(form: dict[str, Any], seeds: list[int]) -> None:
    """Compiles a form once, for every seed's data."""
    tiles = None if form["tile"] is None else TpuTiles(tile_m=form["tile"][0], tile_n=form["tile"][1])
    options = {"chip": chip_named(form["chip"]), "tiles": tiles, "interpret": True}
    kernel = jax.jit(functools.partial(quantized_matmul, backend="tpu", **options))
    reference = jax.jit(functools.partial(quantized_matmul, backend="reference"))
    for seed in seeds:
        case = form | {"seed": seed}
        called_with = arguments(case, "columns")
        check(case, kernel(*called_with), reference(*called_with))


@settings(max_examples=7, deadline=None, derandomize=False)
@given(form=forms(), seeds=DRAWN)
def test_the_tpu_kernel_agrees_with_the_reference(form: dict[str, Any], seeds: list[int]) -> None:
    check_tpu(form, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@settings(max_examples=10, deadline=None, derandomize=False)
@given(form=forms(), seeds=DRAWN)
def test_the_tpu_kernel_agrees_with_the_reference_on_many(form: dict[str, Any], seeds: list[int], part: int) -> None:
    check_tpu(form, seeds)  # 4 parts of 10 forms: 200 cases


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_reference_is_the_equation(layout: Any, kind: str, bits: int) -> None:
    weight = random_weight(5, 96, bits=bits, group_size=32, kind=kind, scale_dtype="float32", layout=layout, seed=3)
    turned = random_weight(5, 96, bits=bits, group_size=32, kind=kind, scale_dtype="float32", layout="columns", seed=3)
    q = np.asarray(turned.values.astype(jnp.int32)).T.astype(np.float64)
    scales = np.repeat(np.asarray(turned.scales).T.astype(np.float64), 32, axis=1)
    expected = q * scales
    if kind == "zero_points":
        assert turned.zero_points is not None
        expected = (q - np.repeat(np.asarray(turned.zero_points).T.astype(np.float64), 32, axis=1)) * scales
    if kind == "minima":
        assert turned.minima is not None
        expected = q * scales + np.repeat(np.asarray(turned.minima).T.astype(np.float64), 32, axis=1)
    np.testing.assert_allclose(weight.dequantize(), expected, rtol=1e-6, atol=1e-7)
    x = np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float32)
    y = quantized_matmul(jnp.asarray(x), weight)  # on a CPU: the reference
    np.testing.assert_allclose(y, x.astype(np.float64) @ expected.T, rtol=2e-5, atol=2e-5)


def test_all_float16_scales_are_converted_exactly() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    scales = bits.view(np.float16)
    finite = scales[np.isfinite(scales)].reshape(1, -1)
    ones = jnp.ones((32, finite.shape[1]), jnp.int8).at[1:].set(0)
    weight = QuantizedWeight(values=ones, scales=jnp.asarray(finite), bits=8, layout="columns")
    x = jnp.ones((1, 32), jnp.float32)
    tiles = TpuTiles(tile_m=16, tile_n=2048)
    y = quantized_matmul(x, weight, backend="tpu", chip=V5E, tiles=tiles, interpret=True)
    np.testing.assert_array_equal(y, finite.astype(np.float32))


def test_what_a_kernel_cannot_take_is_said() -> None:
    weight = random_weight(
        8, 48, bits=4, group_size=16, kind="symmetric", scale_dtype="float16", layout="columns", seed=0
    )
    x = jnp.ones((2, 48), jnp.bfloat16)
    assert unsupported_reason("tpu", x, weight) == "the TPU kernel takes a number of inputs that 32 divides, got 48"
    with pytest.raises(UnsupportedError, match=r"that 32 divides, got 48; backend='reference' takes it"):
        quantized_matmul(x, weight, backend="tpu", chip=V5E)
    rows = random_weight(8, 64, bits=4, group_size=32, kind="symmetric", scale_dtype="float16", layout="rows", seed=0)
    assert unsupported_reason("tpu", jnp.ones((2, 64), jnp.bfloat16), rows) == (
        "the TPU kernel takes weights in columns, got rows"
    )
    with pytest.raises(ValueError, match=r"x: expected floats \[..., 48\], got bfloat16\[2, 32\]"):
        quantized_matmul(x[:, :32], weight)
    with pytest.raises(ValueError, match=r"bias: expected \[8\], got \[7\]"):
        quantized_matmul(x, weight, Hooks(bias=jnp.ones(7)))
    with pytest.raises(ValueError, match="gate_function must be one of silu, gelu_tanh, relu, got 'tanh'"):
        quantized_matmul(x, weight, Hooks(gate_function="tanh"))


def test_tiles_that_do_not_fit_are_an_error_before_compilation() -> None:
    shape = jax.ShapeDtypeStruct
    weight = QuantizedWeight(
        values=shape((16384, 8192), jnp.int8),  # type: ignore[arg-type]
        scales=shape((512, 8192), jnp.float16),  # type: ignore[arg-type]
        bits=8,
        layout="columns",
    )

    def call(x: Any, weight: QuantizedWeight) -> jax.Array:
        tiles = TpuTiles(tile_m=512, tile_n=4096)
        return quantized_matmul(x, weight, backend="tpu", chip=chip_named("v5p"), tiles=tiles)

    with pytest.raises(TileError, match=r"tiles 512 × 4096: needs [\d,]+ bytes of VMEM, v5p has 60,397,977 \(x 2 ×"):
        jax.eval_shape(call, shape((512, 16384), jnp.bfloat16), weight)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu-aot)")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_every_shape_compiles_for_tpus(topology: str) -> None:
    """By Mosaic and libtpu, within the VMEM that the model of tiles gives."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_quantized_matmul.py"), topology],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
