"""The self-check: a derived decoder runs against the forward it came from before it is handed over.

Several random sequences go through the cached step, prefilled in uneven chunks and then token by token, side by side,
in pages taken in no order. Their logits must be those of the plain forward to the tolerance of the dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmir_jax.errors import VerificationError
from llmir_jax.runtime.batch import CacheGroup

Array = np.ndarray[Any, Any]
RELATIVE_TOLERANCE = {
    "float32": 2e-3,
    "half": 8e-2,
    "int8 activations": 0.25,
    "static int8 activations": 0.75,
    "int8 cache": 0.25,
    "int4 cache": 0.75,
}
"""Largest difference allowed, as a share of the largest logit in absolute value.

What is rounded in the step and not in the forward leaves only a coarse check: a wrong decoder still fails it, for its
logits have nothing in common with the right ones. Static scales clip what random tokens make larger than the text of
calibration did.
"""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a sequence, computed in one step."""

    seq: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """How far apart the decoder and the forward were, as a share of the largest logit."""

    compared: int  # rows of logits
    error: float
    tolerance: float


class CachedLogits:
    """Runs sequences through the cached step with page tables of its own, and reads logits of chosen rows.

    Args:
        run: (rows of tokens, positions, sequence of each, lengths [S], rows wanted [S], block tables) → logits.
        num_seqs: sequences that the pages are shared out to, max_seqs unless given.
    """

    def __init__(
        self,
        run: Callable[..., Array],
        groups: Sequence[CacheGroup],
        *,
        max_seqs: int,
        max_seq_len: int,
        seed: int,
        num_seqs: int | None = None,
    ):
        num_seqs = num_seqs or max_seqs
        self._run = run
        self._max_seqs = max_seqs
        self.capacity = max_seq_len
        self.num_seqs = num_seqs
        rng = np.random.default_rng(seed)
        self._tables = []
        for group in groups:
            pages_per_seq = -(-max_seq_len // group.page_size)
            used = min(group.num_pages, pages_per_seq * num_seqs)
            order = rng.permutation(group.num_pages)[:used]
            table = np.zeros((max_seqs, pages_per_seq), np.int32)
            share = used // num_seqs
            for seq in range(num_seqs):
                table[seq, : min(share, pages_per_seq)] = order[seq * share : seq * share + min(share, pages_per_seq)]
            self._tables.append(table)
            self.capacity = min(self.capacity, share * group.page_size)

    def step(self, sequences: Sequence[Array], pieces: Sequence[Piece], wanted: Sequence[tuple[int, int]]) -> Array:
        """Compute `pieces` in one step and return the logits [len(wanted), vocab] of (sequence, position) pairs."""
        tokens = np.concatenate([sequences[p.seq][p.start : p.stop] for p in pieces]).astype(np.int32)
        positions = np.concatenate([np.arange(p.start, p.stop) for p in pieces]).astype(np.int32)
        seq_ids = np.concatenate([np.full(p.stop - p.start, p.seq) for p in pieces]).astype(np.int32)
        lens = np.zeros(self._max_seqs, np.int32)
        for p in pieces:
            lens[p.seq] = p.stop
        rows = np.zeros(self._max_seqs, np.int32)
        for i, (seq, position) in enumerate(wanted):
            rows[i] = int(np.flatnonzero((seq_ids == seq) & (positions == position))[0])
        return self._run(tokens, positions, seq_ids, lens, rows, self._tables)[: len(wanted)]


NUM_SEQUENCES = 3
MAX_CHUNK = 9  # tokens


def most_rows(max_seqs: int) -> int:
    """The most rows of tokens that a step of the check has."""
    return MAX_CHUNK * min(NUM_SEQUENCES, max_seqs)


def schedule(lengths: Sequence[int], max_rows: int, rng: np.random.Generator) -> list[list[Piece]]:
    """Steps that compute sequences of these lengths: uneven chunks of several side by side, the rest token by token."""
    done = [0] * len(lengths)
    prefill = [max(1, n - 4) for n in lengths]
    steps = []
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        left = max_rows
        pieces = []
        for seq, n in enumerate(lengths):
            if done[seq] >= n or not left:
                continue
            size = int(rng.integers(1, MAX_CHUNK + 1)) if done[seq] < prefill[seq] else 1
            size = min(size, left, (prefill[seq] if done[seq] < prefill[seq] else n) - done[seq])
            pieces.append(Piece(seq, done[seq], done[seq] + size))
            done[seq] += size
            left -= size
        steps.append(pieces)
    return steps


def self_check(
    cached: CachedLogits,
    forward: Callable[[Sequence[Array]], Sequence[Array]],
    *,
    vocab_size: int,
    max_rows: int,
    length: int,
    tolerance: float,
    seed: int,
    advice: str,
) -> CheckResult:
    """Compare; `forward`, of several sequences of tokens [length], gives logits [length, vocab] of the original.

    `advice` is what to do about a difference, for the error.

    Raises:
        VerificationError: they differ by more than the tolerance, or are not finite in the same places.
    """
    rng = np.random.default_rng(seed)
    length = min(length, cached.capacity)
    lengths = [max(1, length - 5 * i) for i in range(cached.num_seqs)]
    sequences = [rng.integers(0, vocab_size, length).astype(np.int32) for _ in lengths]
    expected = forward(sequences)
    scale = max(float(np.abs(e[np.isfinite(e)]).max(initial=0.0)) for e in expected) or 1.0
    worst, compared = 0.0, 0
    where = (0, 0)
    for pieces in schedule(lengths, max_rows, rng):
        wanted = [(p.seq, p.stop - 1) for p in pieces]
        got = cached.step(sequences, pieces, wanted)
        for row, (seq, position) in zip(got, wanted, strict=True):
            want = expected[seq][position]
            finite = np.isfinite(want)
            same = np.isfinite(row) == finite
            difference = np.where(finite & same, np.abs(row - want), 0.0).max() if same.all() else np.inf
            compared += 1
            if difference > worst:
                worst, where = float(difference), (seq, position)
    result = CheckResult(compared=compared, error=worst / scale, tolerance=tolerance)
    if not worst <= tolerance * scale:
        raise VerificationError(
            f"the derived decoder differs from the forward: logits at position {where[1]} of a random sequence are "
            f"off by {worst:.4g}, {100 * worst / scale:.3g} % of the largest; {100 * tolerance:.3g} % is allowed. "
            f"The decoder is not handed over. {advice}; verify=False skips this check"
        )
    return result
