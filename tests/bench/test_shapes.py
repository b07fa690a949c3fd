"""Files of random weights in a model's shapes: what is in them is what their config says."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import llmir_jax as llmir
from llmir_jax.bench import shapes
from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.cli import bench
from llmir_jax.errors import LlmirError
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.models.rope import FrequencyFactors, inverse_frequencies

TINY = replace(
    shapes.SHAPES["llama-3.2-1b"],
    vocab_size=160,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    windows=(None, None),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test, where the shape that the command knows is a tiny one."""
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path))
    monkeypatch.setitem(shapes.SHAPES, "llama-3.2-1b", TINY)
    monkeypatch.setattr(shapes, "ROWS_AT_ONCE", 50)  # so that a matrix is several parts, the last one smaller
    return tmp_path


def test_the_command_has_all() -> None:
    assert set(bench.SHAPES) == set(shapes.SHAPES)


def test_a_published_shape() -> None:
    """1,235,814,400 parameters, as https://huggingface.co/meta-llama/Llama-3.2-1B counts them: 1.24 B."""
    shape = shapes.SHAPES["llama-3.2-1b"]
    matrices = sum(rows * columns for rows, columns in shapes._matrices(shape).values())
    norms = shape.hidden_size * (2 * shape.num_layers + 1)
    assert matrices + norms == 1_235_814_400
    factors = shapes._vectors(shape)["rope_freqs"]
    assert factors[0] == 1 and factors[-1] == 32 and np.all(np.diff(factors) >= 0)


def test_the_file(cache: Path) -> None:
    path = shapes.shape_file("llama-3.2-1b")
    loaded = llmir.load(path)
    config = loaded.config
    assert isinstance(config, LlamaConfig) and isinstance(config.rope_scaling, FrequencyFactors)
    assert config.rms_norm_eps == pytest.approx(TINY.rms_norm_eps)  # a float32 in the file
    assert replace(config, rope_scaling=TINY.rope_scaling, rms_norm_eps=TINY.rms_norm_eps) == TINY
    expected = inverse_frequencies(TINY.head_dim, TINY.rope_theta, TINY.rope_scaling)
    found = inverse_frequencies(TINY.head_dim, TINY.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert loaded.tokenizer is None
    assert {scheme.bits for scheme in GGUFFile(path).stored.values()} == {4}
    assert len(GGUFFile(path).stored) == 1 + 7 * TINY.num_layers

    weights = np.asarray(loaded.source.read("layers.1.mlp.gate.kernel"))
    assert weights.shape == (64, 96)
    assert abs(weights.std() / shapes.STANDARD_DEVIATION - 1) < 0.2 and abs(weights.mean()) < shapes.STANDARD_DEVIATION
    assert len(np.unique(np.asarray(loaded.source.read("embed.embedding")))) > 1000
    logits = loaded.forward(loaded.model, jnp.asarray([[1, 2, 159]]))
    assert np.isfinite(np.asarray(logits)).all() and np.asarray(logits).std() > 0

    written = path.stat().st_mtime_ns
    assert shapes.shape_file("llama-3.2-1b") == path and path.stat().st_mtime_ns == written
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_not_finished_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shapes, "_random_blocks", fail)
    with pytest.raises(LlmirError, match=r"--shape llama-3\.2-1b: cannot be kept in .*No space left.*LLMIR_CACHE"):
        shapes.shape_file("llama-3.2-1b")
    assert list((cache / "bench" / "shapes").iterdir()) == []
