"""Plans how weights are quantized, and for a calibration runs its text through the forward to find out how.

The forward is traced at the length of a window of text; ``quantization-calibration`` puts observers on the inputs of
its weights; the module is run on every window, with the weights as floats; and what the observers saw decides how
weights are rounded and which scales activations get. Automated mixed precision measures on the first window what it
costs to round some of the weights: all the model's floats are in memory meanwhile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from llmir_jax.analysis.align import main_function
from llmir_jax.derive import TraceAt, prepare
from llmir_jax.dialects import llm
from llmir_jax.dialects.build import shape_of
from llmir_jax.dialects.llm import OBSERVED
from llmir_jax.errors import LlmirError
from llmir_jax.interop import call_module, make_context
from llmir_jax.quantization import (
    Calibration,
    InputStatistics,
    MatrixKey,
    MixedPrecision,
    Plan,
    Quantize,
    QuantizedArray,
    Rounding,
    Scheme,
    activation_scales,
    check_ids,
    make_plan,
    mixed_precision_plan,
    plain_rounding,
    quantize_calibrated,
    weight_rounding,
)
from llmir_jax.transforms import signature
from llmir_jax.transforms.lower_to_reference import LowerToReferencePass
from llmir_jax.transforms.quantization_calibration import Observation, observe_inputs
from llmir_jax.transforms.raise_linear import RaiseLinearPass
from llmir_jax.transforms.weight_quantization import Weights, find_weights
from llmir_jax.weights import WeightSource, read_matrix

Encode = Callable[[str], Sequence[int]]
"""A tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What was seen of the inputs of each matrix, and what is made of it."""

    calibration: Calibration
    statistics: Mapping[MatrixKey, InputStatistics]

    def round(self, array: ArrayLike, scheme: Scheme, key: MatrixKey, dtype: DTypeLike | None) -> QuantizedArray:
        """A matrix [N, K] of floats in a scheme: a `Rounding`."""
        return quantize_calibrated(
            array, scheme, statistics=self.statistics.get(key), calibration=self.calibration, name=key[0], dtype=dtype
        )

    def scales(self, plan: Plan) -> dict[MatrixKey, np.ndarray]:
        """Static scales of activations, where the plan's schemes want some."""
        return {
            key: activation_scales(
                statistics,
                plan.schemes[key[0]].fitted((1, len(statistics.absmax)), name=key[0]).activation_group_size,
                self.calibration,
                name=key[0],
            )
            for key, statistics in self.statistics.items()
            if plan.schemes[key[0]].static_activations
        }


