"""Whole modules natively against their reference: elementwise regions, reductions, layouts, what follows a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_harness import native_assembly, of, parse, run_native, run_reference, with_matrices

from llmir_jax.analysis.align import main_function
from llmir_jax.targets.cpu.host import KNOWN_HOSTS
from llmir_jax.targets.cpu.support import reasons

FUNCTIONS = {
    "exp": lambda x, y, i: jnp.exp(x * 20),
    "silu": lambda x, y, i: jax.nn.silu(x) * y,
    "gelu": lambda x, y, i: jax.nn.gelu(x * 3, approximate=True) + jax.nn.gelu(y * 3, approximate=False),
    "tanh, log, sqrt": lambda x, y, i: jnp.tanh(x) + jnp.log(jnp.abs(y) + 1e-3) + jnp.sqrt(jnp.abs(x)),
    "sine": lambda x, y, i: jnp.sin(1000 * x) + jnp.cos(i.astype(jnp.float32) * y),
    "powers": lambda x, y, i: jnp.power(jnp.abs(x), y) + x**3 + jax.lax.rsqrt(jnp.abs(y) + 0.1),
    "integers": lambda x, y, i: (i // 3) % 5 + jnp.sign(i) * jnp.abs(i) - jnp.maximum(i, 2),
    "select": lambda x, y, i: jnp.where((x > y) & (i != 3) | (x < -1), x, -y),
    "softmax": lambda x, y, i: jax.nn.softmax(x, -1) * y.sum(0) + y.max(1, keepdims=True),
    "transposed": lambda x, y, i: x.T.reshape(x.shape) * 2 + y,
    "slices": lambda x, y, i: jnp.concatenate([x[:, 3:9], y[:1, :5] + x[:, 1:11:2], x], 1),
    "rows": lambda x, y, i: x[jnp.clip(i[:, 0], 0, 2)] + y,
    "matrices": lambda x, y, i: x @ y.T + jnp.einsum("ab,ab->a", x, y)[:, None],
    "iota": lambda x, y, i: x + jnp.arange(x.shape[1]) * 2.0 + jnp.arange(x.shape[0])[:, None],
    "top_k": lambda x, y, i: jax.lax.top_k(x + y, 5)[0][:, :1] + x * jax.lax.top_k(i, 3)[1][:, 2:] * 1.0,
    "moved": lambda x, y, i: jax.lax.dynamic_slice(x, (i[0, 0], i[0, 1]), (1, 9)).sum() + y,
    "expm1": lambda x, y, i: jnp.expm1(x / 100) + jnp.log1p(jnp.abs(y) / 100) + jax.nn.sigmoid(x),
}


@pytest.mark.parametrize("shape", [(3, 37), (1, 64), (7, 16)], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng()
    values = [rng.normal(size=shape).astype(np.float32) for _ in range(2)]
    values.append(rng.integers(-9, 9, shape).astype(np.int32))
    module = of(FUNCTIONS[name], *values)
    expected = [np.asarray(jax.jit(FUNCTIONS[name])(*values))]
    for a, b in zip(run_native(module, values), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-6, atol=3e-6 * max(1, np.abs(b).max()))


def kind(*shape: int) -> str:
    return f"tensor<{'x'.join(map(str, shape))}xf32>"


def layer(seed: int, rows: int, width: int = 48, heads: int = 4, hidden: int = 40):
    """A norm, a product whose columns are rotated, gated and added again, as float weights."""
    rng = np.random.default_rng(seed)
    dim = width // heads
    x, p, h, q = kind(rows, width), kind(rows, 2 * hidden), kind(rows, hidden), kind(rows, heads, dim)
    g, w, d, r, c = kind(width), kind(2 * hidden, width), kind(width, hidden), kind(width, width), kind(rows, dim // 2)
    text = f"""func.func @main(%w: {w} {{llmir.path = "w"}}, %d: {d} {{llmir.path = "d"}}, %g: {g} {{llmir.path = "g"}},
        %r: {r} {{llmir.path = "r"}}, %b: {g} {{llmir.path = "b"}}, %x: {x} {{llmir.role = "x"}},
        %c: {c} {{llmir.role = "c"}}, %s: {c} {{llmir.role = "s"}}) -> ({x}, {q}) {{
      %n = llm.rms_norm %x, %g {{epsilon = 1.0e-5 : f32}} : ({x}, {g}) -> {x}
      %p = llm.linear %n, %w {{transpose_w = true}} : ({x}, {w}) -> {p}
      %a = stablehlo.slice %p [0:{rows}, 0:{hidden}] : ({p}) -> {h}
      %u = stablehlo.slice %p [0:{rows}, {hidden}:{2 * hidden}] : ({p}) -> {h}
      %l = stablehlo.logistic %a : {h}
      %m = stablehlo.multiply %a, %l : {h}
      %h = stablehlo.multiply %m, %u : {h}
      %o = llm.linear %h, %d {{transpose_w = true}} : ({h}, {d}) -> {x}
      %y = stablehlo.add %x, %o : {x}
      %z = llm.layer_norm %y, %g, %b {{epsilon = 1.0e-5 : f32}} : ({x}, {g}, {g}) -> {x}
      %q = llm.linear %z, %r {{transpose_w = true}} : ({x}, {r}) -> {x}
      %q3 = stablehlo.reshape %q : ({x}) -> {q}
      %t = llm.rope %q3, %c, %s {{rotary_dim = {dim} : i64}} : ({q}, {c}, {c}) -> {q}
      func.return %y, %t : {x}, {q}
    }}"""
    shapes = [(2 * hidden, width), (width, hidden), (width,), (width, width), (width,), (rows, width)]
    shapes += [(rows, dim // 2)] * 2
    return parse(text), [(rng.normal(size=s) / np.sqrt(s[-1])).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("width", [48, 128])
@pytest.mark.parametrize("rows", [1, 6, 50])
def test_layer(rows: int, width: int) -> None:
    module, values = layer(
        int(np.random.default_rng().integers(1 << 30)), rows, width, hidden=40 if width == 48 else 192
    )
    for got, expected in zip(run_native(module, values, repeats=2), run_reference(module, values), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", KNOWN_HOSTS)
def test_layer_compiles_for(name: str) -> None:
    assert native_assembly(layer(0, 3)[0], KNOWN_HOSTS[name])


def test_norm_of_a_norm_that_is_added() -> None:
    """What a norm needs is there before the norm, where its result is stored."""
    x, g = kind(3, 20), kind(20)
    text = f"""func.func @main(%g: {g} {{llmir.path = "g"}}, %x: {x} {{llmir.role = "x"}}) -> ({x}, {x}) {{
      %a = llm.layer_norm %x, %g, %g {{epsilon = 1.0e-5 : f32}} : ({x}, {g}, {g}) -> {x}
      %b = llm.rms_norm %a, %g {{epsilon = 1.0e-5 : f32}} : ({x}, {g}) -> {x}
      %c = stablehlo.add %b, %x : {x}
      %d = stablehlo.multiply %b, %c : {x}
      func.return %c, %d : {x}, {x}
    }}"""
    module, rng = parse(text), np.random.default_rng()
    values = [rng.normal(size=shape).astype(np.float32) for shape in ((20,), (3, 20))]
    for got, expected in zip(run_native(module, values), run_reference(module, values), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_reasons_name_the_operation() -> None:
    module = of(lambda x: jnp.fft.fft(x).real, np.zeros((2, 8), np.float32))
    found = reasons(main_function(with_matrices(module)))
    assert any("fft" in reason for reason in found), found
