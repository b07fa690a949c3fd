"""A model on a slice: the layout that suits it best, what it needs and how fast it can be, as data and as text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmir_jax.errors import LlmirError
from llmir_jax.planning import ModelPlan
from sharding.choice import GIB, Choice, choose, does_not_fit, milliseconds
from sharding.compiled import CompiledProgram
from sharding.cost import CostModel, Estimate, Layout, Workload
from sharding.errors import ShardingError
from sharding.topologies import Topology

_KIB = 1 << 10
_NAMES = {"weights": "weights", "attention": "attention, KV cache", "head": "head", "collectives": "collectives"}


@dataclass(frozen=True, kw_only=True)
class SlicePlan:
    """See above."""

    model: ModelPlan
    name: str
    topology: Topology
    decode: Estimate
    prefill: Estimate
    """Of one prompt of the whole context."""
    largest_batch: int
    choice: Choice | None
    """What the layout was chosen from; None if it was given."""
    compared: tuple[Estimate, ...] = ()
    """All layouts that fit, the best first, where they were asked for."""
    compiled: CompiledProgram | None = None
    not_compiled: str = ""
    """Why not."""

    @property
    def activation_bytes(self) -> int:
        """Of intermediate values: as compiled, if they are more than estimated."""
        own = self.decode.memory.activations
        return own if self.compiled is None else max(own, self.compiled.temporary_bytes + self.compiled.output_bytes)

    @property
    def total_bytes(self) -> int:
        """That each device holds."""
        memory = self.decode.memory
        return memory.parameters + memory.cache + self.activation_bytes

    @property
    def fits(self) -> bool:
        """Whether a device has as many: as compiled it may need more than the estimate that layouts are chosen by."""
        return self.total_bytes <= self.decode.memory.capacity

    def as_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds and counts."""
        decode, memory = self.decode, self.decode.memory
        return {
            "model": self.name,
            "topology": self.topology.name,
            "num_devices": self.topology.num_devices,
            "num_hosts": self.topology.num_hosts,
            "layout": decode.layout.axes,
            "why": None if self.choice is None else self.choice.why,
            "batch": decode.workload.batch,
            "context": decode.workload.context,
            "memory": {
                "parameters": memory.parameters,
                "kv_cache": memory.cache,
                "activations": self.activation_bytes,
                "total": self.total_bytes,
                "capacity": memory.capacity,
                "fits": self.fits,
            },
            "largest_batch": self.largest_batch,
            "decode": _estimate(decode),
            "prefill": _estimate(self.prefill),
            "compared": [
                {"layout": each.layout.axes, "seconds": each.seconds, "memory": each.memory.total}
                for each in self.compared
            ],
            "compiled": None if self.compiled is None else _program(self.compiled),
            "not_compiled": self.not_compiled or None,
        }

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._memory(), "", *self._steps(), "", *self._talk(), *self._ranking()])

    def _head(self) -> list[str]:
        chip, decode = self.topology.device, self.decode
        lines = [
            f"{self.name}",
            f"  {_model(self.model)}",
            f"{self.topology}, each device with {chip.memory_bytes / GIB:.0f} GiB at "
            f"{chip.memory_bandwidth / 1e9:,.0f} GB/s and {self.topology.peak_flops / 1e12:,.0f} TFLOP/s",
            f"layout: {decode.layout}   (--mesh {decode.layout.text})",
        ]
        if self.choice is not None:
            lines += [f"  {reason}" for reason in self.choice.reasons]
        return lines

    def _memory(self) -> list[str]:
        memory, workload = self.decode.memory, self.decode.workload
        seqs = f"{workload.batch} sequence{'s' if workload.batch > 1 else ''} of {workload.context:,} tokens"
        compiled = self.compiled
        how = "estimated" if compiled is None else f"XLA: {_gib(compiled.temporary_bytes)} for decoding"
        lines = [
            "memory of a device, GiB",
            f"  weights              {_gib(memory.parameters):>8}",
            f"  KV cache             {_gib(memory.cache):>8}   {seqs}",
            f"  activations          {_gib(self.activation_bytes):>8}   {how}",
            f"  in all               {_gib(self.total_bytes):>8}   of {_gib(memory.capacity)}; at most "
            f"{self.largest_batch:,} sequences of {workload.context:,} tokens fit",
        ]
        if not self.fits:
            more = _gib(self.total_bytes - memory.capacity)
            lines.append(
                f"  as compiled it does not fit: {_gib(self.total_bytes)} GiB are {more} more than a device has: "
                "lower --batch or --context, quantize, or take more devices"
            )
        return lines

    def _steps(self) -> list[str]:
        decode, prefill = self.decode, self.prefill
        batch = decode.workload.batch
        one_each = "a token" if batch == 1 else f"a token for each of {batch} sequences"
        return [
            f"decoding, {one_each}, on each device at least",
            *_parts(decode),
            f"    at most {decode.tokens_per_second:,.0f} tokens/s, {1 / decode.seconds:,.1f} for each sequence",
            f"a prompt of {prefill.workload.context:,} tokens, on each device at least",
            *_parts(prefill),
        ]

    def _talk(self) -> list[str]:
        lines = ["collectives of a decoding step, on each device"]
        for each in self.decode.collectives:
            lines.append(f"  {each.count:>5} × {each.kind} of {_size(each.nbytes)} over {each.axis}: {each.what}")
        if not self.decode.collectives:
            lines.append("  none")
        if self.compiled is None:
            return [*lines, f"not compiled: {self.not_compiled}. All figures are estimates"]
        found = sorted(self.compiled.collectives.items(), key=lambda pair: -pair[0][1] * pair[1])
        theirs = "; ".join(f"{count} × {kind} of {_size(size)}" for (kind, size), count in found) or "none"
        ours = self.decode.memory.parameters + self.decode.memory.cache
        return [
            *lines,
            f"compiled for {self.topology.name}: XLA has {theirs}; and {_gib(self.compiled.argument_bytes)} GiB of "
            f"weights and cache, {self.compiled.argument_bytes / ours - 1:+.1%} of what is planned",
        ]

    def _ranking(self) -> list[str]:
        if not self.compared:
            return []
        lines = ["", "layouts, by the time of a decoding step", f"  {'':34} {'ms':>9} {'tokens/s':>10} {'GiB':>7}"]
        for each in self.compared:
            lines.append(
                f"  {each.layout!s:34} {each.seconds * 1e3:>9,.2f} {each.tokens_per_second:>10,.0f} "
                f"{_gib(each.memory.total):>7}"
            )
        return lines


