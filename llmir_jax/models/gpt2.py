"""GPT-2 as a textbook Flax module: learned positions, layer norms before each half, a fused query-key-value projection.

Source: https://openai.com/research/better-language-models.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """Shapes of a GPT-2 model. `max_seq_len`, in tokens, is the size of the position table."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_seq_len: int
    layer_norm_eps: float
    activation: str = "gelu_new"  # a key of ACTIVATIONS
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if not self.num_heads or self.hidden_size % self.num_heads:
            raise ValueError(f"{self.hidden_size} channels cannot be split over {self.num_heads} heads")


class Attention(nnx.Module):
    """Causal multi-head attention."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.qkv = nnx.Linear(config.hidden_size, 3 * config.hidden_size, **dtypes)
        self.o = nnx.Linear(config.hidden_size, config.hidden_size, **dtypes)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, seq_len, hidden = x.shape
        head_dim = hidden // self.num_heads
        q, k, v = (y.reshape(batch, seq_len, self.num_heads, head_dim) for y in jnp.split(self.qkv(x), 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5
        causal = jnp.tril(jnp.ones((seq_len, seq_len), bool))
        scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return self.o(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))  # type: ignore[no-any-return]


class MLP(nnx.Module):
    """proj(activation(fc(x)))."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc = nnx.Linear(config.hidden_size, config.intermediate_size, **dtypes)
        self.proj = nnx.Linear(config.intermediate_size, config.hidden_size, **dtypes)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(ACTIVATIONS[self.activation](self.fc(x)))  # type: ignore[no-any-return]


class Block(nnx.Module):
    """Attention and MLP, each behind a norm and a residual connection."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attn_norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **dtypes)
        self.attn = Attention(config, **dtypes)
        self.mlp_norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **dtypes)
        self.mlp = MLP(config, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT2(nnx.Module):
    """tokens int32[B, T], T ≤ max_seq_len → logits [B, T, vocab_size] in the computation's dtype.

    Longer sequences give NaN everywhere: that is what `jnp.take` gives for a row past the end of the position table.
    """

    def __init__(
        self,
        config: GPT2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, **dtypes)
        self.positions = nnx.Embed(config.max_seq_len, config.hidden_size, **dtypes)
        self.layers = nnx.List([Block(config, **dtypes) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, **dtypes)
        if not config.tie_embeddings:
            self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, **dtypes)
        self.config = config

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))  # [B, T, hidden_size]
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.embed.attend(x) if self.config.tie_embeddings else self.head(x)  # type: ignore[no-any-return]
