"""A loaded model as a Hugging Face directory, for baselines that read no other: float32, Llama architecture.

`python -m llmir_jax.bench.huggingface MODEL DIR` writes one.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from llmir_jax.checkpoint.names import huggingface_sources
from llmir_jax.errors import LlmirError
from llmir_jax.load import Loaded, load
from llmir_jax.models.llama import LlamaConfig


def export_huggingface(loaded: Loaded, folder: Path) -> Path:
    """Write `loaded` to the new directory `folder`, so that `llmir.load(folder)` gives the same model.

    Raises LlmirError for models that such a directory would not describe.
    """
    config = loaded.config
    if not isinstance(config, LlamaConfig):
        raise LlmirError(f"{loaded.name} is not of the Llama architecture: give a Hugging Face directory as MODEL")
    biases = config.qkv_bias or config.out_bias or config.mlp_bias or config.qk_norm
    if config.rope_scaling is not None or set(config.windows) != {None} or biases:
        raise LlmirError(
            f"{loaded.name} has scaled RoPE, windows, biases or QK-norm: give a Hugging Face directory as MODEL"
        )
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
    for path in loaded.source.shapes:
        array = np.asarray(loaded.source.read(path), np.float32)
        tensors[sources[path].name] = np.ascontiguousarray(array.T if sources[path].transposed else array)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        scratch = Path(name) / "model"
        scratch.mkdir()
        safetensors.numpy.save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(scratch / "tokenizer.json")
            fields["eos_token_id"] = list(loaded.tokenizer.eos_ids)
            tokens = {"bos_token": loaded.tokenizer.bos_token, "eos_token": loaded.tokenizer.eos_token}
            template = {} if loaded.chat_template is None else {"chat_template": loaded.chat_template.source}
            kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
            (scratch / "tokenizer_config.json").write_text(json.dumps(kind | tokens | template))
        (scratch / "config.json").write_text(json.dumps(fields))
        shutil.move(scratch, folder)
    return folder


def main(arguments: list[str]) -> None:
    """Of the command above; ends with one line if it fails."""
    model, folder = arguments
    try:
        export_huggingface(load(model), Path(folder))
    except LlmirError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
