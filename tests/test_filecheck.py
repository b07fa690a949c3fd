"""Runs the IR tests: each ``// RUN: llmir-opt … | filecheck %s`` line of tests/filecheck, in this process.

A line may say ``not llmir-opt`` (exit code 1 is wanted) and ``2>&1``, and give filecheck options after ``%s``.
"""

import re
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import parse_argv_options
from filecheck.parser import Parser

from llmir_jax.cli import opt

FOLDER = Path(__file__).parent / "filecheck"
RUN = re.compile(
    r"^//\s*RUN:\s*(?P<not>not\s+)?llmir-opt\s+(?P<args>.*?)(?P<both>\s2>&1)?\s*\|\s*filecheck\s+(?P<check>.*)$"
)


def _runs() -> list[tuple[Path, str]]:
    runs = []
    for path in sorted(FOLDER.rglob("*.mlir")):
        lines = [line.strip() for line in path.read_text().splitlines() if re.match(r"^//\s*RUN:", line)]
        runs += [(path, line) for line in lines] or [(path, "")]
    return runs


@pytest.mark.parametrize(("path", "line"), _runs(), ids=lambda value: value.stem if isinstance(value, Path) else "")
def test_ir(path: Path, line: str) -> None:
    run = RUN.match(line)
    assert run is not None, f"{path}: no line of the form // RUN: llmir-opt … | filecheck %s, got {line!r}"
    output, errors = StringIO(), StringIO()
    code = 0
    with redirect_stdout(output), redirect_stderr(output if run["both"] else errors):
        try:
            opt.main(shlex.split(run["args"].replace("%s", str(path))))
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    expected_code = 1 if run["not"] else 0
    assert code == expected_code, f"{line}\n{errors.getvalue()}{output.getvalue()}"

    options = parse_argv_options(["filecheck", *shlex.split(run["check"].replace("%s", str(path)))])
    complaint = StringIO()
    with redirect_stdout(complaint), redirect_stderr(complaint):
        result = Matcher(options, FInput(str(path), output.getvalue()), Parser.from_opts(options)).run()
    if result != 0:
        sys.stdout.write(output.getvalue())
        pytest.fail(f"{line}\n{complaint.getvalue()}", pytrace=False)
