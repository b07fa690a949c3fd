"""y = x · wᵀ for a weight of int4 or int8 in rows, a Triton kernel for the NVIDIA GPUs of `chips`, from sm75 on.

A program computes a tile [block_m, block_n] of y over K in steps of block_k. Of two 4-bit integers in a byte the low
one belongs to an even input and the high one to an odd, so each half is multiplied with its half of x, and no element
changes its place:

    float x   w = q · scale + offset is rounded to x's dtype; acc += x_even · w_lowᵀ + x_odd · w_highᵀ
    int8 x    a step is within a group: acc += ((x · qᵀ) · scale + (sum of x) · offset) · (scale of x), integers exact

Of one row (of up to eight before sm80, whose tensor cores Triton 3.9 does not use) products are sums along K. Where the
tiles of y are fewer than the multiprocessors, K is split among programs, whose float32 sums XLA adds.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.chips import Chip
from pallas_kernels.quantized_matmul.hooks import NOTHING, Hooks
from pallas_kernels.quantized_matmul.reference import gated, quantize_activations
from pallas_kernels.quantized_matmul.weight import QuantizedWeight
from pallas_kernels.tiles import Buffer, check_fits, choose
from pallas_kernels.triton_host import Launch, call

KERNEL = "pallas_kernels.quantized_matmul.triton_kernel:quantized_matmul_kernel"
REMEDY = "give smaller `tiles`"


@dataclass(frozen=True, kw_only=True)
class GpuTiles:
    """Rows, columns and inputs of a step, powers of two; programs that share K; how Triton runs it."""

    block_m: int
    block_n: int
    block_k: int
    split: int = 1
    num_warps: int = 4
    num_stages: int = 3


def unsupported_reason(
    x: jax.ShapeDtypeStruct | jax.Array, weight: QuantizedWeight, activation_group_size: int | None = None
) -> str | None:
    """Why this kernel cannot take these; None where it can."""
    if weight.layout != "rows":
        return f"the GPU kernel takes weights in rows, got {weight.layout}"
    if x.dtype.name not in ("bfloat16", "float16", "float32"):
        return f"the GPU kernel takes activations of bfloat16, float16 or float32, got {x.dtype}"
    span = math.gcd(weight.group_size, activation_group_size or weight.group_size)
    if span % 32:
        return (
            "the GPU kernel takes groups of multiples of 32 inputs, "
            f"got {weight.group_size} of the weight and {activation_group_size} of activations"
        )
    return None


@dataclass(frozen=True, kw_only=True)
class GpuPlan:
    """Everything that is static."""

    m: int
    n: int
    k: int
    num_groups: int
    bits: int
    x_dtype: str
    compute_dtype: str
    num_activation_groups: int  # 0 where activations are floats

    @property
    def subject(self) -> str:
        return f"quantized_matmul {self.x_dtype}[{self.m}, {self.k}] · int{self.bits}[{self.n}, {self.k}]ᵀ"

    def problem(self, tiles: GpuTiles) -> str | None:
        """Why these tiles do not suit these shapes."""
        sizes = (tiles.block_m, tiles.block_n, tiles.block_k)
        if any(size < 1 or size & (size - 1) for size in sizes):
            return f"blocks must be powers of two, got {sizes}"
        group = self.k // self.num_groups
        if self.k % tiles.block_k or (group % tiles.block_k and tiles.block_k % group):
            return f"block_k must divide {self.k} inputs, and groups of {group} or be made of them, got {tiles.block_k}"
        if self.num_activation_groups and math.gcd(group, self.k // self.num_activation_groups) % tiles.block_k:
            return f"with int8 activations block_k must be within a group, got {tiles.block_k}"
        return None


def _is_vector(m: int, chip: Chip) -> bool:
    return m == 1 or (chip.capability == 75 and m <= 8)


def buffers(plan: GpuPlan, chip: Chip, tiles: GpuTiles) -> list[Buffer]:
    """What Triton keeps in shared memory: tiles that loops load ahead, and operands on their way to tensor cores."""
    bm, bn, bk = tiles.block_m, tiles.block_n, tiles.block_k
    if _is_vector(plan.m, chip):
        return [Buffer(name="sums across warps", shape=(bm, bn, 32), dtype="float32")]
    weight = Buffer(
        name="weight", shape=(bn, bk // 2 if plan.bits == 4 else bk), dtype="uint8", copies=tiles.num_stages
    )
    return [
        Buffer(name="x", shape=(bm, bk), dtype=plan.x_dtype, copies=tiles.num_stages),
        weight,
        Buffer(name="x to multiply", shape=(bm, bk), dtype=plan.compute_dtype),
        Buffer(name="weight to multiply", shape=(bn, bk), dtype=plan.compute_dtype),
        Buffer(name="sides", shape=(bn, 4 * max(1, bk // (plan.k // plan.num_groups))), dtype="float32"),
    ]


def candidates(plan: GpuPlan, chip: Chip) -> list[GpuTiles]:
    """Tiles worth trying, from which a model or a measurement takes one."""
    if _is_vector(plan.m, chip):
        heights, widths, depths = [1 << (plan.m - 1).bit_length()], [16, 32, 64], [32, 64, 128, 256]
    else:
        heights = [height for height in (16, 32, 64, 128) if height < 2 * plan.m or height == 16]
        widths, depths = [32, 64, 128], [32, 64, 128]
    made = []
    for height in heights:
        for width in widths:
            for depth in depths:
                programs = -(-plan.m // height) * -(-plan.n // width)
                # Each part keeps a few steps, or there is nothing to load ahead of.
                split = max(1, min(2 * chip.num_cores // programs, plan.k // (4 * depth), 16))
                if _is_vector(plan.m, chip) and height * width * depth > 8192:
                    continue  # registers: 64 numbers a thread
                made.append(GpuTiles(block_m=height, block_n=width, block_k=depth, split=split))
    return [tiles for tiles in made if plan.problem(tiles) is None]


def _seconds(plan: GpuPlan, chip: Chip, tiles: GpuTiles) -> float:
    """A model of the time, to rank tiles by: weights once a row of tiles, x once a column, products by whole waves."""
    rows, columns = -(-plan.m // tiles.block_m), -(-plan.n // tiles.block_n)
    x_bytes = 1 if plan.x_dtype == "int8" else jnp.dtype(plan.x_dtype).itemsize
    traffic = rows * plan.n * plan.k * plan.bits / 8 + columns * plan.m * plan.k * x_bytes
    traffic += 8 * plan.m * plan.n * (tiles.split if tiles.split > 1 else 0)
    waves = math.ceil(rows * columns * tiles.split / chip.num_cores) * chip.num_cores / (rows * columns * tiles.split)
    peak = chip.peak_flops.get("float16", max(chip.peak_flops.values()))
    products = 2 * rows * tiles.block_m * columns * tiles.block_n * plan.k / peak
    # A step costs its instructions, about 2,000 cycles of 1.5 GHz for several programs of a multiprocessor together.
    steps = rows * columns * plan.k / tiles.block_k / chip.num_cores * 0.3e-6
    return max(traffic / chip.memory_bandwidth, products) * waves + steps


def _choose(plan: GpuPlan, chip: Chip, given: GpuTiles | None) -> GpuTiles:
    if given is None:
        return choose(
            plan.subject,
            candidates(plan, chip),
            functools.partial(buffers, plan, chip),
            functools.partial(_seconds, plan, chip),
            chip,
            REMEDY,
        )
    problem = plan.problem(given)
    if problem is not None:
        raise ValueError(f"{plan.subject}: {problem}")
    check_fits(f"{plan.subject}, tiles {given}", buffers(plan, chip, given), chip, REMEDY)
    return given


def _compute_dtype(x: jax.Array, weight: QuantizedWeight, span: int, chip: Chip, has_integers: bool) -> str:
    """What the operands of products are: integers where tensor cores take steps of 32 of them, else what holds them."""
    old = chip.capability is not None and chip.capability < 80
    if has_integers:
        in_int8 = weight.bits == 4 or weight.minima is None
        if in_int8 and not old and (span // 2 if weight.bits == 4 else span) % 32 == 0:
            return "int8"
        return "float16"  # every integer to 2,048
    return "float32" if old and x.dtype == jnp.bfloat16 else x.dtype.name


def plan_of(x: Any, weight: QuantizedWeight, *, chip: Chip, x_scales: Any = None) -> GpuPlan:
    """For x [M, K], floats or int8 with `x_scales` [M, A]."""
    m, k = x.shape
    num_activation_groups = 0 if x_scales is None else x_scales.shape[1]
    span = k // weight.num_groups
    if num_activation_groups:
        span = math.gcd(span, k // num_activation_groups)
    return GpuPlan(
        m=m,
        n=weight.shape[0],
        k=k,
        num_groups=weight.num_groups,
        bits=weight.bits,
        x_dtype=jnp.dtype(x.dtype).name,
        compute_dtype=_compute_dtype(x, weight, min(span, 64), chip, x_scales is not None),
        num_activation_groups=num_activation_groups,
    )


def launch_of(
    x: Any,
    weight: QuantizedWeight,
    hooks: Hooks = NOTHING,
    *,
    chip: Chip,
    x_scales: Any = None,
    out_dtype: DTypeLike,
    tiles: GpuTiles | None = None,
) -> Launch:
    """The launch for what `prepare` gives: x [M, K], floats or int8 with `x_scales` [M, A], and hooks.

    Its output is y [M, N], or parts [S, M, N].
    """
    plan = plan_of(x, weight, chip=chip, x_scales=x_scales)
    m, n, k = plan.m, plan.n, plan.k
    chosen = _choose(plan, chip, tiles)
    compute = plan.compute_dtype
    if compute == "int8" and (chosen.block_k // 2 if weight.bits == 4 else chosen.block_k) < 32:
        compute = "float16"
    offset = weight.zero_points if weight.minima is None else weight.minima
    ends_here = chosen.split == 1
    optional = {
        "gate": hooks.gate,
        "x_scales": x_scales,
        "offset": offset,
        "bias": hooks.bias if ends_here else None,
        "residual": hooks.residual if ends_here else None,
    }
    arrays = {"x": x, "gate": hooks.gate, "x_scales": x_scales, "values": weight.values, "scales": weight.scales}
    arrays |= {name: optional[name] for name in ("offset", "bias", "residual")}
    shape, dtype = ((m, n), out_dtype) if ends_here else ((chosen.split, m, n), jnp.float32)
    return Launch(
        kernel=KERNEL,
        operands=tuple(array for array in arrays.values() if array is not None),
        outputs=(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),),
        grid=(-(-n // chosen.block_n), -(-m // chosen.block_m), chosen.split),
        constants={name: None for name, array in optional.items() if array is None}
        | {
            "M": m,
            "N": n,
            "K": k,
            "G": weight.num_groups,
            "A": max(plan.num_activation_groups, 1),
            "BITS": weight.bits,
            "ZERO_POINTS": weight.zero_points is not None,
            "FUNCTION": hooks.gate_function,
            "COMPUTE": compute,
            "VECTOR": _is_vector(m, chip),
            "SPLIT": chosen.split,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_K": chosen.block_k,
        },
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def prepare(x: jax.Array, hooks: Hooks) -> tuple[jax.Array, Hooks, jax.Array | None]:
    """x, what is left to do, and the scales of x, as the kernel takes them."""
    bias = None if hooks.bias is None else hooks.bias.astype(jnp.float32)
    hooks = replace(hooks, bias=bias)
    # Of many rows a gate would be computed again for every tile of columns; rounding needs all of a group before.
    if hooks.gate is not None and (hooks.activation_group_size is not None or x.shape[0] > 64):
        x, hooks = gated(x, hooks.gate, hooks.gate_function), replace(hooks, gate=None)
    if hooks.activation_group_size is None:
        return x, hooks, None
    q, scales = quantize_activations(x, hooks.activation_group_size, hooks.activation_scales)
    return q, hooks, scales


def finish(y: jax.Array, hooks: Hooks, out_dtype: DTypeLike) -> jax.Array:
    """The result [M, N] of what the kernel made: itself, or of parts [S, M, N] their sum and what is added."""
    if y.ndim == 2:
        return y
    total = y.sum(0)
    if hooks.bias is not None:
        total += hooks.bias.astype(jnp.float32)
    if hooks.residual is not None:
        total += hooks.residual.astype(jnp.float32)
    return total.astype(out_dtype)


def quantized_matmul_gpu(
    x: jax.Array,
    weight: QuantizedWeight,
    hooks: Hooks,
    *,
    chip: Chip,
    out_dtype: jnp.dtype,
    tiles: GpuTiles | None = None,
) -> jax.Array:
    """y [M, N] of x [M, K]; see `quantized_matmul`. Raises TileError where tiles do not fit `chip`'s shared memory."""
    x, hooks, x_scales = prepare(x, hooks)
    launch = launch_of(x, weight, hooks, chip=chip, x_scales=x_scales, out_dtype=out_dtype, tiles=tiles)
    assert chip.capability is not None
    return finish(call(launch, capability=chip.capability)[0], hooks, out_dtype)


__all__ = [
    "GpuPlan",
    "GpuTiles",
    "buffers",
    "candidates",
    "finish",
    "launch_of",
    "plan_of",
    "prepare",
    "quantized_matmul_gpu",
    "unsupported_reason",
]
