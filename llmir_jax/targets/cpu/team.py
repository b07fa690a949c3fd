"""The team of threads that runs a step, and the barriers between its phases.

One team a process: the thread that calls a step is its thread 0, the others are made at first use and run native code
only. A waiting thread spins for a while (a barrier is usually passed within a microsecond), then yields, then sleeps on
a futex, so that nothing is busy between steps. A call that finds the team at work for another decoder does not wait for
it but runs alone, with a team of one: no two calls can wait for each other, whatever threads XLA calls from.

    llmir_run(step, arguments)      step(arguments, barrier, id, n) on every thread; returns when all are done
    barrier(barrier, n)             returns when all n threads have called it

Words of a team and of a barrier, each in a cache line of its own:

    team        0 busy   64 generation   128 sleeping   192 step, arguments, n   256 barrier (of it)
    barrier     0 arrived   64 phase   128 sleeping
"""

import ctypes
import os
import threading

import llvmlite.binding as binding

from llmir_jax.errors import LlmirError
from llmir_jax.targets.cpu.host import Host, this_host
from llmir_jax.targets.cpu.llvm import Compiled
from llmir_jax.threads import THREADS, num_threads

TEAM_BYTES = 512
SPINS = 300
"""Times that a thread looks before it yields: some microseconds, which most waits are shorter than.

Not more: where the system has put two threads of the team on one core, each barrier takes as long.
"""
YIELDS = 1000
"""Times that it yields before it sleeps: about a millisecond on an idle machine, the time between two steps."""

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}


def _pause(host: Host) -> str:
    if host.triple.startswith("x86_64"):
        return "call void @llvm.x86.sse2.pause()"
    if host.triple.startswith(("aarch64", "arm64")):
        return "call void @llvm.aarch64.hint(i32 1)"
    return 'fence syncscope("singlethread") seq_cst'


def _declare_pause(host: Host) -> str:
    if host.triple.startswith("x86_64"):
        return "declare void @llvm.x86.sse2.pause()"
    if host.triple.startswith(("aarch64", "arm64")):
        return "declare void @llvm.aarch64.hint(i32)"
    return ""


def _sleep_and_wake(host: Host) -> str:
    """sleep(word, seen): wait until *word may have changed from `seen`. wake(word): all that sleep on it."""
    if host.is_apple:
        # What libc++ waits with: UL_COMPARE_AND_WAIT is 1, ULF_WAKE_ALL 256.
        return """
declare i32 @__ulock_wait(i32, ptr, i64, i32)
declare i32 @__ulock_wake(i32, ptr, i64)
define internal void @sleep(ptr %word, i32 %seen) nounwind noinline {
  %wide = zext i32 %seen to i64
  %r = call i32 @__ulock_wait(i32 1, ptr %word, i64 %wide, i32 0)
  ret void
}
define internal void @wake(ptr %word) nounwind noinline {
  %r = call i32 @__ulock_wake(i32 257, ptr %word, i64 0)
  ret void
}"""
    number = _SYS_FUTEX.get(host.triple.split("-")[0])
    if not host.is_linux or number is None:
        # Without futexes: look again after a little while.
        return """
declare i32 @usleep(i32)
define internal void @sleep(ptr %word, i32 %seen) nounwind {
  %r = call i32 @usleep(i32 100)
  ret void
}
define internal void @wake(ptr %word) nounwind {
  ret void
}"""
    # FUTEX_WAIT_PRIVATE is 128, FUTEX_WAKE_PRIVATE 129.
    return f"""
declare i64 @syscall(i64, ...)
define internal void @sleep(ptr %word, i32 %seen) nounwind noinline {{
  %r = call i64 (i64, ...) @syscall(i64 {number}, ptr %word, i32 128, i32 %seen, ptr null)
  ret void
}}
define internal void @wake(ptr %word) nounwind noinline {{
  %r = call i64 (i64, ...) @syscall(i64 {number}, ptr %word, i32 129, i32 2147483647)
  ret void
}}"""


def waiting_ir(host: Host) -> str:
    """Functions `await(word, seen, sleeping)`, `change(word, sleeping)` and `barrier(barrier, n)`, as LLVM IR."""
    return f"""
{_declare_pause(host)}
declare i32 @sched_yield()
{_sleep_and_wake(host)}

define internal void @await(ptr %word, i32 %seen, ptr %sleeping) nounwind noinline {{
entry:
  br label %spin
spin:
  %i = phi i32 [ 0, %entry ], [ %i1, %again ]
  %now = load atomic i32, ptr %word acquire, align 4
  %same = icmp eq i32 %now, %seen
  br i1 %same, label %pause, label %out
pause:
  {_pause(host)}
  %i1 = add i32 %i, 1
  %patient = icmp ult i32 %i1, {SPINS}
  br i1 %patient, label %again, label %tired
tired:
  %yields = icmp ult i32 %i1, {SPINS + YIELDS}
  br i1 %yields, label %yield, label %rest
yield:
  %y = call i32 @sched_yield()
  br label %again
rest:
  %s = atomicrmw add ptr %sleeping, i32 1 seq_cst
  call void @sleep(ptr %word, i32 %seen)
  %t = atomicrmw sub ptr %sleeping, i32 1 seq_cst
  br label %again
again:
  br label %spin
out:
  ret void
}}

define internal void @change(ptr %word, ptr %sleeping) nounwind {{
entry:
  %old = atomicrmw add ptr %word, i32 1 seq_cst
  %n = load atomic i32, ptr %sleeping seq_cst, align 4
  %any = icmp ne i32 %n, 0
  br i1 %any, label %wake, label %out
wake:
  call void @wake(ptr %word)
  br label %out
out:
  ret void
}}

define internal void @barrier(ptr %b, i64 %n) nounwind noinline {{
entry:
  %alone = icmp eq i64 %n, 1
  br i1 %alone, label %out, label %arrive
arrive:
  %phase = getelementptr i8, ptr %b, i64 64
  %sleeping = getelementptr i8, ptr %b, i64 128
  %seen = load atomic i32, ptr %phase monotonic, align 4
  %before = atomicrmw add ptr %b, i32 1 acq_rel
  %count = trunc i64 %n to i32
  %mine = add i32 %before, 1
  %last = icmp eq i32 %mine, %count
  br i1 %last, label %open, label %wait
open:
  store atomic i32 0, ptr %b monotonic, align 4
  call void @change(ptr %phase, ptr %sleeping)
  br label %out
wait:
  call void @await(ptr %phase, i32 %seen, ptr %sleeping)
  br label %out
out:
  ret void
}}
"""


