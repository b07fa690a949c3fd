"""Hugging Face directories: what they may hold, and every way in which they can be broken."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gguf_export import read_tensors

import llmir_jax as llmir
from llmir_jax.errors import CheckpointError
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.models.rope import LinearScaling


@pytest.fixture
def copy_of(tmp_path: Path, data_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(data_path / "checkpoints" / name, tmp_path / name))

    return copy


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = read_tensors(folder)
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        llmir.load(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mamba"),
        ("model_type", None),
        ("model_type", ["llama"]),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_parameters", "llama3"),
        ("quantization_config", {"quant_method": "gptq"}),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 64),
        ("attn_logit_softcapping", 50.0),
        ("residual_multiplier", 0.22),
        ("num_local_experts", 8),
        ("hidden_size", "32"),
        ("hidden_size", True),
        ("hidden_size", -32),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**12),
        ("num_key_value_heads", 3),
        ("vocab_size", None),
        ("tie_word_embeddings", 1),
        ("rms_norm_eps", "small"),
        ("eos_token_id", "two"),
    ],
)
def test_a_field_that_changes_the_maths_is_refused_by_name(
    copy_of: Callable[[str], Path], field: str, value: object
) -> None:
    folder = copy_of("llama")
    edit_config(folder, **{field: value})
    if field == "eos_token_id":
        (folder / "generation_config.json").unlink()
        write_tokenizer(folder)
    message = refusal(folder)
    expected = {
        "architectures": "LlamaForSequenceClassification",
        "rope_parameters": "rop",
        "num_key_value_heads": "heads",
    }
    assert expected.get(field, field) in message.lower() or expected.get(field, field) in message


def test_fields_that_change_nothing_are_accepted(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    edit_config(
        folder,
        torch_dtype="bfloat16",
        use_cache=False,
        rope_interleaved=False,
        _name_or_path="x",
        quantization_config=None,
    )
    assert isinstance(llmir.load(folder).config, LlamaConfig)


def test_rope_as_transformers_4_wrote_it(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama_bias")
    new = llmir.load(folder).config
    edit_config(folder, rope_parameters=None, rope_theta=5000, rope_scaling={"type": "linear", "factor": 2.0})
    old = llmir.load(folder).config
    assert isinstance(old, LlamaConfig) and old == new and old.rope_scaling == LinearScaling(factor=2.0)


@pytest.mark.parametrize(("window", "expected"), [(7, 7), (None, None), ("absent", 4096)])
def test_mistral_windows(copy_of: Callable[[str], Path], window: object, expected: int | None) -> None:
    folder = copy_of("mistral")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": window}
    if window == "absent":
        del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = llmir.load(folder).config
    assert isinstance(loaded, LlamaConfig) and loaded.windows == (expected, expected)


@pytest.mark.parametrize("stored", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_floating_types(copy_of: Callable[[str], Path], stored: Any) -> None:
    folder = copy_of("qwen2")
    wanted = read_tensors(folder)["model.layers.1.self_attn.q_proj.weight"].astype(stored).astype(np.float32)

    def cast(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: x.astype(stored) for name, x in tensors.items()})

    rewrite_tensors(folder, cast)
    model: Any = llmir.load(folder).model
    np.testing.assert_array_equal(model.layers[1].attn.q.kernel[...], wanted.T)


def test_buffers_of_old_versions_are_skipped(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("gpt2")

    def as_published_in_2019(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
        tensors["h.0.attn.masked_bias"] = np.float32([-1e4])

    tokens = np.arange(8, dtype=np.int32)[None]
    before = llmir.load(folder)
    assert before.model is before.model  # read before the file is replaced, and kept
    rewrite_tensors(folder, as_published_in_2019)
    after = llmir.load(folder)
    np.testing.assert_array_equal(*(jax.jit(x.forward)(x.model, tokens) for x in (before, after)))


def test_broken_tensors(copy_of: Callable[[str], Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def drop(tensors: dict[str, np.ndarray]) -> None:
        del tensors[name]

    def reshape(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].T.copy()

    def quantize(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].astype(np.int8)

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.adapter.weight"] = tensors[name]

    folder = copy_of("mistral")
    pristine = folder.with_name("pristine")
    folder.rename(pristine)
    for change, expected in (
        (drop, f"no tensor '{name}'"),
        (reshape, "has shape [32, 48], but the model's config asks for [48, 32]"),
        (quantize, "is of type I8"),
        (add, "adapter"),
    ):
        shutil.copytree(pristine, folder)
        rewrite_tensors(folder, change)
        assert expected in refusal(folder)
        shutil.rmtree(folder)


def test_missing_files(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("llama")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.rename(folder / "elsewhere")
    assert str(shard) in refusal(folder)
    (folder / "elsewhere").rename(shard)
    (folder / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json; it has expected.safetensors" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder)
    (tmp_path / "empty").mkdir()
    assert "no such file" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "x.gguf").write_text("")
    assert f"load {tmp_path / 'empty' / 'x.gguf'}" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\xff", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}'])
def test_broken_json(copy_of: Callable[[str], Path], content: str) -> None:
    folder = copy_of("llama")
    for name in ("model.safetensors.index.json", "config.json"):
        if not content.startswith('{"weight') or "index" in name:
            (folder / name).write_text(content, encoding="latin-1")
            assert name in refusal(folder)


@pytest.mark.parametrize("seed", range(12))
def test_damaged_weights(copy_of: Callable[[str], Path], seed: int) -> None:
    rng = random.Random(seed)
    file = copy_of("qwen3") / "model.safetensors"
    data = bytearray(file.read_bytes())
    if seed % 2:
        data = data[: rng.randrange(len(data))]
    else:  # the length of the header, or its first bytes
        data[rng.choice([0, 3, 7, 8, 9])] ^= rng.randrange(1, 256)
    file.write_bytes(data)
    assert "fetch it again" in refusal(file.parent)


def write_tokenizer(folder: Path, **settings: Any) -> None:
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}
    added = [
        {
            "id": i,
            "content": token,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(("<s>", "</s>"))
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_tokenizer_and_template(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    assert llmir.load(folder).tokenizer is None and llmir.load(folder).chat_template is None
    templates = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
    ]
    write_tokenizer(folder, bos_token={"content": "<s>"}, eos_token="</s>", chat_template=templates)
    loaded = llmir.load(folder)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.eos_ids == (2, 1)  # generation_config.json's, then the tokenizer's own
    assert loaded.apply_chat_template([{"role": "user", "content": "ab"}]) == "<s>ab"
    assert loaded.tokenizer.encode("<s>abba") == [0, 4, 3, 2]
    (folder / "chat_template.jinja").write_text("file")
    assert llmir.load(folder).apply_chat_template([{"role": "user", "content": "x"}]) == "file"
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert (loaded := llmir.load(folder)).tokenizer and loaded.tokenizer.eos_ids == (7, 1)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a readable tokenizer" in refusal(folder)
