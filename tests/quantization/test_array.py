"""Quantized arrays: every scheme on every shape, exact packing, invariants, and input that cannot be quantized."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmir_jax.dense import element_dtype
from llmir_jax.errors import LlmirError
from llmir_jax.quantization import QuantizedArray, Scheme, quantize
from llmir_jax.quantization.array import pack, unpack
from llmir_jax.targets.quantized_reference import dequantize_parts


@st.composite
def schemes(draw: st.DrawFn, **fixed: Any) -> Scheme:
    span = draw(st.sampled_from(["channel", "tensor", "group"]))
    options: dict[str, Any] = {
        "bits": draw(st.sampled_from([4, 8])),
        "group_size": draw(st.sampled_from([2, 4, 6, 32])) if span == "group" else None,
        "per_tensor": span == "tensor",
        "kind": draw(st.sampled_from(["symmetric", "zero_point", "minimum"])),
        "scale_dtype": draw(st.sampled_from(["float16", "bfloat16", "float32"])),
    }
    return Scheme(**options | fixed)


@st.composite
def matrices(draw: st.DrawFn, scheme: Scheme) -> np.ndarray:
    """Of a shape that the scheme can have: noise of any size, alike and all-zero groups, outliers, shifts."""
    n = draw(st.integers(1, 6))
    k = (scheme.group_size or draw(st.integers(1, 20)) * (2 if scheme.bits == 4 else 1)) * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = rng.integers(*draw(st.sampled_from([(-3, 2), (-20, 1), (-1, 13), (0, 1)])), (n, k))
    x = rng.normal(size=(n, k)) * 2.0**exponents
    x += draw(st.sampled_from([0.0, 0.0, 1.0, -37.5, 1e4]))
    for _ in range(draw(st.integers(0, 3))):
        row, column, width = rng.integers(n), rng.integers(k), rng.integers(1, k + 1)
        x[row, column : column + width] = draw(st.sampled_from([0.0, 1.0, -0.003, 1e-7, 3e4, -3e4]))
    return x.astype(draw(st.sampled_from(["float32", "float16", "bfloat16"])))


def per_element(part: Any, array: QuantizedArray) -> np.ndarray:
    """One value for each element, float64 [N, K], of one for each group."""
    wide = np.asarray(part).astype(np.float64)
    return np.broadcast_to(wide, (array.shape[0], wide.shape[1])).repeat(array.group_size, axis=1)


def integers(array: QuantizedArray) -> np.ndarray:
    """q, int64 [N, K], without JAX, which would compile something for each shape."""
    values = np.asarray(array.values)
    return (unpack(values, signed=array.minima is None) if array.bits == 4 else values).astype(np.int64)


def decoded(array: QuantizedArray) -> np.ndarray:
    """x, float64 [N, K], by the equations of the docstring."""
    q, scales = integers(array), per_element(array.scales, array)
    if array.minima is not None:
        return q * scales + per_element(array.minima, array)
    return (q if array.zero_points is None else q - per_element(array.zero_points, array)) * scales


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_values_come_back_within_half_a_scale(data: st.DataObject) -> None:
    scheme = data.draw(schemes())
    x = data.draw(matrices(scheme))
    made = quantize(x, scheme, name="w")
    made.check()
    assert made.shape == x.shape and made.dtype == x.dtype
    fitted = scheme.fitted(x.shape, name="w")
    alike = dataclasses.replace(
        fitted,
        group_size=None if fitted.group_size == x.shape[1] else fitted.group_size,
        per_tensor=fitted.per_tensor and x.shape[0] > 1,
    )
    assert made.scheme == alike

    scales, exact = per_element(made.scales, made), x.astype(np.float64)
    assert (scales >= 0).all() and np.isfinite(scales).all()
    back = decoded(made)
    # Beside rounding to the integer, float32 arithmetic; and what is stored as zero for being subnormal.
    largest = np.abs(exact).max()
    assert (np.abs(back - exact) <= 0.5 * scales * (1 + 1e-5) + 4e-7 * largest + 1e-37).all()

    q = integers(made)
    low, high = scheme.integer_range
    assert low <= q.min() and q.max() <= high
    if made.zero_points is not None:
        zero_points = np.asarray(made.zero_points)
        assert zero_points.dtype == np.int8 and low <= zero_points.min() and zero_points.max() <= high
        assert (back[exact == 0] == 0).all()
    if made.kind == "symmetric":
        assert (back[exact == 0] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize("span", ["channel", "tensor", "group"])
@pytest.mark.parametrize(
    ("scale_dtype", "layout"),
    [("float16", "rows"), ("bfloat16", "rows"), ("float32", "rows"), ("float16", "columns")],
)
def test_the_equations_of_the_docstring(bits: int, kind: Any, span: str, scale_dtype: Any, layout: Any) -> None:
    """`dequantize`, `rows`, and the IR's reference decomposition of `composite_parts`, on arrays of any bits."""
    scheme = Scheme(
        bits=bits,
        group_size=6 if span == "group" else None,
        per_tensor=span == "tensor",
        kind=kind,
        scale_dtype=scale_dtype,
    )
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # shown where the test fails
    in_rows = any_array(scheme, np.random.default_rng(seed))
    made, expected = in_rows.laid_out(layout), decoded(in_rows)
    np.testing.assert_array_equal(made.integers(), integers(in_rows))
    back = np.asarray(made.dequantize())
    np.testing.assert_allclose(back, expected, rtol=1e-6, atol=1e-6 * (1 + np.abs(expected).max()))
    assert made.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(in_rows))
    np.testing.assert_array_equal(made.span(1, 4).dequantize(), back[1:4])

    ids = np.asarray([[4, 0], [2, 2], [1, 3]])
    rows = made.rows(ids, jnp.bfloat16)
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, back[ids].astype(rows.dtype))

    ir_type, parts = made.ir_type(), made.composite_parts()
    assert ir_type.get_shape() == made.shape
    for part, part_type in zip(parts, ir_type.parts(), strict=True):
        assert tuple(part.shape) == part_type.get_shape() and part.dtype == element_dtype(part_type.element_type)
    np.testing.assert_array_equal(dequantize_parts(ir_type)(*parts), back)


