"""The device sampler against plain numpy that sorts, on random logits with many ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmir_jax.runtime import sampler
from llmir_jax.runtime.sampling import MAX_LOGPROBS

VOCAB = 611  # three blocks of the draw, the last not full


def row(**values: float) -> sampler.SamplingRows:
    packing = sampler.rows_packing(1)
    _, views = packing.allocate()
    views["temperature"][:] = 1
    for name, value in values.items():
        views[name][:] = value
    return sampler.SamplingRows(**{name: jnp.asarray(view[0]) for name, view in views.items()})


def rows(num_rows: int, **values: object) -> sampler.SamplingRows:
    packing = sampler.rows_packing(num_rows)
    buffer, views = packing.allocate()
    views["is_sampled"][:] = 1
    for name, value in values.items():
        views[name][:] = value
    return sampler.SamplingRows(**packing.unpack(jnp.asarray(buffer)))


def numpy_weights(logits: np.ndarray, *, temperature=1.0, top_k=0, top_p=0.0, min_p=0.0):
    """The definition, by sorting; and how far the nearest nucleus sum is from top_p."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    if top_k:
        kth = np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
        weights[logits < kth] = 0
    margin = 1.0
    if top_p:
        order = np.argsort(-weights, kind="stable")
        sums = np.cumsum(weights[order]) / weights.sum()
        margin = np.abs(sums - top_p).min()
        last = weights[order][np.argmax(sums >= top_p)]
        weights[weights < last] = 0
    weights[weights < min_p] = 0
    return weights, margin


weights_of = jax.jit(sampler.weights)
few_weights_of = jax.jit(sampler.few_weights)
draw_of = jax.jit(sampler.draw)
sample_of = jax.jit(sampler.sample)


def random_logits(seed: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=VOCAB) * rng.choice([0.1, 1, 5, 30])
    if kind == "ties":
        logits = np.round(logits)
    if kind == "flat":
        logits[:] = rng.normal()
    if kind == "masked":
        logits[rng.random(VOCAB) < 0.7] = -np.inf
        logits[0] = 1.0
    if kind == "signed zeros":
        logits = np.where(rng.random(VOCAB) < 0.5, 0.0, -0.0)
        logits[:3] = 1
    return logits.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["random", "ties", "flat", "masked", "signed zeros"]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, VOCAB - 1, VOCAB]),
    top_p=st.sampled_from([0, 1e-6, 0.1, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0, 0.05, 0.5, 1.0]),
)
def test_filters_keep_what_sorting_keeps(seed, kind, temperature, top_k, top_p, min_p):
    logits = random_logits(seed, kind)
    expected, margin = numpy_weights(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # A threshold within rounding of a sum or a weight may fall on either side.
    all_weights, _ = numpy_weights(logits, temperature=temperature)
    if margin < 1e-5 or (min_p and np.abs(all_weights - min_p).min() < 1e-5 and min_p < 1):
        return
    got = np.asarray(
        weights_of(logits, row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)), np.float64
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-30)
    assert got.max() == 1
    if kind != "ties":
        np.testing.assert_array_equal(got > 1e-30, expected > 1e-30)

    ids, few, is_all = few_weights_of(logits, row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    if kind == "random" and temperature >= 0.7:  # so that no weight is too small for a float
        assert is_all or top_k >= len(few) or (expected > 0).sum() >= len(few)
    if is_all:
        scattered = np.zeros(VOCAB)
        scattered[ids] = few
        np.testing.assert_allclose(scattered, expected, rtol=1e-4, atol=1e-30)
        assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("vocab_size", [1, 63, 97, 4097, 5000, 49_152])
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_the_largest_are_those_of_a_sort(vocab_size: int, kind: str):
    logits = np.random.default_rng(vocab_size).normal(size=vocab_size).astype(np.float32) * 3
    if kind == "ties":
        logits = np.round(logits)
    values, ids = jax.jit(sampler._largest, static_argnums=1)(logits, min(64, vocab_size))
    np.testing.assert_array_equal(values, np.sort(logits)[::-1][:64])
    np.testing.assert_array_equal(logits[ids], values)
    assert len(set(ids.tolist())) == len(ids)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), uniform=st.floats(0, 1, exclude_max=True, width=32), share=st.floats(0, 1))
def test_draw_inverts_the_cumulative_sum(seed, uniform, share):
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(VOCAB) < share, rng.random(VOCAB), 0).astype(np.float32)
    weights[rng.integers(VOCAB)] = 1
    token = int(draw_of(weights, np.float32(uniform)))
    assert weights[token] > 0
    sums = np.cumsum(weights.astype(np.float64)) / weights.sum(dtype=np.float64)
    before = sums[token - 1] if token else 0.0
    assert before - 1e-6 <= uniform <= sums[token] + 1e-6


def test_draws_have_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    num = 4000
    tokens, _ = sample_of(
        np.tile(logits, (num, 1)), np.zeros((num, 4), bool), rows(num, temperature=1, token_idx=np.arange(num))
    )
    share = np.bincount(tokens.token, minlength=4) / num
    # The seed is fixed, so this never changes; the bound is four standard deviations.
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=4 * 0.5 / num**0.5)


