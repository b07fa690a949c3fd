"""The derived step as a function of arrays: one module a bucket, made from the one derivation when first traced."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, TensorType
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute

from llmir_jax.analysis.align import main_function, module_length
from llmir_jax.checkpoint.source import ParameterSource
from llmir_jax.dense import element_dtype
from llmir_jax.dense_parameters import Stored, stored_array
from llmir_jax.derive import Derived
from llmir_jax.dialects import llm
from llmir_jax.interop import Executable, call_executable, executable
from llmir_jax.memory import collecting_later, give_back
from llmir_jax.own_parts import OwnParts
from llmir_jax.pipeline import Recorder, specialize_step
from llmir_jax.placement import Placement
from llmir_jax.quantization import QuantizedArray, Rounding, plain_rounding
from llmir_jax.runtime.batch import Cache, CacheGroup, Pages, StepBatch
from llmir_jax.step_record import NativeParts, StepRecord
from llmir_jax.stored_step import StoredStep
from llmir_jax.transforms import signature
from llmir_jax.transforms.kv_cache_allocation import LAYER, RESULT
from llmir_jax.transforms.kv_cache_pruning import WINDOW
from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass, Unserved
from llmir_jax.transforms.memory_planning import part_bytes, parts_of
from llmir_jax.transforms.pipeline_partitioning import CARRIED
from llmir_jax.transforms.sharding_attributes import of_argument
from llmir_jax.weights import Weight, WeightSource, describe, fill, shapes_of_weights

if TYPE_CHECKING:
    from llmir_jax.targets.cpu.regions import InXla
    from llmir_jax.targets.cpu.weights import Arrangement


AHEAD = "lower ahead"
"""Name of the seconds that `DerivedStep.lower_ahead` takes."""


def _number(attributes: dict[str, Any], name: str) -> int | None:
    value = attributes.get(name)
    return int(value.value.data) if isinstance(value, IntegerAttr) else None


def cache_groups_of(
    main: FuncOp, row_width: Callable[[int], int | None] = lambda index: None
) -> tuple[CacheGroup, ...]:
    """The groups of layers of a step that share a page table, from its arguments.

    `row_width`: elements of a row of an argument of pages, where a kernel wants them in rows.
    """
    attributes, args = signature.argument_attributes(main), main.body.block.args
    layers: dict[int, list[int]] = {}
    for arg in signature.arguments(main, "k_pages"):
        group = _number(attributes[arg.index], signature.GROUP)
        assert group is not None
        layers.setdefault(group, []).append(arg.index)
    groups = []
    for _, indices in sorted(layers.items()):
        pages = args[indices[0]].type
        assert isinstance(pages, TensorType | llm.QuantizedTensorType)
        num_pages, page_size, num_kv_heads, head_dim = pages.get_shape()
        quantized_bits, side_bytes = None, 0
        if isinstance(pages, llm.QuantizedTensorType):
            quantized_bits = pages.integer_type.width.data
            side_bytes = sum(part_bytes(part) for part in pages.parts()[1:]) // (num_pages * page_size * num_kv_heads)
        groups.append(
            CacheGroup(
                num_layers=len(indices),
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype=element_dtype(pages.element_type),
                quantized_bits=quantized_bits,
                side_bytes=side_bytes,
                row_width=row_width(indices[0]),
                window=_number(attributes[indices[0]], WINDOW),
                num_pages=num_pages,
                page_size=page_size,
            )
        )
    return tuple(groups)


class DerivedStep:
    """What the engine runs: parameters, the cache's groups, and `step` for each bucket of tokens."""

    def __init__(
        self,
        derived: Derived | None,
        source: WeightSource,
        *,
        derive: Callable[[], Derived] | None = None,
        max_seqs: int,
        buckets: tuple[int, ...],
        recorder: Recorder,
        native: bool = False,
        rounding: Rounding = plain_rounding,
        notes: Sequence[str] = (),
        stored: StoredStep | None = None,
        record: StepRecord | None = None,
        placement: Placement | None = None,
        kernels: LowerToKernelsPass | None = None,
    ):
        """
        Args:
            derived: the derived step; None if there is a `record`.
            derive: derives it again when its operations are asked for, and are not on disk any more.
            notes: for the report, before the derivation's own.
            stored: where the step is kept on disk, if it is.
            record: of the step, if it was found there.
            placement: where its arrays live; its own is that of `derived`, which suits the step's heads.
            kernels: lowers it to its target's kernels, where they serve it.
        """
        self._source, self._rounding = source, rounding
        self._derive = derive
        self._recorder = recorder
        self._stored = stored
        self.kernels = kernels
        """How it is lowered to its target's kernels, if it is."""
        self._modules: dict[int, ModuleOp] = {}
        self._executables: dict[int, Executable] = {}
        if record is None:
            assert derived is not None, "a step without a record is derived"
            self._derived, parts = _lowerable(derived, recorder) if native else (derived, NativeParts())
            record = StepRecord.of(self._derived, parts, notes)
            if stored is not None:
                stored.keep(record, self._derived.module)
        self.placement = placement if derived is None or placement is None else derived.placement
        self.record = record
        """What the step is, without its operations."""
        self.max_seqs = max_seqs
        self.max_seq_len = record.max_seq_len
        self.buckets = buckets
        self._describe_main()
        self._arrangement = record.native.arrangement
        logits = record.results[0]
        assert isinstance(logits, TensorType)
        self.vocab_size = logits.get_shape()[-1]

    def _describe_main(self) -> None:
        """What the record tells of the arguments of @main."""
        main = main_function(self.record.main)
        self._attributes = signature.argument_attributes(main)
        self._args = list(main.body.block.args)
        self.cache_groups = cache_groups_of(main, self._row_width)

    def lower_ahead(self, num_rows: int) -> None:
        """Lower for all buckets up to the one that holds so many rows, and let go of the operations.

        To be called before the weights are read, so that there is less in memory beside them. Does nothing unless the
        step was derived just now and is on disk, from where its operations come back.
        """
        if self._stored is None or "_derived" not in self.__dict__:
            return
        start = time.perf_counter()
        last = next((bucket for bucket in self.buckets if bucket >= num_rows), self.buckets[-1])
        for bucket in self.buckets[: self.buckets.index(last) + 1]:
            self._executable(bucket)
        self.__dict__.pop("_derived", None)
        self._recorder.seconds[AHEAD] = time.perf_counter() - start
        give_back()

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The parameters; where native code or other processes have them, shapes and dtypes are in place of arrays.

        They are read when this or `params` is first asked for. Raises LlmirError, see `weights.fill`.
        """
        return self._filled[0]

    @property
    def params(self) -> tuple[jax.Array | QuantizedArray, ...]:
        """What `step` takes; nothing where other processes have the step."""
        return self._filled[1]

    @cached_property
    def _filled(self) -> tuple[tuple[Weight, ...], tuple[jax.Array | QuantizedArray, ...]]:
        record, placement = self.record, self.placement
        if placement is not None and not placement.is_here:
            return tuple(shapes_of_weights(record.main, record.plan)), ()
        if placement is None:
            weights = fill(record.main, record.plan, self._source, self._rounding)
        else:
            own = None
            if isinstance(self._source, ParameterSource):
                own = OwnParts(placement=placement, source=self._source, attributes=self._attributes)
            weights = self._placed(fill(record.main, record.plan, self._source, self._rounding, own), placement)
        if self._arrangement is not None:
            return self._pack(self._arrangement, weights)
        values = tuple(weights)
        return values, tuple(weight.value for weight in values)

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
        record, module = self.record, self._stored.module()
        if module is not None:
            length = module_length(module)
            return Derived(module, length, self.max_seqs, record.max_seq_len, plan=record.plan)
        derived = self._derive()
        return _lowerable(derived, self._recorder)[0] if record.native.arrangement is not None else derived

    def _placed(self, weights: Iterator[Weight], placement: Placement) -> Iterator[Weight]:
        """The weights, each where it lives, one at a time."""
        for (arg, _), weight in zip(signature.parameter_paths(main_function(self.record.main)), weights, strict=True):
            leaves, structure = jax.tree.flatten(weight.value)
            spec = of_argument(self._attributes[arg.index])
            assert spec is not None, f"{weight.path} is not partitioned"
            where = leaves[0].sharding
            if isinstance(where, NamedSharding) and where.mesh == placement.mesh:
                yield weight  # it was read there
                continue
            placed = [placement.put(leaf, own) for leaf, (_, own) in zip(leaves, parts_of(arg.type, spec), strict=True)]
            yield replace(weight, value=jax.tree.unflatten(structure, placed))

    def _pack(
        self, arrangement: "Arrangement", weights: Iterator[Weight]
    ) -> tuple[tuple[Weight, ...], tuple[jax.Array | QuantizedArray, ...]]:
        """Parameters as the one array that native code reads, and those that XLA does."""
        packed: list[Weight] = []

        def values() -> Iterator[jax.Array | QuantizedArray]:
            for weight in weights:
                packed.append(weight)
                yield weight.value
                packed[-1] = replace(weight, value=describe(weight.value))

        packed_array, apart = arrangement.fill(values())
        return tuple(packed), (packed_array, *apart)

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

    def on_host(self, number: int) -> Stored:
        """`stored`, of arrays that this process has whole."""
        placement = self.placement
        if placement is None or placement.is_local:
            return self.stored(number)
        return stored_array(jax.tree.map(lambda x: jnp.asarray(placement.to_host(x)), self.params[number]))

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

    def _stored_types(self, index: int) -> Sequence[Attribute]:
        """The types of the arrays that hold an argument of pages, as a kernel wants them where one serves it."""
        kind = self._args[index].type
        if self.kernels is not None and index in self._kernel_pages:
            return self.kernels.page_types(kind)
        return kind.parts() if isinstance(kind, llm.QuantizedTensorType) else (kind,)

    def _row_width(self, index: int) -> int | None:
        """Elements of a row of these pages, where a kernel wants them in rows."""
        kind = self._stored_types(index)[0]
        return kind.get_shape()[2] if isinstance(kind, TensorType) and index in self._kernel_pages else None

    def _role(self, index: int) -> str | None:
        return signature.role_of(self._attributes[index])

    @property
    def compiler_options(self) -> dict[str, bool]:
        """See `StepModel`.

        Around native code XLA has one thread: native code's threads still wait for the next step then, on all cores, so
        that work which XLA shares out to threads of its own takes longer than one thread does.
        """
        return {"xla_cpu_multi_thread_eigen": False} if self.is_native and not self.in_xla else {}

    def init_cache(self) -> Cache:
        """Zeroed pages; none where other processes have the step."""
        if self.placement is not None and not self.placement.is_here:
            return ()

        def pages(index: int) -> Pages:
            if self.placement is not None:
                kind = self._args[index].type
                spec = of_argument(self._attributes[index])
                assert spec is not None
                parts = [
                    self.placement.zeros(part.get_shape(), element_dtype(part.element_type), own)
                    for part, own in parts_of(kind, spec)
                ]
                return tuple(parts) if isinstance(kind, llm.QuantizedTensorType) else parts[0]
            arrays = tuple(map(_zeros, self._stored_types(index)))
            return arrays if isinstance(self._args[index].type, llm.QuantizedTensorType) else arrays[0]

        layers: dict[int, dict[int, dict[str, Pages]]] = {}
        for index, attributes in enumerate(self._attributes):
            role = self._role(index)
            if role in ("k_pages", "v_pages"):
                group, layer = _number(attributes, signature.GROUP) or 0, _number(attributes, LAYER) or 0
                layers.setdefault(group, {}).setdefault(layer, {})[role] = pages(index)
        return tuple(
            tuple((pair["k_pages"], pair["v_pages"]) for _, pair in sorted(layers.get(group, {}).items()))
            for group in range(max(layers, default=-1) + 1)  # a stage of a pipeline may have no layer of one
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
                if len(self._executables) + 1 == len(self.buckets):
                    self.__dict__.pop("_derived", None)  # it was needed for the last time, and is on disk
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

    def carried(self, num_rows: int) -> list[jax.ShapeDtypeStruct]:
        """What a stage of a pipeline gets from the one before, its first arguments, for so many rows of tokens."""
        number = sum(self._role(index) == CARRIED for index in range(len(self._attributes)))
        if not number:
            return []
        return [jax.ShapeDtypeStruct(own.shape, own.dtype) for own in self._executable(num_rows).inputs[:number]]

    def step(self, params: Any, cache: Cache, batch: StepBatch) -> tuple[jax.Array, Cache]:
        """Logits float32[max_seqs, vocab_size] of the rows asked for, and the new cache. Traceable."""
        (logits,), cache = self.call(params, cache, batch)
        return jnp.asarray(logits).reshape(self.max_seqs, self.vocab_size).astype(jnp.float32), cache

    def call(
        self, params: Any, cache: Cache, batch: StepBatch, carried: Sequence[jax.Array] = ()
    ) -> tuple[list[Any], Cache]:
        """What @main returns before new pages, and the new cache. Traceable.

        `carried` is what a stage of a pipeline gets from the one before.
        """
        arriving = iter(carried)
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
            elif role == CARRIED:
                args.append(next(arriving))
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
            new[group][layer][0 if self._role(index) == "k_pages" else 1] = self._where_it_lives(index, results[place])
        num_pages = sum(RESULT in attributes for attributes in self._attributes)
        rest = results[: len(results) - num_pages]
        return rest, tuple(tuple((k, v) for k, v in layers) for layers in new)

    def _where_it_lives(self, index: int, pages: Pages) -> Pages:
        """New pages, where those that they replace are, which are donated for them."""
        spec = of_argument(self._attributes[index])
        if self.placement is None or spec is None:
            return pages
        arrays = pages if isinstance(pages, tuple) else (pages,)
        parts = parts_of(self._args[index].type, spec)
        placed = [self.placement.constrain(array, own) for array, (_, own) in zip(arrays, parts, strict=True)]
        return tuple(placed) if isinstance(pages, tuple) else placed[0]

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
