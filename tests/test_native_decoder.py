"""Decoders whose step is native code: the same logits and tokens as by the reference, and what the report says."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import DERIVABLE

import llmir_jax as llmir
from llmir_jax.decoder import Decoder
from llmir_jax.errors import LlmirError
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.targets.cpu import native
from llmir_jax.targets.cpu.repeated import Repeated, Structure
from llmir_jax.targets.cpu.tokens import TokenRows
from llmir_jax.threads import num_threads

VOCAB, WIDTH, HEADS, HIDDEN = 97, 64, 4, 96


def make_params(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    names = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH // 2), "v": (WIDTH, WIDTH // 2), "o": (WIDTH, WIDTH)}
    names |= {"up": (WIDTH, HIDDEN), "gate": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    layers = [
        {name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32) for name, shape in names.items()}
        for _ in range(2)
    ]
    return {"embed": jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32), "layers": layers}


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def forward(params: dict[str, Any], tokens: jax.Array) -> jax.Array:
    """Llama's shape: grouped queries, a gated MLP, tied embeddings."""
    batch, length = tokens.shape
    x = params["embed"][tokens]
    visible = jnp.tril(jnp.ones((length, length), bool))
    for layer in params["layers"]:
        h = norm(x)
        q, k, v = ((h @ layer[name]).reshape(batch, length, -1, WIDTH // HEADS) for name in "qkv")
        k, v = (jnp.repeat(part, 2, axis=2) for part in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1) @ layer["o"]
        h = norm(x)
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return norm(x) @ params["embed"].T


def build(target: str, seed: int = 0, **options: Any) -> Decoder:
    sizes = {"num_pages": 32, "page_size": 4, "max_seqs": 3, "max_seq_len": 40, "buckets": (1, 8)}
    return llmir.jit(forward).decoder(make_params(seed), target=target, **(sizes | options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize": "w8a16"},
        {"quantize": "int8-g32-a8-g16"},  # groups of two sizes, as "int8" has them on a CPU
        {"quantize": "int4-g32-min"},
        {"quantize": "w4a8"},
        {"quantize": "w8a8", "kv_cache": "int8"},
        {"kv_cache": "int8"},
        {"kv_cache": "int4", "quantize": "w4a16"},
    ],
    ids=str,
)
def test_equals_the_reference(options: dict[str, Any]) -> None:
    seed = int(np.random.default_rng().integers(1 << 20))
    own, reference = build("cpu", seed, **options), build("reference", seed, **options)
    assert own._step.is_native
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, VOCAB, n) for n in (23, 9, 1)]
    # Rounding to 8 bits turns the last bits of a float into whole steps.
    rounds = "kv_cache" in options or "a8" in options.get("quantize", "")
    for a, b in zip(own.logits(sequences), reference.logits(sequences), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=(0.03 if rounds else 1e-5) * np.abs(b).max())
    prompts = [s.tolist() for s in sequences]
    assert [len(out) for out in own.generate(prompts, SamplingParams(max_tokens=6))] == [6, 6, 6]


def test_fewer_pages_than_sequences() -> None:
    """Some wait for the others; the self-check has one sequence, in the only page."""
    decoder = build("cpu", 0, num_pages=1, page_size=16, max_seqs=2)
    prompts = [[1, 2, 3], [4, 5]]
    params = SamplingParams(max_tokens=4)
    assert decoder.generate(prompts, params) == [decoder.generate([prompt], params)[0] for prompt in prompts]


def test_xla_has_one_thread_around_native_code_alone() -> None:
    one_thread = {"xla_cpu_multi_thread_eigen": False}
    assert build("cpu", verify=False)._step.compiler_options == one_thread
    assert build("reference", verify=False)._step.compiler_options == {}
    assert zoo_decoder("channel_mixing")._step.compiler_options == {}  # XLA computes parts of it


