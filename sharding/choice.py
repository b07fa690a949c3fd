"""Which layout a slice is best used in: every one that its devices allow, ranked by the cost model, and why.

Ranked are those that fit in memory, by the time of a step; layouts that need fewer axes go first where it is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sharding.cost import LAYOUT_AXES, PARTS, CostModel, Estimate, Workload
from sharding.errors import ShardingError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Layouts of a slice, ranked."""

    fitting: tuple[Estimate, ...]
    """The best one first."""
    too_large: tuple[Estimate, ...]
    """Those that do not fit, the one that is nearest to it first."""

    @property
    def best(self) -> Estimate:
        return self.fitting[0]

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words, why the best one goes before the next, and which ones do not fit."""
        best = self.best
        said = [f"{best.layout} takes the least for a step, {milliseconds(best.seconds)}"]
        if len(self.fitting) > 1:
            said.append(_difference(best, self.fitting[1]))
        if self.too_large:
            nearest, number = self.too_large[0], len(self.too_large)
            others = f"; {number - 1} more would need more" if number > 1 else ""
            need = f"{nearest.memory.total / GIB:.1f} GiB a device, which has {nearest.memory.capacity / GIB:.1f}"
            said.append(f"{nearest.layout} would need {need}{others}")
        return tuple(said)

    @property
    def why(self) -> str:
        """The reasons in one line."""
        return "; ".join(self.reasons)


def choose(model: CostModel, workload: Workload, *, axes: Sequence[str] = LAYOUT_AXES) -> Choice:
    """All layouts over these axes, ranked for a workload.

    Raises:
        ShardingError: no layout suits the model's heads, or none fits in memory.
    """
    layouts = list(model.layouts(axes))
    if not layouts:
        heads = ", ".join(f"{cache.num_heads} heads, {cache.num_kv_heads} KV heads" for cache in model.cost.caches)
        raise ShardingError(
            f"mesh: {model.topology.num_devices} devices cannot be divided over {', '.join(axes)} for {heads}: "
            "use another number of devices"
        )
    estimates = [model.estimate(layout, workload) for layout in layouts]
    fitting = sorted((e for e in estimates if e.memory.fits), key=lambda e: (e.seconds, len(e.layout.axes)))
    too_large = sorted((e for e in estimates if not e.memory.fits), key=lambda e: e.memory.total)
    if not fitting:
        raise ShardingError(does_not_fit(too_large[0], model))
    return Choice(fitting=tuple(fitting), too_large=tuple(too_large))


def does_not_fit(estimate: Estimate, model: CostModel) -> str:
    """What is too large, and what to do, in one line."""
    memory, workload = estimate.memory, estimate.workload
    largest = model.largest_batch(estimate.layout, workload)
    remedy = f"at most {largest} fit" if largest else "not even one fits: quantize, or take more devices"
    return (
        f"{model.topology.name}: {estimate.layout} needs {memory.total / GIB:.2f} GiB a device, "
        f"{memory.parameters / GIB:.2f} of parameters, {memory.cache / GIB:.2f} of KV cache and "
        f"{memory.activations / GIB:.2f} of activations, but a device has {memory.capacity / GIB:.2f} GiB; of "
        f"{workload.batch} sequences of {workload.context} tokens {remedy}"
    )


def milliseconds(seconds: float) -> str:
    """In ms, of three digits or so."""
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def _difference(best: Estimate, other: Estimate) -> str:
    """What the other spends its time on."""
    more = {name: other.stages * other.parts[name].seconds - best.stages * best.parts[name].seconds for name in PARTS}
    name = max(more, key=lambda part: more[part])
    if more[name] <= 0:
        return f"{other.layout} takes as long"
    less = min(more, key=lambda part: more[part])
    saved = f", and saves {milliseconds(-more[less])} on {less}" if more[less] < 0 else ""
    spent = f"it spends {milliseconds(more[name])} more on {name}"
    return f"{other.layout} takes {milliseconds(other.seconds)}: {spent}{saved}"
