"""Which attention a map from scores to weights is: found by evaluating it, not by how it was written.

The map takes the scores q·k and the tokens' positions and gives the weights of the keys. It is run on chosen positions
and random scores; from what comes out, the causal mask, the sliding window and the ALiBi slopes are read, and then the
hypothesis

    weights = softmax over visible keys of (softcap(scale * scores) + slope_h * (key position - query position))

is checked on fresh random scores and positions, far ones included. ALiBi: Press et al., 2022 (arXiv:2108.12409).
Soft-cap: Gemma 2 (arXiv:2408.00118).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = Callable[[Array, Array], Array]
"""(scores [heads, n, n], positions int32 [n]) → weights [heads, n, n] of query i for key j."""


EXHAUSTIVE = 1024
"""Every pair of a query and a key below this position is judged, in tokens; beyond it, pairs drawn at random."""
LARGE_LOGITS = (24.0, 200.0)
"""How far large scores are apart: a float32 holds exp(3 · 24), the largest of the first."""
LARGEST_STEP = 1e4
"""Of large scores: float16 holds three times that."""
COARSE = 1e-3
"""A tolerance above it is of floats of 16 bits."""
LEAK = 1e-9
"""A weight larger than this for a key that the form hides is a leak, whatever the dtype: masks hide by far more."""


@dataclass(frozen=True, kw_only=True)
class ScoreFunction:
    """softcap(scale * score) before the mask; softcap None for none."""

    scale: float
    softcap: float | None

    def __call__(self, scores: Array) -> Array:
        scaled = self.scale * scores.astype(np.float64)
        return scaled if self.softcap is None else self.softcap * np.tanh(scaled / self.softcap)


@dataclass(frozen=True, kw_only=True)
class MaskForm:
    """A causal mask, with a window in tokens if it slides, and ALiBi slopes per head if there are any.

    `score` is what happens to a score before that, what comes after the mask included.
    """

    score: ScoreFunction
    window: int | None
    slopes: tuple[float, ...] | None


def expected_weights(form: MaskForm, scores: Array, positions: Array) -> Array:
    """The weights that `form` gives: float64 [heads, n, n]."""
    distance = positions[None, :].astype(np.int64) - positions[:, None]  # key - query
    logits = form.score(scores)
    if form.slopes is not None:
        logits = logits + np.asarray(form.slopes)[:, None, None] * distance
    visible = distance <= 0
    if form.window is not None:
        visible &= distance > -form.window
    logits = np.where(visible, logits, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
    result: Array = weights / total
    return result


def classify(
    weights: Weights,
    score: ScoreFunction,
    *,
    heads: int,
    length: int,
    max_seq_len: int,
    tolerance: float,
    factors: Sequence[float] = (),
    seed: int = 0,
) -> MaskForm | str:
    """The form of the attention, or the reason it is none that can be derived.

    Args:
        weights: the map, evaluated for `length` tokens at a time.
        score: what the map does to the scores before the mask, read from the graph.
        max_seq_len: positions below it are probed.
        factors: constants in the map, one of which may multiply the scores after the mask.
        tolerance: a tenth of how far a weight may be from what the form gives, as a share of it, by dtype.
    """
    rng = np.random.default_rng(seed)
    near = np.arange(length, dtype=np.int32)
    zeros = np.zeros((heads, length, length), np.float32)
    base = weights(zeros, near)
    if reason := _not_causal(base, near, tolerance):
        return reason
    score = _rescaled(weights, base, zeros, near, score, factors)
    slopes = _slopes(weights, zeros, near, max_seq_len, length)
    window = _window(weights, base, zeros, slopes, length, max_seq_len)
    form = MaskForm(score=score, window=window, slopes=slopes)
    for positions in _probes(rng, length, max_seq_len, window):
        for spread in (0.5, 3.0):
            scores = (rng.standard_normal((heads, length, length)) * spread / max(abs(score.scale), 1e-6)).astype(
                np.float32
            )
            if reason := _mismatch(weights(scores, positions), form, scores, positions, tolerance):
                return reason
    for step in _large_steps(form, tolerance):
        scores = (step * rng.integers(-3, 4, (heads, length, length))).astype(np.float32)
        with np.errstate(invalid="ignore"):
            got = weights(scores, near)
        got = np.where(np.isfinite(got).all(-1, keepdims=True), got, expected_weights(form, scores, near))
        if reason := _mismatch(got, form, scores, near, tolerance):
            return f"of scores {step * abs(form.score.scale):.0f} apart, {reason}"
    for positions in _every_pair(length, min(max_seq_len, EXHAUSTIVE)):
        if reason := _mismatch(weights(zeros, positions), form, zeros, positions, tolerance):
            return reason
    return form


def _large_steps(form: MaskForm, tolerance: float) -> list[float]:
    """Steps of scores that are far apart, to show what is clipped and masks that are not low enough.

    A row's weights then are the shares of its equal largest scores, and rounding changes nothing, but for what a
    soft-cap or slopes bring close again, which 16 bits are too few for. Weights that overflow, of a softmax that
    subtracts no maximum, say nothing.
    """
    if (form.slopes is not None or form.score.softcap is not None) and tolerance > COARSE:
        return []
    scale = max(abs(form.score.scale), 1e-6)
    return [min(logit / scale, LARGEST_STEP) for logit in LARGE_LOGITS]


def _not_causal(weights: Array, positions: Array, tolerance: float) -> str | None:
    if not np.isfinite(weights).all():
        _, q, k = np.argwhere(~np.isfinite(weights))[0]
        return f"the query at position {positions[q]} gets weights that are not finite (a mask that leaves it no key?)"
    later = np.triu(np.ones(weights.shape[1:], bool), 1)
    seen = (weights > LEAK) & later
    if seen.any():
        _, q, k = np.argwhere(seen)[0]
        return (
            f"the query at position {positions[q]} attends to the later position {positions[k]}: "
            "the mask is not causal (bidirectional or prefix attention)"
        )
    diagonal = np.diagonal(weights, axis1=1, axis2=2)
    if (diagonal <= tolerance**2).any():
        q = int(np.argwhere(diagonal <= tolerance**2)[0][1])
        return f"the query at position {positions[q]} does not attend to itself"
    return None


def _rescaled(
    weights: Weights, base: Array, zeros: Array, near: Array, score: ScoreFunction, factors: Sequence[float]
) -> ScoreFunction:
    """The score function with what multiplies the scores after the mask, measured and then taken from the graph."""
    probe = zeros.copy()
    probe[:, 1, 0] = 4.0 / score.scale if score.scale else 0.0
    wanted = float(score(probe[0, 1, :1])[0])
    got = weights(probe, near).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.log(got[:, 1, 0] / got[:, 1, 1]) - np.log(base[:, 1, 0] / base[:, 1, 1])
    ratio = float(moved[0] / wanted) if wanted else 1.0
    if not np.isfinite(moved).all() or not np.allclose(moved, moved[0], rtol=1e-3, atol=1e-6) or abs(ratio - 1) < 1e-2:
        return score
    exact = next((f for f in factors if abs(f / ratio - 1) < 1e-4), ratio)
    cap = score.softcap
    return ScoreFunction(scale=score.scale * exact, softcap=None if cap is None else cap * exact)


def consistent(weights: Weights, form: MaskForm, *, heads: int, length: int, tolerance: float, seed: int) -> str | None:
    """Whether a map has `form` at the positions 0, 1, …: None, or the reason it has not."""
    rng = np.random.default_rng(seed)
    positions = np.arange(length, dtype=np.int32)
    spread = 2.0 / max(abs(form.score.scale), 1e-6)
    scores = (rng.standard_normal((heads, length, length)) * spread).astype(np.float32)
    return _mismatch(weights(scores, positions), form, scores, positions, tolerance)


def _slopes(weights: Weights, zeros: Array, near: Array, max_seq_len: int, length: int) -> tuple[float, ...] | None:
    """ALiBi slopes from the decay of the weights with distance at equal scores, or None where there is none."""
    steps = np.unique(np.geomspace(1, max(max_seq_len - 1, 2), length * 4).astype(np.int32))
    steps = steps[np.linspace(0, len(steps) - 1, min(length - 1, len(steps))).astype(int)]
    pad = np.setdiff1d(near, steps)[: length - 1 - len(steps)]
    positions = np.sort(np.concatenate([[0], steps, pad[pad > 0]]).astype(np.int32))
    positions = np.unique(positions)
    if len(positions) < length:
        extra = np.setdiff1d(np.arange(max_seq_len + length, dtype=np.int32), positions)[: length - len(positions)]
        positions = np.sort(np.concatenate([positions, extra]))
    got = weights(zeros, positions).astype(np.float64)
    slopes = []
    for head in got:
        diagonal = np.diagonal(head)
        usable = (head > 1e-30) & (diagonal[:, None] > 1e-30)
        distance = positions[None, :].astype(np.float64) - positions[:, None]
        usable &= distance < 0
        if not usable.any():
            slopes.append(0.0)
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            decay = np.log(head) - np.log(diagonal)[:, None]
        q, k = np.unravel_index(np.argmin(np.where(usable, decay, np.inf)), decay.shape)
        slopes.append(float(decay[q, k] / distance[q, k]) if decay[q, k] < -0.5 else 0.0)
    if not any(slopes):
        return None
    return tuple(float(np.float32(s)) for s in slopes)


def _window(
    weights: Weights, base: Array, zeros: Array, slopes: tuple[float, ...] | None, length: int, max_seq_len: int
) -> int | None:
    """How many tokens a query sees, itself included, or None if it sees all before it."""

    def hidden(distances: Array) -> Array:
        """For each distance, whether position 0 is hidden from the query that far on. distances [length - 1]."""
        positions = np.concatenate([[0], distances]).astype(np.int32)
        unseen: Array = (weights(zeros, positions)[:, 1:, 0] == 0).all(axis=0)
        return unseen

    last: Array = np.any(base[:, -1, :] > 0, axis=0)
    if not last[0]:
        return int(last.sum())
    if slopes is not None or max_seq_len <= length:
        return None
    low, high = length - 1, max_seq_len - 1  # position 0 is seen from `low`
    while high > low:
        distances = np.unique(np.linspace(low, high, length - 1).astype(np.int32))
        padded = np.concatenate([distances, high + 1 + np.arange(length - 1 - len(distances), dtype=np.int32)])
        unseen = hidden(padded)[: len(distances)]
        if not unseen.any():
            return None
        first = int(np.argmax(unseen))
        if first == 0:
            return int(distances[0])
        low, high = int(distances[first - 1]), int(distances[first])
        if high - low <= 1:
            return high
    return None


def _probes(rng: np.random.Generator, length: int, max_seq_len: int, window: int | None) -> list[Array]:
    """Sets of distinct positions [length], int32: near, far, around the window's edge, and in no order."""
    span = max(max_seq_len, length)
    probes = [np.arange(length), np.arange(span - length, span)]
    probes.append(np.sort(rng.choice(span, length, replace=False)))
    probes.append(rng.choice(span, length, replace=False))
    if window is not None:
        half = length // 2
        edge = max(window - half // 2, half)
        probes.append(np.concatenate([np.arange(half), edge + np.arange(length - half)]))
    return [p.astype(np.int32) for p in probes]


def _every_pair(length: int, span: int) -> list[Array]:
    """Sets of positions [length], int32, in which every two positions below `span` come together."""
    if span <= length:
        return []  # the near probe has them all
    half = length // 2
    starts = [min(start, span - half) for start in range(0, span, half)]
    blocks = [np.arange(start, start + half) for start in starts]
    pairs = [np.union1d(a, b) for i, a in enumerate(blocks) for b in blocks[i + 1 :]]
    every = np.arange(span)  # what fills up is below the span too: a stored mask says nothing of positions beyond
    fills = [np.setdiff1d(every, pair)[: length - len(pair)] for pair in pairs]
    return [np.concatenate([a, b]).astype(np.int32) for a, b in zip(pairs, fills, strict=True)]


def _mismatch(got: Array, form: MaskForm, scores: Array, positions: Array, tolerance: float) -> str | None:
    expected = expected_weights(form, scores, positions)
    got = got.astype(np.float64)
    error = np.abs(got - expected)
    limit = tolerance * (0.02 + 10 * expected)  # rounding moves a weight in proportion to it
    wrong = ~(error <= limit)
    masked = expected == 0
    wrong |= masked & (got > LEAK)
    wrong |= (expected > 1e-5) & (got == 0)
    if not wrong.any():
        return None
    h, q, k = (int(i) for i in np.argwhere(wrong)[0])
    if positions[k] > positions[q] and got[h, q, k] > 0:
        return (
            f"the query at position {positions[q]} attends to the later position {positions[k]}: "
            "the mask is not causal (bidirectional or prefix attention)"
        )
    return (
        f"the weights are not a softmax of the scores under a causal mask: head {h}, query at position {positions[q]}, "
        f"key at position {positions[k]} has weight {got[h, q, k]:.6g}, expected {expected[h, q, k]:.6g} "
        f"({'no window' if form.window is None else f'window {form.window}'}, "
        f"{'no ALiBi slopes' if form.slopes is None else 'ALiBi slopes'})"
    )
