"""Every reference decomposition against plain NumPy in float64, run through lower-to-reference and XLA."""

import secrets
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from xdsl.dialects.builtin import ModuleOp

from llmir_jax.dialects import llm
from llmir_jax.dialects.parser import IRParser
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import call_module, make_context
from llmir_jax.targets.reference import DECOMPOSITIONS, decomposition
from llmir_jax.transforms.lower_to_reference import LowerToReferencePass

Array = np.ndarray[Any, Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
NAMES = {np.dtype(np.float32): "f32", BF16: "bf16", np.dtype(np.float16): "f16", np.dtype(np.int32): "i32",
         np.dtype(np.int8): "i8", np.dtype(ml_dtypes.int4): "i4"}  # fmt: skip


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def tensor_type(array: Array) -> str:
    return "tensor<" + "".join(f"{dim}x" for dim in array.shape) + NAMES[array.dtype] + ">"


def parse(text: str) -> ModuleOp:
    context = make_context()
    context.load_dialect(llm.LLM)
    module = IRParser(context, text).parse_module()
    module.verify()
    return module


def run_body(body: str, *arrays: Array, result: str) -> list[Array]:
    """Run the ops of ``body``, whose arguments are %0, %1 …, whose result is %r."""
    arguments = ", ".join(f"%{i}: {tensor_type(array)}" for i, array in enumerate(arrays))
    module = parse(f"func.func @main({arguments}) -> {result} {{\n{body}\nfunc.return %r : {result}\n}}")
    LowerToReferencePass().apply(make_context(), module)
    module.verify()
    assert "llm." not in str(module)
    return [np.asarray(array) for array in call_module(module, *arrays)]


def run(op: str, *arrays: Array, result: str, attributes: str = "") -> Array:
    """Run one op: ``op`` is its name and operands."""
    types = ", ".join(tensor_type(array) for array in arrays)
    (output,) = run_body(f"%r = {op} {{{attributes}}} : ({types}) -> {result}", *arrays, result=result)
    return output


def close(got: Array, expected: Array, dtype: Any = np.float32) -> None:
    tolerance = {4: 2e-5, 2: 2e-2}[np.dtype(dtype).itemsize]
    scale = np.abs(expected).max() + 1e-3
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=tolerance * scale, rtol=tolerance)


# -- attention ---------------------------------------------------------------------------------------------------------


def numpy_attention(
    q: Array, keys: list[Array], values: list[Array], q_pos: Array, *, scale: float, causal: bool, window: int | None,
    softcap: float | None, slopes: Array | None,
) -> Array:  # fmt: skip
    """Row by row and head by head: keys[t], values[t] are what row t may read, [L, Hkv, D]."""
    num_rows, num_heads, _ = q.shape
    out = np.zeros((num_rows, num_heads, values[0].shape[-1]))
    for t in range(num_rows):
        k, v = keys[t].astype(np.float64), values[t].astype(np.float64)
        for h in range(num_heads):
            g = h // (num_heads // k.shape[1])
            k_pos = np.arange(len(k))
            scores = scale * (k[:, g] @ q[t, h].astype(np.float64))
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if slopes is not None:
                scores = scores + float(slopes[h]) * (k_pos - q_pos[t])
            seen = np.ones(len(k), bool)
            if causal:
                seen &= k_pos <= q_pos[t]
            if window is not None:
                seen &= k_pos > q_pos[t] - window
            weights = np.exp(scores[seen] - scores[seen].max())
            out[t, h] = (weights / weights.sum()) @ v[seen][:, g]
    return out


