"""Subgraphs taken out of a module: what they contain, what they compute, and when two are the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from xdsl.dialects.builtin import ModuleOp
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.evaluate import backward_slice, external_operands, extract
from llmir_jax.interop import lower_to_module
from llmir_jax.transforms import signature
from llmir_jax.transforms.inline_calls import inline_calls


def module_of(fn: Callable[..., Any], *args: Any) -> ModuleOp:
    module = lower_to_module(jax.jit(fn), *args)
    inline_calls(module)
    return module


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_only_what_is_needed() -> None:
    module = module_of(lambda x, y: (jnp.sin(x) + 1, jnp.cos(y)), X, X)
    first, _ = signature.results(main_function(module))
    ops, arguments = backward_slice([first], [])
    assert stablehlo.CosineOp not in {type(op) for op in ops}
    assert arguments == [main_function(module).body.block.args[0]]
    np.testing.assert_allclose(extract([first], []).run({arguments[0]: X})[0], np.sin(X) + 1, rtol=1e-6)


def test_cut_at_inputs() -> None:
    """Values given as inputs are not computed, whatever made them."""
    module = module_of(lambda x: jnp.tanh(jnp.exp(x) * 2), X)
    block = main_function(module).body.block
    (middle,) = (op.results[0] for op in block.ops if isinstance(op, stablehlo.ExponentialOp))
    part = extract(signature.results(main_function(module)), [middle])
    assert part.inputs == (middle,)
    np.testing.assert_allclose(part.run({middle: X})[0], np.tanh(X * 2), rtol=1e-6)


def test_an_input_that_is_an_output() -> None:
    module = module_of(lambda x: jnp.sin(x), X)
    (out,) = signature.results(main_function(module))
    np.testing.assert_array_equal(extract([out], [out]).run({out: X})[0], X)


def test_values_that_regions_read() -> None:
    """A branch that reads a value of the outside brings it along."""
    module = module_of(lambda p, x: lax.cond(p, lambda: jnp.sin(x), lambda: x), True, X)
    (case,) = (op for op in main_function(module).body.block.ops if isinstance(op, stablehlo.CaseOp))
    x = main_function(module).body.block.args[1]
    assert x in external_operands(case)
    part = extract(list(case.results), [])
    p = main_function(module).body.block.args[0]
    np.testing.assert_allclose(part.run({p: np.bool_(True), x: X})[0], np.sin(X), rtol=1e-6)


def test_equal_keys_for_equal_functions() -> None:
    """Names, places and source lines do not matter; operations, attributes, constants and wiring do."""

    def key(fn: Callable[..., Any], x: Any = X) -> Any:
        module = module_of(fn, x)
        return extract(signature.results(main_function(module)), list(main_function(module).body.block.args)).key

    def again(x: jax.Array) -> jax.Array:
        unused = jnp.cos(x)
        del unused
        return jnp.sin(x) - x * 2

    assert key(lambda x: jnp.sin(x) - x * 2) == key(again)
    different = [
        lambda x: x * 2 - jnp.sin(x),
        lambda x: jnp.sin(x) - x * 3,
        lambda x: jnp.cos(x) - x * 2,
        lambda x: jnp.sin(x) - x * 2 + 0 * x.sum(),
    ]
    keys = {key(again), key(again, X[:1]), *(key(fn) for fn in different)}
    assert len(keys) == 6


def test_keys_see_into_regions() -> None:
    def key(n: float) -> Any:
        module = module_of(lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b * n, (1,)), X)
        return extract(signature.results(main_function(module)), []).key

    assert key(2.0) == key(2.0)
    assert key(2.0) != key(3.0)
