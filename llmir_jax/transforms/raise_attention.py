"""Raises attention, however it was written, to `llm.attention`.

    %s = stablehlo.dot_general %q, %k …                      %q2, %k2, %v2 = the same values as [tokens, heads, dim]
    … scale, soft-cap, mask, softmax, casts …         →      %o = llm.attention %q2, %k2, %v2 {scale, causal, window …}
    %o = stablehlo.dot_general %p, %v …                      reshaped and transposed to what the dot_general gave

Structure finds the two dot products: one sums over keys, the other made its weights' scores from a query and a key.
Layouts are followed by atoms (see `layout`), so any einsum order, MHA, GQA and MQA are one case; KV heads that were
repeated for the product are stored once. Scale and soft-cap are read from the operations next to the scores. All the
rest, from there to the weights, is judged by evaluation (see `judge_weights`). An attention that cannot be raised is
left as it was, with the reason, for the token-axis check to refuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, ModuleOp
from xdsl.ir import Operation, OpResult, SSAValue
from xdsl.passes import ModulePass
from xdsl.transforms.dead_code_elimination import dce
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import location, main_function
from llmir_jax.analysis.evaluate import backward_slice, extract
from llmir_jax.analysis.layout import AtomDims, Atoms
from llmir_jax.analysis.masks import MaskForm, ScoreFunction
from llmir_jax.analysis.reshape import TokenDim
from llmir_jax.analysis.token_axis import TokenAxis, ValueInfo, is_elementwise
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, dtype_of, ints, scalar_constant, shape_of, tensor, type_of
from llmir_jax.interop import op_name
from llmir_jax.transforms import signature
from llmir_jax.transforms.check_token_axis import analyse_file, unknown_from_one_trace
from llmir_jax.transforms.judge_weights import (
    AttentionOptions,
    NotRaised,
    WeightsJudge,
    depends_on_tokens,
    opaque_inputs,
)


def raise_attention(axis: TokenAxis, ops: list[Operation], options: AttentionOptions) -> int:
    """Raise every attention among `ops` in place; returns how many. Reasons go to `axis.violations`."""
    cache: dict[Any, MaskForm | str] = {}
    constants: dict[Any, float] = {}
    count = 0
    for op in ops:
        if not isinstance(op, stablehlo.DotGeneralOp) or op.parent is None or not _sums_over_tokens(op, axis):
            continue
        try:
            _Raiser(axis, op, options, cache, constants).run()
            count += 1
        except NotRaised as reason:
            axis.violations[op] = str(reason)
    return count


def _is_precise(op: stablehlo.DotGeneralOp) -> bool:
    """Whether a product was asked for in more than the device's default precision."""
    config = op.properties.get("precision_config")
    if not isinstance(config, ArrayAttr):
        return False
    return any(isinstance(each, stablehlo.PrecisionAttr) and each.data != "DEFAULT" for each in config)


def _sums_over_tokens(op: stablehlo.DotGeneralOp, axis: TokenAxis) -> bool:
    numbers = op.dot_dimension_numbers
    over = ints(numbers.lhs_contracting_dimensions)
    return op in axis.violations and any(axis.info[op.lhs].dims[d] is not None for d in over)


