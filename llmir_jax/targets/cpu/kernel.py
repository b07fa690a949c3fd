"""A function in the making whose pointers are to buffers of the plan, added as they are needed.

Equal kernels of different layers have equal text, so that they are one function called with other pointers.
"""

from collections.abc import Sequence

from llmir_jax.targets.cpu.expressions import Buffer
from llmir_jax.targets.cpu.llvm import Function, Module, Value


class Kernel:
    """A function of some numbers, i64, and of pointers to buffers."""

    def __init__(self, module: Module, numbers: Sequence[str]):
        self.f = Function(module, [(name, "i64") for name in numbers])
        self.buffers: list[Buffer] = []

    def number(self, name: str) -> Value:
        """A parameter."""
        return self.f.arguments[name]

    def pointer(self, buffer: Buffer) -> Value:
        """The pointer to a buffer."""
        if buffer not in self.buffers:
            self.buffers.append(buffer)
            self.f.add_parameter(f"b{len(self.buffers) - 1}", "ptr")
        return self.f.arguments[f"b{self.buffers.index(buffer)}"]


__all__ = ["Kernel"]
