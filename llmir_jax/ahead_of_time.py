"""A step that is derived, partitioned and compiled for devices that are not there: libtpu compiles for any TPU slice.

Needs the extra ``tpu-aot``, and the environment that `libtpu_environment.prepare` sets before JAX is imported.
"""

import importlib.util
from typing import Any

import jax
from jax.sharding import Mesh

from llmir_jax.analysis.align import main_function
from llmir_jax.dense import element_dtype
from llmir_jax.derive import Derived
from llmir_jax.errors import LlmirError
from llmir_jax.interop import call_executable, executable
from llmir_jax.pipeline import Recorder, for_attention, specialize_step
from llmir_jax.placement import Placement
from llmir_jax.planning import NUM_DERIVED, ModelPlan
from llmir_jax.transforms import signature
from llmir_jax.transforms.kv_cache_sharding import KVCacheShardingPass
from llmir_jax.transforms.memory_planning import parts_of
from llmir_jax.transforms.model_partitioning import ModelPartitioningPass
from llmir_jax.transforms.sharding_attributes import Spec, of_argument
from sharding.compiled import CompiledProgram
from sharding.cost import Layout
from sharding.mesh import make_mesh
from sharding.topologies import Topology


def unavailable_reason(topology: Topology, layout: Layout) -> str | None:
    """Why a step cannot be compiled for a slice here; None if it can."""
    if topology.chip.platform != "tpu":
        return "XLA compiles for GPUs only where there is one"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'llmir-jax[tpu-aot]'"
    if layout.data > 1 or layout.pipeline > 1:
        return f"{layout} is one program for each copy and each stage"
    return None


def compile_layers(model: ModelPlan, topology: Topology, layout: Layout) -> CompiledProgram:
    """The model's decoding step, from that of two layers and that of three. Raises LlmirError, see `compile_step`."""
    mesh, num_all = mesh_for(topology, layout), model.config.num_layers

    def compiled(num_layers: int) -> CompiledProgram:
        derived = model.derive(num_layers, model.context)
        return compile_step(derived, mesh, tokens=model.batch)

    if not model.is_uniform or num_all <= NUM_DERIVED:
        return compiled(num_all)
    return compiled(NUM_DERIVED).with_layers(num_all, of=NUM_DERIVED, next_layer=compiled(NUM_DERIVED + 1))


def mesh_for(topology: Topology, layout: Layout) -> Mesh:
    """A mesh of a slice's devices. Raises LlmirError where libtpu does not know the slice."""
    from jax.experimental import topologies

    try:
        found: Any = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:  # whatever libtpu raises
        raise LlmirError(f"topology: libtpu does not have {topology.name}: {str(error).splitlines()[0]}") from None
    return make_mesh(layout.axes, devices=found.devices)


def compile_step(derived: Derived, mesh: Mesh, *, tokens: int) -> CompiledProgram:
    """The step for so many rows of tokens, on a mesh. `derived` is on one device, and is left as it is.

    Raises LlmirError for a mesh that the step cannot be on.
    """
    placement = for_attention(derived.module, Placement.of(mesh))
    recorder = Recorder()
    module = recorder.run(
        derived.module.clone(),
        ModelPartitioningPass(mesh=placement.text, rules=placement.rules),
        KVCacheShardingPass(mesh=placement.text),
    )
    partitioned = Derived(module, derived.length, derived.max_seqs, derived.max_seq_len, placement=placement)
    lowered = specialize_step(partitioned, tokens, recorder)
    main = main_function(module)
    called = executable(lowered)
    shapes, donated = _arguments(main, placement, called.inputs)

    def step(*args: jax.Array) -> Any:
        logits, *pages = call_executable(called, *args)
        return placement.constrain(logits), pages

    compiled = jax.jit(step, donate_argnums=donated).lower(*shapes).compile()
    return CompiledProgram.of(compiled)


def _arguments(main: Any, placement: Placement, inputs: Any) -> tuple[list[jax.ShapeDtypeStruct], tuple[int, ...]]:
    """Shapes of the step's arrays with where they live, and the numbers of those of pages."""
    shapes: list[jax.ShapeDtypeStruct] = []
    donated: list[int] = []
    for arg, attributes in zip(main.body.block.args, signature.argument_attributes(main), strict=True):
        spec = of_argument(attributes)
        if spec is None:  # a step input: whole everywhere; of the lowered step's size
            given = inputs[len(shapes)]
            shapes.append(jax.ShapeDtypeStruct(given.shape, given.dtype, sharding=placement.sharding()))
            continue
        for part, own in parts_of(arg.type, spec):
            if signature.role_of(attributes) in ("k_pages", "v_pages"):
                donated.append(len(shapes))
            shapes.append(_abstract(part.get_shape(), element_dtype(part.element_type), placement, own))
    return shapes, tuple(donated)


def _abstract(shape: tuple[int, ...], dtype: Any, placement: Placement, spec: Spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(spec))


__all__ = ["compile_layers", "compile_step", "mesh_for", "unavailable_reason"]
