"""Direct calls with flash attention: a TPU's kernel interpreted against the plain forward, and which are lowered."""

import importlib.util
import re
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
TITLE = "JAX's splash attention, a Pallas kernel, compiled for v5e, interpreted here"


def forward(model: Any, tokens: jax.Array) -> Any:
    return model(tokens)


def model(dtype: Any = jnp.float32) -> Llama:
    return Llama(CONFIG, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


def tokens_of(batch: int, seq_len: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (batch, seq_len)).astype(np.int32)


TOY = toy_lm(0)
"""One layer, 3 heads of 10."""


def toy_tokens(batch: int) -> np.ndarray[Any, Any]:
    return tokens_of(batch, 140) % TOY.vocab_size


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(target_choice, "flash_lowering", lambda target: LowerToFlashPass(interpret=True))
    yield


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equals_the_plain_forward(dtype: Any, tolerance: float) -> None:
    tokens = tokens_of(3, 140)
    expected = np.float32(jax.jit(forward)(model(dtype), tokens))
    got = llmir.jit(forward)(model(dtype), tokens)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float32(got), expected, atol=tolerance * np.abs(expected).max())


def test_stages() -> None:
    lowered = llmir.jit(TOY.forward).lower(TOY.model, toy_tokens(3))
    assert "tensor<140x9x10x" in lowered.as_text("llm")  # 3 sequences are 3 times 3 heads
    assert "llm.attention" not in lowered.as_text("stablehlo")
    expected = jax.jit(TOY.forward)(TOY.model, toy_tokens(3))
    np.testing.assert_allclose(lowered.compile()(TOY.model, toy_tokens(3)), expected, atol=1e-4)


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
    tokens, jitted = toy_tokens(1), llmir.jit(TOY.forward)

    def gradients(call: Any) -> Any:
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(call(params, tokens)))))(TOY.model)

    for got, expected in zip(*map(jax.tree.leaves, (gradients(jitted), gradients(TOY.forward))), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    several = np.stack([tokens, tokens[:, ::-1]])
    got = jax.vmap(lambda tokens: jitted(TOY.model, tokens))(several)
    np.testing.assert_allclose(got[1], jitted(TOY.model, several[1]), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("precision", [None, "highest"])
def test_products_are_as_precise_as_they_are_written(precision: str | None) -> None:
    def attend(p: Any, h: jax.Array) -> jax.Array:
        q, k, v = heads_of(p, h)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision)
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        return merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v))

    built = toy_lm(0, attend)
    tokens = jax.ShapeDtypeStruct((1, 140), jnp.int32)
    lowered = llmir.jit(built.forward).lower(built.model, tokens)
    assert ("precise = true" in lowered.as_text("llm")) == (precision is not None)
    text = lowered.as_text("target")
    # in the interpreted kernel, and nowhere else
    assert ("precision = [HIGHEST, HIGHEST]" in text) == (precision is not None)


def test_what_is_not_shown_to_be_the_same_stays_as_it_was_traced() -> None:
    short = llmir.jit(TOY.forward).lower(TOY.model, toy_tokens(2)[:, : SHORTEST - 1])
    assert short.report().attention == ()
    assert short.report().notes == (
        "attention is compiled by XLA as it is written: sequences of 131 tokens are shorter than 132",
    )

    def pooled(params: Any, tokens: jax.Array) -> jax.Array:
        return TOY.forward(params, tokens).mean(1)

    jitted = llmir.jit(pooled)
    expected = jax.jit(pooled)(TOY.model, toy_tokens(2))
    np.testing.assert_allclose(jitted(TOY.model, toy_tokens(2)), expected, rtol=1e-5, atol=1e-5)
    (note,) = jitted.lower(TOY.model, toy_tokens(2)).report().notes
    assert re.search(r"stablehlo.reduce at test_direct_call.py:\d+ .*reduces over the token axis", note)


def test_batches_that_mix_and_results_of_any_structure() -> None:
    """Sequences of a batch may depend on each other: they are not taken apart."""

    def centred(params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        logits = TOY.forward(params, tokens)
        return {"logits": logits - logits.mean(0, keepdims=True), "best": logits.argmax(-1)}

    jitted = llmir.jit(centred)
    assert jitted.lower(TOY.model, toy_tokens(3)).report().attention
    got, expected = jitted(TOY.model, toy_tokens(3)), jax.jit(centred)(TOY.model, toy_tokens(3))
    np.testing.assert_allclose(got["logits"], expected["logits"], atol=1e-4)
    assert (got["best"] == expected["best"]).mean() > 0.99


def kernels_lowered(chip: str, num_devices: int, dtype: Any) -> dict[str, int]:
    """Calls in the program for so many of these chips, of which there need not be any, by what they call."""
    platform = "tpu" if chip == "v5e" else "cuda"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_choice, "flash_lowering", lambda target: LowerToFlashPass(chip=chip))
        mesh = jax.sharding.AbstractMesh((num_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        tokens = jax.ShapeDtypeStruct((2, 140), jnp.int32, sharding=sharding)
        shapes = nnx.eval_shape(lambda: nnx.state(model(dtype)))
        structure = nnx.graphdef(model(dtype))
        jitted = llmir.jit(lambda state, tokens: nnx.merge(structure, state)(tokens))
        traced = jax.jit(lambda state, tokens: jitted(state, tokens)).trace(shapes, tokens)
        calls = re.findall(r"custom_call @([\w$]+)", traced.lower(lowering_platforms=(platform,)).as_text())
    return {name: calls.count(name) for name in set(calls) & KERNELS}


KERNELS = {"tpu_custom_call", "__cudnn$fmhaSoftmax", "triton_kernel_call_ffi"}


def test_several_devices_get_the_program_as_it_was_traced() -> None:
    assert kernels_lowered("v5e", 1, jnp.bfloat16) == {"tpu_custom_call": 2}
    assert kernels_lowered("v5e", 2, jnp.bfloat16) == {}


def test_gpus_have_cudnn_for_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    # a cuDNN to lower for
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    assert kernels_lowered("h100", 1, jnp.bfloat16) == {"__cudnn$fmhaSoftmax": 2}
    assert kernels_lowered("h100", 2, jnp.bfloat16) == {}


@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs jax-triton and JAX's CUDA plugin, which need no GPU",
)
def test_gpus_have_triton_for_the_rest() -> None:
    assert kernels_lowered("t4", 1, jnp.float32) == {"triton_kernel_call_ffi": 2}


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is not None, reason="jax-triton is installed")
def test_without_triton_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_choice, "flash_lowering", lambda target: LowerToFlashPass(chip="h100"))
    report = str(llmir.jit(forward).lower(model(), tokens_of(1, 140)).report())
    assert "served by XLA, with a matrix of scores: cuDNN's queries are bfloat16 or float16, not float32; " in report
    assert "jax-triton is not installed: pip install 'llmir-jax[gpu]'" in report


def test_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for target, why in ((None, "JAX runs on cpu"), ("tpu", "JAX runs on cpu"), ("reference", "target='reference'")):
        report = llmir.jit(forward, target=target).lower(model(), tokens_of(1, 140)).report()
        assert str(report) == f"note: attention is compiled by XLA as it is written: {why}"
