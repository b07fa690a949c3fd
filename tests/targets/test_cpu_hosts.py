"""Attention, functions and a whole decoder on machines with fewer instructions that this one can stand for."""

from typing import Any

import jax
import numpy as np
import pytest
from cpu_harness import of, run_native, run_reference
from test_cpu_attention import Case, assert_close, build
from test_cpu_matmul import hosts
from test_cpu_step import FUNCTIONS

import llmir_jax as llmir
from llmir_jax.analysis.align import main_function
from llmir_jax.targets.cpu.host import KNOWN_HOSTS, Host, make_host, runs_here
from llmir_jax.targets.cpu.support import reasons

OTHERS = hosts()[1:]
SIZES = {"heads": 6, "kv_heads": 3, "dim": 20, "value_dim": 12, "page_size": 5, "tokens": (2, 1, 1), "padding": 1}
CACHES = {"float32": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"bits": 8}, "int4": {"bits": 4}}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("host", OTHERS, ids=lambda host: host.cpu)
def test_attention(host: Host, cache: str) -> None:
    module, values = build(Case(**SIZES, **CACHES[cache]), seed=int(np.random.default_rng().integers(1 << 30)))
    if reasons(main_function(module), host):
        assert not host.has_half
        pytest.skip("a machine without float16 instructions leaves such a cache to XLA")
    expected, got = run_reference(module, values), run_native(module, values, host=host)
    assert_close(got, expected, 4)


@pytest.mark.parametrize("name", ["softmax", "gelu", "sine", "slices", "integers"])
@pytest.mark.parametrize("host", OTHERS, ids=lambda host: host.cpu)
def test_functions(host: Host, name: str) -> None:
    rng = np.random.default_rng()
    values = [rng.normal(size=(3, 37)).astype(np.float32) for _ in range(2)]
    values.append(rng.integers(-9, 9, (3, 37)).astype(np.int32))
    expected = np.asarray(jax.jit(FUNCTIONS[name])(*values))
    (got,) = run_native(of(FUNCTIONS[name], *values), values, host=host)
    np.testing.assert_allclose(got, expected, rtol=3e-6, atol=3e-6 * max(1, np.abs(expected).max()))


WIDTH = 32


def forward(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens]
    q, k, v = (x @ params[name] for name in "qkv")
    scores = jax.numpy.where(jax.numpy.tri(tokens.shape[1], dtype=bool), q @ k.swapaxes(1, 2) / WIDTH**0.5, -1e9)
    return (x + jax.nn.softmax(scores, -1) @ v) @ params["embed"].T


@pytest.mark.parametrize("quantize", [None, "int4-g32-min", "w8a8"])
@pytest.mark.parametrize("name", [name for name in ("avx2", "x86") if runs_here(KNOWN_HOSTS[name])])
def test_decoder(name: str, quantize: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its self-check compares it with the forward, and the report names the path."""
    host = KNOWN_HOSTS[name]
    for module in ("host", "native", "support"):
        monkeypatch.setattr(f"llmir_jax.targets.cpu.{module}.this_host", lambda: host)
    rng = np.random.default_rng()
    shapes: dict[str, Any] = {"embed": (97, WIDTH)} | dict.fromkeys("qkv", (WIDTH, WIDTH))
    params = {k: rng.normal(size=shape).astype(np.float32) / shape[0] ** 0.5 for k, shape in shapes.items()}
    decoder = llmir.jit(forward, quantize=quantize).decoder(
        params, target="cpu", num_pages=40, page_size=4, max_seqs=2, max_seq_len=40, buckets=(8,)
    )
    path = {"avx2": "avx2, vectors of 256 bits", "x86": "the generic path, since it lacks AVX2 with FMA and F16C"}
    assert f"served by native code for {host.cpu} ({path[name]}" in str(decoder.report())


def test_what_a_host_has() -> None:
    assert make_host("x86_64-unknown-linux-gnu", "core2", "+ssse3").dot == "generic"
    assert make_host("x86_64-pc-windows-msvc", "x", "+avx2,+fma,+f16c,+avx512f,+avx512bw").dot == "avx2"
    assert make_host("arm64-apple-macosx14", "apple-m1", "+dotprod").dot == "neon-dotprod"
    assert "lacks the dot products" in str(make_host("aarch64-linux-gnu", "cortex-a53", "+neon"))
