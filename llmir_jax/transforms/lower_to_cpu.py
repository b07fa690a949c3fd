"""Replaces a step by calls of native code.

    @main(%w0, %w1, …, %pages, %tokens, …) { … }
      →
    @main(%weights: tensor<96000000xui8> {llmir.role = "weights"}, %pages, %tokens, …) {
      %logits, %new_pages, %scratch = stablehlo.custom_call @llmir_cpu_0123456789abcdef(%weights, %pages, %tokens, …)
          {api_version = 4, output_operand_aliases = [new_pages is pages]}
    }

Parameters lie in one array, where the pass's `arrangement` says. Page arrays are written in place. Operations that
`targets.cpu.support.unsupported_reason` names stay between the calls, as their reference decompositions, and so do the
parameters that they read; `targets.cpu.regions` says which operations are one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from xdsl.context import Context
from xdsl.dialects.builtin import (
    ArrayAttr,
    DictionaryAttr,
    IntegerAttr,
    IntegerType,
    ModuleOp,
    Signedness,
    StringAttr,
    i32,
    i64,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, BlockArgument, Operation, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo
from xdsl_jax.dialects.stablehlo.attributes import OutputOperandAlias

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects.build import tensor
from llmir_jax.disk_cache import DiskCache
from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.cpu.native import NativeStep, compile_step
from llmir_jax.targets.cpu.regions import Split, reads, split
from llmir_jax.targets.cpu.weights import Arrangement, Place, arrange
from llmir_jax.transforms import signature
from llmir_jax.transforms.lower_to_reference import LowerToReferencePass

WEIGHTS = "weights"
"""Role of the argument that holds the parameters of native code."""
_BYTE = IntegerType(8, Signedness.UNSIGNED)
_TYPED_FFI = 4


@dataclass(kw_only=True)
class _Lowering:
    """A step on its way from operations to calls, and operations between them."""

    found: Split
    arrangement: Arrangement
    block: Block
    weights: BlockArgument
    cache: DiskCache | None
    parameters: dict[SSAValue, int]
    """The numbers that the arrangement knows parameters by."""
    attributes: dict[SSAValue, dict[str, Attribute]]
    """Of the arguments of @main, such as their roles."""
    values: dict[SSAValue, SSAValue] = field(default_factory=dict)
    """What takes the place of the values that there were."""

    def outside(self, value: SSAValue) -> SSAValue:
        """A value between the calls."""
        if value in self.values:
            return self.values[value]
        op = value.owner
        if isinstance(op, Operation):
            self.keep(op)
            return self.values[value]
        argument = self.parameters.get(value)
        if argument is not None and argument not in self.arrangement.apart:
            raise InvalidIRError("lower-to-cpu: an operation that has no native code reads a parameter that is packed")
        return value

    def keep(self, op: Operation) -> None:
        """Leave an operation to XLA."""
        mapper = {value: self.outside(value) for value in reads(op)}
        copy = op.clone(value_mapper=mapper)
        self.block.add_op(copy)
        self.values.update(zip(op.results, copy.results, strict=True))

    def call(self, ops: Sequence[Operation], outputs: Sequence[SSAValue]) -> NativeStep:
        """Compile a region, and call it."""
        region = Block()
        inner: dict[SSAValue, SSAValue] = {}
        operands: list[SSAValue] = []
        own = []
        members = set(ops)
        places: dict[int | None, Place] = {place.argument: place for place in self.arrangement.places}

        def inside(value: SSAValue) -> SSAValue:
            if value in inner:
                return inner[value]
            op = value.owner
            if isinstance(op, Operation) and (op in members or op not in self.found.levels):
                copy(op)
                return inner[value]
            arg = region.insert_arg(value.type, len(region.args))
            inner[value] = arg
            place = places.get(self.parameters.get(value))
            if place is None:
                operands.append(self.outside(value))
            else:
                own.append(replace(place, argument=arg.index))
            return arg

        def copy(op: Operation) -> None:
            mapper = {value: inside(value) for value in reads(op)}
            clone = op.clone(value_mapper=mapper)
            region.add_op(clone)
            inner.update(zip(op.results, clone.results, strict=True))

        for op in ops:
            copy(op)
        region.add_op(ReturnOp(*map(inside, outputs)))
        kinds = ([arg.type for arg in region.args], [value.type for value in outputs])
        function = FuncOp("region", kinds, Region(region))
        sources = {arg: value for value, arg in inner.items() if isinstance(arg, BlockArgument)}
        signature.store_attributes(function, [self.attributes.get(sources[arg], {}) for arg in region.args])
        native = compile_step(function, Arrangement(places=tuple(own)), self.cache)
        aliases = [
            OutputOperandAlias(_indices([number]), IntegerAttr(operand, i64), _indices([]))
            for number, operand in native.pages.items()
        ]
        call = stablehlo.CustomCallOp.create(
            operands=[self.weights, *operands],
            result_types=[*kinds[1], tensor((native.scratch_bytes,), _BYTE)],
            properties={
                "call_target_name": StringAttr(native.target),
                "api_version": IntegerAttr(_TYPED_FFI, i32),
                "backend_config": DictionaryAttr({}),
                "called_computations": ArrayAttr([]),
                "output_operand_aliases": ArrayAttr(aliases),
            },
        )
        self.block.add_op(call)
        self.values.update(zip(outputs, call.results[:-1], strict=True))
        return native


def lower_to_cpu(module: ModuleOp, arrangement: Arrangement, cache: DiskCache | None = None) -> list[NativeStep]:
    """Lower @main, in place: what it calls. Object files are kept in the cache."""
    main = main_function(module)
    block = main.body.block
    found = split(main)
    outputs = found.outputs(main)
    attributes = signature.argument_attributes(main)
    parameters: dict[SSAValue, int] = {arg: arg.index for arg, _ in signature.parameter_paths(main)}
    removed = [arg for arg, _ in signature.parameter_paths(main) if arg.index not in arrangement.apart]
    kept = [entry for arg, entry in zip(block.args, attributes, strict=True) if arg not in removed]
    old = list(block.ops)
    by_argument: dict[SSAValue, dict[str, Attribute]] = dict(zip(block.args, attributes, strict=True))
    lowering = _Lowering(
        found=found,
        arrangement=arrangement,
        block=block,
        weights=block.insert_arg(tensor((arrangement.nbytes,), _BYTE), 0),
        cache=cache,
        parameters=parameters,
        attributes=by_argument,
    )
    steps = []
    for level, values in outputs.items():
        ops = [op for op in old if found.levels.get(op) == level]
        if level % 2 == 0:
            steps.append(lowering.call(ops, values))
            continue
        for op in ops:
            lowering.keep(op)
    last = old[-1]
    block.add_op(ReturnOp(*map(lowering.outside, last.operands)))
    for op in reversed(old):
        op.detach()
        op.erase(safe_erase=False)
    for arg in removed:
        block.erase_arg(arg)
    signature.store(main, [{signature.ROLE: StringAttr(WEIGHTS)}, *kept])
    return steps


def _indices(values: list[int]) -> ArrayAttr[IntegerAttr]:
    return ArrayAttr([IntegerAttr(value, i64) for value in values])


@dataclass(frozen=True)
class LowerToCpuPass(ModulePass):
    """A step to native calls, and operations that XLA compiles between them."""

    name = "lower-to-cpu"

    arrangement: Arrangement | None = None
    cache: DiskCache | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        arrangement = arrange(main_function(op)) if self.arrangement is None else self.arrangement
        lower_to_cpu(op, arrangement, self.cache)
        LowerToReferencePass().apply(ctx, op)


__all__ = ["WEIGHTS", "LowerToCpuPass", "lower_to_cpu"]
