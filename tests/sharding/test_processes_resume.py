"""Two processes, one of which is killed in the middle: started again, both go on from the last snapshot."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "resume_of_many.py"


def start(folder: Path, killed: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(port), str(number), str(folder), killed],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


@pytest.mark.multidevice
def test_killed_and_started_again(tmp_path: Path):
    killed, other = running = start(tmp_path, "0")  # the one that writes, and that others meet at
    try:
        assert killed.wait(timeout=100) == -9, other.communicate(timeout=10)[1][-2000:]
        killed_at = time.monotonic()
        out, stderr = other.communicate(timeout=60)
        assert time.monotonic() - killed_at < 60
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert other.returncode == 1
    assert [line for line in stderr.splitlines() if line.startswith("llmir: ")] == [
        "llmir: error: process 0 of 2 has died: its connection closed; start all processes again"
    ]
    whole = json.loads(out.splitlines()[-1])["whole"]

    running = start(tmp_path, "none")
    try:
        ends = [process.communicate(timeout=100) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [0, 0], [err[-2000:] for _, err in ends]
    for out, _ in ends:
        found = json.loads(out.splitlines()[-1])
        assert found["resumed"] == whole
        assert found["began_at"][0] >= 8, "it had some of its tokens"
    assert not list(tmp_path.iterdir()), "nothing is left"
