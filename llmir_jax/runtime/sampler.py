"""The next token from the logits, on the device, for all sequence slots at once.

No step sorts the vocabulary: over 49,152 float32 logits a sort takes 8 ms on one core of a 2-core x86-64 server (JAX
0.10.2). Where the filters of a row keep fewer than 64 tokens, which the 64 largest logits show, the rest is done with
these, in 0.1 ms. Otherwise order-preserving integer keys of floats are bisected for the exact k-th largest logit
(top-k) and for the exact smallest probability of the nucleus (top-p): some 30 passes that count or sum, 0.4 ms. The
draw inverts the cumulative distribution, in the vocabulary's order, with one uniform number, which comes from the
request's seed and the token's index alone; so a request gets the same tokens whatever else is in the batch.

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
_NUM_LARGEST = 64  # logits that are looked at first
_SMALL_BLOCK = 64  # tokens a block, in two-level searches


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
    """One row a slot. ``token`` is V where none can be chosen: of a NaN, or, except greedily, of an infinite logit."""

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
    # One pass that vectorises, for the block: XLA's argmax reduces pairs, at a fifth of the speed on a CPU.
    vocab_size = logits.shape[-1]
    blocks = _blocks(logits)
    block = _first_largest(jnp.max(blocks, axis=-1))
    chosen = jnp.minimum(block, blocks.shape[1] - 1)[:, None, None]
    within = _first_largest(jnp.take_along_axis(blocks, chosen, axis=1)[:, 0])
    return jnp.where(block < blocks.shape[1], block * _SMALL_BLOCK + within, vocab_size)


def _first_largest(values: jax.Array) -> jax.Array:
    """int32[S]: the first index of the largest of values [S, n]; n where there is a NaN."""
    is_max = values == jnp.max(values, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.min(jnp.where(is_max, index, values.shape[-1]), axis=-1)


def _blocks(logits: jax.Array) -> jax.Array:
    """[S, num_blocks, _SMALL_BLOCK] of logits [S, V], padded with -inf."""
    padding = -logits.shape[-1] % _SMALL_BLOCK
    padded = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf) if padding else logits
    return padded.reshape(logits.shape[0], -1, _SMALL_BLOCK)


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
    token = lax.cond(jnp.any(draws), _draw_rows, lambda top, *_: top, top, penalised, rows)
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


def _draw_rows(top: jax.Array, logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """int32[S]: a drawn token where the row's temperature wants one and its logits are numbers, else ``top``."""
    vocab_size = logits.shape[-1]

    def one(top: jax.Array, logits: jax.Array, row: SamplingRows) -> jax.Array:
        token: jax.Array = lax.cond(
            (row.temperature >= MIN_TEMPERATURE) & (top < vocab_size),
            # Of an infinite logit there is no share of the mass to draw by.
            lambda: jnp.where(jnp.isfinite(logits[top]), _draw_filtered(logits, row), vocab_size),
            lambda: top,
        )
        return token

    # A CPU takes one row after another: rows that draw nothing are skipped, and a row stays in the core's cache.
    tokens: jax.Array = lax.platform_dependent(
        top, logits, rows, cpu=lambda *args: lax.map(lambda row: one(*row), args), default=jax.vmap(one)
    )
    return tokens


# What follows is for one row: logits and weights float32[V], parameters scalars.


def _draw_filtered(logits: jax.Array, row: SamplingRows) -> jax.Array:
    uniform = _uniform(row)
    ids, few, is_all = few_weights(logits, row)

    def from_few() -> jax.Array:
        index, _ = _pick(few, uniform * jnp.sum(few))
        return ids[index]

    token: jax.Array = lax.cond(is_all, from_few, lambda: draw(weights(logits, row), uniform))
    return token


