"""The command line in this process, and a tiny checkpoint with a tokenizer and a chat template."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tokenizers
from click.testing import CliRunner, Result
from command_line import Run
from jax.experimental.compilation_cache import compilation_cache

from llmir_jax.cli.main import llmir

CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Runs `llmir` in this process, its cache of compiled programs in a folder of the test."""
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "cache"))
    names = [
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}

    def call(*arguments: Any, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(llmir, list(map(str, arguments)), input=stdin)

    yield call
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def chat_model(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are characters."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(data_path / "checkpoints" / "qwen3", folder)
    characters = ["<unk>", "<bos>", "<eos>", "\n", *map(chr, range(32, 124))]
    model = tokenizers.models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def plain_model(data_path: Path) -> Path:
    """A tiny model without a tokenizer."""
    return data_path / "checkpoints" / "gpt2"
