"""Observers: @main returns what calibration wants to know of the inputs of its weights, in place of the logits.

    %y = llm.linear %x, %w : (tensor<1x512x576xf32>, tensor<576x192xf32>) -> tensor<1x512x192xf32>
      →  statistics="gram"
    %g = llm.observe %x {statistic = "gram"} : (tensor<1x512x576xf32>) -> tensor<576x576xf32>
    return %g                                              its `llmir.path` is "layers.0.attn.q.kernel"

It runs on a plain forward before ``weight-quantization``, and observes the inputs of what that pass can quantize.
Weights with the same input share a result, whose `llmir.path` has all of them, joined by "+". What only the logits need
is dead then, and goes. Tables of which rows are looked up have no inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, ModuleOp, StringAttr, f32, i32
from xdsl.ir import Attribute, SSAValue
from xdsl.passes import ModulePass
from xdsl.transforms.common_subexpression_elimination import cse
from xdsl.transforms.dead_code_elimination import dce

from llmir_jax.analysis.align import main_function
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import OpBuilder, shape_of, tensor
from llmir_jax.errors import InvalidIRError
from llmir_jax.quantization import MatrixKey
from llmir_jax.quantization.statistics import NUM_BINS
from llmir_jax.transforms import signature
from llmir_jax.transforms.weight_quantization import Weights, WeightUse, find_weights


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One result of @main: a statistic of the input that these matrices share."""

    statistic: str
    matrices: tuple[MatrixKey, ...]


def observe_inputs(module: ModuleOp, weights: Weights, wanted: Mapping[str, Sequence[str]]) -> list[Observation]:
    """Make @main return the statistics that are `wanted` for each path, in place; returns what each result is."""
    main = main_function(module)
    keys: list[tuple[str, MatrixKey]] = []
    values: list[SSAValue] = []
    for path, statistics in wanted.items():
        for use in weights.uses[path]:
            observed = _observe(use, statistics)
            values += observed
            keys += [(statistic, (path, use.matrix.offset)) for statistic in statistics[: len(observed)]]
    signature.set_results(main, values)
    cse(module)  # the observers of what has the same input become one
    found: dict[SSAValue, list[tuple[str, MatrixKey]]] = {}
    for key, value in zip(keys, signature.results(main), strict=True):
        found.setdefault(value, []).append(key)
    signature.set_results(main, found)
    observations = [
        Observation(statistic=pairs[0][0], matrices=tuple(dict.fromkeys(key for _, key in pairs)))
        for pairs in found.values()
    ]
    names = ["+".join(dict.fromkeys(path for path, _ in each.matrices)) for each in observations]
    main.properties["res_attrs"] = ArrayAttr([DictionaryAttr({signature.PATH: StringAttr(name)}) for name in names])
    dce(module)
    return observations


def _observe(use: WeightUse, statistics: Sequence[str]) -> list[SSAValue]:
    """Observers of what a matrix is multiplied with; none where it is not."""
    if use.inputs is None:
        return []
    builder = OpBuilder(use.op)
    x = use.inputs(builder)
    return [
        builder.insert(llm.ObserveOp(x, statistic, result_type=_result_type(statistic, shape_of(x)[-1]))).results[0]
        for statistic in statistics
    ]


def _result_type(statistic: str, num_channels: int) -> Attribute:
    if statistic == "absmax":
        return tensor([num_channels], f32)
    if statistic == "gram":
        return tensor([num_channels, num_channels], f32)
    return tensor([num_channels, NUM_BINS], i32)


@dataclass(frozen=True)
class QuantizationCalibrationPass(ModulePass):
    """Observers of the inputs of all weights, for these `statistics`, separated by commas."""

    name = "quantization-calibration"

    statistics: str = "absmax"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        statistics = [statistic.strip() for statistic in self.statistics.split(",")]
        for statistic in statistics:
            if statistic not in llm.OBSERVED:
                expected = ", ".join(llm.OBSERVED)
                raise InvalidIRError(f"quantization-calibration: unknown statistic {statistic!r}; expected {expected}")
        weights = find_weights(op)
        observe_inputs(op, weights, dict.fromkeys(weights.uses, statistics))


__all__ = ["Observation", "QuantizationCalibrationPass", "observe_inputs"]