def test_rows_of_padding_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed of tokens is found, in the function that is compiled, so that padding is not computed."""
    mains = []

    def compile_step(main: Any, *args: Any) -> native.NativeStep:
        mains.append(TokenRows.of(main))
        return original(main, *args)

    original = native.compile_step
    monkeypatch.setattr("llmir_jax.transforms.lower_to_cpu.compile_step", compile_step)
    build("cpu", verify=False)._step.module(8)
    (rows,) = mains
    assert rows is not None and rows.num_rows == 8
    assert sum(rows.are_rows_of(value) for value in rows.values) > 10


def test_report_says_what_serves() -> None:
    decoder = build("cpu")
    assert "native code for" in str(decoder.report())
    assert "custom_call" in decoder.ir("target")


def zoo_decoder(name: str, **options: Any) -> Decoder:
    entry = next(entry for entry in DERIVABLE if entry.name == name)
    built = entry.build(0)
    sizes = {"num_pages": 40, "page_size": 4, "max_seqs": 2, "max_seq_len": 40, "buckets": (8,)}
    return llmir.jit(built.forward).decoder(built.model, target="cpu", **sizes, **options)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("channel_mixing", "stablehlo.fft"),  # several, of many kinds, in each layer
        ("channel_convolution", "stablehlo.convolution"),  # with a parameter that native code does not read
        ("experts_scanned", "stablehlo.sort"),
    ],
)
def test_split_by_what_has_no_native_code(name: str, operation: str) -> None:
    """The self-check compares such a decoder with the forward."""
    decoder = zoo_decoder(name)
    assert decoder._step.is_native
    assert operation in decoder._step.in_xla
    report = str(decoder.report())
    assert f"{operation}: served by XLA, between calls of native code ({operation} at pointwise.py:" in report
    assert "llm.attend_pages: served by native code for" in report
    assert decoder.ir("target").count("custom_call") > 1


def test_report_says_why_not() -> None:
    """A step whose products, most of them, have no native code runs as a whole in XLA."""

    def of_integers(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens]
        for _ in range(3):
            x = x + (jnp.round(8 * x).astype(jnp.int32) @ params["w"]).astype(jnp.float32) / 64
        return x @ params["head"]

    rng = np.random.default_rng()
    params = {"embed": rng.normal(size=(20, 16)), "head": rng.normal(size=(16, 20))}
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
    arrays["w"] = jnp.asarray(rng.integers(-3, 4, (16, 16)), jnp.int32)
    decoder = llmir.jit(of_integers).decoder(arrays, target="cpu", num_pages=8, max_seqs=2, buckets=(8,))
    assert not decoder._step.is_native
    report = str(decoder.report())
    assert "(not native code: native code exists for only 29 % of its multiply-adds; " in report
    assert "stablehlo.dot_general at test_native_decoder.py:" in report


def test_several_decoders_at_once() -> None:
    """Calls that come together do not wait for each other's threads."""
    decoders = [build("cpu", seed, verify=False) for seed in range(3)]
    expected = [decoder.generate([[1, 2, 3]], SamplingParams(max_tokens=20)) for decoder in decoders]
    found: list[Any] = [None] * len(decoders)

    def run(i: int) -> None:
        found[i] = [decoders[i].generate([[1, 2, 3]], SamplingParams(max_tokens=20)) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(decoders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == [[outs] * 5 for outs in expected]


@pytest.mark.parametrize("value", ["0", "10000", "-1", "two", "1.5"])
def test_thread_counts_that_cannot_be(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMIR_NUM_THREADS", value)
    with pytest.raises(LlmirError, match=r"LLMIR_NUM_THREADS must be a whole number from 1 to 512, got"):
        num_threads()


@pytest.mark.parametrize("options", [{"quantize": "w4a8"}, {"kv_cache": "int8"}], ids=str)
def test_kernels_of_equal_layers_are_those_that_would_be_emitted(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of a step is the same if each layer's kernels are emitted for it."""
    params = make_params(0)
    params["layers"] *= 2
    sizes = {"num_pages": 32, "page_size": 4, "max_seqs": 3, "max_seq_len": 40, "buckets": (1, 8)}
    decoder = llmir.jit(forward).decoder(params, verify=False, **sizes, **options)
    texts: list[str] = []
    key = native.object_key
    monkeypatch.setattr(native, "object_key", lambda text, host: texts.append(text) or key(text, host))
    emitted: list[str] = []
    kernel = Repeated.kernel

    def counted(self: Repeated, what: Any, structure: Structure, emit: Any) -> Any:
        return kernel(self, what, structure, lambda: emitted.append(what[0]) or emit())

    monkeypatch.setattr(Repeated, "kernel", counted)
    decoder._step.module(1), decoder._step.module(8)
    decoder._step._modules.clear()
    num_emitted = len(emitted)
    monkeypatch.setattr(Repeated, "kernel", lambda self, what, structure, emit: emitted.append(what[0]) or emit())
    monkeypatch.setattr(Repeated, "fact", lambda self, what, structure, find: find())
    decoder._step.module(1), decoder._step.module(8)
    assert len(texts) == 4 and texts[:2] == texts[2:]
    assert len(emitted) - num_emitted > 1.5 * num_emitted
