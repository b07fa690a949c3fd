"""What runs a model on a pod: scripts that a shell takes, which give `llmir generate` options that it has."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from llmir_jax.cli.main import llmir as command

POD = Path(__file__).parent.parent / "notebooks" / "pod"


def parsed(words: list[str]) -> dict[str, object]:
    """Options of `llmir generate`, as it takes them."""
    assert words[:2] == ["llmir", "generate"]
    return command.commands["generate"].make_context("generate", words[2:]).params


@pytest.mark.parametrize("script", sorted(POD.glob("*.sh")), ids=lambda path: path.name)
def test_a_shell_takes_it(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert os.access(script, os.X_OK) or script.name == "slurm.sh"


def test_every_host_runs_one_command(tmp_path: Path) -> None:
    """`run.sh` with an `llmir` that says what it was given."""
    fake = tmp_path / "llmir"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" llmir "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "org/name", "MESH": "tensor=16"}
    done = subprocess.run([str(POD / "run.sh"), "Name a colour."], env=env, capture_output=True, text=True, check=True)
    found = parsed(done.stdout.splitlines())
    assert (found["prompt"], found["model"], found["mesh"]) == ("Name a colour.", "org/name", "tensor=16")
    assert found["dtype"] == "bfloat16"
    del env["MESH"]
    refused = subprocess.run([str(POD / "run.sh"), "x"], env=env, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "as llmir plan says" in refused.stderr


def test_the_job_runs_the_same_command() -> None:
    text = (POD / "jobset.yaml").read_text(encoding="utf-8")
    line = re.search(r"exec (llmir generate .*?)\n\s+env:", text, re.DOTALL)
    assert line is not None
    assert parsed(shlex.split(line[1]))["mesh"] == "tensor=16"
