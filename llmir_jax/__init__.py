"""LLMIR for JAX: derive LLM serving from a plain Flax forward."""

from llmir_jax.errors import LlmirError
from llmir_jax.jit import jit
from llmir_jax.load import Loaded, load

__all__ = ["LlmirError", "Loaded", "jit", "load"]
