"""A roofline of a step on a slice: bytes, operations and collectives of each device, and the time they take at least.

    cost      what the step costs on one device that has all of it (`sharding.step_cost`)
    layout    how many devices along each axis of the mesh
    workload  sequences, and the tokens that each has

    seconds of a part = max(bytes / memory bandwidth, operations / peak)        collectives: `topologies.Links`
    seconds of a step = Σ parts, times the stages of a pipeline, each of which has its share of the sequences

Parts do not overlap in this: XLA hides some of the collectives behind products, and reaches less than the peaks.

Along `tensor`, matrices are split as `sharding.rules` says: those split along their inputs, and tables along the
vocabulary, end in an all-reduce; a head that is split along the vocabulary in an all-gather of its logits. Along
`sequence`, each device has a part of every sequence's cache. Of few tokens it attends to that, and partial softmaxes
are merged; all else it computes itself, as its neighbours do. Many tokens are split, and go round (`sharding.ring`).
Along `pipeline` it has some of the layers, along `data` of the sequences.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jax.sharding import AbstractMesh, AxisType

from sharding.errors import ShardingError
from sharding.mesh import DATA, PIPELINE, SEQUENCE, TENSOR, TENSOR_COPIES, check_heads
from sharding.ring import TOKENS_A_DEVICE
from sharding.rules import DEFAULT_RULES, Rule, names_of, partition_spec
from sharding.step_cost import ParameterCost, StepCost
from sharding.topologies import Links, Topology, links

LAYOUT_AXES = (DATA, PIPELINE, SEQUENCE, TENSOR)
"""Those of a model without experts."""
WEIGHTS, ATTENTION, HEAD, COLLECTIVES = PARTS = ("weights", "attention", "head", "collectives")
CHUNK = 512
"""Tokens of prompts that a step takes at least, while others decode."""
_FLOAT32 = 4  # bytes: of logits, and of what partial softmaxes are merged in


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many devices there are along each axis."""

    data: int = 1
    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, axes: Mapping[str, int]) -> "Layout":
        """Of axes by name. Raises ShardingError for one that a layout does not have."""
        for name in axes:
            if name not in LAYOUT_AXES:
                raise ShardingError(
                    f"layout: the cost of axis {name!r} is not known; known are {', '.join(LAYOUT_AXES)}"
                )
        return cls(**axes)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order of `LAYOUT_AXES`."""
        return self.data, self.pipeline, self.sequence, self.tensor

    @property
    def axes(self) -> dict[str, int]:
        """By name, without those of one device; of one device alone, tensor=1."""
        sizes = {name: size for name, size in zip(LAYOUT_AXES, self.sizes, strict=True) if size > 1}
        return sizes or {TENSOR: 1}

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def text(self) -> str:
        """As the option `mesh` takes it: "sequence=2,tensor=8"."""
        return ",".join(f"{name}={size}" for name, size in self.axes.items())

    def __str__(self) -> str:
        return " × ".join(f"{name} {size}" for name, size in self.axes.items())


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step of `batch` sequences."""

    batch: int
    context: int
    """Tokens of each, those of this step included."""
    new_tokens: int = 1
    """Of each in this step: one decodes, all of its context is a prefill."""

    @property
    def is_decode(self) -> bool:
        return self.new_tokens == 1


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What devices exchange, `count` times a step."""

    kind: str
    """As HLO names it: "all-reduce", "all-gather", "collective-permute"."""
    axis: str
    nbytes: int
    """Of the result on each device, each time."""
    count: int
    what: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a step, on each device."""

    nbytes: float = 0.0
    """Read from memory; of collectives, the results."""
    operations: float = 0.0
    seconds: float = 0.0

    @property
    def bound(self) -> str:
        """What takes the time."""
        return "compute" if self.operations and self.seconds > self._memory_share else "memory"

    _memory_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that each device holds."""

    parameters: int
    cache: int
    activations: int
    """About: what a step of `CHUNK` tokens or more has in memory at once."""
    capacity: int

    @property
    def total(self) -> int:
        return self.parameters + self.cache + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step of a workload in a layout."""

    layout: Layout
    workload: Workload
    memory: Memory
    parts: Mapping[str, Part]
    """By the names of `PARTS`."""
    collectives: tuple[Collective, ...]
    stages: int

    @property
    def seconds(self) -> float:
        """At least, from a token of each sequence to the next; of a prefill, until all of it is computed."""
        return self.stages * sum(part.seconds for part in self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """At most, of all sequences together."""
        return self.workload.batch * self.workload.new_tokens / self.seconds


class CostModel:
    """Estimates of a step's cost on a slice."""

    def __init__(self, cost: StepCost, topology: Topology, *, rules: Sequence[Rule] = DEFAULT_RULES) -> None:
        self.cost = cost
        self.topology = topology
        self.rules = rules
        self.num_layers = sum(cache.num_layers for cache in cost.caches)

    def estimate(self, layout: Layout, workload: Workload) -> Estimate:
        """Of a step. Raises ShardingError for a layout that the model or the slice cannot have."""
        self._check(layout)
        stages = layout.pipeline
        # sequences of one stage at a time, on one of the replicas
        seqs = -(-workload.batch // (layout.data * stages))
        tokens = seqs * workload.new_tokens
        split = _Split.of(self, layout)
        is_ring = layout.sequence > 1 and tokens >= layout.sequence * TOKENS_A_DEVICE
        own = -(-tokens // layout.sequence) if is_ring else tokens
        collectives = tuple(split.collectives(tokens, own, seqs))
        device, by_axis = self.topology.device, self._links(layout)
        peak = self.topology.peak_flops

        def part(nbytes: float, multiply_adds: float) -> Part:
            reading = nbytes / device.memory_bandwidth
            operations = 2 * multiply_adds
            return Part(
                nbytes=nbytes, operations=operations, seconds=max(reading, operations / peak), _memory_share=reading
            )

        exchanged = sum(each.nbytes * each.count for each in collectives)
        parts = {
            WEIGHTS: part(*split.products(own, seqs, heads=False)),
            ATTENTION: part(*split.attention(workload, seqs)),
            HEAD: part(*split.products(own, seqs, heads=True)),
            COLLECTIVES: Part(
                nbytes=exchanged, seconds=sum(_seconds(by_axis[each.axis], each) for each in collectives)
            ),
        }
        return Estimate(
            layout=layout,
            workload=workload,
            memory=self._memory(split, workload, tokens, seqs),
            parts=parts,
            collectives=collectives,
            stages=stages,
        )

    def largest_batch(self, layout: Layout, workload: Workload) -> int:
        """Sequences of the workload's context that fit; 0 if not even one does. Raises as `estimate`."""
        at_once = layout.data * layout.pipeline

        def fits(batch: int) -> bool:
            return self.estimate(layout, replace(workload, batch=batch)).memory.fits

        if not fits(1):
            return 0
        low, high = 1, 2  # in units of `at_once`
        while fits(high * at_once):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle * at_once) else (low, middle)
        return low * at_once

    def layouts(self, axes: Sequence[str] = LAYOUT_AXES) -> Iterator[Layout]:
        """All that have as many devices as the slice, over these axes; those that cannot be are left out."""
        for sizes in _factors(self.topology.num_devices, len(axes)):
            layout = Layout.of(dict(zip(axes, sizes, strict=True)))
            try:
                self._check(layout)
            except ShardingError:
                continue
            yield layout

    def _check(self, layout: Layout) -> None:
        if layout.num_devices != self.topology.num_devices:
            raise ShardingError(
                f"layout: {layout} needs {layout.num_devices} devices, but {self.topology.name} has "
                f"{self.topology.num_devices}"
            )
        if layout.pipeline > max(self.num_layers, 1):
            raise ShardingError(f"layout: {self.num_layers} layers cannot be divided over pipeline = {layout.pipeline}")
        for cache in self.cost.caches:
            check_heads(layout.tensor, cache.num_heads, cache.num_kv_heads)

    def _links(self, layout: Layout) -> dict[str, Links]:
        found = links(self.topology, layout.sizes)
        return dict(zip(LAYOUT_AXES, found, strict=True))

    def _memory(self, split: "_Split", workload: Workload, tokens: int, seqs: int) -> Memory:
        return Memory(
            parameters=math.ceil(split.parameter_bytes()),
            cache=math.ceil(seqs * split.layout.pipeline * split.cache_bytes(workload.context)),
            activations=math.ceil(split.activations(max(tokens, CHUNK), seqs)),
            capacity=self.topology.device.memory_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class _Split:
    """What one device has of a step."""

    cost: StepCost
    layout: Layout
    layers: float
    """Of the layers, in the stage that has most of them, the share."""
    parts: tuple[tuple[ParameterCost, tuple[int, ...]], ...]
    """Of each parameter, into how many parts each dimension is split."""

    @classmethod
    def of(cls, model: CostModel, layout: Layout) -> "_Split":
        cost = model.cost
        num_kv_heads = min((cache.num_kv_heads for cache in cost.caches), default=layout.tensor)
        mesh = _mesh(layout.tensor, num_kv_heads)
        sizes = dict(mesh.shape)
        known: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
        parts = []
        for parameter in cost.parameters:
            key = parameter.path, parameter.shape
            if key not in known:
                spec = partition_spec(*key, mesh, model.rules)
                split = [math.prod(sizes[name] for name in names_of(axis)) for axis in spec]
                known[key] = (*split, *[1] * (len(parameter.shape) - len(split)))
            parts.append((parameter, known[key]))
        num_layers = model.num_layers
        stage = -(-num_layers // layout.pipeline) / num_layers if num_layers else 1.0
        return cls(cost=cost, layout=layout, layers=stage, parts=tuple(parts))

    def is_head(self, parameter: ParameterCost) -> bool:
        return parameter.multiply_adds_per_row > 0 and parameter.outputs == self.cost.vocab_size

    def products(self, tokens: int, rows: int, *, heads: bool) -> tuple[float, float]:
        """Bytes that are read and multiply-adds, of the head, or of all other parameters."""
        nbytes = multiply_adds = 0.0
        for parameter, split in self.parts:
            if self.is_head(parameter) != heads:
                continue
            share = (1.0 if heads else self.layers) / math.prod(split)
            is_table = parameter.nbytes_read < parameter.nbytes
            nbytes += parameter.nbytes_read * (tokens if is_table else 1) * share
            per_token, per_row = parameter.multiply_adds_per_token, parameter.multiply_adds_per_row
            multiply_adds += (tokens * per_token + rows * per_row) * share
        if not heads:
            multiply_adds += tokens * self.cost.other_multiply_adds_per_token * self.layers
        return nbytes, multiply_adds

    def cache_bytes(self, context: float, *, is_read: bool = False) -> float:
        """Of a sequence of so many tokens, on the device; `is_read`, of those that the last of them sees."""
        found = 0.0
        for cache in self.cost.caches:
            tokens = cache.visible(context) if is_read else context
            found += tokens * cache.bytes_per_token / min(self.layout.tensor, cache.num_kv_heads)
        return found * self.layers / self.layout.sequence

    def attention(self, workload: Workload, seqs: int) -> tuple[float, float]:
        """Bytes that are read and multiply-adds. A prefill reads its own keys and values once."""
        new, context = workload.new_tokens, workload.context
        multiply_adds = 0.0
        for cache in self.cost.caches:
            # the first of the new tokens sees context - new + 1, the last all of it, as far as the window goes
            first, last = cache.visible(context - new + 1), cache.visible(context)
            multiply_adds += seqs * new * (first + last) / 2 * cache.multiply_adds_per_pair
        shares = self.layers / (self.layout.tensor * self.layout.sequence)
        return seqs * self.cache_bytes(context, is_read=True), multiply_adds * shares

    def parameter_bytes(self) -> float:
        """In memory: of the stage that has most of them."""
        layers = ends = 0.0
        for parameter, split in self.parts:
            nbytes = parameter.nbytes / math.prod(split)
            if self.is_head(parameter) or parameter.gathered_size:
                ends = max(ends, nbytes) if self.layout.pipeline > 1 else ends + nbytes
            else:
                layers += nbytes
        return layers * self.layers + ends

    def activations(self, tokens: int, rows: int) -> float:
        """What a step has in memory at once, about: inputs and outputs of the widest matrix, twice; logits, twice."""
        widest = max((p.outputs for p, _ in self.parts if not self.is_head(p)), default=0)
        residual = max((p.gathered_size for p, _ in self.parts), default=0)
        own = 2 * tokens * (widest / self.layout.tensor + 2 * residual) * self.cost.itemsize
        return own + 2 * rows * self.cost.vocab_size * _FLOAT32

    def collectives(self, tokens: int, own: int, rows: int) -> Iterator[Collective]:
        """Those of a step, of which the device has `own` tokens, in the order of `LAYOUT_AXES`."""
        cost, layout = self.cost, self.layout
        residual = max((p.gathered_size for p, _ in self.parts), default=0)
        if layout.pipeline > 1:
            yield Collective(
                kind="collective-permute",
                axis=PIPELINE,
                nbytes=tokens * residual * cost.itemsize,
                count=1,
                what="activations to the next stage",
            )
        if own < tokens:
            yield from self._ring(own)
        elif layout.sequence > 1:
            for cache in cost.caches:
                num_heads = max(cache.num_heads // layout.tensor, 1)
                num_layers = math.ceil(cache.num_layers * self.layers)
                # the largest score of each head, then what is relative to it: weights' sum, and values' sums
                for size, what in ((1, "largest scores"), (cache.value_dim + 1, "partial attention")):
                    yield Collective(
                        kind="all-reduce",
                        axis=SEQUENCE,
                        nbytes=tokens * num_heads * size * _FLOAT32,
                        count=num_layers,
                        what=what,
                    )
        if layout.tensor > 1:
            yield from self._tensor(own, rows)

    def _ring(self, own: int) -> Iterator[Collective]:
        """Keys and values, as they are stored, and queries with what they have gathered, each as often as devices."""
        for cache in self.cost.caches:
            num_heads = max(cache.num_heads // self.layout.tensor, 1)
            stored = cache.bytes_per_token / cache.num_layers / min(self.layout.tensor, cache.num_kv_heads)
            query = num_heads * (cache.value_dim * self.cost.itemsize + (cache.value_dim + 2) * _FLOAT32)
            for size, what in ((stored, "new keys and values"), (query, "queries and partial attention")):
                yield Collective(
                    kind="collective-permute",
                    axis=SEQUENCE,
                    nbytes=round(own * size),
                    count=math.ceil(cache.num_layers * self.layers) * self.layout.sequence,
                    what=what,
                )

    def _tensor(self, tokens: int, rows: int) -> Iterator[Collective]:
        counts: dict[tuple[str, int, str], int] = {}
        for parameter, split in self.parts:
            if parameter.gathered_size and split[0] > 1:
                row = parameter.nbytes * parameter.gathered_size / math.prod(parameter.shape)  # as it is stored
                key = ("all-reduce", round(tokens * row), "rows of the table")
                counts[key] = counts.get(key, 0) + 1
            if self.is_head(parameter):
                if math.prod(split) > 1:
                    key = ("all-gather", rows * parameter.outputs * self.cost.itemsize, "logits")
                    counts[key] = counts.get(key, 0) + 1
            elif parameter.outputs and len(split) == 2 and split[0] > 1:
                num_rows = tokens if parameter.multiply_adds_per_token else rows
                key = ("all-reduce", num_rows * parameter.outputs * self.cost.itemsize, "attention and MLP")
                counts[key] = counts.get(key, 0) + 1
        for (kind, size, what), count in counts.items():
            of_layers = what == "attention and MLP"
            yield Collective(
                kind=kind,
                axis=TENSOR,
                nbytes=size,
                count=math.ceil(count * self.layers) if of_layers else count,
                what=what,
            )


def _mesh(tensor: int, num_kv_heads: int) -> AbstractMesh:
    """What rules are asked with: `tensor`, in two where there are fewer KV heads."""
    sizes = (
        {TENSOR: tensor}
        if num_kv_heads % tensor == 0
        else {TENSOR: num_kv_heads, TENSOR_COPIES: tensor // num_kv_heads}
    )
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _seconds(link: Links, collective: Collective) -> float:
    each = {
        "all-reduce": link.all_reduce_seconds,
        "all-gather": link.all_gather_seconds,
        "collective-permute": link.send_seconds,
    }[collective.kind]
    return each(collective.nbytes) * collective.count


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, count - 1):
                yield first, *rest
