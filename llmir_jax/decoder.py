"""The decoder that is derived from a forward: generate, stream, look at its IR and its report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from llmir_jax.analysis.cost import step_cost
from llmir_jax.auto_mesh import AUTO, ChosenMesh, choose_mesh, derive_from_shapes
from llmir_jax.calibrate import Planner
from llmir_jax.dense_parameters import DenseParameters
from llmir_jax.derive import Derived
from llmir_jax.disk_cache import DiskCache, open_cache
from llmir_jax.errors import LlmirError
from llmir_jax.memory import collecting_later, give_back
from llmir_jax.pipeline import KV_CACHES, Recorder, derive_step, text_of
from llmir_jax.pipelined_step import PipelinedStep
from llmir_jax.placement import MeshOption, Placement, as_mesh, processes_of
from llmir_jax.plain_forward import PlainForward
from llmir_jax.processes import num_processes, shared_seeds, watch
from llmir_jax.quantization import Calibration, Quantize
from llmir_jax.report import AttentionEntry, Report
from llmir_jax.runtime.batch import CacheGroup
from llmir_jax.runtime.engine import Engine
from llmir_jax.runtime.outputs import RequestOutput, RequestUpdate
from llmir_jax.runtime.replicas import Copy, ReplicatedEngine
from llmir_jax.runtime.runner import Compilation
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.runtime.snapshots import Snapshots
from llmir_jax.runtime.text import Tokenizer
from llmir_jax.served_by import notes_of, servers_of
from llmir_jax.step import DerivedStep
from llmir_jax.stored_step import StoredStep
from llmir_jax.target_choice import TargetChoice, check_target
from llmir_jax.trace import FlatForward, Traced, flatten_forward, flatten_model, flatten_params, trace
from llmir_jax.transforms.memory_planning import MemoryPlanningPass
from llmir_jax.verify import (
    NUM_SEQUENCES,
    RELATIVE_TOLERANCE,
    CachedLogits,
    CheckResult,
    Piece,
    most_rows,
    self_check,
)
from llmir_jax.weights import LazyArrays, ModelWeights, WeightSource, unread
from sharding.mesh import DATA, PIPELINE, sub_meshes
from sharding.step_cost import StepCost

STAGES = ("stablehlo", "llm", "target")
DEFAULT_BUCKETS = (64, 512)
BURST = 0.02
"""Seconds that the tokens of one call may take while all requests decode: less than a reader sees."""
_SELF_CHECK_LENGTH = 37  # tokens: crosses pages of 4, 16 and 32
_OF_INTEGERS = (
    'Activations of 8 bits can turn a choice such as that of experts over: quantize="w8a16" or "w4a16" keeps floats; '
    "where these fail too, please report the model"
)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise LlmirError(f"decoder: {name} must be a whole number of at least 1, got {value!r}")


def _buckets(buckets: Sequence[int] | None, max_seqs: int, most: int) -> tuple[int, ...]:
    """Numbers of token rows to compile for, rising; one of them holds a token of every sequence."""
    if buckets is not None:
        _check_sizes(**{f"buckets[{i}]": b for i, b in enumerate(buckets)})
        if not buckets:
            raise LlmirError("decoder: buckets must not be empty; leave it out for the default")
        return tuple(sorted({*buckets, max(max_seqs, *buckets)}))
    return tuple(sorted({1, max_seqs, *(b for b in DEFAULT_BUCKETS if b < most), min(most, DEFAULT_BUCKETS[-1])}))


class Decoder:
    """A served model: the step derived from its forward, with a paged KV cache and an engine.

    Make one with `llmir.jit(forward).decoder(model, …)`. One thread at a time may use it.
    """

    def __init__(
        self,
        *,
        step: DerivedStep,
        engine: Engine,
        flat: FlatForward,
        source: WeightSource,
        texts: dict[str, str],
        derive: Callable[[], Derived],
        recorder: Recorder,
        platform: str,
        stored: StoredStep | None,
        cache: DiskCache | None,
    ):
        self._step = step
        self._engine = engine
        self._flat = flat
        self._source = source
        self._texts = texts
        self._derive = derive
        self._recorder = recorder
        self._platform = platform
        self._stored = stored
        self._cache = cache
        self._check: CheckResult | None = None
        self._is_check_remembered = False

    @classmethod
    def build(
        cls,
        forward: Callable[[Any, jax.Array], jax.Array],
        model: Any,
        *,
        num_pages: int = 512,
        page_size: int = 16,
        max_seqs: int = 8,
        max_seq_len: int | None = None,
        buckets: Sequence[int] | None = None,
        prefill_chunk: int | None = None,
        verify: bool = True,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] | None = None,
        target: str | None = None,
        interpret: bool = False,
        quantize: Quantize = None,
        calibration: Calibration | None = None,
        kv_cache: str | None = None,
        burst: float = BURST,
        mesh: MeshOption = None,
        rules: Mapping[str, Any] | None = None,
        source: WeightSource | None = None,
        program: str | None = None,
        seed: int = 0,
    ) -> "Decoder":
        """Derive the decoder of `forward(model, tokens int32[1, seq]) -> logits [1, seq, vocab]`.

        Args:
            num_pages: pages of KV cache, for each group of layers that shares a page table.
            page_size: tokens a page.
            max_seqs: sequences served at once; on a mesh with `data`, by each copy of the model.
            max_seq_len: tokens of the longest sequence; None for as many as all pages hold.
            buckets: numbers of token rows to compile the step for; None for 1, max_seqs, 64 and 512.
            prefill_chunk: the most tokens of one prompt a step computes.
            verify: run the self-check (see `llmir_jax.verify`).
            tokenizer: for text and stop strings; None for token ids only.
            eos_token_ids: tokens that end a request; None for those the tokenizer names, if any.
            target: "cpu", "gpu" or "tpu", the platform that JAX runs on, or "reference"; None for what there is. On a
                CPU the step is native code where it can be, on TPUs and GPUs kernels are called; the report says why
                not where it is not so. "gpu-mosaic" is "gpu" with attention by Mosaic GPU in place of Triton.
            interpret: with target="tpu", run its kernels interpreted on the platform there is: slow, to check what a
                TPU would compute.
            quantize: what weights become: "int8", "int4", another scheme, or rules by the path of the parameter (see
                `llmir_jax.quantization.rules`), or `MixedPrecision`.
            calibration: text that is run through the model, to round weights by what it shows and to find static scales
                of activations. The model is in memory as floats meanwhile.
            kv_cache: what keys and values are kept as: "int8" or "int4", integers with a scale for each token and head;
                "float32", "bfloat16" or "float16". None for the floats that the model computes, or, where `quantize`
                leaves activations to the target as "int8" and "int4" do, what that takes: on a CPU float16.
            burst: seconds that the tokens of one call of the device may take while all requests decode, so that they
                come several at a time; 0 for one at a time. No token depends on it.
            mesh: devices to share the work: a `jax.sharding.Mesh` with axes of `sharding.AXES`, or their sizes such as
                "tensor=3,sequence=2", or "auto" for the layout whose steps take the least time by the cost model (see
                `llmir_jax.auto_mesh`). None for one device. No token depends on it, but for ties to the last bits.
            rules: on a mesh, where parameters live: by the path, an axis or None for each of the last dimensions, such
                as {"mlp/up/kernel": (None, "tensor")}; before those of `sharding.DEFAULT_RULES`.
            source: reads the values of the parameters one at a time; then `model` may be shapes only.
            program: tells what `forward` computes from all else it may compute, beside the model's arrays;
                what is derived is then kept on disk for later starts (see `llmir_jax.disk_cache`). None: it is not.
            seed: of the self-check's random tokens.

        Raises:
            LlmirError: an option that cannot be, or weights that cannot be quantized as asked.
            UnsupportedModelError: the forward mixes tokens in a way that no step can serve.
            VerificationError: the self-check found a difference.
        """
        _check_sizes(num_pages=num_pages, page_size=page_size, max_seqs=max_seqs)
        if max_seq_len is not None:
            _check_sizes(max_seq_len=max_seq_len)
        if kv_cache not in (None, *KV_CACHES):
            raise LlmirError(f"decoder: kv_cache must be one of {', '.join(KV_CACHES)}, or None, got {kv_cache!r}")
        platform = check_target(target, interpret)
        chosen: ChosenMesh | None = None
        if mesh == AUTO:
            derive_alone = partial(
                derive_from_shapes,
                forward,
                model,
                quantize,
                max_seq_len,
                max_seqs=max_seqs,
                page_size=page_size,
                num_pages=num_pages,
                kv_cache=kv_cache,
            )
            context = min(max_seq_len or num_pages * page_size, num_pages * page_size // max_seqs or 1)
            chosen = choose_mesh(derive_alone, max_seqs=max_seqs, context=context, rules=rules)
            mesh = chosen.axes
        on_mesh = as_mesh(mesh)
        copies = () if on_mesh is None else tuple(sub_meshes(own, PIPELINE) for own in sub_meshes(on_mesh, DATA))
        num_stages = len(copies[0]) if copies else 1
        if on_mesh is not None and len(processes_of(on_mesh)) < num_processes():
            missing = min(set(range(num_processes())) - set(processes_of(on_mesh)))
            raise LlmirError(f"mesh: process {missing} of {num_processes()} has none of its devices: give one of all's")
        own_copies = [number for number, meshes in enumerate(copies) if jax.process_index() in processes_of(*meshes)]
        placement = Placement.of(copies[own_copies[0]][0], rules) if copies else None
        if placement is not None:
            watch()
        elif num_processes() > 1:
            raise LlmirError(
                f"decoder: {num_processes()} processes have joined, but there is no mesh for them: give one of all "
                f"{len(jax.devices())} devices, such as mesh='tensor={len(jax.devices())}'"
            )
        if placement is None and rules is not None:
            raise LlmirError("decoder: rules say where parameters live on a mesh: give mesh too, or leave them out")
        choice = TargetChoice.of(target, platform=platform, interpret=interpret, on_mesh=placement is not None)
        longest = min(max_seq_len or num_pages * page_size, num_pages * page_size)
        recorder = Recorder()
        texts: dict[str, str] = {}
        is_pure = [True]  # whether the derivation depends on nothing but its key

        def trace_at(length: int) -> Traced:
            start = time.perf_counter()
            traced = trace(forward, model, jax.ShapeDtypeStruct((1, length), jnp.int32), fold=False)
            recorder.seconds["trace"] = recorder.seconds.get("trace", 0.0) + time.perf_counter() - start
            if "stablehlo" not in texts:
                texts["stablehlo"] = text_of(traced.module)
            return traced

        if source is None:
            arrays = flatten_params(model)
            source = ModelWeights(flatten_model(model)[1].paths, arrays)
        weights, flat = source, flatten_forward(forward, model)
        planner = Planner(
            quantize,
            source,
            calibration=calibration,
            trace_at=trace_at,
            encode=getattr(tokenizer, "encode", None),
            target="cpu" if choice.native else "reference",
            target_kv_cache=choice.kv_cache,
        )

        def parameter_values() -> LazyArrays:
            is_pure[0] = False
            return LazyArrays(weights, [p.path for p in flat.params])

        def derive() -> Derived:
            derived = derive_step(
                trace_at,
                parameter_values,
                max_seqs=max_seqs,
                max_seq_len=longest,
                page_size=page_size,
                num_pages=num_pages,
                recorder=recorder,
                plan_weights=None if quantize is None else planner.plan,
                kv_cache=kv_cache,
                target=choice.layout,
                placement=placement,
            )
            if derived.placement is not None and num_stages == 1:  # else each stage has its own
                own = derived.placement
                recorder.run(derived.module, MemoryPlanningPass(mesh=own.text, device_bytes=own.device_bytes))
            texts["llm"] = derived.text
            return derived

        cache = open_cache()
        stored: StoredStep | None = None
        is_kept = placement is None and calibration is None and not source.activation_scales
        if cache is not None and program is not None and is_kept:
            sizes = (num_pages, page_size, max_seqs, longest, kv_cache)
            target_key = (platform, choice.layout, choice.native)
            weights_key = (source.matrices, source.stored)
            stored = StoredStep.of(cache, program, flat.params, sizes, target_key, repr(quantize), *weights_key)
        record = None if stored is None else stored.record()
        derived: Derived | None = None
        if record is None:
            with collecting_later():
                derived = derive()
            give_back()  # what tracing and the passes have left
        facts = record or derived
        assert facts is not None
        notes = [*planner.notes, *([] if chosen is None else [f"mesh: auto: {chosen.why}"]), *choice.notes]
        token_buckets = _buckets(buckets, max_seqs, facts.max_seq_len * max_seqs)
        kernels = None if choice.kernels is None else replace(choice.kernels, max_tokens=token_buckets[-1])
        common: dict[str, Any] = {
            "rounding": planner.rounding,
            "max_seqs": max_seqs,
            "buckets": token_buckets,
            "recorder": recorder,
            "notes": notes,
        }

        def make_step(meshes: Sequence[Mesh]) -> DerivedStep:
            if len(meshes) > 1:
                assert derived is not None
                return PipelinedStep(derived, source, meshes=meshes, **common)
            own = derived
            if meshes and derived is not None and derived.placement is not None:
                own = replace(derived, placement=derived.placement.on(meshes[0]))
            return DerivedStep(
                own,
                source,
                derive=derive,
                native=choice.native,
                stored=stored if is_pure[0] else None,
                record=record,
                placement=placement,
                kernels=kernels,
                **common,
            )

        step, *others = [make_step(copies[number]) for number in own_copies] or [make_step(())]
        derived = None  # the steps have it for as long as they need to
        if verify:
            step.lower_ahead(most_rows(max_seqs))
        give_back(collect=False)  # code of compilers that ran so far: reading the weights takes the most memory
        start = time.perf_counter()
        for each in (step, *others):
            _ = each.params  # are read now
        recorder.seconds["weights"] = time.perf_counter() - start
        give_back(collect=False)  # what reading and packing them has left, and code that ran for the first time only
        if eos_token_ids is None:
            eos_token_ids = tuple(getattr(tokenizer, "eos_ids", ()))
        options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "eos_token_ids": eos_token_ids,
            "prefill_chunk": prefill_chunk,
            # processes that time their steps themselves would choose differently; stages are no one program
            "burst": burst if num_stages == 1 and (placement is None or num_processes() == 1) else 0.0,
            "draw_seed": shared_seeds(),
        }
        if len(copies) > 1:
            served: list[Copy | None] = [None] * len(copies)
            for number, each in zip(own_copies, (step, *others), strict=True):
                is_told = processes_of(*copies[number])[0] == jax.process_index()
                served[number] = Copy(model=each, placement=each.placement, is_told=is_told)
            devices = None if on_mesh is None or num_processes() == 1 else list(on_mesh.devices.flat)
            engine: Engine = ReplicatedEngine(served, devices=devices, **options)
        else:
            engine = Engine(step, placement=step.placement, **options)
        decoder = cls(
            step=step,
            engine=engine,
            flat=flat,
            source=source,
            texts=texts,
            derive=derive,
            recorder=recorder,
            platform=platform,
            stored=stored if is_pure[0] else None,
            cache=cache,
        )
        del facts, others  # the step has what it needs for as long as it needs to
        if verify:
            decoder._check = decoder._self_check(seed)
            if not decoder._is_check_remembered:
                give_back()
        return decoder

    # Serving

    @property
    def engine(self) -> Engine:
        """The engine, for requests that come and go, full outputs and statistics."""
        return self._engine

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest sequence."""
        return self._step.max_seq_len

    @property
    def cache_groups(self) -> tuple[CacheGroup, ...]:
        """Groups of layers that share a page table."""
        return self._step.cache_groups

    def generate(
        self,
        prompts: Sequence[ArrayLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[list[int]]:
        """New token ids for each prompt of token ids. See `Engine.generate` for errors and full outputs."""
        return [output.token_ids for output in self._engine.generate(prompts, params)]

    def complete(
        self,
        prompts: Sequence[ArrayLike],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        snapshots: str | Path | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, with text, log-probabilities and reasons.

        `snapshots` is a folder, of process 0 where there are several, in which it is kept how far the requests are
        while they are computed: after a restart the same call goes on from there. It is empty when they have ended.
        Raises CheckpointError if it has those of other requests.
        """
        return self._engine.generate(prompts, params, snapshots=None if snapshots is None else Snapshots(snapshots))

    def stream(
        self, prompt: ArrayLike, params: SamplingParams | None = None, *, snapshots: str | Path | None = None
    ) -> Iterator[RequestUpdate]:
        """The answer to one prompt, as it comes. Closing the iterator frees its pages. `snapshots`: see `complete`."""
        kept = None if snapshots is None else Snapshots(snapshots)
        return self._engine.stream([prompt], params, snapshots=kept)

    def warmup(self) -> tuple[Compilation, ...]:
        """Compile everything that serving can need; returns what was compiled and how long each took."""
        return self._engine.warmup()

    def logits(self, sequences: Sequence[ArrayLike], *, seed: int = 0) -> list[np.ndarray[Any, Any]]:
        """Logits float32[len, vocab] of each sequence, computed through the cached step in uneven chunks.

        For checking a decoder against its forward; at most max_seqs sequences. It uses the engine's cache, so nothing
        may be in flight.
        """
        if len(sequences) > self._step.max_seqs:
            raise LlmirError(f"logits: at most max_seqs = {self._step.max_seqs} sequences, got {len(sequences)}")
        arrays = [np.asarray(s, np.int32) for s in sequences]
        cached = self._cached_logits(seed)
        longest = max(len(a) for a in arrays)
        if longest > cached.capacity:
            raise LlmirError(f"logits: sequences of at most {cached.capacity} tokens fit the pages, got {longest}")
        rng = np.random.default_rng(seed)
        out = [np.zeros((len(a), self._step.vocab_size), np.float32) for a in arrays]
        done = [0] * len(arrays)
        while any(d < len(a) for d, a in zip(done, arrays, strict=True)):
            pieces, left = [], min(self._step.max_seqs, self._step.buckets[-1])
            for seq in rng.permutation(len(arrays)):
                size = min(int(rng.integers(1, self._step.max_seqs + 1)), left, len(arrays[seq]) - done[seq])
                if size:
                    pieces.append(Piece(int(seq), done[seq], done[seq] + size))
                    done[seq] += size
                    left -= size
            wanted = [(p.seq, i) for p in pieces for i in range(p.start, p.stop)]
            for row, (seq, i) in zip(cached.step(arrays, pieces, wanted), wanted, strict=True):
                out[seq][i] = row
        return out

    def iter_logits(self, tokens: ArrayLike) -> Iterator[np.ndarray[Any, Any]]:
        """Logits float32[n, vocab] of one sequence from its first token to its last, n ≤ max_seqs rows at a time.

        For measuring: no more of them are in memory than are in use. It uses the engine's cache, so nothing may be in
        flight. Raises LlmirError for a sequence that does not fit the pages.
        """
        sequence = np.asarray(tokens, np.int32)
        cached = self._cached_logits(0, num_seqs=1)
        if len(sequence) > cached.capacity:
            raise LlmirError(f"iter_logits: at most {cached.capacity} tokens fit the pages, got {len(sequence)}")
        for start in range(0, len(sequence), self._step.max_seqs):
            stop = min(start + self._step.max_seqs, len(sequence))
            yield cached.step([sequence], [Piece(0, start, stop)], [(0, i) for i in range(start, stop)])

    # Looking inside

    def ir(self, stage: str) -> str:
        """Text of a stage: "stablehlo" (traced), "llm" (over the paged cache) or "target" (what is compiled)."""
        if stage not in STAGES:
            raise LlmirError(f"ir: stage must be one of {', '.join(STAGES)}, got {stage!r}")
        if stage == "target":
            return text_of(self._step.module(self._step.buckets[0]))
        if stage not in self._texts:
            self._derive()  # the step was found on disk, where this text is not
        return self._texts[stage]

    def report(self) -> Report:
        """What was matched, how each part is served, and what the self-check found."""
        record = self._step.record
        counts, plan = dict(record.operations), record.plan
        servers = servers_of(self._step, counts, self._platform, self._engine.num_replicas)
        entries = tuple(AttentionEntry(served_by=servers["llm.attend_pages"], **asdict(a)) for a in record.attention)
        values: dict[str, list[str]] = {}
        for weight in self._step.weights:
            for path, text in weight.describe(plan):
                values.setdefault(path, []).append(text)
        return Report(
            attention=entries,
            operations=counts,
            served_by=servers,
            parameters={path: own[0] if len(own) == 1 else f"{own[0]} x {len(own)}" for path, own in values.items()},
            parameter_bytes=sum(weight.nbytes for weight in self._step.weights),
            not_quantized={} if plan is None else {p: why for p, why in plan.kept.items() if p in values},
            unused_parameters=tuple(p.path for p in self._flat.params if p.path not in values),
            cache_bytes=sum(g.nbytes for g in self._step.cache_groups),
            max_seq_len=self._step.max_seq_len,
            buckets=self._step.buckets,
            compilations=tuple(
                f"{c.program}{'' if c.bucket is None else f' of {c.bucket} tokens'} in {c.seconds:.2f} s"
                for c in self._engine.compilations
            ),
            self_check=self._check_text(),
            seconds=dict(self._recorder.seconds),
            from_disk=() if self._stored is None else tuple(self._stored.found),
            to_disk=() if self._stored is None else tuple(self._stored.made),
            notes=(*record.notes, *notes_of(self._step), *(() if self._cache is None else self._cache.problems)),
        )

    def _check_text(self) -> str:
        check = self._check
        if check is None:
            return "skipped (verify=False)"
        before = " in an earlier start, of the same program and weights" if self._is_check_remembered else ""
        return (
            f"passed{before}: {check.compared} rows of logits within {100 * check.error:.2g} % of the largest "
            f"({100 * check.tolerance:.2g} % allowed)"
        )

    def cost(self) -> StepCost:
        """Bytes that a token reads and multiply-adds that it takes, counted on the derived step."""
        sizes = [weight.nbytes for weight in self._step.weights]
        return step_cost(self._step.derived_module, sizes, self.cache_groups, max_seqs=self._step.max_seqs)

    # The self-check

    def _cached_logits(self, seed: int, num_seqs: int | None = None) -> CachedLogits:
        return CachedLogits(
            self._engine.run_rows,
            self._step.cache_groups,
            max_seqs=self._step.max_seqs,
            max_seq_len=self._step.max_seq_len,
            seed=seed,
            num_seqs=num_seqs,
        )

    def _self_check(self, seed: int) -> CheckResult:
        length = min(_SELF_CHECK_LENGTH, self._step.max_seq_len)
        key: tuple[Any, ...] = (seed, self._step.buckets, self._source.identity, *self._step.native_key)
        stored = None if self._source.identity is None else self._stored
        if stored is not None and (known := stored.checked(*key)) is not None:
            self._is_check_remembered = True
            return known
        parameters, weights = self._flat.params, self._step.weights
        others = unread(parameters, weights, self._source)

        start = time.perf_counter()

        def forward(sequences: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
            shapes = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in parameters]
            dense = DenseParameters(parameters, weights, self._step.on_host, others)
            plain = PlainForward(self._flat.flat_fn, shapes, dense, len(sequences[0]))
            rows = [plain(sequence) for sequence in sequences]
            del plain
            give_back(collect=False)  # what it compiled is not needed again
            return rows

        num_seqs = min(NUM_SEQUENCES, self._step.max_seqs, *(group.num_pages for group in self._step.cache_groups))
        result = self_check(
            self._cached_logits(seed, num_seqs),
            forward,
            vocab_size=self._input_vocab(),
            max_rows=self._step.buckets[-1],
            length=length,
            tolerance=self._tolerance(),
            seed=seed,
            advice=_OF_INTEGERS if self._step.record.activations else "Please report the model",
        )
        self._recorder.seconds["self-check"] = time.perf_counter() - start
        if stored is not None:
            stored.keep_checked(result, *key)
        return result

    def _input_vocab(self) -> int:
        return self._step.vocab_size

    def _tolerance(self) -> float:
        """What the coarsest numbers that the step computes with allow; weights are the same on both sides."""
        record = self._step.record
        kinds = ["half" if record.computes_in_half else "float32", *record.activations]
        kinds += [f"int{g.quantized_bits} cache" for g in self._step.cache_groups if g.quantized_bits is not None]
        return max(RELATIVE_TOLERANCE[kind] for kind in kinds)