class Calibrator:
    """A forward, and the windows of text to run through it."""

    def __init__(
        self,
        trace_at: TraceAt,
        source: WeightSource,
        calibration: Calibration,
        *,
        encode: Encode | None,
        max_seq_len: int,
    ) -> None:
        """Raises LlmirError for text that gives no tokens, see `Calibration.windows`."""
        calibration = replace(calibration, window=min(calibration.window, max_seq_len))
        self._windows = calibration.windows(encode)
        traced = trace_at(self._windows.shape[1])
        check_ids(self._windows, vocab_size=jax.tree.leaves(traced.result)[0].shape[-1])
        self.calibration = calibration
        self._source = source
        self._parameters = [parameter.path for parameter in traced.params]
        self._forward = traced.flat_fn
        self._module = prepare(traced.module.clone())
        RaiseLinearPass().apply(make_context(), self._module)
        self.weights: Weights = find_weights(self._module)
        self._matrices = self.weights.matrices

    @cached_property
    def _values(self) -> list[jax.Array]:
        """Of all parameters, in the order of the forward's arguments."""
        return [self._source.read(path) for path in self._parameters]

    # Observing

    def observe(self, schemes: Mapping[str, Sequence[Scheme]]) -> Calibrated:
        """Run all windows, and keep what is needed to round each weight, by path, to any of its schemes."""
        wanted = {
            path: [name for name in OBSERVED if any(name in self._statistics(scheme, path) for scheme in schemes[path])]
            for path in self.weights.uses
            if path in schemes
        }
        module = self._module.clone()
        weights = find_weights(module)
        observations = observe_inputs(module, weights, {path: names for path, names in wanted.items() if names})
        if not observations:
            return Calibrated(calibration=self.calibration, statistics={})
        rows = [_num_rows(value.owner) for value in signature.results(main_function(module))]
        LowerToReferencePass().apply(make_context(), module)

        @jax.jit
        def run(values: list[jax.Array], tokens: jax.Array) -> list[jax.Array]:
            return call_module(module, *values, tokens)

        totals: list[np.ndarray] | None = None
        for tokens in self._windows:
            seen = [np.array(x) for x in run(self._values, tokens[None])]
            totals = seen if totals is None else list(map(_add, observations, totals, seen))
        assert totals is not None
        counts = [n * len(self._windows) for n in rows]
        return Calibrated(calibration=self.calibration, statistics=_by_matrix(observations, totals, counts))

    def notes(self, plan: Plan, calibrated: Calibrated) -> list[str]:
        """What calibration did, for the report."""
        about = f"calibrated on {self._windows.size:,} tokens"
        rounded = [path for path, scheme in plan.schemes.items() if not self._is_stored(scheme, path)]
        notes = [f"{about}: {len(rounded)} weights rounded by {self.calibration.weights}"]
        if kept := len(plan.schemes) - len(rounded):
            notes[0] += f", {kept} kept as the checkpoint has them"
        seen = {path for path, _ in calibrated.statistics}
        method, why = weight_rounding(None, self.calibration)
        notes += [f"{path}: rounded by {method}: {why}" for path in rounded if why is not None and path not in seen]
        if any(scheme.static_activations for scheme in plan.schemes.values()):
            notes.append(f"{about}: static scales of activations by {self.calibration.activations}")
        return notes

    def _statistics(self, scheme: Scheme, path: str) -> set[str]:
        """What must be seen of a weight's inputs: nothing if it stays as it is stored and activations are dynamic."""
        names = {"histogram"} if scheme.static_activations else set()
        if not self._is_stored(scheme, path):
            names |= {"gptq": {"gram"}, "mse": {"histogram"}}.get(self.calibration.weights, set())
        return names | {"absmax"} if names else names

    def _is_stored(self, scheme: Scheme, path: str) -> bool:
        stored, shape = self._source.stored.get(path), self._matrices[path]
        return stored is not None and stored.same_storage(scheme, shape)

    # Measuring

    def divergence(self, paths: Sequence[str], scheme: Scheme, rounding: Rounding) -> float:
        """KL(floats ‖ rounded) of the next token, nats a token, on the first window: only these weights are rounded."""
        values = list(self._values)
        for path in paths:
            at = self._parameters.index(path)
            values[at] = self._rounded(path, values[at], scheme, rounding)
        return float(self._divergence(values))

    def _rounded(self, path: str, value: jax.Array, scheme: Scheme, rounding: Rounding) -> jax.Array:
        """A parameter that was in a scheme in between."""
        flat = np.array(value).reshape(-1)
        for matrix in dict.fromkeys(use.matrix for use in self.weights.uses[path]):
            fitted = scheme.fitted(matrix.shape, name=path)
            array = read_matrix(self._source, path, matrix, fitted, lambda _: value, rounding)
            elements = matrix.elements(flat)
            elements[...] = np.asarray(array.dequantize(flat.dtype)).reshape(elements.shape)
        return jnp.asarray(flat.reshape(value.shape))

    @cached_property
    def _divergence(self) -> Callable[[list[jax.Array]], jax.Array]:
        tokens = jnp.asarray(self._windows[:1])

        @jax.jit
        def log_probabilities(values: list[jax.Array]) -> jax.Array:
            (logits,) = self._forward(*values, tokens)
            return jax.nn.log_softmax(logits[0].astype(jnp.float32))

        expected = log_probabilities(self._values)

        @jax.jit
        def mean(values: list[jax.Array], expected: jax.Array) -> jax.Array:
            return jnp.mean(jnp.sum(jnp.exp(expected) * (expected - log_probabilities(values)), axis=-1))

        return lambda values: mean(values, expected)


def _num_rows(op: Any) -> int:
    assert isinstance(op, llm.ObserveOp)
    return prod(shape_of(op.x)[:-1])


