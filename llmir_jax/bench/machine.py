"""What the machine can do: threads, the speed of reading memory, and of arithmetic; measured where it is asked."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from llmir_jax.threads import available_cores

READ_BYTES = 256 << 20  # far more than the caches of a core
MATMUL_SIZE = 1536  # three matrices of 9 MB
SECONDS = 0.3  # spent on each of the two, each time that it is measured; the best try counts


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """This process and those that it starts run on so many cores, whatever their libraries would like."""
    if not hasattr(os, "sched_setaffinity") or threads >= available_cores():
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Peaks:
    """What the machine could do at its best so far: it is measured again and again, since others may use it too."""

    threads: int
    read_bandwidth_gb_s: float = 0.0
    float32_gflop_s: float = 0.0

    def measure(self) -> None:
        """Once more."""
        self.read_bandwidth_gb_s = max(self.read_bandwidth_gb_s, read_bandwidth_gb_s(self.threads))
        self.float32_gflop_s = max(self.float32_gflop_s, float32_gflop_s())


def read_bandwidth_gb_s(threads: int) -> float:
    """10^9 bytes a second that `threads` read together from an array larger than the caches: its maximum is taken."""
    parts = np.array_split(np.ones(READ_BYTES // 4, np.int32), threads)
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter's lock
        return READ_BYTES / 1e9 / _best(lambda: list(pool.map(np.max, parts)))


def float32_gflop_s() -> float:
    """10^9 float32 additions and multiplications a second of a matrix product, by XLA on the device that JAX uses."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    matmul = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    return 2 * MATMUL_SIZE**3 / 1e9 / _best(lambda: matmul(a, a).block_until_ready())


def _best(run: Callable[[], object]) -> float:
    """Seconds of the quickest of several runs, after one that is not counted."""
    run()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
