"""Our own checkpoints: what is saved comes back, and what is broken is refused."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_export import export_gguf

import llmir_jax as llmir
from llmir_jax.errors import CheckpointError


def leaves(model: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]


@pytest.mark.parametrize("name", ["gpt2", "llama_bias", "mistral", "qwen3"])
def test_save_and_load(data_path: Path, tmp_path: Path, name: str) -> None:
    saved = llmir.load(data_path / "checkpoints" / name)
    saved.save(tmp_path / "deep" / "ours")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["ours"]
    loaded = llmir.load(tmp_path / "deep" / "ours")
    assert loaded.config == saved.config and loaded.tokenizer is None and loaded.chat_template is None
    tokens = np.arange(9, dtype=np.int32)[None]
    np.testing.assert_array_equal(*(jax.jit(x.forward)(x.model, tokens) for x in (saved, loaded)))


def test_tokenizer_template_and_dtype(data_path: Path, tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [str(i) for i in range(96)],
        "tokenizer.ggml.merges": ["1 2", "3 4"],
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    export_gguf(data_path / "checkpoints" / "llama3", tmp_path / "model.gguf", metadata=metadata)
    saved = llmir.load(tmp_path / "model.gguf", dtype="bfloat16")  # its RoPE scaling is a tensor of factors
    saved.save(tmp_path / "ours")
    loaded = llmir.load(tmp_path / "ours", dtype="float32", param_dtype="bfloat16")
    assert loaded.config == saved.config
    assert loaded.tokenizer is not None and saved.tokenizer is not None
    assert loaded.tokenizer.encode("1234") == saved.tokenizer.encode("1234") == [12, 34]
    assert (loaded.tokenizer.eos_ids, loaded.tokenizer.bos_token, loaded.tokenizer.eos_token) == ((7,), "5", "7")
    assert loaded.apply_chat_template([{"role": "user", "content": "12"}]) == "512"
    for ours, theirs in zip(leaves(loaded.model), leaves(saved.model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    logits = jax.eval_shape(loaded.forward, loaded.model, jnp.zeros((1, 3), jnp.int32))
    assert logits.dtype == jnp.float32


def test_an_existing_path_is_left_alone(data_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"exists already"):
        llmir.load(data_path / "checkpoints" / "gpt2").save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written"):
        llmir.load(data_path / "checkpoints" / "gpt2").save(tmp_path / "file" / "below")


def test_broken_checkpoints(data_path: Path, tmp_path: Path) -> None:
    pristine, folder = tmp_path / "pristine", tmp_path / "broken"
    llmir.load(data_path / "checkpoints" / "llama").save(pristine)
    manifest = json.loads((pristine / "llmir.json").read_text())

    def refusal(changes: dict[str, Any] | None = None) -> str:
        if changes is not None:
            (folder / "llmir.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(CheckpointError) as caught:
            llmir.load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    shutil.copytree(pristine, folder)
    assert "version 2" in refusal({"version": 2})
    assert "architecture 'bert'" in refusal({"architecture": "bert"})
    assert "not a config that this version wrote" in refusal({"config": manifest["config"] | {"heads": 3}})
    assert "not a config that this version wrote" in refusal({"config": manifest["config"] | {"num_kv_heads": 3}})
    assert "tensor 'embed.embedding' has shape (96, 32)" in refusal({"config": manifest["config"] | {"vocab_size": 95}})
    assert "has shape None" in refusal({"config": manifest["config"] | {"qk_norm": True}})
    assert "tokenizer.json: not a readable tokenizer" in refusal(
        {"tokenizer": {"eos_ids": [1], "bos_token": None, "eos_token": None}}
    )
    (folder / "llmir.json").write_text("{")
    assert "not readable as JSON" in refusal()
    shutil.copy(pristine / "llmir.json", folder)
    llmir.load(folder)  # the weights are whole so far
    largest = max((path for path in (folder / "weights").rglob("*")), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert "missing or damaged" in refusal()
    shutil.rmtree(folder / "weights")
    assert "missing or damaged" in refusal()


@pytest.mark.parametrize("seed", range(6))
def test_damaged_weights(data_path: Path, tmp_path: Path, seed: int) -> None:
    """One bit anywhere."""
    rng, folder = random.Random(seed), tmp_path / "ours"
    llmir.load(data_path / "checkpoints" / "llama").save(folder)
    file = rng.choice(
        sorted(path for path in (folder / "weights").rglob("*") if path.stat().st_size and path.is_file())
    )
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"missing or damaged") as caught:
        llmir.load(folder)
    assert str(file) in str(caught.value)
