"""Write a tiny Hugging Face checkpoint as a GGUF file as llama.cpp's converter does, by the `gguf` package's names."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face directory, by name."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: x for file in files for name, x in safetensors.numpy.load_file(file).items()}


def export_gguf(
    folder: Path,
    path: Path,
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    drop: str | None = None,
) -> dict[str, np.ndarray]:
    """Write `folder` to `path`; matrices whose rows are whole blocks in `quantization`, the rest in float32.

    `metadata` adds or replaces keys, `drop` leaves one tensor out. Returns the tensors as written, before quantization.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    written = {name: x for name, x in _converted(folder, config, arch).items() if name != drop}
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for key, value in (_hyperparameters(config, gguf.MODEL_ARCH_NAMES[arch]) | dict(metadata or {})).items():
        _add(writer, key, value)
    for name, x in written.items():
        block = gguf.GGML_QUANT_SIZES[quantization][0]
        kind = quantization if x.ndim == 2 and x.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _converted(folder: Path, config: dict[str, Any], arch: gguf.MODEL_ARCH) -> dict[str, np.ndarray]:
    num_layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(arch, num_layers)
    converted = {}
    for name, x in read_tensors(folder).items():
        if arch == gguf.MODEL_ARCH.GPT2 and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            x = np.ascontiguousarray(x.T)
        if arch == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
            x = _permuted(x, config["num_attention_heads"])
        if arch == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
            x = _permuted(x, config["num_key_value_heads"])
        converted[names.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        converted["rope_freqs.weight"] = _llama3_factors(config["head_dim"], rope)
    return converted


def _permuted(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py: halves of a head interleaved."""
    halves = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def _llama3_factors(head_dim: int, rope: dict[str, Any]) -> np.ndarray:
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(rope["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, np.float32)


def _hyperparameters(config: dict[str, Any], arch: str) -> dict[str, Any]:
    if arch == "gpt2":
        values = {
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": 4 * config["n_embd"],
            "block_count": config["n_layer"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
        return {f"gpt2.{key}": value for key, value in values.items()}
    rope, head_dim = config["rope_parameters"], config.get("head_dim") or 8
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": head_dim,
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config["vocab_size"],
    }
    if rope["rope_type"] == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if config.get("sliding_window") and config["model_type"] == "mistral":
        values["attention.sliding_window"] = config["sliding_window"]
    return {f"{arch}.{key}": value for key, value in values.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture":
        writer.kv_data[0].pop(key)  # the writer put its own there
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)
