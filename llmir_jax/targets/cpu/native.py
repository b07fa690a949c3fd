"""A step as a native function that XLA can call: planned, compiled, registered.

Its name in XLA is that of its object file, so that what another process compiled can be called by it (`restore`).
"""

from dataclasses import dataclass

from xdsl.dialects.func import FuncOp

from llmir_jax.disk_cache import DiskCache
from llmir_jax.targets.cpu.ffi import handler_ir, register
from llmir_jax.targets.cpu.host import this_host
from llmir_jax.targets.cpu.object_cache import KIND, Linked, object_key, object_of
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


PREFIX = "llmir_cpu_"
_registered: dict[str, int] = {}


def compile_step(main: FuncOp, arrangement: Arrangement, cache: DiskCache | None = None) -> NativeStep:
    """Compile @main, of operations that `support.unsupported_reason` allows, for this machine."""
    host = this_host()
    threads = team()
    planner = Planner(main, arrangement, host, threads.size)
    plan = planner.run()
    num_results = planner.num_results + 1
    text = plan.text + handler_ir(planner.num_operands, num_results)
    name = PREFIX + object_key(text, host)
    if name not in _registered:
        _link(name, object_of(text, host, cache))
    pages = {number: buffer.offset for number, buffer in planner.page_results.items()}
    return NativeStep(target=name, scratch_bytes=plan.scratch_bytes, pages=pages, plan=plan)


def restore(name: str, cache: DiskCache) -> bool:
    """Make native code that was compiled before known to XLA; whether it is still there."""
    if name in _registered:
        return True
    content = cache.read(KIND, name.removeprefix(PREFIX))
    if content is None:
        return False
    team()  # which it calls
    _link(name, content)
    return True


def _link(name: str, content: bytes) -> None:
    _registered[name] = Linked(content, this_host()).address("handler")
    register(name, _registered[name])


__all__ = ["PREFIX", "NativeStep", "compile_step", "restore"]
