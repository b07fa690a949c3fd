"""`llmir` as a process: its start, how it ends when cut short, and what is in a terminal's encoding."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import start

import llmir_jax


def test_help_does_not_wait_for_jax() -> None:
    program = "import sys, llmir_jax.cli.main; print(any(name in sys.modules for name in ('jax', 'flax', 'xdsl')))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_help_and_version() -> None:
    for arguments in (
        ["--help"],
        ["generate", "--help"],
        ["compile", "-h"],
        ["quantize", "-h"],
        ["accuracy", "-h"],
        ["bench", "-h"],
    ):
        process = start(*arguments)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "") and out.startswith("Usage: llmir")
    out, _ = start("--version").communicate(timeout=60)
    assert llmir_jax.__version__ in out


def test_bad_input_ends_the_process_with_one_line(tmp_path: Path) -> None:
    process = start("generate", "Hi", "-m", tmp_path / "missing")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("llmir: error: ") and err.count("\n") == 1
    process = start("generate", "Hi", "--no-such-option")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("llmir: error: ") and err.count("\n") == 1


LONG = ("--ignore-eos", "--no-verify", "-n", 250, "--raw")


def test_ctrl_c_in_the_middle_of_an_answer(chat_model: Path, tmp_path: Path) -> None:
    process = start(
        "generate", "Hi", "-m", chat_model, *LONG, env={"LLMIR_CACHE": str(tmp_path)}, bufsize=0, text=False
    )
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == b"llmir: interrupted\n"


def test_ctrl_c_while_loading(chat_model: Path, tmp_path: Path) -> None:
    """As early as a user can press it: the prompt has been read, JAX is being imported."""
    process = start("generate", "-m", chat_model, *LONG, stdin=subprocess.PIPE, env={"LLMIR_CACHE": str(tmp_path)})
    assert process.stdin is not None
    process.stdin.write("Hi")
    process.stdin.close()
    process.stdin = None
    while not (tmp_path / "xla").exists():  # made before the model is loaded
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "llmir: interrupted\n")


def test_a_reader_that_goes_away(chat_model: Path, tmp_path: Path) -> None:
    process = start(
        "generate", "Hi", "-m", chat_model, *LONG, env={"LLMIR_CACHE": str(tmp_path)}, bufsize=0, text=False
    )
    assert process.stdout is not None and process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    with process.stderr as stderr:
        assert (process.wait(timeout=120), stderr.read()) == (141, b"")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_terminal_that_cannot_show_everything(tmp_path: Path, encoding: str) -> None:
    process = start("generate", "Hi", "-m", str(tmp_path / "modèle"), env={"PYTHONIOENCODING": encoding})
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.startswith("llmir: error: ") and err.count("\n") == 1