def test_a_draw_depends_on_its_own_row_only():
    logits = np.stack([random_logits(i, "random") for i in range(4)])
    asked = {"temperature": [0.9, 0, 2, 0.9], "top_k": [0, 0, 50, 5], "top_p": [0.9, 0, 0, 0.5], "seed": [[0, 7]] * 4}
    together, _ = sample_of(logits, np.zeros(logits.shape, bool), rows(4, token_idx=[3, 4, 5, 6], **asked))
    for i in range(4):
        alone_asked = {name: [values[i]] * 4 for name, values in asked.items()}
        alone, _ = sample_of(
            np.tile(logits[i], (4, 1)), np.zeros(logits.shape, bool), rows(4, token_idx=3 + i, **alone_asked)
        )
        assert set(np.asarray(alone.token).tolist()) == {int(together.token[i])}


def test_rows_in_parallel_give_what_rows_in_turn_give():
    """Other platforms than the CPU take all rows at once."""
    logits = np.stack([random_logits(i, kind) for i, kind in enumerate(["random", "ties", "masked", "flat"] * 2)])
    asked = rows(
        8,
        temperature=[0.5, 1, 2, 1] * 2,
        top_k=[0, 0, 0, 0, 3, 3, 3, 3],
        top_p=[0, 0.5] * 4,
        min_p=[0, 0, 0.1, 0] * 2,
        seed=[[1, i] for i in range(8)],
    )
    one = jax.jit(jax.vmap(lambda x, r: sampler.draw(sampler.weights(x, r), sampler._uniform(r))))
    tokens, _ = sample_of(logits, np.zeros(logits.shape, bool), asked)
    np.testing.assert_array_equal(tokens.token, one(logits, asked))


def test_seed_is_that_of_jax_random_key():
    key = jax.random.fold_in(jax.random.key(123, impl="threefry2x32"), 9)
    got = sampler._uniform(row(seed=sampler.seed_words(123), token_idx=9))
    assert got == jax.random.uniform(key)
    assert sampler.seed_words(2**63 + 5).tolist() == [2**31, 5]


@pytest.mark.parametrize("kind", ["random", "ties", "flat", "masked"])
def test_greedy_is_the_first_of_the_largest(kind: str):
    logits = np.stack([random_logits(seed, kind) for seed in range(5)])
    np.testing.assert_array_equal(sampler.greedy(jnp.asarray(logits)), logits.argmax(-1))
    tokens, _ = sample_of(logits, np.zeros(logits.shape, bool), rows(5))
    np.testing.assert_array_equal(tokens.token, logits.argmax(-1))


def test_nan_gives_no_token():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[0, 5] = np.nan
    logits[1, 5] = np.inf  # greedy can take it, a draw cannot
    tokens, seen = sample_of(logits, np.zeros(logits.shape, bool), rows(3, temperature=1))
    assert tokens.token[0] == tokens.token[1] == VOCAB
    assert tokens.token[2] < VOCAB
    assert np.asarray(seen).sum(-1).tolist() == [0, 0, 1]
    assert np.asarray(sampler.greedy(jnp.asarray(logits))).tolist() == [VOCAB, 5, 0]


def test_repetition_penalty_and_seen_tokens():
    logits = np.array([[3.0, 2.9, -0.1, -0.2]] * 3, np.float32)
    seen = sampler.fill_seen(jnp.ones((3, 4), bool), jnp.int32(0), jnp.asarray([0, 2, 9, 9]))
    assert np.asarray(seen).tolist() == [[True, False, True, False], [True] * 4, [True] * 4]
    np.testing.assert_array_equal(sampler.fill_seen(seen, jnp.int32(3), jnp.asarray([0])), seen)
    asked = rows(3, repetition_penalty=[2, 0, 0], is_sampled=[1, 1, 0])
    tokens, seen = sample_of(logits, np.asarray(seen) & [[True], [False], [False]], asked)
    assert np.asarray(tokens.token).tolist() == [1, 0, 0]
    assert np.asarray(seen).tolist() == [[True, True, True, False], [True, False, False, False], [False] * 4]
    penalised = sampler._penalise(jnp.asarray(logits), seen, asked)
    np.testing.assert_allclose(penalised[0], [1.5, 1.45, -0.2, -0.2])


def test_logprobs_are_of_the_raw_distribution_and_survive_packing():
    logits = np.stack([random_logits(seed, "random") for seed in range(3)])
    asked = rows(3, temperature=[0, 2, 0.5], top_k=3, repetition_penalty=1.5, wants_logprobs=[1, 1, 0])
    tokens, _ = sample_of(logits, np.ones(logits.shape, bool), asked)
    packed = np.asarray(sampler.pack_tokens(tokens))
    views = sampler.tokens_packing(3, VOCAB).views(packed)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    order = np.argsort(-logits, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(views["top_ids"], order)
    np.testing.assert_allclose(views["top_logprobs"], np.take_along_axis(expected, order, -1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(views["logprob"], expected[np.arange(3), views["token"]], rtol=1e-4, atol=1e-4)
