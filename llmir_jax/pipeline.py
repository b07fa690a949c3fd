"""The pipeline: which passes run, in which order, and what is kept of each stage.

    trace → derive → cache → raise → quantize → shard → rows → lower

Every pass verifies its result. The step is derived once, at a prime number of tokens, and specialised to each bucket.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.ir import SSAValue
from xdsl.passes import ModulePass
from xdsl.printer import Printer
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.utils.exceptions import VerifyException

from llmir_jax.derive import Derived, TraceAt, derive
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.disk_cache import DiskCache
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import make_context
from llmir_jax.placement import Placement
from llmir_jax.quantization import Plan
from llmir_jax.transforms.activation_quantization import ActivationQuantizationPass
from llmir_jax.transforms.blockify_kv_cache import BlockifyKVCachePass
from llmir_jax.transforms.communication_insertion import CommunicationInsertionPass
from llmir_jax.transforms.hardware_specific_quantization import HardwareSpecificQuantizationPass
from llmir_jax.transforms.insert_kv_cache import InsertKVCachePass
from llmir_jax.transforms.kv_cache_allocation import KVCacheAllocationPass
from llmir_jax.transforms.kv_cache_precision import KVCachePrecisionPass
from llmir_jax.transforms.kv_cache_pruning import KVCachePruningPass
from llmir_jax.transforms.kv_cache_quantization import KVCacheQuantizationPass
from llmir_jax.transforms.kv_cache_sharding import KVCacheShardingPass
from llmir_jax.transforms.lower_to_reference import LowerToReferencePass
from llmir_jax.transforms.model_partitioning import ModelPartitioningPass
from llmir_jax.transforms.paged_attention_rewrite import PagedAttentionRewritePass
from llmir_jax.transforms.quantized_operation_fusion import QuantizedOperationFusionPass
from llmir_jax.transforms.raise_gated_mlp import RaiseGatedMLPPass
from llmir_jax.transforms.raise_linear import RaiseLinearPass
from llmir_jax.transforms.raise_norm import RaiseNormPass
from llmir_jax.transforms.raise_rope import RaiseRopePass
from llmir_jax.transforms.remove_dead_arguments import RemoveDeadArgumentsPass
from llmir_jax.transforms.ring_attention import RingAttentionPass
from llmir_jax.transforms.sink_logits_rows import SinkLogitsRowsPass
from llmir_jax.transforms.specialize_tokens import SpecializeTokensPass
from llmir_jax.transforms.weight_quantization import WeightQuantizationPass, Weights, find_weights

if TYPE_CHECKING:
    from llmir_jax.targets.cpu.weights import Arrangement
    from llmir_jax.transforms.lower_to_kernels import LowerToKernelsPass

PlanWeights = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, int]], int], Plan]
"""Plans the quantization of weights, from the shape of every parameter, (outputs, inputs) of those that can be
quantized, and the tokens of the longest sequence."""


@dataclass
class Recorder:
    """Runs passes on a module, verifies after each, and keeps how long each took in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)
    context: Context = field(default_factory=make_context)

    def run(self, module: ModuleOp, *passes: ModulePass) -> ModuleOp:
        """Apply `passes` in order, in place."""
        for each in passes:
            start = time.perf_counter()
            each.apply(self.context, module)
            try:
                module.verify()
            except VerifyException as error:
                raise InvalidIRError(f"after the pass {each.name} the module does not verify: {error}") from error
            self.seconds[each.name] = self.seconds.get(each.name, 0.0) + time.perf_counter() - start
        return module


KV_CACHES: Mapping[str, int | None] = {"int8": 8, "int4": 4, "float32": None, "bfloat16": None, "float16": None}
"""What keys and values can be kept as, and the bits of integers."""


def text_of(module: ModuleOp) -> str:
    """The module in MLIR's textual form, without the attributes that are only of use to passes."""
    stripped = module.clone()
    for op in stripped.walk():
        op.attributes.pop("llmir.loc", None)
    out = StringIO()
    Printer(out).print_op(stripped)
    return out.getvalue() + "\n"


