"""A forward function of (model, tokens) to an xDSL module whose arguments carry parameter paths.

    func.func public @main(%0: tensor<…> {llmir.path = "layers.0.attn.q_proj.kernel"}, …,
                           %n: tensor<1xTxi32> {llmir.role = "tokens"}) -> (…)

The model is any pytree of arrays or shapes (linen parameters, dicts, dataclasses, equinox modules …) or has Flax nnx
modules in it, which are split into their structure and their state. Every array of it is an argument, used or not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata
from xdsl.dialects import func
from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, ModuleOp, StringAttr
from xdsl.ir import Attribute
from xdsl_jax.dialects.stablehlo import CustomCallOp

from llmir_jax.errors import LlmirError
from llmir_jax.interop import cleanup, import_module, op_name

PATH = "llmir.path"
"""Argument attribute: the path of the parameter that the argument is."""
ROLE = "llmir.role"
"""Argument attribute: what an argument that is no parameter is for ("tokens")."""

_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "rocm": "rocm", "tpu": "tpu"}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An array of the model. A PRNG key is its key data, uint32."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, kw_only=True)
class ModelTree:
    """What a model is besides its arrays. Hashable; models of equal trees have the same paths."""

    treedef: Any
    """Of the model with the state of each nnx module in the module's place."""
    key_impls: tuple[tuple[int, str], ...]
    """(index of the leaf, name of the implementation) of each leaf that is an array of PRNG keys."""
    outer: Any
    """Structure of the model with each nnx module a leaf."""
    modules: tuple[int, ...]
    """Which leaves of `outer` are nnx modules."""
    graphdef: Any
    """Structure of these modules, which may share variables. None without any."""

    def unflatten(self, arrays: Sequence[Any]) -> Any:
        """The model that has these arrays, in the order of `flatten_params`."""
        leaves = list(arrays)
        for i, impl in self.key_impls:
            leaves[i] = jax.random.wrap_key_data(leaves[i], impl=impl)
        states = jax.tree.unflatten(self.treedef, leaves)
        if self.graphdef is None:
            return states
        parts = self.outer.flatten_up_to(states)
        merged = nnx.merge(self.graphdef, nnx.State({i: parts[at] for i, at in enumerate(self.modules)}))
        for at, module in zip(self.modules, merged, strict=True):
            parts[at] = module
        return jax.tree.unflatten(self.outer, parts)

    @property
    def paths(self) -> tuple[str, ...]:
        """The dotted path of each array, as a person writes it: ``layers.0.attn.q_proj.kernel``."""
        return _paths(jax.tree.unflatten(self.treedef, range(self.treedef.num_leaves)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """A forward function as a module, and what is needed to call it with a model."""

    module: ModuleOp
    """@main takes the model's arrays in the order of `flatten_params`, then the tokens."""
    params: tuple[Parameter, ...]
    tokens: jax.ShapeDtypeStruct
    model_tree: ModelTree
    result: Any
    """The pytree that the forward returns, of ShapeDtypeStructs: @main returns its leaves."""
    flat_fn: Callable[..., list[jax.Array]]
    """The forward itself, jitted, on the arguments of @main and with its results."""

    def unflatten_result(self, leaves: Sequence[jax.Array]) -> Any:
        """The pytree that the forward returns, of the results of @main."""
        return jax.tree.unflatten(jax.tree.structure(self.result), leaves)


def flatten_model(model: Any) -> tuple[list[Any], ModelTree]:
    """The arrays of a model, or the shapes of one that is only shapes, and the rest of it.

    Raises:
        LlmirError: a leaf of the model is neither an array nor a shape.
    """
    states, outer, modules, graphdef = _split(model)
    leaves, treedef = jax.tree.flatten(states)
    key_impls = []
    for i, leaf in enumerate(leaves):
        if not is_array_like(leaf):
            path = _paths(states)[i]
            raise LlmirError(
                f"the model's leaf '{path}' is a {type(leaf).__name__}, not an array: keep what is no array out of the "
                "model's pytree (in static fields, or in the function's closure)"
            )
        if jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key):
            key_impls.append((i, _key_impl(leaf)))
            leaves[i] = _key_data(leaf)
    tree = ModelTree(
        treedef=treedef, key_impls=tuple(key_impls), outer=outer, modules=tuple(modules), graphdef=graphdef
    )
    return leaves, tree


def _split(model: Any) -> tuple[Any, Any, list[int], Any]:
    """The model with the states of its nnx modules in their places; see ModelTree for the rest."""
    leaves, outer = jax.tree.flatten(model, is_leaf=_is_nnx_module)
    modules = [at for at, leaf in enumerate(leaves) if _is_nnx_module(leaf)]
    if not modules:
        return model, outer, modules, None
    graphdef, state = nnx.split(tuple(leaves[at] for at in modules))
    for i, at in enumerate(modules):
        leaves[at] = state.get(i, nnx.State({}))  # a module that shares all its variables has no state of its own
    return jax.tree.unflatten(outer, leaves), outer, modules, graphdef


def flatten_params(model: Any) -> list[jax.Array]:
    """The model's arrays in the order of the arguments of the traced module's @main.

    Raises:
        LlmirError: the model has shapes in place of arrays, or other leaves.
    """
    leaves, tree = flatten_model(model)
    check_values(leaves, tree)
    return leaves


def check_values(leaves: Sequence[Any], tree: ModelTree) -> None:
    """Raises LlmirError for a model that has shapes in place of arrays."""
    for i, leaf in enumerate(leaves):
        if not is_value(leaf):
            path = tree.paths[i]
            raise LlmirError(f"the model's parameter '{path}' is a shape without values: load or initialise it")


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatForward:
    """A forward function on a model's arrays, not traced yet."""

    params: tuple[Parameter, ...]
    flat_fn: Callable[..., list[jax.Array]]
    """The forward on the model's arrays in order and tokens, with the leaves of its result."""


def flatten_forward(fn: Callable[[Any, Any], Any], model: Any) -> FlatForward:
    """The forward on arrays, of a model of arrays or shapes. Raises LlmirError, see `flatten_model`."""
    leaves, tree = flatten_model(model)
    return FlatForward(params=_parameters(tree.paths, map(shape_of, leaves)), flat_fn=_flat_function(fn, tree)[0])


def _parameters(paths: Sequence[str], shapes: Iterable[jax.ShapeDtypeStruct]) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(path=path, shape=shape.shape, dtype=np.dtype(shape.dtype))
        for path, shape in zip(paths, shapes, strict=True)
    )