def team_ir(host: Host, address: int) -> str:
    """The module of `llmir_run` and of the other threads' main function, for a team whose words are at an address."""
    return f"""target triple = "{host.triple}"
{waiting_ir(host)}

define void @llmir_run(ptr %step, ptr %arguments) nounwind {{
entry:
  %team = inttoptr i64 {address} to ptr
  %np = getelementptr i8, ptr %team, i64 208
  %n = load i64, ptr %np
  %alone = icmp eq i64 %n, 1
  br i1 %alone, label %solo, label %try
try:
  %got = cmpxchg ptr %team, i32 0, i32 1 acquire monotonic
  %mine = extractvalue {{ i32, i1 }} %got, 1
  br i1 %mine, label %all, label %solo
solo:
  call void %step(ptr %arguments, ptr null, i64 0, i64 1)
  br label %out
all:
  %sp = getelementptr i8, ptr %team, i64 192
  store ptr %step, ptr %sp
  %ap = getelementptr i8, ptr %team, i64 200
  store ptr %arguments, ptr %ap
  %gp = getelementptr i8, ptr %team, i64 64
  %zp = getelementptr i8, ptr %team, i64 128
  call void @change(ptr %gp, ptr %zp)
  %b = getelementptr i8, ptr %team, i64 256
  call void %step(ptr %arguments, ptr %b, i64 0, i64 %n)
  call void @barrier(ptr %b, i64 %n)
  store atomic i32 0, ptr %team release, align 4
  br label %out
out:
  ret void
}}

define ptr @llmir_worker(ptr %me) nounwind {{                 ; me: the thread's number
entry:
  %team = inttoptr i64 {address} to ptr
  %id = ptrtoint ptr %me to i64
  %np = getelementptr i8, ptr %team, i64 208
  %n = load i64, ptr %np
  %sp = getelementptr i8, ptr %team, i64 192
  %ap = getelementptr i8, ptr %team, i64 200
  %gp = getelementptr i8, ptr %team, i64 64
  %zp = getelementptr i8, ptr %team, i64 128
  %b = getelementptr i8, ptr %team, i64 256
  br label %next
next:
  %seen = phi i32 [ 0, %entry ], [ %seen1, %next ]
  call void @await(ptr %gp, i32 %seen, ptr %zp)
  %seen1 = add i32 %seen, 1
  %step = load ptr, ptr %sp
  %arguments = load ptr, ptr %ap
  call void %step(ptr %arguments, ptr %b, i64 %id, i64 %n)
  call void @barrier(ptr %b, i64 %n)
  br label %next
}}
"""


class Team:
    """The threads. Made once a process; compiled steps call the symbol `llmir_run`."""

    def __init__(self, size: int, host: Host):
        self._memory = ctypes.create_string_buffer(TEAM_BYTES + 64)
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64
        self._code = Compiled(team_ir(host, self.address), host)
        binding.add_symbol("llmir_run", self._code.address("llmir_run"))
        self.size = 1
        self._set_size(1)
        self._start(size)
        os.register_at_fork(after_in_child=lambda: self._set_size(1))  # threads do not survive a fork

    def _set_size(self, size: int) -> None:
        self.size = size
        ctypes.c_int64.from_address(self.address + 208).value = size
        ctypes.c_int32.from_address(self.address).value = 0

    def _start(self, size: int) -> None:
        library = ctypes.CDLL(None)
        create, detach = library.pthread_create, library.pthread_detach
        create.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        detach.argtypes = [ctypes.c_void_p]
        main = self._code.address("llmir_worker")
        self._set_size(size)
        for worker in range(1, size):
            handle = ctypes.c_void_p()
            if create(ctypes.byref(handle), None, main, worker):
                raise LlmirError(f"the system gave {worker} of {size} threads: set {THREADS} lower")
            detach(handle)


_team: Team | None = None
_lock = threading.Lock()


def team() -> Team:
    """The team of this process, of `num_threads()` threads at its first use."""
    global _team
    with _lock:
        if _team is None:
            _team = Team(num_threads(), this_host())
        return _team


__all__ = ["Team", "team", "waiting_ir"]
