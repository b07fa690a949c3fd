"""Derived steps compiled for TPUs ahead of time, by libtpu, on a machine that may have none. Nothing is in memory but
shapes: neither weights nor pages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from llmir_jax.analysis.align import main_function
from llmir_jax.errors import LlmirError
from llmir_jax.interop import Executable, call_executable, executable
from llmir_jax.pipeline import Recorder, derive_step, specialize_step
from llmir_jax.quantization import MixedPrecision, Plan, Quantize, check_quantize, make_plan
from llmir_jax.targets.paged_kernels import find_attention
from llmir_jax.trace import trace
from llmir_jax.transforms import signature
from llmir_jax.transforms.lower_to_kernels import Unserved
from llmir_jax.transforms.lower_to_tpu import LowerToTpuPass
from pallas_kernels.chips import chip_of


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What libtpu made of a step for `tokens` tokens on one device."""

    device_kind: str
    tokens: int
    num_kernels: int
    """Calls of Mosaic kernels in the program."""
    attention_layers: int
    unserved: Unserved
    """What has no kernel, of the kinds of operations that there are kernels for, and why."""
    argument_bytes: int
    """Of weights, pages and the batch."""
    temporary_bytes: int
    aliased_bytes: int
    """Of page arrays that are updated in place."""


def compile_for_tpu(
    forward: Callable[[Any, jax.Array], jax.Array],
    model: Any,
    topology: str,
    *,
    tokens: tuple[int, ...],
    max_seqs: int,
    num_pages: int,
    page_size: int = 128,
    max_seq_len: int | None = None,
    quantize: Quantize = None,
    kv_cache: str | None = None,
) -> list[CompiledStep]:
    """Derive the step of `forward` and compile it for the first device of a topology, for each number of tokens.

    Args:
        model: as for a decoder; ShapeDtypeStructs will do (`nnx.eval_shape`).
        topology: its name, as of `jax.experimental.topologies`: "v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1".
        tokens: numbers of token rows, as a decoder's `buckets`.
        quantize: as of a decoder, without a calibration.
        kv_cache: as of a decoder.

    Raises:
        LlmirError: libtpu is not installed, does not know the topology, or finds that the step does not fit the device.
        UnsupportedModelError: no step can be derived.
    """
    try:
        device: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    except Exception as error:
        raise LlmirError(
            f"topology {topology!r}: {(str(error) or repr(error)).splitlines()[0]}; compiling ahead of time needs "
            "libtpu, which pip install 'llmir-jax[tpu-aot]' brings"
        ) from error
    check_quantize(quantize)
    if isinstance(quantize, MixedPrecision):
        raise LlmirError("compile_for_tpu: mixed precision measures weights, and there are none; give a scheme")
    scheme = quantize

    def plan(shapes: Mapping[str, tuple[int, ...]], matrices: Mapping[str, tuple[int, int]], max_seq_len: int) -> Plan:
        chosen = make_plan(scheme, shapes, matrices=matrices, stored={})
        return chosen.for_target("reference", matrices)  # what schemes leave to the target: activations stay floats

    recorder = Recorder()
    derived = derive_step(
        lambda length: trace(forward, model, jax.ShapeDtypeStruct((1, length), jnp.int32), fold=False),
        None,
        max_seqs=max_seqs,
        max_seq_len=min(max_seq_len or num_pages * page_size, num_pages * page_size),
        page_size=page_size,
        num_pages=num_pages,
        recorder=recorder,
        plan_weights=None if quantize is None else plan,
        kv_cache=kv_cache,
        target="tpu",
    )
    lower = LowerToTpuPass(max_tokens=max(tokens), chip=chip_of(device).name)
    layers = len(find_attention(list(main_function(derived.module).body.block.ops)))
    compiled = []
    for count in tokens:
        module = specialize_step(derived, count, recorder, kernels=lower)
        attributes = signature.argument_attributes(main_function(module))
        pages = [i for i, entry in enumerate(attributes) if signature.role_of(entry) in ("k_pages", "v_pages")]
        program = _compile(executable(module), device, pages)
        memory = program.memory_analysis()
        compiled.append(
            CompiledStep(
                device_kind=device.device_kind,
                tokens=count,
                num_kernels=program.as_text().count('custom_call_target="tpu_custom_call"'),
                attention_layers=layers,
                unserved=lower.unserved(derived.module),
                argument_bytes=memory.argument_size_in_bytes,
                temporary_bytes=memory.temp_size_in_bytes,
                aliased_bytes=memory.alias_size_in_bytes,
            )
        )
    return compiled


def _compile(called: Executable, device: Any, donated: list[int]) -> Any:
    one = SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=one) for aval in called.inputs]

    def step(*args: jax.Array) -> list[jax.Array]:
        return call_executable(called, *args)

    lowered = jax.jit(step, donate_argnums=tuple(donated)).lower(*shapes)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise LlmirError(f"the step for {device.device_kind}: {(str(error) or repr(error)).splitlines()[0]}") from error


__all__ = ["CompiledStep", "compile_for_tpu"]
