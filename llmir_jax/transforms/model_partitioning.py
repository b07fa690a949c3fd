"""Says where each parameter lives on a mesh, by rules from its path.

    @main(%w: tensor<576x1536xf32> {llmir.path = "layers.0.mlp.up.kernel"}, …)
      →  mesh=tensor=3
    @main(%w: tensor<576x1536xf32> {llmir.path = "layers.0.mlp.up.kernel", llmir.sharding = [[], ["tensor"]]}, …)

A quantized matrix [outputs, inputs] is split as the parameter that it is of; its scales go with its integers, so that
inputs are split between groups only. A matrix that lies in its parameter in another way than kernels and tables do is
on every device, and so is what no rule matches. `sharding.rules` has the rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import AbstractMesh
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.ir import Attribute
from xdsl.passes import ModulePass

from llmir_jax.analysis.align import main_function
from llmir_jax.analysis.stored_matrix import StoredMatrix
from llmir_jax.dialects import llm
from llmir_jax.errors import LlmirError
from llmir_jax.transforms import signature
from llmir_jax.transforms.sharding_attributes import SHARDING, Spec, mesh_of, spec_from, split_of, to_attribute
from llmir_jax.transforms.weight_quantization import stored_matrices
from sharding.errors import ShardingError
from sharding.rules import DEFAULT_RULES, Rule, check_used, partition_spec


def _spec(path: str, shape: Sequence[int], mesh: AbstractMesh, rules: Sequence[Rule]) -> Spec:
    try:
        return spec_from(partition_spec(path, shape, mesh, rules), len(shape))
    except ShardingError as error:
        raise LlmirError(str(error)) from None


def _matrix_spec(path: str, matrix: StoredMatrix, mesh: AbstractMesh, rules: Sequence[Rule]) -> Spec:
    """Of a matrix [N, K] that is stored as a kernel [K, N] or as a table [N, K]."""
    n, k = matrix.shape
    if len(matrix.rows) != 1 or len(matrix.columns) != 1:
        return (), ()
    is_kernel = matrix.rows[0][1] == 1
    spec = _spec(path, (k, n) if is_kernel else (n, k), mesh, rules)
    return (spec[1], spec[0]) if is_kernel else (spec[0], spec[1])


def _quantized_spec(
    kind: llm.QuantizedTensorType, attributes: dict[str, Attribute], mesh: AbstractMesh, rules: Sequence[Rule]
) -> Spec:
    matrices = stored_matrices(attributes)
    specs = {_matrix_spec(path, matrix, mesh, rules) for path, matrix in matrices}
    if len(specs) != 1 or len(matrices) != 1:
        return (), ()  # rows of several parameters: a cut through all of them is none through each
    (spec,), (path, _) = specs, matrices[0]
    num_inputs, group = kind.get_shape()[1], kind.elements_per_group
    parts = split_of(spec, 1, mesh)
    if parts > 1 and group != num_inputs and (num_inputs // parts) % group:
        raise LlmirError(
            f"mesh: {path!r} has groups of {group} of its {num_inputs} inputs, but each of {parts} devices along "
            f"{' × '.join(spec[1])} has {num_inputs // parts}, no whole number of groups; "
            "quantize with groups that divide this, or with -channel"
        )
    return spec


@dataclass(frozen=True)
class ModelPartitioningPass(ModulePass):
    """Shardings of the parameters on a `mesh`, such as tensor=3,sequence=2."""

    name = "model-partitioning"

    mesh: str
    rules: tuple[Rule, ...] = DEFAULT_RULES

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        mesh, main = mesh_of(self.mesh), main_function(op)
        attributes = signature.argument_attributes(main)
        parameters = signature.parameter_paths(main)
        try:
            check_used(self.rules, [path for _, path in parameters])
        except ShardingError as error:
            raise LlmirError(str(error)) from None
        for arg, path in parameters:
            if isinstance(arg.type, llm.QuantizedTensorType):
                spec = _quantized_spec(arg.type, attributes[arg.index], mesh, self.rules)
            else:
                assert isinstance(arg.type, TensorType)
                spec = _spec(path, arg.type.get_shape(), mesh, self.rules)
            attributes[arg.index][SHARDING] = to_attribute(spec)
        signature.store_attributes(main, attributes)
