"""Decoders with quantized weights, activations and caches: what they compute, what they keep, what they refuse."""

import dataclasses
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked_model import HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, WIDTH, forward, make_params
from zoo import DERIVABLE
from zoo.registry import Built, Derivable

import llmir_jax as llmir
from llmir_jax.decoder import Decoder
from llmir_jax.errors import LlmirError, VerificationError
from llmir_jax.quantization import QuantizedArray, parse_scheme, quantize
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.target_choice import TargetChoice

LONGEST = 40  # tokens


def build(params: Any, quantize: Any = None, **options: Any) -> Decoder:
    options = {"max_seqs": 2, "page_size": 4, "num_pages": 20, "max_seq_len": LONGEST, "buckets": (8,)} | options
    options.setdefault("target", "reference")  # the arrays and the programs looked at here are those of XLA
    return llmir.jit(forward, quantize=quantize).decoder(params, **options)


def rounded(params: dict[str, Any], scheme: str) -> dict[str, Any]:
    """The parameters with their matrices quantized as (outputs, inputs), and back."""

    def matrix(x: jax.Array) -> jax.Array:
        return quantize(np.asarray(x), parse_scheme(scheme)).dequantize()

    layers = dict(params["layers"])
    for name in ("up", "down"):
        layers[name] = jnp.stack([matrix(w.T).T for w in layers[name]])
    layers["qkv"] = jnp.stack([jnp.stack([matrix(w.T).T for w in three]) for three in layers["qkv"]])
    layers["out"] = jnp.stack([matrix(w.reshape(-1, WIDTH).T).T.reshape(w.shape) for w in layers["out"]])
    return {**params, "embed": matrix(params["embed"]), "layers": layers}


@pytest.mark.parametrize("scheme", ["int8", "int8-channel", "int8-tensor", "w4a16", "int4-g32-zp", "int4-channel-bf16"])
def test_weights(scheme: str) -> None:
    """The decoder computes what the forward computes of the rounded weights; each matrix has its own argument."""
    params = make_params()
    decoder = build(params, scheme)  # checks itself too
    expected = rounded(params, scheme)
    sequence = np.random.default_rng(1).integers(0, VOCAB, 21)
    (logits,) = decoder.logits([sequence])
    np.testing.assert_allclose(logits, forward(expected, jnp.asarray(sequence)[None])[0], rtol=0, atol=2e-3)

    report = decoder.report()
    name = "int8-channel-f16" if scheme == "int8" else parse_scheme(scheme).name  # groups of 64 of 64
    assert report.parameters["embed"] == f"{name}[{VOCAB}, {WIDTH}]"
    assert report.parameters["layers.up"] == f"{name}[{HIDDEN}, {WIDTH}] x {LAYERS}"
    if scheme != "int8-tensor":  # several in one argument have a scale a row
        assert report.parameters["layers.qkv"] == f"{name}[{WIDTH}, {WIDTH}] x {3 * LAYERS}"
    assert report.parameters["layers.bias"] == f"float32[{LAYERS}, {HIDDEN}]"
    assert report.not_quantized["positions"] == "a table that is not looked up by token"
    assert "layers.bias" in report.not_quantized and "embed" not in report.not_quantized
    assert "not quantized, a table that is not looked up by token: positions" in str(report)
    assert report.parameter_bytes == sum(x.nbytes for x in jax.tree.leaves(decoder._step.params))
    in_floats = sum(x.nbytes for x in jax.tree.leaves(params))
    assert report.parameter_bytes < in_floats * (0.34 if "int8" in scheme else 0.24)


def test_rules() -> None:
    decoder = build(make_params(), {"embed": None, "layers/up": "int4-g32", "layers/.*": "int8-channel"}, verify=False)
    kinds = {path: text.split("[")[0] for path, text in decoder.report().parameters.items()}
    assert kinds == {
        "embed": "float32",
        "positions": "float32",
        "layers.qkv": "int8-channel-f32",
        "layers.out": "int8-channel-f32",
        "layers.up": "int4-g32-f16",
        "layers.bias": "float32",
        "layers.down": "int8-channel-f32",
    }
    assert decoder.report().not_quantized["embed"] == "a rule keeps it"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "int8-channel-a8"])
