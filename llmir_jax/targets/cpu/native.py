"""A step as a native function that XLA can call: planned, compiled, registered."""

import hashlib
from dataclasses import dataclass

from xdsl.dialects.func import FuncOp

from llmir_jax.targets.cpu.ffi import handler_ir, register
from llmir_jax.targets.cpu.host import this_host
from llmir_jax.targets.cpu.llvm import Compiled
from llmir_jax.targets.cpu.plan import Planner
from llmir_jax.targets.cpu.schedule import Plan
from llmir_jax.targets.cpu.team import team
from llmir_jax.targets.cpu.weights import Arrangement


@dataclass(frozen=True, kw_only=True)
class NativeStep:
    """A registered native step.

    Its operands are the array of weights and then @main's other arguments; its results those of @main and then
    `scratch_bytes` bytes of memory to work in. The results numbered in `pages` are operands, in place.
    """

    target: str
    scratch_bytes: int
    pages: dict[int, int]
    plan: Plan


_registered: dict[str, int] = {}


def compile_step(main: FuncOp, arrangement: Arrangement) -> NativeStep:
    """Compile @main, of operations that `support.unsupported_reason` allows, for this machine."""
    host = this_host()
    threads = team()
    planner = Planner(main, arrangement, host, threads.size)
    plan = planner.run()
    num_results = planner.num_results + 1
    text = plan.text + handler_ir(planner.num_operands, num_results)
    name = f"llmir_cpu_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name not in _registered:
        _registered[name] = Compiled(text, host).address("handler")
        register(name, _registered[name])
    pages = {number: buffer.offset for number, buffer in planner.page_results.items()}
    return NativeStep(target=name, scratch_bytes=plan.scratch_bytes, pages=pages, plan=plan)


__all__ = ["NativeStep", "compile_step"]
