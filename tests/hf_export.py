"""Write a loaded model as a Hugging Face directory: float32 safetensors, config.json, tokenizer.json, chat template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import nnx

from llmir_jax.checkpoint.names import huggingface_sources
from llmir_jax.load import Loaded
from llmir_jax.models.llama import LlamaConfig


def export_huggingface(loaded: Loaded, folder: Path) -> Path:
    """Write `loaded`, of the Llama architecture, to `folder` so that `llmir.load(folder)` gives the same model."""
    config = loaded.config
    assert isinstance(config, LlamaConfig) and config.rope_scaling is None and set(config.windows) == {None}
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    sources = huggingface_sources(config, ())
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(loaded.model)):
        source = sources[".".join(map(str, key))]
        array = np.asarray(variable.get_value(), np.float32)
        tensors[source.name] = np.ascontiguousarray(array.T if source.transposed else array)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(folder / "tokenizer.json")
        fields["eos_token_id"] = list(loaded.tokenizer.eos_ids)
        tokens = {"bos_token": loaded.tokenizer.bos_token, "eos_token": loaded.tokenizer.eos_token}
        template = {} if loaded.chat_template is None else {"chat_template": loaded.chat_template.source}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens | template))
    (folder / "config.json").write_text(json.dumps(fields))
    return folder
