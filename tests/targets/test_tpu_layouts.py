"""What XLA:TPU makes of the two layouts of a quantized weight, in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmir_jax.libtpu_environment import ENVIRONMENT

PROGRAM = Path(__file__).parent / "tpu_layouts.py"


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu-aot)")
def test_columns_are_read_once_and_never_unpacked() -> None:
    """The reason for `hardware_specific_quantization.LAYOUTS["tpu"]`."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for case, layouts in found.items():
        rows, columns = layouts["rows"], layouts["columns"]
        assert columns["larger_values"] == [] and columns["loops"] == 0 and columns["temporary"] == 0, case
        # Arguments and result once, and the scales once more as they become float32.
        assert columns["accessed"] < 2 * columns["in_and_out"], case
        # Of a loop this counts the body once.
        assert rows["accessed"] > 1.5 * columns["accessed"], case
        if "8 rows" in case:
            assert rows["loops"] == 1 and rows["copies_in_loops"], case
        elif "int4" in case:
            assert rows["larger_values"], case
