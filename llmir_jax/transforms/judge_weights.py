"""Judges the map from an attention's scores to its weights: which mask it is, or that it is none that can be served.

The operations between the two products are evaluated on scores and positions of choice (see `masks`), however they are
written: only what they compute counts, and that it is the same at every length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from xdsl.ir import Operation, OpResult, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import location
from llmir_jax.analysis.evaluate import Subgraph, backward_slice, external_operands, extract
from llmir_jax.analysis.layout import AtomDims, Atoms
from llmir_jax.analysis.masks import MaskForm, ScoreFunction, classify, consistent
from llmir_jax.analysis.token_axis import TokenAxis
from llmir_jax.dialects.build import dtype_of, scalar_constant, shape_of
from llmir_jax.interop import op_name

TOLERANCE = {2: 2e-2, 4: 2e-5, 8: 1e-6}
"""How far an evaluated weight may be from the hypothesis, by bytes of its float dtype."""


class NotRaised(Exception):
    """Why a candidate is no attention we know; kept as the reason of its violation."""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What raising needs besides the module."""

    positions: SSAValue
    max_seq_len: int
    parameter_values: Mapping[SSAValue, Any]
    """Arrays of the parameters, where a mask depends on one (a stored causal mask, say)."""
    contents: Callable[[SSAValue], tuple[Any, Any, Any]]
    """A value of positions that changes with the length: evaluated at the traced length, at the other one, and at the
    longest. Between scores and weights such a value may still be harmless (a constant added to all scores of a query):
    the map is judged with each content."""


def depends_on_tokens(axis: TokenAxis, value: SSAValue) -> bool:
    """Whether a value depends on what the tokens are, not on their positions alone."""
    info = axis.info.get(value)
    return info is not None and info.tokens


def opaque_inputs(axis: TokenAxis, scores: stablehlo.DotGeneralOp, outputs: Sequence[SSAValue]) -> list[SSAValue]:
    """Values between scores and weights that change with the length; each is judged at several lengths."""
    found: dict[SSAValue, None] = {}
    seen: set[SSAValue] = {scores.results[0]}
    pending = list(outputs)
    while pending:
        value = pending.pop()
        if value in seen or not isinstance(value, OpResult):
            continue
        seen.add(value)
        info = axis.info.get(value)
        if info is not None and info.opaque and not info.tokens:
            if value in axis.alignment.odd or any(d is not None and not d.plain for d in info.dims):
                raise NotRaised(f"the mask uses a value of positions that cannot be served: {info.opaque}")
            found[value] = None
            continue
        pending += external_operands(value.op)
    return list(found)


def _factors(part: Subgraph) -> list[float]:
    """Numbers that something in the subgraph is multiplied by or divided by."""
    found = []
    for op in part.module.walk():
        if isinstance(op, stablehlo.MultiplyOp | stablehlo.DivideOp):
            for operand in op.operands:
                constant = scalar_constant(operand)
                if constant is not None and constant.dtype.kind == "f" and float(constant):
                    found += [float(constant), 1.0 / float(constant)]
    return found


