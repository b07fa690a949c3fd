"""The cache of compiled things on disk: what it refuses, what it removes, and several processes at once."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from llmir_jax import disk_cache
from llmir_jax.disk_cache import DiskCache, digest, environment, file_identity, open_cache


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "compiled")


def test_what_is_written_is_read(cache: DiskCache) -> None:
    content = np.random.default_rng().bytes(1000)
    assert cache.read("step", "a") is None
    cache.write("step", "a", content)
    cache.write("native", "a", b"")
    assert cache.read("step", "a") == content and cache.read("native", "a") == b""
    assert not cache.problems


FOREIGN = {"'s": "native/b", " kind's": "step/a"}


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "longer", "another's", "another kind's"])
def test_damaged_and_foreign_entries_are_refused(cache: DiskCache, damage: str) -> None:
    rng = np.random.default_rng()
    content = rng.bytes(200)
    cache.write("native", "a", content)
    cache.write("native", "b", rng.bytes(200))
    cache.write("step", "a", content)
    path = cache.path / "native" / "a"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    changed = {"cut": data[:-1], "empty": b"", "longer": data + b"\0"}
    changed |= {f"another{name}": (cache.path / other).read_bytes() for name, other in FOREIGN.items()}
    path.write_bytes(changed.get(damage, data))
    assert cache.read("native", "a") is None
    (problem,) = cache.problems
    assert str(path) in problem and "made again" in problem and "\n" not in problem
    cache.write("native", "a", content)
    assert cache.read("native", "a") == content


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner here")
def test_another_users_entry_is_not_trusted(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write("native", "a", b"code")
    monkeypatch.setattr(os, "getuid", lambda: (cache.path / "native" / "a").stat().st_uid + 1)
    assert cache.read("native", "a") is None
    assert "another user" in cache.problems[0]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = DiskCache(tmp_path / "file")
    cache.write("step", "a", b"x")
    cache.write("step", "b", b"x")
    assert cache.read("step", "a") is None
    assert any("cannot be written" in problem for problem in cache.problems)


def test_what_was_not_used_for_longest_is_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=1000)
    for age, name in enumerate("abc"):
        cache.write("step", name, bytes(250))
        os.utime(tmp_path / "step" / name, (1000 - age, 1000 - age))
    assert cache.read("step", "c") is not None  # used now
    stale = tmp_path / "step" / ".new-left"
    stale.write_bytes(b"")
    os.utime(stale, (0, 0))
    cache.write("step", "d", bytes(250))
    cache.write("step", "e", bytes(250))
    assert cache.read("step", "b") is None and cache.read("step", "a") is None
    assert all(cache.read("step", name) is not None for name in "cde")
    assert not stale.exists()


def test_many_at_once(cache: DiskCache) -> None:
    """Nobody reads half an entry."""
    contents = [bytes([i]) * 50_000 for i in range(8)]
    wrong: list[bytes] = []

    def work(content: bytes) -> None:
        own = DiskCache(cache.path)
        for _ in range(20):
            own.write("step", "a", content)
            found = own.read("step", "a")
            if found not in contents or own.problems:
                wrong.append(found or b"")

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [path.name for path in (cache.path / "step").iterdir()] == ["a"]


def test_digests() -> None:
    assert digest("ab", "c") != digest("a", "bc") and digest(1, 2) == digest("1", "2")
    assert any(name.startswith("llvmlite ") for name in environment())


def test_files_are_told_from_what_they_were(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    found = file_identity([file])
    assert found == file_identity([file]) == file_identity([tmp_path])
    os.utime(file, ns=(0, 1))
    assert found != file_identity([file])


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path))
    monkeypatch.setenv(disk_cache.NO_CACHE, "1")
    assert open_cache() is None
    monkeypatch.setenv(disk_cache.NO_CACHE, "0")
    found = open_cache()
    assert found is not None and found.path == tmp_path / "compiled"
