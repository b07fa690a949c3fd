"""The compiler's passes, one a file, and the table of them that ``llmir-opt`` registers."""

from importlib import import_module

from xdsl.passes import ModulePass

PASSES: dict[str, tuple[str, str]] = {
    "activation-quantization": ("activation_quantization", "ActivationQuantizationPass"),
    "blockify-kv-cache": ("blockify_kv_cache", "BlockifyKVCachePass"),
    "check-token-axis": ("check_token_axis", "CheckTokenAxisPass"),
    "communication-insertion": ("communication_insertion", "CommunicationInsertionPass"),
    "hardware-specific-quantization": ("hardware_specific_quantization", "HardwareSpecificQuantizationPass"),
    "inline-calls": ("inline_calls", "InlineCallsPass"),
    "insert-kv-cache": ("insert_kv_cache", "InsertKVCachePass"),
    "kv-cache-allocation": ("kv_cache_allocation", "KVCacheAllocationPass"),
    "kv-cache-precision": ("kv_cache_precision", "KVCachePrecisionPass"),
    "kv-cache-pruning": ("kv_cache_pruning", "KVCachePruningPass"),
    "kv-cache-quantization": ("kv_cache_quantization", "KVCacheQuantizationPass"),
    "kv-cache-sharding": ("kv_cache_sharding", "KVCacheShardingPass"),
    "lower-to-cpu": ("lower_to_cpu", "LowerToCpuPass"),
    "lower-to-flash": ("lower_to_flash", "LowerToFlashPass"),
    "lower-to-gpu": ("lower_to_gpu", "LowerToGpuPass"),
    "lower-to-reference": ("lower_to_reference", "LowerToReferencePass"),
    "lower-to-tpu": ("lower_to_tpu", "LowerToTpuPass"),
    "matrix-weights": ("matrix_weights", "MatrixWeightsPass"),
    "memory-planning": ("memory_planning", "MemoryPlanningPass"),
    "model-partitioning": ("model_partitioning", "ModelPartitioningPass"),
    "paged-attention-rewrite": ("paged_attention_rewrite", "PagedAttentionRewritePass"),
    "quantization-calibration": ("quantization_calibration", "QuantizationCalibrationPass"),
    "quantized-operation-fusion": ("quantized_operation_fusion", "QuantizedOperationFusionPass"),
    "raise-attention": ("raise_attention", "RaiseAttentionPass"),
    "raise-gated-mlp": ("raise_gated_mlp", "RaiseGatedMLPPass"),
    "raise-linear": ("raise_linear", "RaiseLinearPass"),
    "raise-norm": ("raise_norm", "RaiseNormPass"),
    "raise-rope": ("raise_rope", "RaiseRopePass"),
    "remove-dead-arguments": ("remove_dead_arguments", "RemoveDeadArgumentsPass"),
    "rewrite-positions": ("rewrite_positions", "RewritePositionsPass"),
    "ring-attention": ("ring_attention", "RingAttentionPass"),
    "simplify-inputs": ("simplify_inputs", "SimplifyInputsPass"),
    "sink-logits-rows": ("sink_logits_rows", "SinkLogitsRowsPass"),
    "specialize-tokens": ("specialize_tokens", "SpecializeTokensPass"),
    "unroll-loops": ("unroll_loops", "UnrollLoopsPass"),
    "weight-quantization": ("weight_quantization", "WeightQuantizationPass"),
}
"""For each pass, by its name on the command line: its module in this package, and its class."""


def load_pass(name: str) -> type[ModulePass]:
    """Import the pass of this name; KeyError for a name that is not in `PASSES`."""
    module, cls = PASSES[name]
    found = getattr(import_module(f"{__name__}.{module}"), cls)
    assert isinstance(found, type)
    assert issubclass(found, ModulePass)
    return found


def all_passes() -> tuple[type[ModulePass], ...]:
    """Every pass, imported."""
    return tuple(load_pass(name) for name in PASSES)