def trace(
    fn: Callable[[Any, Any], Any], model: Any, tokens: Any, *, platform: str | None = None, fold: bool = True
) -> Traced:
    """Trace a forward function at the shapes of a model and of its tokens.

    Args:
        fn: function of (model, tokens) to any pytree of arrays.
        model: arrays, or ShapeDtypeStructs in their place (``nnx.eval_shape``, ``jax.eval_shape``).
        tokens: an array or a ShapeDtypeStruct, int32[batch, seq].
        platform: "cpu", "gpu" or "tpu": what JAX lowers for; by default the one it runs on.
        fold: whether constants are folded (see `cleanup`).

    Raises:
        LlmirError: the model has leaves that are no arrays; the forward changes the model's state or calls back into
            Python. What the forward itself raises goes through as it is.
    """
    leaves, tree = flatten_model(model)
    return trace_flat(fn, [shape_of(leaf) for leaf in leaves], tree, shape_of(tokens), platform=platform, fold=fold)


def trace_flat(
    fn: Callable[[Any, Any], Any],
    params: list[jax.ShapeDtypeStruct],
    tree: ModelTree,
    tokens: jax.ShapeDtypeStruct,
    *,
    platform: str | None = None,
    fold: bool = True,
) -> Traced:
    """`trace` of a model that is flattened already."""
    flat_fn, results = _flat_function(fn, tree)
    if platform is not None and platform not in _PLATFORMS:
        raise LlmirError(f"platform must be one of {', '.join(_PLATFORMS)}, got {platform!r}")
    platforms = None if platform is None else (_PLATFORMS[platform],)
    staged = jax.jit(flat_fn, keep_unused=True).trace(*params, tokens)
    lowered = staged.lower(lowering_platforms=platforms).compiler_ir("stablehlo")
    cleanup(lowered, fold=fold)
    module = import_module(lowered)
    if staged.jaxpr.effects or _has_callback(module):
        raise LlmirError(
            f"{_name(fn)} calls back into Python as it runs (jax.debug.print or a callback), which a compiled forward "
            "cannot do: remove the call, or use jax.jit"
        )
    result = jax.tree.unflatten(results[0], staged.out_info)
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.extended) for leaf in jax.tree.leaves(result)):
        raise LlmirError(f"{_name(fn)} returns PRNG keys: return their data (jax.random.key_data)")
    paths = tree.paths
    _annotate(module, paths)
    return Traced(
        module=module,
        params=_parameters(paths, params),
        tokens=tokens,
        model_tree=tree,
        result=result,
        flat_fn=jax.jit(flat_fn),
    )


