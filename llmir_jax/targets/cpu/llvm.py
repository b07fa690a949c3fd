"""LLVM IR as text: a builder of functions and modules, and their compilation for this machine.

Values know their LLVM type. Whole numbers of Python stand for i64 constants, and arithmetic on them is done here, so
that addresses that are known now cost nothing. A vector type of one lane is the scalar type.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import llvmlite.binding as binding

from llmir_jax.targets.cpu.host import Host


class Value(NamedTuple):
    """An operand: its LLVM type, and how it is written."""

    type: str
    ref: str


Number = Value | int
"""A value, or an i64 that is known now."""

_POINTER = "ptr"


def vector(element: str, lanes: int) -> str:
    """The type of so many lanes; of one lane, the element's own."""
    return element if lanes == 1 else f"<{lanes} x {element}>"


def lanes_of(type_: str) -> int:
    """Lanes of a type, 1 for a scalar."""
    return int(type_[1:].split(" x ")[0]) if type_.startswith("<") else 1


def element_of(type_: str) -> str:
    """The scalar type of a type."""
    return type_[1:-1].split(" x ")[1] if type_.startswith("<") else type_


def _scalar_text(element: str, value: float | int) -> str:
    if element in ("float", "double"):
        number = struct.unpack("f", struct.pack("f", value))[0] if element == "float" else float(value)
        return f"0x{struct.unpack('>Q', struct.pack('>d', number))[0]:016X}"
    if element == "i1":
        return "true" if value else "false"
    return str(int(value))


def constant(element: str, value: float | int, lanes: int = 1) -> Value:
    """A constant, in every lane."""
    text = _scalar_text(element, value)
    if lanes == 1:
        return Value(element, text)
    return Value(vector(element, lanes), "<" + ", ".join([f"{element} {text}"] * lanes) + ">")


def constants(element: str, values: Sequence[float | int]) -> Value:
    """A vector of these constants."""
    parts = ", ".join(f"{element} {_scalar_text(element, value)}" for value in values)
    return Value(vector(element, len(values)), f"<{parts}>")


class Module:
    """The text of a module: declarations, constants and functions, each once."""

    def __init__(self, host: Host):
        self.host = host
        self._declarations: dict[str, str] = {}
        self._globals: dict[bytes, str] = {}
        self._functions: dict[str, str] = {}
        self._names: set[str] = set()

    def declare(self, name: str, result: str, arguments: Sequence[str]) -> None:
        """Declare an external function or an intrinsic."""
        self._declarations[name] = f"declare {result} @{name}({', '.join(arguments)})"

    def data(self, content: bytes) -> Value:
        """A pointer to constant bytes, 64-byte aligned."""
        if content not in self._globals:
            self._globals[content] = f"@data_{len(self._globals)}"
        return Value(_POINTER, self._globals[content])

    def function(self, stem: str, text: str) -> str:
        """The name of a function with this text, which has `{name}` in place of its name; equal ones are one."""
        if text not in self._functions:
            name = stem
            while name in self._names:
                name = f"{stem}_{len(self._names)}"
            self._names.add(name)
            self._functions[text] = name
        return self._functions[text]

    @property
    def text(self) -> str:
        """The whole module."""
        lines = [f'target triple = "{self.host.triple}"']
        for content, name in self._globals.items():
            escaped = "".join(f"\\{byte:02X}" for byte in content)
            lines.append(f'{name} = private constant [{len(content)} x i8] c"{escaped}", align 64')
        lines += self._declarations.values()
        lines += [text.replace("{name}", name) for text, name in self._functions.items()]
        return "\n".join(lines) + "\n"


