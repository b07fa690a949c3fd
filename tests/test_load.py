"""`llmir.load`: what a name stands for, dtypes, and the same model from every kind of checkpoint."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmir_jax as llmir
from llmir_jax.errors import CheckpointError, LlmirError, RequestError
from llmir_jax.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "name", ["no/such/path", "nothing.gguf", "models/nothing.gguf", "smollm3", "", "~/no-such-thing", Path("a/b")]
)
def test_names_that_stand_for_nothing(name: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        llmir.load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "float64", "no-such-type", 3, "complex64"])
def test_dtypes_that_make_no_sense(data_path: Path, dtype: Any) -> None:
    with pytest.raises(LlmirError, match=r"expected one of float32, bfloat16, float16"):
        llmir.load(data_path / "checkpoints" / "gpt2", dtype=dtype)
    with pytest.raises(LlmirError, match=r"param_dtype="):
        llmir.load(data_path / "checkpoints" / "gpt2", param_dtype=dtype)


@pytest.mark.parametrize(
    ("dtypes", "logits_dtype", "weights_dtype"),
    [
        ({}, "float32", "float32"),
        ({"dtype": jnp.bfloat16}, "bfloat16", "bfloat16"),
        ({"dtype": "float32", "param_dtype": "bfloat16"}, "float32", "bfloat16"),
        ({"dtype": np.dtype("float16")}, "float16", "float16"),
    ],
)
def test_dtypes(data_path: Path, dtypes: Any, logits_dtype: str, weights_dtype: str) -> None:
    loaded = llmir.load(str(data_path / "checkpoints" / "qwen2"), **dtypes)
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(loaded.model))} == {weights_dtype}
    logits = jax.eval_shape(loaded.forward, loaded.model, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert logits.dtype.name == logits_dtype and logits.shape == (2, 5, loaded.config.vocab_size)


def test_a_single_safetensors_file_is_not_a_model(data_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a GGUF file"):
        llmir.load(data_path / "checkpoints" / "qwen2" / "model.safetensors")


def test_without_a_chat_template(data_path: Path) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "gpt2")
    with pytest.raises(RequestError, match=r"no chat template"):
        loaded.apply_chat_template([{"role": "user", "content": "Hello"}])
    with pytest.raises(RequestError, match=r"no tokenizer"):
        loaded.encode_chat([{"role": "user", "content": "Hello"}])


def test_smollm2_as_a_huggingface_directory(smollm2: llmir.Loaded, smollm2_hf_path: Path) -> None:
    """The same weights, tokenizer and template, whether from the GGUF file or from what Hugging Face would publish."""
    loaded, directory = smollm2, llmir.load(smollm2_hf_path)
    assert directory.config == loaded.config
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(x.model)) for x in (directory, loaded)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    text = "Hello <|im_end|> 1234\n\n  it's"
    assert isinstance(directory.tokenizer, Tokenizer) and isinstance(loaded.tokenizer, Tokenizer)
    assert directory.tokenizer.encode(text) == loaded.tokenizer.encode(text)
    assert directory.tokenizer.eos_ids == loaded.tokenizer.eos_ids == (2,)
    messages = [{"role": "user", "content": "Hi"}]
    assert directory.apply_chat_template(messages) == loaded.apply_chat_template(messages)
    assert directory.encode_chat(messages) == loaded.tokenizer.encode(loaded.apply_chat_template(messages))
    assert "134,515,008 parameters" in repr(loaded)


def test_smollm2_by_name(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMIR_CACHE", str(smollm2_path.parent))
    loaded = llmir.load("smollm2-135m", dtype="bfloat16")
    assert loaded.name == "smollm2-135m" and loaded.config.num_layers == 30
