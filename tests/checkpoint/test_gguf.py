"""GGUF files: the same model as the Hugging Face directory, every tensor type we read, and broken files."""

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from gguf_export import export_gguf

import llmir_jax as llmir
from llmir_jax.checkpoint.gguf_file import SUPPORTED_TYPES, GGUFFile
from llmir_jax.checkpoint.names import gguf_sources
from llmir_jax.errors import CheckpointError
from llmir_jax.models.llama import LlamaConfig

GGML = gguf.GGMLQuantizationType
CONVERTED = ("gpt2", "llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3")
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": [str(i) for i in range(96)],
    "tokenizer.ggml.merges": ["1 2", "3 4"],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        llmir.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("name", CONVERTED)
def test_the_same_logits_as_transformers(data_path: Path, tmp_path: Path, name: str) -> None:
    folder = data_path / "checkpoints" / name
    export_gguf(folder, tmp_path / "model.gguf")
    loaded = llmir.load(tmp_path / "model.gguf")
    expected = safetensors.numpy.load_file(folder / "expected.safetensors")
    logits = jax.jit(loaded.forward)(loaded.model, expected["tokens"])
    np.testing.assert_allclose(logits[:, -8:], expected["last_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized_weights(data_path: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Each parameter is what the `gguf` package dequantizes, whatever was done to its rows and columns on the way."""
    quantization = GGML[kind]
    written = export_gguf(data_path / "checkpoints" / name, tmp_path / "model.gguf", quantization=quantization)
    loaded = llmir.load(tmp_path / "model.gguf")
    sources = gguf_sources(loaded.config, interleaved=name == "llama")
    block, num_quantized = gguf.GGML_QUANT_SIZES[quantization][0], 0
    for key, variable in nnx.to_flat_state(nnx.state(loaded.model)):
        source, ours = sources[".".join(map(str, key))], np.asarray(variable.get_value())
        stored = written[source.name]
        if stored.ndim == 2 and stored.shape[-1] % block == 0:
            stored = gguf.dequantize(gguf.quantize(stored, quantization), quantization)
            num_quantized += 1
        if source.interleaved_heads is not None:  # rows (head, pair, member) → (head, member, pair), one at a time
            half = stored.shape[0] // source.interleaved_heads // 2
            heads = range(source.interleaved_heads)
            order = [h * 2 * half + pair * 2 + member for h in heads for member in (0, 1) for pair in range(half)]
            stored = stored[order]
        np.testing.assert_array_equal(ours, stored.T if source.transposed else stored)
    assert num_quantized >= 8


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_every_supported_type_is_read(tmp_path: Path, kind: Any) -> None:
    """Random blocks, several rows of several blocks: as the `gguf` package dequantizes them, not numbers included."""
    rng = np.random.default_rng(int(kind))
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (2, 3, 4 * num_bytes), np.uint8)
    plain = {GGML.F32: np.float32, GGML.F16: np.float16}
    with np.errstate(all="ignore"):
        expected = raw.view(plain[kind]) if kind in plain else gguf.dequantize(raw, kind)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("before", np.zeros(3, np.float32))
    writer.add_tensor("t", raw, raw_shape=raw.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "t.gguf")
    assert file.shapes == {"before": (3,), "t": (2, 3, 4 * block)}
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(file.read("t"), expected)


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    values = {"a": -3, "b": 2.5, "c": True, "d": "œuf", "e": [1, 2], "f": ["x", ""], "g": [0.5, -0.5], "h": 2**40}
    writer.add_int16("a", -3)
    writer.add_float64("b", 2.5)
    writer.add_bool("c", True)
    writer.add_string("d", "œuf")
    writer.add_array("e", [1, 2])
    writer.add_array("f", ["x", ""])
    writer.add_array("g", [0.5, -0.5])
    writer.add_uint64("h", 2**40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = dict(GGUFFile(tmp_path / "t.gguf").metadata)
    assert metadata.pop("general.architecture") == "llama" and metadata == values


def test_smollm2(smollm2: llmir.Loaded) -> None:
    config = smollm2.config
    assert isinstance(config, LlamaConfig)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.vocab_size) == (30, 9, 3, 49152)
    assert config.tie_embeddings and config.max_seq_len == 8192


def test_unsupported_types_are_named(tmp_path: Path) -> None:
    for kind, num_bytes in ((GGML.IQ2_XXS, 66), (GGML.Q8_K, 292), (GGML.I32, 4)):
        writer = gguf.GGUFWriter(tmp_path / f"{kind.name}.gguf", "llama")
        raw = np.zeros((2, num_bytes), np.uint8)
        data = raw.view(np.int32) if kind == GGML.I32 else raw
        writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=None if kind == GGML.I32 else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        message = refusal(tmp_path / f"{kind.name}.gguf")
        assert f"'blk.0.attn_q.weight' is of type {kind.name}" in message and "Q4_K" in message


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
        ({"llama.feed_forward_length": [48, 64]}, "llama.feed_forward_length is [48, 64]"),
        ({"llama.block_count": 2**31}, "llama.block_count is 2147483648"),
        ({"llama.block_count": 3}, "no tensor 'blk.2."),
        ({"llama.attention.head_count_kv": 3}, "4 query heads cannot share 3"),
        ({"llama.embedding_length": 64}, "'token_embd.weight' has shape [96, 32]"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "'unheard-of'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "corrupt vocabulary"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "corrupt vocabulary"),
        ({"tokenizer.ggml.merges": ["nothing"]}, "corrupt tokenizer"),
        ({"tokenizer.ggml.merges": ["1 zebra"]}, "corrupt tokenizer"),
        ({"tokenizer.ggml.eos_token_id": 96}, "tokenizer.ggml.eos_token_id = 96"),
        ({"tokenizer.ggml.bos_token_id": "1"}, "tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores"),
    ],
)
def test_metadata_that_is_refused(data_path: Path, tmp_path: Path, metadata: dict[str, Any], expected: str) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(data_path / "checkpoints" / "llama", path, metadata=VOCABULARY | metadata)
    assert expected in refusal(path)


