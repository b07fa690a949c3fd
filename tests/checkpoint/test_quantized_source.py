"""Quantizing as a checkpoint is read: the same arrays as of the whole model, whatever the orientation on disk."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import llmir_jax as llmir
from llmir_jax.checkpoint.source import ParameterSource
from llmir_jax.errors import CheckpointError, LlmirError
from llmir_jax.quantization import QuantizedArray, Scheme, quantize


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("option", ["int8", "int4", "w8a8", "int4-g16-zp", "int8-channel", "int8-tensor"])
def test_the_same_as_of_the_floats(data_path: Path, name: str, option: str) -> None:
    source = llmir.load(data_path / "checkpoints" / name).source
    plan = source.plan(option)
    assert set(plan.schemes) == set(source.matrices) and not source.stored
    for path, parameter in source.load(plan).items():
        floats = source.read(path)
        if path not in plan.schemes:
            same(parameter, floats)
            continue
        matrix = floats if path == "embed.embedding" else floats.T
        same(parameter, quantize(matrix, plan.schemes[path]))
    assert not plan.schemes.keys() & {"positions.embedding", "norm.scale"}


def test_paths_are_those_of_the_traced_model(data_path: Path) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "qwen2")
    from llmir_jax.trace import flatten_model

    assert set(flatten_model(loaded.abstract_model)[1].paths) == set(loaded.source.parameters)


def test_dtypes(data_path: Path) -> None:
    """A quantized array stands for what the model would have, but is made of what the file has."""
    full, half = (llmir.load(data_path / "checkpoints" / "llama", dtype=d).source for d in ("float32", "bfloat16"))
    path = "layers.0.mlp.up.kernel"
    scheme = full.plan("int8").schemes[path]
    ours, theirs = half.read_quantized(path, scheme), full.read_quantized(path, scheme)
    assert ours.dtype == jnp.bfloat16 and theirs.dtype == jnp.float32 and half.read(path).dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("int7", "unknown scheme 'int7'"),
        ("int8-g48", r"embed\.embedding: group_size 48 does not divide its 32"),
        ({"lm_head": "int8"}, "rule 'lm_head' matches no parameter"),
        ({"norm": "int8"}, r"matches only parameters that cannot be quantized, such as 'norm\.scale'"),
    ],
)
def test_what_cannot_be_meant(data_path: Path, option: Any, message: str) -> None:
    with pytest.raises(LlmirError, match=message):
        llmir.load(data_path / "checkpoints" / "llama").quantize(option)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_weights_that_are_not_finite(data_path: Path, tmp_path: Path, bad: float) -> None:
    folder = data_path / "checkpoints" / "qwen2"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 2] = bad
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    source = llmir.load(tmp_path).source
    with pytest.raises(LlmirError, match=rf"^layers\.1\.attn\.o\.kernel: {bad} in row 3, column 2 \(outputs first\)"):
        source.load(source.plan("int4"))


def test_arrays_in_place_of_weights(data_path: Path) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "llama")
    path, norm = "layers.1.mlp.down.kernel", "norm.scale"
    matrix = np.asarray(loaded.source.read(path)).T
    array = quantize(-matrix, Scheme(bits=4, group_size=16))
    changed = loaded.with_quantized({path: array})
    assert changed.quantized and changed.source.stored == {path: array.scheme} and not loaded.source.stored
    assert changed.source.read_quantized(path, array.scheme) is array
    np.testing.assert_array_equal(changed.source.read(path), np.asarray(array.dequantize()).T)
    model: Any = changed.model
    np.testing.assert_array_equal(model.layers[1].mlp.down.kernel[...], np.asarray(array.dequantize()).T)
    np.testing.assert_array_equal(changed.source.read(norm), loaded.source.read(norm))
    same(
        changed.source.read_quantized(path, Scheme(bits=8, group_size=16)),
        quantize(array.dequantize(), Scheme(bits=8, group_size=16)),
    )
    # Replacing adds to what was replaced before.
    again = changed.with_quantized({"embed.embedding": quantize(loaded.source.read("embed.embedding"), array.scheme)})
    assert set(again.source.stored) == {path, "embed.embedding"}
    for arrays, schemes, message in (
        ({norm: array}, None, "'norm.scale' is no parameter of this model that can be quantized"),
        ({"layers.9.mlp.down.kernel": array}, None, "is no parameter of this model"),
        ({"layers.0.attn.k.kernel": array}, None, r"layers\.0\.attn\.k\.kernel: quantized .* expected"),
        ({path: array}, {path: Scheme(bits=8, group_size=16)}, "scheme 'int8-g16-f16', but it is 'int4-g16-f16'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            loaded.with_quantized(arrays, schemes)


def test_floats_are_not_read_for_a_plan(data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be quantized is found before anything is read."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("read")

    loaded = llmir.load(data_path / "checkpoints" / "qwen2")
    monkeypatch.setattr(ParameterSource, "read", refuse)
    monkeypatch.setattr(ParameterSource, "read_quantized", refuse)
    assert loaded.source.plan("int4") and "qwen2: Llama of" in repr(loaded).replace("'", "")
    assert isinstance(loaded.source.plan("w8a8").get("embed.embedding"), Scheme)
    with pytest.raises(AssertionError, match="read"):
        loaded.model  # noqa: B018  reading it is what is tested


def test_every_matrix_of_a_quantized_model(data_path: Path) -> None:
    loaded = llmir.load(data_path / "checkpoints" / "gpt2").quantize("w4a8")
    assert set(loaded.source.stored) == set(loaded.source.matrices)
    assert all(scheme.activations == "int8" for scheme in loaded.source.stored.values())
    parameters = loaded.source.load(loaded.source.plan("stored"))
    assert {path for path, p in parameters.items() if isinstance(p, QuantizedArray)} == set(loaded.source.matrices)
    logits = jax.jit(loaded.forward)(loaded.model, np.arange(6, dtype=np.int32)[None])
    assert np.isfinite(logits).all()
