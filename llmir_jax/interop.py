"""JAX functions as xDSL modules, and xDSL modules called from JAX.

What this project needs of JAX beyond its documented interface is in this file: registering a primitive, merging its
module into the one being lowered (``jax.interpreters.mlir``), and computing while a function is traced
(``jax.core.eval_context``).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from weakref import WeakKeyDictionary

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import func as mlir_func
from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.ir import Attribute

from llmir_jax.dense import dense_from_numpy, dense_to_numpy, dtype_element_type, element_dtype
from llmir_jax.errors import InvalidIRError, LlmirError
from llmir_jax.mlir_export import export_module, op_name
from llmir_jax.mlir_import import LOC, import_module, make_context

__all__ = [
    "LOC",
    "Executable",
    "OnOneDevice",
    "call_executable",
    "call_module",
    "cleanup",
    "dense_from_numpy",
    "dense_to_numpy",
    "dtype_element_type",
    "element_dtype",
    "executable",
    "export_module",
    "import_module",
    "lower_to_module",
    "make_context",
    "op_name",
    "outside_of_traces",
]


def cleanup(module: ir.Module, *, fold: bool = True) -> None:
    """Fold constants, merge equal operations and drop unused private functions, in place.

    Without ``fold`` constants stay as they are: MLIR folds small ones only, so that what it makes of one function
    differs from shape to shape.

    MLIR's own inliner leaves StableHLO's calls as they are, so it is not run.
    """
    with module.context:
        passes = "canonicalize,cse,symbol-dce" if fold else "cse,symbol-dce"
        passmanager.PassManager.parse(f"builtin.module({passes})").run(module.operation)


def lower_to_module(fn: Callable[..., Any], *args: Any, platform: str | None = None) -> ModuleOp:
    """The cleaned-up StableHLO module of a function, jitted or not, of arrays or ShapeDtypeStructs (pytrees too).

    `platform`: "tpu", say, for what it would be there; None for the device that JAX uses.
    """
    jitted: Any = fn if hasattr(fn, "lower") else jax.jit(fn)
    platforms = None if platform is None else (platform,)
    module = jitted.trace(*args).lower(lowering_platforms=platforms).compiler_ir("stablehlo")
    cleanup(module)
    return import_module(module)


def outside_of_traces() -> AbstractContextManager[None]:
    """A context in which functions of arrays give arrays, though the function that it is in be traced."""
    context: AbstractContextManager[None] = jax.core.eval_context()
    return context


@dataclass(frozen=True, kw_only=True, eq=False)
class Executable:
    """A module as bytecode and the types of its @main: what a call holds. Equal only to itself."""

    bytecode: bytes
    inputs: tuple[jax.core.ShapedArray, ...]
    outputs: tuple[jax.core.ShapedArray, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class OnOneDevice:
    """What is called in place of a module where the program is for one device of a platform, in JAX's words."""

    platform: str
    executable: Executable


_EXECUTABLES: WeakKeyDictionary[ModuleOp, Executable] = WeakKeyDictionary()
"""One for each module that was called and is still in use, so that tracing a call again costs nothing."""


def executable(module: ModuleOp) -> Executable:
    """What `call_executable` calls, the same one each time. The module must not change after it.

    Raises InvalidIRError if the module cannot be exported.
    """
    if module not in _EXECUTABLES:
        signature = _main(module).function_type
        inputs, outputs = (tuple(map(_aval, types.data)) for types in (signature.inputs, signature.outputs))
        exported = export_module(module, mlir.make_ir_context())
        bytecode = BytesIO()
        exported.operation.write_bytecode(bytecode)
        _EXECUTABLES[module] = Executable(bytecode=bytecode.getvalue(), inputs=inputs, outputs=outputs)
    return _EXECUTABLES[module]


def _main(module: ModuleOp) -> func.FuncOp:
    for op in module.ops:
        if isinstance(op, func.FuncOp) and op.sym_name.data == "main":
            return op
    raise InvalidIRError("a module that is called needs a function @main; this one has none")


