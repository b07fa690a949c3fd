"""What computes each kind of operation of a step, in the words of the report."""

from collections.abc import Mapping

from llmir_jax.pipelined_step import PipelinedStep
from llmir_jax.processes import num_processes
from llmir_jax.runtime.pipeline_runner import num_parts
from llmir_jax.step import DerivedStep
from llmir_jax.transforms.ring_attention import attention_over_sequence
from sharding.mesh import SEQUENCE


def servers_of(step: DerivedStep, counts: Mapping[str, int], platform: str, num_replicas: int) -> dict[str, str]:
    """By name: of each llm operation, and of any other that splits the native code; `counts` of each are in the step.

    `platform` is what JAX runs on, `num_replicas` how many copies of the model there are.
    """
    in_xla = step.in_xla
    server = _server(step, platform, num_replicas)
    found = {name: server for name in sorted({*counts, *in_xla}) if name.startswith("llm.") or name in in_xla}
    for name, those in in_xla.items():
        between = f"XLA, between calls of native code ({those})"
        found[name] = between if those.count >= counts.get(name, 0) else f"{server}; some by {between}"
    if step.kernels is None:
        return found
    for name, kernel in step.kernels.titles().items():
        if name in found:
            reasons = step.unserved.get("llm.attend_pages" if name == "llm.write_pages" else name, {})
            found[name] = _kernel_text(kernel, server, counts[name], reasons)
    return found


def _kernel_text(kernel: str, reference: str, count: int, reasons: Mapping[str, int]) -> str:
    """What serves so many operations, and why not the kernel where not."""
    if not reasons:
        return kernel
    others = [f"{number} by {reference}: {reason}" for reason, number in reasons.items()]
    served = count - sum(reasons.values())
    return "; ".join([f"{served} by {kernel}", *others] if served else others)


def _server(step: DerivedStep, platform: str, num_replicas: int) -> str:
    """What computes the step, and why."""
    if step.is_native:
        from llmir_jax.targets.cpu.host import this_host
        from llmir_jax.targets.cpu.team import team

        return f"native code for {this_host()}, {team().size} threads"
    reference = f"the reference decomposition, compiled by XLA for {platform}"
    if step.placement is not None:
        return f"{reference}, partitioned over {step.placement}{_copies(step, num_replicas)}"
    if step.not_native:
        return f"{reference} (not native code: {'; '.join(step.not_native)})"
    if step.kernels is not None:
        return reference
    return f"{reference} (no kernels of its own were asked for)"


def _copies(step: DerivedStep, num_replicas: int) -> str:
    text = ""
    if isinstance(step, PipelinedStep):
        layers = [sum(group.num_layers for group in stage.cache_groups) for stage in step.stages]
        text = f" for each of {len(layers)} stages of {', '.join(map(str, layers))} layers"
    if num_replicas > 1:
        text += f", and {num_replicas} of these for copies of the model"
    if text and num_processes() > 1:
        text += f", in {num_processes()} processes"
    return text


def notes_of(step: DerivedStep) -> tuple[str, ...]:
    """How tokens and their attention are split along `sequence`, where the mesh has that."""
    devices = 1 if step.placement is None else dict(step.placement.mesh.shape).get(SEQUENCE, 1)
    if devices == 1:
        return ()
    stages = len(step.stages) if isinstance(step, PipelinedStep) else 1
    sizes = sorted({bucket // num_parts(bucket, stages) for bucket in step.buckets})  # of the parts of a batch
    return (attention_over_sequence(tuple(sizes), devices),)


__all__ = ["notes_of", "servers_of"]
