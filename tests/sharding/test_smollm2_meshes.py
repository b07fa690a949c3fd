"""SmolLM2-135M (9 heads, 3 KV heads, 30 layers) on meshes has the greedy outputs of transformers in float32.

One number of token rows is compiled for each mesh: 16, which are served in runs of rows of one sequence (in a pipeline
in parts of 4 or 8), or 4, the most sequences at once, each of which reads its own pages.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROWS = {
    "tensor=3": 16,
    "sequence=2": 16,
    "data=2": 4,
    "tensor=3,sequence=2": 4,
    "pipeline=2": 16,
    "pipeline=4": 16,
    "tensor=3,pipeline=2": 16,
}
"""Of tokens, by mesh."""
NUM_TOKENS = 8
INT8 = {"quantize": "int8", "buckets": [64]}  # which reads the weights seldom: XLA widens them each time


@pytest.fixture(scope="module")
def expected(data_path: Path) -> list[dict[str, Any]]:
    """What transformers answers to each of 21 prompts."""
    cases: list[dict[str, Any]] = json.loads((data_path / "smollm2_greedy.json").read_text())["cases"]
    return cases


@pytest.fixture(scope="module")
def results(smollm2_path: Path, expected: list[dict[str, Any]]) -> dict[str, Any]:
    prompts = [case["prompt_ids"] for case in expected]
    three, short = prompts[:3], [prompts[1], prompts[-1]]
    cases: list[Any] = [(axes, {"buckets": [rows]}, three, [NUM_TOKENS] * 3) for axes, rows in ROWS.items()]
    cases += [(axes, options, short, [NUM_TOKENS] * 2) for axes, options in (
        ("", {**INT8, "target": "reference"}), ("tensor=3", INT8)
    )]  # fmt: skip
    script = Path(__file__).parent / "smollm2_on_meshes.py"
    done = subprocess.run([sys.executable, str(script), json.dumps(cases)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip([*ROWS, "int8 alone", "int8"], json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("axes", ROWS)
def test_greedy_outputs(results: dict[str, Any], expected: list[dict[str, Any]], axes: str):
    assert results[axes]["tokens"] == [case["output_ids"][:NUM_TOKENS] for case in expected[:3]]
    assert "partitioned over" in results[axes]["report"]
    if axes == "pipeline=4":
        assert "4 stages of 8, 8, 7, 7 layers" in results[axes]["report"]
    if axes == "data=2":
        assert "and 2 of these for copies of the model" in results[axes]["report"]


@pytest.mark.slow
@pytest.mark.multidevice
def test_greedy_outputs_in_int8_are_those_of_one_device(results: dict[str, Any]):
    split, alone = results["int8"], results["int8 alone"]
    assert split["tokens"] == alone["tokens"]
    assert "partitioned over tensor 3" in split["report"] and "partitioned over" not in alone["report"]
    assert all("int8" in case["report"] for case in (split, alone))
