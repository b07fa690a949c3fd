"""LLMIR for JAX: derive LLM serving from a plain Flax forward."""

from llmir_jax.errors import LlmirError

__all__ = ["LlmirError"]
