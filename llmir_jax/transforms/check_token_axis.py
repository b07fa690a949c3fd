"""Refuses a module in which something outside of causal attention mixes tokens.

    %m = stablehlo.reduce %x over dim 1 (the tokens) …   →   error: stablehlo.reduce at model.py:7 (f): reduces over the
                                                             token axis (dim 1). Outside of causal attention every …

The derivation runs it once attention has been raised. On a file, the module's attribute `llmir.length` tells the number
of tokens it was traced at, and with `annotate` each operation gets `llmir.token_dims`: the dims of its first result
that run over tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import Alignment, align_by_size, location, main_function, module_length
from llmir_jax.analysis.token_axis import TokenAxis, analyse
from llmir_jax.dialects.build import dense_i64
from llmir_jax.errors import UnsupportedModelError
from llmir_jax.interop import op_name
from llmir_jax.transforms import signature

TOKEN_DIMS = "llmir.token_dims"


def unknown_from_one_trace(value: SSAValue) -> str:
    """Why a value of positions that is not pointwise is no table, where there is one trace only."""
    return "one trace does not tell whether it is a table of the position (the derivation compares several)"


def analyse_main(main: FuncOp, alignment: Alignment, table_reason: Callable[[SSAValue], str | None]) -> TokenAxis:
    """The token-axis analysis of @main: its arguments are parameters, the tokens and maybe their positions."""
    tokens = signature.argument(main, "tokens")
    positions = signature.arguments(main, "positions")
    params = [arg for arg in main.body.block.args if arg is not tokens and arg not in positions]
    return analyse(list(main.body.block.ops), alignment, params, tokens, table_reason, positions)


def analyse_file(module: ModuleOp) -> TokenAxis:
    """The analysis of a module of its own, by sizes alone."""
    main = main_function(module)
    return analyse_main(main, align_by_size(main, module_length(module)), unknown_from_one_trace)


def _works_on_scores(op: Operation, axis: TokenAxis) -> bool:
    return any(len(axis.info[x].token_dims) > 1 and axis.info[x].tokens for x in op.operands if x in axis.info)


def check_token_pointwise(axis: TokenAxis, ops: Sequence[Operation]) -> None:
    """Refuse what still mixes tokens, naming the operation, its source line and the reason."""
    violating = [op for op in ops if op in axis.violations]
    # the softmax of an attention that was not raised reduces over keys: its product with the values has the reason
    roots = [op for op in violating if op_name(op) == "stablehlo.dot_general" or not _works_on_scores(op, axis)]
    for op in roots or violating:
        raise UnsupportedModelError(
            f"{op_name(op)} at {location(op)}: {axis.violations[op]}. Outside of causal attention every operation must "
            "treat each token on its own"
        )
    for op in ops:
        for result in op.results:
            info = axis.info.get(result)
            if info is not None and info.tokens and len(info.token_dims) > 1:
                raise UnsupportedModelError(
                    f"{op_name(op)} at {location(op)}: pairs tokens with tokens (token axes {info.token_dims}) outside "
                    "of attention"
                )
            if info is not None and info.opaque and _used_by_tokens(result, axis):
                raise UnsupportedModelError(f"{op_name(op)} at {location(op)}: {info.opaque}")


def _used_by_tokens(value: SSAValue, axis: TokenAxis) -> bool:
    return any(axis.info[r].tokens for use in value.uses for r in use.operation.results if r in axis.info)


@dataclass(frozen=True)
class CheckTokenAxisPass(ModulePass):
    """Refuse what mixes tokens; with `annotate`, write down where the token axis is."""

    name = "check-token-axis"

    annotate: bool = False

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        axis = analyse_file(op)
        ops = list(main_function(op).body.block.ops)
        check_token_pointwise(axis, ops)
        for inner in ops if self.annotate else ():
            if inner.results and (dims := axis.info[inner.results[0]].token_dims):
                inner.attributes[TOKEN_DIMS] = dense_i64(dims)
