"""How close a decoder's logits are to those of the plain forward in float32, on given tokens.

With r the forward's distribution of the next token and q the decoder's, over the tokens that are scored:

    KL divergence     mean of Σ_v r[v] · ln(r[v] / q[v]), in nats a token
    top-1 agreement   share of tokens where r and q have the same likeliest one
    perplexity        exp of the mean of -ln q[the token that came next]

No more than a window of the forward's logits and a step of the decoder's are in memory; sums are in float64.
"""

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llmir_jax.errors import LlmirError
from llmir_jax.runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from llmir_jax.decoder import Decoder
    from llmir_jax.load import Loaded

Array = np.ndarray[Any, Any]

PAGE_SIZE = 16  # tokens
MAX_SEQS = 64
"""Rows of logits a step: enough to be quick, and 64 rows of a vocabulary of 50,000 in float64 are 25 MB."""
SCORED_ROWS = MAX_SEQS + 1  # more than there are sequences: attention then serves runs of rows, twice as fast
SHORTEST = 64  # tokens; the forward is compiled for powers of two from here on


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens that are given to the model one after the other, and the one that comes next after each."""

    inputs: Sequence[int]
    targets: Sequence[int]
    start: int = 0
    """Where scoring starts; what is before is context only."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt, and the greedy output that a reference gave for it."""

    prompt: Sequence[int]
    output: Sequence[int]

    @property
    def sample(self) -> Sample:
        """The output, given token by token."""
        tokens = [*self.prompt, *self.output]
        return Sample(inputs=tokens[:-1], targets=tokens[1:], start=len(self.prompt) - 1)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """See the equations above."""

    tokens: int
    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    """Of the forward."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What one way to serve a model costs and what it is worth."""

    parameter_bytes: int
    bits_per_weight: float
    """Of all parameters, scales and what stays floats included."""
    cache_bytes_per_token: float
    text: Agreement | None
    prompts: Agreement | None
    identical: int | None
    """Prompts whose generated tokens are all those of the reference."""


def samples_of_text(ids: Sequence[int], *, num_tokens: int, window: int) -> list[Sample]:
    """At most `num_tokens` tokens of a text, in windows that know nothing of each other."""
    inputs, targets = ids[:-1][:num_tokens], ids[1:][:num_tokens]
    if not inputs:
        raise LlmirError(f"the text has {len(ids)} tokens: at least two are needed to compare what comes next")
    return [
        Sample(inputs=inputs[i : i + window], targets=targets[i : i + window]) for i in range(0, len(inputs), window)
    ]


class Reference:
    """The plain forward of a model, in float32 if it was loaded so."""

    def __init__(self, loaded: "Loaded") -> None:
        self._loaded = loaded
        self._forward = jax.jit(loaded.forward)

    def logits(self, inputs: Sequence[int]) -> Array:
        """[len(inputs), vocab] of one sequence."""
        # One program serves several lengths: what comes after a token does not change its logits.
        length = max(SHORTEST, 1 << (len(inputs) - 1).bit_length())
        padded = np.zeros((1, min(length, self._loaded.config.max_seq_len)), np.int32)
        padded[0, : len(inputs)] = inputs
        logits = self._forward(self._loaded.model, jnp.asarray(padded))
        return np.asarray(logits)[0, : len(inputs)]


@dataclass
class Totals:
    """Sums over the tokens that were scored."""

    tokens: int = 0
    kl: float = 0.0
    agreed: int = 0
    surprise: float = 0.0
    reference_surprise: float = 0.0

    def add(self, reference: Array, logits: Array, targets: Sequence[int]) -> None:
        """Compare rows of logits [n, vocab] of the forward and of the decoder, with the n tokens that came next."""
        if np.isnan(reference).any() or np.isnan(logits).any():
            raise LlmirError(
                "the logits to compare are not numbers: the weights or what they were quantized to are not"
            )
        expected, got = _log_softmax(reference), _log_softmax(logits)
        rows, chosen = np.arange(len(targets)), np.asarray(targets)
        probabilities = np.exp(expected)
        with np.errstate(invalid="ignore"):  # -inf minus -inf, of a token that neither thinks possible
            difference = np.where(probabilities > 0, expected - got, 0.0)
        self.tokens += len(targets)
        self.kl += float((probabilities * difference).sum())
        self.agreed += int((reference.argmax(-1) == logits.argmax(-1)).sum())
        self.surprise -= float(got[rows, chosen].sum())
        self.reference_surprise -= float(expected[rows, chosen].sum())

    def means(self) -> Agreement:
        """What the sums come to."""
        return Agreement(
            tokens=self.tokens,
            kl=self.kl / self.tokens,
            top1=self.agreed / self.tokens,
            perplexity=_exp(self.surprise / self.tokens),
            reference_perplexity=_exp(self.reference_surprise / self.tokens),
        )


