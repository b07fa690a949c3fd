"""Every kind of model traces to a module with its parameters' paths, and the module computes what the model does."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from xdsl.dialects import func
from xdsl.dialects.builtin import StringAttr

from llmir_jax.errors import LlmirError
from llmir_jax.interop import LOC, call_module
from llmir_jax.trace import PATH, ROLE, Traced, check_logits, flatten_model, flatten_params, trace

VOCAB, DIM = 11, 8
TOKENS = np.array([[3, 1, 4], [1, 5, 9]], np.int32)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.fc = nnx.Linear(DIM, DIM, rngs=rngs)
        self.norm = nnx.BatchNorm(DIM, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.drop(self.norm(jax.nn.relu(self.fc(x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = self.embed  # tied: one parameter

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head.attend(x)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, DIM)(tokens)
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(VOCAB)(nn.relu(nn.Dense(DIM, kernel_init=init)(x)))


@partial(jax.tree_util.register_dataclass, data_fields=["embed", "value"], meta_fields=["scale"])
@dataclasses.dataclass
class DataclassModel:
    embed: Any
    value: Any
    scale: float

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed[tokens] @ self.value * self.scale


def call(model: Any, tokens: jax.Array) -> Any:
    return model(tokens)


def nnx_model() -> NnxModel:
    model = NnxModel(nnx.Rngs(0))
    model.eval()
    return model


def plain_forward(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens]
    for w, b in params["layers"]:
        x = jnp.tanh(x @ w + b)
    return x @ params["embed"].T


def plain_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    layers = [(rng.normal(size=(DIM, DIM)), rng.normal(size=DIM)) for _ in range(2)]
    params = {"embed": rng.normal(size=(VOCAB, DIM)), "layers": layers}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def linen_params() -> Any:
    return LinenModel().init(jax.random.key(0), TOKENS)


BLOCK_PATHS = (
    "drop.rngs.count",
    "drop.rngs.key",
    "fc.bias",
    "fc.kernel",
    "norm.bias",
    "norm.mean",
    "norm.scale",
    "norm.var",
)
MODELS: dict[str, tuple[Callable[..., Any], Callable[[], Any], tuple[str, ...]]] = {
    "nnx": (call, nnx_model, ("embed.embedding", *(f"layers.{i}.{p}" for i in (0, 1) for p in BLOCK_PATHS))),
    "linen": (
        LinenModel().apply,
        linen_params,
        (
            *("params.Dense_0.bias", "params.Dense_0.kernel", "params.Dense_1.bias", "params.Dense_1.kernel"),
            "params.Embed_0.embedding",
        ),
    ),
    "dict": (plain_forward, plain_params, ("embed", "layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1")),
    "dataclass": (
        call,
        lambda: DataclassModel(jnp.ones((VOCAB, DIM)), jnp.ones((DIM, VOCAB)), 0.5),
        ("embed", "value"),
    ),
    "nnx state": (
        lambda state, tokens: nnx.merge(nnx.graphdef(nnx_model()), state)(tokens),
        lambda: nnx.state(nnx_model()),
        ("embed.embedding", *(f"layers.{i}.{p}" for i in (0, 1) for p in BLOCK_PATHS)),
    ),
    "nnx in a tuple": (
        lambda pair, tokens: pair[0](tokens) * pair[1],
        lambda: (nnx.Embed(VOCAB, DIM, rngs=nnx.Rngs(0)), jnp.float32(2)),
        ("0.embedding", "1"),
    ),
    "nnx modules that share": (
        lambda pair, tokens: pair["b"].attend(pair["a"](tokens)),
        lambda: dict.fromkeys("ab", nnx.Embed(VOCAB, DIM, rngs=nnx.Rngs(0))),
        ("a.embedding",),
    ),
    "one array": (lambda table, tokens: table[tokens], lambda: jnp.ones((VOCAB, VOCAB)), ("model",)),
    "with a Python number": (
        lambda params, tokens: params["w"][tokens] * params["scale"],
        lambda: {"w": jnp.ones((VOCAB, VOCAB), jnp.bfloat16), "scale": 3.0},
        ("scale", "w"),
    ),
}
models = pytest.mark.parametrize("kind", MODELS)


def arg_attrs(traced: Traced) -> list[dict[str, Any]]:
    main = next(op for op in traced.module.ops if isinstance(op, func.FuncOp) and op.sym_name.data == "main")
    assert main.arg_attrs is not None
    return [dict(attrs.data) for attrs in main.arg_attrs]


@models
def test_module_computes_what_the_forward_does(kind: str) -> None:
    fn, make, _ = MODELS[kind]
    model = make()
    traced = trace(fn, model, TOKENS)
    traced.module.verify()
    result = traced.unflatten_result(call_module(traced.module, *flatten_params(model), TOKENS))
    expected = jax.jit(fn)(model, TOKENS)
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(np.float32(result), np.float32(expected), rtol=1e-6)
    check_logits(traced)


@models
def test_parameters_have_the_paths_a_person_writes(kind: str) -> None:
    fn, make, paths = MODELS[kind]
    traced = trace(fn, make(), TOKENS)
    assert tuple(p.path for p in traced.params) == paths
    attrs = arg_attrs(traced)
    assert [a.get(PATH) for a in attrs] == [*map(StringAttr, paths), None]
    assert [a.get(ROLE) for a in attrs] == [*(None for _ in paths), StringAttr("tokens")]
    for param, array in zip(traced.params, flatten_params(make()), strict=True):
        assert (param.shape, param.dtype) == (jnp.shape(array), jax.typeof(array).dtype)


@models
def test_shapes_trace_like_arrays(kind: str) -> None:
    fn, make, _ = MODELS[kind]
    shapes = nnx.eval_shape(make) if kind.startswith("nnx") else jax.eval_shape(make)
    if kind == "nnx":
        shapes.eval()
    from_shapes = trace(fn, shapes, jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32))
    from_arrays = trace(fn, make(), TOKENS)
    assert from_shapes.params == from_arrays.params
    assert str(from_shapes.result) == str(from_arrays.result)
    with pytest.raises(LlmirError, match=r"parameter '.*' is a shape without values"):
        flatten_params(shapes)


def test_unused_parameters_and_tokens_stay_arguments() -> None:
    traced = trace(lambda params, tokens: jnp.zeros((2, 3, 4)), plain_params(), TOKENS)
    assert len(arg_attrs(traced)) == len(traced.params) + 1 == 6


def test_result_may_be_any_pytree() -> None:
    traced = trace(lambda p, t: {"a": (p["embed"][t], None), "b": [t + 1]}, plain_params(), TOKENS)
    result = traced.unflatten_result(call_module(traced.module, *flatten_params(plain_params()), TOKENS))
    assert result["a"][1] is None
    np.testing.assert_array_equal(result["b"][0], TOKENS + 1)
    assert traced.result["a"][0].shape == (2, 3, DIM)


def test_models_of_one_structure_have_equal_trees() -> None:
    _, first = flatten_model(nnx_model())
    _, second = flatten_model(nnx_model())
    assert first == second
    assert hash(first) == hash(second)
    other = NnxModel(nnx.Rngs(0))
    assert flatten_model(other)[1] != first  # in training mode


def test_unflatten_gives_the_model_back() -> None:
    model = nnx_model()
    arrays, tree = flatten_model(model)
    np.testing.assert_array_equal(tree.unflatten(arrays)(TOKENS), model(TOKENS))


def test_arrays_that_the_forward_closes_over_are_constants() -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, DIM)), jnp.float32)
    traced = trace(lambda p, tokens: table[tokens] @ p, jnp.ones((DIM, 4)), TOKENS)
    assert len(arg_attrs(traced)) == 2
    (result,) = call_module(traced.module, jnp.ones((DIM, 4)), TOKENS)
    np.testing.assert_allclose(result, table[TOKENS] @ jnp.ones((DIM, 4)), rtol=1e-6)


def test_operations_of_flax_layers_name_the_line_that_calls_them() -> None:
    traced = trace(call, nnx_model(), TOKENS)
    locs = {op.attributes[LOC].data for op in traced.module.walk() if LOC in op.attributes}
    line = Block.__call__.__code__.co_firstlineno + 1
    assert f"test_trace.py:{line} (Block.__call__)" in locs
    assert all(loc.startswith("test_trace.py") for loc in locs)


def test_trace_for_another_platform() -> None:
    def fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        return jax.lax.platform_dependent(x, cpu=jnp.sin, tpu=jnp.cos)

    text = str(trace(fn, plain_params(), TOKENS, platform="tpu").module)
    assert "stablehlo.cosine" in text
    assert "stablehlo.sine" not in text
    with pytest.raises(LlmirError, match="platform must be one of cpu"):
        trace(fn, plain_params(), TOKENS, platform="abacus")


# Refused -------------------------------------------------------------------------------------------------------------


class Counter(nnx.Module):
    def __init__(self, *, grows: bool):
        self.table = nnx.Param(jnp.ones((VOCAB, VOCAB)))
        self.steps = nnx.Variable(jnp.zeros((), jnp.int32))
        self.grows = grows

    def __call__(self, tokens: jax.Array) -> jax.Array:
        if self.grows:
            self.cache = nnx.Variable(tokens)
        else:
            self.steps[...] += 1
        return self.table[tokens]


def test_a_forward_that_changes_the_model_is_refused() -> None:
    with pytest.raises(LlmirError, match=r"call changes the model's state 'steps'; .*model\.eval\(\)"):
        trace(call, Counter(grows=False), TOKENS)
    with pytest.raises(LlmirError, match="adds state to the model"):
        trace(call, Counter(grows=True), TOKENS)


@pytest.mark.parametrize("layer", ["drop", "norm"])
def test_training_mode_is_refused(layer: str) -> None:
    model = nnx_model()
    getattr(model.layers[1], layer).train()
    with pytest.raises(LlmirError, match=rf"state 'layers\.1\.{layer}\..*eval"):
        trace(call, model, TOKENS)


def test_leaves_that_are_no_arrays_are_refused() -> None:
    with pytest.raises(LlmirError, match=r"leaf 'layers\.1\.act' is a function, not an array"):
        trace(plain_forward, {"layers": [{}, {"act": plain_forward}]}, TOKENS)
    with pytest.raises(LlmirError, match="'name' is a str"):
        flatten_params({"name": "llama"})


@pytest.mark.parametrize("kind", ["print", "pure", "io"])
def test_callbacks_are_refused(kind: str) -> None:
    shape = jax.ShapeDtypeStruct((), jnp.float32)

    def fn(params: Any, tokens: jax.Array) -> Any:
        x = params["embed"][tokens]
        if kind == "print":
            jax.debug.print("{}", x.sum())
        elif kind == "pure":
            x = x + jax.pure_callback(np.float32, shape, 1.0)
        else:
            x = x + jax.experimental.io_callback(np.float32, shape, 1.0)
        return x

    with pytest.raises(LlmirError, match="fn calls back into Python"):
        trace(fn, plain_params(), TOKENS)


def test_returned_keys_are_refused() -> None:
    with pytest.raises(LlmirError, match="returns PRNG keys"):
        trace(lambda key, tokens: jax.random.split(key), jax.random.key(0), TOKENS)


def test_errors_of_the_forward_go_through() -> None:
    def fn(params: Any, tokens: jax.Array) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace(fn, plain_params(), TOKENS)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        trace(lambda p, t: p if t.sum() > 0 else t, plain_params(), TOKENS)


@pytest.mark.parametrize(
    ("fn", "tokens", "message"),
    [
        (
            lambda p, t: (p["embed"][t], t),
            TOKENS,
            r"one array of logits .* structure of float32\[2, 3, 8\], int32\[2, 3\]",
        ),
        (lambda p, t: [p["embed"][t]], TOKENS, "one array of logits"),
        (lambda p, t: None, TOKENS, "got a structure of nothing"),
        (
            lambda p, t: p["embed"][t][:, -1],
            TOKENS,
            r"logits \[2, 3, vocab\] for tokens int32\[2, 3\], got float32\[2, 8\]",
        ),
        (lambda p, t: p["embed"][t].swapaxes(0, 1), TOKENS, r"got float32\[3, 2, 8\]"),
        (lambda p, t: p["embed"][t].argmax(-1, keepdims=True), TOKENS, r"floating-point logits, got int32\[2, 3, 1\]"),
        (lambda p, t: p["embed"][t], TOKENS[0], r"must take tokens int32\[batch, seq\], got int32\[3\]"),
        (lambda p, t: p["embed"][t.astype(int)], TOKENS.astype(np.float32), r"got float32\[2, 3\]"),
    ],
)
def test_results_that_are_no_logits_are_named(fn: Any, tokens: Any, message: str) -> None:
    traced = trace(fn, plain_params(), tokens)
    with pytest.raises(LlmirError, match=message):
        check_logits(traced)
