"""From a step's operations to one native function: what is stored, in which order it is computed, where threads meet.

A value is *stored* if a matmul, an attention or a reduction makes it, if @main returns it, or if several of those need
it and it costs something to compute; every other value is computed where it is read (`expressions`). What makes a
stored value is a *root*. Roots become *items* of a list:

    matmul      its input prepared (rounded to 8 bits, say), tiles of rows shared out to the threads, and each root that
                reads the product at the same columns (residual, gate, rope, the write into pages) done by the thread
                that has just computed them
    attend      attention, shared out by blocks of keys
    loop        everything else: shared out by rows or columns, or where it is small done by every thread for itself,
                which is cheaper than to meet

Threads meet at a barrier before an item that reads what others wrote since the last one, or that writes what others
may still read. Memory of values that are read no more is used again behind a barrier.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import BlockArgument, Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import location
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, shape_of
from llmir_jax.dialects.llm.common import bool_of
from llmir_jax.interop import op_name
from llmir_jax.targets.cpu import expressions
from llmir_jax.targets.cpu.attention import AttentionShape, attention_kernel, pages_reason
from llmir_jax.targets.cpu.attention_tiles import TileShape, least_run, runs_kernel, tiles_kernel
from llmir_jax.targets.cpu.expressions import Buffer, Stored, is_cheap, memory_element
from llmir_jax.targets.cpu.host import Host, this_host
from llmir_jax.targets.cpu.index import Index, Var
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.layout import ROWS, PackedFormat, round_up
from llmir_jax.targets.cpu.llvm import Function, Module, Number, Value, constant
from llmir_jax.targets.cpu.loops import Body, Domain, Loops, reduce_reason, rows_and_columns
from llmir_jax.targets.cpu.matmul import InputFormat, matmul_kernel, rows_at_once
from llmir_jax.targets.cpu.team import waiting_ir
from llmir_jax.targets.cpu.tokens import TokenRows
from llmir_jax.targets.cpu.weights import Arrangement
from llmir_jax.transforms import signature

SMALL = 4096
"""Elements up to which every thread computes a value for itself."""
COLUMNS_AT_ONCE = 64
"""Columns of a product that are computed before what reads them, where there are many rows."""
CACHE_PERIOD = 256
"""Floats: rows so far apart, or a multiple, share few sets of a core's nearest cache."""
ROWS_TOGETHER = 48
"""Rows of them, about: what is computed stays in a core's cache until it is read."""

_Matmul = llm.QuantizedMatmulOp | llm.LinearOp
_Norm = llm.RMSNormOp | llm.LayerNormOp


@dataclass(eq=False, kw_only=True)
class Root:
    """What stores elements one by one: a value, or the writing of pages."""

    order: float  # of the operation in @main; what it needs beside its operands comes a little before
    target: Buffer
    shape: tuple[int, ...]
    body: Callable[[Domain], Body]
    stem: str = "store"
    emit: Callable[[Domain], tuple[str, list[Buffer]]] | None = None
    """Makes the kernel, if not of `body`; then only of rows of tokens, and of columns in multiples of `granule`."""
    granule: int = 1


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A root that is done where a matmul's columns are: its columns [c, c + width) need those from `offsets` + c on."""

    root: Root
    domain: Domain
    offsets: tuple[int, ...]
    width: int
    by_rows: bool  # whether its rows are the product's


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """How the rows of a product are gone through."""

    count: int
    live: Number  # of them, those that are no padding
    step: int  # computed before what reads them
    is_few: bool  # few enough to be computed at once, all


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


def _is_root_op(op: Operation) -> bool:
    return isinstance(
        op,
        llm.QuantizedMatmulOp
        | llm.LinearOp
        | llm.AttendPagesOp
        | llm.WritePagesOp
        | stablehlo.ReduceOp
        | stablehlo.ConcatenateOp
        | stablehlo.DotGeneralOp,
    )