def check_logits(traced: Traced, name: str = "the forward") -> None:
    """Refuse a forward that a decoder cannot use for what it returns.

    Raises:
        LlmirError: the result is not one floating-point array [batch, seq, vocab], for tokens integer[batch, seq].
    """
    tokens, leaves = traced.tokens, jax.tree.leaves(traced.result)
    if len(tokens.shape) != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise LlmirError(f"{name} must take tokens int32[batch, seq], got {_text(tokens)}")
    if len(leaves) != 1 or not isinstance(traced.result, jax.ShapeDtypeStruct):
        found = ", ".join(map(_text, leaves)) or "nothing"
        raise LlmirError(f"{name} must return one array of logits [batch, seq, vocab], got a structure of {found}")
    logits = leaves[0]
    if len(logits.shape) != 3 or logits.shape[:2] != tokens.shape or logits.shape[2] < 1:
        batch, seq = tokens.shape
        raise LlmirError(
            f"{name} must return logits [{batch}, {seq}, vocab] for tokens {_text(tokens)}, got {_text(logits)}"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise LlmirError(f"{name} must return floating-point logits, got {_text(logits)}")


def _flat_function(fn: Callable[[Any, Any], Any], tree: ModelTree) -> tuple[Callable[..., list[jax.Array]], list[Any]]:
    """`fn` on the model's arrays and the tokens, and a list that gets the structure of its result when it is traced."""
    structures: list[Any] = []

    def flat_fn(*args: jax.Array) -> list[jax.Array]:
        *arrays, tokens = args
        model = tree.unflatten(arrays)
        result = fn(model, tokens)
        if tree.graphdef is not None:
            _check_unchanged(fn, model, tree, arrays, tokens)
        leaves, structure = jax.tree.flatten(result)
        structures.append(structure)
        return leaves

    flat_fn.__name__ = flat_fn.__qualname__ = _name(fn)
    return flat_fn, structures


def _check_unchanged(
    fn: Callable[..., Any], model: Any, tree: ModelTree, arrays: list[jax.Array], tokens: jax.Array
) -> None:
    states, _, _, graphdef = _split(model)
    remedy = (
        "a compiled forward must leave the model as it is: call model.eval() first (it makes dropout deterministic and "
        "batch norm use its running averages), and use no cache of the model's own"
    )
    if graphdef != tree.graphdef or jax.tree.structure(states) != tree.treedef:
        raise LlmirError(f"{_name(fn)} adds state to the model or removes some; {remedy}")
    keys = {i for i, _ in tree.key_impls}
    leaves = jax.tree.leaves(states)
    renewed = [i for i, (leaf, array) in enumerate(zip(leaves, arrays, strict=True)) if leaf is not array]
    renewed = [i for i in renewed if i not in keys]
    if not renewed:
        return
    closed = jax.make_jaxpr(lambda *args: _renewed(fn, tree, renewed, args))(*map(shape_of, (*arrays, tokens)))
    for i, outvar in zip(renewed, closed.jaxpr.outvars, strict=True):
        if _source(closed.jaxpr, outvar) is not closed.jaxpr.invars[i]:
            raise LlmirError(f"{_name(fn)} changes the model's state '{tree.paths[i]}'; {remedy}")


def _renewed(fn: Callable[..., Any], tree: ModelTree, indices: list[int], args: Any) -> list[Any]:
    """The model's arrays of these indices, as they are after a call of the forward."""
    *arrays, tokens = args
    model = tree.unflatten(arrays)
    fn(model, tokens)
    leaves = jax.tree.leaves(_split(model)[0])
    return [leaves[i] for i in indices]


def _source(jaxpr: Any, var: Any) -> Any:
    """The variable that `var` is a copy of: `nnx.remat` and inner calls hand the state through and give it back."""
    made_by = {id(out): (eqn, k) for eqn in jaxpr.eqns for k, out in enumerate(eqn.outvars)}
    while id(var) in made_by:
        eqn, k = made_by[id(var)]
        inner = next((eqn.params[name] for name in ("jaxpr", "call_jaxpr") if name in eqn.params), None)
        inner = getattr(inner, "jaxpr", inner)
        if inner is None or len(inner.invars) != len(eqn.invars) or len(inner.outvars) != len(eqn.outvars):
            return var
        if eqn.primitive.name in ("scan", "while", "cond"):
            return var
        passed = _source(inner, inner.outvars[k])
        places = [i for i, invar in enumerate(inner.invars) if invar is passed]
        if not places:
            return var
        var = eqn.invars[places[0]]
    return var


def _has_callback(module: ModuleOp) -> bool:
    return any(
        (isinstance(op, CustomCallOp) and "callback" in op.call_target_name.data)
        or op_name(op) in ("stablehlo.send", "stablehlo.recv")
        for op in module.walk()
    )


def _annotate(module: ModuleOp, paths: tuple[str, ...]) -> None:
    (main,) = (op for op in module.ops if isinstance(op, func.FuncOp) and op.sym_name.data == "main")
    notes: list[dict[str, Attribute]] = [{PATH: StringAttr(path)} for path in paths]
    notes.append({ROLE: StringAttr("tokens")})
    if main.arg_attrs is not None:
        notes = [{**old.data, **note} for old, note in zip(main.arg_attrs, notes, strict=True)]
    main.arg_attrs = ArrayAttr(map(DictionaryAttr, notes))


def _paths(state: Any) -> tuple[str, ...]:
    paths = []
    for outer, node in jax.tree.leaves_with_path(state, is_leaf=_is_box):
        if not _is_box(node):
            paths.append(_dotted(outer))
            continue
        for inner, _ in jax.tree.leaves_with_path(node):
            paths.append(_dotted((*outer, *inner[1:])))  # without the ".value" that every box adds
    return tuple(paths)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(_key(key) for key in path) or "model"


def _key(key: Any) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def _is_box(node: Any) -> bool:
    return isinstance(node, nnx.Variable | AxisMetadata)


def _is_nnx_module(node: Any) -> bool:
    return isinstance(node, nnx.Module)


def is_value(leaf: Any) -> bool:
    """Whether JAX takes it as an array."""
    return is_array_like(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct)


def is_array_like(leaf: Any) -> bool:
    """Whether JAX takes it as an array, or it is the shape of one."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic | bool | int | float | complex)


def _key_impl(leaf: Any) -> str:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return str(jax.random.key_impl(leaf))
    impls: list[str] = []
    jax.eval_shape(lambda key: impls.append(str(jax.random.key_impl(key))), leaf)
    return impls[0]


def _key_data(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type of an array, a scalar or a ShapeDtypeStruct."""
    aval = jax.typeof(leaf)
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def _text(leaf: jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
