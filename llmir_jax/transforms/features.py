"""Which feature of which value each feature of a result comes from, and which products of features it sums.

The dims of a value are its leading ones, indexed by the dims of a frame (see `matching`), and its features, the rest.
Slices, concatenations, reshapes and broadcasts of features become the same operations on small integer arrays, so that
every way to pair features, and every way to lay out a table for them, looks the same.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.dialects.builtin import DenseIntOrFPElementsAttr
from xdsl.ir import Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.dialects.build import ints, shape_of
from llmir_jax.interop import dense_to_numpy
from llmir_jax.transforms.matching import Index, Rounding, element, identity, precision, widens

Codes = np.ndarray[Any, np.dtype[np.int64]]
"""For each feature a source, made by `encode`, negated where the feature is its negative; 0 for none."""
Term = tuple[Codes, Codes]
"""A product of two features for each feature; of one alone where the second code is 0; none where the first is."""

_STRIDE = 1 << 24
_MAX_VISITS = 256
"""Operations looked at for one result; a rotation written out in full takes about 60."""
_ELEMENTWISE = (
    stablehlo.AddOp,
    stablehlo.ConvertOp,
    stablehlo.CosineOp,
    stablehlo.DivideOp,
    stablehlo.ExponentialOp,
    stablehlo.MultiplyOp,
    stablehlo.NegateOp,
    stablehlo.PowerOp,
    stablehlo.SelectOp,
    stablehlo.SineOp,
    stablehlo.SubtractOp,
)


@dataclass(frozen=True)
class Source:
    """A value that features come from; `part` of it where it is complex."""

    value: SSAValue
    leading: Index
    part: str | None = None


class TooLarge(Exception):
    """A result is computed by more than a rotation can take."""


def _leading_after_reshape(op: stablehlo.ReshapeOp, leading: Index) -> Index | None:
    """The operand's leading dims, if a reshape leaves the result's as they are, but for dims of size 1."""
    before, after = shape_of(op.operands[0]), shape_of(op.results[0])
    wanted = [(n, d) for n, d in zip(after, leading, strict=False) if n != 1]
    found: list[int | None] = []
    for n in before:
        if not wanted:
            break
        if n == 1:
            found.append(None)
            continue
        size, dim = wanted.pop(0)
        if n != size:
            return None
        found.append(dim)
    return None if wanted else tuple(found)


def operand_leading(op: Operation, leading: Index) -> list[Index] | None:
    """The leading dims of each operand of a layout of features; None if `op` is none, or lays out leading dims."""
    count = len(leading)
    if isinstance(op, stablehlo.ReshapeOp):
        found = _leading_after_reshape(op, leading)
        return None if found is None else [found]
    if isinstance(op, stablehlo.ConcatenateOp):
        return [leading] * len(op.operands) if op.dimension.value.data >= count else None
    if isinstance(op, stablehlo.SliceOp):
        shape = shape_of(op.operands[0])
        whole = all(
            (a, b, s) == (0, n, 1)
            for a, b, s, n in zip(
                *(ints(x)[:count] for x in (op.start_indices, op.limit_indices, op.strides)), shape, strict=False
            )
        )
        return [leading] if whole else None
    if isinstance(op, stablehlo.TransposeOp):
        permutation = ints(op.permutation)
        return [leading] if permutation[:count] == tuple(range(count)) else None
    if isinstance(op, stablehlo.BroadcastInDimOp):
        dims = ints(op.broadcast_dimensions)
        if list(dims) != sorted(dims):
            return None
        shape = shape_of(op.operands[0])
        return [tuple(None if n == 1 else leading[d] for n, d in zip(shape, dims, strict=True) if d < count)]
    return None


def lay_out(op: Operation, leading: Index, operands: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The features of a layout's result from those of its operands."""
    count = len(leading)
    shape = shape_of(op.results[0])[count:]
    array = operands[0]
    if isinstance(op, stablehlo.ReshapeOp):
        return array.reshape(shape)
    if isinstance(op, stablehlo.ConcatenateOp):
        return np.concatenate(operands, axis=op.dimension.value.data - count)
    if isinstance(op, stablehlo.SliceOp):
        bounds = zip(*(ints(x)[count:] for x in (op.start_indices, op.limit_indices, op.strides)), strict=True)
        return array[tuple(slice(*bound) for bound in bounds)]
    if isinstance(op, stablehlo.TransposeOp):
        return array.transpose([d - count for d in ints(op.permutation)[count:]])
    assert isinstance(op, stablehlo.BroadcastInDimOp)
    places = [d - count for d in ints(op.broadcast_dimensions) if d >= count]
    sizes = dict(zip(places, array.shape, strict=True))
    return np.broadcast_to(array.reshape([sizes.get(d, 1) for d in range(len(shape))]), shape)