def unsupported_reason(op: Operation) -> str | None:
    """Why an operation of a step is not computed natively; None if it is."""
    where = f"{op_name(op)} at {location(op)}"
    if isinstance(op, ReturnOp):
        return None
    if isinstance(op, llm.WritePagesOp | llm.AttendPagesOp):
        kinds = [op.k_pages.type, op.v_pages.type]
        other = op.q if isinstance(op, llm.AttendPagesOp) else op.k
        found = [reason for kind in kinds if (reason := pages_reason(kind, this_host())) is not None]
        if not found and dtype_of(other).name != "float32":
            found = [f"of {dtype_of(other).name}"]
        return f"{where}: {found[0]}" if found else None
    if isinstance(op, stablehlo.ReduceOp):
        reason = reduce_reason(op)
        if reason is not None:
            return f"{where}: {reason}"
        names = {dtype_of(value).name for value in op.operands}
        return None if names <= {"float32", "int32", "bool"} else f"{where}: of {', '.join(sorted(names))}"
    if isinstance(op, stablehlo.ConcatenateOp):
        kind = dtype_of(op.results[0]).name
        return None if kind in expressions.ELEMENTS else f"{where}: of {kind}"
    if isinstance(op, llm.QuantizedMatmulOp):
        return _matmul_reason(op, where)
    if isinstance(op, stablehlo.DotGeneralOp):
        names = {dtype_of(value).name for value in (op.lhs, op.rhs, op.results[0])}
        return None if names == {"float32"} else f"{where}: of {', '.join(sorted(names))}"
    if isinstance(op, llm.LinearOp):
        plain = isinstance(op.w, BlockArgument) and op.b is None and bool_of(op.transpose_w)
        if not plain or {dtype_of(value).name for value in (op.x, op.w, op.output)} != {"float32"}:
            return f"{where}: its weight is no float32 parameter"
        return None
    if isinstance(op, llm.QuantizedGatherOp):
        is_weight = isinstance(op.w, BlockArgument) and isinstance(op.w.type, llm.QuantizedTensorType)
        if not is_weight or dtype_of(op.results[0]).name != "float32":
            return f"{where}: of something else than a parameter, or not to float32"
        return None
    return expressions.unsupported_reason(op)


def _matmul_reason(op: llm.QuantizedMatmulOp, where: str) -> str | None:
    kind = op.w.type
    if not isinstance(op.w, BlockArgument) or not isinstance(kind, llm.QuantizedTensorType):
        return f"{where}: its weight is no quantized parameter"
    if dtype_of(op.x).name != "float32" or dtype_of(op.output).name != "float32":
        return f"{where}: of {dtype_of(op.x).name}"
    if op.activation_bits is not None:
        size = op.activation_group_size
        group, own = kind.get_shape()[1] if size is None else int(size.value.data), kind.elements_per_group
        if group % own and own % group:
            return f"{where}: groups of {own} weights and of {group} activations do not fit"
    return None


def _scales(op: _Matmul) -> SSAValue | None:
    """Scales of a matmul's activations that are known before."""
    return op.activation_scales if isinstance(op, llm.QuantizedMatmulOp) else None


def _follows_product(value: SSAValue) -> bool:
    """Whether a matmul's input is computed from the product of another element by element: then it is stored there."""
    pending, computes, found = [value], False, False
    while pending:
        op = pending.pop().owner
        if not isinstance(op, Operation):
            continue
        if isinstance(op, _Norm):
            return False
        if _is_root_op(op):
            found |= isinstance(op, _Matmul)
            continue
        computes |= not is_cheap(op)
        pending += op.operands
    return computes and found


