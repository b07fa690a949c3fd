"""`llmir.load`: a model, its tokenizer and its chat template, from whatever names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from llmir_jax.chat import ChatTemplate
from llmir_jax.checkpoint import hub, smollm2
from llmir_jax.checkpoint.assemble import ModelConfig, abstract_model, assemble, open_source
from llmir_jax.checkpoint.gguf import read_gguf
from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.checkpoint.gguf_tokenizer import read_tokenizer
from llmir_jax.checkpoint.orbax import MANIFEST, read_orbax, save_orbax
from llmir_jax.checkpoint.safetensors import read_huggingface, read_text_files
from llmir_jax.checkpoint.source import ParameterSource
from llmir_jax.errors import CheckpointError, LlmirError, RequestError
from llmir_jax.quantization import STORED, Calibration, Quantize, QuantizedArray, Scheme
from llmir_jax.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
NO_TOKENIZER = ("no_vocab", "none")
"""What GGUF files name the tokenizer that they do not have."""
JIT_OPTIONS = ("quantize", "mesh", "target")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Loaded:
    """A model that was loaded: its weights are read when they are needed."""

    name: str
    config: ModelConfig
    abstract_model: nnx.Module
    """The model with a shape and dtype in place of every array."""
    source: ParameterSource
    """What reads its parameters, one at a time."""
    tokenizer: Tokenizer | None
    """None where the checkpoint has none."""
    chat_template: ChatTemplate | None
    """None where the checkpoint has none."""
    quantized: bool = False
    """Whether `decoder` and `save` take the quantized arrays of `source.stored` as they are, unless told otherwise."""

    def __repr__(self) -> str:
        kind, num_params = type(self.abstract_model).__name__, self.source.num_elements
        return f"Loaded({self.name!r}: {kind} of {num_params:,} parameters)"

    @cached_property
    def model(self) -> nnx.Module:
        """The model with all its weights, as floats. They are read when this is first used, and kept.

        Raises CheckpointError if the files were changed or removed since `load`.
        """
        return assemble(self.abstract_model, self.source)

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

        The decoder has this model's tokenizer and, unless `max_seq_len` is given, its whole context. With `quantize`
        the weights are quantized one at a time as they are read; all of them are in memory as floats only for a
        `calibration`, and for the self-check, which `verify=False` leaves out.
        """
        from llmir_jax.jit import jit  # here, since the compiler is not needed to read a checkpoint
        from llmir_jax.program_identity import program_identity

        if self.quantized:
            options.setdefault("quantize", STORED)
        compile_options = {name: options.pop(name) for name in JIT_OPTIONS if name in options}
        options.setdefault("max_seq_len", self.config.max_seq_len)
        options["tokenizer"] = self.tokenizer
        options["program"] = program_identity(self.abstract_model)
        forward = jit(self.forward, **compile_options)
        if compile_options.get("quantize") is None and compile_options.get("mesh") is None:
            return forward.decoder(self.model, **options)
        return forward.decoder(self.abstract_model, source=self.source, **options)

    def quantize(self, option: Quantize, *, calibration: Calibration | None = None) -> "Loaded":
        """This model with its weights quantized, now and once, for `save` and for any number of decoders.

        `option` and `calibration` are what `quantize` and `calibration` of `decoder` take. Raises LlmirError for what
        they cannot mean, and for weights that cannot be quantized.
        """
        from llmir_jax.calibrate import Planner  # here, since the compiler is not needed to read a checkpoint
        from llmir_jax.trace import trace

        planner = Planner(
            option,
            self.source,
            calibration=calibration,
            trace_at=lambda length: trace(
                self.forward, self.abstract_model, jax.ShapeDtypeStruct((1, length), jnp.int32), fold=False
            ),
            encode=None if self.tokenizer is None else self.tokenizer.encode,
        )
        plan = planner.plan(self.source.shapes, self.source.matrices, self.config.max_seq_len)
        arrays = {
            path: self.source.read_quantized(path, scheme, planner.rounding) for path, scheme in plan.schemes.items()
        }
        scales = {path: scales for (path, _), scales in plan.activation_scales.items()}
        return self.with_quantized(arrays, plan.schemes, scales)

    def with_quantized(
        self,
        arrays: Mapping[str, QuantizedArray],
        schemes: Mapping[str, Scheme] | None = None,
        activation_scales: Mapping[str, np.ndarray] | None = None,
    ) -> "Loaded":
        """This model with these arrays [outputs, inputs] in place of some weights, by path.

        `schemes` has the schemes of those that go with quantized activations, `activation_scales` float32 [G] those of
        static ones. Raises CheckpointError for arrays that do not fit the model.
        """
        return replace(self, source=self.source.replaced(arrays, schemes, activation_scales), quantized=True)

    def save(self, path: str | Path) -> None:
        """Write an orbax checkpoint, a new directory at `path` that `llmir.load` reads again.

        Of a `quantized` model the quantized arrays are written, bit for bit; of others floats.
        """
        plan = self.source.plan(STORED if self.quantized else None)
        save_orbax(
            Path(path),
            self.config,
            self.source.load(plan),
            schemes=plan.schemes,
            activation_scales=self.source.activation_scales,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
        )


