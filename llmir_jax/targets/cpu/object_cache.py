"""Native code as object files, which LLVM makes once and later processes only link.

What an object file is of is in its name: the module's text, the host and its features, and the versions in
`disk_cache.environment`. Symbols that it calls (`llmir_run`) are found when it is linked, so that no address of a
process is in it.
"""

import llvmlite.binding as binding

from llmir_jax.disk_cache import DiskCache, digest, environment
from llmir_jax.targets.cpu.host import Host
from llmir_jax.targets.cpu.llvm import machine_for, optimize

KIND = "native"


def object_key(text: str, host: Host) -> str:
    """The name of a module's object file."""
    llvm = ".".join(map(str, binding.llvm_version_info))
    return digest(text, host.triple, host.cpu, host.features, llvm, *environment())


def compile_object(text: str, host: Host) -> bytes:
    """The object file of a module for this machine. Other threads of Python run meanwhile."""
    machine = machine_for(host, jit=True)
    return bytes(machine.emit_object(optimize(text, machine)))


def object_of(text: str, host: Host, cache: DiskCache | None) -> bytes:
    """The object file of a module, from the cache or into it."""
    if cache is None:
        return compile_object(text, host)
    key = object_key(text, host)
    content = cache.read(KIND, key)
    if content is None:
        content = compile_object(text, host)
        cache.write(KIND, key, content)
    return content


_kept: list["Linked"] = []
"""All that was linked, so that it stays."""


class Linked:
    """An object file in this process. It stays until the process ends: threads and XLA hold its addresses."""

    def __init__(self, content: bytes, host: Host):
        empty = binding.parse_assembly(f'target triple = "{host.triple}"')
        self._engine = binding.create_mcjit_compiler(empty, machine_for(host, jit=True))
        self._engine.add_object_file(binding.ObjectFileRef.from_data(content))
        self._engine.finalize_object()
        _kept.append(self)

    def address(self, name: str) -> int:
        """Of a public function."""
        return int(self._engine.get_function_address(name))


__all__ = ["KIND", "Linked", "compile_object", "object_key", "object_of"]
