"""The rule of each operation: what it does to the token axis, and when it mixes tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from traces import WIDTH, analysed, result_of

from llmir_jax.analysis.reshape import TokenDim

Params = dict[str, jax.Array]
Mix = Callable[[Params, jax.Array], jax.Array]


def params() -> Params:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "embed": draw(29, WIDTH), "w": draw(WIDTH, WIDTH), "four": draw(4), "table": draw(300, WIDTH),
        "kernel": draw(3, WIDTH, WIDTH), "narrow": draw(3, 1, 1), "flag": jnp.float32(1), "rows": jnp.arange(2),
    }  # fmt: skip


def after_embedding(mix: Mix) -> Callable[[Params, jax.Array], jax.Array]:
    """`mix` of the embedded tokens [1, T, WIDTH]."""
    return lambda p, tokens: mix(p, p["embed"][tokens])


POINTWISE: dict[str, Mix] = {
    "elementwise": lambda p, x: jnp.tanh(x) * x + 1,
    "select": lambda p, x: jnp.where(x > 0, x, 0.1 * x),
    "clamp": lambda p, x: jnp.clip(x, -1, 1),
    "matmul": lambda p, x: x @ p["w"],
    "matmul from the left": lambda p, x: jnp.einsum("cd,btc->btd", p["w"], x),
    "tokens as a batch": lambda p, x: jnp.einsum("btc,btd->btcd", x, x).sum(2),
    "reduce over channels": lambda p, x: x - x.mean(-1, keepdims=True),
    "argmax over channels": lambda p, x: x * jnp.argmax(x, -1)[..., None],
    "transposes and reshapes": lambda p, x: x[0].T.reshape(2, 4, -1).transpose(2, 0, 1).reshape(1, -1, WIDTH),
    "flattened with channels and back": lambda p, x: (x.reshape(-1) * 2).reshape(x.shape),
    "flattened in the same order": lambda p, x: (
        x[0, :, :4].reshape(-1) * jnp.broadcast_to(p["four"], (x.shape[1], 4)).reshape(-1)
    ).reshape(1, -1, 4),
    "flattened channels first": lambda p, x: (x[0].T.reshape(-1) * 2).reshape(WIDTH, -1).T[None],
    "concatenate channels": lambda p, x: jnp.concatenate([x[..., 4:], -x[..., :4]], -1),
    "slice channels": lambda p, x: x[..., 2:6],
    "pad channels": lambda p, x: jnp.pad(x, ((0, 0), (0, 0), (1, 1))),
    "sort channels": lambda p, x: jnp.sort(x, -1),
    "top of the channels": lambda p, x: lax.top_k(x, 3)[0],
    "reverse channels": lambda p, x: jnp.flip(x, -1),
    "cumulative over channels": lambda p, x: jnp.cumsum(x, -1),
    "fft over channels": lambda p, x: jnp.fft.fft(x, axis=-1).real,
    "gather channels by token": lambda p, x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1),
    "gather of a table": lambda p, x: p["table"][jnp.argmax(x, -1)],
    "scatter to channels": lambda p, x: x.at[0, jnp.arange(x.shape[1]), jnp.argmax(x[0], -1)].set(0.0),
    "update of channels": lambda p, x: x.at[..., 2:4].set(0.0),
    "convolution over channels": lambda p, x: lax.conv_general_dilated(
        x[0][..., None], p["narrow"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[None, ..., 0],
    "positions": lambda p, x: x + jnp.sin(jnp.arange(x.shape[1]))[None, :, None],
    "rows of a table": lambda p, x: x + p["table"][: x.shape[1]],
    "later rows of a table": lambda p, x: x + p["table"][2 : x.shape[1] + 2],
    "precision": lambda p, x: lax.reduce_precision(x, 8, 7),
    "barrier": lambda p, x: lax.optimization_barrier((x, x * 2))[1],
}

MIXING: dict[str, tuple[Mix, str]] = {
    "sum over tokens": (lambda p, x: x - x.sum(1, keepdims=True), "reduces over the token axis"),
    "product over tokens": (lambda p, x: jnp.einsum("btc,btd->bcd", x, x), "sums over the token axis"),
    "matrix over tokens": (lambda p, x: jnp.einsum("ts,bsc->btc", jnp.eye(x.shape[1]), x), "sums over the token axis"),
    "part of the tokens": (lambda p, x: x[:, :1] + x, "part of the token axis"),
    "shift": (lambda p, x: jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1], "pads or shifts|odd|axis of"),
    "shift by pad": (lambda p, x: lax.pad(x, 0.0, ((0, 0, 0), (1, -1, 0), (0, 0, 0))), "pads or shifts"),
    "shift by roll": (lambda p, x: jnp.roll(x, 1, 1), "part of the token axis|concatenates along|axis of"),
    "shift by gather": (lambda p, x: x[:, jnp.maximum(jnp.arange(x.shape[1]) - 1, 0)], "gathers single tokens"),
    "shift by window": (
        lambda p, x: lax.reduce_window(x, 0.0, lax.add, (1, 1, 1), (1, 1, 1), ((0, 0), (1, -1), (0, 0))),
        "shifts along the token axis",
    ),
    "reverse": (lambda p, x: jnp.flip(x, 1), "reverses along the token axis"),
    "sort tokens": (lambda p, x: jnp.sort(x, 1), "sorts along the token axis"),
    "cumulative over tokens": (lambda p, x: jnp.cumsum(x, 1), "accumulates"),
    "fft over tokens": (lambda p, x: jnp.fft.fft(x, axis=1).real, "transforms along the token axis"),
    "convolution over tokens": (
        lambda p, x: lax.conv_general_dilated(x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        "convolves along the token axis",
    ),
    "scatter of tokens": (lambda p, x: p["table"].at[jnp.argmax(x[0], -1)].add(x[0])[None, :1] + x, "scatters tokens"),
    "scatter to other rows": (
        lambda p, x: x.at[0, jnp.maximum(jnp.arange(x.shape[1]) - 1, 0), 0].set(0.0),
        "scatters",
    ),
    "tokens in a buffer": (
        lambda p, x: x + jnp.zeros((1, 300, WIDTH)).at[:, : x.shape[1]].set(x).sum(1, keepdims=True),
        "loses the token axis|updates part",
    ),
    "flattened in different orders": (
        lambda p, x: x[..., :1] + (x[0, :, :4].T.reshape(-1) * x[0, :, 4:].reshape(-1)).reshape(4, -1).T[None, :, :1],
        "flattened in different orders",
    ),
    "a parameter flattened in another order": (
        lambda p, x: (x[0, :, :4].T.reshape(-1) * jnp.broadcast_to(p["four"], (x.shape[1], 4)).reshape(-1)).reshape(
            1, -1, 4
        ),
        "flattened in different orders",
    ),
    "split": (
        lambda p, x: jnp.concatenate([x, x], 1).reshape(1, 2, -1, WIDTH).sum(1),
        "concatenates along the token axis|splits",
    ),
    "loop until tokens agree": (
        lambda p, x: lax.while_loop(lambda c: jnp.abs(c).max() > 1, lambda c: c * 0.5, x),
        "is not known to treat tokens one by one",
    ),
    "branch": (
        lambda p, x: lax.cond(p["flag"] > 0, lambda y: y.sum(1), lambda y: y[:, 0] * 0, x)[:, None] + x,
        "loses the token axis",
    ),
    "length": (lambda p, x: x / x.shape[1], "depends on the sequence length"),
    "length by a sum of ones": (lambda p, x: x * jnp.ones(x.shape[1]).sum(), "reduces over the token axis"),
    "length by a product": (
        lambda p, x: x * jnp.vdot(jnp.ones(x.shape[1]) * p["flag"], jnp.ones(x.shape[1])),
        "sums over the token axis",
    ),
    "last position": (lambda p, x: x * jnp.arange(x.shape[1]).max(), "reduces over the token axis"),
    "as many rows as tokens, not by position": (
        lambda p, x: x + jax.vmap(lambda i: lax.dynamic_slice(p["table"], (i, 0), x.shape[1:]))(p["rows"]).sum(0),
        "out of something that does not run over tokens",
    ),
    "positions from the end": (
        lambda p, x: x + jnp.sin(x.shape[1] - 1.0 - jnp.arange(x.shape[1]))[None, :, None],
        "depends on the sequence length",
    ),
}  # fmt: skip


INDEXED = frozenset({"shift by gather", "scatter to other rows"})
"""Where the indices are constants of the traced length: that they are tables of the position is taken as proved."""


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str) -> None:
    axis = analysed(after_embedding(POINTWISE[name]), params())
    assert axis.violations == {}
    info = result_of(axis)
    assert info.tokens
    assert info.dims[:2] == (None, TokenDim())
    assert all(dim is None for dim in info.dims[2:])


@pytest.mark.parametrize("name", MIXING)
def test_mixing(name: str) -> None:
    mix, because = MIXING[name]
    axis = analysed(
        after_embedding(mix), params(), (lambda value: None) if name in INDEXED else (lambda value: "no table")
    )
    reasons = list(axis.violations.values())
    assert reasons
    assert any(word in reasons[0] for word in because.split("|")), reasons


def test_positions_are_no_violation() -> None:
    """What depends on positions alone may be computed in any way: it is tabulated."""
    seen: list[Any] = []

    def is_table(value: Any) -> None:
        seen.append(value)

    def count(p: Params, x: jax.Array) -> jax.Array:
        return x + jnp.cumsum(jnp.ones(x.shape[1]))[None, :, None]

    axis = analysed(after_embedding(count), params(), is_table)
    assert axis.violations == {}
    assert axis.tables == seen
    assert len(seen) == 1
    assert axis.info[seen[0]].dims == (TokenDim(),)


def test_no_table_if_a_parameter_takes_part() -> None:
    axis = analysed(
        after_embedding(lambda p, x: x + jnp.cumsum(p["flag"] * jnp.ones(x.shape[1]))[None, :, None]),
        params(),
        lambda value: None,
    )
    assert "depends on parameters" in next(iter(axis.violations.values()))


def test_pairs_of_tokens_have_two_axes() -> None:
    axis = analysed(lambda p, tokens: jnp.einsum("btc,bsc->bts", p["embed"][tokens], p["embed"][tokens]), params())
    assert axis.violations == {}
    assert result_of(axis).token_dims == (1, 2)