@dataclass
class Function:
    """A function in the making. Its parameters are `arguments`; emitting methods return the value that they make."""

    module: Module
    parameters: Sequence[tuple[str, str]]
    result: str = "void"
    attributes: str = ""
    is_public: bool = False
    _lines: list[str] = field(default_factory=list)
    _count: int = 0
    _block: str = "entry"
    _allocas: list[str] = field(default_factory=list)

    @cached_property
    def arguments(self) -> dict[str, Value]:
        """Parameters by name."""
        return {name: Value(type_.split(" ")[0], f"%{name}") for name, type_ in self.parameters}

    def add_parameter(self, name: str, type_: str) -> Value:
        """One more parameter."""
        self.parameters = [*self.parameters, (name, type_)]
        self.__dict__.pop("arguments", None)
        return self.arguments[name]

    def finish(self, stem: str) -> str:
        """Close the function and put it into the module; returns its name."""
        parameters = ", ".join(f"{type_} %{name}" for name, type_ in self.parameters)
        linkage = "" if self.is_public else "internal "
        last = [] if self.result != "void" else ["  ret void"]
        body = "\n".join(["entry:", *self._allocas, *self._lines, *last])
        attributes = f"nounwind noinline {self.attributes}".strip()  # kernels are called from many places
        text = f"define {linkage}{self.result} @{{name}}({parameters}) {attributes} {{\n{body}\n}}\n"
        return self.module.function(stem, text)

    # Values

    def emit(self, type_: str, text: str) -> Value:
        """An instruction with a result."""
        self._count += 1
        name = f"%v{self._count}"
        self._lines.append(f"  {name} = {text}")
        return Value(type_, name)

    def do(self, text: str) -> None:
        """An instruction without a result."""
        self._lines.append(f"  {text}")

    def value(self, number: Number) -> Value:
        """A number as an i64."""
        return number if isinstance(number, Value) else Value("i64", str(number))

    def binary(self, op: str, a: Value, b: Value) -> Value:
        """An instruction of two operands of one type."""
        assert a.type == b.type, (op, a, b)
        return self.emit(a.type, f"{op} {a.type} {a.ref}, {b.ref}")

    def add(self, a: Number, b: Number) -> Number:
        """Sum of i64."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if b == 0:
            return a
        if a == 0:
            return b
        return self.binary("add", self.value(a), self.value(b))

    def sub(self, a: Number, b: Number) -> Number:
        """Difference of i64."""
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self.binary("sub", self.value(a), self.value(b))

    def mul(self, a: Number, b: Number) -> Number:
        """Product of i64."""
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if b == 1:
            return a
        if a == 1:
            return b
        return self.binary("mul", self.value(a), self.value(b))

    def div(self, a: Number, b: Number) -> Number:
        """Quotient of i64 that are not negative."""
        if isinstance(a, int) and isinstance(b, int):
            return a // b
        return a if b == 1 else self.binary("udiv", self.value(a), self.value(b))

    def rem(self, a: Number, b: Number) -> Number:
        """Remainder of i64 that are not negative."""
        if isinstance(a, int) and isinstance(b, int):
            return a % b
        return 0 if b == 1 else self.binary("urem", self.value(a), self.value(b))

    def minimum(self, a: Number, b: Number) -> Number:
        """The smaller of two i64."""
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return self.intrinsic("llvm.smin.i64", "i64", [self.value(a), self.value(b)])

    def maximum(self, a: Number, b: Number) -> Number:
        """The larger of two i64."""
        if isinstance(a, int) and isinstance(b, int):
            return max(a, b)
        return self.intrinsic("llvm.smax.i64", "i64", [self.value(a), self.value(b)])

    def compare(self, predicate: str, a: Number, b: Number) -> Value:
        """i1 of two integers ("slt", "eq" …)."""
        x, y = self.value(a), self.value(b)
        return self.emit(vector("i1", lanes_of(x.type)), f"icmp {predicate} {x.type} {x.ref}, {y.ref}")

    def fcompare(self, predicate: str, a: Value, b: Value) -> Value:
        """i1 of two floats ("olt", "oeq", "une" …)."""
        return self.emit(vector("i1", lanes_of(a.type)), f"fcmp {predicate} {a.type} {a.ref}, {b.ref}")

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """a where the condition holds, else b."""
        return self.emit(a.type, f"select {condition.type} {condition.ref}, {a.type} {a.ref}, {b.type} {b.ref}")

    def cast(self, op: str, value: Value, element: str) -> Value:
        """sext, trunc, sitofp, bitcast between equal lanes …"""
        type_ = vector(element, lanes_of(value.type))
        return self.emit(type_, f"{op} {value.type} {value.ref} to {type_}")

    def bitcast(self, value: Value, type_: str) -> Value:
        """The same bits as another type."""
        return value if value.type == type_ else self.emit(type_, f"bitcast {value.type} {value.ref} to {type_}")

    def intrinsic(self, name: str, result: str, arguments: Sequence[Value]) -> Value:
        """A call of an intrinsic or an external function with a result."""
        self.module.declare(name, result, [a.type for a in arguments])
        return self.emit(result, f"call {result} @{name}({', '.join(f'{a.type} {a.ref}' for a in arguments)})")

    def call(self, name: str, arguments: Sequence[Value]) -> None:
        """A call of a function of this module."""
        self.do(f"call void @{name}({', '.join(f'{a.type} {a.ref}' for a in arguments)})")

    def overloaded(self, name: str, arguments: Sequence[Value]) -> Value:
        """A call of an intrinsic whose arguments and result are of one type ("llvm.sqrt" …)."""
        type_ = arguments[0].type
        suffix = {"float": "f32", "double": "f64"}.get(element_of(type_), element_of(type_))
        if type_.startswith("<"):
            suffix = f"v{lanes_of(type_)}{suffix}"
        return self.intrinsic(f"{name}.{suffix}", type_, arguments)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c."""
        return self.overloaded("llvm.fma" if self.module.host.has_fma else "llvm.fmuladd", [a, b, c])

    def splat(self, value: Value, lanes: int) -> Value:
        """A scalar in every lane."""
        if lanes == 1:
            return value
        type_ = vector(value.type, lanes)
        if not value.ref.startswith("%"):
            return Value(type_, "<" + ", ".join([f"{value.type} {value.ref}"] * lanes) + ">")
        one = self.emit(type_, f"insertelement {type_} poison, {value.type} {value.ref}, i64 0")
        return self.emit(type_, f"shufflevector {type_} {one.ref}, {type_} poison, <{lanes} x i32> zeroinitializer")

    def shuffle(self, a: Value, b: Value, mask: Sequence[int]) -> Value:
        """Lanes of a and b."""
        if len(mask) == 1:
            count = lanes_of(a.type)
            return self.extract(a, mask[0]) if mask[0] < count else self.extract(b, mask[0] - count)
        type_ = vector(element_of(a.type), len(mask))
        lanes = ", ".join(f"i32 {i}" for i in mask)
        text = f"shufflevector {a.type} {a.ref}, {b.type} {b.ref}, <{len(mask)} x i32> <{lanes}>"
        return self.emit(type_, text)

    def extract(self, value: Value, lane: int) -> Value:
        """One lane."""
        if lanes_of(value.type) == 1:
            return value
        return self.emit(element_of(value.type), f"extractelement {value.type} {value.ref}, i64 {lane}")

    def join(self, values: Sequence[Value]) -> Value:
        """Scalars as a vector."""
        if len(values) == 1:
            return values[0]
        type_ = vector(values[0].type, len(values))
        whole = Value(type_, "poison")
        for lane, value in enumerate(values):
            text = f"insertelement {type_} {whole.ref}, {value.type} {value.ref}, i64 {lane}"
            whole = self.emit(type_, text)
        return whole

    def reduce(self, op: str, value: Value) -> Value:
        """All lanes as one ("fadd", "fmax", "add" …)."""
        lanes, element = lanes_of(value.type), element_of(value.type)
        if lanes == 1:
            return value
        suffix = f"v{lanes}{({'float': 'f32', 'double': 'f64'}).get(element, element)}"
        if op in ("fadd", "fmul"):
            # halves, so that the order is that of vectors and not one lane after another
            while lanes > 1:
                lanes //= 2
                low, high = (self.shuffle(value, value, range(i, i + lanes)) for i in (0, lanes))
                value = self.binary(op, low, high)
            return self.extract(value, 0)
        return self.intrinsic(f"llvm.vector.reduce.{op}.{suffix}", element, [value])

    def join_lanes(self, vectors: Sequence[Value], op: str) -> Value:
        """All lanes of each vector joined by an operation ("fadd", "umax" …): a vector with a lane for each.

        A tree: each level halves the lanes that a result is spread over, and puts two vectors side by side.
        """
        level = list(vectors)
        spread = lanes_of(level[0].type)
        if spread == 1:
            return self.join(level)
        while spread > 1:
            half, width = spread // 2, lanes_of(level[0].type)
            low = [g * spread + i for g in range(width // spread) for i in range(half)]
            high = [i + half for i in low]
            if len(level) == 1:
                parts = [self.shuffle(level[0], level[0], lanes) for lanes in (low, high)]
                level = [self.combine(op, *parts)]
            else:
                joined = []
                for a, b in zip(level[::2], level[1::2], strict=True):
                    parts = [self.shuffle(a, b, lanes + [width + i for i in lanes]) for lanes in (low, high)]
                    joined.append(self.combine(op, *parts))
                level = joined
            spread = half
        while len(level) > 1:
            width = lanes_of(level[0].type)
            if width == 1:
                return self.join(level)
            level = [self.shuffle(a, b, range(2 * width)) for a, b in zip(level[::2], level[1::2], strict=True)]
        return level[0]

    def transpose(self, rows: Sequence[Value]) -> list[Value]:
        """As many vectors as they have lanes: vector i of the result has lane i of each. Blocks of 1, 2, 4 … change."""
        found = list(rows)
        size = 1
        while size < len(found):
            for i in range(len(found)):
                if i & size:
                    continue
                a, b = found[i], found[i | size]
                lanes = range(len(found))
                found[i] = self.shuffle(a, b, [len(found) + j - size if j & size else j for j in lanes])
                found[i | size] = self.shuffle(a, b, [len(found) + j if j & size else j + size for j in lanes])
            size *= 2
        return found

    def combine(self, op: str, a: Value, b: Value) -> Value:
        """An instruction, or an intrinsic for what is none ("umax")."""
        return self.overloaded(f"llvm.{op}", [a, b]) if op in ("umax", "smax") else self.binary(op, a, b)

    # Memory

    def alloca(self, size: int) -> Value:
        """Bytes on the stack, 64-byte aligned, for the whole function."""
        self._count += 1
        name = f"%a{self._count}"
        self._allocas.append(f"  {name} = alloca [{size} x i8], align 64")
        return Value(_POINTER, name)

    def at(self, base: Value, offset: Number) -> Value:
        """A pointer so many bytes on."""
        if offset == 0:
            return base
        number = self.value(offset)
        return self.emit(_POINTER, f"getelementptr inbounds i8, ptr {base.ref}, i64 {number.ref}")

    def load(self, type_: str, pointer: Value, offset: Number = 0, *, align: int = 1) -> Value:
        """What is so many bytes after a pointer."""
        return self.emit(type_, f"load {type_}, ptr {self.at(pointer, offset).ref}, align {align}")

    def store(self, value: Value, pointer: Value, offset: Number = 0, *, align: int = 1) -> None:
        """Put a value so many bytes after a pointer."""
        self.do(f"store {value.type} {value.ref}, ptr {self.at(pointer, offset).ref}, align {align}")

    # Control

    def prefetch(self, pointer: Value, offset: Number = 0) -> None:
        """Ask for the cache line of an address, which need not exist."""
        self.module.declare("llvm.prefetch.p0", "void", ["ptr", "i32", "i32", "i32"])
        self.do(f"call void @llvm.prefetch.p0(ptr {self.at(pointer, offset).ref}, i32 0, i32 3, i32 1)")

    def label(self, name: str) -> None:
        """Begin a block."""
        self._lines.append(f"{name}:")
        self._block = name

    def fresh(self, stem: str) -> str:
        """A label that is not taken."""
        self._count += 1
        return f"{stem}{self._count}"

    def loop(
        self,
        start: Number,
        stop: Number,
        step: int,
        body: Callable[[Value, list[Value]], Sequence[Value]],
        carried: Sequence[Value] = (),
    ) -> list[Value]:
        """body(i, carried) → carried for i from `start` while i < `stop`; returns the last of what is carried."""
        begin, end = self.value(start), self.value(stop)
        before, head, inside, after = self._block, self.fresh("head"), self.fresh("body"), self.fresh("done")
        self.do(f"br label %{head}")
        self.label(head)
        place = len(self._lines)
        self._count += 1
        index = Value("i64", f"%i{self._count}")
        phis = []
        for value in carried:
            self._count += 1
            phis.append(Value(value.type, f"%p{self._count}"))
        more = self.compare("slt", index, end)
        self.do(f"br i1 {more.ref}, label %{inside}, label %{after}")
        self.label(inside)
        new = list(body(index, list(phis)))
        following = self.emit("i64", f"add nsw i64 {index.ref}, {step}")
        latch = self._block
        self.do(f"br label %{head}")
        lines = [f"  {index.ref} = phi i64 [ {begin.ref}, %{before} ], [ {following.ref}, %{latch} ]"]
        for phi, first, last in zip(phis, carried, new, strict=True):
            lines.append(f"  {phi.ref} = phi {phi.type} [ {first.ref}, %{before} ], [ {last.ref}, %{latch} ]")
        self._lines[place:place] = lines
        self.label(after)
        return phis

    def when(self, condition: Value, body: Callable[[], None]) -> None:
        """body() if the condition holds."""
        inside, after = self.fresh("then"), self.fresh("end")
        self.do(f"br i1 {condition.ref}, label %{inside}, label %{after}")
        self.label(inside)
        body()
        self.do(f"br label %{after}")
        self.label(after)


_is_ready = False


def _initialize() -> None:
    global _is_ready
    if not _is_ready:
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
        _is_ready = True


def machine_for(host: Host, *, jit: bool) -> binding.TargetMachine:
    """The code generator for a host."""
    _initialize()
    target = binding.Target.from_triple(host.triple)
    return target.create_target_machine(
        cpu=host.cpu, features=host.features, opt=3, reloc="default", codemodel="jitdefault" if jit else "default"
    )


def optimize(text: str, machine: binding.TargetMachine) -> binding.ModuleRef:
    """The module, parsed, verified and optimised."""
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = False  # what is to be unrolled is emitted so
    options.loop_vectorization = False
    options.slp_vectorization = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


_kept: "list[Compiled]" = []
"""All that was compiled, so that it stays."""


class Compiled:
    """Native code of a module in this process. It stays until the process ends: threads and XLA hold its addresses."""

    def __init__(self, text: str, host: Host):
        machine = machine_for(host, jit=True)
        self._module = optimize(text, machine)
        self._engine = binding.create_mcjit_compiler(self._module, machine)
        self._engine.finalize_object()
        _kept.append(self)

    def address(self, name: str) -> int:
        """Of a public function."""
        return int(self._engine.get_function_address(name))


def assembly(text: str, host: Host) -> str:
    """The machine's assembly of a module, for any host that LLVM knows."""
    machine = machine_for(host, jit=False)
    return str(machine.emit_assembly(optimize(text, machine)))


def object_code(text: str, host: Host) -> bytes:
    """A module as an object file, for any host that LLVM knows."""
    machine = machine_for(host, jit=False)
    return bytes(machine.emit_object(optimize(text, machine)))


__all__ = [
    "Compiled",
    "Function",
    "Module",
    "Number",
    "Value",
    "assembly",
    "constant",
    "constants",
    "element_of",
    "lanes_of",
    "machine_for",
    "object_code",
    "optimize",
    "vector",
]