class WeightsJudge:
    """Judges attentions of one module; equal ones once, which `cache` holds."""

    def __init__(
        self, axis: TokenAxis, atoms: Atoms, options: AttentionOptions, cache: dict[Any, MaskForm | str]
    ) -> None:
        self.axis, self.atoms, self.options, self.cache = axis, atoms, options, cache
        self.length = axis.alignment.length

    def form_of(
        self,
        scores: stablehlo.DotGeneralOp,
        scores_dims: AtomDims,
        weights: SSAValue,
        weights_dims: AtomDims,
        heads: list[int],
        queries: int,
        keys: int,
        score: ScoreFunction,
        normaliser: SSAValue | None,
        normaliser_dims: AtomDims | None,
    ) -> MaskForm:
        """The mask between scores and weights. Raises NotRaised if it is none that can be served.

        Args:
            scores_dims: atoms of the scores' dims; so those of the weights, and of `normaliser`, if there is one: what
                the product of the weights is divided by.
            heads, queries, keys: the atoms of each.
            score: what happens to the scores first.
        """
        outputs = [weights] if normaliser is None else [weights, normaliser]
        opaque = opaque_inputs(self.axis, scores, outputs)
        part = extract(outputs, [scores.results[0], self.options.positions, *opaque])
        values = self._parameters(part, 2 + len(opaque))
        contents = [self.options.contents(x) for x in opaque]
        places = (scores_dims, weights_dims, normaliser_dims or [])
        sizes = tuple(self.atoms.shape([*heads, queries, keys]))
        layout = (*(tuple(map(tuple, dims)) for dims in places), tuple(heads), queries, keys, sizes, score)
        data = tuple(np.asarray(v).tobytes() for v in [*values.values(), *(x for c in contents for x in c)])
        key = (part.key, layout, data)
        if key not in self.cache:
            maps = [
                self._weights_function(
                    part,
                    values,
                    dict(zip(opaque, [c[which] for c in contents], strict=True)),
                    scores,
                    scores_dims,
                    weights_dims,
                    heads,
                    queries,
                    keys,
                    normaliser_dims,
                )
                for which in (2, 0, 1)
            ]
            self.cache[key] = self._judge(maps if opaque else maps[:1], part, score, heads, weights, scores)
        form = self.cache[key]
        if isinstance(form, str):
            raise NotRaised(form + self._mask_place(scores, weights))
        return form

    def _mask_place(self, scores: stablehlo.DotGeneralOp, weights: SSAValue) -> str:
        """Where the mask comes from, for a message."""
        ops, _ = backward_slice([weights], [scores.results[0]])
        for op in ops:
            if not depends_on_tokens(self.axis, op.results[0]):
                continue
            for operand in op.operands:
                info = self.axis.info.get(operand)
                if info is None or info.tokens or len(info.token_dims) != 2 or info.uniform:
                    continue
                source = operand.owner
                while isinstance(source, stablehlo.BroadcastInDimOp | stablehlo.ReshapeOp | stablehlo.ConvertOp):
                    source = source.operands[0].owner
                if isinstance(source, Operation):
                    return f"; the mask is made by {op_name(source)} at {location(source)}"
        return ""

    def _judge(
        self,
        maps: Sequence[Callable[[Any, Any], Any]],
        part: Subgraph,
        score: ScoreFunction,
        heads: list[int],
        weights: SSAValue,
        scores: stablehlo.DotGeneralOp,
    ) -> MaskForm | str:
        num_heads = prod(self.atoms.shape(heads))
        tolerance = TOLERANCE[max(2, min(dtype_of(weights).itemsize, dtype_of(scores.results[0]).itemsize))]
        form = classify(
            maps[0],
            score,
            heads=num_heads,
            length=self.length,
            max_seq_len=self.options.max_seq_len,
            tolerance=tolerance,
            factors=_factors(part),
        )
        lengths = (self.length, self.axis.alignment.other_length)
        for which, other in enumerate(maps[1:]):
            if isinstance(form, str):
                break
            reason = consistent(other, form, heads=num_heads, length=lengths[which], tolerance=tolerance, seed=which)
            if reason is not None:
                return f"it changes with the sequence length: {reason}"
        return form

    def _parameters(self, part: Subgraph, first: int) -> dict[SSAValue, Any]:
        values = {}
        for value in part.inputs[first:]:
            if value not in self.options.parameter_values:
                raise NotRaised("the mask depends on a parameter whose value is not known here")
            values[value] = self.options.parameter_values[value]
        return values

    def _weights_function(
        self,
        part: Subgraph,
        values: Mapping[SSAValue, Any],
        tables: Mapping[SSAValue, Any],
        scores: stablehlo.DotGeneralOp,
        scores_dims: AtomDims,
        weights_dims: AtomDims,
        heads: list[int],
        queries: int,
        keys: int,
        normaliser_dims: AtomDims | None,
    ) -> Callable[[Any, Any], Any]:
        order = [*heads, queries, keys]
        sizes = self.atoms.shape(order)
        flat_in = [a for d in scores_dims for a in d]
        flat_out = [a for d in weights_dims for a in d]
        dtype = dtype_of(scores.results[0])

        def run(s: Any, positions: Any) -> Any:
            count = len(positions)
            if count < self.length:
                s = np.pad(s, [(0, 0), *[(0, self.length - count)] * 2])
                positions = np.arange(self.length, dtype=np.int32)
            arranged = np.transpose(np.reshape(s, sizes), [order.index(a) for a in flat_in])
            inputs = {
                scores.results[0]: arranged.reshape(shape_of(scores.results[0])).astype(dtype),
                self.options.positions: positions,
                **values,
                **{x: self._rows(x, table, positions) for x, table in tables.items()},
            }
            out = part.run(inputs)
            got = out[0].astype(np.float64).reshape(self.atoms.shape(flat_out))
            got = np.transpose(got, [flat_out.index(a) for a in order])
            if normaliser_dims is not None:
                flat = [a for d in normaliser_dims for a in d]
                divisor = out[1].astype(np.float64).reshape(self.atoms.shape(flat))
                extra = tuple(i for i, a in enumerate(flat) if a not in order)
                if extra:
                    varied = np.ptp(divisor, axis=extra) > 1e-6 * np.abs(divisor).max(axis=extra)
                    if varied.any():
                        raise NotRaised("the sum that normalises the weights differs between the values' dims")
                    divisor = divisor.max(axis=extra)
                kept = [a for a in flat if a in order]
                divisor = np.transpose(divisor, [kept.index(a) for a in order if a in kept])
                shape = [self.atoms.sizes[a] if a in kept else 1 for a in order]
                got = got / divisor.reshape(shape)
            got = got.reshape(-1, self.length, self.length)[:, :count, :count]
            # a content for fewer tokens: the rest of the keys take no part
            return got if count == self.length else got / np.maximum(got.sum(-1, keepdims=True), 1e-300)

        return run

    def _rows(self, value: SSAValue, table: Any, positions: Any) -> Any:
        """Entries of a value that changes with the length, at `positions` along each of its token dims."""
        for dim in self.axis.info[value].token_dims:
            table = np.take(table, np.minimum(positions, table.shape[dim] - 1), axis=dim)
        return table


__all__ = ["TOLERANCE", "AttentionOptions", "NotRaised", "WeightsJudge", "depends_on_tokens", "opaque_inputs"]
