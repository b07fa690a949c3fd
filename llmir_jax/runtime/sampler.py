"""The next token from the logits, on the device, for all sequence slots at once.

No step sorts the vocabulary: over 49,152 float32 logits a sort takes 8 ms on one core of a 2-core x86-64 server (JAX
0.10.2), the threshold searches below 0.25 ms each. Order-preserving integer keys of floats are bisected for the exact
k-th largest logit (top-k) and for the exact smallest probability of the nucleus (top-p): 32 passes that count or sum.
The draw inverts the cumulative distribution with one uniform number, which comes from the request's seed and the
token's index alone; so a request gets the same tokens whatever else is in the batch.

Work that no row asks for (penalties, filters, log-probabilities) is skipped at run time, so one compiled program does.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmir_jax.runtime.packing import Field, Packing
from llmir_jax.runtime.sampling import MAX_LOGPROBS, MIN_TEMPERATURE

_BLOCK = 256  # tokens a block, in the two-level draw


class SamplingRows(NamedTuple):
    """What each sequence slot asks for. Rows that are not sampled have zeros and give a token nobody reads."""

    is_sampled: jax.Array  # int32[S], 1 if the row's token is wanted
    token_idx: jax.Array  # int32[S], index of the token among the request's new ones
    seed: jax.Array  # uint32[S, 2], high and low word
    temperature: jax.Array  # float32[S], below MIN_TEMPERATURE: greedy
    top_k: jax.Array  # int32[S], 0: off
    top_p: jax.Array  # float32[S], 0: off
    min_p: jax.Array  # float32[S], 0: off
    repetition_penalty: jax.Array  # float32[S], 0: off
    wants_logprobs: jax.Array  # int32[S], 1 if the row's log-probabilities are wanted


class SampledTokens(NamedTuple):
    """One row a slot. ``token`` is the vocabulary's size where the logits are not numbers (NaN)."""

    token: jax.Array  # int32[S]
    logprob: jax.Array  # float32[S], of the chosen token under the raw distribution; 0 if no row wants it
    top_ids: jax.Array  # int32[S, n], most likely first, n = min(MAX_LOGPROBS, vocabulary)
    top_logprobs: jax.Array  # float32[S, n]


def rows_packing(max_seqs: int) -> Packing:
    """How `SamplingRows` are packed for the device."""
    shapes: dict[str, tuple[int, ...]] = {"seed": (max_seqs, 2)}
    floats = {"temperature", "top_p", "min_p", "repetition_penalty"}
    return Packing(
        tuple(
            Field(
                name=name,
                shape=shapes.get(name, (max_seqs,)),
                dtype="uint32" if name == "seed" else "float32" if name in floats else "int32",
            )
            for name in SamplingRows._fields
        )
    )


def tokens_packing(max_seqs: int, vocab_size: int) -> Packing:
    """How `SampledTokens` come back from the device."""
    num_top = min(MAX_LOGPROBS, vocab_size)
    return Packing(
        (
            Field(name="token", shape=(max_seqs,)),
            Field(name="logprob", shape=(max_seqs,), dtype="float32"),
            Field(name="top_ids", shape=(max_seqs, num_top)),
            Field(name="top_logprobs", shape=(max_seqs, num_top), dtype="float32"),
        )
    )


def pack_tokens(tokens: SampledTokens) -> jax.Array:
    """int32 vector in the order of `tokens_packing`."""
    return jnp.concatenate([lax.bitcast_convert_type(value, jnp.int32).ravel() for value in tokens])


