"""Collectives and attention over a sharded cache, on four CPU devices in a process of their own."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "four_devices.py"


def test_collectives_on_four_devices() -> None:
    seed = secrets.randbits(32)
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(seed)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr}"
    assert done.stdout.split("\n") == ["collectives", "tensor-parallel MLP", "distributed attention", ""]
