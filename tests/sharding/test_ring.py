"""Attention of a step whose tokens go round a ring, against plain attention to the same pages; and decoders that do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmir_jax.transforms.ring_attention import attention_over_sequence
from sharding.ring import why_no_ring


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    script = Path(__file__).parent / "rings_on_eight.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.multidevice
def test_pages_are_those_of_one_device_and_attention_is_to_rounding(results: dict[str, Any]):
    """Of random batches, with windows, soft caps and slopes, rows of padding, and pages of floats and of integers."""
    assert results["batches"] >= 8
    assert results["pages differ"] == 0
    assert results["largest difference"] < 2e-5


@pytest.mark.multidevice
@pytest.mark.parametrize("axes", ["sequence=2", "sequence=2,tensor=4", "pipeline=2,sequence=2"])
def test_tokens_are_those_of_one_device(results: dict[str, Any], axes: str):
    """Prompts of 42, 3, 20 and 80 tokens in chunks of 64, which hold several of them and cut them; two KV heads."""
    assert results[axes]["tokens"] == results["alone"]
    assert len({tuple(tokens) for tokens in results["alone"]}) == 4, "answers that differ"


@pytest.mark.multidevice
def test_keys_go_round_and_no_device_has_all(results: dict[str, Any]):
    """Of 64 tokens each of two devices has 32: heads [8, 16], KV heads [2, 16]."""
    found = results["sequence=2"]["collectives"]
    assert set(found) <= {"collective-permute", "all-reduce", "all-gather"}
    assert all(shape.startswith("s32") for shape in found.get("all-gather", ())), "numbers of the batch"
    permuted = found["collective-permute"]
    num_layers = 3
    assert permuted["f32[32,2,16]"] == 2 * num_layers, "keys and values"
    assert permuted["f32[32,8,16]"] == num_layers, "queries"
    assert permuted["f32[32,2,4,16]"] == num_layers, "their weighted values"
    # what is summed is of the rows of logits, of whichever device has them
    assert not any(shape.startswith(("f32[32", "f32[1,32", "f32[64", "f32[1,64")) for shape in found["all-reduce"])
    split = results["sequence=2,tensor=4"]["collectives"]
    assert not any(shape.startswith(("f32[64", "f32[1,64")) for own in split.values() for shape in own)
    assert split["all-reduce"]["f32[1,32,64]"] == 5, "the table's rows, and two a layer, but for the last, of 32 tokens"


@pytest.mark.multidevice
def test_each_device_multiplies_for_its_tokens_only(results: dict[str, Any]):
    """The arithmetic of a step of 64 tokens on two devices, as XLA counts it, is about half of one device's."""
    assert results["sequence=2"]["operations"] < 0.65 * results["operations alone"]


@pytest.mark.multidevice
def test_the_report_says_which_steps_and_why(results: dict[str, Any]):
    report = results["sequence=2"]["report"]
    assert "sequence = 2: 4 tokens: partial softmaxes (fewer than 32 tokens a device); " in report
    assert "64 tokens: ring attention, 32 tokens a device" in report


def test_when_tokens_are_split():
    assert why_no_ring(64, 2) is None
    assert why_no_ring(66, 4) == "66 tokens cannot be divided over sequence = 4"
    assert why_no_ring(32, 2) == "fewer than 32 tokens a device"
    assert attention_over_sequence((512,), 4) == "sequence = 4: 512 tokens: ring attention, 128 tokens a device"
