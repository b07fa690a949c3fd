"""What passes around the step compute: inlining, what is known of tokens, rows of logits, lengths, dead arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i32, i64

from llmir_jax.analysis.align import LENGTH, main_function
from llmir_jax.dialects.build import shape_of, tensor
from llmir_jax.errors import UnsupportedModelError
from llmir_jax.interop import call_module, lower_to_module, op_name
from llmir_jax.trace import trace
from llmir_jax.transforms import signature
from llmir_jax.transforms.inline_calls import inline_calls
from llmir_jax.transforms.remove_dead_arguments import RemoveDeadArgumentsPass
from llmir_jax.transforms.simplify_inputs import SimplifyInputsPass, fold_token_comparisons
from llmir_jax.transforms.sink_logits_rows import SinkLogitsRowsPass
from llmir_jax.transforms.specialize_tokens import SpecializeTokensPass

CONTEXT = Context()
VOCAB, WIDTH, TRACED, ROWS = 11, 6, 23, 3
RNG = np.random.default_rng(0)
PARAMS = {
    name: RNG.normal(size=shape).astype(np.float32)
    for name, shape in {"embed": (VOCAB, WIDTH), "head": (WIDTH, VOCAB), "unused": (2, 2)}.items()
}


def traced(fn: Any, length: int = TRACED) -> ModuleOp:
    module = trace(fn, PARAMS, jax.ShapeDtypeStruct((1, length), jnp.int32)).module
    inline_calls(module)
    return module


def run(module: ModuleOp, tokens: np.ndarray, **inputs: np.ndarray) -> list[np.ndarray]:
    """Call @main with parameters by path, and inputs by role."""
    given = {"tokens": tokens, **inputs}
    args = []
    for entry in signature.argument_attributes(main_function(module)):
        if signature.ROLE in entry:
            args.append(given[entry[signature.ROLE].data])
        else:
            (name,) = (name for name in PARAMS if name in entry[signature.PATH].data)
            args.append(PARAMS[name])
    return [np.asarray(x) for x in call_module(module.clone(), *args)]


def some_tokens(n: int) -> np.ndarray:
    return RNG.integers(0, VOCAB, (1, n)).astype(np.int32)


def test_inlined_calls_compute_the_same() -> None:
    relu = jax.jit(jax.nn.relu)
    fn = jax.jit(lambda x: relu(x) + jax.jit(lambda y: relu(-y) * 2)(x))
    x = RNG.normal(size=5).astype(np.float32)
    module = lower_to_module(fn, x)
    assert inline_calls(module) >= 2
    module.verify()
    assert not any(op_name(op) == "func.call" for op in module.walk())
    np.testing.assert_allclose(call_module(module, x)[0], fn(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reflected", [False, True])
@given(bound=st.integers(-3, VOCAB + 3), direction=st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
@settings(max_examples=15, deadline=None)
def test_comparisons_fold_only_where_they_have_one_outcome(reflected: bool, bound: int, direction: str) -> None:
    compare = getattr(jax.lax, direction)

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        other = jnp.full(tokens.shape, bound, jnp.int32)
        mask = compare(other, tokens) if reflected else compare(tokens, other)
        return jnp.where(mask[..., None], p["embed"][tokens], 0.0) @ p["head"]

    module = traced(fn, VOCAB)
    tokens = np.arange(VOCAB, dtype=np.int32)[None]  # every id there is
    outcome = np.asarray(compare(tokens, np.full_like(tokens, bound)))
    if reflected:
        outcome = np.asarray(compare(np.full_like(tokens, bound), tokens))
    before = run(module, tokens)
    folded = fold_token_comparisons(module)
    module.verify()
    np.testing.assert_array_equal(run(module, tokens)[0], before[0])
    if outcome.all() or not outcome.any():
        assert folded >= 1
    else:  # a lookup's own `tokens < 0` may fold, this one not
        kept = [x for x in module.walk() if op_name(x) == "stablehlo.compare"]
        assert kept


def test_rows_that_index_themselves_become_batches() -> None:
    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        x = (p["embed"][tokens] @ p["head"])[0]
        rows = jnp.arange(x.shape[0])[:, None]
        best = jax.lax.top_k(x, 2)[1]
        return jnp.zeros_like(x).at[rows, best].set(x[rows, best])[None]

    module = traced(fn)
    tokens = some_tokens(TRACED)
    before = run(module, tokens)
    SimplifyInputsPass().apply(CONTEXT, module)
    module.verify()
    (scatter,) = (op for op in module.walk() if op_name(op) == "stablehlo.scatter")
    assert "input_batching_dims = [0]" in str(scatter)
    np.testing.assert_array_equal(run(module, tokens)[0], before[0])
    text = str(module)
    SimplifyInputsPass().apply(CONTEXT, module)
    assert str(module) == text


def with_rows(fn: Any) -> ModuleOp:
    module = traced(fn)
    module.attributes[LENGTH] = IntegerAttr(TRACED, i64)
    signature.add_argument(main_function(module), "logits_rows", tensor((ROWS,), i32))
    return module


def head(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["embed"][tokens]
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return jnp.tanh(x @ p["head"] + jnp.sum(p["embed"], 1))


def flattened_head(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["embed"][tokens]
    return (jnp.sin(x.reshape(-1)).reshape(x.shape)) @ p["head"]


@pytest.mark.parametrize("at_logits", [False, True])
@pytest.mark.parametrize("fn", [head, flattened_head])
def test_rows_of_logits(fn: Any, at_logits: bool) -> None:
    tokens, rows = some_tokens(TRACED), np.array([20, 0, 20], np.int32)
    every = run(traced(fn), tokens)[0]
    module = with_rows(fn)
    SinkLogitsRowsPass(at_logits=at_logits).apply(CONTEXT, module)
    module.verify()
    assert shape_of(signature.results(main_function(module))[0]) == (1, ROWS, VOCAB)
    np.testing.assert_allclose(run(module, tokens, logits_rows=rows)[0], every[:, rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 5, 46])
def test_other_numbers_of_tokens(tokens: int) -> None:
    ids, rows = some_tokens(tokens), np.array([tokens - 1, 0, tokens // 2], np.int32)
    module = with_rows(head)
    SinkLogitsRowsPass().apply(CONTEXT, module)
    SpecializeTokensPass(tokens=tokens).apply(CONTEXT, module)
    module.verify()
    every = run(traced(head, tokens), ids)[0]
    np.testing.assert_allclose(run(module, ids, logits_rows=rows)[0], every[:, rows], rtol=1e-5, atol=1e-6)


def test_limits_of_fixed_dims_are_no_tokens() -> None:
    """A slice [20:23] of a fixed dim, where 23 is the number of tokens traced at."""

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        wide = p["embed"][tokens][..., :1] * jnp.arange(25.0)
        return wide[..., 20:23] @ p["head"][:3]

    module = traced(fn)
    module.attributes[LENGTH] = IntegerAttr(TRACED, i64)
    SpecializeTokensPass(tokens=4).apply(CONTEXT, module)
    module.verify()
    ids = some_tokens(4)
    np.testing.assert_allclose(run(module, ids)[0], run(traced(fn, 4), ids)[0], rtol=1e-5, atol=1e-6)


def test_constants_of_the_traced_length_are_refused() -> None:
    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        return (p["embed"][tokens] + np.arange(TRACED, dtype=np.float32)[:, None]) @ p["head"]

    module = traced(fn)
    module.attributes[LENGTH] = IntegerAttr(TRACED, i64)
    with pytest.raises(UnsupportedModelError, match="constant of token extent"):
        SpecializeTokensPass(tokens=4).apply(CONTEXT, module)


def test_dead_arguments() -> None:
    module = traced(lambda p, tokens: p["embed"][tokens] @ p["head"])
    tokens = some_tokens(TRACED)
    before = run(module, tokens)
    assert len(main_function(module).body.block.args) == 4
    RemoveDeadArgumentsPass().apply(CONTEXT, module)
    module.verify()
    paths = [path for _, path in signature.parameter_paths(main_function(module))]
    assert len(paths) == 2
    assert not any("unused" in path for path in paths)
    np.testing.assert_array_equal(run(module, tokens)[0], before[0])
