"""Shapes that tests and benchmarks share: the matrices of published models, and random weights for any shape."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.weight import Layout, QuantizedWeight


@dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One call."""

    name: str
    m: int
    n: int
    k: int
    bits: int
    group_size: int | None
    """None: per channel."""
    kind: str
    """"symmetric", "zero_points" or "minima"."""
    activation_group_size: int | None = None
    """None: activations are floats."""
    x_dtype: str = "bfloat16"
    scale_dtype: str = "float16"


SPECS: tuple[ArgSpec, ...] = (
    ArgSpec(name="smollm2 down, decode", m=1, n=576, k=1536, bits=4, group_size=32, kind="minima"),
    ArgSpec(name="smollm2 up w4a8", m=4, n=1536, k=576, bits=4, group_size=32, kind="minima", activation_group_size=32),
    ArgSpec(name="llama3-8b qkv, decode", m=8, n=6144, k=4096, bits=4, group_size=64, kind="zero_points"),
    ArgSpec(name="llama3-8b down, decode", m=16, n=4096, k=14336, bits=4, group_size=128, kind="symmetric"),
    ArgSpec(name="llama3-8b gate, prefill", m=512, n=14336, k=4096, bits=4, group_size=32, kind="minima"),
    ArgSpec(name="llama3-8b int8, prefill", m=512, n=4096, k=4096, bits=8, group_size=None, kind="symmetric"),
    ArgSpec(
        name="llama3-8b w8a8 a token, prefill", m=512, n=4096, k=4096, bits=8, group_size=None, kind="zero_points",
        activation_group_size=4096,
    ),
    ArgSpec(
        name="llama3-8b w8a8 g32, prefill", m=256, n=4096, k=4096, bits=8, group_size=32, kind="symmetric",
        activation_group_size=32,
    ),
    ArgSpec(
        name="llama3-8b int8 minima w8a8, decode", m=8, n=4096, k=4096, bits=8, group_size=64, kind="minima",
        activation_group_size=4096, x_dtype="float32", scale_dtype="bfloat16",
    ),
)  # fmt: skip


def random_weight(
    n: int, k: int, *, bits: int, group_size: int | None, kind: str, scale_dtype: str, layout: Layout, seed: int
) -> QuantizedWeight:
    """A weight [n, k] with every integer of its width, and scales that make it of order 1 / sqrt(k)."""
    rng = np.random.default_rng(seed)
    low, high = (0, 2**bits) if kind == "minima" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    q = rng.integers(low, high, (n, k))
    groups = (n, 1 if group_size is None else k // group_size)
    scales = rng.uniform(0.5, 1.5, groups) * 2.0 ** (1 - bits) / np.sqrt(k)
    unsigned = "u" if kind == "minima" else ""

    def part(values: np.ndarray[Any, Any], dtype: str) -> jax.Array:
        # NumPy converts, for whose conversions nothing is compiled.
        return jnp.asarray((values.T if layout == "columns" else values).astype(jnp.dtype(dtype)))

    stored = f"{unsigned}int{bits}"
    if layout == "rows" and bits == 4:
        q, stored = (q[:, 0::2] & 15) | ((q[:, 1::2] & 15) << 4), "uint8"
    return QuantizedWeight(
        values=part(q, stored),
        scales=part(scales, scale_dtype),
        zero_points=part(rng.integers(low, high, groups), "int8") if kind == "zero_points" else None,
        minima=part(-scales * 2.0 ** (bits - 1), scale_dtype) if kind == "minima" else None,
        bits=bits,
        layout=layout,
    )


__all__ = ["SPECS", "ArgSpec", "random_weight"]
