"""The model zoo: decoder-only models as different people write them, to derive decoders from or to refuse."""

from zoo import (
    depth,
    families,
    heads,
    libraries,
    linen_models,
    masks,
    nnx_models,
    pointwise,
    positions,
    refused_masks,
    refused_mixing,
    rotary,
    scores,
    tricky,
)
from zoo.registry import Derivable, Refused, Tricky, entries

__all__ = ["DERIVABLE", "REFUSED", "TRICKY"]

DERIVABLE: tuple[Derivable, ...] = entries(
    (scores, heads, masks, libraries, positions, rotary, depth, pointwise, linen_models, nnx_models, families),
    Derivable,
)
REFUSED: tuple[Refused, ...] = entries((refused_masks, refused_mixing), Refused)
TRICKY: tuple[Tricky, ...] = entries((tricky,), Tricky)
