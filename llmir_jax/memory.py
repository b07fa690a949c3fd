"""Gives memory that is not used any more back to the system, where the C library keeps it for itself.

glibc keeps what is freed in blocks of up to 32 MiB, once some of that size were freed. Weights that are packed and
programs that are compiled leave more of it behind than serving needs afterwards.

The code of large libraries counts as a process's memory as well, from when it first runs: of a compiler, long after it
ran last. It is the file's, so that the system can take it back at any time; a process that does so itself needs less.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # M_… of malloc.h
LARGE = 1 << 20
"""Bytes from which on a block is the system's own, and goes back to it when it is freed."""


_DONT_NEED = 4  # MADV_DONTNEED of mman.h, the same on all of Linux's architectures but Alpha
LARGE_CODE = 8 << 20
"""Bytes of code from which on a library is a large one: LLVM and XLA have more than 50 MB, most others less than 2."""


@cache
def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


def keep_little() -> None:
    """For the rest of the process, give blocks of `LARGE` bytes back as they are freed. For programs, not libraries.

    One heap for all threads, too: of those that compilers use, each else keeps one of its own.
    """
    if (library := _library()) is not None:
        library.mallopt(_ARENA_MAX, 1)
        library.mallopt(_MMAP_THRESHOLD, LARGE)
        library.mallopt(_TRIM_THRESHOLD, LARGE)


def give_back(*, collect: bool = True) -> None:
    """Give free memory back. First collecting garbage takes some tenths of a second where there is a lot of IR."""
    if collect:
        gc.collect()
    if (library := _library()) is not None:
        library.malloc_trim(0)
        for start, stop in _large_code():
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONT_NEED)


def _large_code() -> Iterator[tuple[int, int]]:
    """Addresses of the code of large libraries.

    Only what cannot be written to and is run, "r-xp": it is as it is in the file, from which it comes back when it runs
    again. Data, which the dynamic linker has changed, must stay.
    """
    with suppress(OSError), open("/proc/self/maps") as maps:
        for line in maps:
            addresses, access, _, _, inode, *path = line.split(maxsplit=5)
            start, stop = (int(address, 16) for address in addresses.split("-"))
            if access == "r-xp" and inode != "0" and path and stop - start >= LARGE_CODE:
                yield start, stop


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