def load(name: str | Path, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike | None = None) -> Loaded:
    """Load a model with its tokenizer and chat template.

    `name` is "smollm2-135m", which is fetched; a directory with Hugging Face's files or with those of `Loaded.save`; a
    .gguf file; or "org/name" on the Hugging Face hub. What exists on disk goes before the hub.
    Computes in `dtype`, float32 unless given; weights are kept in `param_dtype`, the same unless given.
    Files are checked now, weights are read when they are needed: keep the files until then.
    Raises CheckpointError for what is missing, damaged or not supported.
    """
    compute = _dtype("dtype", dtype, "float32")
    dtypes = {"dtype": compute, "param_dtype": _dtype("param_dtype", param_dtype, compute)}
    path = locate(name)
    if path.is_file():
        return _from_gguf(str(name), path, **dtypes)
    if (path / MANIFEST).exists():
        return _from_orbax(str(name), path, **dtypes)
    config, sources, reader = read_huggingface(path)
    tokenizer, chat_template = read_text_files(path)
    model = abstract_model(config, **dtypes)
    return Loaded(
        name=str(name),
        config=config,
        abstract_model=model,
        source=open_source(model, sources, reader),
        tokenizer=tokenizer,
        chat_template=chat_template,
    )


def locate(name: str | Path) -> Path:
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
    has_tokenizer = file.metadata.get("tokenizer.ggml.model", NO_TOKENIZER[0]) not in NO_TOKENIZER
    tokenizer = read_tokenizer(file) if has_tokenizer else None
    config, sources = read_gguf(file)
    template, special = file.metadata.get("tokenizer.chat_template"), {}
    if tokenizer is not None:
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        special = {token: text for token, text in tokens.items() if text is not None}
    file.forget("tokenizer.")  # as Python's strings, the vocabulary takes much more than in the tokenizer
    model = abstract_model(config, dtype=dtype, param_dtype=param_dtype)
    return Loaded(
        name=name,
        config=config,
        abstract_model=model,
        source=open_source(model, sources, file),
        tokenizer=tokenizer,
        chat_template=ChatTemplate(source=template, special_tokens=special) if isinstance(template, str) else None,
    )


def _from_orbax(name: str, path: Path, *, dtype: DTypeLike, param_dtype: DTypeLike) -> Loaded:
    models: list[nnx.Module] = []

    def abstract(config: ModelConfig) -> nnx.Module:
        models.append(abstract_model(config, dtype=dtype, param_dtype=param_dtype))
        return models[0]

    config, source, tokenizer, chat_template = read_orbax(path, abstract)
    return Loaded(
        name=name,
        config=config,
        abstract_model=models[0],
        source=source,
        tokenizer=tokenizer,
        chat_template=chat_template,
        quantized=bool(source.stored),
    )
