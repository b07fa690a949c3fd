"""Replaces every llm op by a call of its reference decomposition: StableHLO that runs on any backend.

    %y = llm.rms_norm %x, %w {epsilon = 1.0e-5 : f32} : (tensor<7x576xf32>, tensor<576xf32>) -> tensor<7x576xf32>
      →  %y = func.call @llm_rms_norm(%x, %w) : (tensor<7x576xf32>, tensor<576xf32>) -> tensor<7x576xf32>

One private function serves all ops of the same kind, properties and types. Values of a quantized or sharded type become
the tensors that hold them, arguments and results of functions too. ``llm.pipeline_recv`` takes the value of the
matching send of the same module. ``num_devices`` is how many devices run the program, for collectives whose groups are
smaller; without it a group is all of them. What reads or writes an abstract KV cache is for ``kv-cache-allocation``,
which runs before.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import jax
from xdsl.context import Context
from xdsl.dialects import func
from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, ModuleOp, TensorType, i32
from xdsl.ir import Attribute, Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo

from llmir_jax.dense import dtype_element_type, element_dtype
from llmir_jax.dialects import llm
from llmir_jax.dialects.llm.common import int_of
from llmir_jax.dialects.llm.distributed import PipelineRecvOp, PipelineSendOp, PipelineStageOp
from llmir_jax.dialects.parser import IRParser
from llmir_jax.errors import InvalidIRError
from llmir_jax.interop import LOC, lower_to_module, make_context
from llmir_jax.targets.collectives import PARTITION_ID, DistributedAttention, collective_function
from llmir_jax.targets.reference import Reference, accumulator, decomposition
from llmir_jax.transforms.inline_calls import inline_calls
from llmir_jax.transforms.sharding_attributes import inline_meshes

_CACHE_OPS = (llm.AppendKVOp, llm.LookupKVOp, llm.PagedAttentionOp)
_COLLECTIVES = (llm.AllGatherOp, llm.AllReduceOp, llm.ReduceScatterOp)


def _where(op: Operation) -> str:
    """The op's name, and its source location where it has one."""
    loc = op.attributes.get(LOC)
    return f"{op.name} at {loc.data}" if loc is not None and hasattr(loc, "data") else op.name


def _is_composite(type_: Attribute) -> bool:
    return isinstance(type_, llm.CompositeType)


def _part_types(types: Sequence[Attribute]) -> list[Attribute]:
    """The types, with the parts of a composite type in its place."""
    return [part for type_ in types for part in (type_.parts() if isinstance(type_, llm.CompositeType) else (type_,))]


def _shape_struct(op: Operation, type_: Attribute) -> jax.ShapeDtypeStruct:
    if not isinstance(type_, TensorType) or not type_.has_static_shape():
        raise InvalidIRError(f"{_where(op)}: expected operands of static shape to lower it, got {type_}")
    dtype = element_dtype(type_.element_type)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise InvalidIRError(f"{_where(op)}: expected types of at most 32 bits, got {type_}; jax_enable_x64 allows it")
    return jax.ShapeDtypeStruct(type_.get_shape(), dtype)


# -- pipelines ---------------------------------------------------------------------------------------------------------


def connect_stages(block: Block) -> None:
    """Give each receive the value of its send, and drop what marks stages.

    A send is of the stage of the last ``llm.pipeline_stage`` before it, a receive of that of the one that takes its
    result. Sends from one stage to another are received in order.

    Raises:
        InvalidIRError: a send or receive outside of any stage, a receive without an earlier send, or a send that
            nothing receives.
    """
    sent: dict[tuple[int, int], deque[PipelineSendOp]] = defaultdict(deque)
    stage: int | None = None
    for op in list(block.ops):
        if isinstance(op, PipelineStageOp):
            stage = int_of(op.stage_id)
            op.output.replace_all_uses_with(op.x)
            _erase(op)
        elif isinstance(op, PipelineSendOp):
            if stage is None:
                raise InvalidIRError(f"{_where(op)}: expected an llm.pipeline_stage before it, which says where it is")
            sent[stage, int_of(op.dest_stage)].append(op)
        elif isinstance(op, PipelineRecvOp):
            _receive(op, sent)
    for (source, dest), sends in sent.items():
        for send in sends:
            raise InvalidIRError(
                f"{_where(send)}: stage {dest} never receives what stage {source} sends; "
                "a module that holds one stage only cannot be lowered by itself"
            )


