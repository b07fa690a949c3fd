"""What is run: prompts of random token ids, new in every round so that nobody answers from a cache of prefixes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

WARM_UP = -1
"""The round that is not counted."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Numbers of tokens, and how often."""

    prompt: int
    """Of the prompt before decoding."""
    new: int
    """Decoded and timed, after the first one."""
    prefill: int
    """Of the prompt whose processing is timed."""
    context: int | None
    """Of a longer prompt, before decoding is timed once more."""
    batches: tuple[int, ...]
    """Numbers of sequences that are decoded at once."""
    repeats: int
    sampled: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompt + self.new + 1, self.prefill + 1, (self.context or 0) + self.new + 1)

    @property
    def phases(self) -> tuple[int | None, ...]:
        """What is measured one after the other: one sequence (None), then each batch."""
        return None, *self.batches

    def request(self, phase: int | None, round_idx: int, vocab_size: int) -> dict[str, Any]:
        """A round of a phase, as `baselines.protocol.measure` takes it."""
        rng = np.random.default_rng([round_idx - WARM_UP, 0 if phase is None else phase])

        def ids(length: int) -> list[int]:
            return [int(token) for token in rng.integers(0, vocab_size, length)]

        if phase is not None:
            return {"measure": "batch", "prompts": [ids(self.prompt) for _ in range(phase)], "new": self.new}
        return {
            "measure": "single",
            "prompt": ids(self.prompt),
            "new": self.new,
            "prefill": ids(self.prefill),
            "context": ids(self.context) if self.context else None,
        }

    def stages(self, phase: int | None) -> Iterator[str]:
        """Names of the rounds of a phase."""
        what = "one sequence" if phase is None else f"{phase} sequences"
        for i in range(self.repeats):
            yield f"{what}, round {i + 1} of {self.repeats}"
