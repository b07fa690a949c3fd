"""How many threads to use: one rule for native code, for the command line, and for what `llmir bench` compares with."""

import os

from llmir_jax.errors import LlmirError

THREADS = "LLMIR_NUM_THREADS"
MAX_THREADS = 512


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_threads() -> int:
    """`LLMIR_NUM_THREADS`, or all cores that this process may use if it is unset or empty.

    More threads than cores are allowed: containers have fewer cores at times than they are said to have.
    Raises LlmirError for a setting that is no whole number from 1 to 512.
    """
    given = os.environ.get(THREADS)
    if not given:
        return min(available_cores(), MAX_THREADS)
    # `isdigit` refuses what `int` takes: signs, spaces, "1_0".
    if not given.isascii() or not given.isdigit() or not 1 <= int(given) <= MAX_THREADS:
        raise LlmirError(
            f"{THREADS} must be a whole number from 1 to {MAX_THREADS}, got {given!r}: unset it for all "
            f"{available_cores()} cores"
        )
    return int(given)
