"""From the command to the first token, in processes of their own: with empty caches, then with what that left in them.

Files are not dropped from the operating system's cache: what is cold is ours, not the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from llmir_jax.bench.baseline import Baseline, Choice, Model
from llmir_jax.bench.run import medians
from llmir_jax.errors import LlmirError

XLA_CACHE = "JAX_COMPILATION_CACHE_DIR"


def our_startup(arguments: Sequence[str], repeats: int, advance: Callable[[], None]) -> dict[str, Any]:
    """Medians of {"cold": parts, "warm": parts}; `arguments` are those of `llmir generate`.

    Parts are in seconds, as `llmir generate --json` gives them, and "command_s" from starting the process to its
    answer of one token. `advance` is called before each repeat.
    """
    rounds = []
    for _ in range(repeats):
        advance()
        with tempfile.TemporaryDirectory(prefix="llmir-startup-") as cache:
            rounds.append({name: _generate(arguments, cache) for name in ("cold", "warm")})
    return medians(rounds)


def _generate(arguments: Sequence[str], cache: str) -> dict[str, float]:
    environment = {**os.environ, "LLMIR_CACHE": cache}
    environment.pop(XLA_CACHE, None)
    command = [sys.executable, "-m", "llmir_jax.cli.main", "generate", *arguments, "--json", "-n", "1", "--ignore-eos"]
    start = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if process.returncode:
        raise LlmirError(f"--startup: `llmir generate` failed: {errors.strip().removeprefix('llmir: error: ')}")
    timings = json.loads(line)["timings"]
    parts = ("import_s", "load_s", "derive_s", "compile_s", "self_check_s")
    return {"command_s": seconds, **{name: timings[name] for name in parts}}


def their_startup(choice: Choice, model: Model, prompt: Sequence[int], repeats: int, **setup: int) -> float:
    """The median of seconds from starting a baseline's process to its first token, its files prepared before."""
    rounds = []
    for _ in range(repeats):
        start = time.perf_counter()
        with Baseline(choice, model, **setup) as baseline:
            baseline.measure({"measure": "first", "prompt": list(prompt)})
            rounds.append({"command_s": time.perf_counter() - start})
    return float(medians(rounds)["command_s"])