def any_array(scheme: Scheme, rng: np.random.Generator) -> QuantizedArray:
    """[5, 18] with any bits in it: integers and signs of scales that plain rounding would not give."""
    low, high = (
        (0, 2**scheme.bits - 1) if scheme.kind == "minimum" else (-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    )
    groups = (1, 1) if scheme.per_tensor else (5, 3 if scheme.group_size else 1)
    return QuantizedArray.from_integers(
        rng.integers(low, high + 1, (5, 18)),
        rng.normal(size=groups).astype(scheme.dtype),
        bits=scheme.bits,
        zero_points=rng.integers(low, high + 1, groups) if scheme.kind == "zero_point" else None,
        minima=rng.normal(size=groups).astype(scheme.dtype) if scheme.kind == "minimum" else None,
    )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_layouts_hold_the_same(data: st.DataObject) -> None:
    """Columns hold the integers and scales of the rows, transposed; and back again bit for bit."""
    scheme = data.draw(schemes())
    made = any_array(scheme, np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))))
    moved = made.laid_out("columns")
    moved.check()
    unsigned = "u" if made.minima is not None else ""
    assert moved.values.dtype == f"{unsigned}int{scheme.bits}" and moved.values.shape == made.shape[::-1]
    np.testing.assert_array_equal(np.asarray(moved.values).astype(np.int64).T, integers(made))
    assert (moved.scheme, moved.nbytes) == (made.scheme, made.nbytes)
    assert moved.format == f"{made.format} in columns" and moved.laid_out("columns") is moved
    back = moved.laid_out("rows")
    assert jax.tree.structure(back) == jax.tree.structure(made)
    for part, same in zip(jax.tree.leaves(back), jax.tree.leaves(made), strict=True):
        assert part.dtype == same.dtype
        np.testing.assert_array_equal(part, same)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_packing_is_exact(data: st.DataObject) -> None:
    signed = data.draw(st.booleans())
    low, high = (-8, 7) if signed else (0, 15)
    k = 2 * data.draw(st.integers(1, 40))
    q = np.asarray(data.draw(st.lists(st.integers(low, high), min_size=k, max_size=k)), np.int32)
    packed = pack(q)
    assert packed.dtype == np.uint8 and packed.shape == (k // 2,)
    for i in range(k // 2):
        assert packed[i] == (q[2 * i] % 16) + 16 * (q[2 * i + 1] % 16)
    back = unpack(packed, signed=signed)
    assert back.dtype == (np.int8 if signed else np.uint8)
    np.testing.assert_array_equal(back, q)


@pytest.mark.parametrize("signed", [True, False])
def test_every_byte_is_a_pair_of_integers(signed: bool) -> None:
    every = np.arange(256, dtype=np.uint8)
    q = unpack(every, signed=signed)
    np.testing.assert_array_equal(pack(q), every)
    np.testing.assert_array_equal(unpack(jnp.asarray(every), signed=signed), q)
    np.testing.assert_array_equal(pack(jnp.asarray(q)), every)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_quantizing_again_changes_nothing(data: st.DataObject) -> None:
    """Values that are exactly of a format, and reach both ends of their range, keep their integers and scales."""
    scheme = data.draw(schemes(scale_dtype="float16"))
    assume(not scheme.per_tensor and scheme.group_size != 2)
    n, g = data.draw(st.integers(1, 5)), scheme.group_size or 8
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    low, high = scheme.integer_range
    q = rng.integers(low, high + 1, (n, 1, g))
    q[..., 0], q[..., 1] = low, high
    scales = (2.0 ** rng.integers(-8, 3, (n, 1)) * rng.integers(1024, 2048, (n, 1)) / 1024).astype(np.float16)
    zero_points = minima = None
    if scheme.kind == "zero_point":
        zero_points = rng.integers(low, high + 1, (n, 1))
    if scheme.kind == "minimum":
        minima = (rng.integers(-2048, 2049, (n, 1)) / 1024).astype(np.float16)
    made = QuantizedArray.from_integers(
        q.reshape(n, g), scales, bits=scheme.bits, zero_points=zero_points, minima=minima
    )
    again = quantize(decoded(made).astype(np.float32), dataclasses.replace(scheme, group_size=None if g == 8 else g))
    for before, after in zip(jax.tree.leaves(made), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_are_all_alike(bits: int, kind: Any) -> None:
    scheme = Scheme(bits=bits, group_size=4, kind=kind)
    zeros = quantize(np.zeros((3, 8), np.float32), scheme)
    assert not np.asarray(zeros.dequantize()).any() and not np.asarray(zeros.scales).any()
    x = np.full((2, 8), 0.7, np.float32)
    x[0, 4:], x[1, :4] = -3.25, 1e-9
    tolerance = 0.5 * per_element(quantize(x, scheme).scales, quantize(x, scheme)) * 1.00001
    assert (np.abs(np.asarray(quantize(x, scheme).dequantize()) - x) <= tolerance).all()


def test_one_huge_outlier() -> None:
    """It costs its own group, not the others; float16 cannot hold its scale, float32 can."""
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    x[1, 3] = 1e30
    with pytest.raises(LlmirError, match=r"^layers\.3\.mlp\.up\.kernel: a group's scale is beyond .*'int8-g32-f32'"):
        quantize(x, Scheme(bits=8, group_size=32), name="layers.3.mlp.up.kernel")
    made = np.asarray(quantize(x, Scheme(bits=8, group_size=32, scale_dtype="float32")).dequantize())
    assert np.isclose(made[1, 3], 1e30)
    elsewhere = np.ones((4, 64), bool)
    elsewhere[1, :32] = False
    np.testing.assert_allclose(made[elsewhere], x[elsewhere], atol=0.02)
    x[1, 3] = -1e30
    with pytest.raises(LlmirError, match=r"^w: a group's minimum is beyond what bfloat16|float16 can hold"):
        quantize(x, Scheme(bits=4, group_size=32, kind="minimum"), name="w")


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (2e38, "2e+38")])
@pytest.mark.parametrize("kind", ["symmetric", "zero_point", "minimum"])
def test_numbers_that_cannot_be_quantized(bad: float, shown: str, kind: Any) -> None:
    x = np.ones((700, 512), np.float32)
    x[613, 17] = bad
    for scheme in (
        Scheme(bits=8, group_size=64, kind=kind),
        Scheme(bits=4, group_size=None, per_tensor=True, kind=kind),
    ):
        with pytest.raises(LlmirError) as caught:
            quantize(x, scheme, name="layers.7.attn.q.kernel")
        message = str(caught.value)
        assert message.startswith("layers.7.attn.q.kernel: ") and "\n" not in message
        assert f"{shown} in row 613, column 17" in message


def test_what_is_no_matrix_of_floats() -> None:
    for x in (np.zeros(8, np.float32), np.zeros((2, 2, 2), np.float32), np.zeros((0, 4), np.float32)):
        with pytest.raises(LlmirError, match=r"^w: only a matrix"):
            quantize(x, Scheme(bits=8, group_size=None), name="w")
    with pytest.raises(LlmirError, match=r"^w: expected floating-point values to quantize, got int8"):
        quantize(np.ones((2, 2), np.int8), Scheme(bits=8, group_size=None), name="w")
    with pytest.raises(LlmirError, match=r"^w: int4 .* even, got 7"):
        quantize(np.ones((2, 7), np.float32), Scheme(bits=4, group_size=None), name="w")
    with pytest.raises(LlmirError, match=r"^w: group_size 4 does not divide its 6 inputs"):
        quantize(np.ones((2, 6), np.float32), Scheme(bits=8, group_size=4), name="w")


def test_ranges_that_clip() -> None:
    x = np.asarray([[-1.0, 0.25, 0.5, 100.0]], np.float32)
    low, high = np.asarray([[-1.0, -1.0]]), np.asarray([[1.0, 2.54]])
    made = quantize(x, Scheme(bits=8, group_size=2, scale_dtype="float32"), ranges=(low, high))
    np.testing.assert_allclose(made.dequantize(), [[-1.0, 0.25, 0.5, 2.54]], atol=0.005)
    with pytest.raises(LlmirError, match=r"ranges must be \[1, 2\]"):
        quantize(x, Scheme(bits=8, group_size=2), ranges=(low[:, :1], high[:, :1]))


def test_it_is_a_pytree() -> None:
    made = quantize(np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32), Scheme(bits=4, group_size=4))
    assert len(jax.tree.leaves(made)) == 2
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"w": made})]
    assert paths == ["['w'].values", "['w'].scales"]
    shapes = jax.eval_shape(lambda: made)
    assert isinstance(shapes, QuantizedArray) and shapes.scheme == made.scheme and shapes.nbytes == made.nbytes
    assert repr(shapes) == repr(made) == "QuantizedArray(int4-g4-f16: float32[4, 8])"
    x = np.ones((2, 8), np.float32)
    product = jax.jit(lambda x, w: x @ w.dequantize().T)(x, made)
    np.testing.assert_allclose(product, x @ np.asarray(made.dequantize()).T, rtol=1e-5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "4 or 8 bits, got 2"),
        ({"group_size": 3}, "group size 3 does not divide"),
        ({"shape": (4, 10)}, "group size 4 does not divide the 10"),
        ({"shape": (3, 8)}, r"values of a quantized \[3, 8\] must be uint8\[3, 4\]"),
        ({"scales": np.zeros((4, 3), np.float16)}, r"scales of .* must be float16\[4, 2\], got float16\[4, 3\]"),
        ({"scales": np.zeros((4, 2), np.int8)}, "scales must be float16, bfloat16 or float32"),
        ({"zero_points": np.zeros((4, 2), np.int32)}, r"zero_points .* must be int8\[4, 2\]"),
        ({"minima": np.zeros((4, 2), np.float32)}, r"minima .* must be float16\[4, 2\]"),
        (
            {"minima": np.zeros((4, 2), np.float16), "zero_points": np.zeros((4, 2), np.int8)},
            "zero points or minima, not both",
        ),
        ({"values": np.zeros((4, 4), np.int8)}, r"values of .* must be uint8\[4, 4\]"),
        ({"layout": "columns"}, r"values of .* must be int4\[8, 4\]"),
        ({"layout": "diagonals"}, "layout must be 'rows' or 'columns', got 'diagonals'"),
    ],
)
def test_invariants_are_checked(changes: dict[str, Any], message: str) -> None:
    made = quantize(np.ones((4, 8), np.float32), Scheme(bits=4, group_size=4))
    with pytest.raises(LlmirError, match=f"^w: .*{message}"):
        dataclasses.replace(made, **changes).check("w")


def test_integers_out_of_range() -> None:
    for bits, q, minima in ((4, 8, None), (4, -9, None), (8, 128, None), (4, 16, np.zeros((1, 1), np.float32))):
        with pytest.raises(LlmirError, match=rf"^w: integers from {q} to {q}; expected"):
            QuantizedArray.from_integers(
                np.full((1, 2), q), np.ones((1, 1), np.float32), bits=bits, minima=minima, name="w"
            )
    with pytest.raises(LlmirError, match=r"^w: int4 needs an even number of columns, got 3"):
        QuantizedArray.from_integers(np.zeros((1, 3), int), np.ones((1, 1), np.float32), bits=4, name="w")
