"""`make gpu-check` where there is no GPU: all of it on a small scale, and what it says without one."""

import importlib.util
from typing import Any

import jax
import pytest

from llmir_jax.bench.gpu_check import main, models, parameter_count
from llmir_jax.bench.gpu_scale import LLAMA_8B, dry, full, timed_products
from llmir_jax.bench.shapes import SHAPES
from pallas_kernels.chips import chip_named
from pallas_kernels.paged_attention.mosaic_gpu import LEAST_JAX
from pallas_kernels.quantized_matmul import QuantizedWeight
from pallas_kernels.quantized_matmul.gpu import launch_of


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_one_line_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu-check: no NVIDIA GPU: JAX ")
    assert "--dry-run" in line


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, of the gpu extra")
def test_dry_run_checks_every_kernel_and_measures_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "the times mean nothing" in out
    mosaic = 1 if jax.__version_info__ >= LEAST_JAX else 0
    assert out.count("| ok |") == len(dry().specs) + len(dry().products) + len(dry().flash) + mosaic
    assert "| quantized matmul | small-a8 |" in out
    assert "| flash attention, Triton | small |" in out
    assert "paged attention, decode of 3" in out
    assert "Mosaic GPU | not measured: " in out
    products = [line for line in out.splitlines() if line.startswith("| int")]
    assert len(products) == 16  # four formats, with zero points and without, of one row and of three
    assert "FAILED" not in out
    assert "| tiny, float32 |" in out


def test_published_sizes_and_models_that_do_not_fit() -> None:
    assert parameter_count(SHAPES["llama-3.2-1b"]) == pytest.approx(1.236e9, rel=1e-3)
    assert parameter_count(LLAMA_8B) == pytest.approx(8.03e9, rel=1e-3)
    (_, row) = models(dry(), "float32", memory=1000)
    assert row[1] == "not measured: 0 GiB are needed, there are 0"


def struct(rows: int, columns: int, dtype: str) -> Any:
    return jax.ShapeDtypeStruct((rows, columns), dtype)


@pytest.mark.parametrize("chip", ["t4", "h100"])
def test_every_product_that_is_timed_has_tiles(chip: str) -> None:
    dtype = "bfloat16" if chip == "h100" else "float16"
    specs = list(timed_products(full(dtype), dtype))
    assert {(spec.name, spec.m) for spec in specs} >= {("int4-g32, zero points", 1), ("int8", 512)}
    for spec in specs:
        width, groups = spec.k * spec.bits // 8, 1 if spec.group_size is None else spec.k // spec.group_size
        weight = QuantizedWeight(
            values=struct(spec.n, width, "uint8" if spec.bits == 4 else "int8"),
            scales=struct(spec.n, groups, spec.scale_dtype),
            zero_points=struct(spec.n, groups, "int8") if spec.kind == "zero_points" else None,
            bits=spec.bits,
            layout="rows",
        )
        assert weight.problem() is None
        x = struct(spec.m, spec.k, dtype)
        assert launch_of(x, weight, chip=chip_named(chip), out_dtype=dtype).grid
