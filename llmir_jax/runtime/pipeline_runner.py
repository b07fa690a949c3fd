"""Runs a step whose layers are in stages on different devices, with several parts of the batch on their way at once.

The rows of a batch are cut into as many parts (micro-batches) as there are stages, if they can be. Stage 0 computes the
first part; while stage 1 goes on with it, stage 0 computes the second, and so on: for tokens that are decoded as for
prompts. Rows of one sequence may be in several parts, since every stage computes the parts in order and attention looks
back only. JAX dispatches without waiting, so that each device has its next part as soon as that has been computed.

Stages may be on devices of several processes. Each process runs the stages that it has devices of, and takes part in
what these hand over; the last stage's tell the others which tokens they have chosen.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from llmir_jax.exchange import Exchange
from llmir_jax.placement import Placement, run_in_turn
from llmir_jax.runtime import sampler
from llmir_jax.runtime.batch import Cache, StepBatch
from llmir_jax.runtime.handover import Handover
from llmir_jax.runtime.packing import Packing
from llmir_jax.runtime.runner import Runner


class Stage(Protocol):
    """Some layers of a model on devices of their own."""

    @property
    def params(self) -> Any: ...
    @property
    def placement(self) -> Placement | None: ...
    def carried(self, num_rows: int) -> list[jax.ShapeDtypeStruct]:
        """What it gets from the one before, for so many rows of tokens."""
        ...

    def call(
        self, params: Any, cache: Cache, batch: StepBatch, carried: Sequence[jax.Array] = ()
    ) -> tuple[list[Any], Cache]:
        """What the next stage gets, or [logits]; and the new cache."""
        ...


@runtime_checkable
class PipelinedModel(Protocol):
    """A model in stages; its parameters and its cache are tuples with an entry for each, empty for other processes'."""

    @property
    def stages(self) -> Sequence[Stage]: ...
    @property
    def exchange(self) -> Exchange | None:
        """Between the processes of all stages; None where there is one."""
        ...


def num_parts(num_rows: int, num_stages: int) -> int:
    """Into how many parts of one size a batch is cut: at most one a stage."""
    return next(parts for parts in range(min(num_rows, num_stages), 0, -1) if num_rows % parts == 0)


