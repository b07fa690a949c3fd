"""Decoders that are made of what an earlier start left on disk."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llmir_jax as llmir
from llmir_jax import stored_step
from llmir_jax.decoder import Decoder
from llmir_jax.disk_cache import NO_CACHE
from llmir_jax.program_identity import program_identity

SIZES: dict[str, Any] = {"num_pages": 16, "page_size": 4, "max_seqs": 2, "max_seq_len": 32, "buckets": (1, 8)}


@pytest.fixture
def model(data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint, and a cache of its own."""
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(NO_CACHE, raising=False)
    shutil.copytree(data_path / "checkpoints" / "qwen3", tmp_path / "model")
    return tmp_path / "model"


def start(model: Path, **options: Any) -> Decoder:
    decoder: Decoder = llmir.load(model).decoder(**{**SIZES, "quantize": "int8", **options})
    return decoder


def logits(decoder: Decoder, seed: int) -> np.ndarray[Any, Any]:
    tokens = np.random.default_rng(seed).integers(0, 96, 13)
    return decoder.logits([tokens])[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_cache": "int8"}, {"target": "reference"}, {"quantize": None}, {"quantize": {".*mlp.*": "w4a8"}}],
    ids=str,
)
def test_a_later_start_computes_the_same(model: Path, options: dict[str, Any]) -> None:
    seed = int(np.random.default_rng().integers(1 << 20))
    first = start(model, **options)
    expected, report = logits(first, seed), first.report()
    assert "the derivation" in report.to_disk and not report.from_disk
    later = start(model, **options)
    assert (logits(later, seed) == expected).all()
    again = later.report()
    assert "the derivation" in again.from_disk and not again.to_disk
    same = ("attention", "operations", "served_by", "parameters", "not_quantized", "unused_parameters", "max_seq_len")
    assert all(getattr(report, name) == getattr(again, name) for name in same)
    assert "trace" not in again.seconds
    remembered = options.get("quantize", "") is not None  # what is in memory is checked each time
    assert ("in an earlier start" in again.self_check) == remembered
    assert "found on disk: the derivation" in str(again)
    for stage in ("stablehlo", "llm", "target"):
        assert later.ir(stage) == first.ir(stage)
    assert later.cost() == first.cost()


def test_for_other_numbers_of_tokens(model: Path) -> None:
    seed = int(np.random.default_rng().integers(1 << 20))
    expected = logits(start(model, buckets=(1, 4, 8)), seed)
    later = start(model, buckets=(2, 16), verify=False)
    np.testing.assert_allclose(logits(later, seed), expected, rtol=0, atol=1e-4)
    report = later.report()
    assert report.from_disk == ("the derivation",) and report.to_disk and "trace" not in report.seconds


@pytest.mark.parametrize("kind", ["step", "module", "lowered", "checked"])
def test_damage_is_said_and_repaired(model: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    seed = int(np.random.default_rng().integers(1 << 20))
    expected = logits(start(model), seed)
    for path in (tmp_path / "cache" / "compiled" / kind).iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    later = start(model)
    assert (logits(later, seed) == expected).all()
    later.ir("target")
    report = later.report()
    assert any("made again" in note for note in report.notes)
    assert "made again" in caplog.text
    after = start(model)
    assert (logits(after, seed) == expected).all() and not after.report().notes


@pytest.mark.parametrize("change", ["version", "setting", "size", "model"])
def test_what_it_depends_on(model: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start(model, verify=False)
    options: dict[str, Any] = {}
    if change == "version":
        monkeypatch.setattr(stored_step, "environment", lambda: ("jax 99",))
    if change == "size":
        options["max_seq_len"] = 28
    if change == "model":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2e-3}))
    with jax.default_matmul_precision("highest") if change == "setting" else nullcontext():
        later = start(model, verify=False, **options)
    assert not later.report().from_disk


def test_other_weights_are_checked_again(model: Path) -> None:
    start(model)
    file = next(model.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    later = start(model).report()
    assert "the derivation" in later.from_disk and "earlier" not in later.self_check


def test_a_model_of_the_users_has_no_identity(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = llmir.load(model)
    known = program_identity(loaded.abstract_model)
    assert known is not None and known == program_identity(llmir.load(model).abstract_model)
    layer = loaded.abstract_model.layers[0]
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "__call__", lambda self, x, cos, sin: x)
        assert program_identity(loaded.abstract_model) is None
    layer.mlp.gate.kernel_init = lambda *_: None
    assert program_identity(loaded.abstract_model) is None
    decoder = loaded.decoder(**SIZES, quantize="int8", verify=False)
    assert not decoder.report().to_disk


PROGRAM = """
import json, sys, llmir_jax as llmir
sizes = json.loads(sys.argv[2])
decoder = llmir.load(sys.argv[1]).decoder(**sizes, quantize="int8")
tokens = decoder.generate([[5, 6, 7]], llmir.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
report = decoder.report()
print(json.dumps([tokens, report.from_disk, report.to_disk, report.notes]))
"""


def processes(model: Path, count: int) -> list[Any]:
    command = [sys.executable, "-c", PROGRAM, str(model), json.dumps(SIZES)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(count)]
    outputs = [process.communicate() for process in started]
    assert not any(process.returncode for process in started), outputs
    return [json.loads(output) for output, _ in outputs]


def test_native_code_in_other_processes(model: Path, tmp_path: Path) -> None:
    """Two that compile at once, one that finds it all, and one that finds damaged native code."""
    first, second = processes(model, 2)
    assert first[0] == second[0]
    ((tokens, from_disk, to_disk, notes),) = processes(model, 1)
    assert tokens == first[0] and not to_disk and not notes
    assert from_disk[:2] == ["the derivation", "native code of 8 tokens"]
    paths = list((tmp_path / "cache" / "compiled" / "native").iterdir())
    assert paths
    for path in paths:
        path.write_bytes(b"\x7fELF" + path.read_bytes())
    ((tokens, _, to_disk, notes),) = processes(model, 1)
    assert tokens == first[0] and "native code of 8 tokens" in to_disk
    assert any("native" in note and "made again" in note for note in notes)
