"""Results of compiling that are kept on disk, so that a later start does not compute them again.

An entry is a file of bytes under `compiled` in the folder where models are kept (`LLMIR_CACHE`, see
`checkpoint.smollm2`). Its name is a digest of all that it depends on, which includes the source of this package and
the versions of what it is built on, so that nothing that is found is out of date. It begins with a digest of its name
and content: a file that is damaged, cut short, or another entry's is told from a good one, made again, and reported.

Entries are written beside their place and moved there, so that any number of processes may read and write at once.
Those that were not used for longest are removed where all take more than `MAX_BYTES`; removing the folder is safe at
any time. `LLMIR_NO_CACHE=1` neither reads nor writes.
"""

import hashlib
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmir_jax.checkpoint.smollm2 import cache_dir

NO_CACHE = "LLMIR_NO_CACHE"
MAX_BYTES = 512 << 20
_MAGIC = b"llmir entry 1\n"
_DIGEST_BYTES = 32
_STALE_SECONDS = 3600  # an unfinished file of a process that did not live to move it
_PACKAGES = ("jax", "jaxlib", "flax", "xdsl", "xdsl-jax", "llvmlite", "numpy", "ml_dtypes")

_log = logging.getLogger("llmir_jax")


def digest(*parts: Any) -> str:
    """32 hexadecimal digits for the texts of some values, each apart from the next."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        sha.update(f"{len(data)}:".encode() + data)
    return sha.hexdigest()[:32]


@cache
def source_digest() -> str:
    """Of every Python file of this package."""
    root = Path(__file__).parent
    files = sorted(root.rglob("*.py"))
    return digest(*(part for file in files for part in (file.relative_to(root).as_posix(), file.read_bytes())))


@cache
def environment() -> tuple[str, ...]:
    """What every entry depends on: this package's source, the interpreter, and the versions of other packages."""
    found = [f"source {source_digest()}", f"python {platform.python_version()} {platform.machine()}"]
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return tuple(found)


class DiskCache:
    """Entries in a folder. Every failure of the disk is a miss, and is in `problems`."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self.problems: list[str] = []
        """One line for each entry that could not be used, and for a folder that cannot be written to."""

    def read(self, kind: str, key: str) -> bytes | None:
        """The content of an entry; None if there is none, or none that is whole."""
        path = self._place(kind, key)
        try:
            if _is_foreign(path):
                return self._refuse(path, "belongs to another user")
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._refuse(path, f"cannot be read ({error.strerror})")
        start = len(_MAGIC) + _DIGEST_BYTES
        if data[:start] != _MAGIC + _seal(kind, key, data[start:]):
            return self._refuse(path, "is damaged, or is no entry of this name")
        with suppress(OSError):
            os.utime(path)  # used now
        return data[start:]

    def write(self, kind: str, key: str, content: bytes) -> None:
        """Make or replace an entry."""
        path = self._place(kind, key)
        scratch: Path | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
                scratch = Path(file.name)
                file.write(_MAGIC + _seal(kind, key, content) + content)
            os.replace(scratch, path)
            self._prune()
        except OSError as error:
            if scratch is not None:
                scratch.unlink(missing_ok=True)
            self._say(f"{path.parent} cannot be written to ({error.strerror}): nothing is kept for the next start")

    def _place(self, kind: str, key: str) -> Path:
        return self.path / kind / key

    def _refuse(self, path: Path, why: str) -> bytes | None:
        self._say(f"{path} {why}: what it held is made again")
        return None

    def _say(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            _log.warning("%s", problem)

    def _prune(self) -> None:
        entries: list[tuple[float, int, Path]] = []
        for path in self.path.glob("*/*"):
            with suppress(OSError):  # another process may have removed it
                status = path.stat()
                if path.name.startswith(".new-"):
                    if status.st_mtime < time.time() - _STALE_SECONDS:
                        path.unlink()
                    continue
                entries.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._max_bytes:
                return
            total -= size
            with suppress(OSError):
                path.unlink()


def open_cache() -> DiskCache | None:
    """The cache of this process's user; None if `LLMIR_NO_CACHE` is set."""
    return None if os.environ.get(NO_CACHE, "0") not in ("", "0") else DiskCache(cache_dir() / "compiled")


def file_identity(paths: Iterable[Path]) -> str:
    """Tells files, or folders of files, from what they were before a change: by name, size and time."""
    found = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
            status = file.stat()
            found.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    return digest(*found)


def _seal(kind: str, key: str, content: bytes) -> bytes:
    return hashlib.sha256(f"{kind}/{key}/{len(content)}\n".encode() + content).digest()


def _is_foreign(path: Path) -> bool:
    """Whether someone else wrote it, who could have it run anything as this user."""
    return hasattr(os, "getuid") and path.stat().st_uid != os.getuid()


__all__ = ["MAX_BYTES", "NO_CACHE", "DiskCache", "digest", "environment", "file_identity", "open_cache"]
