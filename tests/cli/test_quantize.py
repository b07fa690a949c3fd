"""Quantization on the command line: `llmir quantize`, and the options of `generate` and `compile`."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from command_line import Run, assert_one_line_error

import llmir_jax as llmir
from llmir_jax import decoder
from llmir_jax.cli.accuracy import ROUNDINGS
from llmir_jax.cli.options import KV_CACHES, parse_quantize
from llmir_jax.quantization.calibration import WeightRounding

SMALL = ("--max-seq-len", 64, "--page-size", 8)
RULES = ("-q", ".*norm.*=none", "-q", "layers/.*/(mlp|mlp=x)=int4-g16", "-q", "layers.*attn=int8-channel")


def test_a_checkpoint_is_quantized_and_served_as_it_is(run: Run, chat_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "made" / "int4"
    result = run("quantize", chat_model, "-q", "int4", "-o", path, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    loaded = llmir.load(path)
    report = loaded.decoder(max_seqs=1, num_pages=4, verify=False).report()
    assert loaded.quantized and (found["model"], found["path"]) == (str(chat_model), str(path))
    kinds = {name: text.split("[")[0].split("-a8")[0] for name, text in report.parameters.items()}
    assert found["parameters"] == kinds
    assert found["bytes"] == report.parameter_bytes
    assert found["bits_per_weight"] == pytest.approx(8 * report.parameter_bytes / loaded.source.num_elements)
    assert {kind: entry["count"] for kind, entry in found["formats"].items()} == {
        kind: list(kinds.values()).count(kind) for kind in kinds.values()
    }
    assert sum(entry["bytes"] for entry in found["formats"].values()) == found["bytes"]
    common = ("generate", "Hi", "-n", 4, "--ignore-eos", "--no-verify", *SMALL)
    assert run(*common, "-m", path).stdout == run(*common, "-m", chat_model, "-q", "int4").stdout
    for options, is_quantized in (((), True), (("-q", "none"), False)):
        result = run("compile", path, *SMALL, "--emit", "llm", *options)
        assert ("llm.quantized_matmul" in result.stdout) is is_quantized


def test_rules_and_the_summary(run: Run, chat_model: Path, tmp_path: Path) -> None:
    result = run("quantize", chat_model, *RULES, "-o", tmp_path / "ours", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    first, *lines = result.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'ours'}: 0.") and first.endswith("bits a weight")
    counts = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert counts["int4-g16-f16"] == 2 * 3 and counts["int8-channel-f32"] == 2 * 4
    assert set(counts) == {"int4-g16-f16", "int8-channel-f32", "bfloat16"}


def test_calibration(run: Run, chat_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely, having little or no money " * 3)
    for name, options in (("plain", ()), ("calibrated", ("--calibrate", text))):
        result = run("quantize", chat_model, "-q", ".*attn=int4-g16", *options, "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "8 parameters" in result.stdout and "int4-g16-f16" in result.stdout
    calibration = llmir.Calibration(text=text.read_text())
    wanted = llmir.load(chat_model).quantize({".*attn": "int4-g16"}, calibration=calibration)
    plain, saved = (llmir.load(tmp_path / name).source for name in ("plain", "calibrated"))
    for path, scheme in wanted.source.stored.items():
        ours, theirs = (source.read_quantized(path, scheme).values for source in (saved, wanted.source))
        assert np.array_equal(ours, theirs)
    assert any(not np.array_equal(plain.read(path), saved.read(path)) for path in wanted.source.stored)


def test_options_of_a_decoder(run: Run, chat_model: Path) -> None:
    common = ("compile", chat_model, *SMALL, "--json", "--tokens", 3)
    result = run(*common, *RULES, "--kv-cache", "int8")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    kinds = {text.split("[")[0] for text in report["parameters"].values()}
    assert kinds == {"int4-g16-f16", "int8-channel-f32", "float32"}
    assert report["attention"][0]["cache_dtype"].startswith("int8")
    assert "passed" in report["self_check"]


def test_what_quantize_is_parsed_to() -> None:
    assert parse_quantize(["int4"]) == "int4"
    assert parse_quantize(["none"]) is None
    assert parse_quantize(["mixed-4.25"]) == llmir.MixedPrecision(bits_per_weight=4.25)
    assert parse_quantize(["a=int8", "(?=b)=none", "c=w4a8"]) == {"a": "int8", "(?=b)": None, "c": "w4a8"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-q", "int3"), ["--quantize", "'int3'", "int4-g64"]),
        (("-q", "int4", "-q", "int8"), ["--quantize", "2 schemes"]),
        (("-q", "int4", "-q", "lm_head=int8"), ["--quantize int4", "lm_head=int8"]),
        (("-q", "mlp=int4", "-q", "mlp=int8"), ["'mlp' twice"]),
        (("-q", "mlp=int3"), ["'mlp'", "'int3'"]),
        (("-q", "mlp="), ["'mlp'"]),
        (("-q", "(mlp=int4"), ["'(mlp'", "regular expression"]),
        (("-q", "mixed-0"), ["bits_per_weight"]),
        (("-q", "mixed-4.5"), ["--quantize mixed-4.5", "--calibrate"]),
        (("-q", "mlp=mixed-4.25"), ["mixed-4.25"]),
        (("-q", "int4", "--calibrate", "no/such.txt"), ["--calibrate", "no/such.txt"]),
    ],
)
def test_wrong_usage(run: Run, tmp_path: Path, options: tuple[Any, ...], words: list[str]) -> None:
    """Said before a model is looked for."""
    for command in (("generate", "Hi", "-m", "no/such"), ("compile", "no/such"), ("quantize", "no/such", "-o", "x")):
        assert_one_line_error(run(*command, *options), 2, *words, f"llmir {command[0]} --help")


def test_wrong_usage_of_one_command(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words.")
    assert_one_line_error(run("generate", "Hi", "--kv-cache", "fp8"), 2, "--kv-cache", "int8")
    for options in ((), ("-q", "none")):
        assert_one_line_error(run("generate", "Hi", *options, "--calibrate", text), 2, "--calibrate", "--quantize")
        assert_one_line_error(run("quantize", "no/such", "-o", "x", *options), 2, "--quantize")
    assert_one_line_error(run("quantize", "no/such", "-q", "int4"), 2, "--output")
    text.write_text(" \n")
    assert_one_line_error(run("compile", "no/such", "-q", "int4", "--calibrate", text), 1, str(text), "empty")
    text.write_bytes(b"caf\xe9")
    assert_one_line_error(run("compile", "no/such", "-q", "int4", "--calibrate", text), 1, str(text), "utf-8")


def test_what_only_the_model_can_tell(run: Run, chat_model: Path, tmp_path: Path) -> None:
    commands = (("generate", "Hi", "-m", chat_model), ("compile", chat_model), ("quantize", chat_model, "-o", "x"))
    for command in commands:
        assert_one_line_error(run(*command, "-q", "expert.*=int4"), 1, "'expert.*'", "matches no parameter")
        assert_one_line_error(run(*command, "-q", "int4-g48"), 1, "48", "does not divide")
    assert not Path("x").exists()


def test_an_existing_path_is_left_alone(run: Run, chat_model: Path, tmp_path: Path) -> None:
    """Said before the model is looked for."""
    assert_one_line_error(run("quantize", "no/such", "-q", "int4", "-o", tmp_path), 1, str(tmp_path), "exists already")
    (tmp_path / "file").write_text("")
    result = run("quantize", chat_model, "-q", "int4", "-o", tmp_path / "file" / "below")
    assert_one_line_error(result, 1, "cannot be written")


def test_names_are_those_of_the_library() -> None:
    """The command line lists them itself, since `--help` does not import the compiler."""
    assert tuple(decoder.KV_CACHES) == KV_CACHES
    assert set(ROUNDINGS) == set(get_args(WeightRounding))