class Planner:
    """Plans one step.

    Args:
        main: @main for some tokens, of operations that `unsupported_reason` allows.
        arrangement: places of the parameters.
        host: the machine.
        num_threads: threads of the team.
    """

    def __init__(self, main: FuncOp, arrangement: Arrangement, host: Host, num_threads: int):
        self.main, self.arrangement, self.host, self.num_threads = main, arrangement, host, num_threads
        self.ops = list(main.body.block.ops)
        self.index = {op: i for i, op in enumerate(self.ops)}
        self.tokens = TokenRows.of(main)
        self.module = Module(host)
        self.stored = Stored()
        self.loops = Loops(self.module, self.stored)
        self.items: list[Item] = []
        self.roots: list[Root] = []
        self.keys: dict[SSAValue, set[object]] = {}
        self.prepared: dict[tuple[SSAValue, InputFormat, SSAValue | None], Buffer] = {}
        self.aliases: dict[SSAValue, BlockArgument] = {}
        """Page arrays that an operation returns, and the arguments that they are."""

    # What is stored

    def _add_arguments(self) -> None:
        parameters = {place.argument: place for place in self.arrangement.places}
        number = 1  # operand 0 is the array of weights
        for arg in self.main.body.block.args:
            place = parameters.get(arg.index)
            if place is None and isinstance(arg.type, llm.QuantizedTensorType):
                pages, scales = (
                    Buffer.of(part.get_shape(), element, place="argument")
                    for part, element in zip(arg.type.parts(), ("i8", "half"), strict=True)
                )
                pages.offset, scales.offset, pages.scales = number, number + 1, scales
                number += 2
                self.stored.buffers[arg] = pages
                continue
            if place is None:
                assert isinstance(arg.type, TensorType)
                buffer = Buffer.of(shape_of(arg), memory_element(dtype_of(arg)), place="argument")
                buffer.offset = number
                number += 1
                self.stored.buffers[arg] = buffer
                continue
            if place.layout is not None:
                element = "float" if place.layout.bits == 32 else "i8"
                buffer = Buffer(shape=place.shape, element=element, strides=(1,), nbytes=place.nbytes, place="weights")
                self.stored.formats[arg] = place.layout
            else:
                buffer = Buffer.of(place.shape, memory_element(np.dtype(place.dtype)), place="weights")
            buffer.offset = place.offset
            self.stored.buffers[arg] = buffer
        self.num_operands = number

    def _input_format(self, op: _Matmul) -> InputFormat:
        rows = int(np.prod(shape_of(op.x)[:-1], dtype=np.int64))
        layout = self.stored.formats[op.w]
        group = None
        if isinstance(op, llm.QuantizedMatmulOp) and op.activation_bits is not None:
            size = op.activation_group_size
            group = layout.num_columns if size is None else int(size.value.data)
            group = max(group, layout.block)
        # of the weight only what the input's form depends on, so that several weights share one input
        like = PackedFormat(
            num_rows=0,
            num_columns=layout.num_columns,
            bits=layout.bits,
            block=layout.block,
            has_minima=layout.has_minima,
            side=layout.side,
        )
        return InputFormat(num_rows=rows, weight=like, group=group)

    def _find_consumers(self) -> None:
        """For each value, which roots it is computed for; and which values are stored because there are several."""
        self.valued: set[SSAValue] = set()
        for op in reversed(self.ops):
            for result in op.results:
                keys: set[object] = set()
                for use in result.uses:
                    keys |= self._keys_of_use(use.operation, use.index)
                self.keys[result] = keys
                if _is_root_op(op):
                    continue
                if (len(keys) > 1 and not is_cheap(op)) or ("stored", result) in keys:
                    self.valued.add(result)

    def _keys_of_use(self, op: Operation, operand: int) -> set[object]:
        if isinstance(op, ReturnOp):
            return {("result", operand)}
        if isinstance(op, _Matmul):
            prepares = ("prepare", op.x, self._input_format(op), _scales(op))
            return {("stored", op.x) if operand == 0 and _follows_product(op.x) else prepares}
        if isinstance(op, llm.AttendPagesOp):
            return {("stored", op.q)} if operand == 0 else {("attend", op)}
        if isinstance(op, llm.WritePagesOp):
            return {("write", op, operand)}
        if _is_root_op(op):
            return {("root", op)}
        (result,) = op.results
        keys: set[object] = {("stored", result)} if result in self.valued else set(self.keys[result])
        if isinstance(op, _Norm) and operand == 0:
            keys.add(("statistics", op))
        return keys

    # Roots and items

    def _add_root(self, root: Root) -> None:
        self.roots.append(root)

    def _store_value(self, value: SSAValue, target: Buffer | None = None) -> None:
        owner = value.owner
        assert isinstance(owner, Operation)
        if target is None:
            target = Buffer.of(shape_of(value), memory_element(dtype_of(value)))
        root = Root(
            order=self.index[owner],
            target=target,
            shape=shape_of(value),
            body=self.loops.storing(value, target),
        )
        self._add_root(root)
        self.pending.append((value, target))

    def run(self) -> Plan:
        """Plan the step."""
        self.pending: list[tuple[SSAValue, Buffer]] = []
        self._add_arguments()
        self._find_consumers()
        self._results()
        counters = Buffer.of((64,), "i32")
        partials = Buffer.of((16,), "float")
        self.counters, self.partials = counters, partials
        self.tile_scratch = Buffer.of((16,), "float", place="private")
        self.runs: dict[tuple[SSAValue | int, ...], Buffer] = {}
        matmuls: list[tuple[_Matmul, Buffer]] = []
        for op in self.ops:
            if isinstance(op, _Matmul):
                matmuls.append((op, self._product_buffer(op)))
            elif isinstance(op, llm.AttendPagesOp):
                self._reserve(op)
            elif isinstance(op, stablehlo.ReduceOp | stablehlo.ConcatenateOp | stablehlo.DotGeneralOp):
                self.stored.buffers[op.results[0]] = Buffer.of(
                    shape_of(op.results[0]), memory_element(dtype_of(op.results[0]))
                )
            elif isinstance(op, llm.WritePagesOp):
                for which, (old, new) in enumerate(zip(op.operands[:2], op.results, strict=True)):
                    self.stored.buffers[new] = self.stored.buffers[old]
                    pages = self.stored.buffers[old]
                    value = (op.k, op.v)[which]
                    in_bytes = pages.scales is not None
                    self._add_root(
                        Root(
                            order=self.index[op],
                            target=pages,
                            shape=shape_of(value),
                            body=self.loops.writing_pages(op, pages, which),
                            stem="write_pages",
                            emit=self.loops.writing_int8_pages(op, pages, which) if in_bytes else None,
                            granule=shape_of(value)[2] if in_bytes else 1,
                        )
                    )
            elif isinstance(op, _Norm):
                per_row = 2 if isinstance(op, llm.LayerNormOp) else 1
                rows = int(np.prod(shape_of(op.x)[:-1], dtype=np.int64))
                self.stored.statistics[op] = Buffer.of((rows, per_row), "float")
            for result in op.results:
                if result in self.valued:
                    self._store_value(result)
        # buffers are known to the evaluator only now: a root computes its own value, others read it
        roots_of = {id(target): value for value, target in self.pending}
        for value, target in self.pending:
            if value not in self.stored.buffers:
                self.stored.buffers[value] = target
        self.own = roots_of
        self._matmul_items(matmuls)
        for root in self.roots:
            self._loop_item(root)
        self._other_items()
        return self._assemble()

    def _reserve(self, op: llm.AttendPagesOp) -> None:
        shape = AttentionShape.of(op, self.num_threads)
        self.stored.buffers[op.output] = Buffer.of(shape_of(op.output), "float")
        self.counters.nbytes = max(self.counters.nbytes, shape.counter_bytes)
        self.partials.nbytes = max(self.partials.nbytes, shape.scratch_bytes)

    def _results(self) -> None:
        """Page arrays are their arguments; every other result is stored where XLA wants it."""
        last = self.ops[-1]
        self.result_buffers: list[Buffer] = []
        self.direct: dict[SSAValue, Buffer] = {}
        pages: dict[SSAValue, SSAValue] = {}
        for op in self.ops:
            if isinstance(op, llm.WritePagesOp):
                for old, new in zip(op.operands[:2], op.results, strict=True):
                    pages[new] = pages.get(old, old)
        self.page_results: dict[int, Buffer] = {}
        self.num_results = 0
        for operand, value in enumerate(last.operands):
            number = self.num_results
            source = pages.get(value)
            if source is not None:
                held = self.stored.buffers[source]
                self.page_results[number] = held
                if held.scales is not None:
                    self.page_results[number + 1] = held.scales
                self.num_results += 1 if held.scales is None else 2
                continue
            self.num_results += 1
            buffer = Buffer.of(shape_of(value), memory_element(dtype_of(value)), place="result")
            buffer.offset = number
            self.result_buffers.append(buffer)
            is_product = isinstance(value.owner, _Matmul)
            if is_product and self.keys[value] == {("result", operand)} and value not in self.direct:
                self.direct[value] = buffer
                continue
            root = Root(
                order=len(self.ops),
                target=buffer,
                shape=shape_of(value),
                body=self.loops.storing(value, buffer),
            )
            self._add_root(root)

    def _product_buffer(self, op: _Matmul) -> Buffer:
        buffer = self.direct.get(op.output)
        if buffer is None:
            shape = shape_of(op.output)
            stride = round_up(shape[-1], ROWS)
            if stride % CACHE_PERIOD == 0 and len(shape) > 1:
                stride += ROWS
            buffer = Buffer.of(shape, "float", row_stride=stride)
        self.stored.buffers[op.output] = buffer
        return buffer

    def _probe(self, root: Root, domain: Domain) -> list[tuple[Buffer, Index]]:
        value = self.own.get(id(root.target))
        held = self.stored.buffers.pop(value) if value is not None else None
        try:
            return list(self.loops.probe(domain, root.body(domain)))
        finally:
            if value is not None and held is not None:
                self.stored.buffers[value] = held

    def _emit_root(self, root: Root, domain: Domain) -> tuple[str, list[Buffer]]:
        value = self.own.get(id(root.target))
        held = self.stored.buffers.pop(value) if value is not None else None
        try:
            return self.loops.over(domain, root.stem, root.body(domain)) if root.emit is None else root.emit(domain)
        finally:
            if value is not None and held is not None:
                self.stored.buffers[value] = held

    # Matmuls

    def _matmul_items(self, matmuls: list[tuple[_Matmul, Buffer]]) -> None:
        producers = {buffer: self.index[op] for op, buffer in matmuls}
        reads: dict[Root, set[Buffer]] = {}
        for root in self.roots:
            domain = rows_and_columns(root.shape)
            reads[root] = {buffer for buffer, _ in self._probe(root, domain)}
        # where the value of a root is made, if not with a matmul
        made = {root.target: root.order for root in self.roots if root.target.place == "scratch"}
        made |= {buffer: self.index[op] for op, buffer in self.stored.statistics.items()}
        made |= {
            self.stored.buffers[op.results[0]]: i
            for op, i in self.index.items()
            if isinstance(op, llm.AttendPagesOp | stablehlo.ReduceOp | stablehlo.DotGeneralOp)
        }
        for op, product in matmuls:
            mine = [root for root in self.roots if product in reads[root]]
            attached = []
            for root in mine:
                others = reads[root] - {product}
                late = any(max(producers.get(buffer, -1), made.get(buffer, -1)) > self.index[op] for buffer in others)
                found = None if late else self._attach(root, product)
                if found is not None:
                    attached.append(found)
            if len(attached) != len(mine) or not self._cover(attached, product):
                attached = []
            for each in attached:
                self.roots.remove(each.root)
            self._matmul_item(op, product, attached)

    def _attach(self, root: Root, product: Buffer) -> Attached | None:
        """How a root follows the columns of a product; None if it does not."""
        total = int(np.prod(root.shape, dtype=np.int64))
        stride = product.strides[-2] if len(product.strides) > 1 else product.nbytes // 4
        columns = 1
        best: Attached | None = None
        for size in reversed(root.shape):
            columns *= size
            if size == 1 or columns > product.shape[-1] or columns < ROWS:
                continue
            if root.emit is not None and total // columns != root.shape[0]:
                continue
            domain = Domain(total // columns, columns)
            found = self._offsets(root, domain, product, stride)
            if found is not None:
                offsets, width, by_rows = found
                best = Attached(root=root, domain=domain, offsets=offsets, width=width, by_rows=by_rows)
        return best

    def _offsets(
        self, root: Root, domain: Domain, product: Buffer, stride: int
    ) -> tuple[tuple[int, ...], int, bool] | None:
        """The columns that a root reads, its width, and whether each row reads the product's row of its number."""
        rows = np.unique(np.linspace(0, domain.rows - 1, 16).astype(np.int64))[:, None]
        columns = np.arange(domain.columns, dtype=np.int64)[None, :]
        variables: dict[Var, Any] = {domain.row(): rows, domain.column(1): columns}
        shape = (len(rows), domain.columns)
        places = [
            np.broadcast_to(place.evaluate(variables), shape)
            for buffer, place in self._probe(root, domain)
            if buffer is product
        ]
        accessed = [place % stride for place in places]
        by_rows = domain.rows * stride * 4 == product.nbytes and all((p // stride == rows).all() for p in places)
        width = ROWS
        while width <= max(domain.columns, ROWS):
            if (width == ROWS or domain.columns % width == 0) and width % root.granule == 0:
                first = [int(read[:, :width].min()) // ROWS * ROWS for read in accessed]
                if all(
                    ((read - offset) // width == columns // width).all()
                    for read, offset in zip(accessed, first, strict=True)
                ):
                    return tuple(sorted(set(first))), width, by_rows
            width *= 2
        return None

    @staticmethod
    def _cover(attached: list[Attached], product: Buffer) -> bool:
        """Whether every column is computed once."""
        taken = np.zeros(round_up(product.shape[-1], ROWS), np.int64)
        for each in attached:
            for offset in each.offsets:
                if offset % ROWS or (each.domain.columns % ROWS and offset + each.domain.columns != product.shape[-1]):
                    return False
                taken[offset : offset + each.domain.columns] += 1
        return bool((taken[: product.shape[-1]] == 1).all())

    def _prepare(self, op: _Matmul) -> Buffer:
        """The input of a matmul, prepared once for all that take it so."""
        inputs = self._input_format(op)
        key = (op.x, inputs, _scales(op))
        if key not in self.prepared:
            buffer = Buffer(shape=(), element="i8", strides=(), nbytes=inputs.nbytes)
            self.prepared[key] = buffer
            name, buffers = self.loops.prepare(op.x, inputs, buffer, _scales(op))
            columns = inputs.weight.num_columns
            kind = "tokens" if self._live(op.x) is not None else "rows"
            self._add_item(self.index[op] - 0.5, name, buffers, {buffer}, (kind, inputs.num_rows, columns))
        return self.prepared[key]

    def _live(self, value: SSAValue) -> Buffer | None:
        """Where the number of rows of a value that are no padding is, if its rows are tokens."""
        if self.tokens is None or not self.tokens.are_rows_of(value):
            return None
        return self.stored.buffers[self.tokens.count]

    def _matmul_item(self, op: _Matmul, product: Buffer, attached: list[Attached]) -> None:
        prepared = self._prepare(op)
        inputs = self._input_format(op)
        layout = self.stored.formats[op.w]
        weight = self.stored.buffers[op.w]
        stride = product.strides[-2] if len(product.strides) > 1 else product.shape[-1]
        inputs = InputFormat(num_rows=inputs.num_rows, weight=layout, group=inputs.group)
        kernel_name = matmul_kernel(self.module, inputs, row_stride=stride, num_columns=product.shape[-1])
        kernel = Kernel(self.module, ("id", "n"))
        f = kernel.f
        x, w, y = (kernel.pointer(buffer) for buffer in (prepared, weight, product))
        at_once = rows_at_once(self.module, inputs)
        is_few = inputs.num_rows <= at_once
        id_, n = kernel.number("id"), kernel.number("n")
        count = None if is_few else self._live(op.x)
        live: Number = inputs.num_rows
        if count is not None:
            stored = f.cast("sext", f.load("i32", kernel.pointer(count), align=4), "i64")
            live = f.minimum(stored, inputs.num_rows)

        def product_of(row: Number, end: Number, tile: Number, tiles: Number) -> None:
            f.call(kernel_name, [x, w, y, *map(f.value, (row, end, tile, tiles))])

        rows = _Rows(count=inputs.num_rows, live=live, step=max(1, ROWS_TOGETHER // at_once) * at_once, is_few=is_few)
        writes = {product}
        if not attached:
            end = live if product.place == "scratch" else inputs.num_rows
            lo, hi = (f.div(f.mul(f.add(id_, i), layout.num_tiles), n) for i in (0, 1))
            product_of(0, end, lo, f.sub(hi, lo))
        total = sum(each.domain.columns for each in attached)
        base = 0
        for each in attached:
            writes.add(each.root.target)
            self._attached(kernel, each, base, total, rows, product_of)
            base += each.domain.columns
        name = f.finish("matmul_phase")
        reads = set(kernel.buffers)
        self.items.append(
            Item(
                order=self.index[op],
                name=name,
                buffers=kernel.buffers,
                reads=reads - ({product} if attached else set()),
                writes=writes,
                split=("threads", 0, 0),
            )
        )

    def _attached(
        self,
        kernel: Kernel,
        each: Attached,
        base: int,
        total: int,
        rows: "_Rows",
        product_of: Callable[[Number, Number, Number, Number], None],
    ) -> None:
        """The columns of one root that a thread has, and the root's own work on them."""
        f, columns = kernel.f, each.domain.columns
        width = each.width
        id_, n = kernel.number("id"), kernel.number("n")
        bounds = []
        for i in (0, 1):
            place = f.sub(f.div(f.mul(f.add(id_, i), total), n), base)
            unit = f.div(f.add(f.maximum(place, 0), width - 1), width)
            bounds.append(f.minimum(unit, -(-columns // width)))
        name, buffers = self._emit_root(each.root, each.domain)

        def do(row: Number, end: Number, root_end: Number, start: Number, stop: Number) -> None:
            last = f.minimum(stop, columns)
            for offset in each.offsets:
                tiles = f.div(f.add(f.sub(last, start), ROWS - 1), ROWS)
                product_of(row, end, f.div(f.add(start, offset), ROWS), tiles)
            numbers = [f.value(number) for number in (row, root_end, start, last)]
            f.call(name, [*numbers, *(kernel.pointer(buffer) for buffer in buffers)])

        lo, hi = (f.mul(unit, width) for unit in bounds)
        if rows.is_few:
            f.when(f.compare("slt", lo, hi), lambda: do(0, rows.count, each.domain.rows, lo, hi))
            return
        step = max(width, COLUMNS_AT_ONCE // width * width)
        live = rows.live if each.root.target.place == "scratch" or each.root.stem == "write_pages" else rows.count

        def chunk(start: Value, carried: list[Value]) -> list[Value]:
            stop = f.minimum(f.add(start, step), hi)
            if not each.by_rows:
                do(0, rows.count, each.domain.rows, start, stop)
                return []

            def some_rows(row: Value, inner: list[Value]) -> list[Value]:
                end = f.minimum(f.add(row, rows.step), live)
                do(row, end, end, start, stop)
                return []

            f.loop(0, live, rows.step, some_rows)
            return []

        f.loop(lo, hi, step, chunk)

    # Everything else

    def _add_item(
        self, order: float, name: str, buffers: list[Buffer], writes: set[Buffer], split: tuple[str, int, int]
    ) -> None:
        _, rows, columns = split
        own = all(buffer.place == "scratch" for buffer in writes)
        is_elementwise = name.startswith(("store", "write")) and not any(buffer.scales for buffer in writes)
        few_rows = rows < self.num_threads and not is_elementwise and rows * columns <= 16 * SMALL
        if own and (rows * columns <= SMALL or few_rows):
            for buffer in writes:
                buffer.place = "private"
            split = ("each", rows, columns)
        elif rows < self.num_threads and is_elementwise:
            split = ("columns", rows, columns)
        self.items.append(
            Item(order=order, name=name, buffers=buffers, reads=set(buffers) - writes, writes=writes, split=split)
        )

    def _loop_item(self, root: Root) -> None:
        domain = rows_and_columns(root.shape)
        if root.stem == "write_pages":
            domain = Domain(root.shape[0], int(np.prod(root.shape[1:], dtype=np.int64)))
        name, buffers = self._emit_root(root, domain)
        self._add_item(root.order, name, buffers, {root.target}, ("rows", domain.rows, domain.columns))

    def _other_items(self) -> None:
        zeroing = Function(self.module, [("id", "i64"), ("n", "i64"), ("b", "ptr")])
        first = zeroing.compare("eq", zeroing.arguments["id"], 0)
        counters = self.counters

        def zero() -> None:
            def body(i: Value, carried: list[Value]) -> list[Value]:
                zeroing.store(constant("i32", 0), zeroing.arguments["b"], zeroing.mul(i, 4), align=4)
                return []

            zeroing.loop(0, counters.nbytes // 4, 1, body)

        zeroing.when(first, zero)
        if any(isinstance(op, llm.AttendPagesOp) for op in self.ops):
            name = zeroing.finish("zero")
            self.items.append(
                Item(
                    order=-1,
                    name=name,
                    buffers=[counters],
                    reads=set(),
                    writes={counters},
                    split=("threads", 0, 0),
                )
            )
        for op, i in self.index.items():
            if isinstance(op, llm.AttendPagesOp):
                self._attend_item(op, i)
            elif isinstance(op, _Norm):
                target = self.stored.statistics[op]
                name, buffers = self.loops.statistics(op, target)
                shape = shape_of(op.x)
                self._add_item(i - 0.25, name, buffers, {target}, ("rows", target.shape[0], shape[-1]))
            elif isinstance(op, stablehlo.ReduceOp):
                target = self.stored.buffers[op.results[0]]
                name, buffers = self.loops.reduce(op, target)
                rows = int(np.prod(target.shape, dtype=np.int64))
                total = int(np.prod(shape_of(op.operands[0]), dtype=np.int64))
                self._add_item(i, name, buffers, {target}, ("rows", rows, total // max(rows, 1)))
            elif isinstance(op, stablehlo.DotGeneralOp):
                target = self.stored.buffers[op.results[0]]
                name, buffers = self.loops.dot(op, target)
                rows = int(np.prod(target.shape, dtype=np.int64))
                total = int(np.prod(shape_of(op.lhs), dtype=np.int64))
                self._add_item(i, name, buffers, {target}, ("rows", rows, total))
            elif isinstance(op, stablehlo.ConcatenateOp):
                self._concatenate_items(op, i)

    def _concatenate_items(self, op: stablehlo.ConcatenateOp, i: int) -> None:
        target = self.stored.buffers[op.results[0]]
        dim, begin = op.dimension.value.data, 0
        for operand in op.operands:
            start = [0] * len(target.shape)
            start[dim] = begin
            begin += shape_of(operand)[dim]
            domain = rows_and_columns(shape_of(operand))
            body = self.loops.storing(operand, target, start)(domain)
            name, buffers = self.loops.over(domain, "join", body)
            # shared, since its pieces must all be either so or private
            self.items.append(
                Item(
                    order=i,
                    name=name,
                    buffers=buffers,
                    reads=set(buffers) - {target},
                    writes={target},
                    split=("rows", domain.rows, domain.columns),
                )
            )

    def _runs(self, op: llm.AttendPagesOp) -> Buffer | None:
        """The batch cut into tiles, once for all attentions that cut it so; None where no tile fits."""
        shape = AttentionShape.of(op, self.num_threads)
        if shape.num_rows < least_run(self.host):
            return None
        tile = TileShape.of(shape, self.host)
        self.tile_scratch.nbytes = max(self.tile_scratch.nbytes, tile.scratch_bytes)
        key = (op.seq_ids, op.positions, op.num_tokens, tile.tokens)
        if key not in self.runs:
            runs = Buffer.of((shape.num_rows,), "i32", place="private")
            self.runs[key] = runs
            name, buffers = runs_kernel(self.module, self.stored, op, tile.tokens, runs)
            self.items.append(
                Item(
                    order=self.index[op] - 0.125,
                    name=name,
                    buffers=buffers,
                    reads=set(buffers) - {runs},
                    writes={runs},
                    split=("each", shape.num_rows, 1),
                )
            )
        return self.runs[key]

    def _attend_item(self, op: llm.AttendPagesOp, i: int) -> None:
        output = self.stored.buffers[op.output]
        runs = self._runs(op)
        places = {
            "q": self.stored.buffers[op.q],
            "k_pages": self.stored.buffers[op.k_pages],
            "v_pages": self.stored.buffers[op.v_pages],
            "output": output,
        }
        kernels = [
            attention_kernel(
                self.module,
                self.stored,
                op,
                **places,
                scratch=self.partials,
                counters=self.counters,
                num_threads=self.num_threads,
                runs=runs,
            )
        ]
        if runs is not None:
            kernels.append(
                tiles_kernel(
                    self.module,
                    self.stored,
                    op,
                    **places,
                    scratch=self.tile_scratch,
                    runs=runs,
                    num_threads=self.num_threads,
                )
            )
        # one item, since both write rows of the output that are not each other's
        kernel = Kernel(self.module, ("id", "n"))
        for name, buffers in kernels:
            kernel.f.call(name, [kernel.number("id"), kernel.number("n"), *map(kernel.pointer, buffers)])
        own = {self.partials, self.counters, *([] if runs is None else [self.tile_scratch])}
        self.items.append(
            Item(
                order=i,
                name=kernel.f.finish("attend_phase"),
                buffers=kernel.buffers,
                reads=set(kernel.buffers) - {output},
                writes={output, *own},
                split=("threads", 0, 0),
            )
        )

    # The function

    def _assemble(self) -> Plan:
        items = sorted(self.items, key=lambda item: item.order)
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
        scratch, private = self._allocate(items, intervals)
        self._main(items, intervals, scratch, private)
        text = self.module.text + waiting_ir(self.host)
        return Plan(
            text=text,
            scratch_bytes=scratch + private * self.num_threads,
            num_barriers=interval,
            num_items=len(items),
            num_kernels=text.count("\ndefine "),
        )

    def _allocate(self, items: list[Item], intervals: list[int]) -> tuple[int, int]:
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
            for buffer in (self.counters, self.partials):
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

    def _main(self, items: list[Item], intervals: list[int], scratch: int, private: int) -> None:
        parameters = [("table", "ptr"), ("barrier", "ptr"), ("id", "i64"), ("n", "i64")]
        f = Function(self.module, parameters, is_public=True)
        table, barrier, id_, n = (f.arguments[name] for name, _ in parameters)
        num_results = self.num_results
        loaded: dict[int, Value] = {}

        def entry(number: int) -> Value:
            if number not in loaded:
                loaded[number] = f.load("ptr", table, 8 * number, align=8)
            return loaded[number]

        weights, memory = entry(0), entry(self.num_operands + num_results)
        own = f.at(memory, f.add(f.mul(id_, private), scratch))

        def pointer(buffer: Buffer) -> Value:
            if buffer.place == "weights":
                return f.at(weights, buffer.offset)
            if buffer.place == "argument":
                return entry(buffer.offset)
            if buffer.place == "result":
                return entry(self.num_operands + buffer.offset)
            return f.at(memory if buffer.place == "scratch" else own, buffer.offset)

        def live_tokens() -> Number:
            assert self.tokens is not None
            if "live" not in cached:
                stored = f.load("i32", pointer(self.stored.buffers[self.tokens.count]), align=4)
                cached["live"] = f.minimum(f.cast("sext", stored, "i64"), self.tokens.num_rows)
            return cached["live"]

        cached: dict[str, Number] = {}
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
                numbers = [*self._share(f, live_tokens(), 1, id_, n), 0, columns]
            elif kind == "rows":
                numbers = [*self._share(f, rows, 1, id_, n), 0, columns]
            else:
                numbers = [0, rows, *self._share(f, columns, 64, id_, n)]
            f.call(item.name, [*map(f.value, numbers), *map(pointer, item.buffers)])
        f.finish("step")

    @staticmethod
    def _share(f: Function, count: Number, unit: int, id_: Value, n: Value) -> list[Number]:
        units = f.div(f.add(count, unit - 1), unit)
        bounds: list[Number] = []
        for i in (0, 1):
            place = f.mul(f.div(f.mul(f.add(id_, i), units), n), unit)
            bounds.append(f.minimum(place, count))
        return bounds


def reasons(main: FuncOp) -> list[str]:
    """Why a step cannot be computed natively: one line for each kind of operation that is in the way."""
    found: dict[str, str] = {}
    for op in main.body.block.ops:
        reason = unsupported_reason(op)
        if reason is not None:
            found.setdefault(op_name(op), reason)
    for arg, path in signature.parameter_paths(main):
        if isinstance(arg.type, TensorType) and dtype_of(arg).name not in ("float32", "int32"):
            found.setdefault(path, f"the parameter {path} is {dtype_of(arg).name}")
    return list(found.values())


__all__ = ["Plan", "Planner", "reasons", "unsupported_reason"]