class PipelineRunner(Runner):
    """Runs schedules on the stages of a model; arguments are those of `Runner`, `placement` that of the last stage."""

    def _make_step(self, packing: Packing) -> Callable[..., tuple[jax.Array | None, jax.Array | None, Any]]:
        stages = self._stages
        num_rows = next(field.size for field in packing.fields if field.name == "tokens")
        size = num_rows // num_parts(num_rows, len(stages))
        part_packing = self._step_packing(size)
        programs = [
            jax.jit(partial(self._trace_stage, stage, part_packing), donate_argnames="cache") for stage in stages
        ]
        merge = jax.jit(self._trace_merge)

        def run(params: Any, cache: Any, packed: NDArray[np.int32]) -> tuple[jax.Array | None, jax.Array | None, Any]:
            views, caches, logits = packing.views(packed), list(cache), []
            for start in range(0, max(1, int(views["num_tokens"])), size):
                part = self._part(views, part_packing, start, size)
                carried: list[jax.Array] = []
                for number, (stage, program) in enumerate(zip(stages, programs, strict=True)):
                    if number and self._handovers[number - 1].is_here:
                        like = _with_dimensions(stage.carried(size)) if _is_here(stage) else ()
                        carried = self._handovers[number - 1](carried, like)
                    if _is_here(stage):
                        carried, caches[number] = program(params[number], caches[number], part, carried)
                        if self._in_turn:
                            jax.block_until_ready(carried)
                if self._is_here:
                    logits += carried
            if not self._is_here:
                return None, None, tuple(caches)
            chosen, greedy = merge(logits, views["logits_rows"] // size)
            return chosen, greedy, tuple(caches)

        return run

    def warmup(self) -> None:
        super().warmup()
        for size in (self._model.max_seqs, self.sampled_size):
            self._shared(np.zeros(size, np.int32), jax.ShapeDtypeStruct((size,), np.int32))

    def _fetch(self, chosen: jax.Array | None, shape: tuple[int, ...]) -> NDArray[np.int32]:
        return self._shared(None if chosen is None else np.asarray(chosen), jax.ShapeDtypeStruct(shape, np.int32))

    def _logits_on_host(self, logits: jax.Array | None) -> NDArray[np.float32]:
        own = None if logits is None else super()._logits_on_host(logits)
        return self._shared(own, jax.ShapeDtypeStruct((self._model.max_seqs, self._model.vocab_size), np.float32))

    def _shared(self, own: NDArray[Any] | None, like: jax.ShapeDtypeStruct) -> NDArray[Any]:
        """What processes of the last stage have, in those of all stages."""
        assert isinstance(self._model, PipelinedModel) and self._placement is not None
        if self._model.exchange is None:
            assert own is not None
            return own
        is_told = self._placement.processes[0] == jax.process_index()
        return self._model.exchange.shared(own if is_told else None, like)

    @cached_property
    def _in_turn(self) -> bool:
        return run_in_turn(*(stage.placement.mesh for stage in self._stages if stage.placement is not None))

    @cached_property
    def _handovers(self) -> list[Handover]:
        """Between stages that follow each other."""
        placements = [stage.placement for stage in self._stages if stage.placement is not None]
        return [Handover(source, target) for source, target in pairwise(placements)]

    def _make_copy(self) -> Callable[..., Any]:
        copies = [jax.jit(self._trace_copy_pages, donate_argnames="cache") for _ in self._stages]

        def run(cache: Any, sources: NDArray[np.int32], targets: NDArray[np.int32]) -> Any:
            # a stage may have no layer of the last groups
            return tuple(
                copy(own, sources[: len(own)], targets[: len(own)]) if own else own
                for copy, own in zip(copies, cache, strict=True)
            )

        return run

    @property
    def _stages(self) -> Sequence[Stage]:
        assert isinstance(self._model, PipelinedModel)
        return self._model.stages

    @staticmethod
    def _part(views: dict[str, NDArray[Any]], packing: Packing, start: int, size: int) -> NDArray[np.int32]:
        """The packed batch of rows [start, start + size)."""
        buffer, own = packing.allocate()
        for name, values in views.items():
            own[name][...] = values[start : start + size] if name in ("tokens", "positions", "seq_ids") else values
        own["num_tokens"][...] = np.clip(views["num_tokens"] - start, 0, size)
        own["logits_rows"][...] = np.clip(views["logits_rows"] - start, 0, size - 1)
        return buffer

    # The programs, as they are traced

    def _trace_stage(
        self, stage: Stage, packing: Packing, params: Any, cache: Cache, packed: jax.Array, carried: list[jax.Array]
    ) -> tuple[list[jax.Array], Cache]:
        self._num_traces += 1
        _, batch = self._unpack_batch(packing, packed)
        like = stage.carried(batch.tokens.shape[0])
        carried = [x.reshape(own.shape) for x, own in zip(carried, like, strict=True)]
        results, cache = stage.call(params, cache, batch, carried)
        if stage is self._stages[-1]:
            shape = (self._model.max_seqs, self._model.vocab_size)
            return [jnp.asarray(results[0]).reshape(shape).astype(jnp.float32)], cache
        assert stage.placement is not None
        return [stage.placement.constrain(jnp.atleast_1d(x)) for x in results], cache

    def _trace_merge(self, logits: list[jax.Array], parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [S, V] of the sequences' own parts, and their argmax."""
        self._num_traces += 1
        own = jnp.minimum(parts, len(logits) - 1)
        chosen = logits[0]
        for number, part in enumerate(logits[1:], 1):
            chosen = jnp.where(own[:, None] == number, part, chosen)
        return chosen, self._whole(sampler.greedy(chosen))


def _is_here(stage: Stage) -> bool:
    return stage.placement is not None and stage.placement.is_here


def _with_dimensions(like: Sequence[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    """As they are handed over: what has no dimension gets one."""
    return [jax.ShapeDtypeStruct(own.shape or (1,), own.dtype) for own in like]
