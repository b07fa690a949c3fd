"""What XLA made of a partitioned program: memory of a device, and the collectives in its text.

For checking the cost model, and for what only the compiler knows: the memory that a step's intermediate values take.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_COLLECTIVE = re.compile(
    r"= (?P<result>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_PACKED = {"s4": 0.5, "u4": 0.5, "pred": 1.0}  # bytes


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """Bytes are a device's."""

    argument_bytes: int
    temporary_bytes: int
    """Of intermediate values at their most."""
    output_bytes: int
    """Of results that are not in the memory of donated arguments."""
    operations: float
    """Additions and multiplications, as XLA counts them; in a loop once."""
    collectives: Counter[tuple[str, int]]
    """How many of each kind and size of the result, in bytes; in a loop once. One of several arrays is one."""

    @classmethod
    def of(cls, compiled: Any) -> "CompiledProgram":
        """Of a `jax.stages.Compiled`."""
        memory = compiled.memory_analysis()
        return cls(
            argument_bytes=memory.argument_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            output_bytes=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
            operations=(compiled.cost_analysis() or {}).get("flops", 0.0),
            collectives=Counter(collectives_in(compiled.as_text())),
        )

    def with_layers(self, num_layers: int, *, of: int, next_layer: "CompiledProgram") -> "CompiledProgram":
        """That of `num_layers`, where this one has `of` layers and `next_layer` is it with one more."""
        more = num_layers - of

        def extended(own: int, other: int) -> int:
            return own + more * max(other - own, 0)

        added = next_layer.collectives - self.collectives
        total = self.collectives.copy()
        for key, count in added.items():
            total[key] += count * more
        return CompiledProgram(
            argument_bytes=extended(self.argument_bytes, next_layer.argument_bytes),
            # a layer's own are free when the next one runs; what grows is kept through all
            temporary_bytes=extended(self.temporary_bytes, next_layer.temporary_bytes),
            output_bytes=extended(self.output_bytes, next_layer.output_bytes),
            operations=self.operations + more * (next_layer.operations - self.operations),
            collectives=total,
        )


def collectives_in(text: str) -> Iterator[tuple[str, int]]:
    """(kind, bytes of the result on a device) of every collective in an optimised program's text."""
    for match in _COLLECTIVE.finditer(text):
        sizes = [_nbytes(*array.groups()) for array in _ARRAY.finditer(match["result"])]
        if match["start"] and match["kind"] in ("all-gather", "collective-permute"):
            sizes = sizes[1:2]  # the operand, the result, and what is of no interest here
        yield match["kind"], sum(sizes)


def _nbytes(kind: str, dims: str) -> int:
    itemsize = _PACKED.get(kind) or int(re.findall(r"\d+", kind)[0]) / 8
    return int(math.prod(map(int, filter(None, dims.split(",")))) * itemsize)
