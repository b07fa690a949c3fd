"""What the kernels compute, in plain JAX: y = x · wᵀ with x gated, and rounded where it is asked for.

    x ← f(gate) · x                                                     where there is a gate
    x ← s · clip(round(x / s), -127, 127), s = max|x of its group| / 127  where activations have 8 bits
    y = x · wᵀ + bias + residual

Sums are in float32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_matmul.hooks import Hooks
from pallas_kernels.quantized_matmul.weight import QuantizedWeight

GATES: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "silu": lambda x: x * (1 / (1 + jnp.exp(-x))),
        "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
        "relu": lambda x: jnp.maximum(x, 0),
    }
)
"""Functions of a gate, float32 to float32, of operations that every kernel language has. 0.79788… is √(2 / π)."""


def gated(x: jax.Array, gate: jax.Array, function: str) -> jax.Array:
    """f(gate) · x in float32, as x's dtype."""
    return (GATES[function](gate.astype(jnp.float32)) * x.astype(jnp.float32)).astype(x.dtype)


def quantize_activations(x: jax.Array, group_size: int, scales: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """x [M, K] as int8 [M, K] and scales float32 [M, K / group_size], or the given [K / group_size] for all rows."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, group_size)
    if scales is None:
        found = jnp.max(jnp.abs(groups), axis=-1) / 127
    else:
        found = jnp.broadcast_to(scales.astype(jnp.float32), groups.shape[:2])
    q = jnp.clip(jnp.round(groups / jnp.where(found > 0, found, 1)[:, :, None]), -127, 127)
    return q.astype(jnp.int8).reshape(x.shape), found


def quantized_matmul_reference(
    x: jax.Array,
    weight: QuantizedWeight,
    hooks: Hooks,
    *,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """y [M, N] of x [M, K]."""
    if hooks.gate is not None:
        x = gated(x, hooks.gate, hooks.gate_function)
    wide = x.astype(jnp.float32)
    if hooks.activation_group_size is not None:
        q, scales = quantize_activations(x, hooks.activation_group_size, hooks.activation_scales)
        wide = (q.reshape(*scales.shape, -1) * scales[:, :, None]).reshape(x.shape)
    y = jnp.matmul(wide, weight.dequantize().T, precision=lax.Precision.HIGHEST)
    if hooks.bias is not None:
        y = y + hooks.bias.astype(jnp.float32)
    if hooks.residual is not None:
        y = y + hooks.residual.astype(jnp.float32)
    return y.astype(out_dtype)


__all__ = ["GATES", "gated", "quantize_activations", "quantized_matmul_reference"]
