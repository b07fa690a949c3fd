"""Products with packed weights by every instruction set, against their reference, of odd shapes between guard pages."""

import jax.numpy as jnp
import numpy as np
import pytest
from cpu_harness import hosts, native_assembly, parse, run_native, run_reference

from llmir_jax.quantization import parse_scheme, quantize
from llmir_jax.targets.cpu.host import KNOWN_HOSTS, Host
from llmir_jax.targets.cpu.layout import (
    float_format,
    pack_floats,
    pack_weight,
    packed_format,
    unpack_floats,
    unpack_weight,
)

# scheme, N, K, tokens, group of 8-bit activations (None: floats)
CASES = [
    ("int4-g32-min", 97, 64, 1, 32),
    ("int4-g32-min", 16, 96, 3, 32),
    ("int4-g32", 40, 160, 2, 32),
    ("int4-g64-zp", 33, 192, 9, 32),
    ("int4-channel", 17, 36, 5, None),
    ("int4-g32-min", 40, 576, 3, 32),
    ("int8-g32", 24, 1120, 1, 32),
    ("int4-g32-min", 50, 64, 11, None),
    ("int8-g64", 31, 128, 1, 32),
    ("int8-g32", 97, 96, 17, 32),
    ("int8-channel", 20, 27, 4, 27),
    ("int8-channel", 19, 1100, 2, 1100),
    ("int8-channel", 64, 72, 1, None),
]


def make(scheme: str, n: int, k: int, rows: int, group: int | None, seed: int):
    rng = np.random.default_rng(seed)
    weight = quantize(rng.normal(size=(n, k)).astype(np.float32), parse_scheme(scheme))
    x = rng.normal(size=(rows, k)).astype(np.float32)
    activations = "" if group is None else f", activation_bits = 8 : i32, activation_group_size = {group} : i32"
    bits = weight.bits
    text = f"""func.func @main(%w: {weight.ir_type()} {{llmir.path = "w"}},
        %x: tensor<{rows}x{k}xf32> {{llmir.role = "x"}}) -> tensor<{rows}x{n}xf32> {{
      %y = llm.quantized_matmul(%x, %w) {{bits = {bits} : i32, transpose_w = true{activations}}}
        : (tensor<{rows}x{k}xf32>, {weight.ir_type()}) -> tensor<{rows}x{n}xf32>
      func.return %y : tensor<{rows}x{n}xf32>
    }}"""
    return parse(text), [weight, x]


@pytest.mark.parametrize("host", hosts(), ids=lambda host: host.cpu)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_quantized_matmul(case, host: Host) -> None:
    module, values = make(*case, seed=np.random.default_rng().integers(1 << 30))
    (expected,), (got,) = run_reference(module, values), run_native(module, values, host=host)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * np.abs(expected).max() * np.sqrt(case[2]))


def test_scales_known_before() -> None:
    rng = np.random.default_rng()
    weight = quantize(rng.normal(size=(40, 96)).astype(np.float32), parse_scheme("int8-g32"))
    x, scales = rng.normal(size=(3, 96)).astype(np.float32), rng.random(size=3).astype(np.float32) / 50
    text = f"""func.func @main(%w: {weight.ir_type()} {{llmir.path = "w"}}, %s: tensor<3xf32> {{llmir.path = "s"}},
        %x: tensor<3x96xf32> {{llmir.role = "x"}}) -> tensor<3x40xf32> {{
      %y = llm.quantized_matmul(%x, %w) activation_scales(%s) {{bits = 8 : i32, transpose_w = true,
        activation_bits = 8 : i32, activation_group_size = 32 : i32}}
        : (tensor<3x96xf32>, {weight.ir_type()}, tensor<3xf32>) -> tensor<3x40xf32>
      func.return %y : tensor<3x40xf32>
    }}"""
    module, values = parse(text), [weight, scales, x]
    (expected,), (got,) = run_reference(module, values), run_native(module, values)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", KNOWN_HOSTS)
def test_compiles_for(name: str) -> None:
    module, _ = make("int4-g32-min", 40, 64, 3, 32, seed=0)
    instruction = {
        "avx512": "vpdpbusd",
        "avx512-bf16": "vpdpbusd",
        "avx-vnni": "vpdpbusd",
        "avx2": "vpmaddubsw",
        "neon": "sdot",
        "neon-bf16": "sdot",
        "apple": "sdot",
    }.get(name, "")
    assert instruction in native_assembly(module, KNOWN_HOSTS[name])


ELEMENTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def make_float(rows: int, n: int, k: int, dtype: str):
    rng = np.random.default_rng()
    element = ELEMENTS[dtype]
    text = f"""func.func @main(%w: tensor<{n}x{k}x{element}> {{llmir.path = "w"}},
        %x: tensor<{rows}x{k}x{element}> {{llmir.role = "x"}}) -> tensor<{rows}x{n}x{element}> {{
      %y = llm.linear %x, %w {{transpose_w = true}}
        : (tensor<{rows}x{k}x{element}>, tensor<{n}x{k}x{element}>) -> tensor<{rows}x{n}x{element}>
      func.return %y : tensor<{rows}x{n}x{element}>
    }}"""
    return parse(text), [rng.normal(size=shape).astype(jnp.dtype(dtype)) for shape in ((n, k), (rows, k))]


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 37, 50), (5, 97, 51), (13, 16, 64)], ids=str)
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("host", hosts(), ids=lambda host: host.cpu)
def test_float_matmul(rows: int, n: int, k: int, dtype: str, host: Host) -> None:
    if dtype == "float16" and not host.has_half:
        pytest.skip("a machine without float16 instructions leaves such products to XLA")
    module, values = make_float(rows, n, k, dtype)
    (expected,), (got,) = run_reference(module, values), run_native(module, values, host=host)
    error = 1e-5 if dtype == "float32" else float(jnp.finfo(dtype).eps)
    expected, got = expected.astype(np.float32), got.astype(np.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=error * np.abs(expected).max())


@pytest.mark.parametrize("name", KNOWN_HOSTS)
def test_bfloat16_compiles_for(name: str) -> None:
    module, _ = make_float(3, 20, 33, "bfloat16")
    instruction = {"avx512-bf16": "vdpbf16ps", "neon-bf16": "bfcvt"}.get(name, "")
    assert instruction in native_assembly(module, KNOWN_HOSTS[name])


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_float_layout_round_trip(dtype: str) -> None:
    matrix = np.random.default_rng().normal(size=(21, 35)).astype(jnp.dtype(dtype))
    layout = float_format(21, 35, matrix.dtype)
    packed = pack_floats(matrix, layout)
    assert packed.nbytes == layout.nbytes
    np.testing.assert_array_equal(np.asarray(unpack_floats(jnp.asarray(packed), layout)), matrix)


@pytest.mark.parametrize("scheme", ["int4-g32-min", "int4-g32", "int4-g32-zp", "int8-g32", "int8-channel"])
def test_layout_round_trip(scheme: str) -> None:
    array = quantize(np.random.default_rng().normal(size=(21, 96)).astype(np.float32), parse_scheme(scheme))
    layout = packed_format(array.ir_type(), 32)
    restored = unpack_weight(pack_weight(array, layout), layout, array)
    for old, new in zip(array.composite_parts(), restored.composite_parts(), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
