"""The plain forward of SmolLM2 against cases of the reference: each output token is the argmax where it follows."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import llmir_jax as llmir


def test_each_next_token_is_the_reference(smollm2: llmir.Loaded, data_path: Path) -> None:
    forward = jax.jit(lambda model, tokens: jnp.argmax(smollm2.forward(model, tokens), axis=-1))
    cases = json.loads((data_path / "smollm2_greedy.json").read_text(encoding="utf-8"))["cases"]
    cases.sort(key=lambda case: len(case["prompt_ids"]) + len(case["output_ids"]))
    shortest = cases[:12]
    sequences = [case["prompt_ids"] + case["output_ids"] for case in shortest]
    tokens = np.zeros((len(shortest), max(map(len, sequences))), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    greedy = np.asarray(forward(smollm2.model, tokens))
    for row, case, sequence in zip(greedy, shortest, sequences, strict=True):
        np.testing.assert_array_equal(row[len(case["prompt_ids"]) - 1 : len(sequence) - 1], case["output_ids"])
