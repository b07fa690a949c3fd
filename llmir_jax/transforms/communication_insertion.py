"""Says where values live between the operations of a partitioned step, and so where devices must talk.

    %y = llm.linear %x, %w                                 %w split by rows: each device has a part of the sum
      →
    %0 = llm.linear %x, %w
    %y = "sdy.sharding_constraint"(%0) {sharding = … [{}, {}]}      whole on every device: one all-reduce

Queries, keys, values and what attention gives are split by heads. What a matrix that is split along its inputs gives,
and rows of a table that is split along the vocabulary, are made whole again: these are the all-reduces of tensor
parallelism, one for attention and one for the MLP of each layer. What a matrix gives that is whole on every device is
whole too, such as what the router of a mixture of experts gives. After ``ring-attention`` all of these are split by
tokens too, from the table's rows to those of logits. All else follows from these and from where parameters and the
cache live, and is left to Shardy (https://openxla.org/shardy). Runs after ``model-partitioning``,
``kv-cache-sharding`` and ``ring-attention``, on the step for a number of tokens, right before it is lowered.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.ir import BlockArgument, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, shape_of
from llmir_jax.dialects.llm.common import bool_of
from llmir_jax.transforms import signature
from llmir_jax.transforms.sharding_attributes import Spec, constrain, has, mesh_of, of_argument
from sharding.mesh import SEQUENCE, TENSOR, TENSOR_COPIES

_VIEWS = (stablehlo.ConvertOp, stablehlo.TransposeOp)


@dataclass(frozen=True, kw_only=True)
class _Insertion:
    """One run of the pass."""

    mesh: AbstractMesh
    shardings: dict[SSAValue, Spec]
    tokens: int | None
    """Of the step, where they are split along `sequence` and go round its ring."""

    def of_weight(self, value: SSAValue) -> Spec | None:
        """Where a parameter lives that is read here, through conversions and transposes."""
        if isinstance(value, BlockArgument):
            return self.shardings.get(value)
        op = value.owner
        if not isinstance(op, _VIEWS):
            return None
        spec = self.of_weight(op.operands[0])
        if spec is None or isinstance(op, stablehlo.ConvertOp):
            return spec
        return tuple(spec[d] for d in op.permutation.get_values())

    def rows(self, value: SSAValue) -> Spec:
        """Of a value that is whole on every device, or, where tokens go round a ring, whose tokens are split."""
        shape = shape_of(value)
        first = next((dim for dim, size in enumerate(shape) if size > 1), None)
        is_split = self.tokens is not None and first is not None and shape[first] == self.tokens
        return tuple((SEQUENCE,) if is_split and dim == first else () for dim in range(len(shape)))

    def result(self, op: Operation) -> Spec | None:
        """Where the only result of an operation must live, if that is to be said."""
        if isinstance(op, llm.AttendPagesOp):
            return self.rows(op.output)[0], has(self.mesh, (TENSOR, TENSOR_COPIES)), ()
        weight: SSAValue | None = None
        axis = 0
        if isinstance(op, llm.LinearOp | llm.QuantizedMatmulOp):
            weight, axis = op.w, 1 if bool_of(op.transpose_w) else 0
        elif isinstance(op, llm.GatedMLPOp):
            weight, axis = op.down_w, 1 if bool_of(op.transpose_down) else 0
        elif isinstance(op, llm.QuantizedGatherOp):
            weight = op.w
        elif isinstance(op, stablehlo.GatherOp):
            weight = op.operand
        spec = None if weight is None else self.of_weight(weight)
        if self.tokens is not None and isinstance(op, stablehlo.GatherOp) and spec is None:
            return self.rows(op.results[0])  # rows of logits, of the tokens of all devices
        if spec is None or (any(spec) and not spec[axis]):
            return None
        return self.rows(op.results[0])

    def operands(self, op: Operation) -> dict[int, Spec]:
        """Where operands must live, by their number."""
        if isinstance(op, llm.AttendPagesOp):
            return {0: (self.rows(op.q)[0], has(self.mesh, (TENSOR, TENSOR_COPIES)), ())}
        if isinstance(op, llm.WritePagesOp):
            return dict.fromkeys((2, 3), (self.rows(op.k)[0], has(self.mesh, (TENSOR,)), ()))
        return {}

    def insert(self, op: Operation) -> None:
        for number, own in self.operands(op).items():
            op.operands[number] = constrain(OpBuilder(op), op.operands[number], own, self.mesh)
        spec = self.result(op)
        if spec is None:
            return
        after = op.next_op
        assert after is not None, "the last operation is a return"
        value = op.results[0]
        constrained = constrain(OpBuilder(after), value, spec, self.mesh)
        value.replace_uses_with_if(constrained, lambda use: use.operation is not constrained.owner)


@dataclass(frozen=True)
class CommunicationInsertionPass(ModulePass):
    """Constraints on where values live on a `mesh`, such as tensor=3,sequence=2."""

    name = "communication-insertion"

    mesh: str

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = main_function(op)
        attributes = signature.argument_attributes(main)
        pairs = ((arg, of_argument(attributes[arg.index])) for arg in main.body.block.args)
        rings = [inner for inner in main.body.walk() if isinstance(inner, llm.AttendPagesOp) and inner.ring is not None]
        insertion = _Insertion(
            mesh=mesh_of(self.mesh),
            shardings={arg: spec for arg, spec in pairs if spec is not None},
            tokens=shape_of(rings[0].q)[0] if rings else None,
        )
        for inner in list(main.body.block.ops):
            if all(isinstance(kind, TensorType | llm.QuantizedTensorType) for kind in inner.result_types):
                insertion.insert(inner)
