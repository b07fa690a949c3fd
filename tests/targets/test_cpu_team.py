"""The team of threads: callers from many threads at once, nothing busy when idle, a fork."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import ctypes, os, sys, threading, time
import numpy as np
sys.path.insert(0, sys.argv[1])
from cpu_harness import prepared_run
from test_cpu_step import layer
from llmir_jax.targets.cpu.team import team

assert team().size == 7
module, values = layer(3, 6)
runs = [prepared_run(module, values) for _ in range(5)]
expected = runs[0]()
failed = []

def work(run):
    for _ in range(100):
        for got, right in zip(run(), expected):
            if not (got == right).all():
                failed.append(np.abs(got - right).max())

threads = [threading.Thread(target=work, args=(run,)) for run in runs]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(timeout=60)
    assert not thread.is_alive(), "a step never ended"
assert not failed, failed

time.sleep(0.2)
before = time.process_time()
time.sleep(1)
busy = time.process_time() - before
assert busy < 0.1, f"{busy} s of CPU time in an idle second"

child = os.fork()  # threads do not survive it: the child works alone
if child == 0:
    found = runs[0]()
    os._exit(0 if all((a == b).all() for a, b in zip(found, expected)) else 1)
_, status = os.waitpid(child, 0)
assert status == 0
print("done")
"""


def test_many_callers_then_idle_then_fork() -> None:
    """With more threads than cores, five callers at once: whoever finds the team at work computes alone."""
    folder = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)],
        env={"LLMIR_NUM_THREADS": "7", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.stdout.strip() == "done", result.stderr[-2000:]
