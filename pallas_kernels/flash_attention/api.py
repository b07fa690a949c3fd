"""Flash attention: whole sequences attend to themselves, with no more memory than their queries, keys and values."""

import math
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from pallas_kernels.chips import Chip
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.flash_attention.types import FlashAttentionError, Masking, Sizes

Backend = Literal["reference", "tpu", "cudnn", "gpu"]
BACKENDS = ("reference", "tpu", "cudnn", "gpu")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Array | None = None,
    backend: Backend = "reference",
    **options: Any,
) -> Array:
    """Attention of each sequence of a batch to itself. Sequences may have any length, which kernels pad for.

    Args:
        q: [B, T, H, D], float32, bfloat16 or float16.
        k: [B, T, Hkv, D] of q's dtype; query head h reads KV head h // (H / Hkv).
        v: [B, T, Hkv, Dv] of q's dtype.
        scale: of q·k; None for 1/√D.
        causal: a query sees no later position.
        window: a query sees keys at positions > its own − window: with `causal` that many, its own included.
        softcap: scores become softcap · tanh(score / softcap).
        slopes: float [H], added to scores times (key position − query position): ALiBi.
        backend: which kernel; see `unsupported_reason` for whether it takes these arguments. "tpu" is JAX's splash
            attention, "cudnn" cuDNN's, "gpu" a Triton kernel, which alone has no gradients.
        options: of the backend: see `tpu.flash_attention_tpu`, `gpu.flash_attention_gpu`.

    Returns:
        [B, T, H, Dv] of q's dtype.

    Raises:
        FlashAttentionError: shapes or dtypes that do not fit together, or that this backend does not take.
    """
    _check_rank(q=q, k=k, v=v)
    masking = Masking(
        scale=q.shape[3] ** -0.5 if scale is None else scale, causal=causal, window=window, softcap=softcap
    )
    sizes = check_arguments(q, k, v, masking, slopes)
    if backend not in BACKENDS:
        raise FlashAttentionError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if (reason := unsupported_reason(sizes, masking, backend, options.get("chip"))) is not None:
        raise FlashAttentionError(f"flash_attention on {backend}: {reason}; use backend='reference'")
    if backend == "reference":
        if options:
            raise FlashAttentionError(f"backend 'reference' has no option {', '.join(options)}")
        return flash_attention_reference(q, k, v, masking, slopes)
    kernel = getattr(_module(backend), f"flash_attention_{backend}")
    result: Array = kernel(q, k, v, masking, slopes, **options)
    return result


def _module(backend: Backend) -> ModuleType:
    """The backend's file, imported when it is asked for: each needs libraries that the others do not."""
    return import_module(f"pallas_kernels.flash_attention.{backend}")


def unsupported_reason(sizes: Sizes, masking: Masking, backend: Backend, chip: Chip | None = None) -> str | None:
    """None if the backend's kernel takes arguments of these sizes, else why not, with the numbers.

    `chip`: what it is compiled for; None for JAX's first device.
    """
    if backend == "reference":
        return None
    reason: str | None = _module(backend).unsupported_reason(sizes, masking, chip)
    return reason


def check_arguments(q: Array, k: Array, v: Array, masking: Masking, slopes: Array | None) -> Sizes:
    """The sizes of arguments that fit together. Raises FlashAttentionError, naming the argument, where they do not."""
    _check_rank(q=q, k=k, v=v)
    sizes = Sizes.of(q, k, v, slopes)
    if min(sizes.batch, sizes.seq_len, sizes.head_dim, sizes.value_dim) < 1:
        raise FlashAttentionError(f"q, v: expected dimensions of at least 1, got {list(q.shape)}, {list(v.shape)}")
    if sizes.num_kv_heads < 1 or sizes.num_heads % sizes.num_kv_heads:
        raise FlashAttentionError(
            f"q: expected a number of heads that is a multiple of the {sizes.num_kv_heads} KV heads, "
            f"got {sizes.num_heads}"
        )
    rows = (sizes.batch, sizes.seq_len, sizes.num_kv_heads)
    _check("q", q, q.shape, FLOAT_DTYPES)
    _check("k", k, (*rows, sizes.head_dim), (sizes.dtype.name,))
    _check("v", v, (*rows, sizes.value_dim), (sizes.dtype.name,))
    if slopes is not None:
        _check("slopes", slopes, (sizes.num_heads,), FLOAT_DTYPES)
    if not math.isfinite(masking.scale):
        raise FlashAttentionError(f"scale: expected a finite number, got {masking.scale}")
    if masking.window is not None and masking.window < 1:
        raise FlashAttentionError(f"window: expected at least 1 position, got {masking.window}")
    if masking.softcap is not None and not (math.isfinite(masking.softcap) and masking.softcap > 0):
        raise FlashAttentionError(f"softcap: expected a positive finite number, got {masking.softcap}")
    return sizes


def _check_rank(**arrays: Array) -> None:
    for name, array in arrays.items():
        if array.ndim != 4:
            raise FlashAttentionError(f"{name}: expected 4 dimensions, got shape {list(array.shape)}")


def _check(name: str, array: Array, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    dtype = jnp.dtype(array.dtype).name
    if tuple(array.shape) != shape:
        raise FlashAttentionError(f"{name}: expected shape {list(shape)}, got {list(array.shape)}")
    if dtype not in dtypes:
        raise FlashAttentionError(f"{name}: expected {' or '.join(dtypes)}, got {dtype}")


__all__ = ["Backend", "check_arguments", "flash_attention", "unsupported_reason"]
