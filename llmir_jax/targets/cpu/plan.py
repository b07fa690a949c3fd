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

`schedule` puts them in order and gives values their memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import BlockArgument, Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, shape_of
from llmir_jax.dialects.stablehlo_ext import TopKOp
from llmir_jax.targets.cpu.activations import prepare
from llmir_jax.targets.cpu.attached import Attached, ProductRows, Root, attach, covers
from llmir_jax.targets.cpu.attentions import Attentions
from llmir_jax.targets.cpu.expressions import Buffer, Stored, is_cheap, memory_element, scratch_element
from llmir_jax.targets.cpu.host import Host
from llmir_jax.targets.cpu.index import Index
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.layout import ROWS, round_up
from llmir_jax.targets.cpu.llvm import Module, Number, Value
from llmir_jax.targets.cpu.loops import Loops, rows_and_columns
from llmir_jax.targets.cpu.matmul import InputFormat, matmul_kernel, rows_at_once
from llmir_jax.targets.cpu.pages import writing_pages, writing_quantized_pages
from llmir_jax.targets.cpu.repeated import Repeated, Structure
from llmir_jax.targets.cpu.roots import Matmul, Norm, follows_product, is_root_op, known_scales, weight_of
from llmir_jax.targets.cpu.rows import Domain
from llmir_jax.targets.cpu.schedule import Item, Plan, assemble
from llmir_jax.targets.cpu.selection import top_k
from llmir_jax.targets.cpu.tokens import TokenRows
from llmir_jax.targets.cpu.weights import Arrangement

SMALL = 4096
"""Elements up to which every thread computes a value for itself."""
COLUMNS_AT_ONCE = 64
"""Columns of a product that are computed before what reads them, where there are many rows."""
CACHE_PERIOD = 256
"""Floats: rows so far apart, or a multiple, share few sets of a core's nearest cache."""
ROWS_TOGETHER = 48
"""Rows of them, about: what is computed stays in a core's cache until it is read."""


