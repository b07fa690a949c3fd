"""`make gpu-check` where there is no GPU: all of it on a small scale, and what it says without one."""

import importlib.util

import jax
import pytest

from llmir_jax.bench.gpu_check import LLAMA_8B, dry, main, models, parameter_count
from llmir_jax.bench.shapes import SHAPES


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
    assert out.count("| ok |") == len(dry().specs) + len(dry().products) + len(dry().flash)
    assert "| quantized matmul | small-a8 |" in out
    assert "| flash attention, Triton | small |" in out
    assert "paged attention, decode of 3" in out
    assert "| tiny, float32 |" in out


def test_published_sizes_and_models_that_do_not_fit() -> None:
    assert parameter_count(SHAPES["llama-3.2-1b"]) == pytest.approx(1.236e9, rel=1e-3)
    assert parameter_count(LLAMA_8B) == pytest.approx(8.03e9, rel=1e-3)
    (_, row) = models(dry(), "float32", memory=1000)
    assert row[1] == "not measured: 0 GiB are needed, there are 0"