def test_activations(scheme: str) -> None:
    """Close to the decoder without rounded activations, but not equal to it."""
    sequence = np.random.default_rng(2).integers(0, VOCAB, 21)
    decoder = build(make_params(), scheme)
    same_weights = "int8-g32" if scheme == "w8a8" else "int4" if scheme == "w4a8" else "int8-channel"
    (exact,) = build(make_params(), same_weights, verify=False).logits([sequence])
    (logits,) = decoder.logits([sequence])
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1
    assert "activation_bits = 8" in decoder.ir("llm")


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize(("kv_cache", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
def test_cache_of_floats(kv_cache: str, bits: int, target: str) -> None:
    """Keys and values rounded to another float, in what is kept of them alone."""
    params = make_params()
    decoder = build(params, kv_cache=kv_cache, target=target)
    sequence = np.random.default_rng(2).integers(0, VOCAB, 21)
    (logits,) = decoder.logits([sequence])
    expected = np.asarray(forward(params, jnp.asarray(sequence)[None])[0])
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error <= 8 * 2.0**-bits + 1e-5
    assert kv_cache == "float32" or error >= 2.0**-bits / 50  # it is rounded
    report = decoder.report()
    assert report.attention[0].cache_dtype == kv_cache
    pages = jax.tree.leaves(decoder._step.init_cache())
    assert {str(array.dtype) for array in pages} == {kv_cache}
    assert report.cache_bytes == sum(array.nbytes for array in pages)


@pytest.mark.parametrize(
    ("scheme", "kv_cache", "target", "expected"),
    [
        ("int4", None, "cpu", "float16"),
        ("int4", "float32", "cpu", "float32"),
        ("int4", None, "reference", "float32"),
        ("w4a16", None, "cpu", "float32"),
        ("w4a8", None, "cpu", "float32"),
    ],
)
def test_cache_that_the_target_takes(scheme: str, kv_cache: str | None, target: str, expected: str) -> None:
    """Only where activations are left to it."""
    decoder = build(make_params(), scheme, kv_cache=kv_cache, target=target)
    assert decoder.report().attention[0].cache_dtype == expected


@pytest.mark.parametrize(("kv_cache", "tolerance"), [("int8", 0.03), ("int4", 0.4)])
def test_cache(kv_cache: str, tolerance: float) -> None:
    sequence = np.random.default_rng(3).integers(0, VOCAB, 30)
    params = make_params()
    decoder = build(params, kv_cache=kv_cache)
    expected = np.asarray(forward(params, jnp.asarray(sequence)[None])[0])
    (logits,) = decoder.logits([sequence])
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < tolerance
    # the arrays really have that many bits
    integers, *side = decoder._step.init_cache()[0][0][0]
    bits = int(kv_cache.removeprefix("int"))
    assert integers.nbytes == 20 * 4 * HEADS * HEAD_DIM * bits // 8
    assert [x.nbytes for x in side] == [20 * 4 * HEADS * 2] * (1 if bits == 8 else 2)
    report = decoder.report()
    assert report.cache_bytes == 2 * LAYERS * sum(x.nbytes for x in (integers, *side))
    what = "scale" if bits == 8 else "scale and minimum"
    assert report.attention[0].cache_dtype == f"{kv_cache}, a float16 {what} for each token and head"
    # pages are shared and copied like any others
    prompts = [sequence[:20].tolist(), sequence[:20].tolist()]
    outs = decoder.generate(prompts, SamplingParams(max_tokens=6))
    assert outs[0] == outs[1]
    assert decoder.generate(prompts[:1], SamplingParams(max_tokens=6)) == outs[:1]


@pytest.mark.parametrize("scheme", ["int4", "int4-g32-zp", "int8-tensor", "w4a8"])
def test_layout_for_the_target(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights laid out for a TPU, run here: the same logits, of the same integers."""
    params, sequence = make_params(), np.random.default_rng(8).integers(0, VOCAB, 21)
    in_rows = build(params, scheme, verify=False)
    chosen = TargetChoice.of("reference", platform="cpu", interpret=False, on_mesh=False)
    monkeypatch.setattr(TargetChoice, "of", lambda *_, **__: dataclasses.replace(chosen, layout="tpu"))
    in_columns = build(params, scheme)  # checks itself: parameters are found again in what was merged
    (expected,), (logits,) = in_rows.logits([sequence]), in_columns.logits([sequence])
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error < (1e-5 if "a8" not in scheme else 0.03)  # some activations are rounded the other way
    before, after = in_rows.report(), in_columns.report()
    assert after.parameter_bytes == before.parameter_bytes
    for path, text in before.parameters.items():
        assert after.parameters[path] == (text.replace("[", " in columns[", 1) if text.startswith("int") else text)
    assert "layout=columns" in in_columns.ir("llm") and "layout=" not in in_rows.ir("llm")
    for there, here in zip(in_columns._step.params, in_rows._step.params, strict=True):
        same = there.laid_out("rows") if isinstance(there, QuantizedArray) else there
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(same), jax.tree.leaves(here))


def compiled_step(decoder: Decoder) -> str:
    step = decoder._step
    packing = decoder.engine._runner._step_packings[step.buckets[0]]
    packed, _ = packing.allocate()
    jitted = decoder.engine._runner._steps[step.buckets[0]]
    text: str = jitted.lower(step.params, step.init_cache(), packed).compile().as_text()
    return text


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("scheme", ["int8", "int4", "w8a8"])
def test_no_float_copy_of_a_weight(scheme: str, rows: int) -> None:
    """No value of the compiled program, outside of fusions, has as many floats as a weight, and its shape."""
    params = make_params()
    decoder = build(params, scheme, max_seqs=rows, buckets=(rows,), num_pages=10 * rows, verify=False)
    text = compiled_step(decoder)
    weights = [x for x in decoder._step.params if isinstance(x, QuantizedArray)]
    assert len(weights) == 1 + 4 * LAYERS  # queries, keys and values are one
    shapes = {f"{n},{k}" for x in weights for n, k in (x.shape, x.shape[::-1])}
    shapes |= {f"{n},{k // g},{g}" for x in weights for (n, k), g in ((x.shape, x.group_size),)}
    found = []
    for computation in re.split(r"\n\n", text):
        if re.match(r"\s*%?fused_computation|\s*%?wrapped", computation):
            continue
        for line in computation.splitlines():
            value = re.match(r"\s*(?:ROOT )?\S+ = (?:f32|f16|bf16)\[([\d,]+)\]", line)
            if value and value[1] in shapes:
                found.append(line.strip())
    assert found == []


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kv_cache", ["int8", "int4"])
def test_no_copy_of_the_cache(kv_cache: str, rows: int) -> None:
    decoder = build(
        make_params(), kv_cache=kv_cache, max_seqs=1, buckets=(rows,), num_pages=37, page_size=4, verify=False
    )
    text = compiled_step(decoder)
    arrays = jax.tree.leaves(decoder._step.init_cache())
    shapes = {",".join(map(str, a.shape)) for a in arrays}
    shapes |= {",".join(map(str, (a.shape[0] * a.shape[1], *a.shape[2:]))) for a in arrays}
    copies = [
        line.strip()
        for line in text.splitlines()
        if (found := re.search(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", line)) and found[1] in shapes
    ]
    assert copies == []


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_models_in_half_precision(dtype: Any) -> None:
    decoder = build(make_params(dtype), "int8", kv_cache="int8")
    assert "passed" in decoder.report().self_check


def test_a_parameter_that_is_read_in_two_ways_stays() -> None:
    def both(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        return (x @ params["square"] + x @ params["square"].T + params["square"][0]) @ params["head"]

    rng = np.random.default_rng(5)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in (("embed", (32, 16)), ("square", (16, 16)), ("head", (16, 32)))
    }
    options = {"num_pages": 8, "page_size": 4, "max_seqs": 1, "buckets": (4,), "target": "reference"}
    decoder = llmir.jit(both, quantize="int8").decoder(params, **options)
    report = decoder.report()
    assert report.parameters["square"] == "float32[16, 16]"
    assert "square" in report.not_quantized
    with pytest.raises(LlmirError, match="rule 'square' matches only parameters that cannot be quantized"):
        llmir.jit(both, quantize={"square": "int8"}).decoder(params, num_pages=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "unknown scheme 'int3'"),
        ({"quantize": {"layers/.*": "int8", "lm_head": "int8"}}, "rule 'lm_head' matches no parameter"),
        ({"quantize": {}}, "no rules in it"),
        ({"quantize": {"layers/up": "int4-g48"}}, r"layers\.up: group_size 48 does not divide its 64 inputs"),
        ({"quantize": {"layers/bias": "int8"}}, "matches only parameters that cannot be quantized"),
        ({"kv_cache": "int2"}, "kv_cache must be one of int8, int4, float32, bfloat16, float16, or None, got 'int2'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmirError, match=message):
        build(make_params(), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    params = make_params()
    params["layers"]["up"] = params["layers"]["up"].at[1, 3, 5].set(value)
    with pytest.raises(LlmirError, match=r"layers\.up: (nan|inf) in row 5, column 3 .*cannot be quantized"):
        build(params, "int8")


def test_odd_number_of_inputs() -> None:
    def odd(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return jnp.tanh(params["embed"][tokens]) @ params["head"]

    params = {"embed": jnp.ones((32, 15)), "head": jnp.ones((15, 32))}
    with pytest.raises(LlmirError, match=r"embed: int4 packs two inputs into a byte, .* got 15"):
        llmir.jit(odd, quantize="int4").decoder(params, num_pages=8)
    with pytest.raises(LlmirError, match="kv_cache='int4' packs two numbers into a byte"):
        _odd_heads("int4")
    assert "passed" in _odd_heads("int8").report().self_check


def _odd_heads(kv_cache: str) -> Decoder:
    def attend(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        scores = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), x @ x.swapaxes(1, 2), -jnp.inf)
        return jax.nn.softmax(scores, -1) @ x @ params["embed"].T

    params = {"embed": jnp.asarray(np.random.default_rng(6).normal(size=(32, 5)), jnp.float32)}
    return llmir.jit(attend).decoder(params, num_pages=16, page_size=4, max_seqs=1, kv_cache=kv_cache, buckets=(4,))


# The zoo --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """XLA with most optimisations off: many small programs are compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def zoo_decoder(built: Built, **options: Any) -> Decoder:
    return llmir.jit(built.forward).decoder(
        built.model, num_pages=40, page_size=4, max_seqs=2, max_seq_len=40, buckets=(8,), verify=False, **options
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("entry", DERIVABLE[::4], ids=lambda entry: entry.name)
def test_zoo_in_int8(entry: Derivable) -> None:
    """Every fourth model under "w8a16": the self-check passes, against the forward of the same rounded weights."""
    seed = zlib.crc32(entry.name.encode()) % 10_000
    built = entry.build(seed)
    decoder = zoo_decoder(built, quantize="w8a16")
    assert "int8" in str(decoder.report().parameters.values()), decoder.report().not_quantized
    check = decoder._self_check(seed)
    assert check.error <= check.tolerance


def test_a_choice_that_integers_turn_over_is_an_error_with_advice() -> None:
    """Which experts a token gets is no small difference."""
    entry = next(entry for entry in DERIVABLE if entry.name == "experts_gathered")
    seed = zlib.crc32(entry.name.encode()) % 10_000
    decoder = zoo_decoder(entry.build(seed), quantize="int8")
    with pytest.raises(VerificationError, match=r"differs from the forward.*quantize=\"w8a16\" or"):
        decoder._self_check(seed)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_saved_and_restored(data_path: Path, tmp_path: Path) -> None:
    """A quantized model that is saved and loaded again gives the same tokens; its model of floats is never read."""
    options: dict[str, Any] = {"num_pages": 16, "page_size": 4, "max_seqs": 1, "max_seq_len": 40, "buckets": (8,)}
    loaded = llmir.load(data_path / "checkpoints" / "llama")
    loaded.quantize("int8").save(tmp_path / "int8")
    restored = llmir.load(tmp_path / "int8")
    prompt = np.random.default_rng(7).integers(0, 20, 9).tolist()
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first = loaded.decoder(quantize="int8", **options)
    second = restored.decoder(**options)
    assert first.generate([prompt], params) == second.generate([prompt], params)
    assert first.report().parameters == second.report().parameters
    assert "model" not in vars(loaded) and "model" not in vars(restored)
