"""A file that is read in pieces, some of them much later than it was opened."""

import os
from pathlib import Path

import numpy as np

from llmir_jax.errors import CheckpointError


class StableFile:
    """Pieces of a file, copied: what is mapped would count as memory in use, as long as the mapping lasts.

    Raises CheckpointError for a file that is gone or has been changed since this was made.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError for a file that cannot be opened."""
        self.path = path
        self._state = _state(path)

    def read(self, offset: int, num_bytes: int) -> np.ndarray:
        """uint8[num_bytes] from byte `offset` on."""
        try:
            self._check_unchanged()
            data: np.ndarray = np.fromfile(self.path, np.uint8, num_bytes, offset=offset)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read any more: {error}") from None
        if len(data) != num_bytes:
            raise CheckpointError(f"{self.path}: truncated at byte {offset + len(data):,}; fetch it again")
        return data

    def read_rows(self, offset: int, num_rows: int, stride: int, num_bytes: int) -> np.ndarray:
        """uint8[num_rows, num_bytes]: the first bytes of rows that begin every `stride` bytes from `offset` on."""
        if num_bytes == stride:
            return self.read(offset, num_rows * stride).reshape(num_rows, stride)
        try:
            self._check_unchanged()
            with self.path.open("rb", buffering=0) as file:
                rows = [os.pread(file.fileno(), num_bytes, offset + row * stride) for row in range(num_rows)]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read any more: {error}") from None
        if any(len(row) != num_bytes for row in rows):
            raise CheckpointError(f"{self.path}: truncated; fetch it again")
        return np.frombuffer(b"".join(rows), np.uint8).reshape(num_rows, num_bytes)

    def _check_unchanged(self) -> None:
        if _state(self.path) != self._state:
            raise CheckpointError(f"{self.path}: changed since it was opened; load the model again")


def _state(path: Path) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns
