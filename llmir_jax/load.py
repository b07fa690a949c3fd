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
from llmir_jax.checkpoint.assemble import ModelConfig
from llmir_jax.checkpoint.gguf import load_gguf
from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.checkpoint.gguf_tokenizer import read_tokenizer
from llmir_jax.errors import CheckpointError, LlmirError, RequestError
from llmir_jax.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
JIT_OPTIONS = ("quantize", "mesh", "target")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that was loaded. `tokenizer` and `chat_template` are None where the checkpoint has none."""

    name: str
    config: ModelConfig
    model: nnx.Module
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None

    @staticmethod
    def forward(model: Any, tokens: jax.Array) -> jax.Array:
        """tokens int32[B, T] → logits [B, T, vocab_size]: the plain forward, what `llmir.jit` takes."""
        logits: jax.Array = model(tokens)
        return logits

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as a prompt, see `ChatTemplate.render`. Encode it with `add_special_tokens=False`."""
        if self.chat_template is None:
            raise RequestError(f"{self.name} has no chat template: prompt it with plain text")
        return self.chat_template.render(messages, **variables)

    def decoder(self, **options: Any) -> Any:
        """`llmir.jit(forward, quantize=…, mesh=…, target=…).decoder(model, …)` with this model's tokenizer and context."""
        from llmir_jax.jit import jit  # here, since the compiler is not needed to read a checkpoint

        compile_options = {name: options.pop(name) for name in JIT_OPTIONS if name in options}
        options.setdefault("max_seq_len", self.config.max_seq_len)
        return jit(self.forward, **compile_options).decoder(self.model, tokenizer=self.tokenizer, **options)


def load(name: str | Path, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Loaded:
    """Load "smollm2-135m", "org/name" of the Hugging Face hub, a directory, or a .gguf file.

    Computes in `dtype`, float32 unless given; weights are kept in `param_dtype`, the same unless given.
    Raises CheckpointError for what is missing, damaged or not supported.
    """
    compute = _dtype("dtype", dtype, "float32")
    stored = _dtype("param_dtype", param_dtype, compute)
    path = Path(name)
    if not path.exists():
        raise CheckpointError(f"{name}: no such file or directory")
    return _from_gguf(path, dtype=compute, param_dtype=stored)


def _dtype(option: str, given: DTypeLike | None, default: DTypeLike) -> Any:
    try:
        dtype = jnp.dtype(default if given is None else given)
    except TypeError:
        raise LlmirError(f"{option}={given!r} is not a dtype; expected one of {', '.join(DTYPES)}") from None
    if dtype.name not in DTYPES:
        raise LlmirError(f"{option}={dtype.name!r} is not supported; expected one of {', '.join(DTYPES)}")
    return dtype


def _from_gguf(path: Path, *, dtype: DTypeLike, param_dtype: DTypeLike) -> Loaded:
    file = GGUFFile(path)
    tokenizer = read_tokenizer(file) if "tokenizer.ggml.model" in file.metadata else None
    config, model = load_gguf(file, dtype=dtype, param_dtype=param_dtype)
    return Loaded(
        name=str(path),
        config=config,
        model=model,
        tokenizer=tokenizer,
        chat_template=_chat_template(file.metadata.get("tokenizer.chat_template"), tokenizer),
    )


def _chat_template(source: str | None, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if source is None:
        return None
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token} if tokenizer else {}
    return ChatTemplate(source=source, special_tokens={name: text for name, text in tokens.items() if text is not None})
