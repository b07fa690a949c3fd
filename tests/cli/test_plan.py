"""``llmir plan``: published models from their config.json alone."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, assert_one_line_error

from llmir_jax.planning import ModelPlan, read_config
from llmir_jax.slice_plan import plan_slice
from sharding.compiled import CompiledProgram
from sharding.topologies import topology

GIB = 1 << 30


@pytest.fixture(scope="module")
def configs(data_path: Path) -> Path:
    return data_path / "configs"


def planned(run: Run, *arguments: str) -> dict[str, Any]:
    done = run("plan", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_llama_3_70b_in_int8_on_v5e(run: Run, configs: Path) -> None:
    found = planned(
        run,
        str(configs / "llama-3-70b.json"),
        "--topology",
        "v5e:4x4",
        "-q",
        "int8",
        "--context",
        "4096",
        "--no-compile",
    )
    assert (found["num_devices"], found["num_hosts"]) == (16, 4)
    assert found["layout"] == {"tensor": 16}
    # 70.55e9 parameters at a byte and a float16 scale for 64 of them, over 16 devices, but for KV heads of two
    matrices = 70.55e9 * (1 + 2 / 64) / 16
    assert matrices < found["memory"]["parameters"] < 1.03 * matrices
    # 80 layers, 16 sequences, keys and values in bfloat16; 8 KV heads are on 16 devices
    assert found["memory"]["kv_cache"] == 80 * 16 * 4096 * 2 * 8 * 128 * 2 // 8
    assert found["memory"]["total"] < found["memory"]["capacity"] == 16 * GIB
    per_layer = [each for each in found["decode"]["collectives"] if each["what"] == "attention and MLP"]
    assert [(each["count"], each["bytes"]) for each in per_layer] == [(160, 16 * 8192 * 2)]
    assert found["largest_batch"] > 16
    reading = (found["memory"]["parameters"] + found["memory"]["kv_cache"]) / 819e9
    assert 0.9 * reading < found["decode"]["seconds"] < 2 * reading
    assert found["compiled"] is None and found["not_compiled"] == "--no-compile"


def test_llama_31_405b_in_int4_on_v5p(run: Run, configs: Path) -> None:
    found = planned(
        run, str(configs / "llama-3.1-405b.json"), "--topology", "v5p:4x4x4", "-q", "int4", "--batch", "64",
        "--no-compile", "--compare",
    )  # fmt: skip
    assert (found["num_devices"], found["num_hosts"], found["context"]) == (64, 16, 8192)
    assert found["compared"][0]["seconds"] == min(each["seconds"] for each in found["compared"])
    assert len(found["compared"]) > 10
    assert found["decode"]["seconds"] == pytest.approx(
        next(each["seconds"] for each in found["compared"] if each["layout"] == found["layout"])
    )
    # 405.9e9 parameters of four bits, with a scale and a minimum of 16 bits for 32 of them; the projections of KV heads
    # are where these are
    devices, keys_and_values = found["layout"]["tensor"], 126 * 2 * 16384 * 8 * 128
    copies = devices // 8
    stored = (405.9e9 + (copies - 1) * keys_and_values) * 5 / 8 / devices
    assert found["memory"]["parameters"] == pytest.approx(stored, rel=0.01)


def test_what_xla_needs_may_be_more_than_a_device_has(configs: Path) -> None:
    model = ModelPlan(config=read_config(str(configs / "llama-3-70b.json")), batch=16, context=512, quantize="int8")
    plan = plan_slice(model, topology("v5e:4x4"), name="llama", compile_it=False)
    assert plan.fits and "does not fit" not in str(plan)
    program = CompiledProgram(
        argument_bytes=GIB, temporary_bytes=15 * GIB, output_bytes=GIB, operations=0.0, collectives=Counter()
    )
    compiled = dataclasses.replace(plan, compiled=program)
    memory = compiled.decode.memory
    needed = memory.parameters + memory.cache + 16 * GIB
    assert compiled.as_dict()["memory"]["total"] == needed and not compiled.as_dict()["memory"]["fits"]
    said = f"it does not fit: {needed / GIB:.2f} GiB are {(needed - 16 * GIB) / GIB:.2f} more than a device has: lower"
    assert said in str(compiled)
    assert max(map(len, str(compiled).splitlines())) <= 140


def test_text_is_for_people(run: Run, configs: Path) -> None:
    done = run("plan", str(configs / "llama-3-70b.json"), "--topology", "v5e:4x4", "-q", "int8", "--no-compile")
    assert done.exit_code == 0
    for said in (
        "v5e:4x4: 16 v5e chips on 4 hosts",
        "layout: tensor 16   (--mesh tensor=16)",
        "takes the least for a step",
        "160 × all-reduce of 256.0 KiB over tensor",
        "All figures are estimates",
    ):
        assert said in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 140


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["--topology", "v5e:3x3"], "v5e:3x3 does not exist; slices of v5e are 1x1"),
        (2, ["--topology", "v9:1x1"], "there is no chip 'v9'"),
        (1, ["--topology", "v5e:2x2"], "but a device has 16.00 GiB; of 16 sequences of 8192 tokens not even one fits"),
        (1, ["--topology", "v5e:4x4", "--mesh", "tensor=8"], "tensor 8 needs 8 devices, but v5e:4x4 has 16"),
        (1, ["--topology", "v5p:4x4x8", "--mesh", "tensor=128"], "64 heads cannot be divided over tensor = 128"),
        (1, ["--topology", "v5e:4x4", "--context", "10000"], "--context 10000 is more than the 8192 tokens"),
        (2, ["--topology", "v5e:4x4", "-q", "mixed-4.5"], "depends on the weights"),
    ],
)
def test_what_cannot_be_is_one_line(run: Run, configs: Path, code: int, arguments: list[str], said: str) -> None:
    quantize = [] if "-q" in arguments else ["-q", "int8"]
    done = run("plan", str(configs / "llama-3-70b.json"), *arguments, *quantize)
    assert_one_line_error(done, code, said)


def test_an_incomplete_config(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama", "hidden_size": 64}')
    done = run("plan", str(path), "--topology", "v5e:1x1")
    assert_one_line_error(done, 1, "no 'num_hidden_layers', which this architecture needs")


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu-aot)")
@pytest.mark.parametrize(
    ("name", "slice_name", "quantize", "all_reduces"),
    [("llama-3-70b", "v5e:4x4", "int8", 160), ("llama-3.1-405b", "v5p:4x4x4", "int4", 252)],
)
def test_compiled_ahead_of_time(configs: Path, name: str, slice_name: str, quantize: str, all_reduces: int) -> None:
    """What XLA:TPU keeps and exchanges is what is planned. In a process of its own: libtpu is told of no TPU first."""
    mesh = "tensor=16" if slice_name == "v5e:4x4" else "sequence=2,tensor=32"
    done = subprocess.run(
        [
            sys.executable, "-m", "llmir_jax.cli.main", "plan", str(configs / f"{name}.json"),
            "--topology", slice_name, "-q", quantize, "--mesh", mesh,
            "--context", "2048", "--json",
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    compiled, memory = found["compiled"], found["memory"]
    assert compiled["argument_bytes"] == pytest.approx(memory["parameters"] + memory["kv_cache"], rel=0.02)
    size = next(each["bytes"] for each in found["decode"]["collectives"] if each["what"] == "attention and MLP")
    assert [each["count"] for each in compiled["collectives"] if each["bytes"] == size] == [all_reduces]
