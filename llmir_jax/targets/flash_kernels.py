"""`llm.attention` of whole sequences by the kernels of `pallas_kernels.flash_attention`."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, shape_of
from llmir_jax.dialects.llm.common import bool_of, float_of, optional_float_of, optional_int_of
from llmir_jax.targets.gpu import missing_triton
from llmir_jax.targets.reference import Reference, matmul_precision
from pallas_kernels.chips import Chip
from pallas_kernels.flash_attention import Masking, Sizes, flash_attention, unsupported_reason
from pallas_kernels.flash_attention.api import Backend

BACKENDS: dict[str, tuple[Backend, ...]] = {"tpu": ("tpu",), "gpu": ("cudnn", "gpu")}
"""By the platform of a chip: backends, the first that serves an attention is taken."""


@dataclass(frozen=True, kw_only=True)
class FlashChoice:
    """Which backend serves an attention."""

    backend: Backend | None
    reason: str = ""
    """Why none does, where none does; why not the backends before it, where one does."""


def choose_flash(op: llm.AttentionOp, chip: Chip, batch: int) -> FlashChoice:
    """The first of the chip's backends that takes the attention, or why none does.

    `batch`: how many sequences are among its heads.
    """
    batch = _split(op, batch)
    (seq_len, num_heads, head_dim), (_, num_kv_heads, value_dim) = shape_of(op.q), shape_of(op.v)
    sizes = Sizes(
        batch=batch,
        seq_len=seq_len,
        num_heads=num_heads // batch,
        num_kv_heads=num_kv_heads // batch,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=_common_dtype(op),
        has_slopes=op.slopes is not None,
    )
    reasons: list[str] = []
    for backend in BACKENDS[chip.platform]:
        reason = unsupported_reason(sizes, _masking(op), backend, chip)
        if reason is None and backend == "gpu":
            reason = missing_triton()
        if reason is None:
            return FlashChoice(backend=backend, reason="; ".join(reasons))
        reasons.append(reason)
    return FlashChoice(backend=None, reason="; ".join(reasons))


def flash_function(op: llm.AttentionOp, choice: FlashChoice, chip: Chip, *, interpret: bool, batch: int) -> Reference:
    """The function of q, k, v [T, H, D] each, and slopes [H] where there are any; arguments as of `choose_flash`."""
    batch, backend = _split(op, batch), choice.backend
    assert backend is not None, "why not was to be asked"
    masking, dtype, out_dtype = _masking(op), _common_dtype(op), dtype_of(op.output)
    options: dict[str, Any] = {"chip": chip, **({"interpret": True} if interpret else {})}

    def run(q: Array, k: Array, v: Array, slopes: Array | None = None) -> Array:
        split = ((x.shape[0], batch, x.shape[1] // batch, x.shape[2]) for x in (q, k, v))
        parts = (x.astype(dtype).reshape(shape).swapaxes(0, 1) for x, shape in zip((q, k, v), split, strict=True))
        with matmul_precision(op):
            out = flash_attention(
                *parts,
                scale=masking.scale,
                causal=masking.causal,
                window=masking.window,
                softcap=masking.softcap,
                slopes=slopes,
                backend=backend,
                **options,
            )
        return out.swapaxes(0, 1).reshape(*q.shape[:2], -1).astype(out_dtype)

    return run


def _split(op: llm.AttentionOp, batch: int) -> int:
    """In how many sequences the heads are served: those of one KV head stay together, and slopes are of all heads."""
    return batch if op.slopes is None and shape_of(op.k)[1] % batch == 0 else 1


def _masking(op: llm.AttentionOp) -> Masking:
    return Masking(
        scale=float_of(op.scale),
        causal=bool_of(op.causal),
        window=optional_int_of(op.window),
        softcap=optional_float_of(op.softcap),
    )


def _common_dtype(op: llm.AttentionOp) -> np.dtype[Any]:
    return np.dtype(jnp.promote_types(dtype_of(op.q), jnp.promote_types(dtype_of(op.k), dtype_of(op.v))))


__all__ = ["FlashChoice", "choose_flash", "flash_function"]
