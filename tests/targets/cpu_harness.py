"""Runs the @main of a module by its reference, and natively, every buffer beside memory that must not be touched."""

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from xdsl.dialects.builtin import ModuleOp

from llmir_jax.analysis.align import main_function
from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.parser import IRParser
from llmir_jax.interop import call_module, make_context
from llmir_jax.quantization import QuantizedArray
from llmir_jax.targets.cpu.ffi import handler_ir
from llmir_jax.targets.cpu.host import Host, make_host, this_host
from llmir_jax.targets.cpu.llvm import Compiled, assembly
from llmir_jax.targets.cpu.plan import Planner, reasons
from llmir_jax.targets.cpu.team import team
from llmir_jax.targets.cpu.weights import arrange
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

    def release(self) -> None:
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
    assert reasons(main) == []
    planner = Planner(main, arrange(main), host, num_threads)
    return planner.run().text, planner


def run_native(
    module: ModuleOp, values: Sequence[Any], *, host: Host | None = None, repeats: int = 1
) -> list[np.ndarray]:
    """The same by native code. Page arrays that are written are the arguments themselves."""
    module = module.clone()
    main = main_function(module)
    workers = team()
    host = host or this_host()
    arrangement = arrange(main)
    planner = Planner(main, arrangement, host, workers.size)
    plan = planner.run()
    num_results = planner.num_results + 1
    code = Compiled(plan.text + handler_ir(planner.num_operands, num_results) + _RUN, host)
    parameters = {place.argument for place in arrangement.places}
    packed = arrangement.fill(v for i, v in enumerate(values) if i in parameters)
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
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address("run"))
    for _ in range(repeats):
        run(table)
    found = [np.array(results[number].array) for number in sorted(results)]
    for buffer in buffers:
        buffer.release()
    return found


_RUN = """
define void @run(ptr %table) {
  call void @llmir_run(ptr @step, ptr %table)
  ret void
}
"""


def native_assembly(module: ModuleOp, host: Host) -> str:
    """Assembly for a machine that need not be this one."""
    text, _ = compiled_text(module, host, 4)
    return assembly(text, host)


def hosts() -> list[Host]:
    """This machine, and the same with fewer instructions than it has."""
    own = this_host()
    found = {own.dot: own}
    if own.triple.startswith("x86_64"):
        has_avx2 = "+avx2" in own.features and "+f16c" in own.features
        if has_avx2:
            host = make_host(own.triple, "haswell", "+avx2,+fma,+f16c")
            found[host.dot] = host
        host = make_host(own.triple, "x86-64", "+sse2")
        found[host.dot] = host
    return list(found.values())


def with_matrices(module: ModuleOp) -> ModuleOp:
    """The module with float weights as a step has them."""
    MatrixWeightsPass().apply(make_context(), module)
    return module


__all__ = ["Guarded", "hosts", "native_assembly", "parse", "run_native", "run_reference", "with_matrices"]
