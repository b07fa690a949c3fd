"""Calibration end to end: what observers see, what it does to weights and activations, what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacked_model import HEAD_DIM, HEADS, LAYERS, VOCAB, WIDTH, forward, make_params

import llmir_jax as llmir
from llmir_jax.calibrate import Calibrator
from llmir_jax.decoder import Decoder
from llmir_jax.errors import LlmirError
from llmir_jax.quantization import Calibration, InputStatistics, Plan, QuantizedArray, parse_scheme
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.trace import Traced, flatten_model, flatten_params, trace
from llmir_jax.weights import ModelWeights

WINDOW = 16  # tokens
OPTIONS: dict[str, Any] = {"max_seqs": 2, "page_size": 4, "num_pages": 20, "max_seq_len": 40, "buckets": (8,)}


def texts(seed: int, *lengths: int, vocab: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [list(map(int, rng.integers(0, vocab, n))) for n in lengths]


def calibrator(params: Any, calibration: Calibration) -> Calibrator:
    source = ModelWeights(flatten_model(params)[1].paths, flatten_params(params))

    def trace_at(length: int) -> Traced:
        return trace(forward, params, jax.ShapeDtypeStruct((1, length), jnp.int32), fold=False)

    return Calibrator(trace_at, source, calibration, encode=None, max_seq_len=100)


def captured(params: Any, tokens: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """The forward once more, in numpy, with what goes into each weight: (path, layer or place in the stack) → rows."""
    w = jax.tree.map(np.asarray, params)
    seen: dict[tuple[str, int], np.ndarray] = {}
    x = w["embed"][tokens] + w["positions"][: len(tokens)]
    for i in range(LAYERS):
        layer = {name: value[i] for name, value in w["layers"].items()}
        for j in range(3):
            seen["layers.qkv", 3 * i + j] = x
        q, k, v = ((x @ layer["qkv"][j]).reshape(len(tokens), HEADS, HEAD_DIM) for j in range(3))
        scores = np.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, v).reshape(len(tokens), -1)
        seen["layers.out", i] = mixed
        x = x + mixed @ layer["out"].reshape(-1, WIDTH)
        seen["layers.up", i] = x
        hidden = np.tanh(x @ layer["up"] + layer["bias"])
        seen["layers.down", i] = hidden
        x = x + hidden @ layer["down"]
    seen["embed", 0] = x
    return seen


def test_observers() -> None:
    """What compiled observers see of every matrix of a stack, over several windows, is what a plain run shows."""
    params, tokens = make_params(), texts(0, 30, 9)
    scheme = parse_scheme("int8-channel-a8-static")
    one = calibrator(params, Calibration(tokens=tokens, window=WINDOW))
    plan = Plan(schemes=dict.fromkeys(one.weights.uses, scheme))
    assert set(plan.schemes) == {"embed", "layers.qkv", "layers.out", "layers.up", "layers.down"}
    statistics = one.observe(plan).statistics

    windows = Calibration(tokens=tokens, window=WINDOW).windows()
    assert windows.shape == (3, WINDOW)
    expected: dict[tuple[str, int], InputStatistics] = {}
    for window in windows:
        for key, rows in captured(params, window).items():
            own = InputStatistics.of(rows)
            expected[key] = expected[key] + own if key in expected else own
    assert len(statistics) == len(expected)
    for path in plan.schemes:
        offsets = sorted(offset for name, offset in statistics if name == path)
        for place, offset in enumerate(offsets):
            found, wanted = statistics[path, offset], expected[path, place]
            assert found.num_rows == wanted.num_rows == windows.size
            np.testing.assert_allclose(found.absmax, wanted.absmax, rtol=1e-4)
            assert found.gram is not None and wanted.gram is not None
            np.testing.assert_allclose(found.gram, wanted.gram, rtol=1e-3, atol=1e-3 * np.abs(wanted.gram).max())
            assert found.histogram is not None and wanted.histogram is not None
            assert found.histogram.sum() == wanted.histogram.sum()
            # A value at the edge of a bin may be in either.
            assert np.abs(found.histogram - wanted.histogram).sum() <= 4
    # Queries, keys and values share one input, and so one set of statistics.
    assert len({id(statistics["layers.qkv", i * WIDTH * WIDTH]) for i in range(3)}) == 1


def test_tied_weight_read_twice() -> None:
    """Statistics of a weight that is multiplied twice are those of both inputs."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)) / 9, jnp.float32)

    def twice(w: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.tanh(jax.nn.one_hot(tokens, VOCAB) @ w) @ w

    def trace_at(length: int) -> Traced:
        return trace(twice, w, jax.ShapeDtypeStruct((1, length), jnp.int32), fold=False)

    tokens = texts(1, WINDOW)
    one = Calibrator(
        trace_at, ModelWeights(flatten_model(w)[1].paths, [w]), Calibration(tokens=tokens), encode=None, max_seq_len=99
    )
    (path,) = one.weights.uses
    (found,) = one.observe(Plan(schemes={path: parse_scheme("int4-channel")})).statistics.values()
    first = np.asarray(jax.nn.one_hot(jnp.asarray(tokens[0]), VOCAB))
    second = np.tanh(first @ np.asarray(w))
    assert found.num_rows == 2 * WINDOW and found.gram is not None
    np.testing.assert_allclose(found.gram, first.T @ first + second.T @ second, atol=1e-3)


def build(params: Any, quantize: Any, **options: Any) -> Decoder:
    return llmir.jit(forward, quantize=quantize).decoder(params, **OPTIONS | options)


@pytest.mark.parametrize("weights", ["gptq", "mse", "percentile", "min-max"])
def test_decoder(weights: Any) -> None:
    """A decoder with calibrated weights is nearer to the floats than one that is rounded plainly, and says the same."""
    params = make_params()
    calibration = Calibration(tokens=texts(2, 400), weights=weights, percentile=99, damping=0.01, window=32)
    sequence = np.asarray(texts(3, 40)[0])
    exact = np.asarray(forward(params, jnp.asarray(sequence)[None]))[0]
    calibrated = build(params, "int4-g16", calibration=calibration)  # checks itself too
    error = np.square(calibrated.logits([sequence])[0] - exact).mean()
    plain = np.square(build(params, "int4-g16", verify=False).logits([sequence])[0] - exact).mean()
    assert f"calibrated on 416 tokens: 5 weights rounded by {weights}" in calibrated.report().notes
    if weights == "min-max":
        assert error == pytest.approx(plain, rel=1e-3)
    elif weights == "percentile":
        assert error != pytest.approx(plain, rel=1e-3)
    else:
        assert error < (0.75 if weights == "gptq" else 0.95) * plain


def test_static_activations() -> None:
    """Scales from calibration are constants of the step, shared by what has one input; it computes what they say."""
    params = make_params()
    calibration = Calibration(tokens=texts(4, 200), activations="min-max", weights="min-max", window=32)
    decoder = build(params, "int8-channel-a8-g16-static", calibration=calibration)
    text = decoder.ir("llm")
    assert text.count("activation_scales(") == LAYERS * 4 + 1  # queries, keys and values are one matmul
    assert text.count(f"tensor<{WIDTH // 16}xf32>") and "activation_group_size = 16" in text
    sequence = np.asarray(texts(5, 33)[0])
    (static,) = decoder.logits([sequence])
    (dynamic,) = build(params, "int8-channel-a8-g16", verify=False).logits([sequence])
    exact = np.asarray(forward(params, jnp.asarray(sequence)[None]))[0]
    errors = [np.abs(logits - exact).max() / np.abs(exact).max() for logits in (static, dynamic)]
    assert 0 < errors[1] < errors[0] < 0.1
    assert decoder.report().parameters["layers.up"].startswith("int8-channel-f32-a8-g16-static[")
    with pytest.raises(LlmirError, match=r"layers.qkv: .*-static.* has static scales .*come from calibration: give"):
        build(params, "int8-channel-a8-g16-static")


def test_saved(data_path: Path, tmp_path: Path) -> None:
    """Static scales are saved with the weights: the same tokens come from what is loaded again."""
    loaded = llmir.load(data_path / "checkpoints" / "llama")
    calibration = Calibration(tokens=texts(6, 80, vocab=loaded.config.vocab_size), window=20)
    quantized = loaded.quantize(
        {"layers": "int4-g16-min-a8-g8-static", "embed": "int8-channel"}, calibration=calibration
    )
    quantized.save(tmp_path / "ours")
    again = llmir.load(tmp_path / "ours")
    scales = quantized.source.activation_scales
    assert again.source.activation_scales.keys() == scales.keys() == again.source.stored.keys() - {"embed.embedding"}
    for path, own in again.source.activation_scales.items():
        np.testing.assert_array_equal(own, scales[path])
    prompts = texts(7, 5, 9, vocab=loaded.config.vocab_size)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    sizes = {"max_seq_len": 32, "num_pages": 16, "max_seqs": 2}
    first, second, direct = (
        model.decoder(**sizes, **options).generate(prompts, params)
        for model, options in (
            (quantized, {}),
            (again, {}),
            (
                loaded,
                {
                    "quantize": {"layers": "int4-g16-min-a8-g8-static", "embed": "int8-channel"},
                    "calibration": calibration,
                },
            ),
        )
    )
    assert first == second == direct


def test_stored_blocks_stay(data_path: Path, tmp_path: Path) -> None:
    """What is stored in the format that is asked for is not rounded again, whatever the text shows."""
    loaded = llmir.load(data_path / "checkpoints" / "llama").quantize("int4-g16-min")
    calibrated = loaded.quantize("int4-g16-min", calibration=Calibration(tokens=texts(8, 40, vocab=64), window=20))
    for path, scheme in loaded.source.stored.items():
        ours, theirs = (x.source.read_quantized(path, scheme) for x in (calibrated, loaded))
        assert isinstance(ours, QuantizedArray)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("quantize", "calibration", "message"),
    [
        (None, Calibration(tokens=[[1]]), "calibration is for quantized weights: give quantize too"),
        ("int4", Calibration(text="some text"), "has no tokenizer"),
        ("int4", Calibration(tokens=[[1, VOCAB]]), f"token id {VOCAB} is not in the vocabulary of {VOCAB}"),
        ("int4", "some text", "calibration must be an llmir.Calibration, as"),
    ],
)
def test_refused(quantize: Any, calibration: Any, message: str) -> None:
    with pytest.raises(LlmirError, match=message):
        build(make_params(), quantize, calibration=calibration)


