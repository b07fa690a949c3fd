"""Real processes on loopback: the same tokens as one device, and a clear end when one of them dies or differs."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmir_jax import processes
from llmir_jax.cli.main import llmir as llmir_command

SCRIPT = Path(__file__).parent / "one_of_many.py"
ALONE = """
import json, os, sys
os.environ["LLMIR_NO_CACHE"] = "1"
sys.path.insert(0, sys.argv[1])
import llmir_jax as llmir
from tiny_llama import PROMPTS, forward, make_model
decoder = llmir.jit(forward).decoder(make_model(), num_pages=32, page_size=8, max_seqs=4, max_seq_len=64)
print(json.dumps(decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=10))))
"""


def start(count: int, axes: str, mode: str = "decode") -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(port), str(count), str(number), axes, mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(SCRIPT.parent)], capture_output=True, text=True, timeout=120, check=True
    )
    tokens: list[list[int]] = json.loads(done.stdout)
    return tokens


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("count", "axes"), [(2, "tensor=8"), pytest.param(4, "tensor=4,sequence=2", marks=pytest.mark.slow)]
)
def test_tokens_are_those_of_one_device(alone: list[list[int]], count: int, axes: str):
    running = start(count, axes)
    ends = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * count, [err[-2000:] for _, err in ends]
    results = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    assert all(result["tokens"] == alone for result in results)
    assert all(result["sampled"] == results[0]["sampled"] for result in results), "seeds are shared"
    assert f"on 8 cpu devices of {count} processes" in results[0]["report"]
    assert "self-check: passed" in results[0]["report"]


@pytest.mark.multidevice
def test_a_process_that_is_killed_ends_the_others_with_one_line():
    running = start(2, "tensor=8", "hang")
    try:
        for process in running:
            assert process.stdout is not None
            assert any(line.startswith("{") for line in process.stdout), "it has decoded"
        running[1].kill()
        killed_at = time.monotonic()
        _, stderr = running[0].communicate(timeout=60)
        assert running[0].returncode == 1
        assert time.monotonic() - killed_at < 60
        assert "llmir: error: process 1 of 2 has died: its connection closed; start all processes again" in stderr
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.multidevice
def test_processes_of_different_versions_do_not_start():
    running = start(2, "tensor=8", "old")
    ends = [process.communicate(timeout=120) for process in running]
    for process, (_, stderr) in zip(running, ends, strict=True):
        assert process.returncode == 1
        assert "versions: llmir-jax is 0.1.0 in process 0 and 0.0.1 in process 1; install the same in all" in stderr


@pytest.mark.multidevice
def test_the_command_line_in_two_processes(data_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["generate", "-m", str(data_path / "checkpoints" / "llama"), "--token-ids", "1,2,3", "-n", "6"]
    several = ["--mesh", "tensor=4", "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    llmir = [sys.executable, "-c", "from llmir_jax.cli.main import main; main()"]
    running = [
        subprocess.Popen(
            [*llmir, *command, *several, str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], [err[-2000:] for _, err in ends]
    alone = subprocess.run([*llmir, *command], capture_output=True, text=True, timeout=120, check=True)
    assert [out for out, _ in ends] == [alone.stdout, ""], "process 0 talks to the user"


def test_process_0_is_reached_by_the_coordinators_name_where_its_own_is_of_loopback(monkeypatch: pytest.MonkeyPatch):
    def host(own: str, coordinator: str | None) -> str:
        monkeypatch.setattr(socket, "gethostbyname", lambda _: own)
        hub = processes._Hub(2, coordinator)
        hub._server.close()
        return hub.address.rpartition(":")[0]

    assert host("127.0.1.1", "10.0.0.1:1234") == "10.0.0.1"
    assert host("127.0.1.1", None) == "127.0.1.1"
    assert host("10.0.0.2", "10.0.0.1:1234") == "10.0.0.2"


def test_connections_of_no_process_are_passed_over():
    hub = processes._Hub(2, None)
    port = int(hub.address.rpartition(":")[2])
    hellos = [b"GET / HTTP/1.1\r\n", b"5\n", b"{}\n", b"", b'{"process": 1, "versions": {"jax": "1"}}\n']
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in hellos]
    for connection, hello in zip(sockets, hellos, strict=True):
        connection.sendall(hello)
        connection.shutdown(socket.SHUT_WR)
    assert hub.compare({"jax": "1"}) is None
    assert [peer.number for peer in hub.peers] == [1]
    assert json.loads(sockets[-1].recv(100)) == {"differing": None}
    for connection in (*sockets, hub.peers[0].connection, hub._server):
        connection.close()


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "START_TIMEOUT", 0.1)
    hub = processes._Hub(2, None)
    with socket.create_connection(("127.0.0.1", int(hub.address.rpartition(":")[2]))):  # says nothing
        assert hub.compare({}) == "process 1 of 2 has not come within 0.1 s"
    hub._server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "here"], "--coordinator HOST:PORT needs --num-processes and --process-id too"),
        (["--coordinator", "here", "--num-processes", "2", "--process-id", "1"], "expected HOST:PORT or auto"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], "of 2 processes the last is 1"),
        (["--num-processes", "2"], "--num-processes and --process-id go with --coordinator HOST:PORT"),
        (["--mesh", "tensr=2"], "there is no axis 'tensr'"),
    ],
)
def test_wrong_usage(options: list[str], message: str):
    result = CliRunner().invoke(llmir_command, ["generate", "x", *options])
    assert result.exit_code == 2
    assert message in result.stderr
