"""The README: its Python runs as written, its commands and links exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

import llmir_jax as llmir
from llmir_jax.cli.main import llmir as command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of a language; "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.mark.slow
def test_python_runs(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMIR_CACHE", str(smollm2_path.parent))
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    said = capsys.readouterr().out
    assert "The capital of France is Paris." in said
    assert "self-check: passed" in said


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `llmir` command that the README shows has the options that it shows."""
    monkeypatch.chdir(ROOT)
    lines = [line.split("  #")[0].split(" | ")[-1] for line in "".join(blocks("")).replace("\\\n", "").splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("llmir ")]
    assert len(commands) >= 5
    for _, name, *arguments in commands:
        command.commands[name].make_context(name, arguments)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", "\n".join(blocks("")), re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_public_names() -> None:
    assert len(llmir.__all__) <= 12
    for name in llmir.__all__:
        assert getattr(llmir, name).__name__ == name
    assert set(llmir.__all__) <= set(dir(llmir))
    assert isinstance(command, click.Group) and f"## {llmir.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