def greedy(logits: jax.Array) -> jax.Array:
    """int32[S]: the most likely token of logits float32[S, V], the first among equals; V where a row has a NaN."""
    # Two passes that vectorise: XLA's argmax reduces pairs, at a fifth of the speed on a CPU.
    vocab_size = logits.shape[-1]
    is_max = logits == jnp.max(logits, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.min(jnp.where(is_max, index, vocab_size), axis=-1)


def fill_seen(seen: jax.Array, slot: jax.Array, tokens: jax.Array) -> jax.Array:
    """``seen`` bool[S, V] with row ``slot`` holding exactly ``tokens`` int32[n]; those of V or more are padding.

    A slot past the last leaves ``seen`` as it is.
    """
    row = jnp.zeros(seen.shape[1], bool).at[tokens].set(True, mode="drop")
    return seen.at[slot].set(row, mode="drop")


def sample(logits: jax.Array, seen: jax.Array, rows: SamplingRows) -> tuple[SampledTokens, jax.Array]:
    """Choose a token for every row.

    Args:
        logits: float32[S, V].
        seen: bool[S, V], the tokens of each slot's prompt and output so far, for slots with a repetition penalty.
        rows: what each slot asks for.

    Returns:
        The tokens, and ``seen`` with the sampled ones.
    """
    vocab_size = logits.shape[-1]
    penalised = lax.cond(jnp.any(rows.repetition_penalty != 0), _penalise, lambda x, *_: x, logits, seen, rows)
    top = greedy(penalised)
    draws = rows.temperature >= MIN_TEMPERATURE
    token = lax.cond(
        jnp.any(draws),
        lambda x: jnp.where(draws & (top < vocab_size), _draw(_weights(x, rows), _uniform(rows)), top),
        lambda x: top,
        penalised,
    )
    logprob, top_ids, top_logprobs = lax.cond(
        jnp.any(rows.wants_logprobs != 0), _logprobs, lambda x, _: _no_logprobs(x), logits, token
    )
    # Rows that were not sampled mark column V, which does not exist.
    column = jnp.where(rows.is_sampled != 0, token, vocab_size)
    seen = seen.at[jnp.arange(seen.shape[0]), column].set(True, mode="drop")
    return SampledTokens(token, logprob, top_ids, top_logprobs), seen


def _penalise(logits: jax.Array, seen: jax.Array, rows: SamplingRows) -> jax.Array:
    """The repetition penalty of CTRL (Keskar et al. 2019), made to lower a logit of either sign."""
    penalty = jnp.where(rows.repetition_penalty == 0, 1.0, rows.repetition_penalty)[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _weights(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Unnormalised probabilities float32[S, V] after temperature and filters; the most likely token has weight 1."""
    temperature = jnp.where(rows.temperature >= MIN_TEMPERATURE, rows.temperature, 1.0)[:, None]
    weights = jnp.exp((logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature)

    def keep_top_k(weights: jax.Array) -> jax.Array:
        top_k = jnp.where(rows.top_k == 0, logits.shape[-1], rows.top_k)
        return jnp.where(logits >= _kth_largest(logits, top_k)[:, None], weights, 0.0)

    def keep_top_p(weights: jax.Array) -> jax.Array:
        is_off = (rows.top_p == 0) | (rows.top_p >= 1)
        return jnp.where(is_off[:, None] | (weights >= _nucleus(weights, rows.top_p)[:, None]), weights, 0.0)

    weights = lax.cond(jnp.any(rows.top_k != 0), keep_top_k, lambda w: w, weights)
    weights = lax.cond(jnp.any(rows.top_p != 0), keep_top_p, lambda w: w, weights)
    return jnp.where(weights >= rows.min_p[:, None], weights, 0.0)


def _kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:
    """float32[S]: the k-th largest of each row of float32[S, V], for k int32[S]; the smallest if k > V."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # rises with the float, as signed integers
    num_kept = jnp.minimum(k, values.shape[-1])

    def holds(key: jax.Array) -> jax.Array:
        return jnp.sum(keys >= key[:, None], axis=-1, dtype=jnp.int32) >= num_kept

    key = _bisect(holds, jnp.min(keys, axis=-1), jnp.max(keys, axis=-1) + 1)
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def _nucleus(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """float32[S]: the largest weight such that it and all larger ones make up ``top_p`` float32[S] of the row's sum."""
    keys = lax.bitcast_convert_type(weights, jnp.int32)  # rises with the float: no weight is negative
    needed = top_p * jnp.sum(weights, axis=-1)

    def holds(key: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(keys >= key[:, None], weights, 0.0), axis=-1) >= needed

    key = _bisect(holds, jnp.zeros(keys.shape[0], jnp.int32), jnp.max(keys, axis=-1) + 1)
    return lax.bitcast_convert_type(key, jnp.float32)


def _bisect(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """int32[S]: the last number for which ``holds``, true at ``low`` and false at ``high``, is true."""

    def is_open(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[0] + 1 < bounds[1])

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        moves_up = holds(middle)
        return jnp.where(moves_up, middle, low), jnp.where(moves_up, high, middle)

    low, _ = lax.while_loop(is_open, halve, (low, high))
    return low


def _uniform(rows: SamplingRows) -> jax.Array:
    """float32[S] in [0, 1): one number a row, from its seed and the index of the token."""

    def one(seed: jax.Array, token_idx: jax.Array) -> jax.Array:
        # For seeds below 2**32 this is jax.random.key(seed); the implementation is fixed so that configuration is not
        # part of the result.
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, token_idx))

    return jax.vmap(one)(rows.seed, rows.token_idx)


def _draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[S]: for each row the token at ``uniform`` of its cumulative weight, never one of weight 0.

    Two levels, blocks and then the tokens of one block, so that the long axis is passed once. V if the sum is NaN.
    """
    num_rows, vocab_size = weights.shape
    num_blocks = -(-vocab_size // _BLOCK)
    padded = jnp.pad(weights, ((0, 0), (0, num_blocks * _BLOCK - vocab_size)))
    blocks = padded.reshape(num_rows, num_blocks, _BLOCK)
    block_sums = jnp.sum(blocks, axis=-1)
    total = jnp.sum(block_sums, axis=-1)
    block, rest = _pick(block_sums, uniform * total)
    token, _ = _pick(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    return jnp.where(jnp.isnan(total), vocab_size, block * _BLOCK + token)


def _pick(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first column whose cumulative weight exceeds the target, and what is left of the target within it."""
    sums = jnp.cumsum(weights, axis=-1)
    index = lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    # A rounded cumulative sum may rise where the weight is 0, or end below the target: both are excluded by hand.
    first = jnp.min(jnp.where((sums > target[:, None]) & (weights > 0), index, weights.shape[-1]), axis=-1)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1)
    column = jnp.minimum(first, last)
    before = jnp.take_along_axis(sums - weights, column[:, None], axis=-1)[:, 0]
    return column, target - before


def _logprobs(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    log_sum = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    top, top_ids = lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logits, jnp.minimum(token, logits.shape[-1] - 1)[:, None], axis=-1)
    return (chosen - log_sum)[:, 0], top_ids, top - log_sum


def _no_logprobs(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = (logits.shape[0], min(MAX_LOGPROBS, logits.shape[-1]))
    return jnp.zeros(shape[0], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def seed_words(seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """A 64-bit seed as uint32[2], high word first."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
