"""Derives a decoder's step from a plain forward: the phase of the pipeline that proves the rewrite or refuses it.

The forward is traced at two lengths, so that the token axis shows (`analysis.align`); positions become an input
(`rewrite_positions`); attention is raised and judged (`raise_attention`); whatever still mixes tokens is refused by
name; then attention gets its paged cache and the logits are cut to the rows asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, TensorType, i32, i64
from xdsl.ir import Operation, SSAValue
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import dce
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import LENGTH, Alignment, align, location, main_function
from llmir_jax.analysis.evaluate import extract
from llmir_jax.analysis.token_axis import TokenAxis
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, dtype_of, shape_of, tensor
from llmir_jax.errors import LlmirError, UnsupportedModelError
from llmir_jax.placement import Placement
from llmir_jax.quantization import Plan
from llmir_jax.trace import Traced
from llmir_jax.transforms import signature
from llmir_jax.transforms.check_token_axis import analyse_main, check_token_pointwise
from llmir_jax.transforms.inline_calls import inline_calls
from llmir_jax.transforms.judge_weights import AttentionOptions
from llmir_jax.transforms.raise_attention import raise_attention
from llmir_jax.transforms.rewrite_positions import gather_bound, rewrite_positions, table_bound
from llmir_jax.transforms.simplify_inputs import SimplifyInputsPass
from llmir_jax.transforms.unroll_loops import unroll_loops

LENGTHS = (131, 113, 67, 41, 23, 17)
"""Lengths to trace at, in tokens: primes, so that no other size of a model is taken for the token axis."""
SHORT_LENGTH = 67
"""Length of the second trace, in tokens: far from the first, so that a size like `seq // 64` or a branch shows.