def _add(observation: Observation, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    added: np.ndarray = np.maximum(a, b) if observation.statistic == "absmax" else a + b
    return added


def _by_matrix(
    observations: Sequence[Observation], totals: Sequence[np.ndarray], num_rows: Sequence[int]
) -> dict[MatrixKey, InputStatistics]:
    """The statistics of each matrix's inputs; those of what is read twice are added. Matrices share equal ones."""
    inputs: dict[tuple[MatrixKey, ...], list[dict[str, Any]]] = {}
    for observation, total, rows in zip(observations, totals, num_rows, strict=True):
        batches = inputs.setdefault(observation.matrices, [])
        if not batches or observation.statistic in batches[-1]:
            batches.append({"num_rows": rows})
        batches[-1][observation.statistic] = total
    found: dict[MatrixKey, InputStatistics] = {}
    for matrices, batches in inputs.items():
        for batch in batches:
            statistics = InputStatistics(**batch)
            for key in matrices:
                found[key] = found[key] + statistics if key in found else statistics
    return found


class Planner:
    """Decides what each weight becomes: the rules, and with a calibration what its text shows."""

    def __init__(
        self,
        quantize: Quantize,
        source: WeightSource,
        *,
        calibration: Calibration | None = None,
        trace_at: TraceAt,
        encode: Encode | None = None,
        target: str | None = None,
        target_kv_cache: str | None = None,
    ) -> None:
        """`target` decides what the schemes of the plan leave to it; None leaves that open.

        `target_kv_cache` is what it takes keys and values as; None for what the model computes.

        Raises LlmirError for what is no calibration, one that has nothing to round, and mixed precision without.
        """
        if calibration is not None and not isinstance(calibration, Calibration):
            raise LlmirError(
                f"calibration must be an llmir.Calibration, such as Calibration(text=…); got {calibration!r:.50}"
            )
        if calibration is not None and quantize is None:
            raise LlmirError("calibration is for quantized weights: give quantize too, such as 'int4-g64'")
        if isinstance(quantize, MixedPrecision) and calibration is None:
            raise LlmirError(
                "quantize: mixed precision measures what each width costs on text of yours: give "
                "calibration=llmir.Calibration(text=…)"
            )
        self._quantize = quantize
        self._source = source
        self._calibration = calibration
        self._trace_at = trace_at
        self._encode = encode
        self._target, self._target_kv_cache = target, target_kv_cache
        self.rounding: Rounding = plain_rounding
        """How the weights of the plan are rounded."""
        self.notes: Sequence[str] = ()
        """For the report."""

    def plan(
        self, shapes: Mapping[str, tuple[int, ...]], matrices: Mapping[str, tuple[int, int]], max_seq_len: int
    ) -> Plan:
        """The plan for a forward whose sequences have at most `max_seq_len` tokens.

        `shapes` has every parameter, `matrices` (outputs, inputs) of those that can be quantized, by path. Raises
        LlmirError, see `make_plan`, `mixed_precision_plan` and `Calibration.windows`.
        """
        stored = {path: scheme for path, scheme in self._source.stored.items() if path in matrices}
        if self._calibration is None:
            assert not isinstance(self._quantize, MixedPrecision), "see __init__"
            plan = make_plan(self._quantize, shapes, matrices=matrices, stored=stored)
            scales = {(path, 0): scales for path, scales in self._source.activation_scales.items()}
            return self._for_target(replace(plan, activation_scales=scales), matrices)
        calibrator = Calibrator(
            self._trace_at, self._source, self._calibration, encode=self._encode, max_seq_len=max_seq_len
        )
        if isinstance(self._quantize, MixedPrecision):
            calibrated = calibrator.observe(dict.fromkeys(matrices, self._quantize.schemes()))

            def measure(paths: Sequence[str], scheme: Scheme) -> float:
                return calibrator.divergence(paths, scheme, calibrated.round)

            plan = mixed_precision_plan(self._quantize, shapes, matrices, stored, measure)
        else:
            plan = make_plan(self._quantize, shapes, matrices=matrices, stored=stored)
            calibrated = calibrator.observe({path: [scheme] for path, scheme in plan.schemes.items()})
        self.rounding = calibrated.round
        self.notes = calibrator.notes(plan, calibrated)
        return self._for_target(replace(plan, activation_scales=calibrated.scales(plan)), matrices)

    def _for_target(self, plan: Plan, matrices: Mapping[str, tuple[int, int]]) -> Plan:
        return plan if self._target is None else plan.for_target(self._target, matrices, self._target_kv_cache)


__all__ = ["Calibrated", "Calibrator", "Encode", "Planner"]