@dataclass
class Features:
    """Sources and products behind the features of one result, whose first `num_leading` dims are the frame."""

    rounding: Rounding
    sources: list[Source] = field(default_factory=list)
    products: list[SSAValue] = field(default_factory=list)
    """The products met, whose type is that of the computation."""
    _ids: dict[Source, int] = field(default_factory=dict)
    _visits: int = 0

    def encode(self, source: Source, features: np.ndarray[Any, Any]) -> Codes:
        """Codes of some features of a source."""
        if source not in self._ids:
            self._ids[source] = len(self.sources)
            self.sources.append(source)
        return np.asarray(features, np.int64) + 1 + self._ids[source] * _STRIDE

    @staticmethod
    def decode(codes: Codes) -> tuple[Codes, Codes, Codes]:
        """Sign, index into `sources`, and feature."""
        positive = np.abs(codes) - 1
        return np.sign(codes), positive // _STRIDE, positive % _STRIDE

    def _visit(self) -> None:
        self._visits += 1
        if self._visits > _MAX_VISITS:
            raise TooLarge

    def _converted(self, value: SSAValue) -> SSAValue | None:
        """The operand of a convert of floats, noted if it rounds."""
        if not isinstance(value.owner, stablehlo.ConvertOp):
            return None
        inner: SSAValue = value.owner.operands[0]
        if precision(inner.type) is None or precision(value.type) is None:
            return None
        if not widens(element(inner), element(value)):
            self.rounding.note(value)
        return inner

    def of(self, value: SSAValue, leading: Index, part: str | None = None) -> Codes:
        """The sources of the features of `value`."""
        self._visit()
        op = value.owner
        inner = self._converted(value)
        if inner is not None:
            return self.of(inner, leading, part)
        if isinstance(op, stablehlo.NegateOp):
            return -self.of(op.operands[0], leading, part)
        if isinstance(op, Operation):
            below = operand_leading(op, leading)
            if below is not None:
                return lay_out(
                    op, leading, [self.of(x, lead, part) for x, lead in zip(op.operands, below, strict=True)]
                )
        shape = shape_of(value)[len(leading) :]
        return self.encode(Source(value, leading, part), np.arange(int(np.prod(shape))).reshape(shape))

    def terms(self, value: SSAValue, leading: Index) -> list[Term]:
        """What each feature of `value` is the sum of."""
        self._visit()
        op = value.owner
        inner = self._converted(value)
        if inner is not None:
            return self.terms(inner, leading)
        if isinstance(op, stablehlo.NegateOp):
            return _negated(self.terms(op.operands[0], leading))
        if isinstance(op, stablehlo.AddOp | stablehlo.SubtractOp):
            self.rounding.note(value)
            left, right = (self.terms(x, leading) for x in op.operands)
            return left + (_negated(right) if isinstance(op, stablehlo.SubtractOp) else right)
        if isinstance(op, stablehlo.MultiplyOp):
            self.rounding.note(value)
            self.products.append(value)
            a, b = op.operands
            return [(self.of(a, leading), self.of(b, leading))]
        if isinstance(op, stablehlo.RealOp | stablehlo.ImagOp):
            product = self._complex_product(op, leading)
            if product is not None:
                return product
        if isinstance(op, Operation):
            below = operand_leading(op, leading)
            if below is not None:
                return list(self._laid_out(op, leading, below))
        codes = self.of(value, leading)
        return [(codes, np.zeros_like(codes))]

    def _laid_out(self, op: Operation, leading: Index, below: Sequence[Index]) -> Iterator[Term]:
        operands = [self.terms(x, lead) for x, lead in zip(op.operands, below, strict=True)]
        for i in range(max(map(len, operands))):
            padded = [terms[i] if i < len(terms) else _nothing(terms[0]) for terms in operands]
            a, b = (lay_out(op, leading, [term[side] for term in padded]) for side in (0, 1))
            yield a, b

    def _complex_product(self, op: stablehlo.RealOp | stablehlo.ImagOp, leading: Index) -> list[Term] | None:
        """Of (a + bi)(c + di): ac − bd, or bc + ad, for c + di of any origin."""
        product = op.operands[0].owner
        if not isinstance(product, stablehlo.MultiplyOp):
            return None
        pair, table = product.operands
        if not isinstance(pair.owner, stablehlo.ComplexOp):
            pair, table = table, pair
        if not isinstance(pair.owner, stablehlo.ComplexOp):
            return None
        self.products.append(op.results[0])
        self.rounding.note(op.results[0])
        a, b = (self.of(x, leading) for x in pair.owner.operands)
        real, imag = (self.of(table, leading, part) for part in ("real", "imag"))
        return [(a, real), (-b, imag)] if isinstance(op, stablehlo.RealOp) else [(b, real), (a, imag)]