def plan_slice(
    model: ModelPlan,
    topology: Topology,
    *,
    name: str,
    axes: Mapping[str, int] | None = None,
    compare: bool = False,
    compile_it: bool = True,
) -> SlicePlan:
    """The plan of a model on a slice, in a layout of these axes, or in the best one that it can be served in.

    Raises LlmirError for what does not fit, with the numbers, and for what cannot be.
    """
    from llmir_jax.ahead_of_time import compile_layers, unavailable_reason

    workload = Workload(batch=model.batch, context=model.context)
    costs = CostModel(model.cost, topology)
    try:
        choice = None
        if axes is None:
            choice = choose(costs, workload)
            decode = choice.best
        else:
            decode = costs.estimate(Layout.of(axes), workload)
            if not decode.memory.fits:
                raise ShardingError(does_not_fit(decode, costs))
        compared = choose(costs, workload).fitting if compare else ()
        layout = decode.layout
        prompt = Workload(batch=1, context=model.context, new_tokens=model.context)
        plan = SlicePlan(
            model=model,
            name=name,
            topology=topology,
            decode=decode,
            prefill=costs.estimate(layout, prompt),
            largest_batch=costs.largest_batch(layout, workload),
            choice=choice,
            compared=compared,
        )
    except ShardingError as error:
        raise LlmirError(str(error)) from None
    reason = unavailable_reason(topology, layout) if compile_it else "--no-compile"
    if reason is not None:
        return replace(plan, not_compiled=reason)
    return replace(plan, compiled=compile_layers(model, topology, layout))


def _model(model: ModelPlan) -> str:
    config, cost = model.config, model.cost
    kv_heads = getattr(config, "num_kv_heads", config.num_heads)
    gib = sum(parameter.nbytes for parameter in cost.parameters) / GIB
    weights = model.dtype if model.quantize is None else str(model.quantize)
    cache = model.kv_cache or model.dtype
    return (
        f"{config.num_layers} layers, {config.num_heads} heads, {kv_heads} KV heads; weights in {weights}, {gib:.1f} "
        f"GiB; KV cache in {cache}, {cost.cache_bytes(1) / _KIB:,.0f} KiB a token"
    )


def _parts(estimate: Estimate) -> list[str]:
    lines = []
    for name, part in estimate.parts.items():
        work = f"{part.operations / 1e9:>12,.1f} GFLOP" if part.operations else f"{'':>18}"
        bound = "" if name == "collectives" else part.bound
        seconds = milliseconds(estimate.stages * part.seconds)
        lines.append(f"  {_NAMES[name]:20} {part.nbytes / GIB:>8.3f} GiB {work} {seconds:>12} {bound}".rstrip())
    of_stages = f", {estimate.stages} stages one after the other" if estimate.stages > 1 else ""
    lines.append(f"  {'in all':20} {'':>12} {'':>18} {milliseconds(estimate.seconds):>12}{of_stages}")
    return lines


def _estimate(estimate: Estimate) -> dict[str, Any]:
    parts = {
        name: {"bytes": part.nbytes, "flops": part.operations, "seconds": estimate.stages * part.seconds}
        for name, part in estimate.parts.items()
    }
    return {
        "seconds": estimate.seconds,
        "tokens_per_second": estimate.tokens_per_second,
        "parts": parts,
        "collectives": [
            {"kind": each.kind, "axis": each.axis, "what": each.what, "bytes": each.nbytes, "count": each.count}
            for each in estimate.collectives
        ],
    }


def _program(program: CompiledProgram) -> dict[str, Any]:
    return {
        "argument_bytes": program.argument_bytes,
        "temporary_bytes": program.temporary_bytes,
        "flops": program.operations,
        "collectives": [
            {"kind": kind, "bytes": size, "count": count} for (kind, size), count in program.collectives.items()
        ],
    }


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def _size(count: float) -> str:
    """Bytes in a unit that suits them."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", _KIB)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"


__all__ = ["SlicePlan", "plan_slice"]
