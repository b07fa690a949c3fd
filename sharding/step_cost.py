"""What a step of a decoder costs, whatever it runs on: parameters, their products, and its cache.

    parameters  bytes that each has in memory and that a step reads of it, once however many tokens it has; of a table
                that rows are gathered from, the row of each token; and multiply-adds
    per token   matrix products of activations with weights, whatever they are quantized to
    per row     those of the rows whose logits are wanted
    per pair    products of a query with a key, and of its weight with the value

`sharding.cost` makes a roofline on a slice of it; `llmir_jax.analysis.cost` counts it on a derived step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ParameterCost:
    """Of one parameter, or of several that are joined in one array."""

    path: str
    shape: tuple[int, ...]
    """As rules of `sharding.rules` take it: the model's own, [inputs, outputs] of a kernel; of a table [rows, size]."""
    nbytes: int
    """In memory, with the scales of quantized ones."""
    nbytes_read: float
    """By a step of one token."""
    multiply_adds_per_token: int = 0
    multiply_adds_per_row: int = 0
    gathered_size: int = 0
    """Elements of the row that a token has gathered of a table; 0 for what is no table."""
    outputs: int = 0
    """Of what a matrix gives for a token, elements; 0 for what is no matrix."""


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """Of the keys and values of layers that are alike."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    value_dim: int
    """Of a head's values, and so of what attention gives."""
    bytes_per_token: float
    """Of all these layers."""
    multiply_adds_per_pair: int
    """Of all these layers and heads."""
    window: int | None = None
    """Tokens that a query sees at most, itself included."""

    def visible(self, context: float) -> float:
        """Of so many tokens, those that a query sees."""
        return min(context, self.window or context)


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of a decoder; see above."""

    parameters: tuple[ParameterCost, ...]
    caches: tuple[CacheCost, ...]
    itemsize: int
    """Bytes of an element of activations."""
    vocab_size: int
    """Logits of a row."""
    other_multiply_adds_per_token: int = 0
    """Of products that no parameter is in."""

    @property
    def weight_bytes(self) -> float:
        """Read by a step of one token."""
        return sum(parameter.nbytes_read for parameter in self.parameters)

    @property
    def multiply_adds_per_token(self) -> int:
        own = sum(parameter.multiply_adds_per_token for parameter in self.parameters)
        return own + self.other_multiply_adds_per_token

    @property
    def multiply_adds_per_row(self) -> int:
        return sum(parameter.multiply_adds_per_row for parameter in self.parameters)

    @property
    def multiply_adds_per_pair(self) -> int:
        return sum(cache.multiply_adds_per_pair for cache in self.caches)

    def cache_bytes(self, context: float) -> float:
        """Keys and values that a token reads after `context` others, less what windows hide."""
        return sum(cache.visible(context) * cache.bytes_per_token for cache in self.caches)

    def prefill_multiply_adds(self, num_tokens: int) -> int:
        """Of a prompt of `num_tokens` with an empty cache and one row of logits, as if there were no windows."""
        pairs = num_tokens * (num_tokens + 1) // 2
        return (
            num_tokens * self.multiply_adds_per_token + self.multiply_adds_per_row + pairs * self.multiply_adds_per_pair
        )

    def with_layers(self, num_layers: int, *, of: int, layer_of: Callable[[str], int | None]) -> "StepCost":
        """That of a model of `num_layers`, of which this one has `of`, where all layers but the last cost the same.

        `layer_of` gives the number of the layer that the parameter of a path is in, None for one that is in none.
        """
        parameters: list[ParameterCost] = []
        for parameter in self.parameters:
            is_repeated = layer_of(parameter.path) == 0
            parameters += [parameter] * (1 + num_layers - of if is_repeated else 1)
        caches = (
            replace(
                cache,
                num_layers=cache.num_layers // of * num_layers,
                bytes_per_token=cache.bytes_per_token / of * num_layers,
                multiply_adds_per_pair=cache.multiply_adds_per_pair // of * num_layers,
            )
            for cache in self.caches
        )
        return replace(self, parameters=tuple(parameters), caches=tuple(caches))
