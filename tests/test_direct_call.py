"""Direct calls with flash attention: the kernel of TPUs, interpreted on a CPU, against the plain forward."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from zoo.plain import heads_of, merge, toy_lm

import llmir_jax as llmir
from llmir_jax import target_choice
from llmir_jax.direct_call import SHORTEST
from llmir_jax.models.llama import Llama, LlamaConfig
from llmir_jax.transforms.lower_to_flash import LowerToFlashPass

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=512,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    windows=(None, 9),
)
TITLE = "JAX's splash attention, a Pallas kernel, interpreted"


def forward(model: Any, tokens: jax.Array) -> Any:
    return model(tokens)


def model(dtype: Any = jnp.float32) -> Llama:
    return Llama(CONFIG, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


def tokens_of(batch: int, seq_len: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, seq_len)).astype(np.int32)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(target_choice, "flash_lowering", lambda target: LowerToFlashPass(interpret=True))
    yield


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equals_the_plain_forward(dtype: Any, tolerance: float) -> None:
    tokens = tokens_of(3, 140)
    jitted = llmir.jit(forward)
    expected = np.float32(jax.jit(forward)(model(dtype), tokens))
    got = jitted(model(dtype), tokens)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float32(got), expected, atol=tolerance * np.abs(expected).max())
    lowered = jitted.lower(model(dtype), tokens)
    assert "tensor<140x12x16x" in lowered.as_text("llm")  # 3 sequences are 3 times 4 heads
    np.testing.assert_array_equal(np.float32(lowered.compile()(model(dtype), tokens)), np.float32(got))


def test_report_names_what_serves_each_form() -> None:
    report = llmir.jit(forward).lower(model(), tokens_of(3, 140)).report()
    assert [(entry.layers, entry.num_heads, entry.num_kv_heads, entry.window) for entry in report.attention] == [
        (1, 4, 2, None),
        (1, 4, 2, 9),
    ]
    assert {entry.served_by for entry in report.attention} == {TITLE}
    first = f"  1 layers: 4 heads, 2 KV heads of 16, causal, float32; served by {TITLE}"
    assert str(report).splitlines()[:2] == ["attention", first]
    assert "on several, XLA partitions the program as it was traced" in str(report)
    assert report.as_dict()["attention"][1]["window"] == 9


def test_gradients_and_vmap_are_those_of_the_function() -> None:
    tokens = tokens_of(1, 140)
    params = nnx.state(model())
    structure = nnx.graphdef(model())

    def of_params(state: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(structure, state)(tokens)

    jitted = llmir.jit(of_params)

    def loss(call: Any) -> Any:
        return jax.jit(jax.grad(lambda state: jnp.sum(jnp.sin(call(state, tokens)))))(params)

    for got, expected in zip(*map(jax.tree.leaves, (loss(jitted), loss(of_params))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    several = np.stack([tokens, tokens[:, ::-1]])
    got = jax.vmap(lambda tokens: jitted(params, tokens))(several)
    np.testing.assert_allclose(got[1], jitted(params, several[1]), rtol=1e-4, atol=1e-4)


def test_layers_that_the_kernel_does_not_take_are_named() -> None:
    def attend(p: Any, h: jax.Array, layer: int) -> jax.Array:
        at = jnp.arange(h.shape[1])
        distance = (at[None, :] - at[:, None]).astype(jnp.float32)
        q, k, v = heads_of(p, h)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3 + (0.5 * distance if layer == 1 else 0)
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(distance <= 0, scores, -1e9)), v))

    built = toy_lm(0, attend, layers=3, by_layer=True)
    jitted, tokens = llmir.jit(built.forward), tokens_of(2, 140) % built.vocab_size
    report = jitted.lower(built.model, tokens).report()
    assert [(entry.layers, entry.alibi) for entry in report.attention] == [(2, False), (1, True)]
    assert report.attention[1].served_by == "XLA, with a matrix of scores: splash attention has no ALiBi slopes"
    expected = jax.jit(built.forward)(built.model, tokens)
    np.testing.assert_allclose(jitted(built.model, tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_what_is_not_shown_to_be_the_same_stays_as_it_was_traced() -> None:
    short = llmir.jit(forward).lower(model(), tokens_of(2, SHORTEST - 1))
    assert short.report().attention == ()
    assert short.report().notes == (
        "attention is compiled by XLA as it is written: sequences of 131 tokens are shorter than 132",
    )

    def reversing(model: Any, tokens: jax.Array) -> jax.Array:
        return model(tokens)[:, ::-1]

    (note,) = llmir.jit(reversing).lower(model(), tokens_of(2, 140)).report().notes
    assert "stablehlo.reverse at test_direct_call.py" in note

    def pooled(model: Any, tokens: jax.Array) -> jax.Array:
        return model(tokens).mean(1)

    jitted = llmir.jit(pooled)
    expected = jax.jit(pooled)(model(), tokens_of(2, 140))
    np.testing.assert_allclose(jitted(model(), tokens_of(2, 140)), expected, rtol=1e-5, atol=1e-5)
    assert "reduces over the token axis" in str(jitted.lower(model(), tokens_of(2, 140)).report())


def test_batches_that_mix_are_kept() -> None:
    """Sequences of a batch may depend on each other: they are not taken apart."""

    def centred(model: Any, tokens: jax.Array) -> jax.Array:
        logits = model(tokens)
        return logits - logits.mean(0, keepdims=True)

    jitted, tokens = llmir.jit(centred), tokens_of(3, 140)
    assert jitted.lower(model(), tokens).report().attention
    expected = jax.jit(centred)(model(), tokens)
    np.testing.assert_allclose(jitted(model(), tokens), expected, atol=1e-5 * np.abs(expected).max())


def test_results_of_any_structure() -> None:
    def both(model: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        logits = model(tokens)
        return {"logits": logits, "best": logits.argmax(-1)}

    jitted, tokens = llmir.jit(both), tokens_of(2, 140)
    assert jitted.lower(model(), tokens).report().attention
    got, expected = jitted(model(), tokens), jax.jit(both)(model(), tokens)
    np.testing.assert_allclose(got["logits"], expected["logits"], atol=1e-4)
    assert (got["best"] == expected["best"]).mean() > 0.99


def kernels_lowered(num_devices: int) -> int:
    """Kernels in the program for so many TPUs, of which there need not be any."""
    pass_ = LowerToFlashPass(chip="v5e")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_choice, "flash_lowering", lambda target: pass_)
        mesh = jax.sharding.AbstractMesh((num_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        tokens = jax.ShapeDtypeStruct((2, 140), jnp.int32, sharding=sharding)
        shapes = nnx.eval_shape(lambda: nnx.state(model(jnp.bfloat16)))
        structure = nnx.graphdef(model())
        jitted = llmir.jit(lambda state, tokens: nnx.merge(structure, state)(tokens))
        traced = jax.jit(lambda state, tokens: jitted(state, tokens)).trace(shapes, tokens)
        return traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")


def test_several_devices_get_the_program_as_it_was_traced() -> None:
    assert kernels_lowered(1) == 2
    assert kernels_lowered(2) == 0


def test_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for target, why in ((None, "JAX runs on cpu"), ("tpu", "JAX runs on cpu"), ("reference", "target='reference'")):
        report = llmir.jit(forward, target=target).lower(model(), tokens_of(1, 140)).report()
        assert str(report) == f"note: attention is compiled by XLA as it is written: {why}"
