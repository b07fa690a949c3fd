"""The door between XLA and native code: a handler of XLA's foreign function interface, as LLVM IR.

XLA calls `handler(XLA_FFI_CallFrame*)` (`xla/ffi/api/c_api.h`). Asked for its metadata it answers with the version of
the interface; else it puts the addresses of the operands' and results' data side by side and lets the team run the
step.
"""

import ctypes
import re
from functools import cache
from pathlib import Path

import jax

from llmir_jax.errors import LlmirError

_METADATA = 1  # XLA_FFI_Extension_Metadata
# Byte offsets in the structs of the header, the same since the interface was published.
_FRAME_EXTENSION, _FRAME_ARGS, _FRAME_RETS = 8, 72, 112
_BUFFER_DATA = 24


@cache
def api_version() -> tuple[int, int]:
    """(major, minor) of the interface that the installed jaxlib speaks."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    found = [re.search(rf"#define XLA_FFI_API_{name} (\d+)", text) for name in ("MAJOR", "MINOR")]
    if None in found:
        raise LlmirError(f"{header}: no version of XLA's foreign function interface; reinstall jaxlib")
    major, minor = (int(match[1]) for match in found if match is not None)
    return major, minor


def handler_ir(num_operands: int, num_results: int) -> str:
    """The public function @handler, which runs @step on the addresses of operands and then results."""
    major, minor = api_version()
    total = num_operands + num_results
    return f"""
declare void @llmir_run(ptr, ptr)
define ptr @handler(ptr %frame) nounwind {{
entry:
  %table = alloca [{max(total, 1)} x ptr], align 64
  %xp = getelementptr i8, ptr %frame, i64 {_FRAME_EXTENSION}
  %extension = load ptr, ptr %xp
  %plain = icmp eq ptr %extension, null
  br i1 %plain, label %execute, label %asked
asked:
  %tp = getelementptr i8, ptr %extension, i64 8
  %type = load i32, ptr %tp
  %metadata = icmp eq i32 %type, {_METADATA}
  br i1 %metadata, label %answer, label %execute
answer:
  %mp = getelementptr i8, ptr %extension, i64 24
  %m = load ptr, ptr %mp
  %major = getelementptr i8, ptr %m, i64 24
  store i32 {major}, ptr %major
  %minor = getelementptr i8, ptr %m, i64 28
  store i32 {minor}, ptr %minor
  %traits = getelementptr i8, ptr %m, i64 32
  store i32 0, ptr %traits
  ret ptr null
execute:
  %ap = getelementptr i8, ptr %frame, i64 {_FRAME_ARGS}
  %args = load ptr, ptr %ap
  %rp = getelementptr i8, ptr %frame, i64 {_FRAME_RETS}
  %rets = load ptr, ptr %rp
  call void @collect(ptr %args, ptr %table, i64 {num_operands})
  %after = getelementptr ptr, ptr %table, i64 {num_operands}
  call void @collect(ptr %rets, ptr %after, i64 {num_results})
  call void @llmir_run(ptr @step, ptr %table)
  ret ptr null
}}
define internal void @collect(ptr %buffers, ptr %table, i64 %n) nounwind {{
entry:
  br label %head
head:
  %i = phi i64 [ 0, %entry ], [ %i1, %body ]
  %more = icmp slt i64 %i, %n
  br i1 %more, label %body, label %out
body:
  %bp = getelementptr ptr, ptr %buffers, i64 %i
  %b = load ptr, ptr %bp
  %dp = getelementptr i8, ptr %b, i64 {_BUFFER_DATA}
  %d = load ptr, ptr %dp
  %tp = getelementptr ptr, ptr %table, i64 %i
  store ptr %d, ptr %tp
  %i1 = add i64 %i, 1
  br label %head
out:
  ret void
}}
"""


def register(name: str, address: int) -> None:
    """Make the handler at an address known to XLA:CPU by a name."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(name, new(address, b"xla._CUSTOM_CALL_TARGET", None), platform="cpu")


__all__ = ["api_version", "handler_ir", "register"]
