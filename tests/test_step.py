"""The compiled step: its cache is updated in place, and pages behind a window come free."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmir_jax as llmir
from llmir_jax.pipeline import Recorder, derive_step
from llmir_jax.runtime.batch import Cache, StepBatch
from llmir_jax.step import DerivedStep
from llmir_jax.trace import flatten_params, trace
from llmir_jax.weights import ModelWeights

VOCAB, WIDTH, HEADS, HEAD_DIM = 31, 12, 3, 5
WINDOWS = (None, 6, None)  # of the layers
PAGE_SIZE, NUM_PAGES, MAX_SEQS = 4, 37, 2


def make_params(dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    layers = [
        {"qkv": draw(WIDTH, 3, HEADS, HEAD_DIM), "o": draw(HEADS, HEAD_DIM, WIDTH), "up": draw(WIDTH, WIDTH)}
        for _ in WINDOWS
    ]
    return {"embed": draw(VOCAB, WIDTH) * 5, "layers": layers}


def forward(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens]
    at = jnp.arange(tokens.shape[1])
    distance = at[:, None] - at[None, :]
    for layer, window in zip(params["layers"], WINDOWS, strict=True):
        q, k, v = jnp.einsum("btc,cnhd->nbthd", x, layer["qkv"])
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        x = x + jnp.einsum("bhqk,bkhd,hdc->bqc", weights, v, layer["o"])
        x = x + jnp.tanh(x @ layer["up"])
    return x @ params["embed"].T


def derived(dtype: Any, buckets: tuple[int, ...]) -> DerivedStep:
    params = make_params(dtype)
    first = trace(forward, params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    recorder = Recorder()
    step = derive_step(
        lambda n: trace(forward, params, jax.ShapeDtypeStruct((1, n), jnp.int32)),
        lambda: flatten_params(params),
        max_seqs=MAX_SEQS,
        max_seq_len=60,
        page_size=PAGE_SIZE,
        num_pages=NUM_PAGES,
        recorder=recorder,
    )
    source = ModelWeights([p.path for p in first.params], flatten_params(params))
    return DerivedStep(step, source, max_seqs=MAX_SEQS, buckets=buckets, recorder=recorder)


def batch_shapes(tokens: int, num_groups: int) -> StepBatch:
    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return StepBatch(
        tokens=ints(tokens), positions=ints(tokens), seq_ids=ints(tokens), num_tokens=ints(),
        block_tables=tuple(ints(MAX_SEQS, 15) for _ in range(num_groups)), seq_lens=ints(MAX_SEQS),
        logits_rows=ints(MAX_SEQS),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, MAX_SEQS, 16])
def test_no_copy_of_the_cache(tokens: int, dtype: Any) -> None:
    """In what XLA makes of a step whose cache is donated, no page array is copied, and each result takes its place."""
    model = derived(dtype, (tokens,))

    def step(params: Any, cache: Cache, batch: StepBatch) -> tuple[jax.Array, jax.Array, Cache]:
        logits, new = model.step(params, cache, batch)
        return logits, logits.argmax(-1), new

    lowered = jax.jit(step, donate_argnames="cache").lower(
        model.params, model.init_cache(), batch_shapes(tokens, len(model.cache_groups))
    )
    text = lowered.compile().as_text()
    arrays = jax.tree.leaves(model.init_cache())
    assert len(arrays) == 2 * len(WINDOWS)

    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliases is not None
    aliased = {int(n) for n in re.findall(r": \((\d+), \{\}", aliases[1])}
    first = len(jax.tree.leaves(model.params))
    assert aliased >= set(range(first, first + len(arrays)))

    # as pages, or as rows of pages: [37, 4, 3, 5] or [148, 3, 5]
    shapes = {",".join(map(str, shape)) for shape in (arrays[0].shape, (NUM_PAGES * PAGE_SIZE, HEADS, HEAD_DIM))}
    copies = [
        line.strip()
        for line in text.splitlines()
        if (found := re.search(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", line)) and found[1] in shapes
    ]
    assert copies == []


def test_pages_behind_a_window_come_free() -> None:
    decoder = llmir.jit(forward).decoder(
        make_params(jnp.float32),
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_seqs=MAX_SEQS,
        max_seq_len=60,
        buckets=(8,),
        prefill_chunk=8,
        burst=0,
    )
    assert [(g.window, g.num_layers) for g in decoder.cache_groups] == [(None, 2), (6, 1)]
    prompt = np.random.default_rng(1).integers(0, VOCAB, 20).tolist()
    used = []
    tokens = list(prompt)
    for update in decoder.stream(prompt, llmir.SamplingParams(max_tokens=30)):
        used.append(decoder.engine.stats().pages_used)
        tokens += update.token_ids
    everything, windowed = (list(column) for column in zip(*used, strict=True))
    assert max(everything) == (20 + 30 - 2) // PAGE_SIZE  # the last token is not computed, nor looked at the one before
    assert max(windowed) <= -(-(6 - 1) // PAGE_SIZE) + 1  # the window's past, and the page it begins in the middle of
    assert decoder.engine.stats().pages_used == (0, 0)

    # what was freed was not needed
    logits = np.asarray(forward(make_params(jnp.float32), jnp.asarray([tokens])))[0]
    assert tokens[len(prompt) :] == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
