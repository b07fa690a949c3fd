"""Items in order: where threads meet, what memory each buffer has, and the function that every thread runs.

Threads meet at a barrier before an item that reads what others wrote since the last one, or that writes what others
may still read. Memory of values that are read no more is used again behind a barrier.
"""

from collections.abc import Set
from dataclasses import dataclass

from llmir_jax.targets.cpu.expressions import Buffer
from llmir_jax.targets.cpu.layout import round_up
from llmir_jax.targets.cpu.llvm import Function, Module, Number, Value, constant
from llmir_jax.targets.cpu.team import waiting_ir


@dataclass(eq=False, kw_only=True)
class Item:
    """A call of a function by every thread."""

    order: float  # of the operation in @main; what it needs beside its operands comes a little before
    name: str
    buffers: list[Buffer]
    reads: set[Buffer]
    writes: set[Buffer]
    split: tuple[str, int, int]  # ("rows" | "tokens" | "columns" | "each" | "threads", rows, columns)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step as native code, not yet compiled."""

    text: str  # LLVM IR of the public function @step(table, barrier, id, n)
    scratch_bytes: int
    num_barriers: int
    num_items: int
    num_kernels: int


def assemble(
    module: Module,
    items: list[Item],
    kept: Set[Buffer],
    *,
    num_operands: int,
    num_results: int,
    num_threads: int,
    tokens: tuple[Buffer, int] | None,
) -> Plan:
    """The step that runs these items, in their order. `kept` keep their memory from step to step of the list.

    `tokens`: where the number of tokens is, int32, and how many there can be; for items that are shared out by tokens.
    """
    items = sorted(items, key=lambda item: item.order)
    dirty: set[Buffer] = set()
    read: set[Buffer] = set()
    interval = 0
    intervals: list[int] = []
    joins = ""
    for item in items:
        shared = {buffer for buffer in item.writes if buffer.place != "private"}
        same_join = joins == "join" and item.name.startswith("join") and not item.reads & dirty
        needs = bool(item.reads & dirty) or (bool(shared & (dirty | read)) and not same_join)
        if needs:
            interval += 1
            dirty, read = set(), set()
        intervals.append(interval)
        dirty |= shared
        read |= {buffer for buffer in item.reads if buffer.place not in ("private", "weights")}
        joins = "join" if item.name.startswith("join") else ""
    scratch, private = _allocate(items, intervals, kept)
    _main(module, items, intervals, num_operands, num_results, scratch, private, tokens)
    text = module.text + waiting_ir(module.host)
    return Plan(
        text=text,
        scratch_bytes=scratch + private * num_threads,
        num_barriers=interval,
        num_items=len(items),
        num_kernels=text.count("\ndefine "),
    )


def _allocate(items: list[Item], intervals: list[int], kept: Set[Buffer]) -> tuple[int, int]:
    """Offsets for shared and private scratch; returns the bytes of each. Memory is reused behind a barrier."""
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for item, interval in zip(items, intervals, strict=True):
        for buffer in (*item.buffers, *item.writes):
            first.setdefault(buffer, interval)
            last[buffer] = interval
    sizes = []
    for place in ("scratch", "private"):
        mine = [buffer for buffer in first if buffer.place == place]
        for buffer in kept:
            if buffer in last:
                last[buffer] = intervals[-1] + 1  # counters stay zero from step to step of the list
        live: list[tuple[int, int, int]] = []  # begin, end, last interval
        top = 0
        for buffer in sorted(mine, key=lambda b: first[b]):
            live = sorted(entry for entry in live if entry[2] >= first[buffer])
            at = 0
            size = round_up(max(buffer.nbytes, 1), 64)
            for begin, end, _ in live:
                if begin - at >= size:
                    break
                at = max(at, end)
            buffer.offset = at
            live.append((at, at + size, last[buffer]))
            top = max(top, at + size)
        sizes.append(round_up(top, 128))
    return sizes[0], sizes[1]


def _main(
    module: Module,
    items: list[Item],
    intervals: list[int],
    num_operands: int,
    num_results: int,
    scratch: int,
    private: int,
    tokens: tuple[Buffer, int] | None,
) -> None:
    parameters = [("table", "ptr"), ("barrier", "ptr"), ("id", "i64"), ("n", "i64")]
    f = Function(module, parameters, is_public=True)
    table, barrier, id_, n = (f.arguments[name] for name, _ in parameters)
    loaded: dict[int, Value] = {}

    def entry(number: int) -> Value:
        if number not in loaded:
            loaded[number] = f.load("ptr", table, 8 * number, align=8)
        return loaded[number]

    weights, memory = entry(0), entry(num_operands + num_results)
    own = f.at(memory, f.add(f.mul(id_, private), scratch))

    def pointer(buffer: Buffer) -> Value:
        if buffer.place == "weights":
            return f.at(weights, buffer.offset)
        if buffer.place == "argument":
            return entry(buffer.offset)
        if buffer.place == "result":
            return entry(num_operands + buffer.offset)
        return f.at(memory if buffer.place == "scratch" else own, buffer.offset)

    live: list[Number] = []

    def live_tokens() -> Number:
        assert tokens is not None
        if not live:
            count, most = tokens
            live.append(f.minimum(f.cast("sext", f.load("i32", pointer(count), align=4), "i64"), most))
        return live[0]

    now = 0
    for item, interval in zip(items, intervals, strict=True):
        if interval != now:
            f.call("barrier", [barrier, n])
            now = interval
        kind, rows, columns = item.split
        if kind == "threads":
            numbers: list[Number] = [id_, n]
        elif kind == "each":
            numbers = [0, rows, 0, columns]
        elif kind == "tokens":
            numbers = [*_share(f, live_tokens(), 1, id_, n), 0, columns]
        elif kind == "rows":
            numbers = [*_share(f, rows, 1, id_, n), 0, columns]
        else:
            numbers = [0, rows, *_share(f, columns, 64, id_, n)]
        f.call(item.name, [*map(f.value, numbers), *map(pointer, item.buffers)])
    f.finish("step")


def _share(f: Function, count: Number, unit: int, id_: Value, n: Value) -> list[Number]:
    units = f.div(f.add(count, unit - 1), unit)
    bounds: list[Number] = []
    for i in (0, 1):
        place = f.mul(f.div(f.mul(f.add(id_, i), units), n), unit)
        bounds.append(f.minimum(place, count))
    return bounds


def zeroing(module: Module, buffer: Buffer) -> str:
    """A function (id, n, pointer) by which the first thread sets a buffer of i32 to zero: its name."""
    f = Function(module, [("id", "i64"), ("n", "i64"), ("b", "ptr")])

    def zero() -> None:
        def body(i: Value, carried: list[Value]) -> list[Value]:
            f.store(constant("i32", 0), f.arguments["b"], f.mul(i, 4), align=4)
            return []

        f.loop(0, buffer.nbytes // 4, 1, body)

    f.when(f.compare("eq", f.arguments["id"], 0), zero)
    return f.finish("zero")


__all__ = ["Item", "Plan", "assemble", "zeroing"]
