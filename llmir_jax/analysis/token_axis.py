"""Token-axis analysis: which dim of every value runs over tokens, and which operations mix tokens.

A forward can be served step by step exactly when everything outside attention treats each token on its own. This
module states that as a dataflow problem. For every value it finds the dims that run over tokens (from two traces at
different lengths, see `align`), whether it depends on the tokens' contents or on their positions alone, and for every
operation why it is not token-pointwise, if it is not. Nothing is decided by how the model was written.

What is exempt: values that depend on positions alone may be computed in any way, for they can be tabulated; attention
is raised and taken out before anything is refused.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xdsl.dialects.builtin import DenseIntOrFPElementsAttr, UnregisteredOp
from xdsl.ir import Operation, SSAValue
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import Alignment, location
from llmir_jax.analysis.evaluate import external_operands
from llmir_jax.analysis.reshape import Dims, TokenDim, agree, reshape_dims
from llmir_jax.dialects.build import ints, shape_of
from llmir_jax.interop import dense_to_numpy, op_name


@dataclass(frozen=True, kw_only=True)
class ValueInfo:
    """What the analysis knows of a value: its token dims, and what its contents depend on."""

    dims: Dims
    tokens: bool = False
    positions: bool = False
    params: bool = False
    opaque: str | None = None
    """Set on a value of positions alone that is no pointwise function of them: why."""

    @property
    def token_dims(self) -> tuple[int, ...]:
        """Indices of the dims that run over tokens."""
        return tuple(d for d, dim in enumerate(self.dims) if dim is not None)

    @property
    def uniform(self) -> bool:
        """Whether the value is the same at every token."""
        return not (self.tokens or self.positions)


@dataclass
class TokenAxis:
    """The result of the analysis on one module."""

    alignment: Alignment
    info: dict[SSAValue, ValueInfo] = field(default_factory=dict)
    violations: dict[Operation, str] = field(default_factory=dict)
    tables: list[SSAValue] = field(default_factory=list)
    """Values of positions alone that are not pointwise but proved to be tables of the position."""
    table_slices: list[Operation] = field(default_factory=list)
    """Slices `table[:T]` of something that does not run over tokens."""


class _Rules:
    """Transfer functions: (dims of each result, reason the operation is not token-pointwise or None)."""

    def __init__(self, axis: TokenAxis):
        self.axis = axis
        self.length = axis.alignment.length

    def dims(self, value: SSAValue) -> Dims:
        return self.axis.info[value].dims

    def sized(self, value: SSAValue) -> Dims:
        """Token dims by size alone, as the alignment saw them."""
        multiples = self.axis.alignment.token_sized.get(value)
        if multiples is None:  # an odd size: no dim of it is the token axis
            return (None,) * len(shape_of(value))
        return tuple(TokenDim(1, m) if m else None for m in multiples)

    def spread(self, value: SSAValue) -> Dims:
        """Token dims by size, of a value that is the same all along each of them."""
        return tuple(dim and TokenDim(1, dim.inner, True) for dim in self.sized(value))

    def join(self, values: Sequence[SSAValue]) -> tuple[Dims, str | None]:
        """The common token dims of values of one shape."""
        return self.join_dims([self.dims(x) for x in values])

    def join_dims(self, all_dims: Sequence[Dims]) -> tuple[Dims, str | None]:
        """The token dims that all of these agree on."""
        joined: list[TokenDim | None] = list(all_dims[0])
        reason = None
        for dims in all_dims[1:]:
            for d, dim in enumerate(dims):
                joined[d], same = agree(joined[d], dim)
                if not same:
                    reason = "combines token axes that were flattened in different orders"
        return tuple(joined), reason

    def elementwise(self, op: Operation) -> tuple[list[Dims], str | None]:
        shape = shape_of(op.results[0])
        full = [x for x in op.operands if shape_of(x) == shape]
        dims, reason = self.join(full) if full else (self.sized(op.results[0]), None)
        return [dims] * len(op.results), reason

    def barrier(self, op: Operation) -> tuple[list[Dims], str | None]:
        return [self.dims(x) for x in op.operands], None

    def reshape(self, op: Operation) -> tuple[list[Dims], str | None]:
        (x,) = op.operands
        dims, reason = reshape_dims(shape_of(x), self.dims(x), shape_of(op.results[0]), self.length)
        return [dims], reason

    def transpose(self, op: stablehlo.TransposeOp) -> tuple[list[Dims], str | None]:
        dims = self.dims(op.operand)
        return [tuple(dims[p] for p in ints(op.permutation))], None

    def broadcast(self, op: stablehlo.BroadcastInDimOp) -> tuple[list[Dims], str | None]:
        source, shape = self.dims(op.operand), shape_of(op.operand)
        result = list(self.spread(op.result))
        for d, target in enumerate(ints(op.broadcast_dimensions)):
            if shape[d] != 1:
                result[target] = source[d]
        return [tuple(result)], None

    def dot_general(self, op: stablehlo.DotGeneralOp) -> tuple[list[Dims], str | None]:
        numbers = op.dot_dimension_numbers
        lhs, rhs = self.dims(op.lhs), self.dims(op.rhs)
        lhs_batch, rhs_batch = ints(numbers.lhs_batching_dimensions), ints(numbers.rhs_batching_dimensions)
        lhs_sum, rhs_sum = ints(numbers.lhs_contracting_dimensions), ints(numbers.rhs_contracting_dimensions)
        reason = None
        result: list[TokenDim | None] = []
        for a, b in zip(lhs_batch, rhs_batch, strict=True):
            dim, same = agree(lhs[a], rhs[b])
            result.append(dim)
            if not same:
                reason = "batches over token axes that were flattened in different orders"
        result += [dim for d, dim in enumerate(lhs) if d not in lhs_batch + lhs_sum]
        result += [dim for d, dim in enumerate(rhs) if d not in rhs_batch + rhs_sum]
        if any(lhs[a] is not None or rhs[b] is not None for a, b in zip(lhs_sum, rhs_sum, strict=True)):
            reason = "sums over the token axis"
        return [tuple(result)], reason

    def reduce(self, op: stablehlo.ReduceOp) -> tuple[list[Dims], str | None]:
        over = ints(op.dimensions)
        dims, reason = self.join(list(op.inputs))
        if any(dims[d] is not None for d in over):
            reason = f"reduces over the token axis (dim {next(d for d in over if dims[d] is not None)})"
        kept = tuple(dim for d, dim in enumerate(dims) if d not in over)
        return [kept] * len(op.results), reason

    def concatenate(self, op: stablehlo.ConcatenateOp) -> tuple[list[Dims], str | None]:
        along = op.dimension.value.data
        stripped = [self.dims(x)[:along] + self.dims(x)[along + 1 :] for x in op.inputs]
        rest, reason = self.join_dims(stripped)
        if any(self.dims(x)[along] is not None for x in op.inputs):
            reason = f"concatenates along the token axis (dim {along})"
        return [(*rest[:along], None, *rest[along:])], reason

    def slice(self, op: stablehlo.SliceOp) -> tuple[list[Dims], str | None]:
        return self.window(op, ints(op.start_indices), ints(op.strides))

    def window(
        self, op: Operation, starts: Sequence[int | None], strides: Sequence[int]
    ) -> tuple[list[Dims], str | None]:
        """A window of operand 0: whole along token dims, or T rows of a table, from a fixed one on."""
        fixed_start = "start_indices" not in self.axis.alignment.varying.get(op, ())
        source, target = op.operands[0], op.results[0]
        result = list(self.dims(source))
        sized = self.sized(target)
        reason = None
        for d, (m, n) in enumerate(zip(shape_of(source), shape_of(target), strict=True)):
            if result[d] is not None:
                if m != n or starts[d] != 0:
                    reason = f"takes part of the token axis (dim {d})"
            elif sized[d] is not None:
                if not fixed_start or starts[d] is None or strides[d] != 1 or n != self.length:
                    reason = f"takes a part of dim {d} that is not a table's rows from a fixed one on"
                result[d] = sized[d]
        return [tuple(result)], reason

    def dynamic_slice(self, op: Operation) -> tuple[list[Dims], str | None]:
        from llmir_jax.transforms.unroll_loops import constant_of

        starts = [constant_of(x) for x in op.operands[1:]]
        known = [None if s is None else int(s) for s in starts]
        same = shape_of(op.operands[0])
        out = shape_of(op.results[0])
        known = [0 if m == n else k for m, n, k in zip(same, out, known, strict=True)]  # a whole dim is clamped to 0
        return self.window(op, known, [1] * len(known))

    def dynamic_update_slice(self, op: Operation) -> tuple[list[Dims], str | None]:
        source, update = op.operands[0], op.operands[1]
        reason = None
        for d, (m, n) in enumerate(zip(shape_of(source), shape_of(update), strict=True)):
            if (self.dims(source)[d] is not None or self.dims(update)[d] is not None) and m != n:
                reason = f"updates part of the token axis (dim {d})"
        dims, mixed = self.join([source, update])
        return [dims], reason or mixed

    def pad(self, op: stablehlo.PadOp) -> tuple[list[Dims], str | None]:
        dims = self.dims(op.operand)
        for d, amounts in enumerate(
            zip(ints(op.edge_padding_low), ints(op.edge_padding_high), ints(op.interior_padding), strict=True)
        ):
            if dims[d] is not None and any(amounts):
                return [dims], f"pads or shifts the token axis (dim {d})"
        return [dims], None

    def along(self, op: Operation, over: Sequence[int], verb: str) -> tuple[list[Dims], str | None]:
        """An operation that works along the dims `over` and keeps the others apart."""
        dims, reason = self.join([x for x in op.operands if shape_of(x) == shape_of(op.operands[0])])
        if any(dims[d] is not None for d in over):
            reason = f"{verb} along the token axis (dim {next(d for d in over if dims[d] is not None)})"
        return [dims if len(shape_of(r)) == len(dims) else self.sized(r) for r in op.results], reason

    def gather(self, op: stablehlo.GatherOp) -> tuple[list[Dims], str | None]:
        numbers = op.dimension_numbers
        offset = ints(numbers.offset_dims)
        collapsed = ints(numbers.collapsed_slice_dims)
        operand_batch = ints(numbers.operand_batching_dims)
        index_batch = ints(numbers.start_indices_batching_dims)
        start_map = ints(numbers.start_index_map)
        vector = numbers.index_vector_dim.value.data
        source, indices = self.dims(op.operand), self.dims(op.start_indices)
        sizes, shape = ints(op.slice_sizes), shape_of(op.operand)
        reason = None
        result: list[TokenDim | None] = [None] * len(shape_of(op.result))
        batch_dims = [d for d in range(len(result)) if d not in offset]
        index_dims = [d for d in range(len(indices)) if d != vector]
        for target, d in zip(batch_dims, index_dims, strict=True):
            result[target] = indices[d]
        kept = [d for d in range(len(source)) if d not in collapsed + operand_batch]
        for target, d in zip(offset, kept, strict=True):
            result[target] = source[d]
            if source[d] is not None and (sizes[d] != shape[d]):
                reason = f"gathers part of the token axis (dim {d})"
        for d in collapsed:
            if source[d] is not None:
                reason = f"gathers single tokens by index (dim {d})"
        if any(source[d] is not None for d in start_map if d not in collapsed and sizes[d] != shape[d]):
            reason = "gathers along the token axis"
        for a, b in zip(operand_batch, index_batch, strict=True):
            dim, same = agree(source[a], indices[b])
            result[batch_dims[index_dims.index(b)]] = dim
            if not same or (source[a] is None) != (indices[b] is None):
                reason = "gathers over token axes that do not run together"
        return [tuple(result)], reason

    def scatter(self, op: stablehlo.ScatterOp) -> tuple[list[Dims], str | None]:
        """Token dims must be batching dims, or whole in every update (window dims)."""
        numbers = op.scatter_dimension_numbers
        batch = ints(numbers.input_batching_dims)
        index_batch = ints(numbers.scatter_indices_batching_dims)
        inserted = ints(numbers.inserted_window_dims)
        vector = numbers.index_vector_dim.value.data
        windows = ints(numbers.update_window_dims)
        indices = self.dims(op.scatter_indices)
        joined, reason = self.join(list(op.inputs))
        update, mixed = self.join(list(op.updates))
        reason = reason or mixed
        result = list(joined)
        kept = [d for d in range(len(result)) if d not in batch + inserted]
        index_dims = [d for d in range(len(indices)) if d != vector]
        scatter_dims = [d for d in range(len(update)) if d not in windows]
        for d, dim in enumerate(joined):
            if dim is None:
                continue
            if d in batch:
                b = index_batch[batch.index(d)]
                u = scatter_dims[index_dims.index(b)]
                by_index, same = agree(dim, indices[b])
                result[d], also = agree(by_index, update[u])
                if indices[b] is None or update[u] is None or not (same and also):
                    reason = "scatters over token axes that do not run together"
            elif d in kept and shape_of(op.updates[0])[windows[kept.index(d)]] == shape_of(op.results[0])[d]:
                result[d], same = agree(dim, update[windows[kept.index(d)]])
                if not same:
                    reason = "combines token axes that were flattened in different orders"
            else:
                reason = f"scatters along the token axis (dim {d})"
        batched = {index_dims.index(b) for b in index_batch}
        loose = [d for i, d in enumerate(index_dims) if i not in batched and indices[d] is not None]
        if loose:
            reason = "scatters tokens into something that does not hold them one by one"
        return [tuple(result)] * len(op.results), reason

    def convolution(self, op: Operation) -> tuple[list[Dims], str | None]:
        """Tokens may be the batch of a convolution over something else."""
        numbers = re.search(r"\[([^\]]*)\]x\[[^\]]*\]->\[([^\]]*)\]", str(_attr(op, "dimension_numbers")))
        sized = [self.sized(op.results[0])]
        if numbers is None or any(self.dims(op.operands[1])):
            return sized, "convolves along the token axis"
        source, target = ([x.strip() for x in part.split(",")].index("b") for part in numbers.groups())
        dims = self.dims(op.operands[0])
        if any(dim is not None for d, dim in enumerate(dims) if d != source) or _int(op, "batch_group_count") > 1:
            return sized, "convolves along the token axis"
        return [tuple(dims[source] if d == target else None for d in range(len(dims)))], None

    def reduce_window(self, op: Operation) -> tuple[list[Dims], str | None]:
        moves = {d for d, w in enumerate(ints(_attr(op, "window_dimensions"))) if w != 1}
        for name in ("window_strides", "base_dilations", "window_dilations"):
            if op.get_attr_or_prop(name) is not None:
                moves |= {d for d, n in enumerate(ints(_attr(op, name))) if n != 1}
        padding = op.get_attr_or_prop("padding")
        if isinstance(padding, DenseIntOrFPElementsAttr):
            moves |= {d for d, pair in enumerate(dense_to_numpy(padding).reshape(-1, 2)) if pair.any()}
        return self.along(op, sorted(moves), "accumulates, pools or shifts")

    def attention(self, op: Operation) -> tuple[list[Dims], str | None]:
        """Attention that has been raised: causal, so it is one a cache serves."""
        plain = all(
            tuple(d is not None and d.plain for d in self.dims(x)) == (True, False, False) for x in op.operands[:3]
        )
        return [self.sized(op.results[0])], None if plain else "attends to something that is not [tokens, heads, dim]"

    def unknown(self, op: Operation) -> tuple[list[Dims], str | None]:
        touches = any(self.axis.info[x].token_dims for x in op.operands if x in self.axis.info)
        touches = touches or any(any(self.sized(r)) for r in op.results)
        reason = "is not known to treat tokens one by one" if touches else None
        return [self.sized(r) for r in op.results], reason


def _last_dim(op: Operation) -> list[int]:
    return [len(shape_of(op.operands[0])) - 1]


_ELEMENTWISE_EXTRA = frozenset(
    {
        "stablehlo.compare",
        "stablehlo.select",
        "stablehlo.clamp",
        "stablehlo.reduce_precision",
        "stablehlo.complex",
        "stablehlo.real",
        "stablehlo.imag",
        "stablehlo.round_nearest_afz",
        "stablehlo.round_nearest_even",
        "stablehlo.is_finite",
        "stablehlo.uniform_quantize",
    }
)
_NOT_ELEMENTWISE_CHLO = frozenset({"chlo.top_k", "chlo.ragged_dot", "chlo.scan"})


def is_elementwise(op: Operation) -> bool:
    """Whether each element of the results depends on the same element of the operands alone."""
    name = op_name(op)
    if name.startswith("chlo."):
        return name not in _NOT_ELEMENTWISE_CHLO
    if name == "stablehlo.bitcast_convert":
        return shape_of(op.operands[0]) == shape_of(op.results[0])
    if name in _ELEMENTWISE_EXTRA:
        return True
    bases = (stablehlo.elementwise_binary_ops.ElementwiseBinaryOperation,)
    unary = stablehlo.elementwise_unary_ops.ElementwiseUnaryOperation
    return isinstance(op, (*bases, unary))


def _rule(op: Operation, rules: _Rules) -> tuple[list[Dims], str | None]:
    name = op_name(op)
    if is_elementwise(op):
        return rules.elementwise(op)
    table: dict[str, Callable[..., tuple[list[Dims], str | None]]] = {
        "stablehlo.optimization_barrier": rules.barrier,
        "stablehlo.reshape": rules.reshape,
        "stablehlo.transpose": rules.transpose,
        "stablehlo.broadcast_in_dim": rules.broadcast,
        "stablehlo.dot_general": rules.dot_general,
        "stablehlo.reduce": rules.reduce,
        "stablehlo.concatenate": rules.concatenate,
        "stablehlo.slice": rules.slice,
        "stablehlo.dynamic_slice": rules.dynamic_slice,
        "stablehlo.dynamic_update_slice": rules.dynamic_update_slice,
        "stablehlo.pad": rules.pad,
        "stablehlo.convolution": rules.convolution,
        "stablehlo.gather": rules.gather,
        "stablehlo.scatter": rules.scatter,
        "stablehlo.reduce_window": rules.reduce_window,
        "llm.attention": rules.attention,
        "stablehlo.sort": lambda o: rules.along(o, [_int(o, "dimension")], "sorts"),
        "chlo.top_k": lambda o: rules.along(o, _last_dim(o), "selects"),
        "stablehlo.reverse": lambda o: rules.along(o, ints(_attr(o, "dimensions")), "reverses"),
        "stablehlo.fft": lambda o: rules.along(
            o, range(len(shape_of(o.operands[0])))[-len(ints(_attr(o, "fft_length"))) :], "transforms"
        ),
    }
    return table.get(name, rules.unknown)(op)


def _attr(op: Operation, name: str):  # type: ignore[no-untyped-def]
    attribute = op.get_attr_or_prop(name)
    assert attribute is not None, (op_name(op), name)
    return attribute


def _int(op: Operation, name: str) -> int:
    attribute = op.get_attr_or_prop(name)
    return 0 if attribute is None else int(attribute.value.data)  # type: ignore[attr-defined]


def analyse(
    block_ops: Sequence[Operation],
    alignment: Alignment,
    params: Sequence[SSAValue],
    tokens: SSAValue,
    table_reason: Callable[[SSAValue], str | None],
    positions: Sequence[SSAValue] = (),
) -> TokenAxis:
    """Analyse the operations of @main in order. `positions` is the input of positions, once there is one.

    `table_reason(value)` decides, for a value of positions alone that is not pointwise, whether it is a table of the
    position: None if it is, else the reason it is not.
    """
    axis = TokenAxis(alignment)
    rules = _Rules(axis)
    for value in params:
        axis.info[value] = ValueInfo(dims=rules.sized(value), params=True)
    axis.info[tokens] = ValueInfo(dims=rules.sized(tokens), tokens=True)
    for value in positions:
        axis.info[value] = ValueInfo(dims=rules.sized(value), positions=True)
    for op in block_ops:
        if op.results:
            _analyse_op(op, axis, rules, table_reason)
    return axis


def _analyse_op(op: Operation, axis: TokenAxis, rules: _Rules, table_reason: Callable[[SSAValue], str | None]) -> None:
    inputs = [axis.info[x] for x in external_operands(op) if x in axis.info]
    tokens = any(i.tokens for i in inputs)
    positions = any(i.positions for i in inputs)
    params = any(i.params for i in inputs)
    all_dims, reason = _rule(op, rules)
    name = op_name(op)
    varying = frozenset[str]().union(*(axis.alignment.varying.get(x, ()) for x in (op.walk() if op.regions else (op,))))
    odd = next((axis.alignment.odd[r] for r in op.results if r in axis.alignment.odd), None)

    if name == "stablehlo.iota" and varying:
        reason = "depends on the sequence length"
    elif name == "stablehlo.iota" and all_dims:
        dims = rules.spread(op.results[0])
        along = op.properties["iota_dimension"].value.data  # type: ignore[attr-defined]
        dims = tuple(dim if d != along else rules.sized(op.results[0])[d] for d, dim in enumerate(dims))
        all_dims, reason = [dims], None
        if dims and dims[along] is not None:
            positions = True
            reason = None if dims[along].plain else "counts along an axis that holds more than tokens"
    elif name == "stablehlo.constant":
        all_dims, reason = [rules.spread(op.results[0])], None
        if varying:
            positions = True
            reason = "is a constant that depends on the sequence length"
    elif name in ("stablehlo.slice", "stablehlo.dynamic_slice") and reason is None:
        source = axis.info[op.operands[0]]
        if any(d is not None and s is None for d, s in zip(all_dims[0], source.dims, strict=True)):
            positions = True
            axis.table_slices.append(op)
            if source.tokens or source.positions:
                reason = "takes the first T rows of something that runs over tokens"
    elif varying - _SIZES.get(name, frozenset()) and reason is None:
        reason = f"has properties that depend on the sequence length ({', '.join(sorted(varying))})"
    if reason is None and odd is None:
        reason = _unaccounted(op, inputs, all_dims, rules)
        if reason is not None:
            all_dims = [rules.sized(r) for r in op.results]
    if odd is not None:
        reason = reason or odd
        positions = positions or not tokens

    inherited = next((i.opaque for i in inputs if i.opaque), None)
    if reason is not None and not tokens:
        reason = f"{name} at {location(op)} {reason}"
    if tokens:
        problem = reason if inherited is None else f"uses a value of positions that cannot be served: {inherited}"
        if problem:
            axis.violations[op] = problem
        for r, dims in zip(op.results, all_dims, strict=True):
            axis.info[r] = ValueInfo(dims=dims, tokens=True, positions=positions, params=params)
        return
    touches = positions or any(any(d) for d in all_dims) or any(i.token_dims for i in inputs)
    opaque = inherited or (reason if touches else None)
    positions = positions or opaque is not None
    for r, dims in zip(op.results, all_dims, strict=True):
        why = opaque
        if opaque is not None and odd is None and _is_table_shape(rules.sized(r)):
            not_a_table = "it depends on parameters" if params else table_reason(r)
            dims = rules.sized(r)
            if not_a_table is None:
                axis.tables.append(r)
                why = None
            elif inherited is None:
                why = f"{opaque}, and {not_a_table}"
        axis.info[r] = ValueInfo(dims=dims, positions=positions, params=params, opaque=why)


def _unaccounted(op: Operation, inputs: Sequence[ValueInfo], all_dims: Sequence[Dims], rules: _Rules) -> str | None:
    """A safety net under the rules: dims that follow the length are token dims, and none of an operand's is lost."""
    held = max((len(i.token_dims) for i in inputs), default=0)
    for result, dims in zip(op.results, all_dims, strict=True):
        sized = rules.sized(result)
        if any(
            (a is None) != (b is None) or (a and b and a.outer * a.inner != b.inner)
            for a, b in zip(dims, sized, strict=True)
        ):
            return "makes an axis as long as the sequence out of something that does not run over tokens"
        if sum(d is not None for d in dims) < held:
            return "loses the token axis"
    return None


def _is_table_shape(dims: Dims) -> bool:
    tokens = [d for d in dims if d is not None]
    return 1 <= len(tokens) <= 2 and all(d.plain for d in tokens)


_SIZES: dict[str, frozenset[str]] = {
    "stablehlo.slice": frozenset({"limit_indices"}),
    "stablehlo.dynamic_slice": frozenset({"slice_sizes"}),
    "stablehlo.gather": frozenset({"slice_sizes"}),
}
"""Properties that hold sizes, which follow the length without depending on it otherwise."""


__all__ = ["TokenAxis", "UnregisteredOp", "ValueInfo", "analyse", "is_elementwise"]
