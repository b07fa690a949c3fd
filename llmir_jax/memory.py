"""Gives memory that is not used any more back to the system, where the C library keeps it for itself.

glibc keeps what is freed in blocks of up to 32 MiB, once some of that size were freed. Weights that are packed and
programs that are compiled leave more of it behind than serving needs afterwards.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
LARGE = 1 << 20
"""Bytes from which on a block is the system's own, and goes back to it when it is freed."""


@cache
def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def keep_little() -> None:
    """For the rest of the process, give blocks of `LARGE` bytes back as they are freed. For programs, not libraries."""
    if (library := _library()) is not None:
        library.mallopt(_MMAP_THRESHOLD, LARGE)
        library.mallopt(_TRIM_THRESHOLD, LARGE)


def give_back(*, collect: bool = True) -> None:
    """Give free memory back. First collecting garbage takes some tenths of a second where there is a lot of IR."""
    if collect:
        gc.collect()
    if (library := _library()) is not None:
        library.malloc_trim(0)


@contextmanager
def collecting_later() -> Iterator[None]:
    """Without garbage collection, which goes through all IR again and again while it is made, and finds it in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


__all__ = ["LARGE", "collecting_later", "give_back", "keep_little"]
