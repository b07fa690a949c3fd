"""The loop that a JAX user writes by hand: a jitted step over a dense cache of fixed length, donated from call to call.

Weights are random, in the shapes of the model, since speed does not depend on their values.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import protocol


def make_params(shape: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """{"embed" [V, C], "head" [C, V] if it is not tied, "layers": [{name: [in, out]}]}."""
    import jax
    import jax.numpy as jnp

    hidden, ff, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_heads"] * dim, shape["num_kv_heads"] * dim
    keys = iter(jax.random.split(jax.random.key(0), 7 * shape["num_layers"] + 2))

    def matrix(rows: int, columns: int) -> Any:
        return 0.02 * jax.random.normal(next(keys), (rows, columns), dtype)

    sizes = {"q": (hidden, q), "k": (hidden, kv), "v": (hidden, kv), "o": (q, hidden)}
    sizes |= {"gate": (hidden, ff), "up": (hidden, ff), "down": (ff, hidden)}
    norms = {"attn_norm": jnp.ones(hidden, dtype), "mlp_norm": jnp.ones(hidden, dtype)}
    layers = [{name: matrix(*size) for name, size in sizes.items()} | norms for _ in range(shape["num_layers"])]
    params = {"embed": matrix(shape["vocab_size"], hidden), "norm": jnp.ones(hidden, dtype), "layers": layers}
    return params if shape["tie_embeddings"] else params | {"head": matrix(hidden, shape["vocab_size"])}


def make_step(shape: dict[str, Any]) -> Any:
    """step(params, cache, tokens [B, T], position) → (greedy next tokens [B, 1], cache)."""
    import jax
    import jax.numpy as jnp

    heads, kv_heads, dim = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
    frequencies = shape["rope_theta"] ** (-jnp.arange(0, dim, 2) / dim)

    def norm(x: Any, weight: Any) -> Any:
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + shape["rms_norm_eps"])
        return (x * scale).astype(x.dtype) * weight

    def rotate(x: Any, positions: Any) -> Any:  # [B, T, heads, dim]
        angles = (positions[:, None] * frequencies)[:, None]
        low, high = jnp.split(x, 2, -1)
        cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def attend(layer: Any, x: Any, cache: Any, position: Any, positions: Any) -> tuple[Any, Any]:
        batch, length, _ = x.shape
        q = rotate((x @ layer["q"]).reshape(batch, length, heads, dim), positions)
        k = rotate((x @ layer["k"]).reshape(batch, length, kv_heads, dim), positions)
        v = (x @ layer["v"]).reshape(batch, length, kv_heads, dim)
        keys, values = (
            jax.lax.dynamic_update_slice(old, new, (0, position, 0, 0)) for old, new in zip(cache, (k, v), strict=True)
        )
        q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, keys).astype(jnp.float32) * dim**-0.5
        visible = jnp.arange(keys.shape[1]) <= positions[:, None]  # [T, S]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), -1).astype(x.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, values).reshape(batch, length, heads * dim)
        return out @ layer["o"], (keys, values)

    @partial(jax.jit, donate_argnames="cache")
    def step(params: Any, cache: Any, tokens: Any, position: Any) -> tuple[Any, Any]:
        x, positions, new = params["embed"][tokens], position + jnp.arange(tokens.shape[1]), []
        for layer, pair in zip(params["layers"], cache, strict=True):
            attended, pair = attend(layer, norm(x, layer["attn_norm"]), pair, position, positions)
            new.append(pair)
            x = x + attended
            h = norm(x, layer["mlp_norm"])
            x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
        last = norm(x[:, -1:], params["norm"])
        logits = last @ (params["head"] if "head" in params else params["embed"].T)
        return jnp.argmax(logits, -1).astype(jnp.int32), new

    return step


class HandWritten:
    """Waits for each token before the next step, as a program that shows them does."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np

        self._np, self._jnp, self._shape, self._max_len = np, jnp, setup["shape"], setup["max_len"]
        self._dtype = jnp.dtype(setup["format"])
        self._params, self._step = make_params(self._shape, self._dtype), make_step(self._shape)
        self.about = {"version": f"JAX {jax.__version__}, by hand", "format": setup["format"]}
        self._cache: Any = None
        self._position = 0

    def _begin(self, num_seqs: int) -> None:
        shape = (num_seqs, self._max_len, self._shape["num_kv_heads"], self._shape["head_dim"])
        zeros = self._jnp.zeros
        self._cache = [(zeros(shape, self._dtype), zeros(shape, self._dtype)) for _ in range(self._shape["num_layers"])]
        self._position = 0

    def _next(self, tokens: Any) -> Any:
        found, self._cache = self._step(self._params, self._cache, tokens, self._position)
        self._position += tokens.shape[1]
        return self._np.asarray(found)

    def token_times(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        self._begin(1)
        ids = self._np.asarray([prompt], self._np.int32)
        times: list[float] = protocol.timed_loop(lambda: self._next(ids), self._next, num_tokens)
        return times

    def batch(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[int, float]:
        self._begin(len(prompts))
        tokens = self._next(self._np.asarray(prompts, self._np.int32))
        start = time.perf_counter()
        for _ in range(num_tokens):
            tokens = self._next(tokens)
        return len(prompts) * num_tokens, time.perf_counter() - start


if __name__ == "__main__":
    protocol.serve(HandWritten)
