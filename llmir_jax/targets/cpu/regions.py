"""Which operations of a step run as native code and which in XLA: the regions that they make.

Every operation has a level, even for native code and odd for XLA: the least one, of its kind, that is not less than
those of what it reads. All operations of a level are one region, so that there are as many as there must be one after
the other. An operation that costs nothing (a reshape, a constant …) belongs to no region: whatever reads it has a copy.

    native 0   embedding, norm, projections, attention, router        %scores = …
    XLA 1                                                             %sorted = stablehlo.sort(%scores)
    native 2   experts, the next layer …                              reads %sorted
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import BlockArgument, Operation, SSAValue

from llmir_jax.analysis.cost import multiply_adds
from llmir_jax.dialects import llm
from llmir_jax.interop import op_name
from llmir_jax.targets.cpu.expressions import is_cheap
from llmir_jax.targets.cpu.host import Host
from llmir_jax.targets.cpu.support import unsupported_reason

_PACKED = llm.LinearOp | llm.QuantizedMatmulOp | llm.QuantizedGatherOp
LEAST_SHARE = 0.5
"""Of a step's multiply-adds: with less of them in native code, the regions are not worth their calls."""


def reads(op: Operation) -> Iterator[SSAValue]:
    """Values that an operation reads, those that its regions capture included."""
    inside = set(op.walk())
    for inner in inside:
        for value in inner.operands:
            owner = value.owner
            parent = owner if isinstance(owner, Operation) else owner.parent_op()
            if parent not in inside:
                yield value


@dataclass(frozen=True, kw_only=True)
class InXla:
    """Operations of one kind that have no native code."""

    reason: str  # of the first: its name, where it is, and why, where there is more to say
    count: int

    def __str__(self) -> str:
        return self.reason if self.count == 1 else f"{self.reason}, and {self.count - 1} more"


@dataclass(frozen=True, kw_only=True)
class Split:
    """A step's operations by level."""

    levels: dict[Operation, int]
    """Of all but those that cost nothing."""
    in_xla: dict[str, InXla]
    """For each kind of operation of which some run in XLA, by name."""
    native_share: float
    """Of the multiply-adds."""

    @property
    def not_native(self) -> tuple[str, ...]:
        """Why no native code is worth while: nothing, if it is."""
        if self.native_share >= LEAST_SHARE and any(level % 2 == 0 for level in self.levels.values()):
            return ()
        share = f"native code exists for only {100 * self.native_share:.0f} % of its multiply-adds"
        return (share, *map(str, self.in_xla.values()))

    def root(self, value: SSAValue) -> SSAValue:
        """What a value is made of by operations that cost nothing: an argument, a constant, or of some level."""
        while isinstance(op := value.owner, Operation) and op not in self.levels and op.operands:
            value = op.operands[0]
        return value

    def level_of(self, value: SSAValue) -> int | None:
        """The level of what a value is made of; None for arguments and constants."""
        owner = self.root(value).owner
        return self.levels.get(owner) if isinstance(owner, Operation) else None

    def arguments(self, main: FuncOp, *, parity: int, packed: bool = False) -> set[BlockArgument]:
        """Arguments that native code (0) or XLA (1) reads; with `packed`, as the weight of a product or a lookup."""
        found = set()
        for op in main.body.block.ops:
            is_mine = self.levels[op] % 2 == parity if op in self.levels else isinstance(op, ReturnOp) and parity
            if not is_mine or (packed and not isinstance(op, _PACKED)):
                continue
            values = [op.w] if packed and isinstance(op, _PACKED) else list(reads(op))
            found |= {root for value in values if isinstance(root := self.root(value), BlockArgument)}
        return found

    def outputs(self, main: FuncOp) -> dict[int, list[SSAValue]]:
        """For each level, the values that others read, or that @main returns."""
        found: dict[int, dict[SSAValue, None]] = {level: {} for level in sorted(set(self.levels.values()))}
        for op in main.body.block.ops:
            if op not in self.levels and not isinstance(op, ReturnOp):
                continue
            for value in reads(op):
                level = self.level_of(value)
                if level is not None and level != self.levels.get(op):
                    found[level][value if isinstance(op, ReturnOp) else self.root(value)] = None
        return {level: list(values) for level, values in found.items()}


def split(main: FuncOp, host: Host | None = None) -> Split:
    """The levels of the operations of @main, for a host (this one, if none is given)."""
    levels: dict[Operation, int] = {}
    in_xla: dict[str, InXla] = {}
    result = Split(levels=levels, in_xla=in_xla, native_share=1.0)
    native = total = 0
    for op in main.body.block.ops:
        if isinstance(op, ReturnOp):
            continue
        reason = unsupported_reason(op, host)
        if reason is None and is_cheap(op):
            continue
        if reason is not None:
            first = in_xla.get(op_name(op), InXla(reason=reason, count=0))
            in_xla[op_name(op)] = replace(first, count=first.count + 1)
        parity = int(reason is not None)
        level = -parity
        for value in reads(op):
            other = result.level_of(value)
            if other is not None:
                level = max(level, other if other % 2 == parity else other + 1)
        levels[op] = level
        count = multiply_adds(op)
        total += count
        native += 0 if parity else count
    return Split(levels=levels, in_xla=in_xla, native_share=native / total if total else 1.0)


__all__ = ["LEAST_SHARE", "InXla", "Split", "reads", "split"]
