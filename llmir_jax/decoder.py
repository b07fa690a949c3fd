"""The decoder that is derived from a forward: generate, stream, look at its IR and its report."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from xdsl.dialects.builtin import TensorType

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.cost import StepCost, step_cost
from llmir_jax.calibrate import Planner
from llmir_jax.dense import element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import dtype_of, type_of
from llmir_jax.errors import LlmirError
from llmir_jax.interop import op_name
from llmir_jax.pipeline import Recorder, derive_step, text_of
from llmir_jax.quantization import Calibration, Plan, Quantize
from llmir_jax.report import AttentionEntry, Report
from llmir_jax.runtime.batch import CacheGroup
from llmir_jax.runtime.engine import Engine
from llmir_jax.runtime.outputs import RequestOutput, RequestUpdate
from llmir_jax.runtime.runner import Compilation
from llmir_jax.runtime.sampling import SamplingParams
from llmir_jax.runtime.text import Tokenizer
from llmir_jax.step import DerivedStep
from llmir_jax.trace import Traced, flatten_model, flatten_params, trace
from llmir_jax.transforms.hardware_specific_quantization import LAYOUTS
from llmir_jax.verify import RELATIVE_TOLERANCE, CachedLogits, CheckResult, Piece, self_check
from llmir_jax.weights import LazyArrays, ModelWeights, WeightSource, dense, unread

STAGES = ("stablehlo", "llm", "target")
DEFAULT_BUCKETS = (64, 512)
BURST = 0.02
"""Seconds that the tokens of one call may take while all requests decode: less than a reader sees."""
KV_CACHES = {"int8": 8, "int4": 4}
"""Bits of quantized caches, by name."""
_SELF_CHECK_LENGTH = 37  # tokens: crosses pages of 4, 16 and 32


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise LlmirError(f"decoder: {name} must be a whole number of at least 1, got {value!r}")


def _check_target(target: str | None) -> str:
    """The platform that the decoder runs on."""
    platform = jax.default_backend()
    if target not in (None, "reference", platform) and not (target == "gpu" and platform in ("cuda", "rocm")):
        raise LlmirError(
            f"decoder: target={target!r}, but JAX runs on {platform!r} here: leave target out, or set JAX_PLATFORMS"
        )
    return platform


def _layout_target(platform: str) -> str:
    """The target that quantized weights are laid out for."""
    if platform in ("cuda", "rocm"):
        return "gpu"
    return platform if platform in LAYOUTS else "reference"


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
        forward: Callable[[Any, jax.Array], jax.Array],
        source: WeightSource,
        traced: Traced,
        plan: Plan | None,
        texts: dict[str, str],
        recorder: Recorder,
        notes: Sequence[str],
        platform: str,
    ):
        self._step = step
        self._engine = engine
        self._forward = forward
        self._source = source
        self._traced = traced
        self._plan = plan
        self._texts = texts
        self._recorder = recorder
        self._notes = tuple(notes)
        self._platform = platform
        self._check: CheckResult | None = None

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
        quantize: Quantize = None,
        calibration: Calibration | None = None,
        kv_cache: str | None = None,
        source: WeightSource | None = None,
        seed: int = 0,
    ) -> "Decoder":
        """Derive the decoder of `forward(model, tokens int32[1, seq]) -> logits [1, seq, vocab]`.

        Args:
            num_pages: pages of KV cache, for each group of layers that shares a page table.
            page_size: tokens a page.
            max_seqs: sequences served at once.
            max_seq_len: tokens of the longest sequence; None for as many as all pages hold.
            buckets: numbers of token rows to compile the step for; None for 1, max_seqs, 64 and 512.
            prefill_chunk: the most tokens of one prompt a step computes.
            verify: run the self-check (see `llmir_jax.verify`).
            tokenizer: for text and stop strings; None for token ids only.
            eos_token_ids: tokens that end a request; None for those the tokenizer names, if any.
            target: "cpu", "gpu" or "tpu", the platform that JAX runs on, or "reference"; None for what there is. On a
                CPU the step is native code where it can be; the report says why not where it is not.
            quantize: what weights become: "int8", "int4", another scheme, or rules by the path of the parameter (see
                `llmir_jax.quantization.rules`), or `MixedPrecision`.
            calibration: text that is run through the model, to round weights by what it shows and to find static scales
                of activations. The model is in memory as floats meanwhile.
            kv_cache: "int8" or "int4": keys and values are kept as integers with a scale for each token and head. None
                for the floats that the model computes.
            source: reads the values of the parameters one at a time; then `model` may be shapes only.
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
        platform = _check_target(target)
        native = platform == "cpu" and target in (None, "cpu")
        longest = min(max_seq_len or num_pages * page_size, num_pages * page_size)
        recorder = Recorder()
        first: list[Traced] = []

        def trace_at(length: int) -> Traced:
            start = time.perf_counter()
            traced = trace(forward, model, jax.ShapeDtypeStruct((1, length), jnp.int32), fold=False)
            recorder.seconds["trace"] = recorder.seconds.get("trace", 0.0) + time.perf_counter() - start
            if not first:
                first.append(traced)
                texts["stablehlo"] = text_of(traced.module)
            return traced

        texts: dict[str, str] = {}
        if source is None:
            arrays = flatten_params(model)
            source = ModelWeights(flatten_model(model)[1].paths, arrays)
        weights = source
        planner = Planner(
            quantize,
            source,
            calibration=calibration,
            trace_at=trace_at,
            encode=getattr(tokenizer, "encode", None),
            target="cpu" if native else "reference",
        )
        derived = derive_step(
            trace_at,
            lambda: LazyArrays(weights, [p.path for p in first[0].params]),
            max_seqs=max_seqs,
            max_seq_len=longest,
            page_size=page_size,
            num_pages=num_pages,
            recorder=recorder,
            plan_weights=None if quantize is None else planner.plan,
            kv_cache_bits=None if kv_cache is None else KV_CACHES[kv_cache],
            target=_layout_target(platform),
        )
        texts["llm"] = derived.text
        start = time.perf_counter()
        step = DerivedStep(
            derived,
            source,
            rounding=planner.rounding,
            max_seqs=max_seqs,
            buckets=_buckets(buckets, max_seqs, derived.max_seq_len * max_seqs),
            recorder=recorder,
            native=native,
        )
        recorder.seconds["weights"] = time.perf_counter() - start
        if eos_token_ids is None:
            eos_token_ids = tuple(getattr(tokenizer, "eos_ids", ()))
        engine = Engine(
            step, tokenizer=tokenizer, eos_token_ids=eos_token_ids, prefill_chunk=prefill_chunk, burst=BURST
        )
        decoder = cls(
            step=step,
            engine=engine,
            forward=forward,
            source=source,
            traced=first[0],
            plan=derived.plan,
            texts=texts,
            recorder=recorder,
            notes=[*derived.notes, *planner.notes],
            platform=platform,
        )
        if verify:
            decoder._check = decoder._self_check(seed)
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
    ) -> list[RequestOutput]:
        """As `generate`, with text, log-probabilities and reasons."""
        return self._engine.generate(prompts, params)

    def stream(self, prompt: ArrayLike, params: SamplingParams | None = None) -> Iterator[RequestUpdate]:
        """The answer to one prompt, as it comes. Closing the iterator frees its pages."""
        return self._engine.stream([prompt], params)

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
        return self._texts[stage]

    def report(self) -> Report:
        """What was matched, how each part is served, and what the self-check found."""
        module = self._step.derived_module
        main = main_function(module)
        counts: dict[str, int] = {}
        for op in main.body.block.ops:
            counts[op_name(op)] = counts.get(op_name(op), 0) + 1
        forms: dict[tuple[Any, ...], int] = {}
        for op in main.body.block.ops:
            if isinstance(op, llm.AttendPagesOp):
                heads, dim = type_of(op.q).get_shape()[1:]
                kind = op.k_pages.type
                assert isinstance(kind, TensorType | llm.QuantizedTensorType)
                kv_heads = kind.get_shape()[2]
                window = None if op.window is None else op.window.value.data
                softcap = None if op.softcap is None else float(op.softcap.value.data)
                form = (heads, kv_heads, dim, window, softcap, op.slopes is not None, _cache_dtype(kind))
                forms[form] = forms.get(form, 0) + 1
        names = ("num_heads", "num_kv_heads", "head_dim", "window", "softcap", "alibi", "cache_dtype")
        server = self._server()
        entries = tuple(
            AttentionEntry(layers=n, served_by=server, **dict(zip(names, form, strict=True)))
            for form, n in forms.items()
        )
        check = self._check
        values: dict[str, list[str]] = {}
        for weight in self._step.weights:
            for path, text in weight.describe(self._plan):
                values.setdefault(path, []).append(text)
        return Report(
            attention=entries,
            operations=counts,
            served_by={name: server for name in sorted(counts) if name.startswith("llm.")},
            parameters={path: own[0] if len(own) == 1 else f"{own[0]} x {len(own)}" for path, own in values.items()},
            parameter_bytes=sum(weight.nbytes for weight in self._step.weights),
            not_quantized={} if self._plan is None else {p: why for p, why in self._plan.kept.items() if p in values},
            unused_parameters=tuple(p.path for p in self._traced.params if p.path not in values),
            cache_bytes=sum(g.nbytes for g in self._step.cache_groups),
            max_seq_len=self._step.max_seq_len,
            buckets=self._step.buckets,
            compilations=tuple(
                f"{c.program}{'' if c.bucket is None else f' of {c.bucket} tokens'} in {c.seconds:.2f} s"
                for c in self._engine.compilations
            ),
            self_check="skipped (verify=False)"
            if check is None
            else f"passed: {check.compared} rows of logits within {100 * check.error:.2g} % of the largest "
            f"({100 * check.tolerance:.2g} % allowed)",
            seconds=dict(self._recorder.seconds),
            notes=self._notes,
        )

    def _server(self) -> str:
        """What computes the step, and why."""
        if self._step.is_native:
            from llmir_jax.targets.cpu.host import this_host
            from llmir_jax.targets.cpu.team import team

            return f"native code for {this_host()}, {team().size} threads"
        reference = f"the reference decomposition, compiled by XLA for {self._platform}"
        if self._step.not_native:
            return f"{reference} (not native code: {'; '.join(self._step.not_native)})"
        return f"{reference} (no kernels of its own were asked for)"

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
        parameters, weights = self._traced.params, self._step.weights
        others = unread(parameters, weights, self._source)

        @jax.jit
        def forward(values: Sequence[Any], others: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
            own = self._step.values(values)
            (logits,) = self._traced.flat_fn(*dense(parameters, weights, own, others), tokens)
            return logits.astype(jnp.float32)[0]

        def run(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            rows: np.ndarray[Any, Any] = np.asarray(forward(self._step.params, others, jnp.asarray(tokens)[None]))
            return rows

        start = time.perf_counter()
        result = self_check(
            self._cached_logits(seed),
            run,
            vocab_size=self._input_vocab(),
            max_seqs=self._step.max_seqs,
            max_rows=self._step.buckets[-1],
            length=length,
            tolerance=self._tolerance(),
            seed=seed,
        )
        self._recorder.seconds["self-check"] = time.perf_counter() - start
        return result

    def _input_vocab(self) -> int:
        return self._step.vocab_size

    def _tolerance(self) -> float:
        """What the coarsest numbers that the step computes with allow; weights are the same on both sides."""
        kinds = ["half" if self._computes_in_half() else "float32"]
        ops = list(main_function(self._step.derived_module).body.block.ops)
        for op in ops:
            if isinstance(op, llm.QuantizedMatmulOp) and op.activation_bits is not None:
                kinds.append("int8 activations" if op.activation_scales is None else "static int8 activations")
        kinds += [f"int{g.quantized_bits} cache" for g in self._step.cache_groups if g.quantized_bits is not None]
        return max(RELATIVE_TOLERANCE[kind] for kind in kinds)

    def _computes_in_half(self) -> bool:
        """Whether 16-bit floats take part: then rounding alone separates the two."""
        main = main_function(self._step.derived_module)
        return any(
            dtype_of(r).itemsize <= 2 and dtype_of(r).kind not in "iub"
            for op in main.body.block.ops
            for r in op.results
            if isinstance(r.type, TensorType)
        )


def _cache_dtype(kind: TensorType | llm.QuantizedTensorType) -> str:
    if isinstance(kind, llm.QuantizedTensorType):
        scale = element_dtype(kind.scale_type)
        side = "scale" if kind.is_symmetric else "scale and minimum"
        return f"int{kind.integer_type.width.data}, a {scale} {side} for each token and head"
    return str(element_dtype(kind.element_type))
