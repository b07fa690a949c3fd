"""Tells what a model computes without tracing it, where that follows from this package's and Flax's source alone.

The structure of an nnx model (its graph, with every static attribute) is pickled, which names classes and functions by
where they are defined. If all of them are ours, Flax's, JAX's, NumPy's or Python's, and methods of ours are defined
by us too, then the bytes and the versions of these packages say what the model computes. Any other class or function
may be redefined without a sign: such a model has no identity.
"""

import io
import pickle
import sys
from types import BuiltinFunctionType, FunctionType
from typing import Any

from flax import nnx

from llmir_jax.disk_cache import digest

_KNOWN = sys.stdlib_module_names | {"flax", "jax", "jaxlib", "llmir_jax", "ml_dtypes", "numpy"}


class _Unknown(Exception):
    pass


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            _check(obj)
            if obj.__module__.startswith("llmir_jax."):  # a method may have been replaced since
                for member in vars(obj).values():
                    if isinstance(member, FunctionType):
                        _check(member)
        elif isinstance(obj, FunctionType | BuiltinFunctionType):
            _check(obj)
        return NotImplemented


def _check(obj: Any) -> None:
    module = getattr(obj, "__module__", None) or ""
    if module.partition(".")[0] not in _KNOWN:
        raise _Unknown(f"{module}.{getattr(obj, '__qualname__', obj)} is not of a package whose version is known")


def program_identity(model: nnx.Module) -> str | None:
    """A digest of what a model computes, without its arrays' shapes; None where that may change without a sign."""
    out = io.BytesIO()
    try:
        _Pickler(out, protocol=5).dump(nnx.split(model)[0])
    except (_Unknown, pickle.PicklingError, AttributeError, TypeError):
        return None
    return digest(out.getvalue())


__all__ = ["program_identity"]
