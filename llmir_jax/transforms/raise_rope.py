"""Raises rotary positions to ``llm.rope``.

    %a, %b = the halves of %x : tensor<1x7x9x64xf32>
    %y = concatenate(%a · cos − %b · sin, %b · cos + %a · sin)
      →
    %0 = stablehlo.reshape %x : (tensor<1x7x9x64xf32>) -> tensor<7x9x64xf32>
    %1 = llm.rope %0, %cos, %sin {rotary_dim = 64 : i64} : (…, tensor<7x32xf32>, tensor<7x32xf32>) -> tensor<7x9x64xf32>

A concatenation or a sum is a rotation if each of its features is x's own feature times a cosine plus or minus that of
its pair times a sine (see `features`), however the halves, or the even and odd features, were taken apart and put
together, in complex numbers too. Features that are not turned must come last. Cosines and sines may be any values that
depend on the token and the pair only; a table with every entry twice is cut to one of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, dense_i64, shape_of, tensor, type_of
from llmir_jax.transforms.features import Codes, Features, Source, TooLarge, first_equal
from llmir_jax.transforms.matching import (
    Rounding,
    element,
    identity,
    nontrivial,
    precision,
    replace,
    sole_use,
    widens,
)


@dataclass(frozen=True)
class Table:
    """Features `start`, `start + stride`, … of a source: one for each pair."""

    source: Source
    start: int
    stride: int
    token_dim: int


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Features `start` on of `x`, `num_features` of them, the first `rotary_dim` turned."""

    root: SSAValue
    num_leading: int
    x: SSAValue
    start: int
    num_features: int
    rotary_dim: int
    interleaved: bool
    cos: Table
    sin: Table
    computed_in: Attribute


# -- matching ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """For each feature its terms, [terms, features]: sign, feature of x, and code of the table (0: times one)."""

    sign: Codes
    x: Codes
    table: Codes


def _of_source(features: Features, terms: Sequence[tuple[Codes, Codes]], source: int) -> _Terms | None:
    """The terms, with the factor that is of `source` first; None if a term has no such factor, or two."""
    a, b = (np.stack([term[side].reshape(-1) for term in terms]) for side in (0, 1))
    used = a != 0
    from_a, from_b = (used & (x != 0) & (features.decode(x)[1] == source) for x in (a, b))
    if (from_a == from_b)[used].any():
        return None
    x, table = np.where(from_a, a, b), np.where(from_a, b, a)
    sign = np.sign(x) * np.where(table == 0, 1, np.sign(table))
    return _Terms(sign=sign, x=features.decode(x)[2], table=np.abs(table))


def _table_of(features: Features, codes: Codes, leading: Sequence[int]) -> Table | None:
    """The table that has these features, if it depends on one dim of the frame only."""
    _, sources, places = features.decode(codes)
    if (sources != sources[0]).any():
        return None
    source = features.sources[int(sources[0])]
    dims = [source.leading[d] for d in nontrivial(shape_of(source.value)[: len(source.leading)])]
    start = int(places[0])
    stride = int(places[1]) - start if len(places) > 1 else 1
    if len(dims) != 1 or dims[0] is None or stride < 1 or (places != start + stride * np.arange(len(places))).any():
        return None
    return Table(source, start, stride, dims[0])


def _canonical(features: Features, codes: Codes, known: dict[int, Codes]) -> Codes:
    """Codes of the first features that are equal to those given."""
    _, sources, places = features.decode(codes)
    out = np.empty_like(codes)
    for source in np.unique(sources):
        if source not in known:
            known[int(source)] = first_equal(features.sources[source])
        chosen = sources == source
        out[chosen] = features.encode(features.sources[source], known[int(source)][places[chosen]])
    return out


