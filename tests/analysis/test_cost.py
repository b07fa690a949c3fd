"""What a token costs, against counts by hand."""

from pathlib import Path

import pytest

import llmir_jax as llmir
from llmir_jax.models.llama import LlamaConfig


@pytest.mark.parametrize("quantize", [None, "int8-channel"])
def test_llama(data_path: Path, quantize: str | None) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "llama")
    c = loaded.config
    assert isinstance(c, LlamaConfig) and not c.tie_embeddings
    cost = loaded.decoder(quantize=quantize, max_seqs=3, num_pages=4, max_seq_len=64, verify=False).cost()
    qkvo = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads)
    per_layer = qkvo + 3 * c.hidden_size * c.intermediate_size
    # What comes after the last attention is computed for the rows of the logits only.
    last = c.hidden_size * (c.num_heads * c.head_dim + 3 * c.intermediate_size)
    assert cost.multiply_adds_per_token == c.num_layers * per_layer - last
    assert cost.multiply_adds_per_row == c.vocab_size * c.hidden_size + last
    assert cost.multiply_adds_per_pair == c.num_layers * c.num_heads * 2 * c.head_dim
    pairs = 10 * 11 // 2 * cost.multiply_adds_per_pair
    assert cost.prefill_multiply_adds(10) == 10 * cost.multiply_adds_per_token + cost.multiply_adds_per_row + pairs

    norms = 4 * c.hidden_size * (2 * c.num_layers + 1)
    if quantize is None:
        # the head, all layers, and one row of the table of embeddings
        num_bytes = 4 * (c.num_layers * per_layer + c.vocab_size * c.hidden_size + c.hidden_size) + norms
        assert cost.weight_bytes == num_bytes
    assert cost.cache_bytes(10) == 10 * c.num_layers * 2 * c.num_kv_heads * c.head_dim * 4


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
