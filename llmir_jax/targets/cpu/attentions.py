"""The attentions of a step as items, and what they share: scratch, counters, and the batch cut into runs."""

from xdsl.ir import SSAValue

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.targets.cpu.attention import AttentionBuffers, AttentionShape, attention_kernel
from llmir_jax.targets.cpu.attention_tiles import TileShape, least_run, runs_kernel, tiles_kernel
from llmir_jax.targets.cpu.expressions import Buffer, Stored
from llmir_jax.targets.cpu.kernel import Kernel
from llmir_jax.targets.cpu.llvm import Module
from llmir_jax.targets.cpu.repeated import Repeated
from llmir_jax.targets.cpu.schedule import Item, zeroing


class Attentions:
    """Makes the items of the attentions of one step."""

    def __init__(self, module: Module, stored: Stored, repeated: Repeated, num_threads: int):
        self._module, self._stored, self._repeated = module, stored, repeated
        self._num_threads = num_threads
        self._counters = Buffer.of((64,), "i32")
        self._partials = Buffer.of((16,), "float")
        self._tile_scratch = Buffer.of((16,), "float", place="private")
        self._runs: dict[tuple[SSAValue | int, ...], Buffer] = {}
        self._is_zeroed = False

    @property
    def kept(self) -> set[Buffer]:
        """What keeps its memory from step to step of the list."""
        return {self._counters, self._partials}

    def reserve(self, op: llm.AttendPagesOp) -> None:
        """Of all attentions, before `items` of any."""
        shape = AttentionShape.of(op, self._num_threads)
        self._stored.buffers[op.output] = Buffer.of(shape_of(op.output), "float")
        self._counters.nbytes = max(self._counters.nbytes, shape.counter_bytes)
        self._partials.nbytes = max(self._partials.nbytes, shape.scratch_bytes)

    def items(self, op: llm.AttendPagesOp, order: int) -> list[Item]:
        """Of one attention, with what must be done once before."""
        found = []
        if not self._is_zeroed:
            self._is_zeroed = True
            found.append(_item(-1, zeroing(self._module, self._counters), [self._counters], {self._counters}))
        runs, cutting = self._runs_of(op, order)
        found += cutting
        buffers = AttentionBuffers(
            q=self._stored.buffers[op.q],
            k_pages=self._stored.buffers[op.k_pages],
            v_pages=self._stored.buffers[op.v_pages],
            output=self._stored.buffers[op.output],
            partials=self._partials,
            counters=self._counters,
            tile_scratch=self._tile_scratch,
            runs=runs,
        )
        own = [self._partials, self._counters, *([] if runs is None else [self._tile_scratch])]
        structure = self._repeated.structure([buffers.output, *own, *([] if runs is None else [runs])], op.operands)
        name, used = self._repeated.kernel(structure.operation(op), structure, lambda: self._kernel(op, buffers))
        return [*found, _item(order, name, used, {buffers.output, *own}, is_read=set(used) - {buffers.output})]

    def _runs_of(self, op: llm.AttendPagesOp, order: int) -> tuple[Buffer | None, list[Item]]:
        """The batch cut into tiles, once for all attentions that cut it so; None where no tile fits."""
        shape = AttentionShape.of(op, self._num_threads)
        if shape.num_rows < least_run(self._module.host):
            return None, []
        tile = TileShape.of(shape, self._module.host)
        self._tile_scratch.nbytes = max(self._tile_scratch.nbytes, tile.scratch_bytes)
        key = (op.seq_ids, op.positions, op.num_tokens, tile.tokens)
        if key in self._runs:
            return self._runs[key], []
        runs = Buffer.of((shape.num_rows,), "i32", place="private")
        self._runs[key] = runs
        name, used = runs_kernel(self._module, self._stored, op, tile.tokens, runs)
        return runs, [_item(order - 0.125, name, used, {runs}, split=("each", shape.num_rows, 1))]

    def _kernel(self, op: llm.AttendPagesOp, buffers: AttentionBuffers) -> tuple[str, list[Buffer]]:
        """One function, since both kernels write rows of the output that are not each other's."""
        arguments = (self._module, self._stored, op, buffers, self._num_threads)
        by_token = attention_kernel(*arguments)
        if buffers.runs is None:
            return by_token
        kernel = Kernel(self._module, ("id", "n"))
        for name, used in (by_token, tiles_kernel(*arguments)):
            kernel.f.call(name, [kernel.number("id"), kernel.number("n"), *map(kernel.pointer, used)])
        return kernel.f.finish("attend_phase"), kernel.buffers


def _item(
    order: float,
    name: str,
    buffers: list[Buffer],
    writes: set[Buffer],
    *,
    is_read: set[Buffer] | None = None,
    split: tuple[str, int, int] = ("threads", 0, 0),
) -> Item:
    reads = set(buffers) - writes if is_read is None else is_read
    return Item(order=order, name=name, buffers=buffers, reads=reads, writes=writes, split=split)


__all__ = ["Attentions"]
