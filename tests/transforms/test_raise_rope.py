"""raise-rope: rotations written in every way are raised and compute what they did; near misses are left alone."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from raising import check, lowered, ops_of, raised

T, D = 7, 10
H = D // 2
ANGLES = (np.arange(40)[:, None] * 100.0 ** (-np.arange(H) / H)).astype(np.float32)
PASSES = ["raise-rope"]
ROPE = ["llm.rope"]
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def angles(positions: Array, num: int = H) -> Array:
    """[T, num]."""
    return positions.astype(jnp.float32)[:, None] * jnp.asarray(ANGLES[1, :num])


def heads(a: Array, x: Array) -> Array:
    """A table [T, n] as it broadcasts over the heads of x [B, T, H, D] or [T, H, D]."""
    return a[:, None] if x.ndim == 3 else a[None, :, None]


def tables(x: Array, positions: Array, num: int = H) -> tuple[Array, Array]:
    a = angles(positions, num)
    return heads(jnp.cos(a), x), heads(jnp.sin(a), x)


def split(x, p):
    cos, sin = tables(x, p)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def split_other_order(x, p):
    cos, sin = tables(x, p)
    a, b = x[..., :H], x[..., H:]
    return jnp.concatenate([-sin * b + cos * a, sin * a + cos * b], axis=-1)


def rotate_half(x, p):
    a = jnp.concatenate([angles(p)] * 2, axis=-1)
    turned = jnp.concatenate([-x[..., H:], x[..., :H]], axis=-1)
    return x * heads(jnp.cos(a), x) + turned * heads(jnp.sin(a), x)


def rotate_half_tiled(x, p):
    cos, sin = (jnp.tile(t, 2) for t in tables(x, p))
    turned = jnp.concatenate([-x[..., H:], x[..., :H]], axis=-1)
    return cos * x + sin * turned


def strided(x, p):
    cos, sin = tables(x, p)
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def pairs(x, p):
    cos, sin = tables(x, p)
    y = x.reshape(*x.shape[:-1], H, 2)
    a, b = y[..., 0], y[..., 1]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


def every_two(x, p):
    cos, sin = (jnp.repeat(t, 2, axis=-1) for t in tables(x, p))
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * cos + turned * sin


def from_table(x, p):
    """cos and sin of every position, taken by position."""
    table = jnp.asarray(np.concatenate([np.cos(ANGLES), np.sin(ANGLES)], -1))
    cos, sin = jnp.split(heads(jnp.take(table, p, axis=0, mode="clip"), x), 2, axis=-1)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def from_double_table(x, p):
    """As Hugging Face has it: a table with every entry twice."""
    double = np.concatenate([ANGLES, ANGLES], -1)
    cos, sin = (heads(jnp.asarray(f(double))[p], x) for f in (np.cos, np.sin))
    return x * cos + jnp.concatenate([-x[..., H:], x[..., :H]], axis=-1) * sin


def from_repeated_table(x, p):
    double = np.repeat(ANGLES, 2, -1)
    cos, sin = (heads(jnp.asarray(f(double))[p], x) for f in (np.cos, np.sin))
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * cos + turned * sin


def complex_pairs(x, p):
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], H, 2)
    z = lax.complex(y[..., 0], y[..., 1]) * heads(jnp.exp(1j * angles(p)), x)
    return jnp.stack([jnp.real(z), jnp.imag(z)], axis=-1).reshape(x.shape).astype(x.dtype)


def complex_halves(x, p):
    y = x.astype(jnp.float32)
    phase = heads(jnp.exp(1j * angles(p)), x)
    z = phase * lax.complex(y[..., :H], y[..., H:])
    return jnp.concatenate([z.real, z.imag], -1).astype(x.dtype)


def in_float32(x, p):
    return split(x.astype(jnp.float32), p).astype(x.dtype)


def in_float32_each(x, p):
    cos, sin = tables(x, p)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)], axis=-1)


def in_own_dtype(x, p):
    cos, sin = (t.astype(x.dtype) for t in tables(x, p))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def partial_split(x, p):
    cos, sin = tables(x, p, 3)
    a, b, rest = x[..., :3], x[..., 3:6], x[..., 6:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def partial_rotate_half(x, p):
    y, rest = x[..., :6], x[..., 6:]
    cos, sin = (jnp.concatenate([t, t], -1) for t in tables(x, p, 3))
    y = y * cos + jnp.concatenate([-y[..., 3:], y[..., :3]], -1) * sin
    return jnp.concatenate([y, rest], axis=-1)


def partial_interleaved(x, p):
    cos, sin = tables(x, p, 2)
    a, b = x[..., 0:4:2], x[..., 1:4:2]
    y = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(*x.shape[:-1], 4)
    return jnp.concatenate([y, x[..., 4:]], axis=-1)


FORMS = {
    f.__name__: f
    for f in (
        split,
        split_other_order,
        rotate_half,
        rotate_half_tiled,
        strided,
        pairs,
        every_two,
        from_table,
        from_double_table,
        from_repeated_table,
        complex_pairs,
        complex_halves,
        in_float32,
        in_float32_each,
        in_own_dtype,
        partial_split,
        partial_rotate_half,
        partial_interleaved,
    )
}
INTERLEAVED = {"strided", "pairs", "every_two", "from_repeated_table", "complex_pairs", "partial_interleaved"}
ROTARY_DIM = {"partial_split": 6, "partial_rotate_half": 6, "partial_interleaved": 4}


def inputs(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    tokens = shape[0] if len(shape) == 3 else shape[1]
    return jnp.asarray(rng.normal(0, 1, shape), dtype), jnp.asarray(rng.integers(0, 40, tokens), jnp.int32)


def wrapped(form: str, *args):
    """With positions in one tree with x: neither is a parameter."""
    return check(
        lambda pair: FORMS[form](*pair), args, passes=PASSES, expected=ROPE, tolerance=TOLERANCE[args[0].dtype.type]
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, dtype) -> None:
    module = str(wrapped(form, *inputs(1, (1, T, 3, D), dtype)))
    assert f"rotary_dim = {ROTARY_DIM.get(form, D)} : i64" in module
    assert ("interleaved = true" in module) == (form in INTERLEAVED)


@pytest.mark.parametrize("shape", [(T, 3, D), (1, T, 1, D), (T, 1, D), (1, D, D, D), (1, T, 5, D)], ids=str)
@pytest.mark.parametrize("form", ["split", "rotate_half", "pairs", "partial_rotate_half"])
def test_shapes(form: str, shape: tuple[int, ...]) -> None:
    """One head, and as many tokens as heads as features, do not confuse the dims."""
    wrapped(form, *inputs(2, shape))


def test_heads_before_tokens() -> None:
    """[1, H, T, D]: moved for the op and back."""

    def fn(pair):
        x, p = pair
        cos, sin = jnp.cos(angles(p)), jnp.sin(angles(p))
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    x, p = inputs(3, (1, T, 3, D))
    check(fn, (x.swapaxes(1, 2), p), passes=PASSES, expected=ROPE, tolerance=1e-5)


def test_packed_queries_and_keys() -> None:
    """Rotations of slices of one packed projection."""

    def fn(pair):
        x, p = pair
        q, k, v = jnp.split(x, 3, axis=-1)
        return split(q, p), split(k, p), v

    x, p = inputs(4, (1, T, 3, 3 * D))
    check(fn, (x, p), passes=PASSES, expected=ROPE * 2, tolerance=1e-5)


def test_grouped_queries() -> None:
    """[1, T, groups, heads of a group, D]."""

    def fn(pair):
        x, p = pair
        cos, sin = (t[:, :, None] for t in tables(jnp.zeros((1, T, 1, 1)), p))
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(0, 1, (1, T, 2, 3, D)), jnp.float32)
    check(fn, (x, jnp.arange(T)), passes=PASSES, expected=ROPE, tolerance=1e-5)


def near(change: str, x: Array, p: Array) -> Array:
    cos, sin = tables(x, p)
    a, b = jnp.split(x, 2, axis=-1)
    first, second = a * cos - b * sin, b * cos + a * sin
    if change == "other direction":
        first, second = a * cos + b * sin, b * cos - a * sin
    elif change == "one sign":
        first = a * cos + b * sin
    elif change == "halves exchanged":
        first, second = second, first
    elif change == "cosine twice":
        second = b * cos + a * cos
    elif change == "another sine":
        second = b * cos + a * sin[..., ::-1]
    elif change == "three terms":
        first = first + a * sin
    elif change == "one term":
        first = a * cos
    elif change == "wrong pair":
        first = a * cos - b[..., ::-1] * sin
    elif change == "another x":
        second = b * cos + jnp.tanh(a) * sin
    elif change == "kept first":
        return jnp.concatenate([x[..., :2], x[..., 2:4] * cos[..., :2] - x[..., 4:6] * sin[..., :2], first], axis=-1)
    elif change == "tables of heads":
        per_head = jnp.cos(jnp.arange(x.shape[-2], dtype=x.dtype))[:, None] * cos
        first, second = a * per_head - b * sin, b * per_head + a * sin
    elif change == "rounded on the way":
        first, second = (y.astype(jnp.bfloat16).astype(x.dtype) for y in (first, second))
    elif change == "kept changed":
        return jnp.concatenate([first, second, -x], axis=-1)
    return jnp.concatenate([first, second], axis=-1)


@pytest.mark.parametrize(
    "change",
    [
        "other direction",
        "one sign",
        "halves exchanged",
        "cosine twice",
        "another sine",
        "three terms",
        "one term",
        "wrong pair",
        "another x",
        "kept first",
        "tables of heads",
        "rounded on the way",
    ],
)
def test_near_misses(change: str) -> None:
    args = inputs(6, (1, T, 3, D))
    check(lambda pair: partial(near, change)(*pair), args, passes=PASSES, expected=[], tolerance=1e-6)


def test_double_table_whose_halves_differ() -> None:
    """x · cos + rotate_half(x) · sin is a rotation only if both halves of the tables are equal."""
    double = np.concatenate([ANGLES, ANGLES * 1.001], -1)

    def fn(pair):
        x, p = pair
        cos, sin = (heads(jnp.asarray(f(double))[p], x) for f in (np.cos, np.sin))
        return x * cos + jnp.concatenate([-x[..., H:], x[..., :H]], axis=-1) * sin

    args = inputs(7, (1, T, 3, D))
    assert ops_of(raised(lowered(fn, args), *PASSES)) == []


def test_double_table_taken_at_two_positions() -> None:
    """Halves of one table are not equal where the second is taken at other positions."""

    def fn(pair):
        x, p = pair
        cos, sin = (
            heads(jnp.concatenate([jnp.asarray(f(ANGLES))[p], jnp.asarray(f(ANGLES))[p + 1]], -1), x)
            for f in (np.cos, np.sin)
        )
        return x * cos + jnp.concatenate([-x[..., H:], x[..., :H]], axis=-1) * sin

    args = inputs(9, (1, T, 3, D))
    assert ops_of(raised(lowered(fn, args), *PASSES)) == []


def test_the_rotated_part_of_a_larger_result() -> None:
    """What follows the rotation is no part of x: the rotation itself is raised all the same."""
    args = inputs(8, (1, T, 3, D))
    check(lambda pair: near("kept changed", *pair), args, passes=PASSES, expected=[], tolerance=1e-6)

    def fn(pair):
        return jnp.concatenate([split(*pair), jnp.tanh(pair[0])], axis=-1)

    module = raised(lowered(fn, args), *PASSES)
    assert ops_of(module) in ([], ROPE)
