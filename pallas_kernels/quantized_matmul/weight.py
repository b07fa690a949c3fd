"""A matrix of small integers with the numbers that turn them back into floats, as the kernels take it."""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp

Layout = Literal["rows", "columns"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A matrix w [N, K] (outputs, inputs) in integers q of 4 or 8 bits; G groups of g = K / G inputs share a scale.

        symmetric    w[n, k] = q[n, k] · scales[n, k // g]                             q signed
        zero points  w[n, k] = (q[n, k] - zero_points[n, k // g]) · scales[n, k // g]  q signed
        minima       w[n, k] = q[n, k] · scales[n, k // g] + minima[n, k // g]         q unsigned

    In columns, for TPUs: values [K, N] of JAX's int4, int8 (uint4, uint8 with minima), all others [G, N].
    In rows, for GPUs: values uint8 [N, K / 2] of 4 bits, q[n, 2i] in the low ones of byte i; int8 (uint8) [N, K] of 8;
    all others [N, G]. Scales and minima are float16, bfloat16 or float32, finite; zero points int8.
    """

    values: jax.Array
    scales: jax.Array
    zero_points: jax.Array | None = None
    minima: jax.Array | None = None
    bits: int = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, inputs."""
        rows, columns = self.values.shape
        if self.layout == "columns":
            return columns, rows
        return rows, columns * (2 if self.bits == 4 else 1)

    @property
    def num_groups(self) -> int:
        """Scales of one output."""
        return int(self.scales.shape[0 if self.layout == "columns" else 1])

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.num_groups

    def problem(self) -> str | None:
        """Why these arrays are no such matrix; None where they are."""
        if self.bits not in (4, 8) or self.layout not in ("rows", "columns"):
            return f"expected 4 or 8 bits in rows or columns, got {self.bits} in {self.layout!r}"
        if self.values.ndim != 2 or self.scales.ndim != 2:
            return f"expected matrices, got values {list(self.values.shape)} and scales {list(self.scales.shape)}"
        if self.zero_points is not None and self.minima is not None:
            return "expected zero points or minima, got both"
        n, k = self.shape
        if not self.num_groups or k % self.num_groups:
            return f"expected groups that divide the {k} inputs, got {self.num_groups} scales an output"
        unsigned = "u" if self.minima is not None else ""
        packed = self.layout == "rows" and self.bits == 4
        dtype = "uint8" if packed else f"{unsigned}int{self.bits}"
        if self.values.dtype.name != dtype:
            return f"expected values of {dtype}, got {self.values.dtype}"
        if self.scales.dtype.name not in ("float16", "bfloat16", "float32"):
            return f"expected scales of float16, bfloat16 or float32, got {self.scales.dtype}"
        groups = (self.num_groups, n) if self.layout == "columns" else (n, self.num_groups)
        for name, part, part_dtype in (
            ("scales", self.scales, self.scales.dtype.name),
            ("zero points", self.zero_points, "int8"),
            ("minima", self.minima, self.scales.dtype.name),
        ):
            if part is not None and (part.shape, part.dtype.name) != (groups, part_dtype):
                return f"expected {name} {part_dtype}{list(groups)}, got {part.dtype}{list(part.shape)}"
        return None

    def integers(self) -> jax.Array:
        """q [N, K], int32."""
        if self.layout == "columns":
            return self.values.T.astype(jnp.int32)
        q = self.values.astype(jnp.int32)
        if self.bits == 8:
            return q
        halves = jnp.stack([q & 15, q >> 4], axis=-1).reshape(q.shape[0], -1)
        return halves if self.minima is not None else (halves ^ 8) - 8

    def side(self) -> tuple[jax.Array, jax.Array | None]:
        """Scales [N, G], and what is added to the products with them (-zero point · scale, or minimum); float32."""
        turn = jnp.transpose if self.layout == "columns" else jnp.asarray
        scales = turn(self.scales).astype(jnp.float32)
        if self.minima is not None:
            return scales, turn(self.minima).astype(jnp.float32)
        if self.zero_points is not None:
            return scales, -turn(self.zero_points).astype(jnp.float32) * scales
        return scales, None

    def dequantize(self) -> jax.Array:
        """w [N, K], float32."""
        scales, offsets = self.side()
        groups = self.integers().reshape(self.shape[0], self.num_groups, -1) * scales[:, :, None]
        return (groups if offsets is None else groups + offsets[:, :, None]).reshape(self.shape)


__all__ = ["Layout", "QuantizedWeight"]
