"""raise-linear and raise-gated-mlp: products with parameters, and gated MLPs made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array, lax
from raising import check, lowered, ops_of, raised

LINEAR = ["raise-linear"]
MLP = ["raise-linear", "raise-gated-mlp"]
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def normal(seed: int, *shapes: tuple[int, ...], dtype=jnp.float32) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes]


X = (1, 7, 12)
LINEARS = {
    "x @ w": (lambda x, w: x @ w, X, (12, 5)),
    "x @ w of two dims": (lambda x, w: x @ w, (7, 12), (12, 5)),
    "x @ w.T": (lambda x, w: x @ w.T, X, (5, 12)),
    "square, transposed": (lambda x, w: x @ w.T, X, (12, 12)),
    "weight first": (lambda x, w: jnp.einsum("nk,btk->nbt", w, x), X, (5, 12)),
    "weight first, moved back": (lambda x, w: jnp.einsum("nk,btk->btn", w, x), X, (5, 12)),
    "into heads": (lambda x, w: jnp.einsum("btk,khd->bthd", x, w), X, (12, 3, 4)),
    "into heads, heads first": (lambda x, w: jnp.einsum("btk,khd->bhtd", x, w), X, (12, 3, 4)),
    "into heads, contracted last": (lambda x, w: jnp.einsum("btk,hdk->bthd", x, w), X, (3, 4, 12)),
    "out of heads": (lambda x, w: jnp.einsum("bthd,hdc->btc", x, w), (1, 7, 3, 4), (3, 4, 10)),
    "out of heads, heads before tokens": (lambda x, w: jnp.einsum("bhtd,hdc->btc", x, w), (1, 3, 7, 4), (3, 4, 10)),
    "out of heads, other order": (lambda x, w: jnp.einsum("btdh,hdc->btc", x, w), (1, 7, 4, 3), (3, 4, 10)),
    "out of heads, contracted last": (lambda x, w: jnp.einsum("bthd,chd->btc", x, w), (1, 7, 3, 4), (10, 3, 4)),
    "kernel stored flat": (lambda x, w: jnp.einsum("btk,khd->bthd", x, w.reshape(12, 3, 4)), X, (12, 12)),
    "one of a stack": (lambda x, w: x @ w[1], X, (3, 12, 5)),
    "part of a kernel": (lambda x, w: x @ w[:, 5:10], X, (12, 15)),
    "to one number": (lambda x, w: x @ w, X, (12,)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", LINEARS)
def test_linear(form: str, dtype) -> None:
    fn, x_shape, w_shape = LINEARS[form]
    x, w = normal(1, x_shape, w_shape, dtype=dtype)
    check(fn, x, w, passes=LINEAR, expected=["llm.linear"], tolerance=TOLERANCE[dtype])


BIASES = {
    "bias": (lambda x, w, b: x @ w + b, (12, 5), (5,)),
    "bias first": (lambda x, w, b: b + x @ w, (12, 5), (5,)),
    "bias of heads": (lambda x, w, b: jnp.einsum("btk,khd->bthd", x, w) + b, (12, 3, 4), (3, 4)),
    "flat bias of heads": (
        lambda x, w, b: jnp.einsum("btk,khd->bthd", x, w) + b.reshape(3, 4),
        (12, 3, 4),
        (12,),
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", BIASES)
def test_bias(form: str, dtype) -> None:
    fn, w_shape, b_shape = BIASES[form]
    x, w, b = normal(2, X, w_shape, b_shape, dtype=dtype)
    module = check(fn, x, w, b, passes=LINEAR, expected=["llm.linear"], tolerance=TOLERANCE[dtype])
    assert "stablehlo.add" not in str(module)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w, b: x @ w + b[0],
        lambda x, w, b: x @ w + b[:7, None],
        lambda x, w, b: x @ w + x[..., :7],
        lambda x, w, b: (x @ w, x @ w + b[:7]),
        lambda x, w, b: jnp.maximum(x @ w, 0) + b[:7],
    ],
)
def test_other_sums_stay(fn) -> None:
    """Only what is a bias of each feature, and reads the product alone, is taken in."""
    module = check(fn, *normal(3, X, (12, 7), (12,)), passes=LINEAR, expected=["llm.linear"], tolerance=1e-5)
    assert "stablehlo.add" in str(module)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_flax_layers(dtype) -> None:
    """A Linear and a LinearGeneral that compute in another dtype than they store."""
    linear = nnx.Linear(12, 12, dtype=dtype, rngs=nnx.Rngs(0))
    general = nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), dtype=dtype, rngs=nnx.Rngs(1))
    graph, state = nnx.split((linear, general))

    def fn(x, state):
        linear, general = nnx.merge(graph, state)
        return general(linear(x).reshape(1, 7, 3, 4))

    (x,) = normal(4, X, dtype=dtype)
    check(fn, x, state, passes=LINEAR, expected=["llm.linear"] * 2, tolerance=TOLERANCE[dtype])


NOT_LINEAR = {
    "contracted between kept dims": (lambda x, w: jnp.einsum("btk,nkh->btnh", x, w), X, (3, 12, 4)),
    "batched": (lambda x, w: jnp.einsum("bhtk,hkn->bhtn", x, w), (1, 3, 7, 12), (3, 12, 5)),
    "activations only": (lambda x, w: jnp.einsum("btk,bsk->bts", x, x) + w[0], X, (1,)),
    "weight is computed": (lambda x, w: x @ jnp.tanh(w), X, (12, 5)),
    "weights only": (lambda x, w: x.sum() + w.T @ w, X, (12, 5)),
    "an outer product": (lambda x, w: jnp.einsum("btk,n->btkn", x, w), X, (5,)),
    "a set precision": (lambda x, w: jnp.matmul(x, w, precision="highest"), X, (12, 5)),
}


@pytest.mark.parametrize("form", NOT_LINEAR)
def test_not_linear(form: str) -> None:
    fn, x_shape, w_shape = NOT_LINEAR[form]
    check(fn, *normal(5, x_shape, w_shape), passes=LINEAR, expected=[], tolerance=1e-6)


def test_kept_dims_out_of_order() -> None:
    """A weight that is transposed so that its kept dims change places is taken as it is."""
    x, w = normal(6, X, (3, 12, 4))
    fn = lambda x, w: jnp.einsum("btk,khd->bthd", x, w.transpose(1, 2, 0))  # noqa: E731
    module = raised(lowered(fn, x, w), *LINEAR)
    assert ops_of(module) == []


# -- gated MLPs --------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": (jax.nn.silu, "silu"),
    "silu as a product": (lambda g: g * jax.nn.sigmoid(g), "silu"),
    "silu as a quotient": (lambda g: g / (1 + jnp.exp(-g)), "silu"),
    "silu by lax.logistic": (lambda g: lax.logistic(g) * g, "silu"),
    "gelu": (lambda g: jax.nn.gelu(g, approximate=False), "gelu"),
    "gelu by erf": (lambda g: 0.5 * g * (1 + jax.scipy.special.erf(g / jnp.sqrt(2.0).astype(g.dtype))), "gelu"),
    "gelu by erf, other order": (lambda g: g * (lax.erf(g * 0.7071067811865476) + 1.0) * 0.5, "gelu"),
    "gelu_tanh": (jax.nn.gelu, "gelu_tanh"),
    "gelu_tanh by hand": (
        lambda g: 0.5 * g * (1 + jnp.tanh(0.7978845608028654 * (g + 0.044715 * g**3))),
        "gelu_tanh",
    ),
    "relu": (jax.nn.relu, "relu"),
    "relu by maximum": (lambda g: jnp.maximum(0, g), "relu"),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", ACTIVATIONS)
def test_gated_mlp(form: str, dtype) -> None:
    act, name = ACTIVATIONS[form]
    args = normal(7, X, (12, 20), (12, 20), (20, 9), dtype=dtype)
    fn = lambda x, gate, up, down: (act(x @ gate) * (x @ up)) @ down  # noqa: E731
    module = check(fn, *args, passes=MLP, expected=["llm.gated_mlp"], tolerance=2 * TOLERANCE[dtype])
    assert f'activation = "{name}"' in str(module)


def test_gated_mlp_layouts() -> None:
    """Weights stored the other way round, up before gate, gate and up in one stack."""
    args = normal(8, X, (2, 20, 12), (9, 20))
    fn = lambda x, pair, down: ((x @ pair[1].T) * jax.nn.silu(x @ pair[0].T)) @ down.T  # noqa: E731
    module = check(fn, *args, passes=MLP, expected=["llm.gated_mlp"], tolerance=1e-5)
    assert "transpose_gate = true, transpose_up = true, transpose_down = true" in str(module)


NOT_GATED = {
    "silu of 1.702 x": (lambda x, g, u, d: ((x @ g) * jax.nn.sigmoid(1.702 * (x @ g)) * (x @ u)) @ d, 3),
    "sigmoid only": (lambda x, g, u, d: (jax.nn.sigmoid(x @ g) * (x @ u)) @ d, 3),
    "tanh": (lambda x, g, u, d: (jnp.tanh(x @ g) * (x @ u)) @ d, 3),
    "relu squared": (lambda x, g, u, d: (jax.nn.relu(x @ g) ** 2 * (x @ u)) @ d, 3),
    "leaky relu": (lambda x, g, u, d: (jnp.maximum(x @ g, 0.1) * (x @ u)) @ d, 3),
    "gelu of other constants": (
        lambda x, g, u, d: (0.5 * (x @ g) * (1 + lax.erf((x @ g) / 1.4)) * (x @ u)) @ d,
        3,
    ),
    "gelu scaled": (lambda x, g, u, d: (0.51 * (x @ g) * (1 + lax.erf((x @ g) / 2**0.5)) * (x @ u)) @ d, 3),
    "tanh of another cube": (
        lambda x, g, u, d: (
            (0.5 * (x @ g) * (1 + jnp.tanh(0.7978845608 * ((x @ g) + 0.0448 * (x @ g) ** 3))) * (x @ u)) @ d
        ),
        3,
    ),
    "no up": (lambda x, g, u, d: jax.nn.silu(x @ g) @ d, 2),
    "another x": (lambda x, g, u, d: (jax.nn.silu(x @ g) * ((x + 1) @ u)) @ d, 3),
    "a bias": (lambda x, g, u, d: (jax.nn.silu(x @ g + g[0]) * (x @ u)) @ d, 3),
    "the gate is read elsewhere": (lambda x, g, u, d: ((jax.nn.silu(x @ g) * (x @ u)) @ d, x @ g), 3),
    "the product is read elsewhere": (lambda x, g, u, d: (jax.nn.silu(x @ g) * (x @ u) @ d, jax.nn.silu(x @ g)), 3),
    "scaled": (lambda x, g, u, d: (2 * jax.nn.silu(x @ g) * (x @ u)) @ d, 3),
}


@pytest.mark.parametrize("divisor", [1.40625, 1.421875])
def test_constants_of_bfloat16(divisor: float) -> None:
    """The neighbours of √2 in bfloat16 are other numbers."""
    args = normal(10, X, (12, 20), (12, 20), (20, 9), dtype=jnp.bfloat16)
    fn = lambda x, g, u, d: (0.5 * (x @ g) * (1 + lax.erf((x @ g) / divisor)) * (x @ u)) @ d  # noqa: E731
    assert ops_of(raised(lowered(fn, *args), *MLP)) == ["llm.linear"] * 3


@pytest.mark.parametrize("form", NOT_GATED)
def test_not_gated(form: str) -> None:
    fn, num_linears = NOT_GATED[form]
    args = normal(9, X, (12, 20), (12, 20), (20, 9))
    check(fn, *args, passes=MLP, expected=["llm.linear"] * num_linears, tolerance=2e-5)