def derive_step(
    trace_at: TraceAt,
    parameter_values: Callable[[], Sequence[Any]] | None,
    *,
    max_seqs: int,
    max_seq_len: int,
    page_size: int,
    num_pages: int,
    recorder: Recorder,
    plan_weights: PlanWeights | None = None,
    kv_cache: str | None = None,
    target: str = "reference",
    placement: Placement | None = None,
) -> Derived:
    """The step of a plain forward, over pages, at the length it was derived at.

    `kv_cache` is what keys and values are kept as, of `KV_CACHES`; None leaves that to the plan of the weights, or else
    to what the model computes. `target`, one of `LAYOUTS`, says how quantized weights are laid out. With a `placement`
    it is partitioned over its mesh, on which `derived.placement` then is. Whether it fits there is for
    `MemoryPlanningPass`, or for those of its stages.
    """
    start = time.perf_counter()
    derived = derive(
        trace_at,
        parameter_values,
        max_seqs=max_seqs,
        max_seq_len=max_seq_len,
        cache_sizes=(page_size, num_pages, -(-max_seq_len // page_size)),
    )
    recorder.seconds["derive"] = time.perf_counter() - start
    module = derived.module
    module.verify()
    recorder.run(
        module,
        # the cache: contiguous, then paged, then read in place, one a window, then arrays of pages
        InsertKVCachePass(max_seqs=max_seqs, max_seq_len=derived.max_seq_len),
        BlockifyKVCachePass(page_size=page_size),
        PagedAttentionRewritePass(),
        KVCachePruningPass(),
        # raise: what later phases fuse
        RaiseNormPass(),
        RaiseRopePass(),
        RaiseLinearPass(),
    )
    if plan_weights is not None:
        weights = find_weights(module)
        derived.plan = _explained(plan_weights(weights.shapes, weights.matrices, derived.max_seq_len), weights)
        recorder.run(
            module,
            WeightQuantizationPass(plan=derived.plan),
            ActivationQuantizationPass(plan=derived.plan),
            # on a mesh every matrix is split by itself
            *([QuantizedOperationFusionPass()] if placement is None else []),
            HardwareSpecificQuantizationPass(target=target),
        )
    recorder.run(module, RaiseGatedMLPPass())
    derived.text = text_of(module)
    recorder.run(module, KVCacheAllocationPass(num_pages=num_pages))
    if kv_cache is None and derived.plan is not None:
        kv_cache = derived.plan.kv_cache
    if kv_cache is not None:
        bits = KV_CACHES[kv_cache]
        # on a mesh there are no kernels
        scales_for = target if placement is None else "reference"
        kept_as = (
            KVCachePrecisionPass(dtype=kv_cache)
            if bits is None
            else KVCacheQuantizationPass(bits=bits, target=scales_for)
        )
        recorder.run(module, kept_as)
    recorder.run(module, RemoveDeadArgumentsPass(keep_inputs=True))
    cse(module)
    if placement is not None:
        placement = for_attention(module, placement)
        recorder.run(
            module,
            ModelPartitioningPass(mesh=placement.text, rules=placement.rules),
            KVCacheShardingPass(mesh=placement.text),
        )
        derived.placement = placement
    return derived


def for_attention(module: ModuleOp, placement: Placement) -> Placement:
    """The placement that suits the heads of the step's attention. Raises LlmirError if none does."""
    forms = {
        (shape_of(op.q)[1], pages_shape(op.k_pages)[2]) for op in module.walk() if isinstance(op, llm.AttendPagesOp)
    }
    for num_heads, num_kv_heads in sorted(forms, key=lambda form: form[1]):
        placement = placement.for_heads(num_heads, num_kv_heads)
    return placement


def pages_shape(pages: SSAValue) -> tuple[int, ...]:
    """[num_pages, page_size, num_kv_heads, head_dim] of page arrays, quantized or not."""
    kind = pages.type
    assert isinstance(kind, TensorType | llm.QuantizedTensorType)
    return tuple(kind.get_shape())


def _explained(plan: Plan, weights: Weights) -> Plan:
    """The plan, with what the parameters that cannot be quantized are to the step."""
    chosen = {path: why for path, why in plan.kept.items() if path in weights.uses or "rule" in why}
    return replace(plan, kept={**plan.kept, **weights.reasons, **chosen})


def specialize_step(
    derived: Derived,
    tokens: int,
    recorder: Recorder,
    arrangement: "Arrangement | None" = None,
    cache: DiskCache | None = None,
    kernels: "LowerToKernelsPass | None" = None,
) -> ModuleOp:
    """The step for `tokens` tokens, lowered to what runs: native code where its parameters have an `arrangement`,
    a target's `kernels`, else the reference decomposition."""
    module = derived.module.clone()
    rows = derived.max_seqs
    lower: ModulePass = kernels or LowerToReferencePass()
    if arrangement is not None:
        from llmir_jax.transforms.lower_to_cpu import LowerToCpuPass  # here, since other targets need no LLVM

        lower = LowerToCpuPass(arrangement=arrangement, cache=cache)
    communication: list[ModulePass] = []
    if derived.placement is not None:
        on_mesh = derived.placement.text
        communication = [RingAttentionPass(mesh=on_mesh), CommunicationInsertionPass(mesh=on_mesh)]
    # with so few tokens, logits for all cost less than for the rows
    sink = [SinkLogitsRowsPass(at_logits=tokens <= rows)] if derived.has_logits else []
    return recorder.run(
        module,
        *sink,
        SpecializeTokensPass(tokens=tokens),
        *communication,
        lower,
    )


__all__ = ["Recorder", "derive_step", "for_attention", "specialize_step", "text_of"]
