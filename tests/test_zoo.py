"""Every model of the zoo: derived, its decoder equals the forward in greedy tokens and in logits; or it is refused."""

import re
import zlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import DERIVABLE, REFUSED, TRICKY
from zoo.registry import Built, Derivable, Refused, Tricky, marked_lines

import llmir_jax as llmir
from llmir_jax.decoder import Decoder
from llmir_jax.errors import LlmirError, UnsupportedModelError
from llmir_jax.runtime.sampling import SamplingParams

NEW_TOKENS = 12
MAX_SEQS = 3
PREFILL_CHUNK = 7  # tokens
BUCKET = 8  # token rows of a step
PAGE_SIZES = (2, 4, 5, 8)  # tokens
TOLERANCE = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 3e-2}  # of the largest logit

Naive = Callable[[list[int]], np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """XLA with most optimisations off: hundreds of small programs are compiled here, and each runs a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode()) % 10_000


def derive(built: Built, seed: int, longest: int, *, verify: bool = False) -> Decoder:
    """A small decoder for sequences of up to `longest` tokens; the page size goes with the seed."""
    page_size = PAGE_SIZES[seed % len(PAGE_SIZES)]
    return llmir.jit(built.forward).decoder(
        built.model,
        num_pages=MAX_SEQS * -(-longest // page_size),
        page_size=page_size,
        max_seqs=MAX_SEQS,
        max_seq_len=longest,
        buckets=(BUCKET,),
        prefill_chunk=PREFILL_CHUNK,
        verify=verify,
    )


def naive_logits(built: Built, longest: int) -> Naive:
    """The forward on a whole sequence, padded at its end to one length: it is causal, and so compiles once."""
    run = jax.jit(built.forward)

    def logits(tokens: list[int]) -> np.ndarray:
        padded = np.zeros((1, longest), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(run(built.model, padded).astype(jnp.float32))[0, : len(tokens)]

    return logits


def check_greedy(naive: Naive, prompt: list[int], new: list[int], tolerance: float) -> int:
    """Compare with the naive greedy loop; returns how many tokens were compared.

    Each new token must be the best one after all before it, which is what the naive loop picks as long as it and the
    decoder agreed so far. A step whose two best logits are closer than the tolerance may go either way, and is skipped.
    """
    logits = naive([*prompt, *new])[len(prompt) - 1 : -1]
    assert np.isfinite(logits).all()
    compared = 0
    for row, token in zip(logits, new, strict=True):
        second, best = np.partition(row, -2)[-2:]
        if best - second > tolerance * np.abs(logits).max():
            assert token == int(row.argmax()), f"token {compared} after {prompt}"
            compared += 1
        else:
            assert row[token] >= second, f"token {compared} after {prompt} is not among the best two"
    return compared


def check_decoder(decoder: Decoder, built: Built, seed: int, longest_prompt: int, tolerance: float) -> None:
    """Several prompts of different lengths in one batch, then the logits of other sequences."""
    rng = np.random.default_rng(seed)
    naive = naive_logits(built, longest_prompt + NEW_TOKENS)
    lengths = (1, 9, longest_prompt)

    prompts = [rng.integers(0, built.vocab_size, n).tolist() for n in lengths]
    outs = decoder.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS))
    assert [len(out) for out in outs] == [NEW_TOKENS] * len(prompts)
    compared = sum(check_greedy(naive, prompt, out, tolerance) for prompt, out in zip(prompts, outs, strict=True))
    assert compared > len(prompts) * NEW_TOKENS // 2

    sequences = [rng.integers(0, built.vocab_size, n + NEW_TOKENS).tolist() for n in lengths]
    for sequence, got in zip(sequences, decoder.logits(sequences), strict=True):
        expected = naive(sequence)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("entry", DERIVABLE, ids=lambda entry: entry.name)
def test_derived(entry: Derivable) -> None:
    seed = seed_of(entry.name)
    built = entry.build(seed)
    decoder = derive(built, seed, entry.longest + NEW_TOKENS)
    check_decoder(decoder, built, seed, entry.longest, TOLERANCE[entry.dtype])


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)
def test_refused(entry: Refused) -> None:
    seed = seed_of(entry.name)
    built = entry.build(seed)
    with pytest.raises(UnsupportedModelError, match=f"(?i){entry.op}") as caught:
        derive(built, seed, entry.longest)
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(entry.because, message, re.IGNORECASE), message
    if entry.located:
        file_name, lines = marked_lines(entry)
        found = [int(line) for line in re.findall(rf"{re.escape(file_name)}:(\d+)", message)]
        assert lines.intersection(found), f"no line of {sorted(lines)} of {file_name} in: {message}"


@pytest.mark.parametrize("entry", TRICKY, ids=lambda entry: entry.name)
def test_never_wrong(entry: Tricky) -> None:
    seed = seed_of(entry.name)
    built = entry.build(seed)
    try:
        decoder = derive(built, seed, 40, verify=True)
    except LlmirError as error:
        assert "\n" not in str(error)
        return
    check_decoder(decoder, built, seed, 17, TOLERANCE["float32"])


def test_size_of_the_zoo() -> None:
    """Names are unique, and there are as many models as the project promises at least."""
    names = [entry.name for entry in (*DERIVABLE, *REFUSED, *TRICKY)]
    assert len(set(names)) == len(names)
    assert len(DERIVABLE) >= 32
    assert len(REFUSED) >= 16
