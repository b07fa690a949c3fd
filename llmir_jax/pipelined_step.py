"""A derived step in stages, each with its layers' parameters and cache on devices of its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from xdsl.dialects.builtin import ModuleOp

from llmir_jax.dense_parameters import Stored, stored_array
from llmir_jax.derive import Derived
from llmir_jax.errors import LlmirError
from llmir_jax.exchange import Exchange
from llmir_jax.pipeline import Recorder
from llmir_jax.placement import processes_of
from llmir_jax.quantization import Rounding
from llmir_jax.runtime.batch import Cache, StepBatch
from llmir_jax.step import DerivedStep
from llmir_jax.step_record import NativeParts, StepRecord
from llmir_jax.transforms.memory_planning import MemoryPlanningPass
from llmir_jax.transforms.pipeline_partitioning import cut_into_stages
from llmir_jax.weights import Weight, WeightSource, describe


class PipelinedStep(DerivedStep):
    """As `DerivedStep`, whose `params` and cache are tuples with an entry for each of `stages`."""

    def __init__(
        self,
        derived: Derived,
        source: WeightSource,
        *,
        meshes: Sequence[Mesh],
        max_seqs: int,
        buckets: tuple[int, ...],
        recorder: Recorder,
        rounding: Rounding,
        notes: Sequence[str] = (),
    ):
        """
        Args:
            derived: partitioned as for the first of the meshes.
            meshes: one a stage, all of the same shape.
        """
        placement = derived.placement
        assert placement is not None
        modules = cut_into_stages(derived.module, len(meshes))
        self.stages: tuple[DerivedStep, ...] = ()
        for number, (module, mesh) in enumerate(zip(modules, meshes, strict=True)):
            own = placement.on(mesh)
            recorder.run(module, MemoryPlanningPass(mesh=own.text, device_bytes=own.device_bytes))
            part = replace(derived, module=module, placement=own, has_logits=number == len(meshes) - 1)
            stage = DerivedStep(
                part,
                source,
                max_seqs=max_seqs,
                buckets=buckets,
                recorder=recorder,
                rounding=rounding,
                placement=own,
            )
            self.stages = (*self.stages, stage)
        self.placement = self.stages[-1].placement
        self.exchange: Exchange | None = None
        """Between the processes of all stages; None where there is one."""
        if len(processes_of(*meshes)) > 1:
            self.exchange = Exchange([device for mesh in meshes for device in mesh.devices.flat])
        self.record = StepRecord.of(derived, NativeParts(), notes)
        self.max_seqs = max_seqs
        self.max_seq_len = derived.max_seq_len
        self.buckets = buckets
        self._whole = derived
        self._arrangement = None
        self._stored = self.kernels = None
        self._describe_main()
        found: dict[Any, tuple[Weight, int, int]] = {}  # tied weights are in several stages
        for at, stage in enumerate(self.stages):
            for number, weight in enumerate(stage.weights):
                found.setdefault((weight.path, weight.pieces), (weight, at, number))
        weights = tuple(weight for weight, _, _ in found.values())
        params: Any = tuple(stage.params for stage in self.stages)
        self._filled = weights, params
        self._places = [(at, number) for _, at, number in found.values()]
        self.vocab_size = self.stages[-1].vocab_size

    @property
    def derived_module(self) -> ModuleOp:
        return self._whole.module

    def stored(self, number: int) -> Stored:
        return self.on_host(number)

    def on_host(self, number: int) -> Stored:
        at, own = self._places[number]
        stage, structure = self.stages[at], jax.tree.structure(self.weights[number].value)
        placement = stage.placement
        assert placement is not None
        leaves = [placement.to_host(x) for x in jax.tree.leaves(stage.params[own])] if placement.is_here else None
        if self.exchange is not None:
            is_told = placement.processes[0] == jax.process_index()
            like = jax.tree.leaves(describe(self.weights[number].value))
            given = leaves if leaves is not None and is_told else [None] * len(like)
            leaves = [self.exchange.shared(x, each) for x, each in zip(given, like, strict=True)]
        assert leaves is not None
        return stored_array(jax.tree.unflatten(structure, [jnp.asarray(x) for x in leaves]))

    def init_cache(self) -> Any:
        """Zeroed pages, a cache for each stage."""
        return tuple(stage.init_cache() for stage in self.stages)

    def module(self, bucket: int) -> ModuleOp:
        """The first stage for `bucket` tokens, as it is compiled."""
        return self.stages[0].module(bucket)

    def step(self, params: Any, cache: Cache, batch: StepBatch) -> tuple[jax.Array, Cache]:
        raise LlmirError("a step in stages is no one program: `runtime.pipeline_runner` runs it")
