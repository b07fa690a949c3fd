"""`mesh="auto"`: the step is derived once without a mesh, its cost counted, and the best layout of the devices taken.

Copies of the model (`data`) are not among the layouts: each would serve as many sequences again, which is for the user
to ask for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.cost import step_cost
from llmir_jax.calibrate import Planner
from llmir_jax.derive import Derived
from llmir_jax.errors import LlmirError
from llmir_jax.pipeline import Recorder, derive_step
from llmir_jax.placement import Placement
from llmir_jax.quantization import MixedPrecision, Quantize
from llmir_jax.step import cache_groups_of
from llmir_jax.trace import Traced, flatten_model, trace
from llmir_jax.transforms import signature
from llmir_jax.transforms.memory_planning import stored_bytes
from llmir_jax.weights import ModelWeights
from sharding.choice import choose
from sharding.cost import CostModel, Workload
from sharding.errors import ShardingError
from sharding.mesh import PIPELINE, SEQUENCE, TENSOR
from sharding.rules import parse_rules
from sharding.step_cost import StepCost
from sharding.topologies import Topology, topology_of

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ChosenMesh:
    """Axes of a mesh, and why these."""

    axes: dict[str, int] | None
    """None for one device."""
    why: str


def choose_mesh(
    derive: Callable[[Placement], Derived],
    *,
    max_seqs: int,
    context: int,
    rules: Any = None,
    devices: Sequence[jax.Device] | None = None,
    topology: Topology | None = None,
) -> ChosenMesh:
    """The best layout of the devices, of all processes, for `max_seqs` sequences of `context` tokens that decode.

    Args:
        derive: the step on one device.
        devices: None for all that JAX has.
        topology: what they are; None for what they say.

    Raises:
        LlmirError: devices whose figures are not known; a model that suits no layout of them, or fits in none.
    """
    found = list(jax.devices() if devices is None else devices)
    if len(found) == 1:
        return ChosenMesh(axes=None, why="there is one device")
    try:
        where = topology_of(found) if topology is None else topology
        model = CostModel(cost_of(derive(one_device()), max_seqs), where, rules=parse_rules(rules))
        choice = choose(model, Workload(batch=max_seqs, context=context), axes=(PIPELINE, SEQUENCE, TENSOR))
    except ShardingError as error:
        raise LlmirError(str(error)) from None
    return ChosenMesh(axes=choice.best.layout.axes, why=f"on {where.name} {choice.why}")


def derive_from_shapes(
    forward: Callable[[Any, jax.Array], jax.Array],
    model: Any,
    quantize: Quantize,
    max_seq_len: int | None,
    placement: Placement,
    *,
    max_seqs: int,
    page_size: int,
    num_pages: int,
    kv_cache: str | None,
) -> Derived:
    """The step on one device, whether it fits there or not, from shapes alone, for its cost.

    Raises LlmirError for mixed precision, and for weights that cannot be quantized as asked.
    """
    if isinstance(quantize, MixedPrecision):
        raise LlmirError(
            "quantize: mixed precision depends on the weights, which are not read for a step's cost: give a scheme or "
            "rules, or in place of mesh='auto' its axes"
        )
    arrays, tree = flatten_model(model)
    shapes = ModelWeights(tree.paths, arrays)  # no value is asked for

    def trace_at(length: int) -> Traced:
        return trace(forward, model, jax.ShapeDtypeStruct((1, length), jnp.int32), fold=False)

    planner = Planner(quantize, shapes, trace_at=trace_at, target="reference")
    return derive_step(
        trace_at,
        None,
        max_seqs=max_seqs,
        max_seq_len=min(max_seq_len or num_pages * page_size, num_pages * page_size),
        page_size=page_size,
        num_pages=num_pages,
        recorder=Recorder(),
        plan_weights=None if quantize is None else planner.plan,
        kv_cache=kv_cache,
        target="tpu",
        placement=placement,
    )


def cost_of(derived: Derived, max_seqs: int) -> StepCost:
    """Of a step that is derived for one device, from its shapes."""
    main = main_function(derived.module)
    sizes = [stored_bytes(arg.type) for arg, _ in signature.parameter_paths(main)]
    return step_cost(derived.module, sizes, cache_groups_of(main), max_seqs=max_seqs)


def one_device() -> Placement:
    """What a step that is to be partitioned is derived for: its matrices stay apart."""
    mesh = Mesh(np.array(jax.devices()[:1]), (TENSOR,), axis_types=(AxisType.Auto,))
    return Placement.of(mesh)


__all__ = ["AUTO", "ChosenMesh", "choose_mesh", "cost_of", "derive_from_shapes", "one_device"]
