"""The derived step as a function of arrays: one module a bucket, made from the one derivation when first traced."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, TensorType
from xdsl.ir import Attribute

from llmir_jax.analysis.align import main_function, module_length
from llmir_jax.dense import element_dtype
from llmir_jax.dense_parameters import Stored, stored_array
from llmir_jax.derive import Derived
from llmir_jax.dialects import llm
from llmir_jax.interop import Executable, call_executable, executable
from llmir_jax.memory import collecting_later, give_back
from llmir_jax.pipeline import Recorder, specialize_step
from llmir_jax.quantization import QuantizedArray, Rounding, plain_rounding
from llmir_jax.runtime.batch import Cache, CacheGroup, Pages, StepBatch
from llmir_jax.step_record import NativeParts, StepRecord
from llmir_jax.stored_step import StoredStep
from llmir_jax.transforms import signature
from llmir_jax.transforms.kv_cache_allocation import LAYER, RESULT
from llmir_jax.transforms.kv_cache_pruning import WINDOW
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass, Unserved
from llmir_jax.weights import Weight, WeightSource, describe, fill

if TYPE_CHECKING:
    from llmir_jax.targets.cpu.regions import InXla
    from llmir_jax.targets.cpu.weights import Arrangement


def _number(attributes: dict[str, Any], name: str) -> int | None:
    value = attributes.get(name)
    return int(value.value.data) if isinstance(value, IntegerAttr) else None


class DerivedStep:
    """What the engine runs: parameters, the cache's groups, and `step` for each bucket of tokens."""

    def __init__(
        self,
        derived: Derived | Callable[[], Derived],
        source: WeightSource,
        *,
        max_seqs: int,
        buckets: tuple[int, ...],
        recorder: Recorder,
        native: bool = False,
        rounding: Rounding = plain_rounding,
        notes: Sequence[str] = (),
        stored: StoredStep | None = None,
        record: StepRecord | None = None,
        kernels: LowerToKernelsPass | None = None,
    ):
        """
        Args:
            derived: the derived step, or what derives it when its operations are asked for, if there is a `record`.
            notes: for the report, before the derivation's own.
            stored: where the step is kept on disk, if it is.
            record: of the step, if it was found there.
            kernels: lowers it to its target's kernels, where they serve it.
        """
        self._derive = derived if callable(derived) else None
        self._recorder = recorder
        self._stored = stored
        self.kernels = kernels
        """How it is lowered to its target's kernels, if it is."""
        self._modules: dict[int, ModuleOp] = {}
        self._executables: dict[int, Executable] = {}
        if record is None:
            assert not callable(derived), "a step without a record is derived"
            self._derived, parts = _lowerable(derived, recorder) if native else (derived, NativeParts())
            record = StepRecord.of(self._derived, parts, notes)
            if stored is not None:
                stored.keep(record, self._derived.module)
        self.record = record
        """What the step is, without its operations."""
        self.max_seqs = max_seqs
        self.max_seq_len = record.max_seq_len
        self.buckets = buckets
        main = main_function(record.main)
        self._attributes = signature.argument_attributes(main)
        self._args = list(main.body.block.args)
        self._arrangement = record.native.arrangement
        self.weights: tuple[Weight, ...]
        self.params: tuple[jax.Array | QuantizedArray, ...]
        weights = fill(record.main, record.plan, source, rounding)
        if self._arrangement is not None:
            self._pack(self._arrangement, weights)
        else:
            self.weights = tuple(weights)
            self.params = tuple(weight.value for weight in self.weights)
        logits = record.results[0]
        assert isinstance(logits, TensorType)
        self.vocab_size = logits.get_shape()[-1]
        self.cache_groups = self._groups()

    @property
    def not_native(self) -> tuple[str, ...]:
        """Why nothing of the step is native code, where it was to be."""
        return self.record.native.not_native

    @property
    def in_xla(self) -> "Mapping[str, InXla]":
        """Kinds of operations, by name, that XLA computes between calls of native code, and why."""
        return self.record.native.in_xla

    @cached_property
    def _derived(self) -> Derived:
        """The derived step with its operations: read from disk, or derived again."""
        assert self._derive is not None and self._stored is not None
        record = self.record
        module = self._stored.module()
        if module is not None:
            length = module_length(module)
            return Derived(module, length, self.max_seqs, record.max_seq_len, plan=record.plan)
        derived = self._derive()
        return _lowerable(derived, self._recorder)[0] if record.native.arrangement is not None else derived

    def _pack(self, arrangement: "Arrangement", weights: Iterator[Weight]) -> None:
        """Parameters as the one array that native code reads, and those that XLA does."""
        packed: list[Weight] = []

        def values() -> Iterator[jax.Array | QuantizedArray]:
            for weight in weights:
                packed.append(weight)
                yield weight.value
                packed[-1] = replace(weight, value=describe(weight.value))

        packed_array, apart = arrangement.fill(values())
        self.params = (packed_array, *apart)
        self.weights = tuple(packed)

    @property
    def is_native(self) -> bool:
        """Whether the step, or most of it, is native code for this machine's CPU."""
        return self._arrangement is not None

    def stored(self, number: int) -> Stored:
        """The value of one of `weights` as a function of what is stored of it."""
        if self._arrangement is None:
            return stored_array(self.params[number])
        packed, *apart = self.params
        assert isinstance(packed, jax.Array)
        return self._arrangement.stored(packed, apart, number, self.weights[number].value)

    @property
    def derived_module(self) -> ModuleOp:
        """The step at the length it was derived at, before it is made for a bucket."""
        return self._derived.module

    @cached_property
    def unserved(self) -> Unserved:
        """What has no kernel, of the kinds of operations that the target has kernels for, and why."""
        return {} if self.kernels is None else self.kernels.unserved(self._derived.module)

    @cached_property
    def _kernel_pages(self) -> frozenset[int]:
        """Arguments that hold pages as a kernel wants them."""
        return frozenset() if self.kernels is None else self.kernels.kernel_pages(self._derived.module)

    def _stored_type(self, index: int) -> Attribute:
        """The type of an argument that holds pages, as a kernel wants it where one serves it."""
        kind = self._args[index].type
        return self.kernels.page_type(kind) if self.kernels is not None and index in self._kernel_pages else kind

    def _row_width(self, index: int) -> int | None:
        """Elements of a row of these pages, where a kernel wants them in rows."""
        kind = self._stored_type(index)
        return kind.get_shape()[2] if isinstance(kind, TensorType) and index in self._kernel_pages else None

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
                    row_width=self._row_width(indices[0]),
                    window=_number(self._attributes[indices[0]], WINDOW),
                    num_pages=num_pages,
                    page_size=page_size,
                )
            )
        return tuple(groups)

    def init_cache(self) -> Cache:
        """Zeroed pages."""

        def pages(index: int) -> Pages:
            kind = self._stored_type(index)
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
            cache = None if self._stored is None else self._stored.cache
            self._modules[bucket] = specialize_step(
                self._derived, bucket, self._recorder, self._arrangement, cache, self.kernels
            )
        return self._modules[bucket]

    def _executable(self, bucket: int) -> Executable:
        """What is called for `bucket` tokens: from disk if it is there, else made of the module."""
        if bucket in self._executables:
            return self._executables[bucket]
        found = None if self._stored is None else self._stored.lowered(bucket, self.native_key)
        if found is None:
            with collecting_later():
                module = self.module(bucket)
                found = executable(module)
            if self._stored is not None:
                self._stored.keep_lowered(bucket, self.native_key, module, found)
                del module, self._modules[bucket]  # what it calls is all that is needed from now on
            give_back(collect=False)
        self._executables[bucket] = found
        return found

    @cached_property
    def native_key(self) -> tuple[Any, ...]:
        """What native code, or the choice of kernels, depends on besides the step."""
        if self.kernels is not None:
            return self.kernels.key
        if not self.is_native:
            return ()
        from llmir_jax.targets.cpu.host import this_host
        from llmir_jax.targets.cpu.team import team

        return this_host(), team().size

    def step(self, params: Any, cache: Cache, batch: StepBatch) -> tuple[jax.Array, Cache]:
        """Logits float32[max_seqs, vocab_size] of the rows asked for, and the new cache. Traceable."""
        called = self._executable(batch.tokens.shape[0])
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
        arrays = iter(call_executable(called, *args))
        results = [self._take(arrays, kind) for kind in self.record.results]
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


def _lowerable(derived: Derived, recorder: Recorder) -> tuple[Derived, NativeParts]:
    """The derived step in the form that native code is made of, if it is, and what is native of it."""
    from llmir_jax.targets.cpu.regions import split
    from llmir_jax.targets.cpu.weights import arrange
    from llmir_jax.transforms.matrix_weights import MatrixWeightsPass

    prepared = replace(derived, module=recorder.run(derived.module.clone(), MatrixWeightsPass()))
    main = main_function(prepared.module)
    found = split(main)
    if found.not_native:
        return derived, NativeParts(not_native=found.not_native)
    return prepared, NativeParts(arrangement=arrange(main), in_xla=found.in_xla)


def _zeros(kind: Attribute) -> jax.Array:
    assert isinstance(kind, TensorType)
    return jnp.zeros(kind.get_shape(), element_dtype(kind.element_type))
