"""The Triton kernel of `gpu`, in a module that imports nothing but Triton, as its interpreter wants."""

# mypy: ignore-errors
# ruff: noqa: RET505 - Triton compiles what comes after a return
import triton
import triton.language as tl


@triton.jit
def _gate(g, FUNCTION: tl.constexpr):
    """silu, gelu_tanh or relu of float32."""
    if FUNCTION == "silu":
        return g / (1 + tl.exp(-g))
    elif FUNCTION == "gelu_tanh":
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        return g * (1 - 1 / (tl.exp(2 * inner) + 1))
    else:
        return tl.maximum(g, 0.0)


@triton.jit
def _tile_of_x(x, gate, rows, at, M, K: tl.constexpr, FUNCTION: tl.constexpr):
    """x [BLOCK_M, len(at)] at columns `at`, gated; zero beyond row M."""
    offsets = rows[:, None] * K + at[None, :]
    tile = tl.load(x + offsets, mask=rows[:, None] < M, other=0)
    if gate is not None:
        g = tl.load(gate + offsets, mask=rows[:, None] < M, other=0).to(tl.float32)
        tile = (_gate(g, FUNCTION) * tile.to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit
def _side(pointer, columns, k, N, G: tl.constexpr, GROUP: tl.constexpr, NUM: tl.constexpr, WITHIN: tl.constexpr):
    """What groups have, float32, for the elements of [BLOCK_N, BLOCK_K]: [BLOCK_N, 1], or [BLOCK_N, NUM · WITHIN]."""
    groups = k // GROUP + tl.arange(0, NUM)
    mask = columns[:, None] < N
    value = tl.load(pointer + columns[:, None] * G + groups[None, :], mask=mask, other=0).to(tl.float32)
    if NUM > 1:
        wide = tl.broadcast_to(value[:, :, None], [columns.shape[0], NUM, WITHIN])
        value = tl.reshape(wide, [columns.shape[0], NUM * WITHIN])
    return value


@triton.jit
def _as(x, DTYPE: tl.constexpr):
    """x in the dtype that a product takes."""
    if DTYPE == "int8":
        return x.to(tl.int8)
    elif DTYPE == "float16":
        return x.to(tl.float16)
    elif DTYPE == "bfloat16":
        return x.to(tl.bfloat16)
    else:
        return x.to(tl.float32)


@triton.jit
def _product(x, w, VECTOR: tl.constexpr):
    """x [BLOCK_M, K] · wᵀ of w [BLOCK_N, K], float32; int8 by way of int32."""
    if VECTOR:
        return tl.sum(x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)
    elif x.dtype == tl.int8:
        return tl.dot(x, tl.trans(w), out_dtype=tl.int32).to(tl.float32)
    else:
        return tl.dot(x, tl.trans(w), input_precision="ieee")


@triton.jit
def quantized_matmul_kernel(
    x,  # [M, K], floats or int8
    gate,  # [M, K] or None
    x_scales,  # float32 [M, A] or None
    values,  # uint8 [N, K / 2] of 4 bits, int8 or uint8 [N, K]
    scales,  # [N, G]
    offset,  # int8 (zero points) or floats (minima) [N, G], or None
    bias,  # float32 [N] or None
    residual,  # [M, N] or None
    y,  # [M, N], or float32 [SPLIT, M, N] to be added
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    A: tl.constexpr,
    BITS: tl.constexpr,
    ZERO_POINTS: tl.constexpr,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    GROUP: tl.constexpr = K // G
    NUM: tl.constexpr = BLOCK_K // GROUP if GROUP < BLOCK_K else 1
    HALF: tl.constexpr = BLOCK_K // 2
    STEPS: tl.constexpr = K // BLOCK_K
    per_part = (STEPS + SPLIT - 1) // SPLIT
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(part * per_part, min((part + 1) * per_part, STEPS)):
        k = step * BLOCK_K
        if BITS == 4:
            bytes_at = k // 2 + tl.arange(0, HALF)
            packed = tl.load(
                values + columns[:, None] * (K // 2) + bytes_at[None, :], mask=columns[:, None] < N, other=0
            ).to(tl.int32)
            low = packed & 15
            high = packed >> 4
            if offset is None or ZERO_POINTS:  # two's complement in four bits
                low = (low ^ 8) - 8
                high = (high ^ 8) - 8
            even = _tile_of_x(x, gate, rows, k + 2 * tl.arange(0, HALF), M, K, FUNCTION)
            odd = _tile_of_x(x, gate, rows, k + 2 * tl.arange(0, HALF) + 1, M, K, FUNCTION)
        else:
            at = k + tl.arange(0, BLOCK_K)
            low = tl.load(values + columns[:, None] * K + at[None, :], mask=columns[:, None] < N, other=0)
            even = _tile_of_x(x, gate, rows, at, M, K, FUNCTION)
        WITHIN: tl.constexpr = (GROUP if NUM > 1 else BLOCK_K) // (2 if BITS == 4 else 1)
        scale = _side(scales, columns, k, N, G, GROUP, NUM, WITHIN)
        if offset is not None:
            added = _side(offset, columns, k, N, G, GROUP, NUM, WITHIN)
            if ZERO_POINTS:
                added = -added * scale
        if x_scales is None:
            w = low.to(tl.float32) * scale
            if offset is not None:
                w += added
            acc += _product(_as(even, COMPUTE), _as(w, COMPUTE), VECTOR)
            if BITS == 4:
                w = high.to(tl.float32) * scale
                if offset is not None:
                    w += added
                acc += _product(_as(odd, COMPUTE), _as(w, COMPUTE), VECTOR)
        else:
            product = _product(_as(even, COMPUTE), _as(low, COMPUTE), VECTOR)
            if BITS == 4:
                product += _product(_as(odd, COMPUTE), _as(high, COMPUTE), VECTOR)
            product *= tl.reshape(scale, [1, BLOCK_N])
            if offset is not None:
                total = tl.sum(even.to(tl.int32), axis=1)
                if BITS == 4:
                    total += tl.sum(odd.to(tl.int32), axis=1)
                product += total.to(tl.float32)[:, None] * tl.reshape(added, [1, BLOCK_N])
            x_scale = tl.load(x_scales + rows * A + k // (K // A), mask=rows < M, other=0)
            acc += product * x_scale[:, None]
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < N, other=0)[None, :]
    if residual is not None:
        acc += tl.load(residual + rows[:, None] * N + columns[None, :], mask=inside, other=0).to(tl.float32)
    at = part * M * N + rows[:, None] * N + columns[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)
