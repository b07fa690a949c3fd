"""Hub names, against a cache laid out as huggingface_hub lays it out: blobs, and a snapshot of links to them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

import llmir_jax as llmir
from llmir_jax.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "some-org/tiny-llama"


def fill_cache(cache: Path, checkpoint: Path) -> Path:
    repo = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in checkpoint.iterdir():
        if file.name != "expected.safetensors":
            shutil.copy(file, repo / "blobs" / file.name)
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("checkpoint", ["llama", "qwen3"])
def test_cached_models_load_without_a_network(offline_cache: Path, data_path: Path, checkpoint: str) -> None:
    folder = data_path / "checkpoints" / checkpoint
    fill_cache(offline_cache, folder)
    cached, direct = llmir.load(NAME), llmir.load(folder)
    assert cached.name == NAME and cached.config == direct.config
    tokens = np.arange(6, dtype=np.int32)[None]
    np.testing.assert_array_equal(*(jax.jit(x.forward)(x.model, tokens) for x in (cached, direct)))


def test_a_missing_model_says_so(offline_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"some-org/other: not a local path.*HF_HUB_OFFLINE is set"):
        llmir.load("some-org/other")


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_an_interrupted_download_is_not_taken_for_a_model(offline_cache: Path, data_path: Path, lost: str) -> None:
    (fill_cache(offline_cache, data_path / "checkpoints" / "llama") / lost).unlink()
    with pytest.raises(CheckpointError, match=r"not complete in the cache"):
        llmir.load(NAME)


def test_what_the_cache_lacks_is_downloaded(
    offline_cache: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text files first; then the shards that the index names, and nothing else."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked: list[object] = []

    def download(name: str, *, allow_patterns: object, local_files_only: bool = False) -> str:
        asked.append(allow_patterns)
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        source = data_path / "checkpoints" / "llama"
        assert isinstance(allow_patterns, list)
        for file in allow_patterns:
            if (source / file).exists():
                shutil.copy(source / file, offline_cache)
        return str(offline_cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    llmir.load(NAME)
    assert len(asked) == 3 and {"model-00001-of-00003.safetensors", "config.json"} <= set(asked[2])  # type: ignore[call-overload]


def test_a_hub_that_does_not_answer_is_one_line(offline_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def download(name: str, *, allow_patterns: object, local_files_only: bool = False) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"not to be had from the hub: no route$"):
        llmir.load(NAME)


def test_environment_variables_are_respected(tmp_path: Path, data_path: Path) -> None:
    fill_cache(tmp_path / "hub", data_path / "checkpoints" / "llama3")
    program = f"import llmir_jax as llmir; print(llmir.load({NAME!r}).config.num_layers)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "2"
