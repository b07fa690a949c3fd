"""Triton kernels on a machine that has no GPU: compiled to machine code, or run in Triton's interpreter.

A `Launch` is what any of the three ways of running needs: `call` puts it into a JAX program (jax-triton), `compile_for`
makes the cubin of a chip with Triton's own compiler, and `Interpreter.run` computes it with NumPy. Kernels are named
``"module:function"``, and their modules import nothing but Triton: its interpreter takes the place of its compiler
when a module is imported with ``TRITON_INTERPRET=1``, so the interpreter is a process of its own.

bfloat16 has no NumPy dtype in Triton's interpreter, which keeps its bits in uint16 and computes in float32. Its
`tl.dot` forgets that (Triton 3.9) and multiplies the bits: a kernel to be interpreted converts to float32 first.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import numpy as np

_TYPE_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int8": "i8",
    "uint8": "u8",
    "int32": "i32",
}
"""Triton's names of the dtypes that kernels here read and write."""
_OPTIONS = {"enable_fp_fusion": True}
"""Multiplications and additions become one instruction; Triton 3.9 warns where this is left open."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel whose parameters are `updated`, `operands`, `outputs`, and then constants by name.

    Args:
        kernel: "module:function". A parameter that is an array or None is None among the constants.
        updated: arrays that the kernel changes in place.
        operands: arrays that it reads.
        outputs: shape and dtype of what it makes.
        constants: its constexpr parameters.
        num_warps: warps of 32 threads a program.
        num_stages: tiles that loops load ahead, from sm80 on.
    """

    kernel: str
    updated: tuple[Any, ...] = ()
    operands: tuple[Any, ...]
    outputs: tuple[Any, ...] = ()
    grid: tuple[int, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for a chip."""

    capability: int
    cubin: bytes
    ptx: str
    shared_bytes: int


def _function(kernel: str) -> Any:
    module, name = kernel.split(":")
    return getattr(importlib.import_module(module), name)


def _type_name(dtype: Any) -> str:
    name = np.dtype(dtype).name
    if name not in _TYPE_NAMES:
        raise ValueError(f"Triton kernels here take arrays of {', '.join(_TYPE_NAMES)}, got {name}")
    return _TYPE_NAMES[name]


def _array_names(function: Any, launch: Launch) -> list[str]:
    """The kernel's parameters that are arrays, in order."""
    return [name for name in function.arg_names if name not in launch.constants]


def call(launch: Launch, *, capability: int) -> tuple[Any, ...]:
    """The launch as part of a JAX program on an NVIDIA GPU: the new arrays of `updated`, then the outputs.

    It is compiled for compute capability 75, 80, …, of the GPU that will run it.

    Raises:
        ImportError: jax-triton is not installed (``pip install llmir-jax[gpu]``).
    """
    import jax

    try:
        import jax_triton
    except ImportError as error:
        raise ImportError(
            f"{launch.kernel}: jax-triton is not installed; pip install 'llmir-jax[gpu]' brings it, on Python 3.12 or "
            "later"
        ) from error

    function = _function(launch.kernel)
    refs = [jax.new_ref(array) for array in launch.updated]
    outputs = jax_triton.triton_call(
        **dict(zip(_array_names(function, launch), (*refs, *launch.operands), strict=False)),  # outputs are left out
        kernel=function,
        out_type=tuple(jax.ShapeDtypeStruct(out.shape, out.dtype) for out in launch.outputs),
        grid=launch.grid,
        name=launch.kernel.split(":")[1],
        compute_capability=capability,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        backend_options=_OPTIONS,
        **launch.constants,
    )
    return (*(jax.freeze(ref) for ref in refs), *outputs)


def compile_for(launch: Launch, capability: int) -> Binary:
    """Machine code for compute capability 75, 80, 90, 100, …; arrays may be ShapeDtypeStructs, of any size."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = _function(launch.kernel)
    arrays = (*launch.updated, *launch.operands, *launch.outputs)
    names = _array_names(function, launch)
    signature = {name: f"*{_type_name(array.dtype)}" for name, array in zip(names, arrays, strict=True)}
    signature |= dict.fromkeys(launch.constants, "constexpr")
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}  # as XLA's buffers are
    source = ASTSource(function, signature, dict(launch.constants), aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Binary(capability, compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


class _HostArray:
    """A NumPy array with what Triton's interpreter asks of a PyTorch tensor. It is used in place, without copies."""

    def __init__(self, array: "np.ndarray[Any, Any]") -> None:
        self.array = array
        self.dtype = _type_name(array.dtype)

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def untyped_storage(self) -> "_HostArray":
        return self

    def cpu(self) -> "_HostArray":
        return self

    def new_empty(self, *_: Any, **__: Any) -> "_HostArray":
        return _HostArray(self.array)

    def set_(self, *_: Any) -> None:
        """Nothing: it is of the same array already."""

    def copy_(self, *_: Any) -> None:
        """Nothing: what is copied back lies there already."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _run(
    launch: Launch, arrays: Sequence["np.ndarray[Any, Any]"], made: Sequence[tuple[Any, Any]]
) -> tuple["np.ndarray[Any, Any]", ...]:
    """In the interpreter's process."""
    import ml_dtypes  # noqa: F401 - gives NumPy the dtype bfloat16

    # what a kernel does not write shows
    outputs = [np.full(shape, -77, np.dtype(dtype)) for shape, dtype in made]
    copies = [np.array(array, order="C") for array in arrays]
    function = _function(launch.kernel)
    hosts = [_HostArray(array) for array in (*copies, *outputs)]
    named = dict(zip(_array_names(function, launch), hosts, strict=True))
    with np.errstate(all="ignore"):  # as on a GPU
        function[launch.grid](**named, **launch.constants)
    return (*copies[: len(launch.updated)], *outputs)


class Interpreter:
    """A process in which Triton interprets kernels. Use it in a `with`: starting takes some seconds, once."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret)

    def run(self, launch: Launch) -> tuple["np.ndarray[Any, Any]", ...]:
        """The new arrays of `updated`, then the outputs; what the kernel does not write of these is -77.

        Raises what the kernel raises.
        """
        arrays = [np.asarray(array) for array in (*launch.updated, *launch.operands)]
        made = [(tuple(out.shape), np.dtype(out.dtype)) for out in launch.outputs]
        light = Launch(
            kernel=launch.kernel,
            updated=(None,) * len(launch.updated),
            operands=(),
            grid=launch.grid,
            constants=dict(launch.constants),
        )
        return self._pool.submit(_run, light, arrays, made).result()

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()


__all__ = ["Binary", "Interpreter", "Launch", "call", "compile_for"]
