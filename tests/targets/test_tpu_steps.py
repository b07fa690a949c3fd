"""Whole derived steps compiled for TPUs, by the compiler that TPUs have, on a machine that has none."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmir_jax.errors import LlmirError
from llmir_jax.libtpu_environment import ENVIRONMENT
from llmir_jax.targets.tpu_aot import compile_for_tpu

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra tpu-aot"),
]
CASES = [
    ("v5e:2x2", "smollm2"),
    ("v6e:2x2", "smollm2"),
    ("v5p:2x2x1", "smollm2"),
    ("tpu7x:2x2x1", "smollm2"),
    ("v5e:2x2", "llama-3-8b-int4"),  # in bfloat16 it has no room in 16 GB
    ("v6e:2x2", "llama-3-8b"),
    ("v5p:2x2x1", "llama-3-8b"),
    ("tpu7x:2x2x1", "llama-3-8b"),
    ("v5e:2x2", "smollm2-kv-int8"),
    ("v6e:2x2", "llama-3-8b-kv-int8"),
    ("v5p:2x2x1", "smollm2-kv-int8"),
    ("tpu7x:2x2x1", "llama-3-8b-kv-int8"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "name"), CASES, ids=str)
def test_compiled(topology: str, name: str) -> None:
    env = os.environ | ENVIRONMENT
    script = Path(__file__).with_name("compile_derived_steps.py")
    done = subprocess.run(
        [sys.executable, script, topology, name], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    decode, mixed = map(json.loads, done.stdout.splitlines())
    layers = decode["attention_layers"]
    is_smollm2, is_int8 = name.startswith("smollm2"), name.endswith("kv-int8")
    assert layers == (30 if is_smollm2 else 32)
    assert decode["unserved"] == mixed["unserved"] == {}
    assert decode["num_kernels"] >= layers
    assert mixed["num_kernels"] >= 2 * layers  # single tokens, and chunks of prompts
    width = 256 if is_smollm2 else 1024
    row_bytes = width + 4 * (3 if is_smollm2 else 8) if is_int8 else 2 * width
    page_bytes = 2 * layers * 64 * 128 * row_bytes
    assert decode["aliased_bytes"] >= page_bytes
    assert decode["temporary_bytes"] < page_bytes


@pytest.mark.parametrize("topology", ["v5e:2x2", "tpu7x:2x2x1"])
def test_direct_call(topology: str) -> None:
    script = Path(__file__).with_name("compile_direct_call.py")
    done = subprocess.run(
        [sys.executable, script, topology], env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *report, kernels = done.stdout.splitlines()
    assert kernels == "2"
    assert sum("JAX's splash attention, a Pallas kernel, compiled for" in line for line in report) == 2


def test_topology_that_does_not_exist() -> None:
    with pytest.raises(LlmirError, match="topology 'v99:2x2'"):
        compile_for_tpu(lambda model, tokens: tokens, {}, "v99:2x2", tokens=(8,), max_seqs=8, num_pages=8)
