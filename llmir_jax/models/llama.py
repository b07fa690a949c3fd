"""The Llama family as one textbook Flax module: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3.

What differs between them is in the config: sliding windows (Mistral), biases of the query, key and value projections
(Qwen2), norms of queries and keys (Qwen3), RoPE scaling (Llama 3), tied embeddings (SmolLM2, small Qwens).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from llmir_jax.models.rope import FrequencyFactors, RopeScaling, inverse_frequencies, rotate, rotation_angles


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shapes and variants of a Llama-family model. Lengths are in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...]  # one a layer: how many tokens it looks back, itself included; None: all of them
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if not self.num_heads or not self.num_kv_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads")
        if self.head_dim <= 0 or self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels: a head of {self.head_dim} has none to spare")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        scaling = self.rope_scaling
        if isinstance(scaling, FrequencyFactors) and len(scaling.factors) != self.head_dim // 2:
            raise ValueError(f"{len(scaling.factors)} RoPE factors for {self.head_dim // 2} frequencies")


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(
        self, config: LlamaConfig, window: int | None, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        hidden, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = nnx.Linear(hidden, heads * head_dim, use_bias=config.qkv_bias, **dtypes)
        self.k = nnx.Linear(hidden, kv_heads * head_dim, use_bias=config.qkv_bias, **dtypes)
        self.v = nnx.Linear(hidden, kv_heads * head_dim, use_bias=config.qkv_bias, **dtypes)
        self.o = nnx.Linear(heads * head_dim, hidden, use_bias=config.out_bias, **dtypes)
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(head_dim, epsilon=config.rms_norm_eps, **dtypes)
            self.k_norm = nnx.RMSNorm(head_dim, epsilon=config.rms_norm_eps, **dtypes)
        self.config = config
        self.window = window

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        batch, seq_len, _ = x.shape
        heads, kv_heads, head_dim = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        q = self.q(x).reshape(batch, seq_len, heads, head_dim)
        k = self.k(x).reshape(batch, seq_len, kv_heads, head_dim)
        v = self.v(x).reshape(batch, seq_len, kv_heads, head_dim)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Query head h reads key/value head h // (heads / kv_heads).
        k, v = (jnp.repeat(y, heads // kv_heads, axis=2) for y in (k, v))

        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5
        query, key = jnp.arange(seq_len)[:, None], jnp.arange(seq_len)[None, :]
        visible = key <= query
        if self.window is not None:
            visible &= key > query - self.window
        scores = jnp.where(visible, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.o(mixed.reshape(batch, seq_len, heads * head_dim))  # type: ignore[no-any-return]


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        options = {"use_bias": config.mlp_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
        self.up = nnx.Linear(config.hidden_size, config.intermediate_size, **options)
        self.down = nnx.Linear(config.intermediate_size, config.hidden_size, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and a residual connection."""

    def __init__(
        self, config: LlamaConfig, window: int | None, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attn_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
        self.attn = Attention(config, window, **dtypes)
        self.mlp_norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
        self.mlp = GatedMLP(config, **dtypes)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """tokens int32[B, T] → logits [B, T, vocab_size] in the computation's dtype."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, **dtypes)
        self.layers = nnx.List([Block(config, window, **dtypes) for window in config.windows])
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, **dtypes)
        if not config.tie_embeddings:
            self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, **dtypes)
        self.config = config

    def __call__(self, tokens: jax.Array) -> jax.Array:
        config = self.config
        inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        cos, sin = rotation_angles(jnp.arange(tokens.shape[1]), inv_freq)
        x = self.embed(tokens)  # [B, T, hidden_size]
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        return self.embed.attend(x) if config.tie_embeddings else self.head(x)  # type: ignore[no-any-return]
