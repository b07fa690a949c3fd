"""The cost model against what XLA makes of the step on virtual devices: memory, operations, collectives."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sharding.compiled import collectives_in

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one device": ("tensor=1", {}),
    "tensor 4": ("tensor=4", {}),
    "tensor 8, copies of KV heads": ("tensor=8", {}),
    "tensor 8, int8": ("tensor=8", {"quantize": "int8-g16"}),
    "tensor 4, int4, cache int8": ("tensor=4", {"quantize": "int4-g16-min", "kv_cache": "int8"}),
    "sequence 2, tensor 4": ("sequence=2,tensor=4", {}),
    "sequence 4": ("sequence=4", {}),
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    script = Path(__file__).parent / "compiled_on_eight.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(list(CASES.values()))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.multidevice
@pytest.mark.parametrize("case", CASES)
def test_memory_of_parameters_and_cache_is_exact(results: dict[str, Any], case: str) -> None:
    """But for the step's own inputs, less than a kilobyte."""
    compiled, said = results[case]["compiled"]["kept"], results[case]["said"]["kept"]
    assert 0 <= compiled - said < 1024


@pytest.mark.multidevice
@pytest.mark.parametrize("case", [case for case, (_, options) in CASES.items() if not options])
def test_operations_are_what_xla_counts(results: dict[str, Any], case: str) -> None:
    """XLA counts norms, rotations and softmax too, which for so small a model are a few percent."""
    assert 1 <= results[case]["compiled"]["operations"] / results[case]["said"]["operations"] < 1.06


def large(found: list[Any]) -> Counter[str]:
    return Counter({kind: sum(n for k, size, n in found if k == kind and size > 1024) for kind, _, _ in found})


@pytest.mark.multidevice
@pytest.mark.parametrize("case", CASES)
def test_collectives_are_those_in_the_program(results: dict[str, Any], case: str) -> None:
    """As many, of as many bytes; rows of a quantized table come as two, of integers and of scales."""
    compiled, said = (results[case][which]["collectives"] for which in ("compiled", "said"))
    assert large(compiled) == large(said)
    total = {which: sum(size * n for _, size, n in found) for which, found in (("xla", compiled), ("said", said))}
    assert total["said"] == pytest.approx(total["xla"], rel=0.02)


def test_collectives_are_read_from_text() -> None:
    text = """
      %a = f32[16,256]{1,0} all-reduce(%x), replica_groups={}
      %b = (bf16[8]{0}, s4[6]{0}) all-reduce(%x, %y), replica_groups={}
      %c = (f32[2]{0}, f32[8]{0:T(128)}) all-gather-start(%x), dimensions={0}
      %d = f32[8]{0} all-gather-done(%c)
      %e = f32[] add(%all-reduce.1, %x)
    """
    found = [("all-reduce", 16 * 256 * 4), ("all-reduce", 16 + 3), ("all-gather", 32)]
    assert list(collectives_in(text)) == found
