"""Attention of published models over whole sequences: the shapes that tests compile and benchmarks time."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.types import Masking


@dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """Sizes of one call, by the model that has them."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    seq_len: int
    batch: int = 1
    value_dim: int | None = None
    """`head_dim` where it is None."""
    dtype: str = "bfloat16"
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False

    @property
    def masking(self) -> Masking:
        """Of its attention; scores are scaled by 1/√head_dim."""
        return Masking(scale=self.head_dim**-0.5, causal=self.causal, window=self.window, softcap=self.softcap)

    def structs(self, **options: Any) -> tuple[Any, ...]:
        """ShapeDtypeStructs of (q, k, v, slopes or None); `options` go to each, a sharding say."""

        def struct(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), **options)

        rows = (self.batch, self.seq_len)
        q = struct((*rows, self.num_heads, self.head_dim), self.dtype)
        k = struct((*rows, self.num_kv_heads, self.head_dim), self.dtype)
        v = struct((*rows, self.num_kv_heads, self.value_dim or self.head_dim), self.dtype)
        return q, k, v, struct((self.num_heads,), "float32") if self.alibi else None


def random_arguments(spec: ArgSpec, *, seed: int = 0) -> tuple[Any, ...]:
    """Arrays of (q, k, v, slopes or None), normal random; slopes are 1/2, 1/4, …"""
    q, k, v, slopes = spec.structs()
    keys = jax.random.split(jax.random.key(seed), 3)
    arrays = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, (q, k, v), strict=True)]
    return *arrays, None if slopes is None else 0.5 ** jnp.arange(1, spec.num_heads + 1, dtype=jnp.float32)


SPECS: tuple[ArgSpec, ...] = (
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    ArgSpec(name="smollm2-135m", num_heads=9, num_kv_heads=3, head_dim=64, seq_len=2048, batch=4),
    ArgSpec(name="smollm2-135m-float32", num_heads=9, num_kv_heads=3, head_dim=64, seq_len=300, dtype="float32"),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
    ArgSpec(name="llama-3-8b", num_heads=32, num_kv_heads=8, head_dim=128, seq_len=8192),
    ArgSpec(name="llama-3-8b-odd", num_heads=32, num_kv_heads=8, head_dim=128, seq_len=1100, batch=2),
    # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
    ArgSpec(name="mistral-7b", num_heads=32, num_kv_heads=8, head_dim=128, seq_len=8192, window=4096),
    # https://huggingface.co/google/gemma-2-9b/blob/main/config.json
    ArgSpec(name="gemma-2-9b", num_heads=16, num_kv_heads=8, head_dim=256, seq_len=8192, window=4096, softcap=50.0),
    # https://huggingface.co/microsoft/phi-2/blob/main/config.json (MHA)
    ArgSpec(name="phi-2", num_heads=32, num_kv_heads=32, head_dim=80, seq_len=2048),
    # https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json
    ArgSpec(name="phi-3-mini", num_heads=32, num_kv_heads=32, head_dim=96, seq_len=4096, window=2047),
)
"""One call each of models that differ in what a kernel must do."""

__all__ = ["SPECS", "ArgSpec", "random_arguments"]
