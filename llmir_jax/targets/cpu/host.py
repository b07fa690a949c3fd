"""What native code is made for: the machine's instructions."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import llvmlite.binding as binding

Dot = Literal["avx512-vnni", "avx-vnni", "avx2", "neon-dotprod", "generic"]
"""How four products of 8-bit integers are added up: the instruction, or plain arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine as LLVM knows it, and what its kernels use of it."""

    triple: str
    cpu: str
    features: str  # "+avx2,-sse4a…"
    lanes: int  # of 32 bits in a vector
    dot: Dot
    has_fma: bool
    has_half: bool  # conversion between float16 and float32 in one instruction
    has_bf16: bool = False  # conversion to bfloat16 in one instruction

    @property
    def num_registers(self) -> int:
        """Vector registers."""
        return 32 if self.dot in ("avx512-vnni", "neon-dotprod") else 16

    @property
    def has_bf16_dot(self) -> bool:
        """Whether an instruction adds two products of bfloat16 to a float32."""
        return self.has_bf16 and self.dot == "avx512-vnni"

    @property
    def is_linux(self) -> bool:
        """Whether threads wait on futexes."""
        return "linux" in self.triple

    @property
    def is_apple(self) -> bool:
        """Whether threads wait on the kernel's addresses as libc++ does there."""
        return "apple" in self.triple

    def __str__(self) -> str:
        parts = [self.dot, f"vectors of {32 * self.lanes} bits"]
        if self.has_bf16:
            parts.insert(1, "bfloat16 instructions")
        if self.dot == "generic":
            lacking = {"x86_64": "AVX2 with FMA and F16C", "aarch64": "the dot products of Armv8.2"}
            kind = "aarch64" if self.triple.startswith("arm64") else self.triple.split("-")[0]
            parts[0] = f"the generic path{f', since it lacks {lacking[kind]}' if kind in lacking else ''}"
        return f"{self.cpu} ({', '.join(parts)})"


def make_host(triple: str, cpu: str, features: str) -> Host:
    """The host of an LLVM triple, CPU name and feature string."""
    on = {name[1:] for name in features.split(",") if name.startswith("+")}
    if triple.startswith("x86_64"):
        if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"} <= on:
            dot: Dot = "avx512-vnni"
            lanes = 16
        elif {"avx2", "fma", "f16c"} <= on:
            dot, lanes = "avx-vnni" if "avxvnni" in on else "avx2", 8
        else:
            dot, lanes = "generic", 4
        return Host(
            triple=triple,
            cpu=cpu,
            features=features,
            lanes=lanes,
            dot=dot,
            has_fma="fma" in on,
            has_half="f16c" in on,
            has_bf16=dot == "avx512-vnni" and "avx512bf16" in on,
        )
    is_arm = triple.startswith(("aarch64", "arm64"))
    return Host(
        triple=triple,
        cpu=cpu,
        features=features,
        lanes=4,
        dot="neon-dotprod" if is_arm and "dotprod" in on else "generic",
        has_fma=is_arm,
        has_half=is_arm,
        has_bf16=is_arm and "bf16" in on,
    )


@cache
def this_host() -> Host:
    """The machine that this process runs on."""
    return make_host(
        binding.get_process_triple(), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    )


KNOWN_HOSTS = {
    "avx512": make_host(
        "x86_64-unknown-linux-gnu",
        "skylake-avx512",
        "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni",
    ),
    "avx512-bf16": make_host(
        "x86_64-unknown-linux-gnu",
        "cooperlake",
        "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni,+avx512bf16",
    ),
    "avx-vnni": make_host("x86_64-unknown-linux-gnu", "alderlake", "+avx2,+fma,+f16c,+avxvnni"),
    "avx2": make_host("x86_64-unknown-linux-gnu", "haswell", "+avx2,+fma,+f16c"),
    "x86": make_host("x86_64-unknown-linux-gnu", "x86-64", "+sse2"),
    "neon": make_host("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod,+fullfp16"),
    "neon-bf16": make_host("aarch64-unknown-linux-gnu", "neoverse-v1", "+neon,+dotprod,+fullfp16,+bf16"),
    "apple": make_host("arm64-apple-macosx14.0.0", "apple-m1", "+neon,+dotprod,+fullfp16"),
    "arm": make_host("aarch64-unknown-linux-gnu", "generic", "+neon"),
    "riscv": make_host("riscv64-unknown-linux-gnu", "generic-rv64", "+m,+a,+f,+d"),
}
"""Machines that code is made for in tests, by the instructions that it then uses."""


def runs_here(host: Host) -> bool:
    """Whether this machine can run code that is made for another."""
    own = this_host()
    have = set(own.features.split(","))
    return own.triple.split("-")[0] == host.triple.split("-")[0] and set(host.features.split(",")) <= have


__all__ = ["KNOWN_HOSTS", "Dot", "Host", "make_host", "runs_here", "this_host"]
