"""Replaces a whole step by a call of native code.

    @main(%w0, %w1, …, %pages, %tokens, …) { … }
      →
    @main(%weights: tensor<96000000xui8> {llmir.role = "weights"}, %pages, %tokens, …) {
      %logits, %new_pages, %scratch = stablehlo.custom_call @llmir_cpu_0123456789abcdef(%weights, %pages, %tokens, …)
          {api_version = 4, output_operand_aliases = [new_pages is pages]}
    }

Parameters lie in one array, where the pass's `arrangement` says. Page arrays are written in place. A step with an
operation that `targets.cpu.plan.unsupported_reason` names is not lowered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
)
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Attribute
from xdsl.passes import ModulePass
from xdsl_jax.dialects import stablehlo
from xdsl_jax.dialects.stablehlo.attributes import OutputOperandAlias

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import tensor
from llmir_jax.disk_cache import DiskCache
from llmir_jax.errors import InvalidIRError
from llmir_jax.targets.cpu.native import NativeStep, compile_step
from llmir_jax.targets.cpu.plan import reasons
from llmir_jax.targets.cpu.weights import Arrangement, arrange
from llmir_jax.transforms import signature

WEIGHTS = "weights"
"""Role of the argument that holds all parameters."""
_BYTE = IntegerType(8, Signedness.UNSIGNED)
_TYPED_FFI = 4


def lower_to_cpu(module: ModuleOp, arrangement: Arrangement, cache: DiskCache | None = None) -> NativeStep:
    """Lower @main, in place, with object files in the cache. InvalidIRError for what has no native code."""
    main = main_function(module)
    if found := reasons(main):
        raise InvalidIRError(f"lower-to-cpu: {found[0]}")
    native = compile_step(main, arrangement, cache)
    block = main.body.block
    attributes = signature.argument_attributes(main)
    last = block.last_op
    assert last is not None
    results = list(last.operands)
    types = _part_types([value.type for value in results])
    parameters = {place.argument for place in arrangement.places}
    others = [arg for arg in block.args if arg.index not in parameters]
    entries = [attributes[arg.index] for arg in others for _ in _part_types([arg.type])]
    kinds = _part_types([arg.type for arg in others])
    for op in reversed(list(block.ops)):
        op.detach()
        op.erase(safe_erase=False)
    for arg in list(block.args):
        block.erase_arg(arg)
    operands = [block.insert_arg(kind, number) for number, kind in enumerate(kinds)]
    weights = block.insert_arg(tensor((arrangement.nbytes,), _BYTE), 0)
    aliases = [
        OutputOperandAlias(_indices([number]), IntegerAttr(operand, _i64()), _indices([]))
        for number, operand in native.pages.items()
    ]
    call = stablehlo.CustomCallOp.create(
        operands=[weights, *operands],
        result_types=[*types, tensor((native.scratch_bytes,), _BYTE)],
        properties={
            "call_target_name": StringAttr(native.target),
            "api_version": IntegerAttr(_TYPED_FFI, i32),
            "backend_config": DictionaryAttr({}),
            "called_computations": ArrayAttr([]),
            "output_operand_aliases": ArrayAttr(aliases),
        },
    )
    block.add_ops([call, ReturnOp(*call.results[:-1])])
    signature.store(main, [{signature.ROLE: StringAttr(WEIGHTS)}, *entries])
    return native


def _part_types(types: Sequence[Attribute]) -> list[Attribute]:
    """The types, with the parts of a composite type in its place."""
    return [part for kind in types for part in (kind.parts() if isinstance(kind, llm.CompositeType) else (kind,))]


def _i64() -> IntegerType:
    return IntegerType(64)


def _indices(values: list[int]) -> ArrayAttr[IntegerAttr]:
    return ArrayAttr([IntegerAttr(value, _i64()) for value in values])


@dataclass(frozen=True)
class LowerToCpuPass(ModulePass):
    """A step to one native call."""

    name = "lower-to-cpu"

    arrangement: Arrangement | None = None
    cache: DiskCache | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        arrangement = arrange(main_function(op)) if self.arrangement is None else self.arrangement
        lower_to_cpu(op, arrangement, self.cache)


__all__ = ["WEIGHTS", "LowerToCpuPass", "lower_to_cpu"]
