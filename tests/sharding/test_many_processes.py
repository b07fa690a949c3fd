"""Real processes on loopback: the same tokens as one device, and a clear end when one of them dies or differs."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_llama import PROMPTS, forward, make_model

import llmir_jax as llmir
from llmir_jax import processes
from llmir_jax.cli.main import llmir as llmir_command

SCRIPT = Path(__file__).parent / "one_of_many.py"


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
    decoder = llmir.jit(forward).decoder(
        make_model(), num_pages=32, page_size=8, max_seqs=4, max_seq_len=64, verify=False
    )
    return decoder.generate(PROMPTS, llmir.SamplingParams(max_tokens=10))


@pytest.fixture(scope="module")
def two() -> Iterator[list[tuple[subprocess.Popen[str], dict[str, Any]]]]:
    """Two processes that have decoded and go on, and what each has found; the last test kills one of them."""
    running = start(2, "tensor=8", "hang")
    try:
        found = []
        for process in running:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("{")), None)
            assert line is not None, process.communicate()[1][-2000:]
            found.append((process, json.loads(line)))
        yield found
    finally:
        for process in running:
            process.kill()
            process.communicate()


def check_tokens(results: list[dict[str, Any]], alone: list[list[int]]) -> None:
    assert all(result["tokens"] == alone for result in results)
    assert f"on 8 cpu devices of {len(results)} processes" in results[0]["report"]


@pytest.mark.multidevice
def test_tokens_are_those_of_one_device(two: list[tuple[Any, dict[str, Any]]], alone: list[list[int]]):
    results = [result for _, result in two]
    check_tokens(results, alone)
    assert results[0]["sampled"] == results[1]["sampled"], "seeds are shared"
    assert "self-check: passed" in results[0]["report"]


@pytest.mark.multidevice
def test_a_process_that_is_killed_ends_the_others_with_one_line(two: list[tuple[subprocess.Popen[str], Any]]):
    (first, _), (second, _) = two
    second.kill()
    killed_at = time.monotonic()
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 1, stderr[-3000:]
    assert time.monotonic() - killed_at < 60
    assert "llmir: error: process 1 of 2 has died: its connection closed; start all processes again" in stderr


@pytest.mark.slow
@pytest.mark.multidevice
def test_tokens_of_four_processes_are_those_of_one_device(alone: list[list[int]]):
    running = start(4, "tensor=4,sequence=2")
    ends = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0] * 4, [err[-2000:] for _, err in ends]
    check_tokens([json.loads(out.splitlines()[-1]) for out, _ in ends], alone)


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
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags}
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
    alone = CliRunner().invoke(llmir_command, command)
    assert alone.exit_code == 0, alone.output
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