class _Raiser:
    def __init__(
        self,
        axis: TokenAxis,
        op: stablehlo.DotGeneralOp,
        options: AttentionOptions,
        cache: dict[Any, MaskForm | str],
        constants: dict[Any, float],
    ):
        self.axis, self.op, self.constants = axis, op, constants
        self.length = axis.alignment.length
        self.atoms = Atoms()
        self.judge = WeightsJudge(axis, self.atoms, options, cache)

    # Finding the parts

    def run(self) -> None:
        weights, values, weights_first = self._weights_and_values()
        scores = self._find_scores(weights)
        self._check_closed(scores, weights, opaque_inputs(self.axis, scores, [weights]))
        scale, softcap, _ = self._score_chain(scores, weights)
        scores_dims, q_atom_k_atom, score_parts = self._score_layout(scores)
        weights_dims = self._follow(scores, weights, scores_dims)
        key_dim = self._contracted(weights_first)
        keys_atom = self.atoms.refined(weights_dims[key_dim])
        if len(keys_atom) != 1 or keys_atom[0] not in q_atom_k_atom:
            raise NotRaised("the second product sums over an axis that is not the keys alone")
        keys = keys_atom[0]
        queries = next(a for a in q_atom_k_atom if a != keys)
        normaliser = self._late_normaliser(scores, weights, weights_first)
        self._emit(
            scores, score_parts, queries, keys, weights, weights_dims, values, weights_first, scale, softcap, normaliser
        )

    def _weights_and_values(self) -> tuple[SSAValue, SSAValue, bool]:
        lhs, rhs = (len(self.axis.info[x].token_dims) for x in (self.op.lhs, self.op.rhs))
        if lhs == 2 and rhs == 1:
            return self.op.lhs, self.op.rhs, True
        if lhs == 1 and rhs == 2:
            return self.op.rhs, self.op.lhs, False
        raise NotRaised("sums over the token axis outside of attention (linear attention, or a product of token axes)")

    def _contracted(self, weights_first: bool) -> int:
        numbers = self.op.dot_dimension_numbers
        over = ints(numbers.lhs_contracting_dimensions if weights_first else numbers.rhs_contracting_dimensions)
        if len(over) != 1:
            raise NotRaised("the product with the values sums over more than the keys")
        return over[0]

    def _is_scores(self, op: Operation) -> bool:
        if not isinstance(op, stablehlo.DotGeneralOp) or op in self.axis.violations:
            return False
        info = self.axis.info
        return (
            len(info[op.results[0]].token_dims) == 2
            and len(info[op.lhs].token_dims) == 1
            and len(info[op.rhs].token_dims) == 1
            and info[op.lhs].tokens
            and info[op.rhs].tokens
        )

    def _find_scores(self, weights: SSAValue) -> stablehlo.DotGeneralOp:
        found: dict[Operation, None] = {}
        seen: set[SSAValue] = set()
        pending = [weights]
        while pending:
            value = pending.pop()
            info = self.axis.info.get(value)
            if value in seen or info is None or not info.tokens or not isinstance(value, OpResult):
                continue
            seen.add(value)
            if self._is_scores(value.op):
                found[value.op] = None
                continue
            pending += value.op.operands
        if len(found) != 1:
            raise NotRaised(
                "the weights of the sum over tokens do not come from the product of a query and a key"
                if not found
                else "the weights of the sum over tokens come from several products of queries and keys"
            )
        (op,) = found
        assert isinstance(op, stablehlo.DotGeneralOp)
        return op

    def _check_closed(self, scores: stablehlo.DotGeneralOp, weights: SSAValue, opaque: Sequence[SSAValue]) -> None:
        """Between scores and weights, nothing else may depend on what the tokens are."""
        ops, _ = backward_slice([weights], [scores.results[0], *opaque])
        depends: set[SSAValue] = {scores.results[0]}
        for op in ops:
            if any(x in depends for x in op.operands):
                depends.update(op.results)
            elif any(depends_on_tokens(self.axis, r) for r in op.results):
                raise NotRaised(
                    f"the scores or their mask depend on the tokens themselves other than by query·key, through "
                    f"{op_name(op)} at {location(op)} (a padding mask, say)"
                )

    def _score_chain(self, scores: stablehlo.DotGeneralOp, weights: SSAValue) -> tuple[float, float | None, SSAValue]:
        """Scale and soft-cap: constants that multiply the scores, and a tanh among them."""
        before, after, capped = 1.0, 1.0, False
        value: SSAValue = scores.results[0]
        while value is not weights:
            uses = list(value.uses)
            if len(uses) != 1:
                break
            op = uses[0].operation
            name = op_name(op)
            if name in ("stablehlo.reshape", "stablehlo.transpose") or (
                name == "stablehlo.convert" and dtype_of(op.results[0]).itemsize >= 2
            ):
                value = op.results[0]
                continue
            if name == "stablehlo.broadcast_in_dim" and prod(shape_of(op.results[0])) == prod(shape_of(value)):
                value = op.results[0]
                continue
            if name == "stablehlo.tanh" and not capped:
                capped = True
                value = op.results[0]
                continue
            if name not in ("stablehlo.multiply", "stablehlo.divide"):
                break
            other = op.operands[1 - uses[0].index]
            constant = self._uniform_constant(other)
            if constant is None or (name == "stablehlo.divide" and uses[0].index == 1):
                break
            factor = float(constant) if name == "stablehlo.multiply" else 1.0 / float(constant)
            if capped:
                after *= factor
            else:
                before *= factor
            value = op.results[0]
        if not capped:
            return before, None, value
        return before * after, after, value

    def _uniform_constant(self, value: SSAValue) -> float | None:
        """The number that every element of `value` is, if that follows from constants alone."""
        constant = scalar_constant(value)
        if constant is not None:
            return float(constant)
        while isinstance(value.owner, stablehlo.BroadcastInDimOp | stablehlo.ReshapeOp | stablehlo.ConvertOp):
            value = value.owner.operands[0]
        info = self.axis.info.get(value)
        if info is None or not info.uniform or info.params or shape_of(value) != ():
            return None
        part = extract([value], [])
        if part.key not in self.constants:
            self.constants[part.key] = float(part.run({})[0])
        return self.constants[part.key]

    # Layouts

    def _score_layout(
        self, scores: stablehlo.DotGeneralOp
    ) -> tuple[AtomDims, tuple[int, int], tuple[tuple[SSAValue, AtomDims], tuple[SSAValue, AtomDims]]]:
        """Atoms of the scores' dims, of the two token axes, and of both operands (contracted dims as atoms too)."""
        numbers = scores.dot_dimension_numbers
        lhs_batch, rhs_batch = ints(numbers.lhs_batching_dimensions), ints(numbers.rhs_batching_dimensions)
        lhs_sum, rhs_sum = ints(numbers.lhs_contracting_dimensions), ints(numbers.rhs_contracting_dimensions)
        tokens: list[int] = []
        lhs = self._operand_dims(scores.lhs, tokens)
        rhs = self._operand_dims(scores.rhs, tokens)
        for a, b in zip(lhs_batch + lhs_sum, rhs_batch + rhs_sum, strict=True):
            if any(t in lhs[a] + rhs[b] for t in tokens):
                raise NotRaised("the product of queries and keys pairs or sums tokens")
            rhs[b] = lhs[a]
        dims = [lhs[a] for a in lhs_batch]
        dims += [d for i, d in enumerate(lhs) if i not in lhs_batch + lhs_sum]
        dims += [d for i, d in enumerate(rhs) if i not in rhs_batch + rhs_sum]
        return dims, (tokens[0], tokens[1]), ((scores.lhs, lhs), (scores.rhs, rhs))

    def _operand_dims(self, value: SSAValue, tokens: list[int]) -> AtomDims:
        result: AtomDims = []
        for size, dim in zip(shape_of(value), self.axis.info[value].dims, strict=True):
            if dim is None:
                result.append(self.atoms.dim(size))
                continue
            token = self.atoms.new(self.length)
            tokens.append(token)
            result.append([*self.atoms.dim(dim.outer), token, *self.atoms.dim(dim.inner)])
        return result

    def _follow(self, source: stablehlo.DotGeneralOp, target: SSAValue, dims: AtomDims) -> AtomDims:
        """The atoms of `target`'s dims, along a path of operations that keep the elements of the scores apart."""
        path = self._path(source.results[0], target, {})
        if path is None:
            raise NotRaised(
                "the weights are not laid out as the scores are (tokens are added to or taken from the keys)"
            )
        for op, operand in path:
            if isinstance(op, stablehlo.TransposeOp):
                dims = [dims[p] for p in ints(op.permutation)]
            elif isinstance(op, stablehlo.ReshapeOp):
                found = self.atoms.reshape(dims, shape_of(operand), shape_of(op.results[0]))
                if found is None:
                    raise NotRaised(f"a reshape at {location(op)} cuts heads or tokens unevenly")
                dims = found
            elif isinstance(op, stablehlo.BroadcastInDimOp):
                placed: AtomDims = [[] for _ in shape_of(op.results[0])]
                for d, place in enumerate(ints(op.broadcast_dimensions)):
                    placed[place] = dims[d]
                dims = placed
        return self.atoms.refine(dims)

    def _path(
        self, source: SSAValue, target: SSAValue, memo: dict[SSAValue, list[tuple[Operation, SSAValue]] | None]
    ) -> list[tuple[Operation, SSAValue]] | None:
        if target is source:
            return []
        if target in memo:
            return memo[target]
        memo[target] = None
        op = target.owner
        if not isinstance(op, Operation) or not depends_on_tokens(self.axis, target):
            return None
        movable = isinstance(op, stablehlo.TransposeOp | stablehlo.ReshapeOp) or (
            isinstance(op, stablehlo.BroadcastInDimOp)
            and prod(shape_of(op.operands[0])) == prod(shape_of(op.results[0]))
        )
        if not movable and not is_elementwise(op) and op_name(op) != "stablehlo.optimization_barrier":
            return None
        for operand in op.operands:
            if prod(shape_of(operand)) != prod(shape_of(target)):
                continue
            rest = self._path(source, operand, memo)
            if rest is not None:
                memo[target] = [*rest, (op, operand)]
                return memo[target]
        return None

    # Late normalisation: (exp(scores) @ values) / sum(exp(scores))

    def _late_normaliser(
        self, scores: stablehlo.DotGeneralOp, weights: SSAValue, weights_first: bool
    ) -> tuple[Operation, list[Operation], SSAValue] | None:
        """A division of the product by something made from the same scores: (it, operations between, the divisor)."""
        value: SSAValue = self.op.results[0]
        between: list[Operation] = []
        while True:
            uses = list(value.uses)
            if len(uses) != 1:
                return None
            op = uses[0].operation
            if isinstance(op, stablehlo.TransposeOp | stablehlo.ReshapeOp | stablehlo.ConvertOp):
                between.append(op)
                value = op.results[0]
                continue
            if not isinstance(op, stablehlo.DivideOp) or uses[0].index != 0:
                return None
            ops, _ = backward_slice([op.operands[1]], [scores.results[0]])
            made_from_scores = any(scores.results[0] in o.operands for o in ops)
            return (op, between, op.operands[1]) if made_from_scores else None

    # Emitting

    def _emit(
        self,
        scores: stablehlo.DotGeneralOp,
        score_parts: tuple[tuple[SSAValue, AtomDims], tuple[SSAValue, AtomDims]],
        queries: int,
        keys: int,
        weights: SSAValue,
        weights_dims: AtomDims,
        values: SSAValue,
        weights_first: bool,
        scale: float,
        softcap: float | None,
        normaliser: tuple[Operation, list[Operation], SSAValue] | None,
    ) -> None:
        numbers = self.op.dot_dimension_numbers
        w_batch, v_batch = ints(numbers.lhs_batching_dimensions), ints(numbers.rhs_batching_dimensions)
        v_sum = ints(numbers.rhs_contracting_dimensions)
        if not weights_first:
            w_batch, v_batch = v_batch, w_batch
            v_sum = ints(numbers.lhs_contracting_dimensions)
        # dims of the values: batch dims as the weights have them, keys, and the rest its own
        v_info = self.axis.info[values].dims[v_sum[0]]
        if v_info is None or not v_info.plain:
            raise NotRaised("the values' token axis is flattened with another one")
        v_dims: AtomDims = []
        for d, size in enumerate(shape_of(values)):
            if d in v_batch:
                v_dims.append(weights_dims[w_batch[v_batch.index(d)]])
            elif d in v_sum:
                v_dims.append([keys])
            else:
                v_dims.append(self.atoms.dim(size))
        own = [a for d, dim in enumerate(v_dims) if d not in v_batch and d not in v_sum for a in dim]
        w_free = [
            dim for d, dim in enumerate(weights_dims) if d not in w_batch and d != self._contracted(weights_first)
        ]
        v_free = [dim for d, dim in enumerate(v_dims) if d not in v_batch and d not in v_sum]
        batch = [weights_dims[d] for d in w_batch]
        out_dims = batch + (w_free + v_free if weights_first else v_free + w_free)

        def end_dims() -> AtomDims | None:
            """Atoms at the place where attention ends: the product, or the late division."""
            dims = self.atoms.refine(out_dims)
            for op in normaliser[1] if normaliser else []:
                if isinstance(op, stablehlo.TransposeOp):
                    dims = [dims[p] for p in ints(op.permutation)]
                elif isinstance(op, stablehlo.ReshapeOp):
                    found = self.atoms.reshape(dims, shape_of(op.operands[0]), shape_of(op.results[0]))
                    if found is None:
                        return None
                    dims = found
            return dims

        final_dims = end_dims()
        if final_dims is None:
            raise NotRaised("a reshape before the late normalisation cuts heads or tokens unevenly")
        q_part, k_part = score_parts if queries in self._flat(score_parts[0][1]) else (score_parts[1], score_parts[0])
        build = OpBuilder(self.op)
        key_source, key_dims = self._unrepeat(k_part[0], self.atoms.refine(k_part[1]))
        value_source, value_dims = self._unrepeat(values, self.atoms.refine(v_dims))
        key_dims, value_dims = self.atoms.refine(key_dims), self.atoms.refine(value_dims)
        query_dims = self.atoms.refine(q_part[1])
        own = self.atoms.refined(own)
        q_flat, k_flat, v_flat = (self._flat(d) for d in (query_dims, key_dims, value_dims))
        w_flat = self._flat(self.atoms.refine(weights_dims))
        all_heads = [a for a in w_flat if a not in (queries, keys)]
        contracted = [a for a in q_flat if a not in (*all_heads, queries)]
        if any(a not in k_flat for a in contracted):
            raise NotRaised("queries and keys are not summed over the same dims")
        kv_heads = [a for a in k_flat if a in all_heads]
        kv_heads += [a for a in v_flat if a in all_heads and a not in kv_heads]
        groups = [a for a in all_heads if a not in kv_heads]
        heads = [*kv_heads, *groups]
        score_atoms = self._flat(self.atoms.refine(self._scores_dims(scores, score_parts)))
        if sorted([*heads, queries, keys]) != sorted(score_atoms):
            raise NotRaised("the scores have axes that the weights have not")
        if prod(self.atoms.shape(score_atoms)) != prod(shape_of(scores.results[0])):
            raise NotRaised("queries and keys are not the tokens alone (padded or extra keys)")
        score = ScoreFunction(scale=scale, softcap=softcap)
        form = self.judge.form_of(
            scores,
            self.atoms.refine(self._scores_dims(scores, score_parts)),
            weights,
            self.atoms.refine(weights_dims),
            heads,
            queries,
            keys,
            score,
            normaliser[2] if normaliser else None,
            self.atoms.refine(final_dims) if normaliser else None,
        )
        q = self._arrange(build, q_part[0], query_dims, [queries, *heads], contracted)
        k = self._arrange(build, key_source, key_dims, [keys, *kv_heads], contracted)
        v = self._arrange(build, value_source, value_dims, [keys, *kv_heads], own)
        num_heads, num_kv = (prod(self.atoms.shape(x)) for x in (heads, kv_heads))
        head_dim, value_dim = (prod(self.atoms.shape(x)) for x in (contracted, own))
        q = build.reshape(q, (self.length, num_heads, head_dim))
        k = build.reshape(k, (self.length, num_kv, head_dim))
        v = build.reshape(v, (self.length, num_kv, value_dim))
        element = type_of(self.op.results[0]).get_element_type()
        if normaliser:
            element = type_of(normaliser[0].results[0]).get_element_type()
        slopes = None
        if form.slopes is not None:
            slopes = build.constant(np.asarray(form.slopes, np.float32))
        attention = build.insert(
            llm.AttentionOp(
                q,
                k,
                v,
                result_type=tensor((self.length, num_heads, value_dim), element),
                scale=form.score.scale,
                causal=True,
                window=form.window,
                softcap=form.score.softcap,
                slopes=slopes,
                precise=_is_precise(scores) or _is_precise(self.op),
            )
        )
        end = normaliser[0] if normaliser else self.op
        out = self._restore(build, attention.results[0], [queries, *heads, *own], self.atoms.refine(final_dims), end)
        info = self.axis.info
        for value in (q, k, v, attention.results[0]):
            info.setdefault(value, ValueInfo(dims=(TokenDim(), None, None), tokens=True))
        info[out] = info[end.results[0]]
        end.results[0].replace_all_uses_with(out)
        for op in (scores, self.op):
            self.axis.violations.pop(op, None)

    def _scores_dims(
        self,
        scores: stablehlo.DotGeneralOp,
        parts: tuple[tuple[SSAValue, AtomDims], tuple[SSAValue, AtomDims]],
    ) -> AtomDims:
        numbers = scores.dot_dimension_numbers
        lhs_batch, rhs_batch = ints(numbers.lhs_batching_dimensions), ints(numbers.rhs_batching_dimensions)
        lhs_sum, rhs_sum = ints(numbers.lhs_contracting_dimensions), ints(numbers.rhs_contracting_dimensions)
        lhs, rhs = parts[0][1], parts[1][1]
        dims = [lhs[a] for a in lhs_batch]
        dims += [d for i, d in enumerate(lhs) if i not in lhs_batch + lhs_sum]
        return dims + [d for i, d in enumerate(rhs) if i not in rhs_batch + rhs_sum]

    @staticmethod
    def _flat(dims: AtomDims) -> list[int]:
        return [a for d in dims for a in d]

    def _unrepeat(self, value: SSAValue, dims: AtomDims) -> tuple[SSAValue, AtomDims]:
        """Look through transpositions, reshapes, widening casts and repeats of heads to what is worth storing."""
        best = (value, dims)
        while isinstance(value, OpResult):
            op = value.op
            if isinstance(op, stablehlo.TransposeOp):
                placed: AtomDims = [[] for _ in dims]
                for d, p in enumerate(ints(op.permutation)):
                    placed[p] = dims[d]
                dims = placed
            elif isinstance(op, stablehlo.ReshapeOp):
                found = self.atoms.reshape(dims, shape_of(value), shape_of(op.operand))
                if found is None:
                    return best
                dims = found
            elif isinstance(op, stablehlo.ConvertOp):
                narrow, wide = dtype_of(op.operands[0]), dtype_of(value)
                exact = (
                    np.promote_types(narrow, wide) == wide
                    if narrow.kind == wide.kind
                    else narrow.itemsize < wide.itemsize
                )
                if narrow.kind in "iub" or not exact or wide.itemsize <= narrow.itemsize:
                    return best
            elif isinstance(op, stablehlo.BroadcastInDimOp):
                dims = self.atoms.refine(dims)
                shape = shape_of(op.operand)
                kept = ints(op.broadcast_dimensions)
                dims = [dims[place] if shape[d] != 1 else [] for d, place in enumerate(kept)]
            else:
                return best
            value = op.operands[0]
            info = self.axis.info.get(value)
            if info is None or len(info.token_dims) != 1:
                return best
            best = (value, self.atoms.refine(dims))
        return best

    def _arrange(
        self, build: OpBuilder, value: SSAValue, dims: AtomDims, leading: list[int], trailing: list[int]
    ) -> SSAValue:
        """`value` with one dim an atom, in the order `leading`, `trailing`; atoms it lacks are broadcast."""
        flat = self._flat(dims)
        wanted = [*leading, *trailing]
        value = build.reshape(value, self.atoms.shape(flat))
        present = [a for a in wanted if a in flat]
        if len(present) != len(flat):
            raise NotRaised("a query, key or value has an axis that the attention does not have")
        value = build.transpose(value, [flat.index(a) for a in present])
        return build.broadcast(value, self.atoms.shape(wanted), [wanted.index(a) for a in present])

    def _restore(self, build: OpBuilder, value: SSAValue, order: list[int], dims: AtomDims, end: Operation) -> SSAValue:
        flat = self._flat(dims)
        value = build.reshape(value, self.atoms.shape(order))
        value = build.transpose(value, [order.index(a) for a in flat])
        return build.reshape(value, shape_of(end.results[0]))


@dataclass(frozen=True)
class RaiseAttentionPass(ModulePass):
    """Raise attention in a module of which there is one trace. A mask is probed at positions below `max_seq_len`."""

    name = "raise-attention"

    max_seq_len: int = 4096

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        options = AttentionOptions(
            positions=signature.argument(main, "positions"),
            max_seq_len=self.max_seq_len,
            parameter_values={},
            contents=_unknown_content,
        )
        raise_attention(analyse_file(op), list(main.body.block.ops), options)
        dce(op)


def _unknown_content(value: SSAValue) -> tuple[Any, Any, Any]:
    raise NotRaised(f"the mask uses a value of positions, of which {unknown_from_one_trace(value)}")