More than 64, for MLIR folds constants of no more elements than that, which makes two traces differ for no good reason.
"""
MAX_TABLE_BYTES = 1 << 30
"""A table of positions larger than this is refused."""

TraceAt = Callable[[int], Traced]
"""Traces the forward at a number of tokens."""


def prepare(module: ModuleOp) -> ModuleOp:
    """One flat block: calls inlined, layer loops unrolled, equal operations merged, dead ones gone. In place."""
    inline_calls(module)
    unroll_loops(module)
    cse(module)
    SimplifyInputsPass().apply(Context(), module)
    dce(module)
    return module


@dataclass
class Derived:
    """The step, derived at `length` tokens, with its cache still abstract."""

    module: ModuleOp
    length: int
    max_seqs: int
    max_seq_len: int
    notes: list[str] = field(default_factory=list)
    text: str = ""
    """The IR over the paged cache, before the cache is laid out."""
    plan: Plan | None = None
    """What became of each parameter, where weights are quantized."""
    placement: Placement | None = None
    """Where its arrays live, where it is partitioned over a mesh."""
    has_logits: bool = True
    """Whether it is a whole step, or the last stage of one."""


class _Traces:
    """The forward at several lengths, prepared; the first is the one that is rewritten."""

    def __init__(self, trace_at: TraceAt, forbidden: Sequence[int], lengths: Sequence[int]):
        self._trace_at = trace_at
        self.length, self.main_module = self._first(forbidden, lengths)
        self.alignments: dict[int, Alignment] = {}
        self.original = self.main_module.clone()
        self._pairs = dict(zip(self.main_module.walk(), self.original.walk(), strict=True))

    def _first(self, forbidden: Sequence[int], lengths: Sequence[int]) -> tuple[int, ModuleOp]:
        error: Exception | None = None
        for length in lengths:
            if any(n and n % length == 0 for n in forbidden):
                continue
            try:
                traced = self._trace_at(length)
            except LlmirError:
                raise
            except Exception as problem:  # too long for a table of the model, say
                error = error or problem
                continue
            if _static_sizes_hold(traced, length):
                continue
            return length, prepare(traced.module)
        if error is not None:
            raise UnsupportedModelError(
                f"the forward cannot be traced at any of {LENGTHS} tokens; at {LENGTHS[0]} it raises "
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
        raise UnsupportedModelError(
            f"no length among {LENGTHS} is free of the model's own sizes: it cannot be analysed"
        )

    def align_with(self, length: int) -> Alignment:
        """The untouched first trace aligned with one at `length`."""
        if length not in self.alignments:
            try:
                other = prepare(self._trace_at(length).module)
            except LlmirError:
                raise
            except Exception as problem:
                raise UnsupportedModelError(
                    f"the forward can be traced at {self.length} tokens but not at {length}, where it raises "
                    f"{type(problem).__name__}: {str(problem).splitlines()[0]}. "
                    "Give max_seq_len if the model has a limit"
                ) from problem
            self.alignments[length] = align(self.original, other, self.length, length)
        return self.alignments[length]

    def original_value(self, value: SSAValue) -> SSAValue:
        """The value of the untouched first trace that `value` was before any rewriting."""
        op = value.owner
        assert isinstance(op, Operation)
        return self._pairs[op].results[list(op.results).index(value)]  # type: ignore[arg-type]


def _check_counters(alignment: Alignment, max_seq_len: int) -> None:
    """Refuse to count tokens in a float that cannot: whether XLA rounds such numbers depends on what reads them."""
    for op in alignment.ops:
        if not isinstance(op, stablehlo.IotaOp) or not isinstance(op.output.type, TensorType):
            continue
        dtype = dtype_of(op.output)
        along = alignment.token_sized.get(op.output, ())[
            op.iota_dimension.value.data : op.iota_dimension.value.data + 1
        ]
        if dtype.itemsize > 2 or dtype.kind in "iu" or not any(along):
            continue
        exact = 2 ** (int(jnp.finfo(dtype).nmant) + 1)  # type: ignore[no-untyped-call]
        if max_seq_len > exact:
            raise UnsupportedModelError(
                f"stablehlo.iota at {location(op)}: counts tokens in {dtype}, which holds no odd numbers above "
                f"{exact}; count in int32 or float32, or give max_seq_len={exact}"
            )


def _has_fixed_multiple(alignment: Alignment) -> bool:
    """Whether some size that does not follow the number of tokens is a multiple of it."""
    for value, multiples in alignment.token_sized.items():
        for n, multiple in zip(shape_of(value), multiples, strict=True):
            if n and not multiple and n % alignment.length == 0:
                return True
    return False


def _static_sizes_hold(traced: Traced, length: int) -> bool:
    """Whether a parameter has a size that the length divides."""
    return any(n and n % length == 0 for p in traced.params for n in p.shape)


class _Tables:
    """Values that depend on positions alone, evaluated at several lengths."""

    def __init__(self, traces: _Traces, other: int, longest: int):
        self._traces = traces
        self._other = other
        self._longest = longest
        self._content: dict[SSAValue, np.ndarray[Any, Any]] = {}
        self._contents: dict[SSAValue, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}

    def reason(self, value: SSAValue) -> str | None:
        """None if `value` is a table of the position, the same function at every length, else why not."""
        try:
            here, other, longest = self.contents(value)
        except UnsupportedModelError as error:
            return str(error)
        except LlmirError as error:
            return f"cannot be evaluated ({error})"
        if longest.nbytes > MAX_TABLE_BYTES:
            return f"a table of it for {self._longest} positions takes {longest.nbytes >> 20} MiB; lower max_seq_len"
        for content in (other, longest):
            if not _same_prefix(here, content):
                return "it changes with the sequence length, so it is no function of the position"
        if here.shape != longest.shape and longest.shape[_token_dim(here, longest)] != self._longest:
            return "it has no entry for every position"
        self._content[value] = longest
        return None

    def contents(self, value: SSAValue) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """`value` at the traced length, at the other one, and at the longest."""
        if value not in self._contents:
            original = self._traces.original_value(value)
            twins = [self._traces.align_with(n).values[original] for n in (self._other, self._longest)]
            here, other, longest = (self._at(x) for x in (original, *twins))
            self._contents[value] = (here, other, longest)
        return self._contents[value]

    def longest_content(self, value: SSAValue) -> np.ndarray[Any, Any] | None:
        """`value` at the longest length, or None if it depends on parameters."""
        try:
            return self.contents(value)[2]
        except UnsupportedModelError:
            return None

    def content(self, value: SSAValue) -> np.ndarray[Any, Any]:
        """A table for every position below max_seq_len."""
        return self._content[value]

    @staticmethod
    def _at(value: SSAValue) -> np.ndarray[Any, Any]:
        part = extract([value], [])
        if part.inputs:
            raise UnsupportedModelError("it depends on parameters")
        return part.run({})[0]


def _token_dim(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> int:
    return next((d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n), 0)


def _same_prefix(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    if a.ndim != b.ndim:
        return False
    window = tuple(slice(0, min(m, n)) for m, n in zip(a.shape, b.shape, strict=True))
    x, y = a[window], b[window]
    if x.dtype.kind in "fc" or x.dtype.itemsize == 2:
        x, y = x.astype(np.complex128), y.astype(np.complex128)
        largest = float(np.abs(x[np.isfinite(x)]).max(initial=0.0))
        return bool(np.allclose(x, y, rtol=1e-5, atol=1e-6 * largest, equal_nan=True))
    return bool((x == y).all())


@dataclass
class Raised:
    """A forward whose attention is raised, and in which nothing else mixes tokens, at `length` tokens a sequence."""

    module: ModuleOp
    """Its @main has positions int32[length] for an argument after all others."""
    length: int
    max_seq_len: int
    """Of the longest sequence that its tables of positions are made for."""
    axis: TokenAxis
    notes: list[str] = field(default_factory=list)


def raise_forward(
    trace_at: TraceAt,
    parameter_values: Callable[[], Sequence[Any]] | None,
    *,
    max_seq_len: int,
    forbidden: Sequence[int],
    lengths: Sequence[int] = LENGTHS,
) -> Raised:
    """Find the attention of a forward and its positions, and prove that each other operation treats tokens alone.

    Args:
        trace_at: traces the forward at a number of tokens a sequence.
        parameter_values: arrays of the parameters in order, read only where a mask depends on one.
        forbidden: other sizes that there are or will be; none may be taken for the token axis.
        lengths: to trace at, the first that fits.

    Raises:
        UnsupportedModelError: the forward mixes tokens in another way.
    """
    traces = _Traces(trace_at, (max_seq_len, *forbidden), lengths)
    module, length = traces.main_module, traces.length
    other = SHORT_LENGTH if length > SHORT_LENGTH else length - 2
    first = traces.align_with(other)
    bound = table_bound(main_function(traces.original).body.block.ops, first)
    if _has_fixed_multiple(first) or (bound is not None and bound[0] - 1 <= length):
        others = tuple(n for n in lengths if n != length)
        return raise_forward(trace_at, parameter_values, max_seq_len=max_seq_len, forbidden=forbidden, lengths=others)
    notes: list[str] = []
    if bound is not None and bound[0] < max_seq_len:
        notes.append(f"context limited to {bound[0]} tokens by the table at {bound[1]}")
        max_seq_len = bound[0]

    longest = max_seq_len if max_seq_len > length else length + 1
    if bound is not None and longest >= bound[0]:
        longest = bound[0] - 1  # with as many tokens as the table has rows, there is no slice of it to align
    first.widen(traces.align_with(longest))
    _check_counters(first, max_seq_len)
    main = main_function(module)
    twins = _transfer(first, traces)
    tables = _Tables(traces, other, longest)
    params = [arg for arg, _ in signature.parameter_paths(main)]
    axis = analyse_main(main, twins, tables.reason)
    if axis.tables and longest < max_seq_len:
        max_seq_len = longest
        notes.append(f"context limited to {longest} tokens, the longest sequence the forward was evaluated for")
    bound = gather_bound(axis, tables.longest_content)
    if bound is not None and bound[0] < max_seq_len:
        again = raise_forward(trace_at, parameter_values, max_seq_len=bound[0], forbidden=forbidden, lengths=lengths)
        again.notes.append(f"context limited to {bound[0]} tokens by the table at {bound[1]}")
        return again
    positions = signature.add_argument(main, "positions", tensor((length,), i32))
    rewrite_positions(axis, positions, tables.content)
    dce(module)
    values = _ParameterValues(params, parameter_values)
    raise_attention(
        axis,
        list(main.body.block.ops),
        AttentionOptions(
            positions=positions,
            max_seq_len=min(max_seq_len, max(longest, length)),
            parameter_values=values,
            contents=tables.contents,
        ),
    )
    dce(module)
    check_token_pointwise(axis, list(main.body.block.ops))
    module.attributes[LENGTH] = IntegerAttr(length, i64)
    return Raised(module, length, max_seq_len, axis, notes)


def derive(
    trace_at: TraceAt,
    parameter_values: Callable[[], Sequence[Any]] | None,
    *,
    max_seqs: int,
    max_seq_len: int,
    cache_sizes: Sequence[int],
) -> Derived:
    """Derive the step.

    Args:
        trace_at: traces the forward of one sequence at a number of tokens.
        parameter_values: arrays of the parameters in order, read only where a mask depends on one.
        cache_sizes: sizes that the cache's arrays will have; none may be taken for the token axis.

    Raises:
        UnsupportedModelError: the forward mixes tokens in a way that no step can serve.
    """
    raised = raise_forward(trace_at, parameter_values, max_seq_len=max_seq_len, forbidden=(max_seqs, *cache_sizes))
    main = main_function(raised.module)
    _check_logits(raised.axis, signature.results(main), raised.length)
    if not any(isinstance(op, llm.AttentionOp) for op in main.body.block.ops):
        raised.notes.append("no attention found: every token is served on its own")
    _flatten_inputs(raised.module, raised.length, max_seqs)
    return Derived(raised.module, raised.length, max_seqs, raised.max_seq_len, raised.notes)


class _ParameterValues(Mapping[SSAValue, Any]):
    """Arrays by parameter argument, fetched when one is asked for."""

    def __init__(self, params: Sequence[SSAValue], values: Callable[[], Sequence[Any]] | None):
        self._index = {p: i for i, p in enumerate(params)}
        self._values = values

    def __getitem__(self, key: SSAValue) -> Any:
        if self._values is None:
            raise KeyError(key)
        return self._values()[self._index[key]]

    def __contains__(self, key: object) -> bool:
        return self._values is not None and key in self._index

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


def _transfer(alignment: Alignment, traces: _Traces) -> Alignment:
    """The alignment of the untouched first trace, told of the module that is rewritten."""
    forward = {original: op for op, original in traces._pairs.items()}
    values: dict[SSAValue, SSAValue] = {}
    for original, op in forward.items():
        values.update(zip(original.results, op.results, strict=True))
        for r, s in zip(original.regions, op.regions, strict=True):
            for a, b in zip(r.blocks, s.blocks, strict=True):
                values.update(zip(a.args, b.args, strict=True))
    return Alignment(
        length=alignment.length,
        other_length=alignment.other_length,
        ops={forward[k]: v for k, v in alignment.ops.items()},
        values={values[k]: v for k, v in alignment.values.items()},
        token_sized={values[k]: v for k, v in alignment.token_sized.items()},
        odd={values[k]: v for k, v in alignment.odd.items()},
        varying={forward[k]: v for k, v in alignment.varying.items()},
    )


def _check_logits(axis: TokenAxis, results: Sequence[SSAValue], length: int) -> None:
    expected = "expected one float array of logits [batch, seq, vocab]"
    if len(results) != 1:
        raise UnsupportedModelError(f"the forward returns {len(results)} arrays: {expected}")
    shape = shape_of(results[0])
    info = axis.info.get(results[0])
    if len(shape) != 3 or shape[:2] != (1, length) or info is None or info.token_dims != (1,):
        got = "×".join("seq" if n == length else str(n) for n in shape)
        raise UnsupportedModelError(f"the forward returns an array of shape [{got}] for tokens [1, seq]: {expected}")


def _flatten_inputs(module: ModuleOp, length: int, max_seqs: int) -> None:
    """tokens[1, T] becomes tokens[T]; the other step inputs are added."""
    main = main_function(module)
    block = main.body.block
    tokens = signature.argument(main, "tokens")
    flat = signature.add_argument(main, "tokens", tensor((length,), i32), index=tokens.index)
    assert block.first_op is not None
    shaped = OpBuilder(block.first_op).reshape(flat, (1, length))
    tokens.replace_all_uses_with(shaped)
    signature.remove_argument(main, tokens)
    for role, shape in (
        ("seq_ids", (length,)),
        ("num_tokens", ()),
        ("seq_lens", (max_seqs,)),
        ("logits_rows", (max_seqs,)),
    ):
        signature.add_argument(main, role, tensor(shape, i32))


__all__ = ["LENGTHS", "Derived", "Raised", "derive", "prepare", "raise_forward"]
