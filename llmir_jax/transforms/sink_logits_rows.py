"""Computes logits for the rows that are sampled, not for every token: the row gather sinks through the head and all
that comes after the last attention.

    %logits = stablehlo.dot_general %h, %head : … -> tensor<1x131x49152xf32>
    return %logits
      →
    %rows = stablehlo.gather %h, %logits_rows                        (tensor<1x8x576xf32>)
    %logits = stablehlo.dot_general %rows, %head : … -> tensor<1x8x49152xf32>

Operations that serve the logits alone are done again for the rows; where they read something the step needs anyway, its
rows are gathered. The rows take the place of the token axis, for `max_seqs` sequences. With `at_logits` nothing sinks:
logits are computed for every token and their rows gathered.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, TensorType
from xdsl.ir import Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.transforms.dead_code_elimination import dce

from llmir_jax.analysis.align import LENGTH, main_function
from llmir_jax.analysis.evaluate import external_operands
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, shape_of
from llmir_jax.errors import InvalidIRError
from llmir_jax.transforms import signature
from llmir_jax.transforms.resize import resize_properties, resized_type

_STOP = (
    llm.AttendPagesOp,
    llm.AttentionOp,
    llm.AppendKVOp,
    llm.LookupKVOp,
    llm.PagedAttentionOp,
    llm.WritePagesOp,
)
"""What reads or writes other tokens: rows are gathered of its results. Other llm ops treat each token on its own."""


def _needed(roots: list[SSAValue]) -> set[Operation]:
    """Operations that `roots` are computed from."""
    found: set[Operation] = set()
    pending = [x.owner for x in roots]
    while pending:
        op = pending.pop()
        if isinstance(op, Operation) and op not in found:
            found.add(op)
            pending += [x.owner for x in external_operands(op)]
    return found


class _FlattenedTokens(Exception):
    """Rows were asked of a value whose token axis is flattened with another: they are taken of the logits instead."""


@dataclass
class _Sinker:
    length: int
    rows: SSAValue
    others: set[Operation]
    done: dict[SSAValue, SSAValue]

    def of(self, value: SSAValue) -> SSAValue:
        """`value` with its token axis replaced by the rows."""
        if not self._runs_over_tokens(value):
            return value
        if value not in self.done:
            self._make(value)
        return self.done[value]

    def _make(self, value: SSAValue) -> None:
        pending = [value]
        while pending:
            top = pending[-1]
            if top in self.done:
                pending.pop()
                continue
            op = top.owner
            if not isinstance(op, Operation) or op in self.others or isinstance(op, _STOP):
                self.done[top] = self._gather(top)
                pending.pop()
                continue
            missing = [x for x in op.operands if self._runs_over_tokens(x) and x not in self.done]
            if missing:
                pending += missing
                continue
            self._clone(op)
            pending.pop()

    def _runs_over_tokens(self, value: SSAValue) -> bool:
        # a quantized weight is no tensor
        return isinstance(value.type, TensorType) and any(n and n % self.length == 0 for n in shape_of(value))

    def _clone(self, op: Operation) -> None:
        count = shape_of(self.rows)[0]
        mapping: dict[SSAValue, SSAValue] = {x: self.done[x] for x in op.operands if x in self.done}
        clone = op.clone(mapping)
        clone.properties.update(resize_properties(op, self.length, count))
        block = op.parent_block()
        assert block is not None and block.last_op is not None
        block.insert_op_before(clone, block.last_op)
        for old, new in zip(op.results, clone.results, strict=True):
            signature.retype(new, resized_type(old.type, self.length, count))
            self.done[old] = new

    def _gather(self, value: SSAValue) -> SSAValue:
        shape = shape_of(value)
        dim = next(d for d, n in enumerate(shape) if n and n % self.length == 0)
        if shape[dim] != self.length:
            raise _FlattenedTokens
        block = self.rows.owner
        assert isinstance(block, Block) and block.last_op is not None
        return OpBuilder(block.last_op).take(value, self.rows, dim)


@dataclass(frozen=True)
class SinkLogitsRowsPass(ModulePass):
    """Gather rows before the head."""

    name = "sink-logits-rows"

    at_logits: bool = False

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        length = op.attributes.get(LENGTH)
        if not isinstance(length, IntegerAttr):
            raise InvalidIRError(f"sink-logits-rows: the module has no attribute {LENGTH}")
        main = main_function(op)
        logits, *others = signature.results(main)
        rows = signature.argument(main, "logits_rows")
        stays = _needed([logits, *others])
        try:
            sunk = _Sinker(length.value.data, rows, stays if self.at_logits else _needed(others), {}).of(logits)
        except _FlattenedTokens:
            sunk = _Sinker(length.value.data, rows, stays, {}).of(logits)
        signature.set_results(main, [sunk, *others])
        dce(op)
