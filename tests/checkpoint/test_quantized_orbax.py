"""Quantized models saved and loaded again: bit for bit, with their schemes; and what does not fit is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf_export import export_gguf
from gguf_export import gguf as gguf_package

import llmir_jax as llmir
from llmir_jax.checkpoint.orbax_tensors import to_tree
from llmir_jax.errors import CheckpointError
from llmir_jax.quantization import QuantizedArray

RULES = {
    "embed": "int8-tensor",
    "layers/0": "w4a8",
    "layers/1/mlp": "int4-g16-zp-bf16",
    "layers/1/attn": "int8-channel",
}


@pytest.mark.parametrize("option", ["int8", "int4", "w4a8", "int8-tensor", RULES])
@pytest.mark.parametrize("name", ["llama_bias", "gpt2"])
def test_bit_for_bit(data_path: Path, tmp_path: Path, name: str, option: Any) -> None:
    saved = llmir.load(data_path / "checkpoints" / name).quantize(option)
    saved.save(tmp_path / "ours")
    loaded = llmir.load(tmp_path / "ours")
    assert loaded.quantized and loaded.config == saved.config
    plan = loaded.source.plan("stored")
    assert plan.schemes == saved.source.plan("stored").schemes
    ours, theirs = loaded.source.load(plan), saved.source.load(plan)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for path in reversed(list(loaded.source.parameters)):  # not in the order that is read ahead
        np.testing.assert_array_equal(loaded.source.read(path), saved.source.read(path))


@pytest.mark.parametrize("option", ["int4", "int8-tensor"])
def test_columns_are_saved_in_rows(data_path: Path, tmp_path: Path, option: str) -> None:
    """Arrays that were laid out for a target are saved as all others are."""
    original = llmir.load(data_path / "checkpoints" / "llama").quantize(option)
    arrays = {p: original.source.read_quantized(p, s) for p, s in original.source.stored.items()}
    moved = {path: array.laid_out("columns") for path, array in arrays.items()}
    original.with_quantized(moved).save(tmp_path / "ours")
    loaded = llmir.load(tmp_path / "ours").source
    for path, array in arrays.items():
        assert to_tree(moved[path]).keys() == to_tree(array).keys()
        back = loaded.read_quantized(path, loaded.stored[path])
        jax.tree.map(np.testing.assert_array_equal, to_tree(moved[path]), to_tree(back))


def test_saved_twice(data_path: Path, tmp_path: Path) -> None:
    """A quantized checkpoint stays quantized, and presets keep what is in it."""
    export_gguf(
        data_path / "checkpoints" / "llama",
        tmp_path / "model.gguf",
        quantization=gguf_package.GGMLQuantizationType.Q4_0,
    )
    original = llmir.load(tmp_path / "model.gguf")
    original.save(tmp_path / "floats")
    floats = llmir.load(tmp_path / "floats")
    assert not floats.quantized and not floats.source.stored
    original.quantize("stored").save(tmp_path / "first")
    llmir.load(tmp_path / "first").save(tmp_path / "second")
    second = llmir.load(tmp_path / "second")
    assert second.source.stored == original.source.stored
    assert second.source.plan("int4").schemes == original.source.plan("int4").schemes
    for path in original.source.parameters:
        np.testing.assert_array_equal(second.source.read(path), floats.source.read(path))


def test_quantizing_a_checkpoint_of_floats(data_path: Path, tmp_path: Path) -> None:
    source = llmir.load(data_path / "checkpoints" / "gpt2")
    source.save(tmp_path / "ours")
    loaded = llmir.load(tmp_path / "ours")
    for path, scheme in loaded.source.plan("int4").schemes.items():
        ours, theirs = (x.source.read_quantized(path, scheme) for x in (loaded, source))
        assert isinstance(ours, QuantizedArray)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_manifests_that_do_not_fit(data_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    llmir.load(data_path / "checkpoints" / "llama").quantize("int4").save(folder)
    manifest = json.loads((folder / "llmir.json").read_text())
    quantized = manifest["quantized"]
    path = "layers.1.mlp.up.kernel"
    assert quantized[path] == "int4-g32-min-f16-auto"

    def refusal(changes: dict[str, Any]) -> str:
        (folder / "llmir.json").write_text(json.dumps(manifest | changes))
        with pytest.raises(CheckpointError) as caught:
            llmir.load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    assert f"{path!r} is quantized in one of" in refusal(
        {"quantized": {k: v for k, v in quantized.items() if k != path}}
    )
    assert "'norm.scale' is quantized in one of" in refusal({"quantized": quantized | {"norm.scale": "int8"}})
    assert f"{path!r} is not of the manifest's format" in refusal({"quantized": quantized | {path: "int8-g32-min"}})
    assert f"{path!r} is not of the manifest's format" in refusal({"quantized": quantized | {path: "int4-g16-min"}})
    assert "but the manifest says 'int4-g32-f16'" in refusal({"quantized": quantized | {path: "int4-g32"}})
    assert "but the manifest says 'int4-g32-min-bf16'" in refusal(
        {"quantized": quantized | {path: "int4-g32-min-bf16"}}
    )
    assert "'quantized' is not what this version wrote" in refusal({"quantized": quantized | {path: "int5"}})
    assert "'quantized' is not what this version wrote" in refusal({"quantized": ["int8"]})
    assert "tensor 'embed.embedding' has shape (96, 32)" in refusal({"config": manifest["config"] | {"vocab_size": 95}})
    (folder / "llmir.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "weights")
    assert "missing or damaged" in refusal({})


def test_smollm2(smollm2: llmir.Loaded, tmp_path: Path) -> None:
    """The blocks of the GGUF file, saved by orbax: about the file's size, and the file's bits."""
    smollm2.quantize("int4").save(tmp_path / "ours")
    loaded = llmir.load(tmp_path / "ours")
    assert loaded.tokenizer is not None and loaded.chat_template is not None
    plan = loaded.source.plan("stored")
    assert plan.schemes == smollm2.source.plan("int4").schemes
    ours, theirs = loaded.source.load(plan), smollm2.source.load(plan)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    num_bytes = sum(p.stat().st_size for p in (tmp_path / "ours").rglob("*") if p.is_file())
    assert num_bytes < 105e6
