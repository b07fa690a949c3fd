"""Roots that follow a matmul: done by the thread that has just computed the columns that they read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from llmir_jax.targets.cpu.expressions import Buffer
from llmir_jax.targets.cpu.index import Index, Var
from llmir_jax.targets.cpu.layout import ROWS, round_up
from llmir_jax.targets.cpu.llvm import Number
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
    by_rows: bool  # whether its rows are the product's


@dataclass(frozen=True, kw_only=True)
class ProductRows:
    """How the rows of a product are gone through."""

    count: int
    live: Number  # of them, those that are no padding
    step: int  # computed before what reads them
    is_few: bool  # few enough to be computed at once, all


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
            offsets, width, by_rows = found
            best = Attached(root=root, domain=domain, offsets=offsets, width=width, by_rows=by_rows)
    return best


def _offsets(
    root: Root, domain: Domain, product: Buffer, stride: int, probe: Probe
) -> tuple[tuple[int, ...], int, bool] | None:
    """The columns that a root reads, its width, and whether each row reads the product's row of its number."""
    rows = np.unique(np.linspace(0, domain.rows - 1, 16).astype(np.int64))[:, None]
    columns = np.arange(domain.columns, dtype=np.int64)[None, :]
    variables: dict[Var, Any] = {domain.row(): rows, domain.column(1): columns}
    shape = (len(rows), domain.columns)
    places = [
        np.broadcast_to(place.evaluate(variables), shape) for buffer, place in probe(root, domain) if buffer is product
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


def covers(attached: list[Attached], product: Buffer) -> bool:
    """Whether every column is computed once."""
    taken = np.zeros(round_up(product.shape[-1], ROWS), np.int64)
    for each in attached:
        for offset in each.offsets:
            if offset % ROWS or (each.domain.columns % ROWS and offset + each.domain.columns != product.shape[-1]):
                return False
            taken[offset : offset + each.domain.columns] += 1
    return bool((taken[: product.shape[-1]] == 1).all())


__all__ = ["Attached", "ProductRows", "Root", "attach", "covers"]
