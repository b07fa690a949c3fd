"""`llmir compile`: the report, the IR of each stage, and bad input."""

import json
from pathlib import Path

import pytest
from command_line import Run, assert_one_line_error

from llmir_jax.cli.options import TARGETS
from llmir_jax.jit import TARGETS as JIT_TARGETS

SMALL = ("--max-seq-len", 64, "--page-size", 8)


def test_the_report(run: Run, chat_model: Path) -> None:
    result = run("compile", chat_model, *SMALL, "--max-seqs", 2)
    assert result.exit_code == 0, result.output
    for line in ("2 layers: 4 heads, 2 KV heads of 16, causal", "compiled step of 2 tokens", "self-check: passed"):
        assert line in result.stdout
    assert result.stderr == ""


def test_the_report_as_data(run: Run, chat_model: Path, tmp_path: Path) -> None:
    result = run("compile", chat_model, *SMALL, "--json", "--no-verify", "--tokens", 4, "-o", tmp_path / "report.json")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["attention"][0]["num_kv_heads"] == 2
    assert report["buckets"] == [4] and report["max_seq_len"] == 64
    assert "skipped" in report["self_check"]


@pytest.mark.parametrize(
    ("stage", "has"),
    [("stablehlo", "stablehlo.dot_general"), ("llm", "llm.paged_attention"), ("target", "tensor<3xi32>")],
)
def test_ir(run: Run, chat_model: Path, tmp_path: Path, stage: str, has: str) -> None:
    path = tmp_path / "out.mlir"
    result = run("compile", chat_model, *SMALL, "--emit", stage, "--tokens", 3, "-o", path)
    assert (result.exit_code, result.output) == (0, "")
    text = path.read_text()
    assert text.startswith("builtin.module") and text.endswith("\n")
    assert has in text


def test_ir_on_stdout(run: Run, chat_model: Path) -> None:
    result = run("compile", chat_model, *SMALL, "--emit", "llm")
    assert result.exit_code == 0 and result.stdout.startswith("builtin.module") and result.stderr == ""


def test_a_mesh(run: Run, chat_model: Path) -> None:
    result = run("compile", chat_model, *SMALL, "--no-verify", "--tokens", 4, "--mesh", "tensor=1")
    assert result.exit_code == 0 and "partitioned over tensor 1 on 1 cpu device" in result.stdout, result.output
    assert_one_line_error(run("compile", chat_model, "--mesh", "tensor=5"), 1, "tensor 5 needs 5 devices")
    assert_one_line_error(run("compile", chat_model, "--mesh", "tensr=5"), 2, "there is no axis 'tensr'")


def test_targets(run: Run, chat_model: Path) -> None:
    def servers(*options: str) -> set[str]:
        result = run("compile", chat_model, *SMALL, "--json", "--no-verify", "--tokens", 4, *options)
        assert result.exit_code == 0, result.output
        return set(json.loads(result.stdout)["served_by"].values())

    assert all("native code for" in server for server in servers("--target", "cpu"))
    assert all("reference decomposition" in server for server in servers("--target", "reference"))
    assert TARGETS == JIT_TARGETS
    assert_one_line_error(run("compile", chat_model, "--target", "abacus"), 2, "--target", "'abacus'", "reference")
    assert_one_line_error(run("compile", chat_model, *SMALL, "--target", "tpu"), 1, "target='tpu'", "'cpu'")


def test_wrong_usage(run: Run, chat_model: Path, tmp_path: Path) -> None:
    assert_one_line_error(run("compile"), 2, "MODEL")
    assert_one_line_error(run("compile", chat_model, "--emit", "ptx"), 2, "--emit", "stablehlo")
    assert_one_line_error(run("compile", chat_model, "--emit", "llm", "--json"), 2, "--json")
    assert_one_line_error(run("compile", chat_model, "-o", tmp_path), 2, "--output")
    missing = tmp_path / "no" / "folder.mlir"
    assert_one_line_error(run("compile", chat_model, *SMALL, "--emit", "llm", "-o", missing), 1, str(missing))
