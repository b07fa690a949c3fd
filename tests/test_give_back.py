"""Memory that is given back to the system."""

import gc
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llmir_jax.memory import LARGE_CODE, _large_code, collecting_later, give_back

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at memory as Linux shows it")


def file_bytes() -> int:
    """Bytes of files that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024


def test_code_that_has_run_is_given_back_and_runs_again() -> None:
    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        return jnp.sin(x) @ x

    expected = f(jnp.eye(3))
    before = file_bytes()
    give_back()
    assert file_bytes() <= before - LARGE_CODE
    jax.clear_caches()
    assert (f(jnp.eye(3)) == expected).all()


def test_only_code_of_large_libraries() -> None:
    found = list(_large_code())
    assert found and all(stop - start >= LARGE_CODE for start, stop in found)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, *_ = line.split()
        start, stop = (int(address, 16) for address in addresses.split("-"))
        if (start, stop) in found:
            assert access == "r-xp" and ".so" in line


def test_garbage_is_collected_again_afterwards() -> None:
    assert gc.isenabled()
    with collecting_later():
        assert not gc.isenabled()
        with collecting_later():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