def _aval(type_: Attribute) -> jax.core.ShapedArray:
    if not isinstance(type_, TensorType) or not type_.has_static_shape():
        raise InvalidIRError(f"@main of a called module takes and returns tensors of static shape, got {type_}")
    return jax.core.ShapedArray(type_.get_shape(), element_dtype(type_.element_type))


_call = Primitive("llmir_call")
_call.multiple_results = True
_eager_call = jax.jit(_call.bind, static_argnames=("executable", "original", "on_one_device"))


def _abstract_eval(*_: Any, executable: Executable, **__: Any) -> tuple[jax.core.ShapedArray, ...]:
    return executable.outputs


def _impl(*args: Any, **options: Any) -> Any:
    with jax.disable_jit(False):  # there is no eager form: without jit this would call itself
        return _eager_call(*args, **options)


def _lowering(
    ctx: mlir.LoweringRuleContext, *args: Any, executable: Executable, original: Any, on_one_device: OnOneDevice | None
) -> Any:
    target = ctx.module_context
    if on_one_device is not None and _is_one_device(target, on_one_device.platform):
        executable = on_one_device.executable
    module = ir.Module.parse(executable.bytecode, context=target.context)
    results = list(ir.SymbolTable(module.operation)["main"].type.results)
    name = mlir.merge_mlir_modules(target.module, "llmir_main", module, dst_symtab=target.symbol_table)
    return mlir_func.CallOp(results, ir.FlatSymbolRefAttr.get(name), list(args)).results


def _is_one_device(target: Any, platform: str) -> bool:
    return tuple(target.platforms) == (platform,) and getattr(target.axis_context, "num_devices", None) == 1


def _jvp(primals: Any, tangents: Any, *, original: Callable[..., Any] | None, **_: Any) -> Any:
    if original is None:
        raise LlmirError("a compiled module has no derivative: differentiate the function it was compiled from")
    instantiated = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(original, primals, instantiated)


def _batch(args: Any, dims: Any, *, original: Callable[..., Any] | None, **_: Any) -> Any:
    if original is None:
        raise LlmirError("a compiled module has no vmap: apply vmap to the function it was compiled from")
    outs = jax.vmap(original, in_axes=tuple(dims))(*args)
    return outs, [0] * len(outs)


_call.def_abstract_eval(_abstract_eval)
_call.def_impl(_impl)
mlir.register_lowering(_call, _lowering)
ad.primitive_jvps[_call] = _jvp
batching.primitive_batchers[_call] = _batch


def call_module(
    module: ModuleOp,
    *args: ArrayLike,
    original: Callable[..., list[jax.Array]] | None = None,
    on_one_device: OnOneDevice | None = None,
) -> list[jax.Array]:
    """Call the @main of a module on arrays: eagerly, or inside ``jit`` and all that composes with it.

    The module is exported at its first call and must not change after it.

    Args:
        module: what to call.
        args: one array for each argument of @main, of its shape and dtype.
        original: a function of the same arrays with the same list of results, which ``vmap`` and differentiation use
            in the module's place. Pass the same object at each call. Without one they raise LlmirError.
        on_one_device: what takes the module's place where it can; with the same arguments and results.

    Raises:
        LlmirError: the arguments are not what @main takes.
        InvalidIRError: the module cannot be exported.
    """
    return call_executable(executable(module), *args, original=original, on_one_device=on_one_device)


def call_executable(
    executable: Executable,
    *args: ArrayLike,
    original: Callable[..., list[jax.Array]] | None = None,
    on_one_device: OnOneDevice | None = None,
) -> list[jax.Array]:
    """`call_module` of a module that was exported before."""
    if len(args) != len(executable.inputs):
        raise LlmirError(f"@main takes {len(executable.inputs)} arrays, got {len(args)}")
    for i, (arg, expected) in enumerate(zip(args, executable.inputs, strict=True)):
        got = jax.typeof(arg)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise LlmirError(f"argument {i} of @main must be {expected}, got {got}")
    return list(_call.bind(*args, executable=executable, original=original, on_one_device=on_one_device))
