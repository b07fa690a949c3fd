"""y = x · w for a weight of int4 or int8 in columns, a Pallas kernel for TPUs.

The grid runs over tiles [tile_m, tile_n] of y, columns of tiles innermost, so that a tile of x stays in VMEM while the
weight streams by, K whole. Within a tile, K goes in chunks:

    per channel    acc += x[:, chunk] · q[chunk];  y = acc · scale
    few rows       x is spread to [groups · tile_m, chunk], each copy zero outside of its group, so that one product has
                   the sums of every group apart: acc += Σ_j (spread_j · q) · scale_j. The scales then multiply
                   tile_m / group_size numbers a weight, not one.
    many rows      w = q · scale is rounded to x's dtype first: acc += x[:, chunk] · w
    int8 x         as "few rows", for sums of integers end where a scale of x or of w does

Zero points and minima add Σ_groups (sum of x over the group) · offset, [M, G] · [G, N] in float32.

Mosaic has no float16: such scales and minima come as the bits, int16, and are converted with integer operations. Where
the matrix units take no integers (TPU7x) int8 activations are multiplied as bfloat16, which holds them exactly.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip
from pallas_kernels.quantized_matmul.hooks import Hooks
from pallas_kernels.quantized_matmul.reference import gated, quantize_activations
from pallas_kernels.quantized_matmul.weight import QuantizedWeight
from pallas_kernels.tiles import LANES, Buffer, check_fits, choose, num_bits, round_up, usable_bytes

STEP_SECONDS = 0.35e-6
"""What a step of a grid costs beside its work ("Pallas TPU: pipelining", docs.jax.dev). Only to rank tiles."""
MAX_SPREAD_ROWS = 512
"""Rows of the spread x at most: of one product of a chunk."""


@dataclass(frozen=True, kw_only=True)
class TpuTiles:
    """Rows and columns of y that one step computes; both a multiple of what the dtypes are stored in."""

    tile_m: int
    tile_n: int


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Everything that is static."""

    m: int
    n: int
    k: int
    num_groups: int
    bits: int
    x_dtype: str  # int8 where activations are
    compute_dtype: str  # of the operands of products
    scale_dtype: str
    offset: str | None  # "zero_points", "minima"
    num_activation_groups: int  # 0 where activations are floats
    has_gate: bool
    gate_function: str
    has_bias: bool
    has_residual: bool
    out_dtype: str

    @property
    def span(self) -> int:
        """Inputs over which neither the scale of w nor that of x changes."""
        return self.k // max(self.num_groups, self.num_activation_groups)

    def rounds_weights(self, tile_m: int) -> bool:
        """Whether w = q · scale comes before the product."""
        return not self.num_activation_groups and self.num_groups > 1 and 2 * tile_m > self.span

    def chunk(self, tile_m: int) -> int:
        """Inputs that one product takes."""
        if self.span == self.k or self.rounds_weights(tile_m):
            return min(self.k, round_up(512, math.lcm(self.span if self.span < self.k else 1, LANES)))
        spans = max(1, min(512, self.span * (MAX_SPREAD_ROWS // tile_m)) // self.span)
        return min(self.k, round_up(spans * self.span, math.lcm(self.span, LANES)))


def unsupported_reason(
    x: jax.ShapeDtypeStruct | jax.Array, weight: QuantizedWeight, activation_group_size: int | None = None
) -> str | None:
    """Why this kernel cannot take these; None where it can."""
    if weight.layout != "columns":
        return f"the TPU kernel takes weights in columns, got {weight.layout}"
    if x.dtype.name not in ("bfloat16", "float32"):
        return f"the TPU kernel takes activations of bfloat16 or float32, got {x.dtype}"
    k = weight.shape[1]
    if k % 32:
        return f"the TPU kernel takes a number of inputs that 32 divides, got {k}"
    if weight.num_groups > 1 and weight.group_size % 32:
        return f"the TPU kernel takes groups of multiples of 32, got {weight.group_size}"
    if activation_group_size is None:
        return None
    sizes = weight.group_size, activation_group_size
    if max(sizes) % min(sizes) or (activation_group_size != k and activation_group_size % 32):
        return (
            "the TPU kernel takes activation groups that are multiples of 32, and that divide a weight's groups or are "
            f"made of them; got {activation_group_size} for {weight.group_size}"
        )
    return None


def buffers_of(plan: _Plan, tiles: TpuTiles) -> list[Buffer]:
    bm, bn, k, groups = tiles.tile_m, tiles.tile_n, plan.k, plan.num_groups
    chunk = plan.chunk(bm)
    spread = 1 if plan.span == k or plan.rounds_weights(bm) else max(1, chunk // plan.span)
    stored_scale = "int16" if plan.scale_dtype == "float16" else plan.scale_dtype
    buffers = [
        Buffer(name="x", shape=(bm, k), dtype=plan.x_dtype, copies=4 if plan.has_gate else 2),
        Buffer(name="weight", shape=(k, bn), dtype="int4" if plan.bits == 4 else "int8", copies=2),
        Buffer(name="scales", shape=(groups, bn), dtype=stored_scale, copies=2),
        Buffer(name="float scales", shape=(groups, bn), dtype="float32"),
        Buffer(name="sum", shape=(bm, bn), dtype="float32"),
        Buffer(name="y", shape=(bm, bn), dtype=plan.out_dtype, copies=4 if plan.has_residual else 2),
        Buffer(name="wide weight", shape=(chunk, bn), dtype="float32", copies=2),
        Buffer(name="weight to multiply", shape=(chunk, bn), dtype=plan.compute_dtype),
        Buffer(name="spread x", shape=(spread * bm, chunk), dtype="float32", copies=2),
        Buffer(name="products", shape=(spread * bm, bn), dtype="float32", copies=2),
    ]
    if plan.offset:
        dtype = "int8" if plan.offset == "zero_points" else stored_scale
        buffers.append(Buffer(name=plan.offset, shape=(groups, bn), dtype=dtype, copies=2))
        buffers.append(Buffer(name="offsets", shape=(groups, bn), dtype="float32", copies=3))
        buffers.append(Buffer(name="sums of x", shape=(bm, groups), dtype="float32", copies=3))
    if plan.num_activation_groups:
        buffers.append(Buffer(name="scales of x", shape=(bm, plan.num_activation_groups), dtype="float32", copies=3))
    if plan.has_bias:
        buffers.append(Buffer(name="bias", shape=(1, bn), dtype="float32", copies=2))
    if plan.has_gate:
        buffers.append(Buffer(name="gated x", shape=(bm, k), dtype="float32", copies=3))
    return buffers


def _seconds(plan: _Plan, tiles: TpuTiles, chip: Chip) -> float:
    """A model of the time, to rank tiles by: each weight fetched beside the products before it, the first alone."""
    core = chip.per_device
    steps_m, steps_n = -(-plan.m // tiles.tile_m), -(-plan.n // tiles.tile_n)
    weight = plan.k * tiles.tile_n * plan.bits / 8 / core.memory_bandwidth
    depth = plan.chunk(tiles.tile_m) // plan.span if plan.span < plan.k and not plan.rounds_weights(tiles.tile_m) else 1
    products = 2 * depth * tiles.tile_m * tiles.tile_n * plan.k / core.peak_flops["bfloat16"]
    return weight + steps_m * steps_n * (max(weight, products) + STEP_SECONDS)


REMEDY = "give smaller `tiles`, or split the matrix along its inputs"


def _tiles(plan: _Plan, chip: Chip, given: TpuTiles | None) -> TpuTiles:
    rows = 32 if plan.x_dtype == "int8" else 16
    subject = f"quantized_matmul {plan.x_dtype}[{plan.m}, {plan.k}] · int{plan.bits}[{plan.k}, {plan.n}]"
    if given is not None:
        if given.tile_m % rows or given.tile_n % LANES or given.tile_m < 1 or given.tile_n < 1:
            raise ValueError(
                f"{subject}: tile_m must be a multiple of {rows} and tile_n of {LANES}, "
                f"got {given.tile_m} and {given.tile_n}"
            )
        check_fits(f"{subject}, tiles {given.tile_m} × {given.tile_n}", buffers_of(plan, given), chip, REMEDY)
        return given
    return choose(subject, candidates(plan.m, plan.n, plan.x_dtype), functools.partial(buffers_of, plan),
                  functools.partial(_seconds, plan, chip=chip), chip, REMEDY)  # fmt: skip


def candidates(m: int, n: int, x_dtype: str) -> list[TpuTiles]:
    """Tiles worth trying, from which a model or a measurement takes one."""
    rows = 32 if x_dtype == "int8" else 16
    heights = sorted({min(round_up(m, rows), height) for height in (32, 64, 128, 256, 512)})
    widths = sorted({min(round_up(n, LANES), width) for width in (128, 256, 512, 1024, 2048)})
    return [TpuTiles(tile_m=height, tile_n=width) for height in heights for width in widths]


def _float_of_bits(bits: jax.Array) -> jax.Array:
    """float32 of the bits of finite float16 numbers, int16 of any shape."""
    wide = bits.astype(jnp.int32)
    magnitude = wide & 0x7FFF
    # 112 is the difference of the exponents' biases. Numbers below 2^-14 have no leading one: they count 2^-24.
    normal = lax.bitcast_convert_type((magnitude << 13) + (112 << 23), jnp.float32)
    small = magnitude.astype(jnp.float32) * 2.0**-24
    value: jax.Array = jnp.where(magnitude < 0x400, small, normal)
    return jnp.where(wide < 0, -value, value)


def _floats(ref: Any) -> jax.Array:
    value: jax.Array = ref[...]
    if value.dtype == jnp.int16:
        return _float_of_bits(value)
    return value.astype(jnp.float32)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, K] · w [K, N], float32; exact for integers."""
    if x.dtype == jnp.int8:
        return jnp.dot(x, w, preferred_element_type=jnp.int32).astype(jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.dot(x, w, preferred_element_type=jnp.float32, precision=precision)


def _column(x: jax.Array, index: Any) -> jax.Array:
    """Column `index` of x [M, A], [M, 1]."""
    if x.shape[1] == 1:
        return x
    lanes = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.sum(jnp.where(lanes == index, x, 0), axis=1, keepdims=True)


def _over(number: Any, size: int) -> Any:
    """number // size for what is not negative; rounding down, as // does, asks JAX for the chip at hand."""
    return number // size if isinstance(number, int) else lax.div(number, jnp.int32(size))


def _to_compute(q: jax.Array, dtype: str) -> jax.Array:
    """Integers of a weight as the operand of a product."""
    if dtype == "int8":
        return q.astype(jnp.int8)
    wide = q.astype(jnp.int32) if num_bits(q.dtype) == 8 else q
    return wide.astype(jnp.float32).astype(dtype)


def _kernel(plan: _Plan, tile_m: int, *refs: Any) -> None:
    names = ["x"]
    names += ["gate"] if plan.has_gate else []
    names += ["x_scales"] if plan.num_activation_groups else []
    names += ["x_sums"] if plan.offset else []
    names += ["weight", "scales"]
    names += ["offset"] if plan.offset else []
    names += ["bias"] if plan.has_bias else []
    names += ["residual"] if plan.has_residual else []
    names += ["y", "float_scales", "acc"]
    names += ["gated"] if plan.has_gate else []
    ref = dict(zip(names, refs, strict=True))
    # x [tile_m, K], weight [K, tile_n], scales [G, tile_n], x_scales [tile_m, A], x_sums [tile_m, G],
    # y [tile_m, tile_n]
    x_ref, scales_ref, acc_ref = ref["x"], ref["float_scales"], ref["acc"]
    scales_ref[...] = _floats(ref["scales"])
    acc_ref[...] = jnp.zeros_like(acc_ref)
    if plan.has_gate:
        ref["gated"][...] = gated(x_ref[...], ref["gate"][...], plan.gate_function)
        x_ref = ref["gated"]

    group_size = plan.k // plan.num_groups
    activation_span = plan.k // max(plan.num_activation_groups, 1)

    def chunk(start: Any, size: int) -> None:
        x = x_ref[:, pl.ds(start, size)]  # [tile_m, size]
        q = ref["weight"][pl.ds(start, size), :]  # [size, tile_n]
        if plan.span == plan.k:
            acc_ref[...] += _dot(x.astype(plan.compute_dtype), _to_compute(q, plan.compute_dtype))
            return
        if plan.rounds_weights(tile_m):
            num = size // group_size
            scales = scales_ref[pl.ds(_over(start, group_size), num), :]  # [num, tile_n]
            w = _to_compute(q, "float32").reshape(num, group_size, -1) * scales[:, None, :]
            acc_ref[...] += _dot(x, w.reshape(size, -1).astype(plan.compute_dtype))
            return
        num = size // plan.span
        operand = _to_compute(q, plan.compute_dtype)
        spread = [x]
        if num > 1:
            spans = _over(lax.broadcasted_iota(jnp.int32, x.shape, 1), plan.span)
            wide = x.astype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
            spread = [jnp.where(spans == j, wide, 0) for j in range(num)]
        rows = jnp.concatenate(spread, axis=0).astype(plan.compute_dtype)  # [num · tile_m, size]
        products = _dot(rows, operand)
        for j in range(num):
            product = products[j * tile_m : (j + 1) * tile_m]
            place = start + j * plan.span
            if plan.num_groups > 1:
                product *= scales_ref[pl.ds(_over(place, group_size), 1), :]
            if plan.num_activation_groups > 1:
                product *= _column(ref["x_scales"][...], _over(place, activation_span))
            acc_ref[...] += product

    size = plan.chunk(tile_m)
    whole = plan.k // size
    if whole > 1:

        def body(i: Any, carry: None) -> None:
            chunk(pl.multiple_of(i * size, size), size)
            return carry

        lax.fori_loop(0, whole, body, None)
    elif whole:
        chunk(0, size)
    if plan.k % size:
        chunk(whole * size, plan.k % size)

    y = acc_ref[...]
    if plan.num_groups == 1:
        y *= scales_ref[...]
    if plan.num_activation_groups == 1:
        y *= ref["x_scales"][...]
    if plan.offset:
        offset = _floats(ref["offset"])
        if plan.offset == "zero_points":
            offset = -offset * scales_ref[...]
        y += _dot(ref["x_sums"][...], offset) if plan.num_groups > 1 else ref["x_sums"][...] * offset
    if plan.has_bias:
        y += ref["bias"][...]
    if plan.has_residual:
        y += ref["residual"][...].astype(jnp.float32)
    ref["y"][...] = y.astype(plan.out_dtype)


def _bits(part: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(part, jnp.int16) if part.dtype == jnp.float16 else part


def quantized_matmul_tpu(
    x: jax.Array,
    weight: QuantizedWeight,
    hooks: Hooks,
    *,
    chip: Chip,
    out_dtype: jnp.dtype,
    tiles: TpuTiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y [M, N] of x [M, K]; see `quantized_matmul`. Raises TileError where tiles do not fit `chip`'s VMEM."""
    gate, gate_function, bias, residual = hooks.gate, hooks.gate_function, hooks.bias, hooks.residual
    activation_group_size = hooks.activation_group_size
    # Of many rows a gate would be computed again for every tile of columns; rounding needs all of a group before.
    if gate is not None and (activation_group_size is not None or x.shape[0] > 64):
        x, gate = gated(x, gate, gate_function), None
    dtype = x.dtype.name
    side: list[jax.Array] = []
    sums = x.astype(jnp.float32) if gate is None else gated(x, gate, gate_function).astype(jnp.float32)
    if activation_group_size is not None:
        x, found = quantize_activations(x, activation_group_size, hooks.activation_scales)
        sums = (x.reshape(*found.shape, -1) * found[:, :, None]).reshape(x.shape)
        dtype = "int8" if "int8" in chip.peak_flops else "bfloat16"
        side.append(found)
    n, k = weight.shape
    offset = weight.zero_points if weight.minima is None else weight.minima
    plan = _Plan(
        m=x.shape[0],
        n=n,
        k=k,
        num_groups=weight.num_groups,
        bits=weight.bits,
        x_dtype=x.dtype.name,
        # An unsigned byte does not fit in int8.
        compute_dtype="bfloat16" if dtype == "int8" and weight.minima is not None and weight.bits == 8 else dtype,
        scale_dtype=weight.scales.dtype.name,
        offset=None if offset is None else "zero_points" if weight.minima is None else "minima",
        num_activation_groups=0 if activation_group_size is None else k // activation_group_size,
        has_gate=gate is not None,
        gate_function=gate_function,
        has_bias=bias is not None,
        has_residual=residual is not None,
        out_dtype=jnp.dtype(out_dtype).name,
    )
    chosen = _tiles(plan, chip, tiles)
    bm, bn = chosen.tile_m, chosen.tile_n

    def by_row(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((bm, columns), lambda i, j: (i, 0))

    def by_column(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, bn), lambda i, j: (0, j))

    by_both = pl.BlockSpec((bm, bn), lambda i, j: (i, j))
    arguments: list[tuple[jax.Array, pl.BlockSpec]] = [(x, by_row(k))]
    if gate is not None:
        arguments.append((gate, by_row(k)))
    arguments += [(part, by_row(part.shape[1])) for part in side]
    if offset is not None:
        arguments.append((sums.reshape(len(sums), weight.num_groups, -1).sum(-1), by_row(weight.num_groups)))
    arguments += [(weight.values, by_column(k)), (_bits(weight.scales), by_column(weight.num_groups))]
    if offset is not None:
        arguments.append((_bits(offset), by_column(weight.num_groups)))
    if bias is not None:
        arguments.append((bias.astype(jnp.float32)[None], by_column(1)))
    if residual is not None:
        arguments.append((residual, by_both))
    scratch = [pltpu.VMEM((weight.num_groups, bn), jnp.float32), pltpu.VMEM((bm, bn), jnp.float32)]
    if gate is not None:
        scratch.append(pltpu.VMEM((bm, k), x.dtype))
    made: jax.Array = pl.pallas_call(
        functools.partial(_kernel, plan, bm),
        grid=(-(-plan.m // bm), -(-n // bn)),
        in_specs=[spec for _, spec in arguments],
        out_specs=by_both,
        out_shape=jax.ShapeDtypeStruct((plan.m, n), jnp.dtype(out_dtype)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=usable_bytes(chip)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * plan.m * n * k, transcendentals=0, bytes_accessed=_num_bytes([part for part, _ in arguments])
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(*(part for part, _ in arguments))
    return made


def _num_bytes(arrays: Sequence[jax.Array]) -> int:
    return sum(array.size * num_bits(array.dtype) // 8 for array in arrays)


__all__ = ["TpuTiles", "buffers_of", "candidates", "quantized_matmul_tpu", "unsupported_reason"]
