"""Derivations easily got wrong: verdicts that must not be shared, lengths that look alike, sizes that coincide."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from xdsl.dialects.builtin import ModuleOp
from xdsl_jax.dialects import stablehlo
from zoo.plain import Init, head_weights, heads_of, merge, toy_lm
from zoo.registry import Built

import llmir_jax as llmir
from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.errors import UnsupportedModelError
from llmir_jax.interop import dense_to_numpy
from llmir_jax.pipeline import Recorder, derive_step, specialize_step
from llmir_jax.trace import flatten_params, trace


def derived(built: Built, *, max_seq_len: int = 48, num_pages: int = 36, page_size: int = 4) -> Any:
    return derive_step(
        lambda n: trace(built.forward, built.model, jax.ShapeDtypeStruct((1, n), jnp.int32), fold=False),
        lambda: flatten_params(built.model),
        max_seqs=3,
        max_seq_len=max_seq_len,
        page_size=page_size,
        num_pages=num_pages,
        recorder=Recorder(),
    )


def attentions(module: ModuleOp) -> list[llm.AttendPagesOp]:
    return [op for op in main_function(module).body.block.ops if isinstance(op, llm.AttendPagesOp)]


def test_layers_that_share_heads_otherwise_are_judged_apart() -> None:
    """Six query heads on two KV heads, then on three: the slopes follow the heads, which are grouped otherwise."""
    slopes = 2.0 ** -np.arange(1, 7)
    numbers = iter((2, 3, 2))

    def attend(p: Any, h: jax.Array) -> jax.Array:
        q, k, v = heads_of(p, h)
        k, v = (jnp.tile(x, (1, 1, 6 // x.shape[2], 1)) for x in (k, v))  # query head h reads KV head h % Hkv
        at = jnp.arange(h.shape[1])
        distance = (at[None, :] - at[:, None]).astype(jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3 + jnp.asarray(slopes, jnp.float32)[:, None, None] * distance
        weights = jax.nn.softmax(jnp.where(distance <= 0, scores, -1e9))
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", weights, v))

    def weights(init: Init) -> Any:
        return head_weights(init, 6, next(numbers))

    found = []
    for op in attentions(derived(toy_lm(0, attend, weights, layers=3)).module):
        assert op.slopes is not None
        assert isinstance(op.slopes.owner, stablehlo.ConstantOp)
        found.append(dense_to_numpy(op.slopes.owner.value))
    for got, kv_heads in zip(found, (2, 3, 2), strict=True):
        np.testing.assert_allclose(got, slopes.reshape(-1, kv_heads).T.reshape(-1), rtol=1e-4)


def late_normalised(factor: Callable[[int], Any]) -> Built:
    def attend(p: Any, h: jax.Array) -> jax.Array:
        q, k, v = heads_of(p, h)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
        e = jnp.where(jnp.tri(h.shape[1], dtype=bool), jnp.exp(scores), 0.0)
        total = e.sum(-1)[..., None] * factor(v.shape[-1])
        return merge(p, (jnp.einsum("bhqk,bkhd->bhqd", e, v) / total).transpose(0, 2, 1, 3))

    return toy_lm(0, attend)


def test_late_normalisation() -> None:
    assert len(attentions(derived(late_normalised(lambda n: 1.0)).module)) == 1
    with pytest.raises(UnsupportedModelError, match="differs between the values' dims"):
        derived(late_normalised(lambda n: np.linspace(1, 0.3, n, dtype=np.float32)))


SCALED_BY_LENGTH: dict[str, Callable[[int], float]] = {
    "steps of 64 tokens": lambda t: 1.0 + t // 64,
    "from 200 tokens on": lambda t: max(1.0, t / 200),
    "steps of 128 tokens": lambda t: 1.0 + t // 128,
}


@pytest.mark.parametrize("name", SCALED_BY_LENGTH)
def test_lengths_that_look_alike(name: str) -> None:
    """What is the same at two neighbouring lengths may differ at others."""
    factor = SCALED_BY_LENGTH[name]
    with pytest.raises(UnsupportedModelError, match=r"sequence length|different operations"):
        derived(toy_lm(0, mix=lambda p, x: x * factor(x.shape[1])), max_seq_len=400, num_pages=300)


def test_small_tables_of_the_length() -> None:
    """Entries far below 1 are compared with one another, not with 1."""

    def mix(p: Any, x: jax.Array) -> jax.Array:
        t = x.shape[1]
        return x + jnp.sin(jnp.cumsum(jnp.ones(t)) * (1e-9 * t) * 1e7)[None, :, None]

    with pytest.raises(UnsupportedModelError, match="sequence length"):
        derived(toy_lm(0, mix=mix))


@pytest.mark.parametrize(("num_pages", "page_size"), [(131, 4), (262, 2), (131 * 113, 1), (20, 131)])
def test_caches_of_the_traced_size(num_pages: int, page_size: int) -> None:
    """The size of the cache is never taken for the token axis."""
    step = derived(toy_lm(0), num_pages=num_pages, page_size=page_size)
    module = specialize_step(step, 8, Recorder())
    shapes = [arg.type.get_shape() for arg in main_function(module).body.block.args]
    assert shapes.count((num_pages, page_size, 3, 10)) == 2


def test_sizes_of_the_model_that_are_the_traced_length() -> None:
    def mix(p: Any, x: jax.Array) -> jax.Array:
        bumps = jnp.exp(-((x[..., :1] - jnp.linspace(-2, 2, 131)) ** 2))
        return x + bumps[..., 100:131].mean(-1, keepdims=True)

    assert derived(toy_lm(0, mix=mix)).length != 131


@pytest.mark.parametrize("how", ["slice", "take", "embed"])
def test_a_table_of_positions_limits_the_context_by_itself(how: str) -> None:
    rows = 150
    table = jax.random.normal(jax.random.key(0), (rows, 6))
    embedding = jax.random.normal(jax.random.key(1), (97, 6))

    def forward(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        length = tokens.shape[1]
        if how == "slice":
            positions = params["table"][:length]
        elif how == "take":
            positions = jnp.take(params["table"], jnp.arange(length), axis=0)
        else:
            positions = params["table"][jnp.arange(length)]
        return (params["embed"][tokens] + positions) @ params["embed"].T

    decoder = llmir.jit(forward).decoder({"table": table, "embed": embedding}, max_seqs=2, buckets=(8,))
    assert decoder.max_seq_len == rows
    assert any(f"limited to {rows} tokens" in note for note in decoder.report().notes)


def test_tokens_counted_in_a_float_that_cannot() -> None:
    def forward(params: jax.Array, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.bfloat16).astype(jnp.float32)
        return (params[tokens] + jnp.sin(positions)[None, :, None]) @ params.T

    embedding = jax.random.normal(jax.random.key(0), (97, 6))
    with pytest.raises(UnsupportedModelError, match=r"iota at test_derive.py:\d+ .*bfloat16.*256"):
        llmir.jit(forward).decoder(embedding, max_seqs=2, max_seq_len=400)
    assert llmir.jit(forward).decoder(embedding, max_seqs=2, max_seq_len=256, buckets=(8,)).max_seq_len == 256