def _paired(features: Features, terms: _Terms, rotary_dim: int, interleaved: bool) -> tuple[Codes, Codes, int] | None:
    """Codes of the cosines and sines of each pair, and x's first feature, if the turned features pair up so."""
    j = np.arange(rotary_dim)
    half = rotary_dim // 2
    partner = j ^ 1 if interleaved else (j + half) % rotary_dim
    is_first = j < partner
    turned = [a[:2, :rotary_dim] for a in (terms.sign, terms.x, terms.table)]
    start = int(turned[1][:, 0].min())
    own_row = np.where(turned[1][0] == start + j, 0, 1)
    (own_sign, own, cos), (other_sign, other, sin) = ([a[row, j] for a in turned] for row in (own_row, 1 - own_row))
    if (own != start + j).any() or (other != start + partner).any():
        return None
    if (own_sign != 1).any() or (other_sign != np.where(is_first, -1, 1)).any():
        return None
    known: dict[int, Codes] = {}
    cos, sin = (_canonical(features, codes, known) for codes in (cos, sin))
    if (cos != cos[partner]).any() or (sin != sin[partner]).any():
        return None
    return cos[is_first], sin[is_first], start


def rotation_of(root: SSAValue, num_leading: int) -> Rotation | None:
    """The rotation that `root` is the result of."""
    shape = shape_of(root)
    leading = identity(shape[:num_leading])
    rounding = Rounding()
    rounding.note(root)
    features = Features(rounding)
    try:
        all_terms = features.terms(root, leading)
    except TooLarge:
        return None
    if len(all_terms) != 2 or not features.products or not rounding.allows(root):
        return None
    types = {element(value) for value in features.products}
    if len(types) != 1:
        return None
    factors = [int(features.decode(all_terms[0][side].reshape(-1)[:1])[1][0]) for side in (0, 1)]
    for source in factors:
        if source < 0 or precision(features.sources[source].value.type) is None:
            continue
        found = _rotation_of_source(features, all_terms, source, root, num_leading, next(iter(types)))
        if found is not None:
            return found
    return None


def _rotation_of_source(
    features: Features,
    all_terms: Sequence[tuple[Codes, Codes]],
    source: int,
    root: SSAValue,
    num_leading: int,
    computed_in: Attribute,
) -> Rotation | None:
    shape = shape_of(root)
    x = features.sources[source]
    own_leading = shape_of(x.value)[: len(x.leading)]
    if [x.leading[d] for d in nontrivial(own_leading)] != nontrivial(shape[:num_leading]):
        return None
    if not (widens(element(x.value), element(root)) or widens(element(root), element(x.value))):
        return None
    terms = _of_source(features, all_terms, source)
    if terms is None:
        return None
    num_features = prod(shape[num_leading:])
    is_turned = (terms.table != 0).all(axis=0)
    rotary_dim = int(is_turned.sum())
    if rotary_dim < 2 or rotary_dim % 2 or not is_turned[:rotary_dim].all():
        return None
    for interleaved in (False, True):
        paired = _paired(features, terms, rotary_dim, interleaved)
        if paired is None:
            continue
        cos, sin = (_table_of(features, codes, shape[:num_leading]) for codes in paired[:2])
        start = paired[2]
        kept = np.arange(rotary_dim, num_features)
        is_kept = (terms.table[0, kept] == 0) & (terms.sign[0, kept] == 1) & (terms.x[0, kept] == start + kept)
        alone = terms.sign[1, kept] == 0
        if cos is None or sin is None or cos.token_dim != sin.token_dim or not (is_kept & alone).all():
            return None
        return Rotation(
            root=root,
            num_leading=num_leading,
            x=x.value,
            start=start,
            num_features=num_features,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            cos=cos,
            sin=sin,
            computed_in=computed_in,
        )
    return None


# -- rewriting ---------------------------------------------------------------------------------------------------------


def _rounded(root: SSAValue) -> SSAValue:
    """The convert to a narrower float that alone reads `root`, through reshapes; or `root`."""
    value = root
    while (use := sole_use(value)) is not None and isinstance(use.operation, stablehlo.ReshapeOp | stablehlo.ConvertOp):
        value = use.operation.results[0]
        if isinstance(use.operation, stablehlo.ConvertOp):
            bits, before = precision(value.type), precision(root.type)
            return value if bits is not None and before is not None and bits < before else root
    return root


