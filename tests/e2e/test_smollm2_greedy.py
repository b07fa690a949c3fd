"""SmolLM2-135M-Instruct, derived from its plain forward, against transformers' greedy outputs in float32.

`data/smollm2_greedy.json` holds prompts and outputs whose best two logits never come closer than 0.002.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import llmir_jax as llmir
from llmir_jax.decoder import Decoder
from llmir_jax.runtime.sampling import SamplingParams

REFERENCE = Path(__file__).parents[1] / "data" / "smollm2_greedy.json"
CASES: list[dict[str, Any]] = json.loads(REFERENCE.read_text())["cases"]
PROMPTS = [case["prompt_ids"] for case in CASES]
OUTPUTS = [case["output_ids"] for case in CASES]
PARAMS = [SamplingParams(max_tokens=len(ids), ignore_eos=True) for ids in OUTPUTS]
LONGEST = max(len(p) + len(o) for p, o in zip(PROMPTS, OUTPUTS, strict=True))


def decoder_of(loaded: llmir.Loaded, *, page_size: int, max_seqs: int, **options: Any) -> Decoder:
    pages_per_seq = -(-LONGEST // page_size)
    return loaded.decoder(
        max_seq_len=LONGEST, num_pages=max_seqs * pages_per_seq, page_size=page_size, max_seqs=max_seqs, **options
    )


@pytest.mark.slow
def test_one_at_a_time_with_the_self_check(smollm2: llmir.Loaded) -> None:
    decoder = decoder_of(smollm2, page_size=16, max_seqs=1, buckets=(1, 64))
    assert "passed" in decoder.report().self_check
    for prompt, output, params in zip(PROMPTS, OUTPUTS, PARAMS, strict=True):
        assert decoder.generate([prompt], params) == [output]
    assert decoder.engine.stats().pages_used == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [4, 64])
def test_all_in_one_batch_in_chunks_of_7(smollm2: llmir.Loaded, page_size: int) -> None:
    decoder = decoder_of(smollm2, page_size=page_size, max_seqs=len(CASES), buckets=(len(CASES), 128), verify=False)
    decoder.engine.prefill_chunk = 7
    assert decoder.generate(PROMPTS, PARAMS) == OUTPUTS
    assert decoder.engine.stats().pages_used == (0,)


@pytest.mark.slow
def test_from_the_hugging_face_directory(smollm2: llmir.Loaded, smollm2_hf_path: Path) -> None:
    loaded = llmir.load(smollm2_hf_path)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(loaded.model)), jax.tree.leaves(nnx.state(smollm2.model)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    decoder = decoder_of(loaded, page_size=16, max_seqs=len(CASES), buckets=(len(CASES), 128), verify=False)
    assert decoder.generate(PROMPTS, PARAMS) == OUTPUTS


@pytest.mark.slow
def test_answers_a_question(smollm2: llmir.Loaded) -> None:
    decoder = smollm2.decoder(max_seqs=1, max_seq_len=256, num_pages=16, buckets=(1, 64), verify=False)
    prompt = smollm2.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    updates = list(decoder.stream(prompt, SamplingParams(max_tokens=32)))
    assert "".join(update.text or "" for update in updates) == "The capital of France is Paris."
    assert updates[-1].output is not None
    assert updates[-1].output.finish_reason == "stop"


@pytest.mark.slow
def test_the_blocks_of_the_file(smollm2: llmir.Loaded) -> None:
    """ "w4a16" keeps the file's own blocks, so the outputs are those of float32."""
    decoder = decoder_of(smollm2, page_size=16, max_seqs=len(CASES), buckets=(len(CASES), 128), quantize="w4a16")
    report = decoder.report()
    assert report.self_check.startswith("passed")
    kinds = {text.split("[")[0] for text in report.parameters.values()}
    assert kinds == {"float32", "int4-g32-min-f16", "int8-g32-f16"}
    assert all("norm" in path for path in report.not_quantized)
    assert report.parameter_bytes < 100e6
    assert decoder.generate(PROMPTS, PARAMS) == OUTPUTS
