"""A hand-written decoder for the runtime tests: two layers, grouped queries, RoPE, a full and a sliding-window cache.

`TinyDecoder` is the paged `StepModel`; `reference_logits` is the same model written the textbook way, without a cache.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmir_jax.runtime.batch import Cache, CacheGroup, StepBatch

VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM = 97, 32, 4, 2, 8
WINDOWS = (None, 6)  # of the two layers


def make_params(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    layers = [
        {
            "q": weight(DIM, HEADS * HEAD_DIM),
            "k": weight(DIM, KV_HEADS * HEAD_DIM),
            "v": weight(DIM, KV_HEADS * HEAD_DIM),
            "o": weight(HEADS * HEAD_DIM, DIM),
            "up": weight(DIM, 2 * DIM),
            "down": weight(2 * DIM, DIM),
        }
        for _ in WINDOWS
    ]
    return {
        "embed": jnp.asarray(rng.normal(size=(VOCAB, DIM)), jnp.float32),
        "layers": layers,
        "head": weight(DIM, VOCAB),
    }


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rope(x, positions):  # x [T, heads, HEAD_DIM], positions [T]
    angle = positions[:, None] / 100.0 ** (jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def projections(layer, x, positions):
    h = norm(x)
    q, k, v = ((h @ layer[name]).reshape(x.shape[0], -1, HEAD_DIM) for name in "qkv")
    return rope(q, positions), rope(k, positions), v


def attend(q, k, v, visible):  # q [T, H, D], k and v [T, L, Hkv, D], visible [T, L]
    q = q.reshape(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    scores = jnp.where(visible[:, None, None], jnp.einsum("tkgd,tlkd->tkgl", q, k) / HEAD_DIM**0.5, -1e30)
    return jnp.einsum("tkgl,tlkd->tkgd", jax.nn.softmax(scores, -1), v).reshape(q.shape[0], -1)


def is_visible(q_positions, k_positions, window):
    causal = k_positions <= q_positions
    return causal if window is None else causal & (k_positions > q_positions - window)


def mlp(layer, x):
    return x + jax.nn.silu(norm(x) @ layer["up"]) @ layer["down"]


@jax.jit
def reference_logits(params, tokens):  # [T] -> [T, VOCAB]
    positions = jnp.arange(tokens.shape[0])
    x = params["embed"][tokens]
    for layer, window in zip(params["layers"], WINDOWS, strict=True):
        q, k, v = projections(layer, x, positions)
        k, v = (jnp.broadcast_to(a, (tokens.shape[0], *a.shape)) for a in (k, v))
        x = x + attend(q, k, v, is_visible(positions[:, None], positions, window)) @ layer["o"]
        x = mlp(layer, x)
    return norm(x) @ params["head"]


@dataclass(kw_only=True)
class TinyDecoder:
    """The paged step. Sizes are per test; ``num_pages`` is of the full-attention group and of the window's."""

    page_size: int = 4
    num_pages: tuple[int, int] = (64, 64)
    max_seqs: int = 4
    max_seq_len: int = 64
    buckets: tuple[int, ...] = (4, 16)
    params: dict[str, Any] = field(default_factory=lambda: make_params(0))
    vocab_size: int = VOCAB

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        return tuple(
            CacheGroup(
                num_layers=1,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                dtype=jnp.float32,
                window=window,
                num_pages=num_pages,
                page_size=self.page_size,
            )
            for window, num_pages in zip(WINDOWS, self.num_pages, strict=True)
        )

    @property
    def compiler_options(self) -> dict[str, bool]:
        return {}

    def init_cache(self) -> Cache:
        def pages(group: CacheGroup) -> jax.Array:
            return jnp.zeros((group.num_pages, group.page_size, group.num_kv_heads, group.head_dim), group.dtype)

        return tuple(((pages(group), pages(group)),) for group in self.cache_groups)

    def step(self, params, cache: Cache, batch: StepBatch):
        num_rows = batch.tokens.shape[0]
        is_padding = jnp.arange(num_rows) >= batch.num_tokens
        x = params["embed"][batch.tokens]
        new_cache = []
        for layer, group, ((k_pages, v_pages),), table in zip(
            params["layers"], self.cache_groups, cache, batch.block_tables, strict=True
        ):
            q, k, v = projections(layer, x, batch.positions)
            page = table[batch.seq_ids, batch.positions // group.page_size]
            page = jnp.where(is_padding, group.num_pages, page)
            write = partial(_write, page, batch.positions % group.page_size)
            k_pages, v_pages = write(k_pages, k), write(v_pages, v)
            new_cache.append(((k_pages, v_pages),))
            keys, values = (
                a[table].reshape(self.max_seqs, -1, KV_HEADS, HEAD_DIM)[batch.seq_ids] for a in (k_pages, v_pages)
            )
            k_positions = jnp.arange(keys.shape[1])
            visible = is_visible(batch.positions[:, None], k_positions, group.window)
            visible &= k_positions < batch.seq_lens[batch.seq_ids][:, None]
            x = x + attend(q, keys, values, visible) @ layer["o"]
            x = mlp(layer, x)
        return norm(x[batch.logits_rows]) @ params["head"], tuple(new_cache)


def _write(page, offset, pages, new):
    return pages.at[page, offset].set(new, mode="drop")


def assert_greedy(params, prompt: list[int], token_ids: list[int], *, max_len: int = 64) -> None:
    """Each token is the reference's most likely one, up to ties to rounding."""
    assert token_ids
    tokens = np.zeros(max_len, np.int32)
    tokens[: len(prompt) + len(token_ids)] = prompt + token_ids
    logits = np.asarray(reference_logits(params, tokens))[len(prompt) - 1 :][: len(token_ids)]
    chosen = logits[np.arange(len(token_ids)), token_ids]
    worst = np.max(logits.max(-1) - chosen)
    assert worst < 1e-4, f"a chosen token is {worst} below the most likely one"


class ByteTokenizer:
    """Token i is one byte: the printable characters, and the parts of some longer ones."""

    def __init__(self, alphabet: bytes) -> None:
        assert len(alphabet) <= VOCAB
        self.alphabet = alphabet

    def decode(self, ids: list[int]) -> str:
        return bytes(self.alphabet[i % len(self.alphabet)] for i in ids).decode("utf-8", errors="replace")
