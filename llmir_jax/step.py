"""The derived step as a function of arrays: one module a bucket, made from the one derivation when first traced."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, TensorType
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute

from llmir_jax.analysis.align import main_function
from llmir_jax.dense import element_dtype
from llmir_jax.derive import Derived
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.interop import call_module
from llmir_jax.pipeline import Recorder, specialize_step
from llmir_jax.quantization import QuantizedArray, Rounding, plain_rounding
from llmir_jax.runtime.batch import Cache, CacheGroup, Pages, StepBatch
from llmir_jax.transforms import signature
from llmir_jax.transforms.kv_cache_allocation import LAYER, RESULT
from llmir_jax.transforms.kv_cache_pruning import WINDOW
from llmir_jax.weights import Weight, WeightSource, describe, fill

if TYPE_CHECKING:
    from llmir_jax.targets.cpu.regions import InXla, Split
    from llmir_jax.targets.cpu.weights import Arrangement


def _number(attributes: dict[str, Any], name: str) -> int | None:
    value = attributes.get(name)
    return int(value.value.data) if isinstance(value, IntegerAttr) else None


class DerivedStep:
    """What the engine runs: parameters, the cache's groups, and `step` for each bucket of tokens."""

    def __init__(
        self,
        derived: Derived,
        source: WeightSource,
        *,
        max_seqs: int,
        buckets: tuple[int, ...],
        recorder: Recorder,
        native: bool = False,
        rounding: Rounding = plain_rounding,
    ):
        self.not_native: tuple[str, ...] = ()
        """Why nothing of the step is native code, where it was to be."""
        self.in_xla: dict[str, InXla] = {}
        """Kinds of operations, by name, that XLA computes between calls of native code, and why."""
        if native:
            prepared = _with_matrices(derived, recorder)
            found = _split(prepared)
            self.not_native = found.not_native
            native = not self.not_native
            derived = prepared if native else derived
            self.in_xla = found.in_xla if native else {}
        self._derived = derived
        self._recorder = recorder
        self._modules: dict[int, ModuleOp] = {}
        self.max_seqs = max_seqs
        self.max_seq_len = derived.max_seq_len
        self.buckets = buckets
        main = main_function(derived.module)
        self._attributes = signature.argument_attributes(main)
        self._args = list(main.body.block.args)
        self._arrangement: Arrangement | None = None
        self.weights: tuple[Weight, ...]
        self.params: tuple[jax.Array | QuantizedArray, ...]
        if native:
            self._pack(main, fill(derived.module, derived.plan, source, rounding))
        else:
            self.weights = tuple(fill(derived.module, derived.plan, source, rounding))
            self.params = tuple(weight.value for weight in self.weights)
        self.vocab_size = shape_of(signature.results(main)[0])[-1]
        self.cache_groups = self._groups()

    def _pack(self, main: FuncOp, weights: Iterator[Weight]) -> None:
        """Parameters as the one array that native code reads, and those that XLA does."""
        from llmir_jax.targets.cpu.weights import arrange  # here, since other targets need no LLVM

        self._arrangement = arrange(main)
        packed: list[Weight] = []

        def values() -> Iterator[jax.Array | QuantizedArray]:
            for weight in weights:
                packed.append(weight)
                yield weight.value
                packed[-1] = replace(weight, value=describe(weight.value))

        packed_array, apart = self._arrangement.fill(values())
        self.params = (packed_array, *apart)
        self.weights = tuple(packed)

    @property
    def is_native(self) -> bool:
        """Whether the step, or most of it, is native code for this machine's CPU."""
        return self._arrangement is not None

    def values(self, params: Any) -> list[Any]:
        """The value of each of `weights`, of what `params` holds. Traceable."""
        if self._arrangement is None:
            return list(params)
        return self._arrangement.values(params[0], params[1:], [weight.value for weight in self.weights])

    @property
    def derived_module(self) -> ModuleOp:
        """The step at the length it was derived at, before it is made for a bucket."""
        return self._derived.module

    def _role(self, index: int) -> str | None:
        role = self._attributes[index].get(signature.ROLE)
        return role.data if isinstance(role, StringAttr) else None

    def _groups(self) -> tuple[CacheGroup, ...]:
        layers: dict[int, list[int]] = {}
        for index, attributes in enumerate(self._attributes):
            if self._role(index) == "k_pages":
                group = _number(attributes, signature.GROUP)
                assert group is not None
                layers.setdefault(group, []).append(index)
        groups = []
        for _, indices in sorted(layers.items()):
            pages = self._args[indices[0]].type
            assert isinstance(pages, TensorType | llm.QuantizedTensorType)
            num_pages, page_size, num_kv_heads, head_dim = pages.get_shape()
            quantized_bits = None
            if isinstance(pages, llm.QuantizedTensorType):
                quantized_bits = pages.integer_type.width.data
            groups.append(
                CacheGroup(
                    num_layers=len(indices),
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    dtype=element_dtype(pages.element_type),
                    quantized_bits=quantized_bits,
                    window=_number(self._attributes[indices[0]], WINDOW),
                    num_pages=num_pages,
                    page_size=page_size,
                )
            )
        return tuple(groups)

    def init_cache(self) -> Cache:
        """Zeroed pages."""

        def pages(index: int) -> Pages:
            kind = self._args[index].type
            if isinstance(kind, llm.QuantizedTensorType):
                return tuple(_zeros(part) for part in kind.parts())
            return _zeros(kind)

        layers: dict[int, dict[int, dict[str, Pages]]] = {}
        for index, attributes in enumerate(self._attributes):
            role = self._role(index)
            if role in ("k_pages", "v_pages"):
                group, layer = _number(attributes, signature.GROUP) or 0, _number(attributes, LAYER) or 0
                layers.setdefault(group, {}).setdefault(layer, {})[role] = pages(index)
        return tuple(
            tuple((pair["k_pages"], pair["v_pages"]) for _, pair in sorted(group.items()))
            for _, group in sorted(layers.items())
        )

    def module(self, bucket: int) -> ModuleOp:
        """The step for `bucket` tokens, as it is compiled."""
        if bucket not in self._modules:
            self._modules[bucket] = specialize_step(self._derived, bucket, self._recorder, self._arrangement)
        return self._modules[bucket]

    def step(self, params: Any, cache: Cache, batch: StepBatch) -> tuple[jax.Array, Cache]:
        """Logits float32[max_seqs, vocab_size] of the rows asked for, and the new cache. Traceable."""
        module = self.module(batch.tokens.shape[0])
        remaining = iter(params)
        args: list[Any] = [next(remaining)] if self.is_native else []
        for index, attributes in enumerate(self._attributes):
            role = self._role(index)
            group, layer = _number(attributes, signature.GROUP) or 0, _number(attributes, LAYER) or 0
            if role is None and self._arrangement is not None and index not in self._arrangement.apart:
                continue
            if role is None:
                param = next(remaining)
                args += param.composite_parts() if isinstance(param, QuantizedArray) else [param]
            elif role in ("k_pages", "v_pages"):
                pages = cache[group][layer][0 if role == "k_pages" else 1]
                args += pages if isinstance(pages, tuple) else [pages]
            elif role == "block_tables":
                args.append(batch.block_tables[group])
            else:
                args.append(getattr(batch, role))
        arrays = iter(call_module(module, *args))
        results = [self._take(arrays, value.type) for value in signature.results(main_function(self._derived.module))]
        new: list[list[list[Any]]] = [[list(pair) for pair in layers] for layers in cache]
        for index, attributes in enumerate(self._attributes):
            place = _number(attributes, RESULT)
            if place is None:
                continue
            group, layer = _number(attributes, signature.GROUP) or 0, _number(attributes, LAYER) or 0
            new[group][layer][0 if self._role(index) == "k_pages" else 1] = results[place]
        logits = jnp.asarray(results[0]).reshape(self.max_seqs, self.vocab_size).astype(jnp.float32)
        return logits, tuple(tuple((k, v) for k, v in layers) for layers in new)

    @staticmethod
    def _take(arrays: Iterator[jax.Array], kind: Attribute) -> Pages:
        """The next of the arrays, or those that hold a value of a quantized type."""
        if isinstance(kind, llm.QuantizedTensorType):
            return tuple(next(arrays) for _ in kind.parts())
        return next(arrays)


def _with_matrices(derived: Derived, recorder: Recorder) -> Derived:
    """The derived step with its float weights in the form that native code packs."""
    from llmir_jax.transforms.matrix_weights import MatrixWeightsPass

    return replace(derived, module=recorder.run(derived.module.clone(), MatrixWeightsPass()))


def _split(derived: Derived) -> "Split":
    """What of the step is native code."""
    from llmir_jax.targets.cpu.regions import split

    return split(main_function(derived.module))


def _zeros(kind: Attribute) -> jax.Array:
    assert isinstance(kind, TensorType)
    return jnp.zeros(kind.get_shape(), element_dtype(kind.element_type))
