"""Roots that follow a matmul: done by the thread that has just computed the columns that they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from llmir_jax.targets.cpu.expressions import Buffer
from llmir_jax.targets.cpu.index import Index, Var
from llmir_jax.targets.cpu.layout import ROWS, round_up
from llmir_jax.targets.cpu.loops import Body
from llmir_jax.targets.cpu.rows import Domain


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
    reads: tuple[SSAValue, ...]
    """The values that it is computed of."""
    which: int = 0
    """Tells it from other roots of the same stem and values."""


Probe = Callable[[Root, Domain], list[tuple[Buffer, Index]]]
"""What a root reads, as places in buffers."""


@dataclass(frozen=True, kw_only=True)
class Attached:
    """A root that is done where a matmul's columns are: its columns [c, c + width) need those from `offsets` + c on."""

    root: Root
    domain: Domain
    offsets: tuple[int, ...]
    width: int


def attach(root: Root, product: Buffer, probe: Probe) -> Attached | None:
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
        found = _offsets(root, domain, product, stride, probe)
        if found is not None:
            best = Attached(root=root, domain=domain, offsets=found[0], width=found[1])
    return best


def _offsets(
    root: Root, domain: Domain, product: Buffer, stride: int, probe: Probe
) -> tuple[tuple[int, ...], int] | None:
    rows = np.unique(np.linspace(0, domain.rows - 1, 4).astype(np.int64))[:, None]
    columns = np.arange(domain.columns, dtype=np.int64)[None, :]
    variables: dict[Var, Any] = {domain.row(): rows, domain.column(1): columns}
    shape = (len(rows), domain.columns)
    accessed = [
        np.broadcast_to(place.evaluate(variables) % stride, shape)
        for buffer, place in probe(root, domain)
        if buffer is product
    ]
    width = ROWS
    while width <= max(domain.columns, ROWS):
        if (width == ROWS or domain.columns % width == 0) and width % root.granule == 0:
            first = [int(read[:, :width].min()) // ROWS * ROWS for read in accessed]
            if all(
                ((read - offset) // width == columns // width).all()
                for read, offset in zip(accessed, first, strict=True)
            ):
                return tuple(sorted(set(first))), width
        width *= 2
    return None


def covers(attached: list[Attached], product: Buffer) -> bool:
    """Whether every column is computed once."""
    taken = np.zeros(round_up(product.shape[-1], ROWS), np.int64)
    for each in attached:
        for offset in each.offsets:
            if offset % ROWS or (each.domain.columns % ROWS and offset + each.domain.columns != product.shape[-1]):
                return False
            taken[offset : offset + each.domain.columns] += 1
    return bool((taken[: product.shape[-1]] == 1).all())


__all__ = ["Attached", "Root", "attach", "covers"]