def agreement(reference: Reference, decoder: "Decoder", samples: Sequence[Sample]) -> Agreement:
    """Of a decoder with the forward, over all samples."""
    totals = Totals()
    for sample in samples:
        expected = reference.logits(sample.inputs)
        begin = 0
        for logits in decoder.iter_logits(sample.inputs):
            end = begin + len(logits)
            first = max(begin, sample.start)
            if first < end:
                totals.add(expected[first:end], logits[first - begin :], sample.targets[first:end])
            begin = end
    return totals.means()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What is measured of every decoder: a text, prompts, or both."""

    loaded: "Loaded"
    text: Sequence[Sample] = ()
    cases: Sequence[Case] = ()
    reference: Reference = field(init=False)

    def __post_init__(self) -> None:
        """Raises LlmirError for sequences that the model's context does not hold."""
        longest, context = self._longest, self.loaded.config.max_seq_len
        if longest > context:
            raise LlmirError(
                f"a sequence to compare has {longest} tokens, more than the {context} of the model's context: "
                "choose shorter windows or prompts"
            )
        object.__setattr__(self, "reference", Reference(self.loaded))

    @property
    def _longest(self) -> int:
        lengths = [len(s.inputs) for s in self.text] + [len(c.prompt) + len(c.output) for c in self.cases]
        return max(lengths)

    def of(self, options: Mapping[str, Any]) -> Accuracy:
        """Of the decoder with these options (`quantize`, `kv_cache` …), which is built for it and let go."""
        decoder = self.loaded.decoder(**self._sizes(), verify=False, **options)
        report = decoder.report()
        found = Accuracy(
            parameter_bytes=report.parameter_bytes,
            bits_per_weight=8 * report.parameter_bytes / self.loaded.source.num_elements,
            cache_bytes_per_token=sum(g.nbytes / (g.num_pages * g.page_size) for g in decoder.cache_groups),
            text=agreement(self.reference, decoder, self.text) if self.text else None,
            prompts=agreement(self.reference, decoder, [c.sample for c in self.cases]) if self.cases else None,
            identical=_identical(decoder, self.cases) if self.cases else None,
        )
        del decoder
        gc.collect()  # its arrays are in cycles with the functions that were compiled for it
        return found

    def _sizes(self) -> dict[str, Any]:
        longest = -(-self._longest // PAGE_SIZE)
        together = sum(-(-(len(c.prompt) + len(c.output)) // PAGE_SIZE) for c in self.cases)
        return {
            "max_seqs": MAX_SEQS,
            "buckets": sorted({min(len(self.cases), MAX_SEQS) or SCORED_ROWS, SCORED_ROWS}),
            "page_size": PAGE_SIZE,
            "num_pages": max(longest, min(together, MAX_SEQS * longest)),
            "max_seq_len": self._longest,
        }


def _identical(decoder: "Decoder", cases: Sequence[Case]) -> int:
    """How many outputs are generated as they are, all in one batch."""
    params = [SamplingParams(max_tokens=len(case.output), ignore_eos=True) for case in cases]
    outputs = decoder.generate([case.prompt for case in cases], params)
    return sum(output == list(case.output) for output, case in zip(outputs, cases, strict=True))


def _log_softmax(logits: Array) -> Array:
    """float64 [n, vocab]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def _exp(surprise: float) -> float:
    return math.exp(surprise) if surprise < 700 else math.inf  # beyond it math.exp raises
