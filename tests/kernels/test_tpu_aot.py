"""Kernels compiled for TPUs, by the compiler that TPUs have, on a machine that has none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmir_jax.libtpu_environment import ENVIRONMENT

GENERATIONS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'llmir-jax[tpu-aot]'"
    ),
]


def compiled(script: str, *args: str) -> str:
    """What a script beside this file prints, in a process of its own: libtpu logs, and is one process's at a time."""
    env = os.environ | ENVIRONMENT
    path = Path(__file__).with_name(script)
    done = subprocess.run([sys.executable, path, *args], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("generation", GENERATIONS)
def test_paged_attention(generation: str) -> None:
    lines = compiled("compile_paged_attention.py", generation).splitlines()
    assert lines
    for line in lines:
        name, kernels, aliased = line.split()
        assert int(kernels) >= 1, f"{name}: no Mosaic kernel in the program"
        assert aliased == "in-place", f"{name}: pages are copied"


@pytest.mark.parametrize("generation", GENERATIONS)
def test_flash_attention(generation: str) -> None:
    names = [] if generation.startswith("v5e") else ["llama-3-8b", "gemma-2-9b", "gemma-2-9b-gradients"]
    lines = compiled("compile_flash_attention.py", generation, *names).splitlines()
    assert len(lines) == (len(names) or 10)  # all shapes, and the gradients of two
    for line in lines:
        name, kernels = line.split()
        assert int(kernels) == (3 if name.endswith("-gradients") else 1), line  # of results, of q, of k and v
