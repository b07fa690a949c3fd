"""Memory and files of a start, from the command to the answer, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmir_jax.disk_cache import NO_CACHE

BESIDE = 450e6
"""Bytes that serving int4 may take beside its weights and its cache: an empty JAX process takes half of them.

Measured, the first start and later ones: 428 and 384 MB with JAX 0.10.2, 400 and 342 with JAX 0.12, where libraries
have just been written, as in a new environment: the system then has them in memory in large pieces, and counts a piece
of which one byte is used as a whole (Linux 6.18). Of libraries that were read from disk it counts 25 to 50 MB less.
"""
WEIGHTS, CACHE = 96.6e6, 11.8e6  # of SmolLM2 in its own blocks, and of 512 tokens in float16


PROGRAM = """
import sys
from llmir_jax.cli.main import main
try:
    main()
finally:  # what the parent is told of a child's memory begins with its own
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def generate(model: Path) -> tuple[dict[str, Any], int]:
    """The answer as JSON, and the most bytes that the process had in memory."""
    arguments = ["generate", "-m", str(model), "-q", "int4", "--json", "-n", "8", "What is the capital of France?"]
    result = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout), int(result.stderr.split()[-2]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts memory as Linux does")
def test_int4_from_the_command_to_the_answer(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path))
    monkeypatch.delenv(NO_CACHE, raising=False)
    first, first_bytes = generate(smollm2_path)
    later, later_bytes = generate(smollm2_path)
    assert first["token_ids"] == later["token_ids"]
    assert later["timings"]["self_check_s"] == 0
    assert first_bytes <= WEIGHTS + CACHE + BESIDE
    assert later_bytes <= WEIGHTS + CACHE + BESIDE
