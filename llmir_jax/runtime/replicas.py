"""An engine over several copies of a model, each on devices of its own, with its own pages and its own schedule.

A request goes to the copy that has the fewest tokens to compute, and stays there. All copies take their next step at
the same time: it is launched on the devices of each before any is waited for, in the same order in every process. No
token depends on how many copies there are.

Where the copies' devices are of several processes, each schedules for all copies, alike, and computes with its own.
After a step each learns what tokens the others have, so that all know all requests' and schedule the same next step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from llmir_jax.errors import LlmirError
from llmir_jax.exchange import Exchange
from llmir_jax.placement import Placement
from llmir_jax.runtime.batch import StepModel
from llmir_jax.runtime.engine import Engine, EngineStats, make_runner, make_scheduler
from llmir_jax.runtime.pages import CachePages
from llmir_jax.runtime.request import Request
from llmir_jax.runtime.runner import Compilation, Runner
from llmir_jax.runtime.scheduler import Schedule, Scheduler
from llmir_jax.runtime.text import Tokenizer


class _Schedulers:
    """The schedulers of all copies, as an engine sees one."""

    def __init__(self, each: Sequence[Scheduler]) -> None:
        self.each = each
        self._of: dict[int, Scheduler] = {}

    @property
    def running(self) -> list[Request]:
        return [request for scheduler in self.each for request in scheduler.running]

    @property
    def waiting(self) -> list[Request]:
        return [request for scheduler in self.each for request in scheduler.waiting]

    @property
    def num_preemptions(self) -> int:
        return sum(scheduler.num_preemptions for scheduler in self.each)

    @property
    def pages(self) -> CachePages:
        """Of one copy: all have the same."""
        return self.each[0].pages

    @property
    def prefill_chunk(self) -> int:
        return self.each[0].prefill_chunk

    @prefill_chunk.setter
    def prefill_chunk(self, value: int | None) -> None:
        for scheduler in self.each:
            scheduler.prefill_chunk = value

    def add(self, request: Request) -> None:
        def load(scheduler: Scheduler) -> int:
            return sum(r.num_tokens + r.max_new_tokens for r in (*scheduler.running, *scheduler.waiting))

        self._of[request.request_id] = min(self.each, key=load)
        self._of[request.request_id].add(request)

    def fork(self, parent: Request, child: Request) -> None:
        self._of[child.request_id] = self._of[parent.request_id]  # where the pages are that they share
        self._of[child.request_id].fork(parent, child)

    def remove(self, request: Request) -> None:
        scheduler = self._of.pop(request.request_id, None)
        if scheduler is not None:  # else an interrupt came before it was added
            scheduler.remove(request)

    def reset(self, requests: Iterable[Request]) -> None:
        """Begin again, each request where it was."""
        own: dict[int, list[Request]] = {id(scheduler): [] for scheduler in self.each}
        for request in requests:
            own[id(self._of.setdefault(request.request_id, self.each[0]))].append(request)
        for scheduler in self.each:
            scheduler.reset(own[id(scheduler)])


class _Runners:
    """The runners of this process's copies, as an engine sees one."""

    def __init__(self, each: Sequence[Runner]) -> None:
        self.each = each

    @property
    def compilations(self) -> list[Compilation]:
        return [compilation for runner in self.each for compilation in runner.compilations]

    def warmup(self) -> None:
        for runner in self.each:
            runner.warmup()

    def drop_state(self) -> None:
        for runner in self.each:
            runner.drop_state()

    def drop_lost_state(self) -> None:
        for runner in self.each:
            runner.drop_lost_state()

    def run_rows(self, *batch: Any) -> np.ndarray[Any, Any]:
        """Of the first copy. Raises LlmirError if another, which has the same weights, computes something else."""
        first, *others = (runner.run_rows(*batch) for runner in self.each)
        for number, other in enumerate(others, 1):
            if not np.allclose(other, first, rtol=1e-5, atol=0, equal_nan=True):
                raise LlmirError(f"copy {number} of the model differs from the first")
        return first


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy of a model that this process has devices of."""

    model: StepModel
    placement: Placement | None
    is_told: bool = True
    """Whether this process is the one that tells others what the copy has computed."""


class ReplicatedEngine(Engine):
    """Serves requests with copies of a model. See `Engine`.

    Args:
        copies: all of them, None for those of other processes.
        devices: of all copies, where other processes have some of them.
    """

    def __init__(
        self,
        copies: Sequence[Copy | None],
        *,
        devices: Sequence[jax.Device] | None = None,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        prefill_chunk: int | None = None,
        max_waiting: int | None = None,
        burst: float = 0.0,
        draw_seed: Callable[[], int],
    ) -> None:
        own = [copy for copy in copies if copy is not None]
        super().__init__(
            own[0].model,
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            prefill_chunk=prefill_chunk,
            max_waiting=max_waiting,
            burst=burst,
            placement=own[0].placement,
            draw_seed=draw_seed,
        )
        self._reader = self._runner
        self._copies: list[tuple[Scheduler, Runner | None]] = []
        for copy in copies:
            if copy is own[0]:
                self._copies.append((self._scheduler, self._runner))
                continue
            scheduler = make_scheduler(own[0].model, prefill_chunk)
            runner = None if copy is None else make_runner(copy.model, scheduler, burst, copy.placement)
            self._copies.append((scheduler, runner))
        self._scheduler: Any = _Schedulers([scheduler for scheduler, _ in self._copies])
        self._runner: Any = _Runners([runner for _, runner in self._copies if runner is not None])
        self._exchange = None if devices is None else Exchange(devices)
        self._told = [number for number, copy in enumerate(copies) if copy is not None and copy.is_told]

    @property
    def num_replicas(self) -> int:
        return len(self._copies)

    def stats(self) -> EngineStats:
        groups = [scheduler.pages.groups for scheduler, _ in self._copies]
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_preemptions=self._scheduler.num_preemptions,
            pages_free=tuple(sum(group.num_free for group in each) for each in zip(*groups, strict=True)),
            pages_used=tuple(sum(group.num_used for group in each) for each in zip(*groups, strict=True)),
        )

    def warmup(self) -> tuple[Compilation, ...]:
        compilations = super().warmup()
        if self._exchange is not None:
            for size in (self._model.max_seqs, self._reader.sampled_size):
                self._exchange.merged(np.zeros((len(self._copies), size), np.int32))
        return compilations

    def _advance(self) -> None:
        with self._recovering():
            schedules: dict[int, Schedule] = {}
            launched: dict[int, Callable[[], NDArray[np.int32] | None]] = {}
            for number, (scheduler, runner) in enumerate(self._copies):
                max_steps = (runner or self._reader).num_steps_in(self._burst) if self._burst else None
                schedule = scheduler.schedule(max_steps=max_steps)
                if schedule is None:
                    continue
                schedules[number] = schedule
                if runner is not None:
                    launched[number] = runner.launch(schedule)
            values = {number: fetch() for number, fetch in launched.items()}
            if self._exchange is not None:
                values = self._exchanged(self._exchange, schedules, values)
            for number, schedule in schedules.items():
                self._take(schedule, self._reader.read(schedule, values[number]))

    def _exchanged(
        self,
        exchange: Exchange,
        schedules: Mapping[int, Schedule],
        own: Mapping[int, NDArray[np.int32] | None],
    ) -> dict[int, NDArray[np.int32] | None]:
        """What every copy has computed, of what those of this process have."""
        shapes = {number: self._reader.result_shape(schedule) for number, schedule in schedules.items()}
        sizes = {number: prod(shape) for number, shape in shapes.items() if shape is not None}
        if not sizes:
            return dict.fromkeys(schedules)
        rows = np.zeros((len(self._copies), max(sizes.values())), np.int32)
        for number in self._told:
            values = own.get(number)
            if values is not None:
                rows[number, : values.size] = values.reshape(-1)
        merged = exchange.merged(rows)
        return {
            number: None if shape is None else merged[number, : sizes[number]].reshape(shape)
            for number, shape in shapes.items()
        }
