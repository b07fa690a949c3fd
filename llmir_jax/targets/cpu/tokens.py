"""Which values of a step have a row for each token, so that rows of padding need not be computed.

A step's model is pointwise along tokens outside of attention (the derivation refuses any other), so what is computed
for a row of padding reaches nothing but rows of padding, which nobody reads. A matmul or a norm keeps every dimension
but the last; if its input comes from the tokens, and not from the rows that logits are wanted of, and has as many rows
as there are tokens, then its rows are the tokens: any other dimension beside theirs would make it more.
"""

from dataclasses import dataclass

import numpy as np
from xdsl.dialects.func import FuncOp
from xdsl.ir import BlockArgument, SSAValue

from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.transforms import signature

_OF_TOKENS = ("tokens", "positions", "seq_ids")


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The token rows of a step."""

    count: BlockArgument  # num_tokens, int32 []
    num_rows: int  # T, padding included
    values: frozenset[SSAValue]
    """What comes from tokens, and not from some rows of them."""

    @staticmethod
    def of(main: FuncOp) -> "TokenRows | None":
        """Of @main; None if it has no attention that says how many tokens there are."""
        ops = [op for op in main.body.block.ops if isinstance(op, llm.AttendPagesOp)]
        counts = {op.num_tokens for op in ops}
        count = counts.pop() if len(counts) == 1 else None
        if not isinstance(count, BlockArgument):
            return None
        from_tokens: set[SSAValue] = {arg for role in _OF_TOKENS for arg in signature.arguments(main, role)}
        from_rows: set[SSAValue] = set(signature.arguments(main, "logits_rows"))
        for op in main.body.block.ops:
            for found in (from_tokens, from_rows):
                if any(operand in found for operand in op.operands):
                    found.update(op.results)
        return TokenRows(count=count, num_rows=shape_of(ops[0].q)[0], values=frozenset(from_tokens - from_rows))

    def are_rows_of(self, value: SSAValue) -> bool:
        """Whether all dimensions of a value but the last are the tokens."""
        return value in self.values and int(np.prod(shape_of(value)[:-1], dtype=np.int64)) == self.num_rows


__all__ = ["TokenRows"]
