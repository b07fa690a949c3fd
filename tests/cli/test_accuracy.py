"""`llmir accuracy`: its numbers against a computation of their own, the table, and bad input."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from command_line import Run, assert_one_line_error
from flax import nnx

import llmir_jax as llmir
from llmir_jax.accuracy import Totals, samples_of_text
from llmir_jax.cli.accuracy import CALIBRATED, ROUNDINGS, SCHEMES, parse_scheme_name
from llmir_jax.quantization import parse_scheme, quantize
from llmir_jax.quantization.calibration import WeightRounding

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen.\n" * 3
NUM_TOKENS, WINDOW = 150, 70  # windows of 70, 70 and 10 tokens; steps of 64 rows and less
SCHEME = "int4-g16"
PROMPTS = ([5, 6, 7, 8], [40, 41], [9] * 30)


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The forward and the same with rounded weights, uncached."""

    loaded: llmir.Loaded
    rounded: nnx.Module

    def logits(self, model: nnx.Module, ids: list[int]) -> np.ndarray:
        padded = np.zeros((1, 80), np.int32)  # one shape; what comes later is not seen
        padded[0, : len(ids)] = ids
        return np.asarray(jax.jit(self.loaded.forward)(model, padded)[0, : len(ids)], np.float64)

    def log_probabilities(self, model: nnx.Module, ids: list[int]) -> np.ndarray:
        logits = self.logits(model, ids)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def numbers(self, sequences: list[tuple[list[int], list[int], int]], model: nnx.Module) -> dict[str, float]:
        """Over (inputs, targets, first position that counts)."""
        divergences, agreed, surprises = [], [], []
        for inputs, targets, start in sequences:
            reference, got = (self.log_probabilities(m, inputs)[start:] for m in (self.loaded.model, model))
            divergences += list((np.exp(reference) * (reference - got)).sum(-1))
            agreed += list(reference.argmax(-1) == got.argmax(-1))
            surprises += [-row[target] for row, target in zip(got, targets[start:], strict=True)]
        return {
            "tokens": len(divergences),
            "kl": float(np.mean(divergences)),
            "top1": float(np.mean(agreed)),
            "perplexity": float(np.exp(np.mean(surprises))),
        }

    def greedy(self, model: nnx.Module, prompt: list[int], num_tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(num_tokens):
            ids.append(int(self.logits(model, ids)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(chat_model: Path) -> Expected:
    loaded, copy = llmir.load(chat_model), llmir.load(chat_model).model
    state = nnx.state(copy)
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(leaf.get_value())
        if path[-1] == "kernel":
            leaf.set_value(quantize(value.T, parse_scheme(SCHEME)).dequantize().T)
        elif path[-1] == "embedding":
            leaf.set_value(quantize(value, parse_scheme(SCHEME)).dequantize())
    nnx.update(copy, state)
    return Expected(loaded=loaded, rounded=copy)


@pytest.fixture(scope="module")
def prompts_path(expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last output is none that the model would give."""
    outputs = [expected.greedy(expected.loaded.model, prompt, 5) for prompt in PROMPTS]
    outputs[-1] = [(token + 1) % 96 for token in outputs[-1]]
    cases = [{"prompt_ids": p, "output_ids": o, "more": 1} for p, o in zip(PROMPTS, outputs, strict=True)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps({"cases": cases}))
    return path


def test_the_numbers(run: Run, chat_model: Path, text_path: Path, prompts_path: Path, expected: Expected) -> None:
    options = ("--tokens", NUM_TOKENS, "--window", WINDOW, "--prompts", prompts_path)
    result = run("accuracy", chat_model, "--text", text_path, *options, "--schemes", f"float32,{SCHEME}", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert (found["model"], found["text"], found["calibrate"]) == (str(chat_model), str(text_path), None)
    assert found["num_prompts"] == len(PROMPTS) and list(found["schemes"]) == ["float32", SCHEME]

    assert expected.loaded.tokenizer is not None
    ids = expected.loaded.tokenizer.encode(TEXT)[: NUM_TOKENS + 1]
    windows = [(ids[i : i + WINDOW], ids[i + 1 : i + WINDOW + 1], 0) for i in range(0, NUM_TOKENS, WINDOW)]
    windows[-1] = windows[-1][0][:-1], windows[-1][1], 0
    cases = json.loads(prompts_path.read_text())["cases"]
    outputs = []
    for case in cases:
        whole = case["prompt_ids"] + case["output_ids"]
        outputs.append((whole[:-1], whole[1:], len(case["prompt_ids"]) - 1))
    for name, model in (("float32", expected.loaded.model), (SCHEME, expected.rounded)):
        row = found["schemes"][name]
        for part, sequences in (("text", windows), ("prompts", outputs)):
            wanted = expected.numbers(sequences, model)
            reference = expected.numbers(sequences, expected.loaded.model)["perplexity"]
            assert row[part].pop("reference_perplexity") == pytest.approx(reference, rel=1e-4)
            assert row[part] == pytest.approx(wanted, rel=1e-3, abs=1e-8)
        same = [expected.greedy(model, c["prompt_ids"], 5) == c["output_ids"] for c in cases]
        assert row["identical"] == sum(same)
    assert found["schemes"]["float32"]["text"]["kl"] < 1e-8 < 1e-5 < found["schemes"][SCHEME]["text"]["kl"]
    assert found["schemes"]["float32"]["identical"] == len(PROMPTS) - 1
    sizes = [p.size for p in jax.tree.leaves(expected.loaded.source.parameters)]
    assert found["schemes"]["float32"]["parameter_bytes"] == 4 * sum(sizes)
    assert found["schemes"]["float32"]["bits_per_weight"] == 32
    matrices = sum(n * k for n, k in expected.loaded.source.matrices.values())
    num_bytes = matrices * (0.5 + 2 / 16) + 4 * (sum(sizes) - matrices)
    assert found["schemes"][SCHEME]["parameter_bytes"] == num_bytes


def test_the_table(run: Run, chat_model: Path, text_path: Path) -> None:
    result = run("accuracy", chat_model, "--text", text_path, "--tokens", 20, "--schemes", "kv-int8, int8+kv-int4")
    assert result.exit_code == 0, result.output
    head, rule, *rows, empty, caption = result.stdout.splitlines()
    assert head == "| scheme | weights, MB | bits a weight | cache, bytes a token | KL | top-1, % | perplexity |"
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["`kv-int8`", "`int8+kv-int4`"]
    # 2 layers, keys and values, 2 heads of 16: integers, and a scale (for int4 a minimum too) in float16
    assert [row[3] for row in cells] == [str(8 * (16 + 2)), str(8 * (8 + 4))]
    assert cells[0][2] == "32.00" and float(cells[1][2]) < 10
    assert empty == "" and "20 tokens of text.txt in windows of 20" in caption and caption.endswith("on cpu.")


def test_names_of_schemes(text_path: Path) -> None:
    text = {"text": TEXT}
    for name, wanted in {
        "float32": {"quantize": None},
        "w4a8": {"quantize": "w4a8"},
        "kv-int4": {"quantize": None, "kv_cache": "int4"},
        "int8+kv-int8": {"quantize": "int8", "kv_cache": "int8"},
        "int4-g64+mse": {"quantize": "int4-g64", "calibration": llmir.Calibration(weights="mse", **text)},
        "int8-g32-a8-static": {"quantize": "int8-g32-a8-static", "calibration": llmir.Calibration(**text)},
        "mixed-4.5+kv-int8": {
            "quantize": llmir.MixedPrecision(bits_per_weight=4.5),
            "calibration": llmir.Calibration(**text),
            "kv_cache": "int8",
        },
    }.items():
        assert parse_scheme_name(name, text_path) == wanted
    assert set(ROUNDINGS) == set(get_args(WeightRounding))
    assert all(parse_scheme_name(name, text_path) for name in (*SCHEMES, *CALIBRATED))


def test_calibrated_schemes(run: Run, chat_model: Path, text_path: Path) -> None:
    """Rounded by the text that it is measured on, int4 is closer to the forward than plain rounding makes it."""
    common = ("accuracy", chat_model, "--text", text_path, "--tokens", NUM_TOKENS, "--calibrate", text_path, "--json")
    result = run(*common, "--schemes", f"{SCHEME},{SCHEME}+gptq")
    assert result.exit_code == 0, result.output
    plain, calibrated = json.loads(result.stdout)["schemes"].values()
    assert 0 < calibrated["text"]["kl"] < plain["text"]["kl"]
    assert calibrated["parameter_bytes"] == plain["parameter_bytes"]


def test_totals() -> None:
    """Of distributions that are easy to compute by hand, one with a token that is impossible."""
    reference = np.log(np.asarray([[0.5, 0.25, 0.25], [0.5, 0.5, 1e-30]], np.float32))
    reference[1, 2] = -np.inf
    logits = np.log(np.asarray([[0.25, 0.5, 0.25], [1.0, 3.0, 1.0]], np.float32))
    totals = Totals()
    totals.add(reference, logits, [0, 1])
    totals.add(reference[:1], reference[:1], [2])
    means = totals.means()
    second = 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.6)
    assert (means.tokens, means.top1) == (3, pytest.approx(1 / 3))
    assert means.kl == pytest.approx((0.25 * np.log(2) + second) / 3, rel=1e-6)
    assert means.perplexity == pytest.approx((1 / (0.25 * 0.6 * 0.25)) ** (1 / 3), rel=1e-6)
    assert means.reference_perplexity == pytest.approx((1 / (0.5 * 0.5 * 0.25)) ** (1 / 3), rel=1e-6)
    with pytest.raises(llmir.LlmirError, match="not numbers"):
        totals.add(reference, np.full_like(logits, np.nan), [0, 1])


def test_samples_of_a_text() -> None:
    samples = samples_of_text(range(10), num_tokens=7, window=4)
    assert [(list(s.inputs), list(s.targets)) for s in samples] == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6], [5, 6, 7]),
    ]
    assert sum(len(s.inputs) for s in samples_of_text(range(10), num_tokens=100, window=4)) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["--text", "--prompts"]),
        (("--schemes", "int3"), ["int3", "int4-g64"]),
        (("--schemes", "int4,,int8"), ["''"]),
        (("--schemes", "kv-fp8"), ["kv-fp8", "kv-int8"]),
        (("--schemes", "int4+int8"), ["'int4+int8'", "two of a kind"]),
        (("--schemes", "int4-g64+gptq"), ["--calibrate"]),
        (("--schemes", "mixed-4.25"), ["--calibrate"]),
        (("--schemes", "int8-g32-a8-g32-static"), ["int8-g32-a8-g32-static"]),
        (("--schemes", "kv-int8+mse"), ["weights to round"]),
        (("--tokens", 0), ["--tokens"]),
        (("--window", "x"), ["--window"]),
        (("--prompts", "no/such.json"), ["no/such.json"]),
    ],
)
def test_wrong_usage(run: Run, text_path: Path, options: tuple[Any, ...], words: list[str]) -> None:
    """Said before a model is looked for."""
    text = ("--text", text_path) if options else ()
    assert_one_line_error(run("accuracy", "no/such", *text, *options), 2, *words, "llmir accuracy --help")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"cases": []}',
        '{"cases": [{"prompt_ids": [1]}]}',
        '{"cases": [{"prompt_ids": [], "output_ids": [1]}]}',
        '{"cases": [{"prompt_ids": [1], "output_ids": [-1]}]}',
        '{"cases": [{"prompt_ids": [true], "output_ids": ["1"]}]}',
    ],
)
def test_prompts_that_are_none(run: Run, tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content)
    assert_one_line_error(run("accuracy", "no/such", "--prompts", tmp_path / "p.json"), 1, "p.json", "output_ids")


def test_what_the_model_does_not_have(
    run: Run, chat_model: Path, plain_model: Path, text_path: Path, tmp_path: Path
) -> None:
    assert_one_line_error(run("accuracy", plain_model, "--text", text_path), 1, "no tokenizer", "--prompts")
    assert_one_line_error(run("accuracy", chat_model, "--text", text_path, "--window", 257), 1, "--window 257", "256")
    short = tmp_path / "short.txt"
    short.write_text("a")
    assert_one_line_error(run("accuracy", chat_model, "--text", short), 1, "1 tokens", "at least two")
    for prompt, words in (([96], ("token id 96", "95")), ([1] * 256, ("257 tokens", "256"))):
        short.write_text(json.dumps({"cases": [{"prompt_ids": prompt, "output_ids": [1]}]}))
        assert_one_line_error(run("accuracy", chat_model, "--prompts", short), 1, *words)
