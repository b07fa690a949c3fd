"""What is done around a product, by the kernels themselves: with x before, with y after."""

from dataclasses import dataclass, field, replace

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Hooks:
    """y = (f(gate) · x) · wᵀ + bias + residual, of which each part may be missing; x may be rounded to 8 bits first.

    A pytree, whose arrays JAX traces.
    """

    gate: jax.Array | None = None
    """Of x's shape [..., K] and dtype; x is multiplied with f of it first (f(gate) · up, then down)."""
    activation_scales: jax.Array | None = None
    """float32 [K / activation_group_size], in place of the largest values, for every row."""
    bias: jax.Array | None = None
    """Floats [N]."""
    residual: jax.Array | None = None
    """Floats [..., N]."""
    gate_function: str = field(default="silu", metadata={"static": True})
    """f: "silu", "gelu_tanh" or "relu"."""
    activation_group_size: int | None = field(default=None, metadata={"static": True})
    """Round x to 8 bits, so many of its elements along K by their largest value (K: each row); None: not at all."""

    def as_matrices(self, n: int, k: int) -> "Hooks":
        """The same with gate [M, K] and residual [M, N]."""
        return replace(
            self,
            gate=None if self.gate is None else self.gate.reshape(-1, k),
            residual=None if self.residual is None else self.residual.reshape(-1, n),
        )


NOTHING = Hooks()

__all__ = ["NOTHING", "Hooks"]
