"""What a token costs, against counts by hand."""

from pathlib import Path

import jax.numpy as jnp
import pytest

import llmir_jax as llmir
from llmir_jax.models.gpt2 import GPT2Config
from llmir_jax.models.llama import LlamaConfig


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("quantize", "dtype", "param_dtype"),
    [
        (None, "float32", "float32"),
        (None, "float32", "bfloat16"),
        (None, "float32", "float16"),
        (None, "bfloat16", "bfloat16"),
        ("int8-channel", "float32", "float32"),
        ("w8a8", "float32", "float32"),
        ("int4", "bfloat16", "bfloat16"),
    ],
)
def test_llama(data_path: Path, quantize: str | None, dtype: str, param_dtype: str, target: str) -> None:
    """The same products whatever they are computed with; of weights as many bytes as they have."""
    loaded = llmir.load(data_path / "checkpoints" / "llama", dtype=dtype, param_dtype=param_dtype)
    c = loaded.config
    assert isinstance(c, LlamaConfig) and not c.tie_embeddings
    sizes = {"max_seqs": 3, "num_pages": 4, "max_seq_len": 64}
    cost = loaded.decoder(quantize=quantize, target=target, verify=False, **sizes).cost()
    qkvo = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    per_layer = qkvo + 3 * c.hidden_size * c.intermediate_size
    # What comes after the last attention is computed for the rows of the logits only.
    last = c.hidden_size * (c.num_heads * c.head_dim + 3 * c.intermediate_size)
    assert cost.multiply_adds_per_token == c.num_layers * per_layer - last
    assert cost.multiply_adds_per_row == c.vocab_size * c.hidden_size + last
    assert cost.multiply_adds_per_pair == c.num_layers * c.num_heads * 2 * c.head_dim
    pairs = 10 * 11 // 2 * cost.multiply_adds_per_pair
    assert cost.prefill_multiply_adds(10) == 10 * cost.multiply_adds_per_token + cost.multiply_adds_per_row + pairs

    norms = c.hidden_size * (2 * c.num_layers + 1)
    num_weights = c.num_layers * per_layer + c.vocab_size * c.hidden_size
    if quantize is None:
        # the head, all layers, and one row of the table of embeddings
        assert cost.weight_bytes == (num_weights + c.hidden_size + norms) * jnp.dtype(param_dtype).itemsize
    else:
        bits = 8 * cost.weight_bytes / num_weights
        assert 4 < bits < 7 if quantize == "int4" else 8 < bits < 10
    assert cost.cache_bytes(10) == 10 * c.num_layers * 2 * c.num_kv_heads * c.head_dim * jnp.dtype(dtype).itemsize


def test_tied_embeddings_and_windows(data_path: Path) -> None:
    """A table that is the head too is read as a whole; a window bounds what is read of the cache."""
    loaded = llmir.load(data_path / "checkpoints" / "qwen2_window")
    decoder = loaded.decoder(max_seqs=1, num_pages=8, max_seq_len=128, verify=False)
    cost, groups = decoder.cost(), decoder.cache_groups
    windows = {group.window for group in groups if group.window is not None}
    assert windows
    per_token = {g: 2 * g.num_layers * g.num_kv_heads * g.head_dim * 4 for g in groups}
    assert cost.cache_bytes(100) == sum(size * min(100, g.window or 100) for g, size in per_token.items())
    if loaded.config.tie_embeddings:
        assert cost.weight_bytes == decoder.report().parameter_bytes


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linears_with_biases(data_path: Path, dtype: str, target: str) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "gpt2", dtype=dtype)
    c = loaded.config
    assert isinstance(c, GPT2Config)
    cost = loaded.decoder(max_seqs=2, num_pages=4, max_seq_len=64, target=target, verify=False).cost()
    last = c.hidden_size * (c.hidden_size + 2 * c.intermediate_size)
    assert cost.multiply_adds_per_token == c.num_layers * (3 * c.hidden_size**2 + last) - last
    assert cost.multiply_adds_per_row == c.vocab_size * c.hidden_size + last
    assert cost.multiply_adds_per_pair == c.num_layers * 2 * c.hidden_size