class Planner:
    """Plans one step.

    Args:
        main: @main for some tokens, of operations that `support.unsupported_reason` allows.
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
        self.repeated = Repeated(self.stored)
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
                pages, *sides = (
                    Buffer.of(part.get_shape(), "half" if i else "i8", place="argument")
                    for i, part in enumerate(arg.type.parts())
                )
                pages.scales, pages.minima = sides[0], sides[1] if len(sides) > 1 else None
                for part in pages.parts:
                    part.offset = number
                    number += 1
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
                element = place.layout.side if place.layout.is_float else "i8"
                buffer = Buffer(shape=place.shape, element=element, strides=(1,), nbytes=place.nbytes, place="weights")
                self.stored.formats[arg] = place.layout
            else:
                buffer = Buffer.of(place.shape, memory_element(np.dtype(place.dtype)), place="weights")
            buffer.offset = place.offset
            self.stored.buffers[arg] = buffer
        self.num_operands = number

    def _input_format(self, op: Matmul) -> InputFormat:
        rows = int(np.prod(shape_of(op.x)[:-1], dtype=np.int64))
        layout = self.stored.formats[weight_of(op)]
        group = None
        if isinstance(op, llm.QuantizedMatmulOp) and op.activation_bits is not None:
            size = op.activation_group_size
            group = layout.num_columns if size is None else int(size.value.data)
            group = max(group, layout.block)
        like = replace(layout, num_rows=0)  # what the input's form depends on: several weights share one input
        in_bfloats = layout.side == "bfloat" and dtype_of(op.x).name == "bfloat16" and self.host.has_bf16_dot
        return InputFormat(num_rows=rows, weight=like, group=group, in_bfloats=in_bfloats)

    def _find_consumers(self) -> None:
        """For each value, which roots it is computed for; and which values are stored because there are several."""
        self.valued: set[SSAValue] = set()
        for op in reversed(self.ops):
            for result in op.results:
                keys: set[object] = set()
                for use in result.uses:
                    keys |= self._keys_of_use(use.operation, use.index)
                self.keys[result] = keys
                if is_root_op(op):
                    continue
                if (len(keys) > 1 and not is_cheap(op)) or ("stored", result) in keys:
                    self.valued.add(result)

    def _keys_of_use(self, op: Operation, operand: int) -> set[object]:
        if isinstance(op, ReturnOp):
            return {("result", operand)}
        if isinstance(op, Matmul):
            prepares = ("prepare", op.x, self._input_format(op), known_scales(op))
            return {("stored", op.x) if operand == 0 and follows_product(op.x) else prepares}
        if isinstance(op, llm.AttendPagesOp):
            return {("stored", op.q)} if operand == 0 else {("attend", op)}
        if isinstance(op, llm.WritePagesOp):
            return {("write", op, operand)}
        if isinstance(op, TopKOp):
            return {("stored", op.operand)}  # it is read k times
        if is_root_op(op):
            return {("root", op)}
        (result,) = op.results
        keys: set[object] = {("stored", result)} if result in self.valued else set(self.keys[result])
        if isinstance(op, Norm) and operand == 0:
            keys.add(("statistics", op))
        return keys

    # Roots and items

    def _store_value(self, value: SSAValue, target: Buffer | None = None) -> None:
        owner = value.owner
        assert isinstance(owner, Operation)
        if target is None:
            target = Buffer.of(shape_of(value), scratch_element(dtype_of(value)))
        root = Root(
            order=self.index[owner],
            target=target,
            shape=shape_of(value),
            body=self.loops.storing(value, target),
            reads=(value,),
        )
        self.roots.append(root)
        self.pending.append((value, target))

    def run(self) -> Plan:
        """Plan the step."""
        self.pending: list[tuple[SSAValue, Buffer]] = []
        self._add_arguments()
        self._find_consumers()
        self._results()
        self.attentions = Attentions(self.module, self.stored, self.repeated, self.num_threads)
        matmuls: list[tuple[Matmul, Buffer]] = []
        for op in self.ops:
            if isinstance(op, Matmul):
                matmuls.append((op, self._product_buffer(op)))
            elif isinstance(op, llm.AttendPagesOp):
                self.attentions.reserve(op)
            elif isinstance(op, stablehlo.ReduceOp | stablehlo.ConcatenateOp | stablehlo.DotGeneralOp | TopKOp):
                for result in op.results:
                    self.stored.buffers[result] = Buffer.of(shape_of(result), scratch_element(dtype_of(result)))
            elif isinstance(op, llm.WritePagesOp):
                for which, (old, new) in enumerate(zip(op.operands[:2], op.results, strict=True)):
                    self.stored.buffers[new] = self.stored.buffers[old]
                    pages = self.stored.buffers[old]
                    value = (op.k, op.v)[which]
                    is_quantized = pages.scales is not None
                    self.roots.append(
                        Root(
                            order=self.index[op],
                            target=pages,
                            shape=shape_of(value),
                            body=writing_pages(self.loops, op, pages, which),
                            stem="write_pages",
                            emit=writing_quantized_pages(self.loops, op, pages, which) if is_quantized else None,
                            granule=shape_of(value)[2] if is_quantized else 1,
                            reads=(value, op.num_tokens, op.positions, op.seq_ids, op.block_tables),
                            which=which,
                        )
                    )
            elif isinstance(op, Norm):
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
        return assemble(
            self.module,
            self.items,
            self.attentions.kept,
            num_operands=self.num_operands,
            num_results=self.num_results,
            num_threads=self.num_threads,
            tokens=None if self.tokens is None else (self.stored.buffers[self.tokens.count], self.tokens.num_rows),
        )

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
                self.page_results.update(enumerate(held.parts, number))
                self.num_results += len(held.parts)
                continue
            self.num_results += 1
            buffer = Buffer.of(shape_of(value), memory_element(dtype_of(value)), place="result")
            buffer.offset = number
            self.result_buffers.append(buffer)
            is_product = isinstance(value.owner, Matmul)
            if (
                is_product
                and buffer.element == "float"
                and self.keys[value] == {("result", operand)}
                and value not in self.direct
            ):
                self.direct[value] = buffer
                continue
            root = Root(
                order=len(self.ops),
                target=buffer,
                shape=shape_of(value),
                body=self.loops.storing(value, buffer),
                reads=(value,),
            )
            self.roots.append(root)

    def _product_buffer(self, op: Matmul) -> Buffer:
        buffer = self.direct.get(op.output)
        if buffer is None:
            shape = shape_of(op.output)
            stride = round_up(shape[-1], ROWS)
            if stride % CACHE_PERIOD == 0 and len(shape) > 1:
                stride += ROWS
            buffer = Buffer.of(shape, "float", row_stride=stride)
        self.stored.buffers[op.output] = buffer
        return buffer

    @contextmanager
    def _computing(self, root: Root) -> Iterator[None]:
        """A root computes its own value, which others read."""
        value = self.own.get(id(root.target))
        held = self.stored.buffers.pop(value) if value is not None else None
        try:
            yield
        finally:
            if value is not None and held is not None:
                self.stored.buffers[value] = held

    def _structure(self, root: Root, *buffers: Buffer) -> Structure:
        return self.repeated.structure((*buffers, root.target), root.reads)

    def _probe(self, root: Root, domain: Domain) -> list[tuple[Buffer, Index]]:
        with self._computing(root):
            return list(self.loops.probe(domain, root.body(domain)))

    def _reads(self, root: Root) -> set[Buffer]:
        """The buffers that a root reads."""
        domain = rows_and_columns(root.shape)
        with self._computing(root):
            structure = self._structure(root)
        what = ("reads", root.stem, root.which, domain.rows, domain.columns)
        return set(self.repeated.kernel(what, structure, lambda: ("", [b for b, _ in self._probe(root, domain)]))[1])

    def _emit_root(self, root: Root, domain: Domain) -> tuple[str, list[Buffer]]:
        def emit() -> tuple[str, list[Buffer]]:
            return self.loops.over(domain, root.stem, root.body(domain)) if root.emit is None else root.emit(domain)

        with self._computing(root):
            what = (root.stem, root.which, domain.rows, domain.columns)
            return self.repeated.kernel(what, self._structure(root), emit)

    def _attach(self, root: Root, product: Buffer) -> Attached | None:
        with self._computing(root):
            structure = self._structure(root, product)
        what = ("attach", root.stem, root.which, root.shape, root.emit is None, root.granule)
        found = self.repeated.fact(what, structure, lambda: attach(root, product, self._probe))
        return None if found is None else replace(found, root=root)

    # Matmuls

    def _matmul_items(self, matmuls: list[tuple[Matmul, Buffer]]) -> None:
        producers = {buffer: self.index[op] for op, buffer in matmuls}
        reads: dict[Root, set[Buffer]] = {}
        for root in self.roots:
            reads[root] = self._reads(root)
        # where the value of a root is made, if not with a matmul
        made = {root.target: root.order for root in self.roots if root.target.place == "scratch"}
        made |= {buffer: self.index[op] for op, buffer in self.stored.statistics.items()}
        made |= {
            self.stored.buffers[result]: i
            for op, i in self.index.items()
            if isinstance(op, llm.AttendPagesOp | stablehlo.ReduceOp | stablehlo.DotGeneralOp | TopKOp)
            for result in op.results
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
            if len(attached) != len(mine) or not covers(attached, product):
                attached = []
            for each in attached:
                self.roots.remove(each.root)
            self._matmul_item(op, product, attached)

    def _prepare(self, op: Matmul) -> Buffer:
        """The input of a matmul, prepared once for all that take it so."""
        inputs = self._input_format(op)
        key = (op.x, inputs, known_scales(op))
        if key not in self.prepared:
            buffer = Buffer(shape=(), element="i8", strides=(), nbytes=inputs.nbytes)
            self.prepared[key] = buffer
            name, buffers = self.repeated.kernel(
                ("prepare", inputs),
                self.repeated.structure([buffer], [op.x, known_scales(op)]),
                lambda: prepare(self.loops, op.x, inputs, buffer, known_scales(op)),
            )
            columns = inputs.weight.num_columns
            kind = "tokens" if self._live(op.x) is not None else "rows"
            self._add_item(self.index[op] - 0.5, name, buffers, {buffer}, (kind, inputs.num_rows, columns))
        return self.prepared[key]

    def _live(self, value: SSAValue) -> Buffer | None:
        """Where the number of rows of a value that are no padding is, if its rows are tokens."""
        if self.tokens is None or not self.tokens.are_rows_of(value):
            return None
        return self.stored.buffers[self.tokens.count]

    def _matmul_item(self, op: Matmul, product: Buffer, attached: list[Attached]) -> None:
        prepared = self._prepare(op)
        inputs = self._input_format(op)
        layout = self.stored.formats[weight_of(op)]
        weight = self.stored.buffers[weight_of(op)]
        stride = product.strides[-2] if len(product.strides) > 1 else product.shape[-1]
        inputs = replace(inputs, weight=layout)
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

        step = max(1, ROWS_TOGETHER // at_once) * at_once
        rows = ProductRows(count=inputs.num_rows, live=live, step=step, is_few=is_few)
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
        rows: ProductRows,
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
        for op, i in self.index.items():
            if isinstance(op, llm.AttendPagesOp):
                self.items += self.attentions.items(op, i)
            elif isinstance(op, Norm):
                target = self.stored.statistics[op]
                name, buffers = self._statistics(op, target)
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
            elif isinstance(op, TopKOp):
                values, indices = (self.stored.buffers[result] for result in op.results)
                name, buffers = top_k(self.loops, op, values, indices)
                domain = rows_and_columns(shape_of(op.operand))
                work = domain.columns * op.k.value.data
                self._add_item(i, name, buffers, {values, indices}, ("rows", domain.rows, work))
            elif isinstance(op, stablehlo.ConcatenateOp):
                self._concatenate_items(op, i)

    def _statistics(self, op: Norm, target: Buffer) -> tuple[str, list[Buffer]]:
        structure = self.repeated.structure([target], [op.x])
        what = (op.name, op.epsilon)
        return self.repeated.kernel(what, structure, lambda: self.loops.statistics(op, target))

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


__all__ = ["Planner"]