def _receive(op: PipelineRecvOp, sent: dict[tuple[int, int], deque[PipelineSendOp]]) -> None:
    source = int_of(op.source_stage)
    stages = [use.operation for use in op.output.uses if isinstance(use.operation, PipelineStageOp)]
    if len(stages) != 1:
        raise InvalidIRError(f"{_where(op)}: expected one llm.pipeline_stage to take its result, got {len(stages)}")
    dest = int_of(stages[0].stage_id)
    sends = sent[source, dest]
    if not sends:
        raise InvalidIRError(f"{_where(op)}: expected an earlier send from stage {source} to stage {dest}, got none")
    send = sends.popleft()
    if send.x.type != op.output.type:
        raise InvalidIRError(f"{_where(op)}: expected the type that was sent, {send.x.type}, got {op.output.type}")
    op.output.replace_all_uses_with(send.x)
    _erase(send)
    _erase(op)


def _erase(op: Operation) -> None:
    op.detach()
    op.erase()


# -- ops to calls ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Kernel:
    """A target's own function of an op's operands, or of the parts of composite ones."""

    function: Reference
    platform: str | None
    """What it is lowered for; None for the device that JAX uses."""


@dataclass(kw_only=True)
class Lowering:
    """One run of the pass over a module: the functions made so far, and the parts of composite values."""

    module: ModuleOp
    num_devices: int | None
    kernel: Callable[[Operation], Kernel | None] = lambda op: None
    """What the target has for an op, in place of its decomposition."""
    functions: dict[Hashable, func.FuncOp] = field(default_factory=dict)
    parts: dict[SSAValue, Sequence[SSAValue]] = field(default_factory=dict)
    part_types: dict[SSAValue, Sequence[Attribute]] = field(default_factory=dict)
    """Of arguments whose parts are others than their type says, for a kernel that wants them so."""
    lowered: list[Operation] = field(default_factory=list)
    """They go last: ops that are not lowered yet may still read their composite results."""

    def flat(self, values: Sequence[SSAValue]) -> list[SSAValue]:
        """The values, with the parts of composite ones in their place."""
        return [part for value in values for part in self.parts.get(value, (value,))]

    def expand_arguments(self, function: func.FuncOp) -> None:
        """Give the function one argument for each part of a composite argument, which `drop_arguments` removes."""
        block = function.body.block
        if not any(_is_composite(arg.type) and arg not in self.parts for arg in block.args):
            return
        no_attributes = [DictionaryAttr({})] * len(block.args)
        attributes = no_attributes if function.arg_attrs is None else function.arg_attrs.data
        kept: list[DictionaryAttr] = []
        for arg, entry in zip(list(block.args), attributes, strict=True):
            if not isinstance(arg.type, llm.CompositeType):
                kept.append(entry)
                continue
            types = self.part_types.get(arg, arg.type.parts())
            new = [block.insert_arg(type_, arg.index + 1 + i) for i, type_ in enumerate(types)]
            self.parts[arg] = new
            kept += [entry] * len(new)
        function.properties["arg_attrs"] = ArrayAttr(kept)

    def expand_results(self, function: func.FuncOp) -> None:
        """Return the parts of composite values."""
        last = function.body.block.last_op
        if not isinstance(last, func.ReturnOp) or not any(_is_composite(value.type) for value in last.operands):
            return
        last.operands = self.flat(last.operands)
        function.properties.pop("res_attrs", None)  # they were one for each value

    def drop_arguments(self, function: func.FuncOp) -> None:
        """Remove the composite arguments, whose uses are lowered, and set the function's type."""
        block = function.body.block
        for arg in [arg for arg in block.args if arg in self.parts]:
            self._check_unused(arg)
            block.erase_arg(arg)
        function.update_function_type()

    def lower(self, op: Operation) -> None:
        """Replace one op by calls."""
        if isinstance(op, _CACHE_OPS):
            raise InvalidIRError(
                f"{_where(op)}: the KV cache is not allocated yet; run the pass kv-cache-allocation before"
            )
        if isinstance(op, PipelineStageOp | PipelineSendOp | PipelineRecvOp):
            raise InvalidIRError(f"{_where(op)}: expected pipeline stages in the body of a function, not in a region")
        if isinstance(op, llm.CostAnnotationOp):
            _erase(op)
        elif isinstance(op, llm.DistributedAttentionOp):
            self._lower_distributed_attention(op)
        elif isinstance(op, _COLLECTIVES):
            self._replace(op, self._call_collective(op, op))
        else:
            kernel = self.kernel(op) or Kernel(decomposition(op), None)
            operands = self.flat(op.operands)
            result_types = _part_types(op.result_types)
            results = self.call(op, op.name, kernel.function, operands, result_types, kernel.platform)
            self._replace(op, results)

    def _replace(self, op: Operation, results: Sequence[SSAValue]) -> None:
        remaining = iter(results)
        for old in op.results:
            if isinstance(old.type, llm.CompositeType):
                self.parts[old] = [next(remaining) for _ in old.type.parts()]
                continue
            new = next(remaining)
            new.name_hint = old.name_hint
            old.replace_all_uses_with(new)
        self.lowered.append(op)

    def lower_custom_call(self, op: stablehlo.CustomCallOp) -> None:
        """Give a call the parts of its composite operands and results."""
        if not any(map(_is_composite, (*op.operand_types, *op.result_types))):
            return
        call = stablehlo.CustomCallOp.create(
            operands=self.flat(op.operands),
            result_types=_part_types(op.result_types),
            properties=op.properties,
            attributes=op.attributes,
        )
        block = op.parent_block()
        assert block is not None
        block.insert_op_before(call, op)
        self._replace(op, call.results)

    def finish(self) -> None:
        """Remove what was lowered; InvalidIRError if an op that is no llm op reads a composite value."""
        for op in reversed(self.lowered):
            for result in op.results:
                self._check_unused(result)
            _erase(op)

    @staticmethod
    def _check_unused(value: SSAValue) -> None:
        for use in value.uses:
            raise InvalidIRError(
                f"{_where(use.operation)}: expected a tensor, got {value.type}; only llm ops take such a value"
            )

    def call(
        self,
        op: Operation,
        name: str,
        reference: Reference,
        operands: Sequence[SSAValue],
        result_types: Sequence[Attribute],
        platform: str | None = None,
    ) -> Sequence[SSAValue]:
        """Call a JAX function on values, before ``op``, whose properties it depends on."""
        operand_types = tuple(value.type for value in operands)
        key = (name, frozenset(op.properties.items()), tuple(op.operand_types), operand_types, tuple(result_types))

        def make() -> func.FuncOp:
            function_of_all = jax.jit(reference, keep_unused=True)
            shapes = (_shape_struct(op, type_) for type_ in operand_types)
            traced = lower_to_module(function_of_all, *shapes, platform=platform)
            inline_calls(traced)
            inline_meshes(traced)
            for inner in traced.walk():
                inner.attributes.pop(LOC, None)  # a place in the decomposition; the call has the op's own
            (function,) = (inner for inner in traced.ops if isinstance(inner, func.FuncOp))
            got = function.function_type.outputs.data
            if tuple(got) != tuple(result_types):
                raise InvalidIRError(
                    f"{_where(op)}: expected results {', '.join(map(str, result_types))}, its decomposition gives "
                    f"{', '.join(map(str, got))}"
                )
            return function

        return self._call_function(op, key, name, make, operands, result_types)

    def _call_collective(
        self, op: llm.AllGatherOp | llm.AllReduceOp | llm.ReduceScatterOp, anchor: Operation
    ) -> Sequence[SSAValue]:
        text = collective_function(op, self.num_devices)
        return self._call_function(anchor, text, op.name, lambda: _parse(text), [op.x], op.result_types)

    def _call_function(
        self,
        anchor: Operation,
        key: Hashable,
        name: str,
        make: Callable[[], func.FuncOp],
        operands: Sequence[SSAValue],
        result_types: Sequence[Attribute],
    ) -> Sequence[SSAValue]:
        if key not in self.functions:
            self.functions[key] = self._add(make(), name.replace(".", "_"))
        call = func.CallOp(self.functions[key].sym_name.data, operands, result_types)
        if LOC in anchor.attributes:
            call.attributes[LOC] = anchor.attributes[LOC]
        block = anchor.parent_block()
        assert block is not None
        block.insert_op_before(call, anchor)
        return call.results

    def _add(self, function: func.FuncOp, stem: str) -> func.FuncOp:
        taken = {op.sym_name.data for op in self.module.ops if isinstance(op, func.FuncOp)}
        name, count = stem, 0
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        private = func.FuncOp(name, function.function_type, function.detach_region(function.body), "private")
        self.module.body.block.add_op(private)
        return private

    def _lower_distributed_attention(self, op: llm.DistributedAttentionOp) -> None:
        steps = DistributedAttention.of(op)
        cache, q_type = op.cache.type, op.q.type
        assert isinstance(cache, llm.ShardedKVCacheType)
        assert isinstance(q_type, TensorType)
        group_size = cache.num_shards.data
        partition = self._call_function(
            op, PARTITION_ID, "llm.partition_id", lambda: _parse(PARTITION_ID), [], [TensorType(i32, [])]
        )
        wide = dtype_element_type(accumulator(element_dtype(q_type.element_type)))
        num_rows, num_heads, head_dim = q_type.get_shape()
        sums_type, row_type = TensorType(wide, (num_rows, num_heads, head_dim)), TensorType(wide, (num_rows, num_heads))
        seq_len = [] if op.seq_len is None else [op.seq_len]
        operands = [op.q, *self.flat([op.cache]), *partition, *seq_len]
        sums, largest, total = self.call(
            op, f"{op.name}_partial", steps.partial, operands, [sums_type, row_type, row_type]
        )
        largest_of_all = self._reduce(op, largest, "max", group_size)
        sums, total = self.call(
            op, f"{op.name}_rescale", steps.rescale, [sums, total, largest, largest_of_all], [sums_type, row_type]
        )
        sums, total = (self._reduce(op, value, "sum", group_size) for value in (sums, total))
        self._replace(op, self.call(op, f"{op.name}_finish", steps.finish, [sums, total], op.result_types))

    def _reduce(self, anchor: Operation, value: SSAValue, reduction: str, group_size: int) -> SSAValue:
        reduce = llm.AllReduceOp(value, reduction=reduction, group_size=group_size)
        (result,) = self._call_collective(reduce, anchor)
        reduce.erase()
        return result


def _parse(text: str) -> func.FuncOp:
    (function,) = IRParser(make_context(), text).parse_module().ops
    assert isinstance(function, func.FuncOp)
    return function


@dataclass(frozen=True)
class LowerToReferencePass(ModulePass):
    """llm ops to calls of their reference decompositions."""

    name = "lower-to-reference"

    num_devices: int | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        lower_module(Lowering(module=op, num_devices=self.num_devices))


def lower_module(lowering: Lowering) -> None:
    """Lower every llm op of its module, in place."""
    functions = [inner for inner in lowering.module.ops if isinstance(inner, func.FuncOp) and inner.body.blocks]
    replaced = set(lowering.lowered)
    for function in functions:
        connect_stages(function.body.block)
        lowering.expand_arguments(function)
        for inner in list(function.body.walk()):
            if inner in replaced:
                continue
            if inner.dialect_name() == llm.LLM.name:
                lowering.lower(inner)
            elif isinstance(inner, stablehlo.CustomCallOp):
                lowering.lower_custom_call(inner)
        lowering.expand_results(function)
    lowering.finish()
    for function in functions:
        lowering.drop_arguments(function)
