"""Traces small functions of tokens and lays two lengths side by side, as the derivation does."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from llmir_jax.analysis.align import align, main_function
from llmir_jax.analysis.token_axis import TokenAxis, ValueInfo
from llmir_jax.derive import prepare
from llmir_jax.trace import trace
from llmir_jax.transforms import signature
from llmir_jax.transforms.check_token_axis import analyse_main

LENGTH, OTHER = 131, 67
WIDTH = 8
Fn = Callable[[Any, jax.Array], jax.Array]


def module_at(fn: Fn, params: Any, length: int) -> ModuleOp:
    """`fn(params, tokens [1, length])`, prepared for the analysis."""
    return prepare(trace(fn, params, jax.ShapeDtypeStruct((1, length), jnp.int32)).module)


def analysed(
    fn: Fn, params: Any, table_reason: Callable[[SSAValue], str | None] = lambda value: "no table"
) -> TokenAxis:
    """The token-axis analysis of `fn`."""
    first, second = (module_at(fn, params, n) for n in (LENGTH, OTHER))
    return analyse_main(main_function(first), align(first, second, LENGTH, OTHER), table_reason)


def result_of(axis: TokenAxis) -> ValueInfo:
    """What is known of the function's result."""
    module = next(iter(axis.alignment.ops)).get_toplevel_object()
    assert isinstance(module, ModuleOp)
    return axis.info[signature.results(main_function(module))[0]]
