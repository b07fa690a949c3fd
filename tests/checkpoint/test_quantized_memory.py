"""Peak memory of loading quantized: less than what is loaded, two of the largest tensor, and an empty JAX process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EMPTY = """
import json, jax, jax.numpy as jnp
jnp.zeros(1).block_until_ready()
"""
LOAD = """
import json, sys, jax
import llmir_jax as llmir
source = llmir.load(sys.argv[1]).source
parameters = source.load(source.plan(sys.argv[2]))
num_bytes = sum(x.nbytes for x in jax.tree.leaves(parameters))
"""
REPORT = """
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([int(peak.split()[1]) * 1024, %s]))
"""
LARGEST = 49152 * 576 * 4  # bytes of the token table as float32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"),
]


def measured(program: str, *arguments: str) -> tuple[int, int]:
    """Bytes of the peak of resident memory, and of the parameters."""
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, num_bytes = json.loads(result.stdout.splitlines()[-1])
    return peak, num_bytes


@pytest.fixture(scope="module")
def empty_peak() -> int:
    return measured(EMPTY + REPORT % 0)[0]


@pytest.mark.parametrize("option", ["int4", "int8", "int4-g64"])
def test_gguf(smollm2_path: Path, empty_peak: int, option: str) -> None:
    peak, num_bytes = measured(LOAD + REPORT % "num_bytes", str(smollm2_path), option)
    assert 60e6 < num_bytes < 150e6
    assert peak < empty_peak + num_bytes + 2 * LARGEST


def test_huggingface(smollm2_hf_path: Path, empty_peak: int) -> None:
    """A file of half a gigabyte, which would be in memory if it were mapped as a whole."""
    peak, num_bytes = measured(LOAD + REPORT % "num_bytes", str(smollm2_hf_path), "int4")
    assert peak < empty_peak + num_bytes + 2 * LARGEST
