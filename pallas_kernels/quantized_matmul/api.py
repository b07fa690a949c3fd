"""The public function: what it takes is checked here, and here is decided what computes it."""

import importlib.util
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.chips import Chip, UnknownChipError, limits_of
from pallas_kernels.quantized_matmul import gpu, tpu
from pallas_kernels.quantized_matmul.gpu import GpuTiles
from pallas_kernels.quantized_matmul.hooks import NOTHING, Hooks
from pallas_kernels.quantized_matmul.reference import GATES, quantized_matmul_reference
from pallas_kernels.quantized_matmul.tpu import TpuTiles
from pallas_kernels.quantized_matmul.weight import QuantizedWeight

Backend = Literal["tpu", "gpu", "reference"]


class UnsupportedError(ValueError):
    """A kernel that was asked for by name, and that cannot take these arguments."""


def unsupported_reason(
    backend: Backend,
    x: jax.ShapeDtypeStruct | jax.Array,
    weight: QuantizedWeight,
    *,
    activation_group_size: int | None = None,
) -> str | None:
    """Why a backend's kernel cannot take x [..., K] and a weight [N, K]; None where it can.

    Whether tiles fit a chip is for the call itself to say.
    """
    if backend == "tpu":
        return tpu.unsupported_reason(x, weight, activation_group_size)
    if backend == "gpu":
        return gpu.unsupported_reason(x, weight, activation_group_size)
    return None


def quantized_matmul(
    x: jax.Array,
    weight: QuantizedWeight,
    hooks: Hooks = NOTHING,
    *,
    out_dtype: DTypeLike | None = None,
    backend: Backend | None = None,
    chip: Chip | None = None,
    tiles: TpuTiles | GpuTiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y = (f(gate) · x) · wᵀ + bias + residual, summed in float32: [..., N]. Traceable.

    Args:
        x: floats [..., K].
        weight: w [N, K]; in columns for the TPU kernel, in rows for the GPU kernel.
        hooks: gate and its function f, bias, residual, and whether x is rounded to 8 bits.
        out_dtype: of y, x's by default.
        backend: "tpu", "gpu" (which needs the gpu extra) or "reference"; by default the kernel of JAX's default device,
            and where it has none that takes these, the reference.
        chip: what is compiled for, by default JAX's default device; needed to compile for a TPU that is not here.
        tiles: in place of those that the model of the chip's memory chooses.
        interpret: whether to run the TPU kernel in Pallas's interpreter, for its numbers.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        UnsupportedError: `backend` has no kernel for these; `unsupported_reason` says so beforehand.
        TileError: tiles that do not fit the chip, with the numbers, before anything is compiled.
        UnknownChipError: a kernel is asked for on a device that is not in the table of chips, without `chip`.
        ImportError: "gpu" without jax-triton.
    """
    _check(x, weight, hooks)
    activation_group_size = hooks.activation_group_size
    chosen = _default_backend(x, weight, activation_group_size) if backend is None else backend
    n, k = weight.shape
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    rows = x.reshape(-1, k)
    hooks = hooks.as_matrices(n, k)
    if chosen == "reference" or not math.prod(rows.shape):
        y = quantized_matmul_reference(rows, weight, hooks, out_dtype=out)
    elif chosen in ("tpu", "gpu"):
        reason = unsupported_reason(chosen, x, weight, activation_group_size=activation_group_size)
        if reason is not None:
            raise UnsupportedError(f"quantized_matmul: {reason}; backend='reference' takes it")
        found = limits_of(jax.devices()[0]) if chip is None else chip
        if found.platform != chosen or not isinstance(tiles, (TpuTiles if chosen == "tpu" else GpuTiles) | None):
            raise ValueError(
                f"quantized_matmul: backend {chosen!r} on {found.name} with tiles {tiles}: not of one kind"
            )
        if isinstance(tiles, GpuTiles) or chosen == "gpu":
            assert not isinstance(tiles, TpuTiles)
            y = gpu.quantized_matmul_gpu(rows, weight, hooks, chip=found, tiles=tiles, out_dtype=out)
        else:
            y = tpu.quantized_matmul_tpu(
                rows, weight, hooks, chip=found, tiles=tiles, interpret=interpret, out_dtype=out
            )
    else:
        raise ValueError(f"quantized_matmul: backend must be 'tpu', 'gpu' or 'reference', got {chosen!r}")
    return y.reshape(*x.shape[:-1], n)


def _default_backend(x: jax.Array, weight: QuantizedWeight, activation_group_size: int | None) -> Backend:
    try:
        chip = limits_of(jax.devices()[0])
    except UnknownChipError:
        return "reference"
    if unsupported_reason(chip.platform, x, weight, activation_group_size=activation_group_size) is not None:
        return "reference"
    if chip.platform == "gpu" and importlib.util.find_spec("jax_triton") is None:
        return "reference"
    return chip.platform


def _check(x: jax.Array, weight: QuantizedWeight, hooks: Hooks) -> None:
    gate, gate_function, bias, residual = hooks.gate, hooks.gate_function, hooks.bias, hooks.residual
    activation_group_size, activation_scales = hooks.activation_group_size, hooks.activation_scales
    problem = weight.problem()
    if problem is not None:
        raise ValueError(f"quantized_matmul: weight: {problem}")
    n, k = weight.shape
    if not x.ndim or x.shape[-1] != k or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantized_matmul: x: expected floats [..., {k}], got {x.dtype}{list(x.shape)}")
    if gate_function not in GATES:
        raise ValueError(f"quantized_matmul: gate_function must be one of {', '.join(GATES)}, got {gate_function!r}")
    if gate is not None and (gate.shape, gate.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"quantized_matmul: gate: expected {x.dtype}{list(x.shape)} as x is, got {gate.dtype}{list(gate.shape)}"
        )
    if activation_group_size is not None and (activation_group_size < 1 or k % activation_group_size):
        raise ValueError(
            f"quantized_matmul: activation_group_size must divide the {k} inputs, got {activation_group_size}"
        )
    if activation_scales is not None:
        if activation_group_size is None:
            raise ValueError("quantized_matmul: activation_scales need an activation_group_size beside them")
        if activation_scales.shape != (k // activation_group_size,):
            raise ValueError(
                f"quantized_matmul: activation_scales: expected [{k // activation_group_size}], "
                f"got {list(activation_scales.shape)}"
            )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"quantized_matmul: bias: expected [{n}], got {list(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:-1], n):
        raise ValueError(f"quantized_matmul: residual: expected {[*x.shape[:-1], n]}, got {list(residual.shape)}")


__all__ = ["Backend", "UnsupportedError", "quantized_matmul", "unsupported_reason"]
