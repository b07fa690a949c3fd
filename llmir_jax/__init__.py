"""LLMIR for JAX: derive LLM serving from a plain Flax forward."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmir_jax.decoder import Decoder
    from llmir_jax.errors import LlmirError, UnsupportedModelError, VerificationError
    from llmir_jax.jit import jit
    from llmir_jax.load import Loaded, load
    from llmir_jax.quantization import Calibration, MixedPrecision
    from llmir_jax.runtime.outputs import RequestOutput, RequestUpdate
    from llmir_jax.runtime.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Decoder",
    "LlmirError",
    "Loaded",
    "MixedPrecision",
    "RequestOutput",
    "RequestUpdate",
    "SamplingParams",
    "UnsupportedModelError",
    "VerificationError",
    "jit",
    "load",
]

_HOMES = {
    "Calibration": "quantization",
    "Decoder": "decoder",
    "LlmirError": "errors",
    "Loaded": "load",
    "MixedPrecision": "quantization",
    "RequestOutput": "runtime.outputs",
    "RequestUpdate": "runtime.outputs",
    "SamplingParams": "runtime.sampling",
    "UnsupportedModelError": "errors",
    "VerificationError": "errors",
    "jit": "jit",
    "load": "load",
}


class _Package(ModuleType):
    """Imports a public name when it is first used, so that `llmir --help` does not wait for JAX."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the modules `jit` and `load` would put them in the place of the functions of the same names.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
