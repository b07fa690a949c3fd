"""`llmir.load`: a model, its tokenizer and its chat template, from whatever names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from llmir_jax.chat import ChatTemplate
from llmir_jax.checkpoint import hub, smollm2
from llmir_jax.checkpoint.assemble import ModelConfig
from llmir_jax.checkpoint.gguf import load_gguf
from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.checkpoint.gguf_tokenizer import read_tokenizer
from llmir_jax.checkpoint.orbax import MANIFEST, load_orbax, save_orbax
from llmir_jax.checkpoint.safetensors import load_huggingface
from llmir_jax.errors import CheckpointError, LlmirError, RequestError
from llmir_jax.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
JIT_OPTIONS = ("quantize", "mesh", "target")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Loaded:
    """A model that was loaded. `tokenizer` and `chat_template` are None where the checkpoint has none."""

    name: str
    config: ModelConfig
    model: nnx.Module
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None

    def __repr__(self) -> str:
        num_params = sum(x.size for x in jax.tree.leaves(nnx.state(self.model)))
        return f"Loaded({self.name!r}: {type(self.model).__name__} of {num_params:,} parameters)"

    @staticmethod
    def forward(model: Any, tokens: jax.Array) -> jax.Array:
        """tokens int32[B, T] → logits [B, T, vocab_size]: the plain forward, what `llmir.jit` takes."""
        logits: jax.Array = model(tokens)
        return logits

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as the text of a prompt, see `ChatTemplate.render`; `encode_chat` gives its token ids."""
        if self.chat_template is None:
            raise RequestError(f"{self.name} has no chat template: prompt it with plain text")
        return self.chat_template.render(messages, **variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of the conversation as a prompt. The template has written all special tokens: none is added."""
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer: prompt it with token ids")
        return self.tokenizer.encode(self.apply_chat_template(messages, **variables), add_special_tokens=False)

    def decoder(self, **options: Any) -> Any:
        """`llmir.jit(forward, …).decoder(model, …)`: quantize, mesh and target go to `jit`, the rest to `decoder`.

        The decoder has this model's tokenizer and, unless `max_seq_len` is given, its whole context.
        """
        from llmir_jax.jit import jit  # here, since the compiler is not needed to read a checkpoint

        compile_options = {name: options.pop(name) for name in JIT_OPTIONS if name in options}
        options.setdefault("max_seq_len", self.config.max_seq_len)
        return jit(self.forward, **compile_options).decoder(self.model, tokenizer=self.tokenizer, **options)

    def save(self, path: str | Path) -> None:
        """Write an orbax checkpoint, a new directory at `path` that `llmir.load` reads again."""
        save_orbax(Path(path), self.config, self.model, self.tokenizer, self.chat_template)


def load(name: str | Path, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Loaded:
    """Load a model with its tokenizer and chat template.

    `name` is "smollm2-135m", which is fetched; a directory with Hugging Face's files or with those of `Loaded.save`; a
    .gguf file; or "org/name" on the Hugging Face hub. What exists on disk goes before the hub.
    Computes in `dtype`, float32 unless given; weights are kept in `param_dtype`, the same unless given.
    Raises CheckpointError for what is missing, damaged or not supported.
    """
    compute = _dtype("dtype", dtype, "float32")
    dtypes = {"dtype": compute, "param_dtype": _dtype("param_dtype", param_dtype, compute)}
    path = _locate(name)
    if path.is_file():
        return _from_gguf(str(name), path, **dtypes)
    read = load_orbax if (path / MANIFEST).exists() else load_huggingface
    config, model, tokenizer, chat_template = read(path, **dtypes)
    return Loaded(name=str(name), config=config, model=model, tokenizer=tokenizer, chat_template=chat_template)


def _locate(name: str | Path) -> Path:
    """The file or directory that `name` stands for, fetched if need be."""
    if name == smollm2.NAME:
        return smollm2.fetch_smollm2()
    path = Path(name).expanduser()
    if path.exists():
        return path
    if isinstance(name, str) and path.suffix != ".gguf" and hub.NAME.fullmatch(name):
        return hub.find_in_hub(name)
    raise CheckpointError(
        f"{name}: no such file or directory; expected a .gguf file, a checkpoint's directory, "
        f"{smollm2.NAME!r}, or 'org/name' on the Hugging Face hub"
    )


def _dtype(option: str, given: DTypeLike | None, default: DTypeLike) -> Any:
    try:
        dtype = jnp.dtype(default if given is None else given)
    except TypeError:
        raise LlmirError(f"{option}={given!r} is not a dtype; expected one of {', '.join(DTYPES)}") from None
    if dtype.name not in DTYPES:
        raise LlmirError(f"{option}={dtype.name!r} is not supported; expected one of {', '.join(DTYPES)}")
    return dtype


def _from_gguf(name: str, path: Path, *, dtype: DTypeLike, param_dtype: DTypeLike) -> Loaded:
    file = GGUFFile(path)
    tokenizer = read_tokenizer(file) if "tokenizer.ggml.model" in file.metadata else None
    config, model = load_gguf(file, dtype=dtype, param_dtype=param_dtype)
    source, special = file.metadata.get("tokenizer.chat_template"), {}
    if tokenizer is not None:
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        special = {token: text for token, text in tokens.items() if text is not None}
    chat_template = ChatTemplate(source=source, special_tokens=special) if isinstance(source, str) else None
    return Loaded(name=name, config=config, model=model, tokenizer=tokenizer, chat_template=chat_template)
