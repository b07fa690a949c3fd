"""The plain forward of SmolLM2 against every case of the reference: each output token is the argmax where it follows."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import llmir_jax as llmir


def test_each_next_token_is_the_reference(smollm2_path: Path, data_path: Path) -> None:
    loaded = llmir.load(smollm2_path)
    forward = jax.jit(lambda model, tokens: jnp.argmax(loaded.forward(model, tokens), axis=-1))
    cases = json.loads((data_path / "smollm2_greedy.json").read_text(encoding="utf-8"))["cases"]
    cases.sort(key=lambda case: len(case["prompt_ids"]) + len(case["output_ids"]))
    for batch in (cases[:10], cases[10:20], cases[20:]):
        sequences = [case["prompt_ids"] + case["output_ids"] for case in batch]
        tokens = np.zeros((len(batch), max(map(len, sequences))), np.int32)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        greedy = np.asarray(forward(loaded.model, tokens))
        for i, case in enumerate(batch):
            start, end = len(case["prompt_ids"]), len(sequences[i])
            np.testing.assert_array_equal(greedy[i, start - 1 : end - 1], case["output_ids"])
