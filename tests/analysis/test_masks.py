"""Judging maps from scores to weights: forms that are recognised, exactly, and near-misses, which are refused."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmir_jax.analysis.masks import MaskForm, ScoreFunction, classify, consistent
from llmir_jax.transforms.judge_weights import TOLERANCE

Array = np.ndarray[Any, Any]
Visible = Callable[[Array, Array], Array]  # (query positions [n, 1], key positions [1, n]) → bool [n, n]
HEADS, LENGTH, LONGEST = 2, 17, 300
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def causal(q: Array, k: Array) -> Array:
    return k <= q


def within(window: int) -> Visible:
    return lambda q, k: (k <= q) & (q - k < window)


def attention(
    visible: Visible = causal,
    *,
    scale: float = 0.25,
    softcap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    after: float = 1.0,
    hidden: float = -np.inf,
    bias: Callable[[Array, Array], Array] | None = None,
    dtype: np.dtype = F32,
) -> Callable[[Array, Array], Array]:
    """The map of an attention, each step rounded to `dtype`. `after` multiplies what the mask has been applied to."""

    def round_(x: Array) -> Array:
        return x.astype(dtype).astype(np.float32)

    def weights(scores: Array, positions: Array) -> Array:
        q, k = positions[:, None].astype(np.int64), positions[None, :].astype(np.int64)
        s = round_(round_(scores) * np.float32(scale))
        if softcap is not None:
            s = round_(softcap * np.tanh(s / softcap))
        if slopes is not None:
            s = round_(s + np.asarray(slopes, np.float32)[:, None, None] * (k - q))
        if bias is not None:
            s = round_(s + bias(q, k))
        s = np.where(visible(q, k), s, np.float32(hidden)) * np.float32(after)
        with np.errstate(invalid="ignore"):
            e = np.exp(s - s.max(-1, keepdims=True))
            return round_(e / e.sum(-1, keepdims=True))

    return weights


def judge(
    weights: Callable[[Array, Array], Array], scale: float = 0.25, softcap: float | None = None, **options: Any
) -> Any:
    dtype = options.pop("dtype", F32)
    given = {"heads": HEADS, "length": LENGTH, "max_seq_len": LONGEST, "tolerance": TOLERANCE[dtype.itemsize]}
    return classify(weights, ScoreFunction(scale=scale, softcap=softcap), **(given | options))


def test_causal() -> None:
    assert judge(attention()) == MaskForm(score=ScoreFunction(scale=0.25, softcap=None), window=None, slopes=None)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("window", [1, 2, 16, 17, 18, 40, 299])
def test_window(window: int, dtype: np.dtype) -> None:
    form = judge(attention(within(window), hidden=-1e9, dtype=dtype), dtype=dtype)
    assert isinstance(form, MaskForm), form
    assert (form.window, form.slopes) == (window, None)


@pytest.mark.parametrize("window", [300, 1000])
def test_window_that_no_sequence_reaches(window: int) -> None:
    form = judge(attention(within(window)))
    assert isinstance(form, MaskForm)
    assert form.window is None


@given(st.tuples(*[st.sampled_from([2.0**-n for n in range(1, 9)])] * HEADS))
@settings(max_examples=10, deadline=None)
def test_alibi(slopes: tuple[float, ...]) -> None:
    form = judge(attention(slopes=slopes))
    assert isinstance(form, MaskForm), form
    np.testing.assert_allclose(form.slopes, slopes, rtol=1e-4)


def test_one_head_without_slope() -> None:
    form = judge(attention(slopes=(0.25, 0.0)))
    assert isinstance(form, MaskForm)
    np.testing.assert_allclose(form.slopes, (0.25, 0.0), rtol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_softcap(dtype: np.dtype) -> None:
    form = judge(attention(softcap=5.0, dtype=dtype), softcap=5.0, dtype=dtype)
    assert isinstance(form, MaskForm), form
    assert form.score == ScoreFunction(scale=0.25, softcap=5.0)


def test_factor_after_the_mask() -> None:
    form = judge(attention(after=0.7, hidden=-1e9), factors=(3.0, 0.7))
    assert isinstance(form, MaskForm), form
    assert form.score.scale == pytest.approx(0.25 * 0.7, rel=1e-6)


@pytest.mark.parametrize("hidden", [-1e4, -1e9, float(np.finfo(np.float32).min), -np.inf])
def test_values_that_hide(hidden: float) -> None:
    assert isinstance(judge(attention(hidden=hidden)), MaskForm)


def leak(at_query: int, at_key: int) -> Visible:
    return lambda q, k: (k <= q) | ((q == at_query) & (k == at_key))


def hole(at_query: int, at_key: int) -> Visible:
    return lambda q, k: (k <= q) & ~((q == at_query) & (k == at_key))


def clipped(at: float) -> Callable[[Array, Array], Array]:
    """Attention to scores that are clipped at so many times the scale."""
    attend = attention()
    return lambda scores, positions: attend(np.clip(scores, -at / 0.25, at / 0.25), positions)


REFUSED: dict[str, tuple[Callable[[Array, Array], Array], str]] = {
    "scores clipped out of sight": (clipped(40), "of scores 24 apart"),
    "scores clipped far out of sight": (clipped(300), "of scores 200 apart"),
    "a mask that large scores reach": (attention(hidden=-40.0), "of scores 24 apart"),
    "everything": (attention(lambda q, k: k >= 0), "later position"),
    "one leaked key": (attention(leak(3, 9)), "later position 9"),
    "one key ahead": (attention(lambda q, k: k <= q + 1), "later position"),
    "prefix": (attention(lambda q, k: (k <= q) | (k < 5)), "later position"),
    "one hole": (attention(hole(12, 3)), "not a softmax"),
    "strictly before": (attention(lambda q, k: k < q), "not finite"),
    "not itself": (attention(lambda q, k: (k < q) | ((q == 0) & (k == 0))), "does not attend to itself"),
    "window and first tokens": (attention(lambda q, k: (k <= q) & ((q - k < 4) | (k < 2))), "not a softmax"),
    "window that grows": (attention(lambda q, k: (k <= q) & (q - k < np.where(q < 40, 3, 6))), "not a softmax"),
    "window that begins far on": (attention(lambda q, k: (k <= q) & ((q < 100) | (q - k < 50))), "not a softmax"),
    "wider window in places": (attention(lambda q, k: (k <= q) & (q - k < 4 + q % 2)), "not a softmax"),
    "chunks": (attention(lambda q, k: (k <= q) & (k // 8 == q // 8)), "not a softmax"),
    "far chunks": (attention(lambda q, k: (k <= q) & (k // 64 == q // 64)), "not a softmax"),
    "every second key": (attention(lambda q, k: (k <= q) & ((q - k) % 2 == 0)), "not a softmax"),
    "a mask that is too weak": (attention(hidden=-12.0), "later position"),
    "another cap": (attention(softcap=20.0), "not a softmax"),
    "slopes of the wrong sign": (attention(slopes=(-0.25, -0.5)), "not a softmax"),
    "slopes from the start only": (attention(bias=lambda q, k: -0.1 * np.minimum(q - k, 30)), "not a softmax"),
    "bias by absolute position": (attention(bias=lambda q, k: 0.05 * (k % 7)), "not a softmax"),
    "small bias far on": (attention(bias=lambda q, k: 0.01 * (q - k > 64)), "not a softmax"),
    "square of the distance": (attention(bias=lambda q, k: -0.01 * (q - k) ** 2), "not a softmax"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_near_miss(name: str) -> None:
    weights, because = REFUSED[name]
    reason = judge(weights)
    assert isinstance(reason, str), reason
    assert because in reason


def test_half_weights_are_no_excuse() -> None:
    """What bfloat16 rounds away is a share of a weight, not a key."""
    for visible in (hole(12, 3), lambda q, k: (k <= q) & ((q - k < 9) | ((q - k) % 3 == 0))):
        assert isinstance(judge(attention(visible, hidden=-1e9, dtype=BF16), dtype=BF16), str)
    assert isinstance(judge(attention(hidden=-12.0, dtype=BF16), dtype=BF16), str)
    assert isinstance(judge(attention(bias=lambda q, k: 0.5 * (q - k > 8), dtype=BF16), dtype=BF16), str)


def test_scores_that_are_not_normalised() -> None:
    def sigmoid(scores: Array, positions: Array) -> Array:
        return np.where(causal(positions[:, None], positions[None, :]), 1 / (1 + np.exp(-0.25 * scores)), 0)

    assert isinstance(judge(sigmoid), str)


def test_heads_that_are_mixed_up() -> None:
    plain = attention()
    assert isinstance(judge(lambda scores, positions: plain(scores[::-1], positions)), str)


def test_a_scale_of_its_own_for_each_head() -> None:
    plain, factors = attention(), np.array([1, 1.3], np.float32)[:, None, None]
    assert isinstance(judge(lambda scores, positions: plain(scores * factors, positions)), str)


def test_consistent() -> None:
    form = judge(attention(within(5)))
    assert isinstance(form, MaskForm)
    options = {"heads": HEADS, "length": 11, "tolerance": TOLERANCE[4], "seed": 1}
    assert consistent(attention(within(5)), form, **options) is None
    assert consistent(attention(within(6)), form, **options) is not None


@pytest.mark.parametrize("place", [(LONGEST - 1, 5), (150, 149), (211, 77), (77, 211), (5, LONGEST - 1)])
def test_one_pair_of_a_stored_mask(place: tuple[int, int]) -> None:
    """A stored mask of the longest length is judged whole, and not beyond its end."""
    stored = np.tril(np.ones((LONGEST, LONGEST), bool))

    def look_up(q: Array, k: Array) -> Array:
        return stored[np.minimum(q, LONGEST - 1), np.minimum(k, LONGEST - 1)]

    assert isinstance(judge(attention(look_up)), MaskForm)
    stored[place] ^= True
    assert isinstance(judge(attention(look_up)), str)
