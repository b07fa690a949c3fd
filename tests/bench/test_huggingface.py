"""A model written as a Hugging Face directory is the same model; what the directory would not describe is refused."""

from pathlib import Path

import numpy as np
import pytest

import llmir_jax as llmir
from llmir_jax.bench.huggingface import export_huggingface


def test_round_trip(data_path: Path, tmp_path: Path) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "llama")
    again = llmir.load(export_huggingface(loaded, tmp_path / "deep" / "model"))
    assert again.config == loaded.config
    for path in loaded.source.shapes:
        np.testing.assert_array_equal(loaded.source.read(path), again.source.read(path))


@pytest.mark.parametrize(("name", "words"), [("gpt2", "Llama"), ("llama3", "RoPE"), ("qwen3", "QK-norm")])
def test_refused(data_path: Path, tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(llmir.LlmirError, match=words):
        export_huggingface(llmir.load(data_path / "checkpoints" / name), tmp_path / "model")
    assert not (tmp_path / "model").exists()
