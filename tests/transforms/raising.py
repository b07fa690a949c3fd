"""Runs one raising pass on a lowered JAX function and compares what it computes with the function itself."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, ModuleOp, StringAttr
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import dce

from llmir_jax.analysis.align import main_function
from llmir_jax.interop import call_module, lower_to_module, make_context
from llmir_jax.transforms import load_pass
from llmir_jax.transforms.inline_calls import inline_calls
from llmir_jax.transforms.lower_to_reference import LowerToReferencePass

Tree = Any


def lowered(fn: Callable[..., Any], *args: Tree) -> ModuleOp:
    """The module of a function of (activations, parameters…) as one flat block; parameters have paths."""
    module = lower_to_module(jax.jit(fn, keep_unused=True), *args)
    inline_calls(module)
    cse(module)
    dce(module)
    paths = [[None] * len(jax.tree.leaves(args[0]))]
    paths += [[f"w{i}" for i, _ in enumerate(jax.tree.leaves(arg))] for arg in args[1:]]
    entries = [DictionaryAttr({} if p is None else {"llmir.path": StringAttr(p)}) for group in paths for p in group]
    main_function(module).properties["arg_attrs"] = ArrayAttr(entries)
    return module


def ops_of(module: ModuleOp) -> list[str]:
    """Names of the llm ops of @main, in order."""
    return [op.name for op in main_function(module).body.block.ops if op.name.startswith("llm.")]


def raised(module: ModuleOp, *passes: str) -> ModuleOp:
    """The module after the passes, which must be idempotent, keep source locations and change no type of a result."""
    before = main_function(module).function_type
    for name in passes:
        load_pass(name)().apply(make_context(), module)
        module.verify()
    for op in main_function(module).body.block.ops:
        assert not op.name.startswith("llm.") or "llmir.loc" in op.attributes
    dce(module)
    once = str(module)
    for name in passes:
        load_pass(name)().apply(make_context(), module)
    dce(module)
    assert str(module) == once
    assert main_function(module).function_type == before
    return module


def check(
    fn: Callable[..., Any], *args: Tree, passes: Sequence[str], expected: Sequence[str], tolerance: float
) -> ModuleOp:
    """Assert that just the `expected` ops are raised, and that the module computes what `fn` does.

    `tolerance` is a share of the largest magnitude of each result.
    """
    module = raised(lowered(fn, *args), *passes)
    assert sorted(ops_of(module)) == sorted(expected)
    text = module.clone()
    LowerToReferencePass().apply(make_context(), module)
    module.verify()
    got = call_module(module, *jax.tree.leaves(args))
    wanted = jax.tree.leaves(jax.jit(fn)(*args))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        x, y = (np.asarray(v).astype(np.float64) for v in (a, b))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())
    return text