def _table(builder: OpBuilder, table: Table, count: int, computed_in: Attribute) -> SSAValue:
    """A table's `count` features as [T, count], in the type that the rotation is computed in."""
    value = table.source.value
    shape = shape_of(value)
    num_leading = len(table.source.leading)
    rows, width = prod(shape[:num_leading]), prod(shape[num_leading:])
    value = builder.reshape(value, (rows, width))
    if (table.start, table.stride, width) != (0, 1, count):
        value = builder.op(
            stablehlo.SliceOp,
            [value],
            tensor((rows, count), type_of(value).get_element_type()),
            start_indices=dense_i64((0, table.start)),
            limit_indices=dense_i64((rows, table.start + table.stride * (count - 1) + 1)),
            strides=dense_i64((1, table.stride)),
        )
    if table.source.part is not None:
        kind = stablehlo.RealOp if table.source.part == "real" else stablehlo.ImagOp
        value = builder.op(kind, [value], tensor((rows, count), element(value).element_type))  # type: ignore[attr-defined]
    return builder.convert(value, computed_in)


def build(rotation: Rotation) -> None:
    """Put the op in the place of the rotation's result."""
    root = _rounded(rotation.root)
    assert isinstance(rotation.root.owner, Operation) and isinstance(root.owner, Operation)
    builder = OpBuilder(rotation.root.owner)
    wanted = element(root)
    leading = shape_of(rotation.root)[: rotation.num_leading]
    rows = [leading[d] for d in nontrivial(leading)]
    token_first = nontrivial(leading)[0] == rotation.cos.token_dim
    num_tokens = leading[rotation.cos.token_dim]
    place = nontrivial(leading).index(rotation.cos.token_dim)

    width = prod(shape_of(rotation.x)) // prod(rows)
    x = builder.reshape(rotation.x, [*rows, width])
    x = builder.slice(x, [*(0 for _ in rows), rotation.start], [*rows, rotation.start + rotation.num_features])
    order = [place, *(d for d in range(len(rows)) if d != place), len(rows)]
    if not token_first:
        x = builder.transpose(x, order)
    moved = shape_of(x)
    x = builder.reshape(x, (num_tokens, prod(rows) // num_tokens, rotation.num_features))
    if widens(element(x), wanted):
        x = builder.convert(x, wanted)
    cos, sin = (
        _table(builder, table, rotation.rotary_dim // 2, rotation.computed_in) for table in (rotation.cos, rotation.sin)
    )
    op = llm.RopeOp(x, cos, sin, rotary_dim=rotation.rotary_dim, interleaved=rotation.interleaved)
    value = builder.convert(builder.insert(op).results[0], wanted)
    if not token_first:
        value = builder.transpose(builder.reshape(value, moved), np.argsort(order).tolist())
    replace(root, builder.reshape(value, shape_of(root)))


def _leading_counts(op: Operation) -> tuple[int, ...]:
    """How many dims of a candidate's result may be leading ones; none if it is no candidate."""
    rank = len(shape_of(op.results[0]))
    if isinstance(op, stablehlo.ConcatenateOp):
        if rank < 2 or op.dimension.value.data != rank - 1:
            return ()
        stacked = shape_of(op.results[0])[-1] == 2 and rank > 2
        return (rank - 2, rank - 1) if stacked else (rank - 1,)
    if isinstance(op, stablehlo.AddOp) and rank >= 2:
        products = all(isinstance(x.owner, stablehlo.MultiplyOp | stablehlo.ConvertOp) for x in op.operands)
        return (rank - 1,) if products else ()
    return ()


def raise_ropes(module: ModuleOp) -> int:
    """Raise every rotation of @main, in place, the outermost first; returns how many were raised."""
    count = 0
    for op in reversed(list(main_function(module).body.block.ops)):
        if op.parent is None or not isinstance(op, stablehlo.ConcatenateOp | stablehlo.AddOp):
            continue
        if precision(op.results[0].type) is None:
            continue
        for num_leading in _leading_counts(op):
            rotation = rotation_of(op.results[0], num_leading)
            if rotation is not None:
                build(rotation)
                count += 1
                break
    return count


@dataclass(frozen=True)
class RaiseRopePass(ModulePass):
    """Rotary positions."""

    name = "raise-rope"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        raise_ropes(op)