ATTENTION = [
    # heads, KV heads, head dim, value dim, causal, window, softcap, slopes, dtype
    (4, 4, 8, 8, True, None, None, False, np.float32),
    (6, 2, 8, 5, True, None, None, False, np.float32),
    (3, 1, 16, 16, True, 3, None, False, np.float32),
    (4, 2, 8, 8, False, None, None, False, np.float32),
    (4, 2, 8, 8, False, 2, 3.0, False, np.float32),
    (4, 2, 8, 8, True, 4, 0.5, True, np.float32),
    (4, 2, 8, 8, True, None, None, True, BF16),
]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "v_dim", "causal", "window", "softcap", "slopes", "dtype"), ATTENTION
)
@pytest.mark.parametrize("form", ["whole", "tokens"])
def test_attention(
    form: str, heads: int, kv_heads: int, dim: int, v_dim: int, causal: bool, window: int | None,
    softcap: float | None, slopes: bool, dtype: Any, rng: np.random.Generator,
) -> None:  # fmt: skip
    rows, seqs, length = 11, 3, 13
    lead = (rows,) if form == "whole" else (seqs, length)
    q = rng.normal(size=(rows, heads, dim)).astype(dtype)
    k = rng.normal(size=(*lead, kv_heads, dim)).astype(dtype)
    v = rng.normal(size=(*lead, kv_heads, v_dim)).astype(dtype)
    slope_values = rng.uniform(0.01, 1, heads).astype(np.float32) if slopes else None
    seq_ids = rng.integers(0, seqs, rows).astype(np.int32)
    positions = rng.integers(0, length, rows).astype(np.int32)

    scale = 0.25
    attributes = f"scale = {scale} : f32, causal = {str(causal).lower()}"
    attributes += "" if window is None else f", window = {window} : i64"
    attributes += "" if softcap is None else f", softcap = {softcap} : f32"
    arrays = [q, k, v, *([] if slope_values is None else [slope_values])]
    op = "llm.attention %0, %1, %2" + ("" if slope_values is None else " slopes(%3)")
    if form == "tokens":
        op += f" tokens(%{len(arrays)}, %{len(arrays) + 1})"
        arrays += [seq_ids, positions]
    result = f"tensor<{rows}x{heads}x{v_dim}x{NAMES[np.dtype(dtype)]}>"
    got = run(op, *arrays, attributes=attributes, result=result)

    if form == "whole":
        keys, values, positions = [k] * rows, [v] * rows, np.arange(rows)
    else:
        keys, values = [k[s] for s in seq_ids], [v[s] for s in seq_ids]
    expected = numpy_attention(
        q, keys, values, positions, scale=scale, causal=causal, window=window, softcap=softcap, slopes=slope_values
    )
    close(got, expected, np.dtype(dtype))


def test_attention_is_float32_inside(rng: np.random.Generator) -> None:
    """Scores that bfloat16 would round together stay apart."""
    q = np.full((1, 1, 1), 256, BF16)
    k = np.array([1.0, 1.0078125], BF16).reshape(2, 1, 1)
    v = np.array([0.0, 1.0], np.float32).reshape(2, 1, 1)
    got = run(
        "llm.attention %0, %1, %2 tokens(%3, %4)", q, k[None], v[None], np.zeros(1, np.int32), np.ones(1, np.int32),
        attributes="scale = 1.0 : f32", result="tensor<1x1x1xf32>",
    )  # fmt: skip
    close(got.reshape(-1), np.array([1 / (1 + np.exp(-2.0))]))


def test_large_scores_do_not_overflow() -> None:
    q = np.full((2, 1, 1), 1e4, np.float32)
    types = "tensor<2x1x1xf32>"
    (got,) = run_body(
        f"%r = llm.attention %0, %0, %0 {{scale = 1.0 : f32}} : ({types}, {types}, {types}) -> {types}", q, result=types
    )
    np.testing.assert_allclose(got, q, rtol=1e-6)


@pytest.mark.parametrize("batch", [None, 2])
def test_sequence_parallel_attention(batch: int | None, rng: np.random.Generator) -> None:
    lead = () if batch is None else (batch,)
    total, start, length = 12, 5, 4
    q = rng.normal(size=(*lead, length, 4, 8)).astype(np.float32)
    k, v = (rng.normal(size=(*lead, total, 2, 8)).astype(np.float32) for _ in range(2))
    got = run(
        "llm.sequence_parallel_attention(%0, %1, %2)", q, k, v, result=tensor_type(q),
        attributes=f"seq_start = {start} : i32, seq_length = {length} : i32, total_length = {total} : i32, window = 6",
    )  # fmt: skip
    for i in range(batch or 1):
        q1, k1, v1 = (x if batch is None else x[i] for x in (q, k, v))
        expected = numpy_attention(
            q1, [k1] * length, [v1] * length, np.arange(start, start + length),
            scale=8**-0.5, causal=True, window=6, softcap=None, slopes=None,
        )  # fmt: skip
        close(got if batch is None else got[i], expected)


