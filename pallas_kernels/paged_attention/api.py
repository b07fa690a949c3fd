"""Ragged paged attention: writes a step's keys and values to their pages and attends to what the pages then hold."""

import math
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array

from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.types import KVPages, Masking, PagedAttentionError, RaggedBatch, Sizes

Backend = Literal["reference", "tpu", "gpu", "mosaic_gpu"]
"""Plain JAX, Pallas on TPUs, Triton on GPUs, and Pallas through Mosaic GPU, on those of compute capability 9.0."""
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
PAGE_DTYPES = (*FLOAT_DTYPES, "int8")


def paged_attention(
    q: Array,
    k: Array,
    v: Array,
    pages: KVPages,
    batch: RaggedBatch,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Array | None = None,
    backend: Backend = "reference",
    **options: Any,
) -> tuple[Array, KVPages]:
    """Attention of the tokens of several sequences, prompts in chunks and single tokens mixed, over a paged cache.

    Args:
        q: [T, H, D], float32, bfloat16, or for all but tpu float16. Rows that `batch` gives to no sequence are padding:
            their results are 0.
        k, v: [T, Hkv, D], of q's dtype, written to their pages first. H is a multiple of Hkv.
        pages: one layer's pages. Donate them: a kernel updates them in place.
        batch: block tables, lengths, and which rows are whose.
        scale: of q·k.
        causal: a query sees no later position.
        window: a query sees that many positions, its own included.
        softcap: scores become softcap · tanh(score / softcap).
        slopes: float32 [H], added to scores times (key position − query position): ALiBi.
        backend: which kernel; see `unsupported_reason` for whether it takes these arguments.
        options: of the backend: see `tpu.paged_attention_tpu`, `gpu.paged_attention_gpu` and
            `mosaic_gpu.paged_attention_mosaic_gpu`.

    Returns:
        [T, H, D] of q's dtype, and the new pages.

    Raises:
        PagedAttentionError: shapes or dtypes that do not fit together, or that this backend does not take.
    """
    sizes = check_arguments(q, k, v, pages, batch, scale=scale, window=window, softcap=softcap, slopes=slopes)
    masking = Masking(scale=scale, causal=causal, window=window, softcap=softcap)
    if backend not in get_args(Backend):
        raise PagedAttentionError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    if (reason := unsupported_reason(sizes, backend)) is not None:
        raise PagedAttentionError(f"paged_attention on {backend}: {reason}; use backend='reference'")
    if backend == "reference":
        if options:
            raise PagedAttentionError(f"backend 'reference' has no option {', '.join(options)}")
        return paged_attention_reference(q, k, v, pages, batch, masking, slopes)
    kernel = getattr(_module(backend), f"paged_attention_{backend}")
    result: tuple[Array, KVPages] = kernel(q, k, v, pages, batch, masking, slopes, **options)
    return result


def _module(backend: Backend) -> ModuleType:
    """The backend's file, imported when it is asked for: each needs libraries that the others do not."""
    return import_module(f"pallas_kernels.paged_attention.{backend}")


def unsupported_reason(sizes: Sizes, backend: Backend) -> str | None:
    """None if the backend's kernel takes arguments of these sizes, else why not, with the numbers."""
    if backend == "reference":
        return None
    reason: str | None = _module(backend).unsupported_reason(sizes)
    return reason


def check_arguments(
    q: Array,
    k: Array,
    v: Array,
    pages: KVPages,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes: Array | None,
) -> Sizes:
    """The sizes of arguments that fit together. Raises PagedAttentionError, naming the argument, where they do not."""
    _check_rank(q=(q, 3), k=(k, 3), k_pages=(pages.k, 3), block_tables=(batch.block_tables, 2))
    sizes = Sizes.of(q, k, pages, batch)
    if sizes.num_kv_heads < 1 or sizes.num_heads % sizes.num_kv_heads:
        raise PagedAttentionError(
            f"q: expected a number of heads that is a multiple of the {sizes.num_kv_heads} KV heads, "
            f"got {sizes.num_heads}"
        )
    new = (sizes.num_tokens, sizes.num_kv_heads, sizes.head_dim)
    heads = sizes.num_kv_heads * sizes.head_dim
    stored = (sizes.num_pages, sizes.page_size, max(heads, pages.k.shape[2]))
    seqs = (sizes.num_seqs,)
    _check("q", q, q.shape, FLOAT_DTYPES)
    _check("k", k, new, (sizes.q_dtype.name,))
    _check("v", v, new, (sizes.q_dtype.name,))
    _check("k pages", pages.k, stored, PAGE_DTYPES)
    _check("v pages", pages.v, stored, (sizes.page_dtype.name,))
    _check("block_tables", batch.block_tables, (*seqs, sizes.pages_per_seq), ("int32",))
    _check("seq_lens", batch.seq_lens, seqs, ("int32",))
    _check("query_starts", batch.query_starts, seqs, ("int32",))
    _check("query_lens", batch.query_lens, seqs, ("int32",))
    for name, scales in (("k_scales", pages.k_scales), ("v_scales", pages.v_scales)):
        if (scales is not None) != (sizes.page_dtype == jnp.int8):
            raise PagedAttentionError(
                f"{name}: expected with int8 pages and only with them, got {'none' if scales is None else 'some'} "
                f"with {sizes.page_dtype} pages"
            )
        if scales is not None:
            _check(name, scales, (sizes.num_pages, sizes.num_kv_heads, sizes.page_size), ("float32",))
    if slopes is not None:
        _check("slopes", slopes, (sizes.num_heads,), FLOAT_DTYPES)
    if not math.isfinite(scale):
        raise PagedAttentionError(f"scale: expected a finite number, got {scale}")
    if window is not None and window < 1:
        raise PagedAttentionError(f"window: expected at least 1 position, got {window}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise PagedAttentionError(f"softcap: expected a positive finite number, got {softcap}")
    return sizes


def _check_rank(**arrays: tuple[Array, int]) -> None:
    for name, (array, rank) in arrays.items():
        if array.ndim != rank:
            raise PagedAttentionError(f"{name}: expected {rank} dimensions, got shape {list(array.shape)}")


def _check(name: str, array: Array, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    dtype = jnp.dtype(array.dtype).name
    if tuple(array.shape) != shape:
        raise PagedAttentionError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
    if dtype not in dtypes:
        raise PagedAttentionError(f"{name}: expected {' or '.join(dtypes)}, got {dtype}")
