"""`llmir.jit` of a forward is a drop-in for `jax.jit` of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmir_jax as llmir
from llmir_jax.errors import LlmirError
from llmir_jax.jit import Jitted

VOCAB, DIM = 11, 8
TOKENS = np.array([[3, 1, 4], [1, 5, 9]], np.int32)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.fc = nnx.Linear(DIM, DIM, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(self.drop(jnp.tanh(self.fc(self.embed(tokens)))))


def model() -> Model:
    made = Model(nnx.Rngs(0))
    made.eval()
    return made


def call(model: Any, tokens: jax.Array) -> Any:
    return model(tokens)


def plain(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """A plain forward."""
    return jnp.tanh(params["embed"][tokens] @ params["w"]) @ params["embed"].T


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCAB, DIM), "w": (DIM, DIM)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


class NoPytree(nnx.Module, pytree=False):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = model()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.inner(tokens)


CASES = {"nnx": (call, model), "plain": (plain, params)}
cases = pytest.mark.parametrize("case", CASES)


def assert_close(a: Any, b: Any, rtol: float = 1e-5) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5), a, b)


@cases
def test_same_result_as_jax_jit(case: str) -> None:
    fn, make = CASES[case]
    forward = llmir.jit(fn)
    for tokens in (TOKENS, TOKENS[:1, :2], jnp.asarray(TOKENS)):
        found, expected = forward(make(), tokens), jax.jit(fn)(make(), tokens)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_nnx_module_that_is_no_pytree() -> None:
    forward, made = llmir.jit(call), NoPytree(nnx.Rngs(0))
    np.testing.assert_array_equal(forward(made, TOKENS), nnx.jit(call)(made, TOKENS))
    np.testing.assert_array_equal(forward.lower(made, TOKENS).compile()(made, TOKENS), forward(made, TOKENS))


def test_traces_once_for_equal_shapes_and_structures() -> None:
    traces = []

    @llmir.jit
    def forward(params: Any, tokens: jax.Array) -> Any:
        traces.append(tokens.shape)
        return plain(params, tokens)

    for _ in range(3):
        forward(params(), TOKENS)
    forward(params(), TOKENS[:1])
    forward({**params(), "unused": jnp.ones(3)}, TOKENS)
    assert traces == [(2, 3), (1, 3), (2, 3)]


def test_configuration_of_jax_counts() -> None:
    forward = llmir.jit(lambda w, tokens: w[tokens] @ w.T)
    with jax.default_matmul_precision("highest"):
        text = forward.lower(params()["embed"], TOKENS).as_text("stablehlo")
    assert "HIGHEST" in text
    assert "HIGHEST" not in forward.lower(params()["embed"], TOKENS).as_text("stablehlo")


@cases
def test_inside_an_outer_jit(case: str) -> None:
    fn, make = CASES[case]
    forward = llmir.jit(fn)

    @jax.jit
    def outer(model: Any, tokens: jax.Array) -> jax.Array:
        return forward(model, tokens + 1).sum(-1) + forward(model, tokens).max(-1)

    def expected(model: Any, tokens: jax.Array) -> jax.Array:
        return fn(model, tokens + 1).sum(-1) + fn(model, tokens).max(-1)

    assert_close(outer(make(), TOKENS), expected(make(), TOKENS))


def test_inside_nnx_jit_and_scan() -> None:
    forward = llmir.jit(call)
    assert_close(nnx.jit(lambda m, t: forward(m, t))(model(), TOKENS), model()(TOKENS))

    def body(tokens: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return forward(model(), tokens).argmax(-1).astype(jnp.int32), tokens

    def expected(tokens: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return model()(tokens).argmax(-1).astype(jnp.int32), tokens

    found = jax.jit(lambda t: jax.lax.scan(body, t, None, length=3))(TOKENS)
    assert_close(found, jax.lax.scan(expected, jnp.asarray(TOKENS), None, length=3))


def test_with_jit_disabled() -> None:
    with jax.disable_jit():
        assert_close(llmir.jit(plain)(params(), TOKENS), plain(params(), TOKENS))


def test_sharded_parameters() -> None:
    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    assert_close(llmir.jit(plain)(jax.device_put(params(), sharding), TOKENS), plain(params(), TOKENS))


def test_nested_in_another_compiled_forward() -> None:
    inner = llmir.jit(plain)
    outer = llmir.jit(lambda params, tokens: {"logits": inner(params, tokens), "next": inner(params, tokens + 1)})
    found = outer(params(), TOKENS)
    assert_close(found, {"logits": plain(params(), TOKENS), "next": plain(params(), TOKENS + 1)})


def test_any_result() -> None:
    forward = llmir.jit(lambda p, t: (p["w"], {"tokens": t, "none": None}, [t.sum()]))
    assert_close(forward(params(), TOKENS), (params()["w"], {"tokens": TOKENS, "none": None}, [TOKENS.sum()]))
    assert llmir.jit(lambda p, t: {})(params(), TOKENS) == {}


def test_gradients_of_a_pytree() -> None:
    forward = llmir.jit(plain)

    def loss(fn: Any) -> Any:
        return lambda p, t: (fn(p, t) ** 2).mean()

    expected = jax.value_and_grad(loss(plain))(params(), TOKENS)
    assert_close(jax.value_and_grad(loss(forward))(params(), TOKENS), expected)
    assert_close(jax.jit(jax.value_and_grad(loss(forward)))(params(), TOKENS), expected)
    tangents = jax.tree.map(jnp.ones_like, params())
    found = jax.jvp(lambda p: forward(p, TOKENS), (params(),), (tangents,))
    assert_close(found, jax.jvp(lambda p: plain(p, TOKENS), (params(),), (tangents,)))


def test_second_derivatives() -> None:
    forward = llmir.jit(lambda w, tokens: jnp.sin(w[tokens]))
    w = params()["w"]
    twice = jax.grad(lambda w: jax.grad(lambda w: forward(w, TOKENS % DIM).sum())(w).sum())
    expected = jnp.zeros_like(w).at[TOKENS % DIM].add(-jnp.sin(w[TOKENS % DIM]))
    assert_close(twice(w), expected)


def test_gradients_of_an_nnx_model() -> None:
    forward = llmir.jit(call)
    found = nnx.grad(lambda m: (forward(m, TOKENS) ** 2).mean())(model())
    expected = nnx.grad(lambda m: (m(TOKENS) ** 2).mean())(model())
    assert_close(nnx.to_pure_dict(found), nnx.to_pure_dict(expected))


@cases
def test_vmap_over_tokens(case: str) -> None:
    fn, make = CASES[case]
    forward, made = llmir.jit(fn), make()
    batch = np.stack([TOKENS, TOKENS + 1, TOKENS + 2])
    expected = np.stack([fn(made, tokens) for tokens in batch])
    assert_close(jax.vmap(lambda t: forward(made, t))(batch), expected)
    assert_close(jax.jit(jax.vmap(lambda t: forward(made, t), out_axes=1))(batch), expected.swapaxes(0, 1))


def test_vmap_over_parameters_and_gradients() -> None:
    forward = llmir.jit(plain)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params())
    assert_close(jax.vmap(forward, in_axes=(0, None))(stacked, TOKENS), jax.vmap(plain, (0, None))(stacked, TOKENS))

    def gradients(fn: Any) -> Any:
        return jax.vmap(jax.grad(lambda p, t: fn(p, t).sum()), in_axes=(None, 0))(params(), TOKENS[:, None])

    assert_close(gradients(forward), gradients(plain))


def test_method_takes_its_instance_as_the_model() -> None:
    class Served(Model):
        @llmir.jit
        def logits(self, tokens: jax.Array) -> jax.Array:
            return self(tokens)

    served = Served(nnx.Rngs(0))
    served.eval()
    assert_close(served.logits(TOKENS), served(TOKENS))


def test_keeps_the_functions_metadata() -> None:
    forward = llmir.jit(plain)
    assert isinstance(forward, Jitted)
    assert (forward.__name__, forward.__doc__, forward.__wrapped__) == ("plain", "A plain forward.", plain)
    assert repr(forward) == "<llmir.jit of plain>"


def test_keyword_arguments() -> None:
    assert_close(llmir.jit(plain)(params(), tokens=TOKENS), plain(params(), TOKENS))


# Staged --------------------------------------------------------------------------------------------------------------


def test_stages_as_text() -> None:
    lowered = llmir.jit(call).lower(nnx.eval_shape(model), jax.ShapeDtypeStruct((1, 5), jnp.int32))
    for stage in ("stablehlo", "llm"):
        text = lowered.as_text(stage)
        assert "stablehlo.dot_general" in text
        assert '{llmir.path = "fc.kernel"}' in text
        assert "llmir.loc" not in text
    target = lowered.as_text()
    assert "func.func public @main" in target
    assert "llmir.path" not in target
    with pytest.raises(LlmirError, match="stage must be one of stablehlo, llm, target, got 'hlo'"):
        lowered.as_text("hlo")


@cases
def test_compiled(case: str) -> None:
    fn, make = CASES[case]
    lowered = llmir.jit(fn).lower(make(), TOKENS)
    compiled = lowered.compile()
    np.testing.assert_array_equal(compiled(make(), TOKENS), jax.jit(fn)(make(), TOKENS))
    assert lowered.out_info.shape == compiled.out_info.shape == (2, 3, VOCAB)
    assert compiled.as_text().startswith("HloModule jit_")
    assert compiled.cost_analysis()["flops"] > 0
    assert compiled.memory_analysis().output_size_in_bytes >= 2 * 3 * VOCAB * 4


def test_compiled_names_what_does_not_fit() -> None:
    compiled = llmir.jit(plain).lower(params(), TOKENS).compile()
    with pytest.raises(LlmirError, match=r"lowered for 'tokens' of int32\[2, 3\], got int32\[1, 3\]"):
        compiled(params(), TOKENS[:1])
    with pytest.raises(LlmirError, match=r"'w' of float32\[8, 8\], got bfloat16\[8, 8\]"):
        compiled({**params(), "w": params()["w"].astype(jnp.bfloat16)}, TOKENS)
    with pytest.raises(LlmirError, match="another structure"):
        compiled({"embed": params()["embed"]}, TOKENS)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_options_are_checked() -> None:
    with pytest.raises(LlmirError, match="no option quantise: its options are quantize, mesh, target"):
        llmir.jit(plain, quantise="int4")
    with pytest.raises(LlmirError, match="unknown scheme 'int5'"):
        llmir.jit(quantize="int5")
    with pytest.raises(LlmirError, match="mesh: there is no axis 'x'; the axes are data, "):
        llmir.jit(plain, mesh=jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)))
    with pytest.raises(LlmirError, match=r"target must be one of cpu, gpu, gpu-mosaic, tpu, reference, .* got 'npu'"):
        llmir.jit(target="npu")
    for target in (None, "cpu", "gpu", "tpu", "reference"):
        assert_close(llmir.jit(target=target)(plain)(params(), TOKENS), plain(params(), TOKENS))


def test_functions_of_anything_else_are_refused() -> None:
    with pytest.raises(LlmirError, match=r"takes a function of .model, tokens., got int"):
        llmir.jit(3)
    with pytest.raises(LlmirError, match=r"forward\(params\) is no function of \(model, tokens\)"):

        @llmir.jit
        def forward(params: Any) -> Any:
            return params

    with pytest.raises(LlmirError, match="got 3 arguments"):
        llmir.jit(lambda model, tokens, extra=None: model)(params(), TOKENS, 1)
    with pytest.raises(TypeError, match="missing"):
        llmir.jit(plain)(params())


def test_arguments_are_checked() -> None:
    forward = llmir.jit(plain)
    with pytest.raises(LlmirError, match=r"plain: tokens must be an array int32\[batch, seq\], got list"):
        forward(params(), [[1, 2]])
    with pytest.raises(LlmirError, match="'w' is a shape without values"):
        forward({**params(), "w": jax.ShapeDtypeStruct((DIM, DIM), jnp.float32)}, TOKENS)
    with pytest.raises(LlmirError, match="'w' is a str, not an array"):
        forward({**params(), "w": "w"}, TOKENS)
    with pytest.raises(LlmirError, match=r"changes the model's state 'drop\.rngs\.count'"):
        llmir.jit(call)(Model(nnx.Rngs(0)), TOKENS)


def test_errors_of_the_forward_go_through() -> None:
    @llmir.jit
    def forward(params: Any, tokens: jax.Array) -> Any:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        forward(params(), TOKENS)


def test_decoder_options_are_checked() -> None:
    with pytest.raises(LlmirError, match=r"decoder has no option pages: its options are .*num_pages"):
        llmir.jit(plain).decoder(params(), pages=3)