@pytest.mark.parametrize("result", [np.float32, BF16])
def test_write_then_attend_pages(result: Any, rng: np.random.Generator) -> None:
    """Two sequences of 5 and 3 positions over pages of 2, the new rows first written, then read."""
    lens, page_size = [5, 3], 2
    tables = np.array([[7, 2, 4, 0], [1, 5, 0, 0]], np.int32)
    k_pages, v_pages = (rng.normal(size=(8, page_size, 2, 8)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(6, 2, 8)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(6, 4, 8)).astype(np.float32)
    seq_ids, positions = np.array([0, 0, 0, 1, 0, 0], np.int32), np.array([2, 3, 4, 2, 0, 0], np.int32)
    num_tokens, slopes = np.array(4, np.int32), rng.uniform(0.1, 1, 4).astype(np.float32)
    pages, small, ids, name = "tensor<8x2x2x8xf32>", "tensor<6x2x8xf32>", "tensor<6xi32>", NAMES[np.dtype(result)]
    body = f"""
      %kp, %vp = llm.write_pages %0, %1, %2, %3, %5, %6, %7, %9
        : ({pages}, {pages}, {small}, {small}, {ids}, {ids}, tensor<2x4xi32>, tensor<i32>) -> ({pages}, {pages})
      %r = llm.attend_pages %4, %kp, %vp, %7, %8, %5, %6, %9 slopes(%10) {{scale = 0.25 : f32, window = 3 : i64}}
        : (tensor<6x4x8xf32>, {pages}, {pages}, tensor<2x4xi32>, tensor<2xi32>, {ids}, {ids}, tensor<i32>,
           tensor<4xf32>) -> tensor<6x4x8x{name}>"""
    arrays = (k_pages, v_pages, k, v, q, seq_ids, positions, tables, np.array(lens, np.int32), num_tokens, slopes)
    (got,) = run_body(body, *arrays, result=f"tensor<6x4x8x{name}>")

    def contiguous(all_pages: Array, new: Array) -> list[Array]:
        rows = [np.concatenate([all_pages[p] for p in table])[:n].copy() for table, n in zip(tables, lens, strict=True)]
        for t in range(4):
            rows[seq_ids[t]][positions[t]] = new[t]
        return rows

    keys, values = contiguous(k_pages, k), contiguous(v_pages, v)
    expected = numpy_attention(
        q[:4], [keys[s] for s in seq_ids[:4]], [values[s] for s in seq_ids[:4]], positions[:4],
        scale=0.25, causal=True, window=3, softcap=None, slopes=slopes,
    )  # fmt: skip
    close(got[:4], expected, np.dtype(result))
    assert np.isfinite(got.astype(np.float32)).all()


# -- layers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: Any, offset: float, rng: np.random.Generator) -> None:
    x, w = rng.normal(3, 5, size=(2, 5, 32)).astype(dtype), rng.normal(size=32).astype(np.float32)
    got = run(
        "llm.rms_norm %0, %1",
        x,
        w,
        result=tensor_type(x),
        attributes=f"epsilon = 1.0e-3 : f32, offset = {offset} : f32",
    )
    wide = x.astype(np.float64)
    close(got, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * (offset + w), np.dtype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_layer_norm(dtype: Any, rng: np.random.Generator) -> None:
    x = rng.normal(3, 5, size=(5, 32)).astype(dtype)
    w, b = (rng.normal(size=32).astype(np.float32) for _ in range(2))
    got = run("llm.layer_norm %0, %1, %2", x, w, b, result=tensor_type(x), attributes="epsilon = 1.0e-3 : f32")
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    close(got, centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * w + b, np.dtype(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rope(interleaved: bool, rotary_dim: int, rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 3, 8)).astype(np.float32)
    angles = rng.uniform(0, 6, size=(5, rotary_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    attributes = f"interleaved = {str(interleaved).lower()}, rotary_dim = {rotary_dim} : i64"
    got = run("llm.rope %0, %1, %2", x, cos, sin, result=tensor_type(x), attributes=attributes)
    expected = x.astype(np.float64).copy()
    for i in range(rotary_dim // 2):
        j, k = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary_dim // 2)
        a, b, c, s = x[:, :, j], x[:, :, k], cos[:, None, i], sin[:, None, i]
        expected[:, :, j], expected[:, :, k] = a * c - b * s, b * c + a * s
    close(got, expected)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "result"), [(np.float32, "f32"), (BF16, "bf16"), (BF16, "f32")])
def test_linear(transpose: bool, bias: bool, dtype: Any, result: str, rng: np.random.Generator) -> None:
    x, w = rng.normal(size=(2, 5, 32)).astype(dtype), rng.normal(size=(32, 12)).astype(dtype)
    b = rng.normal(size=12).astype(np.float32)
    stored = np.ascontiguousarray(w.T) if transpose else w
    got = run(
        "llm.linear %0, %1" + (", %2" if bias else ""), x, stored, *([b] if bias else []),
        result=f"tensor<2x5x12x{result}>", attributes=f"transpose_w = {str(transpose).lower()}",
    )  # fmt: skip
    expected = x.astype(np.float64) @ w.astype(np.float64) + (b if bias else 0)
    close(got, expected, BF16 if result == "bf16" else np.dtype(np.float32))


def numpy_activation(name: str, x: Array) -> Array:
    from math import erf

    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation", llm.ACTIVATIONS)
def test_gated_mlp(activation: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 16)).astype(np.float32)
    gate, up, down = (rng.normal(size=s).astype(np.float32) for s in ((16, 24), (16, 24), (24, 10)))
    flips = rng.integers(0, 2, 3).astype(bool)
    stored = [np.ascontiguousarray(w.T) if flip else w for w, flip in zip((gate, up, down), flips, strict=True)]
    flags = [
        f"transpose_{name} = {str(bool(flip)).lower()}"
        for name, flip in zip(("gate", "up", "down"), flips, strict=True)
    ]
    got = run(
        "llm.gated_mlp %0, %1, %2, %3", x, *stored, result="tensor<5x10xf32>",
        attributes=", ".join([f'activation = "{activation}"', *flags]),
    )  # fmt: skip
    wide = x.astype(np.float64)
    close(got, (numpy_activation(activation, wide @ gate) * (wide @ up)) @ down)


# -- quantization ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quantize_with_given_scales(bits: int, per_channel: bool, rng: np.random.Generator) -> None:
    x = rng.normal(size=(6, 4)).astype(np.float32)
    x.flat[:4] = [0.05, 0.15, 1e3, -1e3]  # halves at scale 0.1, and what must be clamped
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if per_channel:
        scale, zero = rng.uniform(0.05, 0.4, 4).astype(np.float32), rng.integers(low, high + 1, 4)
        scale_text = "dense<[{}]> : tensor<4xf32>".format(", ".join(f"{s:.9e}" for s in scale))
        zero_text = f"dense<{[int(z) for z in zero]}> : tensor<4xi32>"
    else:
        scale, zero = np.float32(0.1), np.int64(1)
        scale_text, zero_text = "0.1 : f32", "1 : i32"
    attributes = f"scale = {scale_text}, zero_point = {zero_text}"
    body = f"""
      %q = llm.quantize(%0) {{{attributes}, bits = {bits} : i32}} : (tensor<6x4xf32>) -> tensor<6x4xi{bits}>
      %r = stablehlo.convert %q : (tensor<6x4xi{bits}>) -> tensor<6x4xi32>"""
    (integers,) = run_body(body, x, result="tensor<6x4xi32>")
    np.testing.assert_array_equal(integers, np.clip(np.round(x / scale) + zero, low, high))

    body = f"""
      %q = stablehlo.convert %0 : (tensor<6x4xi32>) -> tensor<6x4xi{bits}>
      %r = llm.dequantize(%q) {{{attributes}}} : (tensor<6x4xi{bits}>) -> tensor<6x4xf32>"""
    (floats,) = run_body(body, integers.astype(np.int32), result="tensor<6x4xf32>")
    close(floats, (integers.astype(np.int64) - zero) * scale.astype(np.float64))


KINDS = [
    ("i8", "scale=f32, symmetric=true"),
    ("i4", "scale=f32, symmetric=true, group_size=8"),
    ("i8", "scale=f32, zp=i8, group_size=8"),
    ("i4", "scale=f16, zp=i8"),
    ("i4", "scale=f32, min=f32, group_size=8"),
    ("i8", "scale=f16, min=f16"),
    ("i2", "scale=f32, min=f32, group_size=4"),
    ("i4", "layout=columns, scale=f32, symmetric=true, group_size=8"),
    ("i8", "layout=columns, scale=f32, zp=i8, group_size=8"),
    ("i4", "layout=columns, scale=f16, min=f16"),
]


@pytest.mark.parametrize(("storage", "kind"), KINDS)
def test_quantized_tensors_are_within_half_a_step(storage: str, kind: str, rng: np.random.Generator) -> None:
    """Quantize and dequantize: no element is off by more than half of its group's step (and what its scale rounds)."""
    x = (rng.normal(size=(6, 16)) * rng.uniform(0.1, 10, (6, 1)) + rng.normal(size=(6, 1))).astype(np.float32)
    x[0, :8] = 0
    x[1] = np.abs(x[1])
    type_ = f"!llm.quantized_tensor<6x16x{storage}, {kind}>"
    body = f"""
      %q = llm.quantize(%0) : (tensor<6x16xf32>) -> {type_}
      %r = llm.dequantize(%q) : ({type_}) -> tensor<6x16xf32>"""
    (got,) = run_body(body, x, result="tensor<6x16xf32>")
    size = int(kind.partition("group_size=")[2] or 16)
    groups = x.reshape(6, -1, size).astype(np.float64)
    bits = int(storage[1:])
    if "symmetric" in kind:
        step = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    else:
        least, greatest = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        if "zp" in kind:
            least, greatest = np.minimum(least, 0), np.maximum(greatest, 0)
        step = (greatest - least) / (2**bits - 1)
    # a zero point rounds too, and a scale or minimum stored in float16 is off by 2^-11 of itself
    slack = (1.01 if "zp" in kind else 0.505) * step
    slack = slack + (np.abs(groups).max(-1, keepdims=True) * 2**-9 if "f16" in kind else 1e-6)
    assert (np.abs(got.reshape(groups.shape) - groups) <= slack).all()
    if "symmetric" in kind or "zp" in kind:
        np.testing.assert_array_equal(got[0, :8], 0)


def test_mixed_rows(rng: np.random.Generator) -> None:
    x = rng.normal(size=(6, 16)).astype(np.float32)
    type_ = "!llm.mixed_quantized_tensor<6x16x!llm.mixed<i8,i4>, scale=f32>"
    body = f"""
      %q = llm.quantize(%0) {{wide_rows = array<i64: 1, 5>}} : (tensor<6x16xf32>) -> {type_}
      %r = llm.dequantize(%q) : ({type_}) -> tensor<6x16xf32>"""
    (got,) = run_body(body, x, result="tensor<6x16xf32>")
    high = np.where(np.isin(np.arange(6), [1, 5]), 127, 7)[:, None]
    step = np.abs(x).max(-1, keepdims=True) / high
    close(got, np.round(x / step) * step)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_quantized_matmul_of_plain_integers(
    transpose: bool, group_size: int | None, zero_points: bool, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(2, 3, 16)).astype(np.float32)
    w = rng.integers(-8, 8, (16, 5)).astype(np.int8)
    shape = (5,) if group_size is None else (16 // group_size, 5)
    scales = rng.uniform(0.1, 1, shape).astype(np.float32)
    zeros = rng.integers(-8, 8, shape).astype(np.int8)
    repeats = 1 if group_size is None else group_size
    weight = (w.astype(np.float64) - np.repeat(zeros, repeats, 0) * zero_points) * np.repeat(scales, repeats, 0)
    stored = [np.ascontiguousarray(a.T) if transpose else a for a in (w, scales, zeros)]
    arrays = [x, *stored[: 3 if zero_points else 2]]
    attributes = f"bits = 8 : i32, transpose_w = {str(transpose).lower()}"
    attributes += "" if group_size is None else f", group_size = {group_size} : i32"
    names = ", ".join(f"%{i}" for i in range(len(arrays)))
    got = run(f"llm.quantized_matmul({names})", *arrays, result="tensor<2x3x5xf32>", attributes=attributes)
    close(got, x.astype(np.float64) @ weight)


@pytest.mark.parametrize(
    "type_",
    [
        "!llm.quantized_tensor<5x16xi4, scale=f32, min=f32, group_size=8>",
        "!llm.quantized_tensor<5x16xi8, scale=f32, zp=i8>",
        "!llm.quantized_tensor<5x16xi4, scale=f32, min=f32, group_size=8, layout=columns>",
        "!llm.mixed_quantized_tensor<5x16x!llm.mixed<i8,i4>, scale=f32>",
    ],
)
def test_quantized_matmul_of_a_quantized_weight(type_: str, rng: np.random.Generator) -> None:
    """Equal to the matmul with the dequantized weight."""
    x, w = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(5, 16)).astype(np.float32)
    rows = "{wide_rows = array<i64: 2>}" if "mixed" in type_ else ""
    body = f"""
      %q = llm.quantize(%1) {rows} : (tensor<5x16xf32>) -> {type_}
      %w = llm.dequantize(%q) : ({type_}) -> tensor<5x16xf32>
      %a = llm.linear %0, %w {{transpose_w = true}} : (tensor<3x16xf32>, tensor<5x16xf32>) -> tensor<3x5xf32>
      %b = llm.quantized_matmul(%0, %q) {{transpose_w = true}} : (tensor<3x16xf32>, {type_}) -> tensor<3x5xf32>
      %r = stablehlo.concatenate %a, %b, dim = 0 : (tensor<3x5xf32>, tensor<3x5xf32>) -> tensor<6x5xf32>"""
    (got,) = run_body(body, x, w, result="tensor<6x5xf32>")
    close(got[3:], got[:3].astype(np.float64))


# -- shards, pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded_type", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_linear_parts_make_the_whole(
    dim: int, bias: bool, sharded_type: bool, rng: np.random.Generator
) -> None:
    x, w = rng.normal(size=(3, 16)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    b = rng.normal(size=8).astype(np.float32)
    parts = []
    for shard in range(4):
        x_part = x if dim == 1 else np.ascontiguousarray(x[:, shard * 4 : shard * 4 + 4])
        w_part = np.ascontiguousarray(np.split(w, 4, axis=dim)[shard]) if sharded_type else w
        arrays = [x_part, w_part, *([b] if bias else [])]
        w_type = f"!llm.sharded_tensor<{tensor_type(w)}, {dim}, 4, {shard}>" if sharded_type else tensor_type(w)
        result = "tensor<3x2xf32>" if dim == 1 else "tensor<3x8xf32>"
        names = ["%0", "%1", "%2"][: len(arrays)]
        types = [tensor_type(x_part), w_type, tensor_type(b)][: len(arrays)]
        module = parse(f"""
          func.func @main({", ".join(f"{n}: {t}" for n, t in zip(names, types, strict=True))}) -> {result} {{
            %r = llm.sharded_linear({", ".join(names)})
              {{shard_dim = {dim} : i32, num_shards = 4 : i32, shard_id = {shard} : i32}}
              : ({", ".join(types)}) -> {result}
            func.return %r : {result}
          }}""")
        LowerToReferencePass().apply(make_context(), module)
        parts.append(np.asarray(call_module(module, *arrays)[0]))
    whole = np.concatenate(parts, 1) if dim == 1 else np.sum(parts, 0)
    close(whole, x.astype(np.float64) @ w + (b if bias else 0))


def test_ops_without_a_function_say_so() -> None:
    module = parse("""func.func @main(%x: tensor<4xf32>) {
      %0 = llm.all_gather(%x) {dim = 0 : i32, group_size = 2 : i32} : (tensor<4xf32>) -> tensor<8xf32>
      func.return
    }""")
    (gather,) = (op for op in module.walk() if isinstance(op, llm.AllGatherOp))
    with pytest.raises(InvalidIRError, match=r"llm\.all_gather has no reference decomposition"):
        decomposition(gather)


def test_every_op_of_the_dialect_is_lowered() -> None:
    """By a function of its operands, or by the passes that the tests of lower-to-reference and the KV cache run."""
    collectives = {llm.AllGatherOp, llm.AllReduceOp, llm.ReduceScatterOp, llm.DistributedAttentionOp}
    stages = {llm.PipelineStageOp, llm.PipelineSendOp, llm.PipelineRecvOp, llm.CostAnnotationOp}
    cache = {llm.AppendKVOp, llm.LookupKVOp, llm.PagedAttentionOp}
    assert {*DECOMPOSITIONS, *collectives, *stages, *cache} == set(llm.LLM.operations)
