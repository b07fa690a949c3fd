"""Copies of a model, and stages of its layers, on devices of two processes: the tokens are those of one device."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import SHALLOW, SHORT, forward, make_model

import llmir_jax as llmir
from llmir_jax.libtpu_environment import ENVIRONMENT

SCRIPT = Path(__file__).parent / "axes_of_many.py"
CASES = {
    "copies, one a process": (None, "over tensor 2 on 2 cpu devices, and 2 of these for copies of the model, in 2"),
    "stages, one a process": ("int8-g16", "on 2 cpu devices for each of 2 stages of 1, 1 layers, in 2 processes"),
    "stages, each of both processes": (None, "on 2 cpu devices of 2 processes for each of 2 stages of 1, 1 layers"),
    "copies in stages of both processes": (
        "int8-g16",
        "for each of 2 stages of 1, 1 layers, and 2 of these for copies",
    ),
}


@pytest.fixture(scope="module")
def results(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has."""
    orbax = tmp_path_factory.mktemp("checkpoint") / "orbax"
    llmir.load(data_path / "checkpoints" / "llama").save(orbax)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(port), str(number), str(orbax)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        ends = [process.communicate(timeout=100) for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [0, 0], [err[-2000:] for _, err in ends]
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


@pytest.fixture(scope="module")
def alone() -> dict[str | None, list[list[int]]]:
    """On one device, by what weights are quantized to."""
    found = {}
    for quantize in (None, "int8-g16"):
        decoder = llmir.jit(forward, quantize=quantize, target="reference").decoder(
            make_model(config=SHALLOW),
            num_pages=16,
            page_size=8,
            max_seqs=2,
            max_seq_len=64,
            buckets=(8,),
            verify=False,
        )
        found[quantize] = decoder.generate(SHORT, llmir.SamplingParams(max_tokens=4))
    return found


@pytest.mark.multidevice
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_one_device(
    results: list[dict[str, Any]], alone: dict[str | None, list[list[int]]], case: str
):
    quantize, description = CASES[case]
    first, second = (result[case] for result in results)
    assert len({tuple(tokens) for tokens in first["tokens"]}) == len(SHORT), "answers that differ"
    assert first["tokens"] == second["tokens"] == alone[quantize]
    assert first.get("drawn") == second.get("drawn"), "seeds are shared"
    assert description in first["report"]


@pytest.mark.multidevice
def test_a_process_checks_stages_of_others_too(results: list[dict[str, Any]]):
    for result in results:
        report = result["stages, one a process"]["report"]
        assert "self-check: passed" in report
        assert "parameters: 5 float32, 15 int8-g16-f16 in columns; 0.1 MiB" in report


@pytest.mark.multidevice
def test_a_mesh_without_devices_of_a_process_is_refused(results: list[dict[str, Any]]):
    message = "mesh: process 1 of 2 has none of its devices: give one of all's"
    assert [result["mesh of one process"] for result in results] == [{"error": message}] * 2


@pytest.mark.multidevice
def test_a_process_reads_its_own_bytes_and_rounds_them(results: list[dict[str, Any]]):
    for found in (result["file"] for result in results):
        assert found["compared"] > 40
        assert found["bytes"] < 0.6 * found["of"], "half of the matrices; vectors and keys and values whole"


@pytest.mark.multidevice
def test_processes_read_from_orbax_by_themselves(results: list[dict[str, Any]]):
    assert all(result["orbax"] > 10 for result in results)


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu-aot)")
def test_on_tpus_a_handover_is_one_permute_and_an_exchange_one_all_reduce():
    done = subprocess.run(
        [sys.executable, str(SCRIPT.parent / "handover_on_tpus.py")],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"processes": 4, "handover": {"collective-permute": 1}, "exchange": {"all-reduce": 1}}
