"""Parts of a module, taken out and run: what a subgraph computes is the surest description of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, BlockArgument, Operation, OpResult, Region, SSAValue

from llmir_jax.interop import call_module, op_name


def external_operands(op: Operation) -> list[SSAValue]:
    """Operands of `op`, and the values its regions read from outside of it."""
    values = list(op.operands)
    if op.regions:
        inside = {x for inner in op.walk() for region in inner.regions for block in region.blocks for x in block.args}
        inside |= {r for inner in op.walk() for r in inner.results}
        values += [x for inner in op.walk() if inner is not op for x in inner.operands if x not in inside]
    return values


def backward_slice(outputs: Sequence[SSAValue], inputs: Sequence[SSAValue]) -> tuple[list[Operation], list[SSAValue]]:
    """The operations that compute `outputs` from `inputs`, in order, and the block arguments they read besides."""
    stop = set(inputs)
    found: set[Operation] = set()
    arguments: dict[SSAValue, None] = {}
    pending = [x for x in outputs if x not in stop]
    while pending:
        value = pending.pop()
        if value in stop:
            continue
        if isinstance(value, BlockArgument):
            arguments[value] = None
            continue
        assert isinstance(value, OpResult)
        if value.op in found:
            continue
        found.add(value.op)
        pending += external_operands(value.op)
    if not found:
        return [], list(arguments)
    block = next(iter(found)).parent_block()
    assert block is not None
    return [op for op in block.ops if op in found], list(arguments)


@dataclass(frozen=True)
class Subgraph:
    """A module that computes some values of another: its @main takes `inputs` in order."""

    module: ModuleOp
    inputs: tuple[SSAValue, ...]
    key: Any
    """Equal for subgraphs that compute the same function of their inputs."""

    def run(self, values: Mapping[SSAValue, Any]) -> list[np.ndarray[Any, Any]]:
        """The outputs for the given inputs, computed on the CPU."""
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            args = [jax.numpy.asarray(values[x]) for x in self.inputs]
            return [np.asarray(x) for x in call_module(self.module, *args)]


def extract(outputs: Sequence[SSAValue], inputs: Sequence[SSAValue]) -> Subgraph:
    """The subgraph that computes `outputs` from `inputs` and whatever block arguments it reads."""
    ops, arguments = backward_slice(outputs, inputs)
    all_inputs = [*inputs, *arguments]
    block = Block(arg_types=[x.type for x in all_inputs])
    mapping: dict[SSAValue, SSAValue] = dict(zip(all_inputs, block.args, strict=True))
    for op in ops:
        block.add_op(op.clone(mapping))
    results = [mapping[x] for x in outputs]
    block.add_op(ReturnOp(*results))
    function = FuncOp("main", ([x.type for x in all_inputs], [x.type for x in results]), Region(block))
    return Subgraph(ModuleOp([function]), tuple(all_inputs), _key(ops, all_inputs, outputs))


def _key(ops: Sequence[Operation], inputs: Sequence[SSAValue], outputs: Sequence[SSAValue]) -> Any:
    """A hashable description of the computation, in which values are numbered in order of appearance."""
    numbers: dict[SSAValue, int] = {x: i for i, x in enumerate(inputs)}
    lines: list[Any] = [tuple(x.type for x in inputs)]

    def describe(op: Operation) -> Any:
        for region in op.regions:
            for block in region.blocks:
                for arg in block.args:
                    numbers[arg] = len(numbers)
        inner = tuple(describe(o) for region in op.regions for block in region.blocks for o in block.ops)
        public = (item for item in op.attributes.items() if not item[0].startswith("llmir."))
        attributes = tuple(sorted(public, key=lambda item: item[0]))
        line = (
            op_name(op),
            tuple(sorted(op.properties.items(), key=lambda item: item[0])),
            attributes,
            tuple(numbers[x] for x in op.operands),
            tuple(r.type for r in op.results),
            inner,
        )
        for r in op.results:
            numbers[r] = len(numbers)
        return line

    lines += [describe(op) for op in ops]
    lines.append(tuple(numbers[x] for x in outputs))
    return tuple(lines)
