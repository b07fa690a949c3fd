"""An engine over several copies of a model, each on devices of its own, with its own pages and its own schedule.

A request goes to the copy that has the fewest tokens to compute, and stays there. All copies take their next step at
the same time, each in a thread, which waits for its devices. No token depends on how many copies there are.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llmir_jax.errors import LlmirError
from llmir_jax.placement import Placement
from llmir_jax.runtime.batch import StepModel
from llmir_jax.runtime.engine import Engine, EngineStats, make_runner, make_scheduler
from llmir_jax.runtime.pages import CachePages
from llmir_jax.runtime.request import Request
from llmir_jax.runtime.runner import Compilation, Runner
from llmir_jax.runtime.scheduler import Scheduler
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
    """The runners of all copies, as an engine sees one."""

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


class ReplicatedEngine(Engine):
    """Serves requests with copies of a model: `models` and `placements` have an entry for each. See `Engine`."""

    def __init__(
        self,
        models: Sequence[StepModel],
        placements: Sequence[Placement | None],
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        prefill_chunk: int | None = None,
        max_waiting: int | None = None,
        burst: float = 0.0,
        draw_seed: Callable[[], int],
    ) -> None:
        super().__init__(
            models[0],
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            prefill_chunk=prefill_chunk,
            max_waiting=max_waiting,
            burst=burst,
            placement=placements[0],
            draw_seed=draw_seed,
        )
        schedulers, runners = [self._scheduler], [self._runner]
        for model, placement in zip(models[1:], placements[1:], strict=True):
            schedulers.append(make_scheduler(model, prefill_chunk))
            runners.append(make_runner(model, schedulers[-1], burst, placement))
        self._pairs = list(zip(schedulers, runners, strict=True))
        self._scheduler: Any = _Schedulers(schedulers)
        self._runner: Any = _Runners(runners)
        self._threads = ThreadPoolExecutor(len(models), thread_name_prefix="replica")

    @property
    def num_replicas(self) -> int:
        return len(self._pairs)

    def stats(self) -> EngineStats:
        groups = [scheduler.pages.groups for scheduler, _ in self._pairs]
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_preemptions=self._scheduler.num_preemptions,
            pages_free=tuple(sum(group.num_free for group in each) for each in zip(*groups, strict=True)),
            pages_used=tuple(sum(group.num_used for group in each) for each in zip(*groups, strict=True)),
        )

    def _advance(self) -> None:
        with self._recovering():
            started = []
            for scheduler, runner in self._pairs:
                max_steps = runner.num_steps_in(self._burst) if self._burst else None
                schedule = scheduler.schedule(max_steps=max_steps)
                if schedule is not None:
                    started.append((schedule, self._threads.submit(runner.run, schedule)))
            done = [(schedule, future.exception() or future.result()) for schedule, future in started]  # wait for all
            for schedule, result in done:
                if isinstance(result, BaseException):
                    raise result
                self._take(schedule, result)
