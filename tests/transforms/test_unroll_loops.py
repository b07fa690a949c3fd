"""Loops and branches that JAX lowers, unrolled: the same numbers, and which of them stay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from xdsl.dialects.builtin import ModuleOp

from llmir_jax.errors import UnsupportedModelError
from llmir_jax.interop import call_module, lower_to_module, op_name
from llmir_jax.transforms import unroll_loops as unroll
from llmir_jax.transforms.inline_calls import inline_calls

W = np.random.default_rng(0).normal(size=(5, 3, 3)).astype(np.float32)
X = np.random.default_rng(1).normal(size=3).astype(np.float32)
KINDS = {"stablehlo.while", "stablehlo.case", "stablehlo.if"}


def unrolled(fn: Callable[..., Any], *args: Any) -> tuple[ModuleOp, int]:
    module = lower_to_module(jax.jit(fn), *args)
    inline_calls(module)
    count = unroll.unroll_loops(module)
    module.verify()
    return module, count


def left_of(module: ModuleOp) -> list[str]:
    return [op_name(op) for op in module.walk() if op_name(op) in KINDS]


def check(fn: Callable[..., Any], *args: Any, loops: int) -> None:
    """All loops go, `loops` of them with the branches; the function stays."""
    module, count = unrolled(fn, *args)
    assert left_of(module) == []
    assert count == loops
    expected = jax.tree.leaves(jax.jit(fn)(*args))
    for got, want in zip(call_module(module, *args), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert unroll.unroll_loops(module) == 0


def layer(x: Any, w: Any) -> tuple[Any, Any]:
    y = jnp.tanh(w @ x)
    return y, y.sum()


@pytest.mark.parametrize("reverse", [False, True])
def test_scan(reverse: bool) -> None:
    check(lambda x, w: lax.scan(layer, x, w, reverse=reverse), X, W, loops=1)


@pytest.mark.parametrize("length", [0, 1])
def test_few_trips(length: int) -> None:
    check(lambda x, w: lax.scan(layer, x, w[:length]), X, W, loops=length)


def test_nested() -> None:
    def outer(x: Any, w: Any) -> tuple[Any, None]:
        return lax.fori_loop(0, 3, lambda i, y: jnp.tanh(w @ y) + i, x), None

    check(lambda x, w: lax.scan(outer, x, w)[0], X, W, loops=1 + 5)


def test_branch_on_the_layer() -> None:
    """A choice by the counter is no choice once the loop is unrolled."""

    def body(i: Any, x: Any) -> Any:
        return lax.cond(i % 2 == 0, jnp.sin, lambda y: lax.switch(i // 2, [jnp.cos, jnp.tanh], y), x)

    check(lambda x: lax.fori_loop(0, 4, body, x), X, loops=1 + 4 + 2)


def test_flags_by_layer() -> None:
    flags = np.array([True, False, True, True, False])

    def body(x: Any, inputs: Any) -> tuple[Any, None]:
        w, flag = inputs
        return lax.cond(flag, lambda y: w @ y, lambda y: y + 1, x), None

    check(lambda x, w: lax.scan(body, x, (w, flags))[0], X, W, loops=1 + 5)


def test_index_out_of_range_takes_the_last_branch() -> None:
    module, _ = unrolled(lambda x: lax.fori_loop(0, 4, lambda i, y: lax.switch(i - 1, [jnp.sin, jnp.cos], y), x), X)
    expected = lax.fori_loop(0, 4, lambda i, y: lax.switch(i - 1, [jnp.sin, jnp.cos], y), X)
    np.testing.assert_allclose(call_module(module, X)[0], expected, rtol=1e-6)


def test_unknown_trip_counts_stay() -> None:
    module, count = unrolled(lambda x, n: lax.fori_loop(0, n, lambda i, y: y * 2, x), X, np.int32(3))
    assert (left_of(module), count) == (["stablehlo.while"], 0)
    module, count = unrolled(lambda x: lax.while_loop(lambda c: c.sum() < 10, lambda c: c + 1, x), X)
    assert (left_of(module), count) == (["stablehlo.while"], 0)
    module, count = unrolled(lambda x, p: lax.cond(p, jnp.sin, jnp.cos, x), X, np.bool_(True))
    assert (len(left_of(module)), count) == (1, 0)


def test_conditions_that_ask_for_more_stay() -> None:
    def condition(carry: Any) -> Any:
        return (carry[0] < 4) & (carry[1].sum() < 10)

    module, count = unrolled(lambda x: lax.while_loop(condition, lambda c: (c[0] + 1, c[1] * 2), (0, x)), X)
    assert (left_of(module), count) == (["stablehlo.while"], 0)


def test_steps_of_two_stay() -> None:
    module, _ = unrolled(lambda x: lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 2, c[1] * 2), (0, x)), X)
    assert left_of(module) == ["stablehlo.while"]


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unroll, "MAX_UNROLLED_OPS", 20)
    with pytest.raises(UnsupportedModelError, match=r"stablehlo\.while at .*test_unroll_loops\.py.*more than 20"):
        unrolled(lambda x: lax.fori_loop(0, 50, lambda i, y: jnp.sin(y) * i, x), X)


@given(
    st.lists(
        st.sampled_from(["+", "-", "*", "max", "min", "rem", "<", "where", "slice", "neg", "//", "sign"]),
        min_size=1,
        max_size=6,
    ),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 4),
)
@settings(max_examples=25, deadline=None)
def test_arithmetic_on_the_counter(names: list[str], constant: int, place: int) -> None:
    """Folded integer arithmetic, overflow included, is what XLA computes."""
    table = jnp.asarray([5, -3, 2**31 - 1, 0, 7], jnp.int32)
    c = np.int32(constant)
    steps: dict[str, Callable[[Any, Any], Any]] = {
        "+": lambda a, i: a + c,
        "-": lambda a, i: c - a,
        "*": lambda a, i: a * i,
        "max": lambda a, i: jnp.maximum(a, c),
        "min": lambda a, i: jnp.minimum(a, i),
        "rem": lambda a, i: lax.rem(a, np.int32(7)),
        "<": lambda a, i: (a < c).astype(jnp.int32),
        "where": lambda a, i: jnp.where(a >= i, a, c),
        "slice": lambda a, i: a + lax.dynamic_index_in_dim(table, i - 2, keepdims=False),
        "//": lambda a, i: a // 3,
        "sign": lambda a, i: jnp.sign(a),
        "neg": lambda a, i: -a,
    }

    def body(i: Any, carry: Any) -> Any:
        value = i + np.int32(place)
        for name in names:
            value = steps[name](value, i)
        return carry.at[i].set(value)

    def fn(x: Any) -> Any:
        return lax.fori_loop(0, 5, body, x)

    zeros = np.zeros(5, np.int32)
    module, _ = unrolled(fn, zeros)
    assert left_of(module) == []
    np.testing.assert_array_equal(call_module(module, zeros)[0], jax.jit(fn)(zeros))
