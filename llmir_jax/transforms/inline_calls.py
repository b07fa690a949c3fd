"""Inlines every call of a private function and removes the functions.

    %1 = func.call @relu(%0) : …      →      the body of @relu, with %0 for its argument

MLIR's own inliner leaves these calls alone, for StableHLO gives it no inlining interface. Recursion does not occur in
modules that JAX makes. Calls inside regions (loop bodies, branches) are inlined too.
"""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass

from llmir_jax.interop import LOC


def _inline(call: func.CallOp, callee: func.FuncOp) -> list[Operation]:
    body = list(callee.body.block.ops)
    block = call.parent_block()
    assert block is not None
    mapping: dict[SSAValue, SSAValue] = dict(zip(callee.body.block.args, call.operands, strict=True))
    inlined = []
    for op in body[:-1]:
        clone = op.clone(mapping)
        if LOC in call.attributes:  # functions that callers share carry no location of their own
            clone.attributes.setdefault(LOC, call.attributes[LOC])
        block.insert_op_before(clone, call)
        inlined.append(clone)
    for old, new in zip(call.results, body[-1].operands, strict=True):
        old.replace_all_uses_with(mapping.get(new, new))
    call.detach()
    call.erase()
    return inlined


def inline_calls(module: ModuleOp) -> int:
    """Inline every call; returns how many were inlined."""
    functions = {op.sym_name.data: op for op in module.ops if isinstance(op, func.FuncOp)}
    public = [f for f in functions.values() if f.sym_visibility is None or f.sym_visibility.data != "private"]
    count = 0
    pending = [op for f in public for op in f.walk()]
    while pending:
        op = pending.pop()
        if not isinstance(op, func.CallOp):
            continue
        inlined = _inline(op, functions[op.callee.string_value()])
        pending += [inner for new in inlined for inner in new.walk()]
        count += 1
    for function in functions.values():
        if function not in public:
            function.detach()
            function.erase()
    return count


@dataclass(frozen=True)
class InlineCallsPass(ModulePass):
    """Inline private functions into their callers."""

    name = "inline-calls"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        inline_calls(op)
