"""Our forwards against transformers' on the tiny checkpoints of tests/data, and each variant's own maths at work."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import llmir_jax as llmir
from llmir_jax.models.gpt2 import GPT2Config
from llmir_jax.models.llama import Llama, LlamaConfig
from llmir_jax.models.rope import FrequencyFactors, Llama3Scaling, inverse_frequencies

CHECKPOINTS = ("gpt2", "llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen2_window", "qwen3")
NUM_KEPT = 8  # the last positions, whose logits the data has


def expected(data_path: Path, name: str) -> tuple[jax.Array, np.ndarray]:
    data = safetensors.numpy.load_file(data_path / "checkpoints" / name / "expected.safetensors")
    return jnp.asarray(data["tokens"]), data["last_logits"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_match_transformers(data_path: Path, name: str) -> None:
    tokens, wanted = expected(data_path, name)
    loaded = llmir.load(data_path / "checkpoints" / name)
    logits = jax.jit(loaded.forward)(loaded.model, tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (*tokens.shape, loaded.config.vocab_size)
    np.testing.assert_allclose(logits[:, -NUM_KEPT:], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_bfloat16_is_near(data_path: Path, name: str) -> None:
    tokens, wanted = expected(data_path, name)
    loaded = llmir.load(data_path / "checkpoints" / name, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(loaded.model))} == {jnp.dtype("bfloat16")}
    logits = jax.jit(loaded.forward)(loaded.model, tokens)
    assert logits.dtype == jnp.bfloat16
    error = np.abs(np.asarray(logits[:, -NUM_KEPT:], np.float32) - wanted)
    assert error.mean() < 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("llama_bias", {"rope_scaling": None}),
        ("mistral", {"windows": (None, None)}),
        ("qwen2_window", {"windows": (5, None)}),
        ("llama", {"rope_theta": 20000.0}),
    ],
)
def test_the_data_tells_variants_apart(data_path: Path, name: str, change: dict[str, Any]) -> None:
    """Without its variant's maths a checkpoint gives other logits: the comparison above would have noticed."""
    tokens, wanted = expected(data_path, name)
    loaded = llmir.load(data_path / "checkpoints" / name)
    assert isinstance(loaded.config, LlamaConfig)
    other = nnx.eval_shape(lambda: Llama(dataclasses.replace(loaded.config, **change), rngs=nnx.Rngs(0)))
    other = nnx.merge(nnx.graphdef(other), nnx.state(loaded.model))
    assert np.abs(jax.jit(loaded.forward)(other, tokens)[:, -NUM_KEPT:] - wanted).max() > 1e-3


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3", "gpt2"])
def test_later_tokens_change_nothing_before_them(data_path: Path, name: str) -> None:
    tokens, _ = expected(data_path, name)
    loaded = llmir.load(data_path / "checkpoints" / name)
    forward = jax.jit(loaded.forward)
    changed = tokens.at[:, 15:].add(1) % loaded.config.vocab_size
    before, after = (forward(loaded.model, t)[:, :15] for t in (tokens, changed))
    np.testing.assert_array_equal(before, after)


def test_published_rope_frequencies() -> None:
    """Llama 3.1's, at the ends of its scaling: the slowest is divided by 8, the fastest is left alone."""
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    plain, scaled = (inverse_frequencies(128, 500000.0, s) for s in (None, scaling))
    np.testing.assert_allclose(scaled[:28], plain[:28], rtol=1e-6)
    np.testing.assert_allclose(scaled[36:], plain[36:] / 8, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)


@pytest.mark.parametrize(
    "change",
    [
        {"num_kv_heads": 3},
        {"head_dim": 7},
        {"windows": (None,)},
        {"rope_scaling": FrequencyFactors(factors=(1.0,))},
    ],
)
def test_impossible_llama_configs_are_refused(change: dict[str, Any]) -> None:
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 2, "num_heads": 4}
    rest = {"num_kv_heads": 2, "head_dim": 8, "max_seq_len": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    fields: dict[str, Any] = shape | rest | {"windows": (None, None)}
    LlamaConfig(**fields)
    with pytest.raises(ValueError, match=r"heads|channels|windows|factors"):
        LlamaConfig(**fields | change)


def test_impossible_gpt2_config_is_refused() -> None:
    shape = {"vocab_size": 8, "hidden_size": 10, "intermediate_size": 8, "num_layers": 1, "max_seq_len": 8}
    with pytest.raises(ValueError, match="10 channels"):
        GPT2Config(**shape, num_heads=4, layer_norm_eps=1e-5)


def test_gpt2_past_its_positions_is_not_a_number(data_path: Path) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "gpt2")
    forward, longest = jax.jit(loaded.forward), loaded.config.max_seq_len
    assert np.isfinite(forward(loaded.model, jnp.zeros((1, longest), jnp.int32))).all()
    assert np.isnan(forward(loaded.model, jnp.zeros((1, longest + 1), jnp.int32))).all()
