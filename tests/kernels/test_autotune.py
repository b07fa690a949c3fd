"""Measuring tiles: the fastest is found, remembered by what decides it, and not without a chip."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pallas_kernels import autotune as module
from pallas_kernels.autotune import AutotuneError, autotune

DEVICE: Any = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


@dataclass(frozen=True)
class Tiles:
    width: int


class Kernel:
    """Calls that take a thousandth of a second for each unit of width; of 3, it does not compile."""

    def __init__(self) -> None:
        self.measured: list[int] = []

    def __call__(self, tiles: Tiles) -> Callable[[], Any]:
        if tiles.width == 3:
            raise RuntimeError("out of VMEM")
        self.measured.append(tiles.width)
        return lambda: time.sleep(tiles.width / 1000)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(module.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


def tune(kernel: Kernel, shape: dict[str, Any], *widths: int) -> Any:
    return autotune("op", shape, [Tiles(width) for width in widths], kernel, device=DEVICE, rounds=3, calls=2)


def test_the_fastest_is_found_and_remembered(folder: Path) -> None:
    kernel = Kernel()
    tuned = tune(kernel, {"m": 8}, 20, 3, 1)
    assert tuned.tiles == Tiles(1) and not tuned.from_cache
    assert 0.001 <= tuned.seconds < 0.02
    assert list(tuned.refused.values()) == ["RuntimeError: out of VMEM"]
    again = tune(kernel, {"m": 8}, 20, 3, 1)
    assert again.from_cache and (again.tiles, again.seconds) == (tuned.tiles, tuned.seconds)
    assert kernel.measured == [20, 1]
    (path,) = folder.iterdir()
    key = json.loads(path.read_text())["key"]
    assert key["device"] == "TPU v5 lite" and {"jax", "jaxlib", "pallas_kernels"} <= set(key["versions"])


def test_other_shapes_versions_and_candidates_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    tune(kernel, {"m": 8}, 1)
    assert not tune(kernel, {"m": 16}, 1).from_cache
    assert tune(kernel, {"m": 8}, 2).tiles == Tiles(2)  # what was found before is no candidate
    monkeypatch.setattr(module, "versions", lambda: {"jax": "0"})
    assert not tune(kernel, {"m": 8}, 2).from_cache


def test_a_broken_file_is_measured_anew(folder: Path) -> None:
    kernel = Kernel()
    tune(kernel, {"m": 8}, 1)
    (path,) = folder.iterdir()
    for text in ("", "[]", '{"key": 1}'):
        path.write_text(text)
        assert not tune(kernel, {"m": 8}, 1).from_cache
    assert [file.name for file in folder.iterdir()] == [path.name]


def test_nothing_is_measured_without_a_chip_or_a_kernel() -> None:
    with pytest.raises(AutotuneError, match=r"^autotune op: nothing can be measured without a TPU or GPU.*'cpu'"):
        autotune("op", {}, [Tiles(1)], Kernel())
    with pytest.raises(
        AutotuneError, match=r"no candidate runs on TPU v5 lite: Tiles\(width=3\): RuntimeError: out of VMEM"
    ):
        tune(Kernel(), {}, 3)
