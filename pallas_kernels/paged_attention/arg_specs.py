"""Attention of published models and ragged batches over it: the shapes that tests compile and benchmarks time."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention.tpu_tiles import page_width
from pallas_kernels.paged_attention.types import KVPages, RaggedBatch


@dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """Sizes of one call, by the model that has them."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    num_seqs: int
    seq_len: int = 2048
    page_size: int = 128
    dtype: str = "bfloat16"
    page_dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False

    @property
    def pages_per_seq(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.seq_len // self.page_size)

    def structs(self, **options: Any) -> tuple[Any, ...]:
        """ShapeDtypeStructs of (q, k, v, pages, batch, slopes or None); `options` go to each, a sharding say."""

        def struct(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), **options)

        num_pages = self.num_seqs * self.pages_per_seq
        width = page_width(self.num_kv_heads, self.head_dim)
        stored = struct((num_pages, self.page_size, width), self.page_dtype)
        scales = struct((num_pages, self.num_kv_heads, self.page_size), "float32")
        new = struct((self.num_tokens, self.num_kv_heads, self.head_dim), self.dtype)
        pages: Any = (stored, stored, scales, scales) if self.page_dtype == "int8" else (stored, stored)
        seqs: Any = struct((self.num_seqs,), "int32")
        tables: Any = struct((self.num_seqs, self.pages_per_seq), "int32")
        q = struct((self.num_tokens, self.num_heads, self.head_dim), self.dtype)
        slopes = struct((self.num_heads,), "float32") if self.alibi else None
        return q, new, new, KVPages(*pages), RaggedBatch(tables, seqs, seqs, seqs), slopes


def random_arguments(spec: ArgSpec, seq_lens: list[int], query_lens: list[int], *, seed: int = 0) -> tuple[Any, ...]:
    """Arrays of (q, k, v, pages, batch, slopes or None), normal random; pages in random order, the sequences too.

    Rows that no sequence has, and slots beyond a sequence's length, hold NaN (int8 pages: scales of NaN).
    """
    rng = np.random.default_rng(seed)
    q, new, _, pages, _, slopes = spec.structs()
    num_seqs, per_seq = spec.num_seqs, spec.pages_per_seq
    tables = rng.permutation(num_seqs * per_seq).reshape(num_seqs, per_seq).astype(np.int32)
    starts = np.zeros(num_seqs, np.int32)
    used = 0
    for seq in rng.permutation(num_seqs):
        starts[seq] = used
        used += query_lens[seq]
    assert used <= spec.num_tokens

    def rows(struct: Any) -> jax.Array:
        values = rng.standard_normal(struct.shape, np.float32)
        values[used:] = np.nan
        return jnp.asarray(values, struct.dtype)

    live = np.zeros((num_seqs * per_seq, spec.page_size), bool)
    for seq, length in enumerate(seq_lens):
        positions = np.arange(length)
        live[tables[seq, positions // spec.page_size], positions % spec.page_size] = True

    def stored(struct: Any) -> jax.Array:
        if struct.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, struct.shape), jnp.int8)
        values = rng.standard_normal(struct.shape, np.float32)
        values = np.where(live[..., None], values, np.nan)
        values[..., spec.num_kv_heads * spec.head_dim :] = 0
        return jnp.asarray(values, struct.dtype)

    def scales(struct: Any) -> jax.Array:
        values = rng.uniform(0.005, 0.02, struct.shape).astype(np.float32)
        return jnp.asarray(np.where(live[:, None, :], values, np.nan))

    kv = [stored(pages.k), stored(pages.v)]
    if spec.page_dtype == "int8":
        kv += [scales(pages.k_scales), scales(pages.v_scales)]
    batch = RaggedBatch(
        jnp.asarray(tables),
        jnp.asarray(seq_lens, jnp.int32),
        jnp.asarray(starts),
        jnp.asarray(query_lens, jnp.int32),
    )
    alibi = None if slopes is None else jnp.asarray(2.0 ** -np.linspace(1, 8, spec.num_heads), jnp.float32)
    return rows(q), rows(new), rows(new), KVPages(*kv), batch, alibi


SPECS = (
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M/blob/main/config.json
    ArgSpec(name="smollm2-135m", num_heads=9, num_kv_heads=3, head_dim=64, num_tokens=64, num_seqs=8),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
    ArgSpec(name="llama-3-8b-decode", num_heads=32, num_kv_heads=8, head_dim=128, num_tokens=64, num_seqs=64),
    ArgSpec(name="llama-3-8b-mixed", num_heads=32, num_kv_heads=8, head_dim=128, num_tokens=512, num_seqs=16),
    ArgSpec(
        name="llama-3-8b-int8",
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_tokens=512,
        num_seqs=16,
        page_dtype="int8",
    ),
    # https://huggingface.co/microsoft/phi-2/blob/main/config.json (MHA)
    ArgSpec(name="phi-2", num_heads=32, num_kv_heads=32, head_dim=80, num_tokens=128, num_seqs=8),
    # https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/config.json
    ArgSpec(name="phi-3-mini", num_heads=32, num_kv_heads=32, head_dim=96, num_tokens=64, num_seqs=8, window=2047),
    # https://huggingface.co/google/gemma-2-9b/blob/main/config.json
    ArgSpec(
        name="gemma-2-9b",
        num_heads=16,
        num_kv_heads=8,
        head_dim=256,
        num_tokens=64,
        num_seqs=8,
        window=4096,
        softcap=50.0,
    ),
    # https://huggingface.co/tiiuae/falcon-rw-1b/blob/main/config.json (MHA, ALiBi)
    ArgSpec(name="falcon-rw-1b", num_heads=32, num_kv_heads=32, head_dim=64, num_tokens=64, num_seqs=8, alibi=True),
    # https://huggingface.co/bigcode/starcoder/blob/main/config.json (MQA), in float32
    ArgSpec(
        name="starcoder-float32",
        num_heads=48,
        num_kv_heads=1,
        head_dim=128,
        num_tokens=64,
        num_seqs=8,
        dtype="float32",
        page_dtype="float32",
    ),
)
"""One call each of models that differ in what a kernel must do."""
