"""Floats of 16 bits by every instruction set: rounding to the bit, and whole functions against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_harness import of, run_native
from test_cpu_matmul import hosts

from llmir_jax.targets.cpu.host import Host


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("host", hosts(), ids=lambda host: host.cpu)
def test_rounding(host: Host, dtype: str) -> None:
    """To nearest even, NaN and infinity kept; numbers too small for a normal bfloat16 may become zero."""
    if dtype == "float16" and not host.has_half:
        pytest.skip("a machine without float16 instructions leaves such values to XLA")
    rng = np.random.default_rng()
    x = rng.integers(0, 1 << 32, 4096, np.uint64).astype(np.uint32).view(np.float32)
    x[:64] = rng.normal(size=64)
    x[64:70] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 65504.0]
    x[70:134] = (rng.integers(0x3F80, 0x4000, 64) << 16 | 0x8000).astype(np.uint32).view(np.float32)  # half way
    if dtype == "bfloat16":
        x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    with np.errstate(all="ignore"):
        expected = x.astype(jnp.dtype(dtype)).astype(np.float32)
    (got,) = run_native(of(lambda x: x.astype(dtype), x), [x], host=host)
    (wide,) = run_native(of(lambda x: x.astype(jnp.float32), got), [got], host=host)
    with np.errstate(all="ignore"):
        narrow = got.astype(np.float32)
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(narrow, expected)


FUNCTIONS = {
    "silu": lambda x, y, i: jax.nn.silu(x) * y + jnp.where(i > 2, x, y),
    "softmax": lambda x, y, i: jax.nn.softmax(x.astype(jnp.float32), -1).astype(x.dtype) + y,
    "constants": lambda x, y, i: (
        x * jnp.asarray(np.arange(x.shape[1]) / 8, x.dtype) + jnp.arange(x.shape[1]).astype(x.dtype)
    ),
    "joined": lambda x, y, i: jnp.concatenate([x[:, 3:9].T[:5, :1] * 2, y[:1, :5].T], 1).sum(1, dtype=jnp.float32),
    "rows": lambda x, y, i: x[jnp.clip(i[:, 0], 0, 2)] - y,
    "products": lambda x, y, i: jnp.einsum("ab,cb->ac", x, y, preferred_element_type=jnp.float32),
    "bytes": lambda x, y, i: (
        x * i.astype(jnp.int32).astype(x.dtype) + jnp.asarray(np.arange(-3, 4), jnp.int8)[i].astype(x.dtype)[0, 0]
    ),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, dtype: str) -> None:
    rng = np.random.default_rng()
    values = [rng.normal(size=(7, 37)).astype(jnp.dtype(dtype)) for _ in range(2)]
    values.append(rng.integers(0, 7, (7, 37)).astype(np.int32))
    fn = FUNCTIONS[name]
    expected = np.asarray(jax.jit(fn)(*values)).astype(np.float32)
    (got,) = run_native(of(fn, *values), values)
    # XLA rounds at other places, for it fuses otherwise
    np.testing.assert_allclose(
        got.astype(np.float32), expected, rtol=0, atol=4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    )
