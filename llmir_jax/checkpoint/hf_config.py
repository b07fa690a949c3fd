"""A Hugging Face `config.json` → our config. What changes the maths is read or refused by name, never ignored."""

from collections.abc import Callable, Mapping
from typing import Any

from llmir_jax.checkpoint.assemble import MAX_LAYERS, MAX_SIZE, ModelConfig
from llmir_jax.errors import CheckpointError
from llmir_jax.models.gpt2 import ACTIVATIONS, GPT2Config
from llmir_jax.models.llama import LlamaConfig
from llmir_jax.models.rope import LinearScaling, Llama3Scaling, RopeScaling

# What relatives of these architectures have in the same file, and the value that leaves the maths as ours is. Fields in
# neither this table nor the readers below (dropout, initializers, cache, provenance …) do not enter the forward pass.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_decoder": (True, None, False),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rotary_pct": (1.0, None),
    "rope_interleaved": (False, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "no_rope_layers": (None,),
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "attention_multiplier": (None,),
    "residual_multiplier": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attn_temperature_tuning": (False, None),
    "attention_chunk_size": (None,),
    "clip_qkv": (None,),
    "alibi": (False, None),
    "parallel_attn": (False, None),
    "use_parallel_residual": (False, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "kv_lora_rank": (None,),
    "q_lora_rank": (None,),
    "num_nextn_predict_layers": (None, 0),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
}


def read_hf_config(fields: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The config of `fields`, the contents of a config.json. `where` is the file's name, for errors.

    Raises CheckpointError for an architecture or a field's value that our models do not have.
    """
    config = _Fields(fields, where)
    model_type = config.fields.get("model_type")
    reader = READERS.get(model_type) if isinstance(model_type, str) else None
    if reader is None:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported; expected one of {', '.join(READERS)}"
        )
    for architecture in config.fields.get("architectures") or ():
        if not str(architecture).endswith(("ForCausalLM", "LMHeadModel")):
            raise CheckpointError(f"{where}: architecture {architecture!r} is not a language model (…ForCausalLM)")
    for name, values in NEUTRAL.items():
        if name in config.fields and config.fields[name] not in values:
            raise config.unsupported(name)
    try:
        return reader(config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _llama(config: "_Fields") -> LlamaConfig:
    num_layers = config.size("num_hidden_layers", limit=MAX_LAYERS)
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    model_type = config.fields["model_type"]
    attention_bias = config.flag("attention_bias")
    if config.fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.unsupported("hidden_act")
    theta, scaling = _rope(config)
    return LlamaConfig(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.size("num_key_value_heads", num_heads),
        head_dim=config.size("head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads),
        max_seq_len=config.size("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        windows=_windows(config, num_layers),
        # Qwen2 has biases here whatever the file says: its config has no such field.
        qkv_bias=attention_bias or model_type == "qwen2",
        out_bias=attention_bias and model_type != "qwen2",
        mlp_bias=config.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        tie_embeddings=config.flag("tie_word_embeddings"),
    )


def _windows(config: "_Fields", num_layers: int) -> tuple[int | None, ...]:
    model_type = config.fields["model_type"]
    # Mistral's first config.json had no such field, and 4096 is what its authors meant; null says "no window".
    absent = 4096 if model_type == "mistral" and "sliding_window" not in config.fields else 0
    window = config.size("sliding_window", absent) or None
    if model_type == "mistral":
        return (window,) * num_layers
    if model_type == "llama":
        if window is not None:
            raise config.unsupported("sliding_window")
        return (None,) * num_layers
    if not config.flag("use_sliding_window"):
        return (None,) * num_layers
    first = config.size("max_window_layers", 0) if "max_window_layers" in config.fields else 28
    kinds = config.fields.get("layer_types") or [
        "full_attention" if i < first else "sliding_attention" for i in range(num_layers)
    ]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise config.unsupported("layer_types")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: "_Fields") -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    name = "rope_parameters" if config.fields.get("rope_parameters") else "rope_scaling"
    scaling = config.fields.get(name) or {}
    if not isinstance(scaling, Mapping):
        raise config.unsupported(name)
    inner = _Fields(scaling, f"{config.where}: {name}")
    theta = inner.number("rope_theta", config.number("rope_theta", 10000.0))
    if inner.fields.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise inner.unsupported("partial_rotary_factor")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(factor=inner.number("factor"))
    if kind == "llama3":
        return theta, Llama3Scaling(
            factor=inner.number("factor"),
            low_freq_factor=inner.number("low_freq_factor"),
            high_freq_factor=inner.number("high_freq_factor"),
            original_max_seq_len=inner.size("original_max_position_embeddings"),
        )
    raise CheckpointError(
        f"{config.where}: RoPE scaling of type {kind!r} is not supported; expected 'default', 'linear' or 'llama3'"
    )


def _gpt2(config: "_Fields") -> GPT2Config:
    activation = config.fields.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise config.unsupported("activation_function")
    hidden_size = config.size("n_embd", 768)
    return GPT2Config(
        vocab_size=config.size("vocab_size", 50257),
        hidden_size=hidden_size,
        intermediate_size=config.size("n_inner", 4 * hidden_size),
        num_layers=config.size("n_layer", 12, limit=MAX_LAYERS),
        num_heads=config.size("n_head", 12),
        max_seq_len=config.size("n_positions", 1024),
        layer_norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=activation,
        tie_embeddings=config.flag("tie_word_embeddings", default=True),
    )


READERS: Mapping[str, Callable[["_Fields"], ModelConfig]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gpt2": _gpt2,
}


class _Fields:
    """Typed access to a JSON object. A field that is null is as good as absent."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def unsupported(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {name} = {self.fields.get(name)!r} is not supported; "
            "a model that uses it would compute something else"
        )

    def _get(self, name: str, default: Any, kinds: tuple[type, ...]) -> Any:
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: no {name!r}, which this architecture needs; the file is incomplete")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.where}: {name} is {value!r}; expected {kinds[0].__name__}")
        return value

    def size(self, name: str, default: int | None = None, *, limit: int = MAX_SIZE) -> int:
        """A size from 1 to `limit`, or 0 where that is the default."""
        value: int = self._get(name, default, (int,))
        if not 1 <= value <= limit and value != default:
            raise CheckpointError(f"{self.where}: {name} is {value}; expected a size up to {limit:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, default, (float, int)))

    def flag(self, name: str, *, default: bool = False) -> bool:
        value: bool = self._get(name, default, (bool,))
        return value