def test_tensors_that_are_refused(data_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(data_path / "checkpoints" / "llama", path, drop="blk.1.ffn_up.weight")
    assert "no tensor 'blk.1.ffn_up.weight'" in refusal(path)
    export_gguf(data_path / "checkpoints" / "llama", path, metadata={"llama.block_count": 1})
    assert "tensors are not of its architecture, such as 'blk.1." in refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"PK\x03\x04" + bytes(100), b"GGUF\0\0\0\3" + bytes(100), b"GGUF\3\0\0\0" + b"\xff" * 64]
)
def test_files_that_are_not_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    assert "GGUF" in refusal(tmp_path / "model.gguf")


@pytest.mark.parametrize("seed", range(8))
def test_truncated_anywhere(data_path: Path, tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "model.gguf"
    export_gguf(data_path / "checkpoints" / "qwen3", path, metadata=VOCABULARY)
    data = path.read_bytes()
    for _ in range(25):
        path.write_bytes(data[: rng.randrange(len(data))])
        assert "GGUF" in refusal(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_header_never_gives_another_error(data_path: Path, tmp_path: Path, seed: int) -> None:
    """Numbers of the header overwritten: the file loads, for what was hit did not matter, or is refused in one line."""
    rng, path = random.Random(seed), tmp_path / "model.gguf"
    export_gguf(data_path / "checkpoints" / ("llama3", "gpt2")[seed % 2], path, metadata=VOCABULARY)
    pristine = path.read_bytes()
    for _ in range(25):
        data, place = bytearray(pristine), rng.randrange(6000)
        number = rng.choice([0, 1, 3, 7, 65536, 2**31, 2**32 - 1, rng.randrange(2**32)])
        data[place : place + 4] = struct.pack("<I", number)
        path.write_bytes(data)
        try:
            llmir.load(path).model  # noqa: B018  reading it is what is tested
        except CheckpointError as error:
            assert "\n" not in str(error)
