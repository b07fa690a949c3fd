"""`llmir.jit`: a forward function compiled through the pipeline, and the door to its decoder.

Called, it is a drop-in for `jax.jit` of the same function: the function is traced, its module goes through the passes,
and the result is called in its place, inside a `jax.jit` whose cache decides when to do that again. Differentiation and
`vmap` apply to the original function. On a TPU or an NVIDIA GPU attention is flash attention, where that is shown to be
the same (see `direct_call`); `forward.lower(model, tokens).report()` says where.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, overload

import jax

from llmir_jax.errors import LlmirError
from llmir_jax.placement import MeshOption, check_mesh
from llmir_jax.quantization import Quantize, check_quantize
from llmir_jax.trace import (
    ModelTree,
    check_values,
    flatten_model,
    is_array_like,
    is_value,
    shape_of,
    trace_flat,
)

if TYPE_CHECKING:
    from llmir_jax.direct_call import DirectCall
    from llmir_jax.report import CallReport
    from llmir_jax.trace import Traced

TARGETS = ("cpu", "gpu", "gpu-mosaic", "tpu", "reference")
STAGES = ("stablehlo", "llm", "target")
_OPTIONS = ("quantize", "mesh", "target")


@overload
def jit(
    fn: Callable[..., Any],
    *,
    quantize: Quantize = None,
    mesh: MeshOption = None,
    target: str | None = None,
    **unknown: Any,
) -> "Jitted": ...


@overload
def jit(
    fn: None = None, *, quantize: Quantize = None, mesh: MeshOption = None, target: str | None = None, **unknown: Any
) -> "Callable[[Callable[..., Any]], Jitted]": ...


def jit(
    fn: Callable[..., Any] | None = None,
    *,
    quantize: Quantize = None,
    mesh: MeshOption = None,
    target: str | None = None,
    **unknown: Any,
) -> Any:
    """Compile a forward function of (model, tokens); also ``@llmir.jit(…)`` with options.

    Args:
        fn: function of (model, tokens int32[batch, seq]); the model is a pytree of arrays or an nnx module. It may
            return any pytree of arrays; a decoder wants logits, float[batch, seq, vocab].
        quantize: what a decoder's weights become: "int8", "int4", another scheme, or rules by the parameter's path such
            as ``{"layers/.*/mlp": "int4", ".*norm": None}``. A direct call computes with the model's own weights.
        mesh: of a decoder: devices to share the work, a `jax.sharding.Mesh` or axes and their sizes such as "tensor=3"
            (see `sharding`). A direct call computes where its arguments are.
        target: of a decoder: "cpu", "gpu", "tpu" or "reference"; None for the device that JAX uses. In this version
            the CPU has native code, TPUs and NVIDIA GPUs have kernels, and what has none runs as its reference
            decomposition, compiled by XLA. "gpu-mosaic" is "gpu" with another kernel of attention, for an H100. A
            direct call runs where its arguments are; "reference" and "cpu" keep its attention as it is written.

    Returns:
        A `Jitted`, or without ``fn`` a decorator that makes one.

    Raises:
        LlmirError: an option that does not exist, or a value of one that is not available.
    """
    if unknown:
        raise LlmirError(f"jit has no option {_listed(unknown)}: its options are {_listed(_OPTIONS)}")
    check_quantize(quantize)
    check_mesh(mesh)
    if target is not None and target not in TARGETS:
        raise LlmirError(f"target must be one of {_listed(TARGETS)}, or None for the device JAX uses; got {target!r}")
    if fn is None:
        return functools.partial(Jitted, target=target, quantize=quantize, mesh=mesh)
    return Jitted(fn, target=target, quantize=quantize, mesh=mesh)


class Jitted:
    """A forward function compiled through the pipeline: call it as the function itself. Made by `llmir.jit`."""

    def __init__(
        self, fn: Callable[..., Any], *, target: str | None = None, quantize: Quantize = None, mesh: MeshOption = None
    ):
        if not callable(fn):
            raise LlmirError(f"jit takes a function of (model, tokens), got {type(fn).__name__}")
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._name = getattr(fn, "__name__", type(fn).__name__)
        self._signature = _signature(fn, self._name)
        self._target = target
        self._quantize = quantize
        self._mesh = mesh

        def call_flat(params: list[jax.Array], tokens: jax.Array, tree: ModelTree) -> Any:
            return self._compile(list(map(shape_of, params)), tree, shape_of(tokens))(params, tokens)

        def call(model: Any, tokens: jax.Array) -> Any:
            params, tree = flatten_model(model)
            return call_flat(params, tokens, tree)

        self._call = jax.jit(_named(call, self._name))
        self._call_flat = jax.jit(_named(call_flat, self._name), static_argnames="tree")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns for (model, tokens)."""
        model, tokens = self._bind(args, kwargs)
        if all(map(is_value, jax.tree.leaves(model))):
            return self._call(model, tokens)  # its structure is taken apart at tracing only: nnx takes long at it
        arrays, tree = flatten_model(model)  # an nnx module that is no pytree; or refused
        check_values(arrays, tree)
        return self._call_flat(arrays, tokens, tree=tree)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: the instance is the model."""
        return self if instance is None else MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<llmir.jit of {self._name}>"

    def lower(self, *args: Any, **kwargs: Any) -> "Lowered":
        """Trace and run the passes for these shapes: (model, tokens) of arrays or ShapeDtypeStructs."""
        model, tokens = self._bind(args, kwargs)
        arrays, tree = flatten_model(model)
        shapes = [shape_of(array) for array in arrays]
        direct = self._compile(shapes, tree, shape_of(tokens))
        call = jax.jit(_named(lambda params, tokens: direct(params, tokens), self._name))
        return Lowered(name=self._name, direct=direct, lowered=call.lower(shapes, shape_of(tokens)))

    def decoder(self, model: Any, **options: Any) -> Any:
        """The decoder that serves this forward for a model. Options: see `llmir_jax.decoder.Decoder.build`."""
        from llmir_jax.decoder import Decoder  # here, since serving is not needed to call a forward

        known = [name for name in inspect.signature(Decoder.build).parameters if name not in ("forward", "model")]
        if unknown := [name for name in options if name not in known]:
            raise LlmirError(f"decoder has no option {_listed(unknown)}: its options are {_listed(known)}")
        if self._target is not None and "target" in known:
            options.setdefault("target", self._target)
        options.setdefault("quantize", self._quantize)
        options.setdefault("mesh", self._mesh)
        return Decoder.build(self._fn, model, **options)

    def _bind(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        bound = self._signature.bind(*args, **kwargs)
        if len(bound.args) != 2 or bound.kwargs:
            given = len(bound.args) + len(bound.kwargs)
            raise LlmirError(f"{self._name} is compiled as a function of (model, tokens), got {given} arguments")
        model, tokens = bound.args
        if not is_array_like(tokens):
            raise LlmirError(f"{self._name}: tokens must be an array int32[batch, seq], got {type(tokens).__name__}")
        return model, tokens

    def _compile(
        self, params: list[jax.ShapeDtypeStruct], tree: ModelTree, tokens: jax.ShapeDtypeStruct
    ) -> "DirectCall":
        from llmir_jax.direct_call import direct_call  # here, since the pipeline is not needed to decorate
        from llmir_jax.target_choice import flash_lowering

        def trace_at(length: int) -> "Traced":
            batch = jax.ShapeDtypeStruct((*tokens.shape[:-1], length), tokens.dtype)
            return trace_flat(self._fn, params, tree, batch, fold=False)

        return direct_call(trace_flat(self._fn, params, tree, tokens), trace_at, flash_lowering(self._target))


class Lowered:
    """A forward compiled by the passes for fixed shapes, not yet by XLA. In the manner of `jax.stages.Lowered`."""

    def __init__(self, *, name: str, direct: "DirectCall", lowered: jax.stages.Lowered):
        self._name = name
        self._traced = direct.traced
        self._direct = direct
        self._lowered = lowered

    def report(self) -> "CallReport":
        """What serves the attention of the forward, and why not a kernel where none does."""
        return self._direct.report

    @property
    def out_info(self) -> Any:
        """The pytree that the forward returns, of ShapeDtypeStructs."""
        return self._traced.result

    def as_text(self, stage: str = "target") -> str:
        """Text of a stage: "stablehlo" (as traced), "llm" (after the passes) or "target" (what XLA compiles)."""
        from llmir_jax.pipeline import text_of

        if stage == "stablehlo":
            return text_of(self._traced.module)
        if stage == "llm":
            return self._direct.text
        if stage == "target":
            return self._lowered.as_text()
        raise LlmirError(f"as_text: stage must be one of {_listed(STAGES)}, got {stage!r}")

    def compile(self) -> "Compiled":
        """Compile with XLA for the device that JAX uses."""
        return Compiled(name=self._name, traced=self._traced, compiled=self._lowered.compile())


class Compiled:
    """A forward compiled for fixed shapes. In the manner of `jax.stages.Compiled`."""

    def __init__(self, *, name: str, traced: "Traced", compiled: jax.stages.Compiled):
        self._name = name
        self._traced = traced
        self._compiled = compiled

    def __call__(self, model: Any, tokens: Any) -> Any:
        """What the forward returns. Raises LlmirError for a model or tokens of other shapes than it was lowered for."""
        params, tree = flatten_model(model)
        check_values(params, tree)
        if tree != self._traced.model_tree:
            raise LlmirError(f"{self._name} was lowered for a model of another structure: lower it for this one")
        expected = [(p.path, p.shape, p.dtype) for p in self._traced.params]
        expected.append(("tokens", self._traced.tokens.shape, self._traced.tokens.dtype))
        for (path, shape, dtype), got in zip(expected, map(shape_of, (*params, tokens)), strict=True):
            if (got.shape, got.dtype) != (shape, dtype):
                raise LlmirError(
                    f"{self._name} was lowered for '{path}' of {dtype}{list(shape)}, got {got.dtype}{list(got.shape)}: "
                    "lower it for these shapes"
                )
        return self._compiled(params, tokens)

    @property
    def out_info(self) -> Any:
        """The pytree that the forward returns, of ShapeDtypeStructs."""
        return self._traced.result

    def as_text(self) -> str:
        """The optimised program of the backend's compiler (HLO)."""
        return self._compiled.as_text() or ""

    def cost_analysis(self) -> Any:
        """The backend's estimate: floating-point operations, bytes accessed. None where it has none."""
        return self._compiled.cost_analysis()

    def memory_analysis(self) -> Any:
        """Bytes of arguments, results, temporaries and code. None where the backend does not say."""
        return self._compiled.memory_analysis()


def _named(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`fn`, called so in programs and profiles."""
    fn.__name__ = fn.__qualname__ = name
    return fn


def _signature(fn: Callable[..., Any], name: str) -> inspect.Signature:
    signature = inspect.signature(fn)
    try:
        signature.bind(None, None)
    except TypeError:
        parameters = _listed(signature.parameters)
        raise LlmirError(f"{name}({parameters}) is no function of (model, tokens): wrap it in one") from None
    return signature


def _listed(names: Any) -> str:
    return ", ".join(names)
