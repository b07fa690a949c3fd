"""Parts of a safetensors checkpoint are read without the rest of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmir_jax as llmir
from llmir_jax.checkpoint.files import StableFile


@pytest.mark.parametrize(
    "path", ["layers.0.attn.q.kernel", "layers.1.mlp.down.kernel", "embed.embedding", "norm.scale"]
)
def test_parts_are_those_of_the_whole(data_path: Path, path: str):
    source = llmir.load(data_path / "checkpoints" / "llama").source
    whole = np.asarray(source.read(path))
    read = source.part_reader(path)
    assert read is not None
    size = whole.shape[0]
    boxes = [(slice(None),) * whole.ndim, (slice(size // 2, None), *[slice(None)] * (whole.ndim - 1))]
    if whole.ndim == 2:
        boxes.append((slice(0, size // 4), slice(whole.shape[1] // 2, whole.shape[1])))
    for box in boxes:
        np.testing.assert_array_equal(read(box), whole[box])


def test_only_the_bytes_of_the_part_are_read(data_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = llmir.load(data_path / "checkpoints" / "llama").source
    num_bytes: list[int] = []
    original = StableFile.read_rows

    def counted(self: StableFile, *args: Any) -> np.ndarray:
        rows = original(self, *args)
        num_bytes.append(rows.nbytes)
        return rows

    monkeypatch.setattr(StableFile, "read_rows", counted)
    whole = np.asarray(source.read("layers.0.attn.q.kernel"))  # [inputs, outputs], in the file [outputs, inputs]
    read = source.part_reader("layers.0.attn.q.kernel")
    assert read is not None
    part = read((slice(None), slice(0, whole.shape[1] // 4)))
    assert part.shape == (whole.shape[0], whole.shape[1] // 4)
    assert sum(num_bytes) * 4 == whole.size * 2 or sum(num_bytes) * 4 == whole.size * 4, "bfloat16 or float32 on disk"
