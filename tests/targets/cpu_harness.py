"""Runs the @main of a module by its reference, and natively, every buffer beside memory that must not be touched."""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from xdsl.dialects.builtin import ModuleOp, StringAttr

from llmir_jax.analysis.align import main_function
from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.parser import IRParser
from llmir_jax.interop import call_module, lower_to_module, make_context
from llmir_jax.quantization import QuantizedArray
from llmir_jax.targets.cpu.ffi import handler_ir
from llmir_jax.targets.cpu.host import KNOWN_HOSTS, Host, runs_here, this_host
from llmir_jax.targets.cpu.llvm import Compiled, assembly, object_code
from llmir_jax.targets.cpu.plan import Planner
from llmir_jax.targets.cpu.regions import split
from llmir_jax.targets.cpu.support import reasons
from llmir_jax.targets.cpu.team import team
from llmir_jax.targets.cpu.weights import arrange
from llmir_jax.transforms import signature
from llmir_jax.transforms.inline_calls import inline_calls
from llmir_jax.transforms.lower_to_reference import LowerToReferencePass
from llmir_jax.transforms.matrix_weights import MatrixWeightsPass

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """An array whose last byte is the last one before a page that cannot be read or written, and one before it."""

    def __init__(self, content: np.ndarray):
        size = -(-max(content.nbytes, 1) // PAGE) * PAGE
        self._memory = mmap.mmap(-1, size + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = base + PAGE + size - content.nbytes
        self.array = np.frombuffer(self._memory, content.dtype, content.size, PAGE + size - content.nbytes).reshape(
            content.shape
        )
        self.array[...] = content
        for place in (base, base + PAGE + size):
            assert _libc.mprotect(place, PAGE, 0) == 0
        self._unguard = [base, base + PAGE + size]

    def __del__(self) -> None:  # else the memory would be freed as it is
        for place in self._unguard:
            _libc.mprotect(place, PAGE, 3)


def parts_of(kind):
    return kind.parts() if isinstance(kind, llm.CompositeType) else (kind,)


def parse(text: str) -> ModuleOp:
    context = make_context()
    context.load_dialect(llm.LLM)
    module = IRParser(context, text).parse_module()
    module.verify()
    return module


def of(fn, *arrays):
    """A JAX function as a module whose arguments are inputs of a step."""
    module = lower_to_module(jax.jit(fn, keep_unused=True), *arrays)
    inline_calls(module)
    main = main_function(module)
    signature.store(main, [{signature.ROLE: StringAttr(f"input {i}")} for i in range(len(arrays))])
    return module


def run_reference(module: ModuleOp, values: Sequence[Any]) -> list[np.ndarray]:
    """Results of @main, for a value of each of its arguments."""
    lowered = module.clone()
    LowerToReferencePass().apply(make_context(), lowered)
    flat: list[Any] = []
    for value in values:
        parts = value if isinstance(value, tuple) else (value,)
        flat += value.composite_parts() if isinstance(value, QuantizedArray) else parts
    return [np.asarray(x) for x in jax.jit(lambda *arrays: call_module(lowered, *arrays))(*flat)]


def compiled_text(module: ModuleOp, host: Host, num_threads: int) -> tuple[str, Planner]:
    main = main_function(module)
    assert reasons(main, host) == []
    planner = Planner(main, arrange(main, split(main, host)), host, num_threads)
    return planner.run().text, planner


def run_native(
    module: ModuleOp, values: Sequence[Any], *, host: Host | None = None, repeats: int = 1
) -> list[np.ndarray]:
    """The same by native code. Page arrays that are written are the arguments themselves."""
    run = prepared_run(module, values, host=host)
    for _ in range(repeats):
        found = run()
    return found


def prepared_run(
    module: ModuleOp, values: Sequence[Any], *, host: Host | None = None
) -> Callable[[], list[np.ndarray]]:
    """Compiles @main; what comes back runs it on the values, in memory of its own."""
    module = module.clone()
    main = main_function(module)
    workers = team()
    host = host or this_host()
    arrangement = arrange(main, split(main, host))
    planner = Planner(main, arrangement, host, workers.size)
    plan = planner.run()
    num_results = planner.num_results + 1
    code = Compiled(plan.text + handler_ir(planner.num_operands, num_results) + _RUN, host)
    parameters = {place.argument for place in arrangement.places}
    packed, _ = arrangement.fill(v for i, v in enumerate(values) if i in parameters)
    buffers = [Guarded(np.asarray(packed))]
    for i, value in enumerate(values):
        if i not in parameters:
            parts = value if isinstance(value, tuple) else (value,)
            buffers += [Guarded(np.asarray(part)) for part in parts]
    results = {}
    types = [part for value in planner.ops[-1].operands for part in parts_of(value.type)]
    for number, kind in enumerate(types):
        if number in planner.page_results:
            results[number] = buffers[planner.page_results[number].offset]
        else:
            results[number] = Guarded(np.zeros(kind.get_shape(), element_dtype(kind.element_type)))
        buffers.append(results[number])
    scratch = np.random.default_rng().integers(0, 256, max(plan.scratch_bytes, 1), np.uint8)
    buffers.append(Guarded(scratch))
    table = (ctypes.c_void_p * len(buffers))(*[buffer.address for buffer in buffers])
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address("run"))

    def run() -> list[np.ndarray]:
        assert len(buffers) == len(table)  # the table holds their addresses: they stay as long as this does
        call(table)
        return [np.array(results[number].array) for number in sorted(results)]

    return run


_RUN = """
define void @run(ptr %table) {
  call void @llmir_run(ptr @step, ptr %table)
  ret void
}
"""


def native_assembly(module: ModuleOp, host: Host) -> str:
    """Assembly for a machine that need not be this one."""
    text, _ = compiled_text(module, host, 4)
    assert object_code(text, host)
    return assembly(text, host)


def hosts() -> list[Host]:
    """This machine, and those with fewer instructions that it can stand for."""
    own = this_host()
    return [own, *(host for host in KNOWN_HOSTS.values() if runs_here(host) and host.cpu != own.cpu)]


def with_matrices(module: ModuleOp) -> ModuleOp:
    """The module with float weights as a step has them."""
    MatrixWeightsPass().apply(make_context(), module)
    return module


__all__ = [
    "Guarded",
    "hosts",
    "native_assembly",
    "of",
    "parse",
    "prepared_run",
    "run_native",
    "run_reference",
    "with_matrices",
]
