"""Compiles derived steps of published shapes for a topology, of shapes alone; prints as JSON what libtpu made of each.

python compile_derived_steps.py v5e:2x2 smollm2 llama-3-8b-int4 llama-3-8b-kv-int8
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmir_jax.models.llama import Llama, LlamaConfig
from llmir_jax.targets.tpu_aot import compile_for_tpu

# https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_seq_len=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    windows=(None,) * 30,
    tie_embeddings=True,
)
# https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    windows=(None,) * 32,
)
STEPS: dict[str, tuple[LlamaConfig, str | None, str | None]] = {  # what weights, and the cache, are quantized to
    "smollm2": (SMOLLM2, None, None),
    "smollm2-kv-int8": (SMOLLM2, None, "int8"),
    "llama-3-8b": (LLAMA_3_8B, None, None),
    "llama-3-8b-int4": (LLAMA_3_8B, "int4-g32-min-bf16", None),
    "llama-3-8b-kv-int8": (LLAMA_3_8B, None, "int8"),
}


def forward(model: Any, tokens: jax.Array) -> jax.Array:
    return model(tokens)


for name in sys.argv[2:]:
    config, quantize, kv_cache = STEPS[name]

    def make(config: LlamaConfig = config) -> Llama:
        return Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    sizes: dict[str, Any] = {"max_seqs": 8, "num_pages": 64, "page_size": 128, "max_seq_len": 2048}
    sizes |= {"quantize": quantize, "kv_cache": kv_cache}
    steps = compile_for_tpu(forward, nnx.eval_shape(make), sys.argv[1], tokens=(8, 64), **sizes)
    for step in steps:
        print(json.dumps({"name": name, **asdict(step)}), flush=True)