def test_mixed_precision() -> None:
    """At the size of uniform int4 the error is less; the widths are those the report names; and it needs text."""
    params = make_params()
    rng = np.random.default_rng(9)
    for name in ("up", "out"):  # of one layer ten times as coarse as of the other: outliers
        outliers = jnp.asarray(rng.random(params["layers"][name].shape) < 0.01)
        big = params["layers"][name] * jnp.where(outliers, 12, 1)
        params["layers"][name] = params["layers"][name].at[1].set(big[1])
    calibration = Calibration(tokens=texts(10, 64), weights="min-max", window=32)
    sequence = np.asarray(texts(11, 40)[0])
    exact = jax.nn.log_softmax(forward(params, jnp.asarray(sequence)[None])[0])

    def divergence(decoder: Decoder) -> float:
        found = jax.nn.log_softmax(decoder.logits([sequence])[0])
        return float(jnp.mean(jnp.sum(jnp.exp(exact) * (exact - found), axis=-1)))

    uniform = build(params, "int4-g16", verify=False)
    candidates = ("int4-g64", "int4-g16", "int8-g64")
    weights = sum(np.prod(x.shape) for x in (params["embed"], *map(params["layers"].get, ("qkv", "out", "up", "down"))))
    option = llmir.MixedPrecision(bits_per_weight=5.0, candidates=candidates)  # 4 bits, and 16 for each group of 16
    mixed = build(params, option, calibration=calibration, verify=False)
    report = mixed.report()
    assert report.parameter_bytes <= uniform.report().parameter_bytes
    assert report.parameter_bytes > uniform.report().parameter_bytes - 0.1 * weights
    assert len({text.split("[")[0] for path, text in report.parameters.items() if path not in report.not_quantized}) > 1
    assert divergence(mixed) < divergence(uniform)
    with pytest.raises(LlmirError, match=r"mixed precision measures .* give calibration="):
        build(params, option)
    with pytest.raises(LlmirError, match="bits_per_weight=3 is less than 4"):
        build(params, llmir.MixedPrecision(bits_per_weight=3), calibration=calibration)