def few_weights(logits: jax.Array, row: SamplingRows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids int32[n], weights float32[n], is_all): those of `weights` that belong to the n largest logits, by rising id.

    `is_all`: no other token has a weight, for the filters have thrown out the last of these.
    """
    values, ids = _largest(logits, min(_NUM_LARGEST, logits.shape[0]))
    unfiltered = jnp.exp((values - values[0]) / row.temperature)
    last = jnp.clip(row.top_k - 1, 0, values.shape[0] - 1)
    kept = jnp.where((row.top_k == 0) | (values >= values[last]), unfiltered, 0.0)
    # The total lacks what top-k keeps beside these: more than n, or tokens as likely as the last.
    is_known = (row.top_k == 0) | (row.top_p == 0) | (kept[-1] == 0)
    total = lax.cond(
        (row.top_k == 0) & (row.top_p > 0),
        lambda: jnp.sum(jnp.exp((logits - values[0]) / row.temperature)),
        lambda: jnp.sum(kept),
    )
    is_nucleus = jnp.cumsum(kept) >= row.top_p * total
    smallest = jnp.where((row.top_p > 0) & jnp.any(is_nucleus), kept[jnp.argmax(is_nucleus)], 0.0)
    kept = jnp.where(kept >= jnp.maximum(smallest, row.min_p), kept, 0.0)
    is_all = ((kept[-1] == 0) & is_known) | (values.shape[0] == logits.shape[0])
    ids, kept = lax.sort_key_val(ids, kept)
    return ids, kept, is_all


def _largest(logits: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The n largest logits, falling, and their ids: they lie in the n blocks with the largest maxima."""
    blocks = _blocks(logits[None])[0]
    if n >= blocks.shape[0]:
        return _top_k(logits, n)
    _, chosen = _top_k(jnp.max(blocks, axis=1), n)
    values, places = _top_k(blocks[chosen].reshape(-1), n)
    return values, chosen[places // _SMALL_BLOCK] * _SMALL_BLOCK + places % _SMALL_BLOCK


def _top_k(values: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    # XLA:CPU has a quick top-k only for a sort of which nothing but the first n is read: one that sees a reader of less
    # sorts everything, in 0.4 ms for 4,096. A barrier for each, since XLA aborts where one reads both of a program for
    # several devices (the check in TopkDecomposer of JAX 0.10's).
    top, ids = lax.top_k(values, n)
    return lax.optimization_barrier(top), lax.optimization_barrier(ids)


def weights(logits: jax.Array, row: SamplingRows) -> jax.Array:
    """Unnormalised probabilities after temperature and filters; the most likely token has weight 1."""
    unfiltered = jnp.exp((logits - jnp.max(logits)) / row.temperature)
    kept = jnp.where(logits >= _kth_largest(logits, row.top_k), unfiltered, 0.0)
    kept = jnp.where(kept >= _nucleus(kept, row.top_p), kept, 0.0)
    return jnp.where(kept >= row.min_p, kept, 0.0)


def _kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest value; -inf if k is 0."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # rises with the float, as signed integers
    low, high = jnp.min(keys), jnp.max(keys) + 1
    key = _last_that_holds(
        lambda key: jnp.sum(keys >= key, dtype=jnp.int32) >= k, low, jnp.where(k == 0, low + 1, high)
    )
    return jnp.where(k == 0, -jnp.inf, lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32))


def _nucleus(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """The largest weight such that it and all larger ones make up ``top_p`` of the sum; 0 if ``top_p`` is 0."""
    keys = lax.bitcast_convert_type(weights, jnp.int32)  # rises with the float: no weight is negative
    needed = top_p * jnp.sum(weights)
    key = _last_that_holds(
        lambda key: jnp.sum(jnp.where(keys >= key, weights, 0.0)) >= needed,
        jnp.int32(0),
        jnp.where(top_p == 0, 1, jnp.max(keys) + 1),
    )
    return lax.bitcast_convert_type(key, jnp.float32)


def _last_that_holds(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """The last integer for which ``holds``, true at ``low`` and false at ``high``, is true."""

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        is_true = holds(middle)
        return jnp.where(is_true, middle, low), jnp.where(is_true, high, middle)

    low, _ = lax.while_loop(lambda bounds: bounds[0] + 1 < bounds[1], halve, (low, high))
    return low


def _uniform(row: SamplingRows) -> jax.Array:
    """One number in [0, 1) from the row's seed and the index of its token."""
    # For seeds below 2**32 this is jax.random.key(seed); the implementation is fixed so that configuration is not
    # part of the result.
    key = jax.random.wrap_key_data(row.seed, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(key, row.token_idx))


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at ``uniform`` in [0, 1) of the cumulative weight, never one of weight 0.

    Two levels, blocks and then the tokens of one block, so that the whole vocabulary is passed once.
    """
    vocab_size = weights.shape[0]
    num_blocks = -(-vocab_size // _BLOCK)
    blocks = jnp.pad(weights, (0, num_blocks * _BLOCK - vocab_size)).reshape(num_blocks, _BLOCK)
    block_sums = jnp.sum(blocks, axis=1)
    block, rest = _pick(block_sums, uniform * jnp.sum(block_sums))
    token, _ = _pick(blocks[block], rest)
    return block * _BLOCK + token


def _pick(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index whose cumulative weight exceeds the target, and what is left of the target there."""
    sums = jnp.cumsum(weights)
    index = jnp.arange(weights.shape[0], dtype=jnp.int32)
    # A rounded cumulative sum may rise where the weight is 0, or end below the target: both are excluded by hand.
    first = jnp.min(jnp.where((sums > target) & (weights > 0), index, weights.shape[0]))
    last = jnp.max(jnp.where(weights > 0, index, 0))
    chosen = jnp.minimum(first, last)
    return chosen, target - (sums[chosen] - weights[chosen])


# Log-probabilities, of all rows


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
