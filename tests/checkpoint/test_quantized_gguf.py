"""GGUF's own blocks as quantized arrays: bit for bit, with rows in our order, kept by presets and by nothing else."""

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf_export import export_gguf

import llmir_jax as llmir
from llmir_jax.checkpoint.gguf_blocks import quantized_from_blocks
from llmir_jax.errors import CheckpointError, LlmirError
from llmir_jax.quantization import QuantizedArray, parse_scheme, quantize

GGML = gguf.GGMLQuantizationType
FORMATS = {GGML.Q4_0: "int4-g32", GGML.Q4_1: "int4-g32-min", GGML.Q8_0: "int8-g32"}


@pytest.mark.parametrize("kind", FORMATS)
def test_random_blocks(kind: Any) -> None:
    """Any bits in the file: the floats are what the `gguf` package makes of them, exactly."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (7, 5, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    num_side = 2 if kind == GGML.Q4_1 else 1
    raw[..., : 2 * num_side] = rng.normal(size=(7, 5, num_side)).astype(np.float16).view(np.uint8)
    raw = raw.reshape(7, -1)
    made = quantized_from_blocks(raw, kind, np.float32)
    made.check()
    assert made.shape == (7, 160) and made.scheme == parse_scheme(FORMATS[kind])
    np.testing.assert_array_equal(made.dequantize(), gguf.dequantize(raw, kind))
    assert made.nbytes == raw.nbytes  # as many bits as in the file


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_model_of_blocks(data_path: Path, tmp_path: Path, name: str, kind: Any) -> None:
    export_gguf(data_path / "checkpoints" / name, tmp_path / "model.gguf", quantization=kind)
    source = llmir.load(tmp_path / "model.gguf").source
    assert len(source.stored) >= 8 and {s.name for s in source.stored.values()} == {parse_scheme(FORMATS[kind]).name}
    preset = f"int{parse_scheme(FORMATS[kind]).bits}"
    for plan in (source.plan(preset), source.plan("stored"), source.plan(f"w{preset[3:]}a8")):
        loaded = source.load(plan)
        assert list(loaded) == list(source.parameters)
        for path, parameter in loaded.items():
            exact = np.asarray(source.read(path))
            if path not in source.stored:  # rows that are no whole blocks are rounded, norms and biases are not
                assert isinstance(parameter, QuantizedArray) == (path in plan.schemes)
                continue
            assert isinstance(parameter, QuantizedArray) and parameter.shape == source.matrices[path]
            floats = np.asarray(parameter.dequantize())
            np.testing.assert_array_equal(floats, exact if path == "embed.embedding" else exact.T)


def test_what_presets_make_of_other_blocks(data_path: Path, tmp_path: Path) -> None:
    export_gguf(data_path / "checkpoints" / "llama", tmp_path / "model.gguf", quantization=GGML.Q4_1)
    source = llmir.load(tmp_path / "model.gguf").source
    path = next(iter(source.stored))
    for option in ("int8", "int4-g16", "int8-channel"):
        scheme = source.plan(option).schemes[path]
        assert scheme.weight_format.name.startswith(option)
        made = source.read_quantized(path, scheme)
        floats = np.asarray(source.read(path)) if path == "embed.embedding" else np.asarray(source.read(path)).T
        for ours, expected in zip(jax.tree.leaves(made), jax.tree.leaves(quantize(floats, scheme)), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_smollm2(smollm2: llmir.Loaded) -> None:
    """Its linear layers are Q4_1, its tied embedding Q8_0: "int4" is the file's own bits, the same floats exactly."""
    source = smollm2.source
    plan = source.plan("w4a16")
    assert {scheme.name for path, scheme in plan.schemes.items() if path != "embed.embedding"} == {"int4-g32-min-f16"}
    assert plan.schemes["embed.embedding"].name == "int8-g32-f16" and len(plan.schemes) == 211
    for path in ("embed.embedding", "layers.0.attn.q.kernel", "layers.17.attn.k.kernel", "layers.29.mlp.down.kernel"):
        floats = np.asarray(source.read_quantized(path, plan.schemes[path]).dequantize())
        np.testing.assert_array_equal(floats, source.read(path) if path == "embed.embedding" else source.read(path).T)
    assert "model" not in llmir.load(source._reader.path).__dict__  # nothing above needed the whole model


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00])
@pytest.mark.parametrize("option", ["int4", "int4-g16", "int8"])
def test_blocks_that_are_not_finite(data_path: Path, tmp_path: Path, bits: int, option: str) -> None:
    """NaN and infinity: an error that names the parameter, whether blocks are kept or quantized again."""
    export_gguf(data_path / "checkpoints" / "llama", tmp_path / "model.gguf", quantization=GGML.Q4_1)
    pristine = llmir.load(tmp_path / "model.gguf").source
    tensor = pristine._reader.tensors["blk.1.ffn_up.weight"]  # type: ignore[attr-defined]
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[tensor.offset : tensor.offset + 2] = bits.to_bytes(2, "little")
    (tmp_path / "model.gguf").write_bytes(data)
    source = llmir.load(tmp_path / "model.gguf").source
    with pytest.raises(LlmirError, match=r"layers\.1\.mlp\.up\.kernel") as caught:
        source.load(source.plan(option))
    assert "\n" not in str(caught.value) and (option != "int4" or "a scale of tensor" in str(caught.value))


def test_a_file_that_changes_while_it_is_open(data_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(data_path / "checkpoints" / "llama", path)
    loaded = llmir.load(path)
    export_gguf(data_path / "checkpoints" / "gpt2", path)
    with pytest.raises(CheckpointError, match=r"model\.gguf: changed since it was opened; load the model again"):
        loaded.model  # noqa: B018  reading it is what is tested
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.gguf: cannot be read any more"):
        loaded.source.load(loaded.source.plan("int8"))