def _negated(terms: Sequence[Term]) -> list[Term]:
    return [(-a, b) for a, b in terms]


def _nothing(term: Term) -> Term:
    return np.zeros_like(term[0]), np.zeros_like(term[1])


# -- which features are equal ------------------------------------------------------------------------------------------


def _names(value: SSAValue, leading: Index, depth: int = 0) -> np.ndarray[Any, Any]:
    """A name for each feature; features of the same name are equal."""
    op = value.owner
    shape = shape_of(value)[len(leading) :]
    if isinstance(op, Operation) and depth < _MAX_VISITS:
        below = operand_leading(op, leading)
        if below is not None:
            operands = [_names(x, lead, depth + 1) for x, lead in zip(op.operands, below, strict=True)]
            return lay_out(op, leading, operands)
        if isinstance(op, _ELEMENTWISE):
            operands = [_names(x, leading[: len(shape_of(x))], depth + 1) for x in op.operands]
            return _combined(op, shape, operands)
        if isinstance(op, stablehlo.ConstantOp):
            return _columns(op, leading)
        if isinstance(op, stablehlo.GatherOp) and _takes_rows(op, len(shape)):
            table = op.operands[0]
            rows = _names(table, identity(shape_of(table)[: -len(shape)]), depth + 1)
            return _named(shape, [(op.operands[1], leading, name) for name in rows.reshape(-1)])
    return _named(shape, [(value, leading, i) for i in range(int(np.prod(shape)))])


def _named(shape: Sequence[int], names: Sequence[Hashable]) -> np.ndarray[Any, Any]:
    array = np.empty(len(names), object)
    array[:] = list(names)
    return array.reshape(shape)


def _combined(op: Operation, shape: Sequence[int], operands: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    flat = [np.broadcast_to(x, shape).reshape(-1) for x in operands]
    result = op.results[0].type
    return _named(shape, [(op.name, result, *names) for names in zip(*flat, strict=True)])


def _columns(op: stablehlo.ConstantOp, leading: Index) -> np.ndarray[Any, Any]:
    value, shape = op.value, shape_of(op.results[0])[len(leading) :]
    assert isinstance(value, DenseIntOrFPElementsAttr)
    columns = dense_to_numpy(value).reshape(-1, int(np.prod(shape))).T
    return _named(shape, [(leading, np.ascontiguousarray(column).tobytes()) for column in columns])


def _takes_rows(op: stablehlo.GatherOp, num_features: int) -> bool:
    """Whether the last dims of the result, its features, are those of the operand, whole."""
    numbers = op.dimension_numbers
    rank, table = len(shape_of(op.results[0])), shape_of(op.operands[0])
    kept = range(len(table) - num_features, len(table))
    fields = (numbers.collapsed_slice_dims, numbers.start_index_map, numbers.operand_batching_dims)
    indexed = {dim for dims in fields for dim in ints(dims)}
    return (
        0 < num_features < len(table)
        and ints(numbers.offset_dims)[-num_features:] == tuple(range(rank - num_features, rank))
        and not indexed.intersection(kept)
        and ints(op.slice_sizes)[-num_features:] == table[-num_features:]
    )


def first_equal(source: Source) -> np.ndarray[Any, Any]:
    """For each feature of a source, the first that is equal to it."""
    first: dict[Hashable, int] = {}
    names = _names(source.value, source.leading).reshape(-1)
    return np.asarray([first.setdefault(name, i) for i, name in enumerate(names)], np.int64)


__all__ = ["Codes", "Features", "Source", "Term", "TooLarge", "first_equal"]
