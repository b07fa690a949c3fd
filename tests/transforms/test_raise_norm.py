"""raise-norm: every form of norm is raised and computes what it did; near misses are left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array, lax
from raising import check, lowered, ops_of, raised

WIDTH = 12
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2, jnp.float16: 3e-3}


def inputs(seed: int, dtype, *, shape=(1, 7, WIDTH), weight_dtype=None):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(0.5, 2, shape), dtype)
    w, b = (jnp.asarray(rng.normal(1, 0.5, shape[-1]), weight_dtype or dtype) for _ in range(2))
    return x, w, b


def mean(x: Array) -> Array:
    return jnp.mean(x, -1, keepdims=True)


RMS = {
    "mean of a product": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-5) * w,
    "mean of jnp.square": lambda x, w, b: w * (lax.rsqrt(mean(jnp.square(x)) + 1e-3) * x),
    "sum times 1/n": lambda x, w, b: x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) * (1 / WIDTH) + 1e-5) * w,
    "sum over n, not kept": lambda x, w, b: x * lax.rsqrt((x * x).sum(-1) / WIDTH + 1e-5)[..., None] * w,
    "divided by a square root": lambda x, w, b: x / jnp.sqrt(mean(x**2) + 1e-5) * w,
    "times 1 over a square root": lambda x, w, b: x * (1.0 / jnp.sqrt(mean(x**2) + 1e-5)) * w,
    "to the power -1/2": lambda x, w, b: x * jnp.power(mean(lax.square(x)) + 1e-5, -0.5) * w,
    "weights first": lambda x, w, b: (x * w) * lax.rsqrt(mean(x * x) + 1e-5),
    "rsqrt times weights": lambda x, w, b: x * (lax.rsqrt(mean(x * x) + 1e-5) * w),
    "1 + w": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-6) * (1 + w),
    "1 + w, expanded": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-6) * (1 + jnp.expand_dims(w, (0, 1))),
    "in float32, weights after": lambda x, w, b: w * in_float32(x).astype(x.dtype),
    "in float32, weights before": lambda x, w, b: (in_float32(x) * w.astype(jnp.float32)).astype(x.dtype),
    "in float32 and left so": lambda x, w, b: in_float32(x) * w,
    "zero mean": lambda x, w, b: (x - jnp.zeros((*x.shape[:-1], 1), x.dtype)) * (lax.rsqrt(mean(x * x) + 1e-5) * w),
}


def in_float32(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(mean(wide * wide) + 1e-6)


def centred(x: Array) -> Array:
    return x - mean(x)


LAYER = {
    "two passes": lambda x, w, b: centred(x) * lax.rsqrt(mean(centred(x) ** 2) + 1e-5) * w + b,
    "jnp.var": lambda x, w, b: centred(x) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * w + b,
    "one pass": lambda x, w, b: centred(x) * lax.rsqrt(mean(x * x) - mean(x) ** 2 + 1e-5) * w + b,
    "jax.nn.standardize": lambda x, w, b: jax.nn.standardize(x, axis=-1, epsilon=1e-5) * w + b,
    "no bias": lambda x, w, b: centred(x) * (lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * w),
    "bias first": lambda x, w, b: b + w * (centred(x) * lax.rsqrt(jnp.var(x, -1) + 1e-5)[..., None]),
    "1 + w": lambda x, w, b: centred(x) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * (1 + w) + b,
    "in float32": lambda x, w, b: in_wide(x, w, b).astype(x.dtype),
}


def in_wide(x: Array, w: Array, b: Array) -> Array:
    return LAYER["two passes"](*(a.astype(jnp.float32) for a in (x, w, b)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", RMS)
def test_rms_norm(form: str, dtype) -> None:
    expected = ["llm.rms_norm"]
    check(RMS[form], *inputs(1, dtype), passes=["raise-norm"], expected=expected, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", LAYER)
def test_layer_norm(form: str, dtype) -> None:
    expected = ["llm.layer_norm"]
    check(LAYER[form], *inputs(2, dtype), passes=["raise-norm"], expected=expected, tolerance=TOLERANCE[dtype] * 3)


@pytest.mark.parametrize("shape", [(7, WIDTH), (1, 7, 3, WIDTH), (2, 5, 1, WIDTH), (1, 7, 7), (7, 1, 7, 7)], ids=str)
@pytest.mark.parametrize("form", ["mean of a product", "sum over n, not kept"])
def test_shapes(form: str, shape: tuple[int, ...]) -> None:
    """Equal sizes do not confuse the dims; "sum over n" is by 12, so another width is no mean."""
    expected = ["llm.rms_norm"] if form == "mean of a product" or shape[-1] == WIDTH else []
    check(RMS[form], *inputs(3, jnp.float32, shape=shape), passes=["raise-norm"], expected=expected, tolerance=1e-5)


@pytest.mark.parametrize(
    "dtypes", [(jnp.float16, jnp.float16), (jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]
)
def test_mixed_dtypes(dtypes) -> None:
    args = inputs(4, dtypes[0], weight_dtype=dtypes[1])
    coarsest = jnp.bfloat16 if jnp.bfloat16 in dtypes else jnp.float16
    fn = RMS["in float32, weights before"]
    check(fn, *args, passes=["raise-norm"], expected=["llm.rms_norm"], tolerance=TOLERANCE[coarsest])


def test_offset_and_epsilon() -> None:
    module = raised(lowered(RMS["1 + w"], *inputs(5, jnp.float32)), "raise-norm")
    assert "epsilon = 1.000000e-06 : f32" in str(module)
    assert "offset = 1.000000e+00 : f32" in str(module)


def test_two_norms_share_a_statistic() -> None:
    def fn(x, w, b):
        normed = x * lax.rsqrt(mean(x * x) + 1e-5)
        return normed * w, normed * b

    check(fn, *inputs(6, jnp.float32), passes=["raise-norm"], expected=["llm.rms_norm"] * 2, tolerance=1e-5)


FLAX = {
    "nnx.RMSNorm": (lambda **o: nnx.RMSNorm(WIDTH, rngs=nnx.Rngs(0), **o), "llm.rms_norm"),
    "nnx.LayerNorm": (lambda **o: nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0), **o), "llm.layer_norm"),
    "nnx.LayerNorm, two passes": (
        lambda **o: nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0), use_fast_variance=False, **o),
        "llm.layer_norm",
    ),
    "nnx.LayerNorm, no bias": (
        lambda **o: nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0), use_bias=False, **o),
        "llm.layer_norm",
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FLAX)
def test_nnx(name: str, dtype) -> None:
    make, op = FLAX[name]
    graph, state = nnx.split(make(dtype=dtype))
    rng = np.random.default_rng(7)
    state = jax.tree.map(lambda a: jnp.asarray(rng.normal(1, 0.3, a.shape), a.dtype), state)
    x = inputs(7, dtype)[0]
    tolerance = 3 * TOLERANCE[dtype]
    check(lambda x, s: nnx.merge(graph, s)(x), x, state, passes=["raise-norm"], expected=[op], tolerance=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("net", [nn.RMSNorm, nn.LayerNorm], ids=["RMSNorm", "LayerNorm"])
def test_linen(net, dtype) -> None:
    x = inputs(8, dtype)[0]
    module = net(dtype=dtype)
    params = module.init(jax.random.key(0), x)
    op = {"RMSNorm": "llm.rms_norm", "LayerNorm": "llm.layer_norm"}[net.__name__]
    tolerance = 3 * TOLERANCE[dtype]
    check(lambda x, p: module.apply(p, x), x, params, passes=["raise-norm"], expected=[op], tolerance=tolerance)


NEAR_MISSES = {
    "no weights": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-5),
    "no epsilon": lambda x, w, b: x * lax.rsqrt(mean(x * x)) * w,
    "epsilon after the root": lambda x, w, b: x / (jnp.sqrt(mean(x * x)) + 1e-5) * w,
    "negative epsilon": lambda x, w, b: x * lax.rsqrt(mean(x * x) + -1e-5) * w,
    "clipped variance": lambda x, w, b: x * lax.rsqrt(jnp.maximum(mean(x * x), 1e-5)) * w,
    "a sum, no mean": lambda x, w, b: x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-5) * w,
    "a mean of n - 1": lambda x, w, b: x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) / (WIDTH - 1) + 1e-5) * w,
    "a mean over tokens": lambda x, w, b: x * lax.rsqrt(jnp.mean(x * x, 1, keepdims=True) + 1e-5) * w,
    "a mean over all": lambda x, w, b: x * lax.rsqrt(jnp.mean(x * x) + 1e-5) * w,
    "the norm of something else": lambda x, w, b: x * lax.rsqrt(mean((x + 1) ** 2) + 1e-5) * w,
    "a cube": lambda x, w, b: x * lax.rsqrt(mean(jnp.abs(x * x * x)) + 1e-5) * w,
    "maximum, no sum": lambda x, w, b: x * lax.rsqrt(jnp.max(x * x, -1, keepdims=True) / WIDTH + 1e-5) * w,
    "times the root": lambda x, w, b: x * jnp.sqrt(mean(x * x) + 1e-5) * w,
    "squared statistic": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-5) ** 2 * w,
    "weights of tokens": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-5) * w[:7, None],
    "a scale, no weights": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-5) * 2.0,
    "variance of x, x not centred": lambda x, w, b: x * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * w,
    "mean square of x, x centred": lambda x, w, b: centred(x) * lax.rsqrt(mean(x * x) + 1e-5) * w,
    "centred over tokens": lambda x, w, b: (
        (x - x.mean(1, keepdims=True)) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * w
    ),
    "less another mean": lambda x, w, b: (x - mean(x + 1)) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * w,
    "sample variance": lambda x, w, b: centred(x) * lax.rsqrt(jnp.var(x, -1, keepdims=True, ddof=1) + 1e-5) * w,
    "subtracts one": lambda x, w, b: (x - 1) * lax.rsqrt(mean(x * x) + 1e-5) * w,
    "rounded on the way": lambda x, w, b: x * lax.rsqrt(mean(x * x) + 1e-5).astype(jnp.bfloat16).astype(x.dtype) * w,
    "result rounded on the way": lambda x, w, b: (
        (x * lax.rsqrt(mean(x * x) + 1e-5)).astype(jnp.bfloat16).astype(x.dtype) * w
    ),
}


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_near_misses(form: str) -> None:
    check(NEAR_MISSES[form], *inputs(9, jnp.float32), passes=["raise-norm"], expected=[], tolerance=1e-6)


def test_square_shapes() -> None:
    """With as many tokens as features, a mean over the wrong one is still told apart."""
    args = inputs(10, jnp.float32, shape=(7, 7))
    fn = lambda x, w, b: x * lax.rsqrt(jnp.mean(x * x, 0) + 1e-5) * w  # noqa: E731
    assert ops_of(raised(lowered(fn, *args), "raise-norm")) == []
    fn = lambda x, w, b: x * lax.rsqrt(jnp.mean(x * x, 1) + 1e-5) * w  # noqa: E731
    assert ops_of(raised(lowered(fn, *args), "raise-norm")) == []
    fn = lambda x, w, b: x * lax.rsqrt(jnp.mean(x * x, 1)[:, None] + 1e-5) * w[:, None]  # noqa: E731
    assert ops_of(raised(lowered(fn, *args), "raise-norm")) == []
