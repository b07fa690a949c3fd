"""What the tests of the command line share."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from click.testing import Result

Run = Callable[..., Result]


def assert_one_line_error(result: Result, code: int, *words: str) -> None:
    """The command failed as it should: nothing on stdout, one line on stderr that has these words."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("llmir: error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


# A test run in the background may have SIGINT ignored, which its children inherit.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmir_jax.cli.main import main
main()
"""


def start(*arguments: Any, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
    """Start `llmir` in a process of its own."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, **(env or {})}, **{**pipes, **options})
