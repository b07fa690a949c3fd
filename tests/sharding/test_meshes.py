"""Decoding on meshes of virtual devices gives the tokens of one device, with the collectives that it should take."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmir_jax.errors import LlmirError
from llmir_jax.runtime.pipeline_runner import num_parts
from llmir_jax.transforms.pipeline_partitioning import layers_of_stages

Cases = dict[str, tuple[str, dict[str, Any]]]
CASES: Cases = {
    "tensor 2": ("tensor=2", {}),
    "tensor 8": ("tensor=8", {"burst": 0.02}),
    "sequence 2": ("sequence=2", {}),
    "tensor 4, sequence 2": ("tensor=4,sequence=2", {"burst": 0.02}),
    "tensor 8, int8": ("tensor=8", {"quantize": "int8-g16"}),
    "pipeline 2": ("pipeline=2", {}),
    "data 2, tensor 2": ("data=2,tensor=2", {}),
    "experts over 2, tensor 2": ("expert=2,tensor=2", {"model": "experts"}),
}
MORE_CASES: Cases = {
    "tensor 4": ("tensor=4", {"buckets": [4]}),
    "tensor 2, int8": ("tensor=2", {"quantize": "int8-g16", "buckets": [4]}),
    "tensor 4, int8": ("tensor=4", {"quantize": "int8-g16", "buckets": [4]}),
    "tensor 4, sequence 2, int4, cache int8": (
        "tensor=4,sequence=2",
        {"quantize": "int4-g16-min", "kv_cache": "int8"},
    ),
    "pipeline 3, tensor 2, int8": ("pipeline=3,tensor=2", {"quantize": "int8-g16"}),
    "pipeline 2, tensor 2, sequence 2": ("pipeline=2,tensor=2,sequence=2", {}),
}


def run(cases: Cases) -> dict[str, dict[str, Any]]:
    script = Path(__file__).parent / "eight_devices.py"
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(list(cases.values()))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return run(CASES)


@pytest.mark.slow
@pytest.mark.multidevice
def test_greedy_tokens_are_those_of_one_device_in_more_cases():
    for case, result in run(MORE_CASES).items():
        assert result["tokens"] == result["alone"], case


@pytest.mark.multidevice
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_one_device(results: dict[str, Any], case: str):
    result = results[case]
    assert result["tokens"] == result["alone"]
    assert len({tuple(tokens) for tokens in result["tokens"]}) == 3, "three answers that differ"


@pytest.mark.multidevice
def test_seeded_samples_do_not_depend_on_the_mesh(results: dict[str, Any]):
    assert results["tensor 2"]["sampled"] == results["tensor 4, sequence 2"]["sampled"]


@pytest.mark.multidevice
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("tensor") and "sequence" not in case])
def test_tensor_parallel_takes_one_all_reduce_for_attention_and_one_for_the_mlp(results: dict[str, Any], case: str):
    found = results[case]["collectives"]
    num_layers = 3
    assert found["Attention"] == {"all-reduce": num_layers}
    assert found["GatedMLP"] == {"all-reduce": num_layers}
    # rows of the table, which is split along the vocabulary, or of its integers and their scales
    assert found["Llama"] == {"all-reduce": 2 if "int8" in case else 1}


@pytest.mark.multidevice
def test_sequence_parallel_moves_softmaxes_and_no_keys(results: dict[str, Any]):
    found = results["sequence 2"]["collectives"]
    assert {kind for counts in found.values() for kind in counts} == {"all-reduce"}


@pytest.mark.multidevice
def test_the_cache_and_the_weights_are_split(results: dict[str, Any]):
    # [pages, tokens a page, KV heads, head dim]: two KV heads, so that four devices have two copies of each
    assert results["tensor 2"]["shard"] == [32, 8, 1, 16]
    assert results["tensor 8"]["shard"] == [32, 8, 1, 16]
    assert results["sequence 2"]["shard"] == [32, 4, 2, 16]
    assert results["tensor 4, sequence 2"]["shard"] == [32, 4, 1, 16]
    assert results["tensor 8"]["bytes"] < 0.2 * results["sequence 2"]["bytes"], "an eighth, and K and V are half each"
    assert results["tensor 8, int8"]["bytes"] < 0.4 * results["tensor 8"]["bytes"]
    assert "partitioned over sequence 2 × tensor 4 on 8 cpu devices" in results["tensor 4, sequence 2"]["report"]


@pytest.mark.multidevice
def test_stages_have_their_own_layers(results: dict[str, Any]):
    report = results["pipeline 2"]["report"]
    assert "for each of 2 stages of 2, 1 layers" in report
    assert "self-check: passed" in report


@pytest.mark.multidevice
def test_copies_of_the_model_share_the_requests(results: dict[str, Any]):
    assert "and 2 of these for copies of the model" in results["data 2, tensor 2"]["report"]
    assert results["data 2, tensor 2"]["tokens"] == results["tensor 2"]["tokens"]


@pytest.mark.multidevice
def test_experts_are_split_and_summed_with_one_all_reduce_a_layer(results: dict[str, Any]):
    result = results["experts over 2, tensor 2"]
    # [experts 4, inputs 32, channels 48]: an expert a device
    assert result["shards"]["layers.0.experts.up"] == [1, 32, 48]
    assert result["shards"]["layers.0.experts.down"] == [1, 48, 32]
    # in each of 2 layers the sum, and of the router's softmax, a number for each token, the largest and the total
    assert result["collectives"]["mixture"] == {"all-reduce": 2 * 3}


def test_layers_are_shared_out_and_the_last_stage_has_fewer():
    assert layers_of_stages(30, 4) == (8, 8, 7, 7)
    assert layers_of_stages(30, 2) == (15, 15)
    with pytest.raises(LlmirError, match="3 layers cannot be divided over pipeline = 4"):
        layers_of_stages(3, 4)


@pytest.mark.parametrize(("rows", "stages", "parts"), [(8, 4, 4), (16, 3, 2), (1, 4, 1), (2, 4, 2), (9, 4, 3)])
def test_parts_of_a_batch_on_their_way(rows: int, stages: int, parts: int):
    assert num_parts(rows, stages) == parts
