"""Rotary position embedding: the frequencies of every published scaling we support, and the rotation itself.

Source: https://arxiv.org/abs/2104.09864; the Llama 3 scaling is described with the Llama 3.1 release.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated by their wavelength."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True, kw_only=True)
class FrequencyFactors:
    """One divisor for each frequency, as GGUF files store them (`rope_freqs.weight`)."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | FrequencyFactors


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position turns each pair of channels by: float32[head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs: np.ndarray = np.float32(1.0) / np.float32(theta) ** exponents
    if isinstance(scaling, LinearScaling):
        freqs = freqs / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        wavelengths = 2 * math.pi / freqs
        # 0 at the longest wavelength that is scaled in full, 1 at the shortest that is left alone.
        smooth = (scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        freqs = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    elif isinstance(scaling, FrequencyFactors):
        freqs = freqs / np.asarray(scaling.factors, np.float32)
    return freqs.astype(np.float32)


def rotation_angles(positions: jax.Array, inv_freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32[T, head_dim / 2] each, for int32 positions[T]."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(inv_freq)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn channel i with channel i + head_dim / 2 of x[B, T, heads, head_dim] by its angle, computed in float32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, head_dim / 2]: the same for every head
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
