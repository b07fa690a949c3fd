"""A model from a GGUF file, of the architectures llama (Llama, SmolLM2, Mistral), qwen2, qwen3 and gpt2."""

from pathlib import Path
from typing import Any

import numpy as np

from llmir_jax.checkpoint.assemble import MAX_LAYERS, MAX_SIZE, ModelConfig
from llmir_jax.checkpoint.gguf_file import GGUFFile
from llmir_jax.checkpoint.names import gguf_sources
from llmir_jax.checkpoint.source import Source
from llmir_jax.errors import CheckpointError
from llmir_jax.models.gpt2 import GPT2Config
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.models.rope import FrequencyFactors, LinearScaling, RopeScaling

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
ROPE_FACTORS = "rope_freqs.weight"
# Of keys that are only about how the file was made, or that repeat what the tensors' shapes say.
NEUTRAL_KEYS = frozenset({"vocab_size", "tensor_data_layout"})
# Keys whose other values would change the maths: refused unless they say what our models do.
FIXED_KEYS: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "use_parallel_residual": False,
    "attention.causal": True,
}


def read_gguf(file: GGUFFile) -> tuple[ModelConfig, dict[str, Source]]:
    """The config of a GGUF file, and where each parameter is in it.

    Raises CheckpointError for an unknown architecture, a hyperparameter our models do not have, and for tensors that
    are left over.
    """
    config = read_config(file)
    # llama.cpp turns neighbouring channels for "llama" and halves for the others, and permutes "llama" weights to suit.
    return config, gguf_sources(config, interleaved=file.metadata["general.architecture"] == "llama")


def read_config(file: GGUFFile) -> ModelConfig:
    """The config that the metadata and the tensors' shapes give, with the errors of `read_gguf`."""
    num_parts = file.metadata.get("split.count", 1)
    if num_parts != 1:
        raise CheckpointError(
            f"{file.path}: one of {num_parts} parts of a model; merge them with llama.cpp's `llama-gguf-split --merge`"
        )
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {arch!r} is not supported; expected one of {', '.join(ARCHITECTURES)}"
        )
    keys = _Keys(file.path, arch, file.metadata)
    try:
        config = _gpt2_config(file, keys) if arch == "gpt2" else _llama_config(file, keys, arch)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    keys.finish()
    _refuse_leftovers(file, config)
    return config


def _llama_config(file: GGUFFile, keys: "_Keys", arch: str) -> LlamaConfig:
    num_layers = keys.integer("block_count", limit=MAX_LAYERS)
    hidden_size, num_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.expect(key, head_dim)
    keys.expect("attention.scale", head_dim**-0.5)
    # Only Mistral's window is the same in every layer; for the others the key is left unread, and so refused.
    window = (keys.integer("attention.sliding_window", 0) or None) if arch == "llama" else None
    return LlamaConfig(
        vocab_size=_vocab_size(file),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_seq_len=keys.integer("context_length"),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, keys),
        windows=(window,) * num_layers,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=arch == "qwen3",
        tie_embeddings="output.weight" not in file.tensors,
    )


def _gpt2_config(file: GGUFFile, keys: "_Keys") -> GPT2Config:
    return GPT2Config(
        vocab_size=_vocab_size(file),
        hidden_size=keys.integer("embedding_length"),
        intermediate_size=keys.integer("feed_forward_length"),
        num_layers=keys.integer("block_count", limit=MAX_LAYERS),
        num_heads=keys.integer("attention.head_count"),
        max_seq_len=keys.integer("context_length"),
        layer_norm_eps=keys.number("attention.layer_norm_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
    )


def _vocab_size(file: GGUFFile) -> int:
    shape = file.shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2 or not shape[0]:
        raise CheckpointError(f"{file.path}: no tensor 'token_embd.weight' of [vocabulary, channels]; it is incomplete")
    return shape[0]


def _rope_scaling(file: GGUFFile, keys: "_Keys") -> RopeScaling | None:
    kind, factor = keys.text("rope.scaling.type", "none"), keys.number("rope.scaling.factor", 1.0)
    # What Llama 3 and others do to each frequency is precomputed in a tensor.
    factors = tuple(file.read(ROPE_FACTORS).astype(np.float32).tolist()) if ROPE_FACTORS in file.tensors else None
    if kind == "none":
        return FrequencyFactors(factors=factors) if factors else None
    if kind == "linear" and factors is None:
        return LinearScaling(factor=factor)
    raise CheckpointError(
        f"{file.path}: RoPE scaling of type {kind!r}{' with factors' if factors else ''} is not supported; "
        "expected 'none' or 'linear'"
    )


def _refuse_leftovers(file: GGUFFile, config: ModelConfig) -> None:
    known = {source.name for source in gguf_sources(config, interleaved=False).values()} | {ROPE_FACTORS}
    leftovers = sorted(set(file.tensors) - known)
    if leftovers:
        raise CheckpointError(
            f"{file.path}: {len(leftovers)} tensors are not of its architecture, such as {leftovers[0]!r}; "
            "this variant of the model is not supported"
        )


class _Keys:
    """Reads `<architecture>.*` metadata and remembers what was read: an unread key might have changed the maths."""

    def __init__(self, path: Path, arch: str, metadata: Any) -> None:
        self.path, self.arch = path, arch
        self.unread = {key.removeprefix(f"{arch}."): v for key, v in metadata.items() if key.startswith(f"{arch}.")}

    def _take(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        value = self.unread.pop(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: no metadata {self.arch}.{key}; the file is incomplete")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.path}: {self.arch}.{key} is {_shown(value)}; expected one {kinds[0].__name__}"
            )
        return value

    def integer(self, key: str, default: int | None = None, *, limit: int = MAX_SIZE) -> int:
        """A size from 1 to `limit`, or 0 where that is the default."""
        value: int = self._take(key, default, (int,))
        if not 1 <= value <= limit and value != default:
            raise CheckpointError(f"{self.path}: {self.arch}.{key} is {value}; expected a size up to {limit:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value: float = self._take(key, default, (float, int))
        return value

    def text(self, key: str, default: str) -> str:
        value: str = self._take(key, default, (str,))
        return value

    def expect(self, key: str, wanted: float) -> None:
        if not np.isclose(self.number(key, wanted), wanted):
            raise CheckpointError(f"{self.path}: {self.arch}.{key} other than {wanted} is not supported")

    def finish(self) -> None:
        """Refuse what was not read, unless it is known to change nothing."""
        for key, value in self.unread.items():
            if key in NEUTRAL_KEYS or FIXED_KEYS.get(key) == value:
                continue
            raise CheckpointError(
                f"{self.path}: metadata {self.arch}.{key} = {_shown(value)} is not supported; "
                "a model that uses it would compute something else"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else text[:37] + "..."
