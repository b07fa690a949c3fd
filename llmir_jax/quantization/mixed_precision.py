"""Automated mixed precision: which weights get which width, under a budget of bytes or of divergence.

    loaded.quantize(llmir.MixedPrecision(bits_per_weight=4.5), calibration=llmir.Calibration(text=…))

A unit, the matrices of one module, gets one width. How much a unit suffers from a width is measured: the mean KL
divergence of the model's next-token distributions, on calibration text, when only this unit is rounded. Divergences of
units are taken to add up, as they do while they are small. `allocation` does the rest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmir_jax.errors import LlmirError
from llmir_jax.quantization.allocation import allocate
from llmir_jax.quantization.rules import NOT_A_MATRIX, Plan, Rules, check_rules, scheme_for
from llmir_jax.quantization.scheme import PRESETS, Scheme, parse_scheme

Measure = Callable[[tuple[str, ...], Scheme], float]
"""(paths, scheme) → the mean KL divergence, in nats a token, when only these weights are rounded so.

The scheme may adapt: it is to be `fitted` to each matrix."""

DEFAULT_CANDIDATES: tuple[str | Scheme, ...] = (
    Scheme(bits=4, group_size=128, adapts=True),
    Scheme(bits=4, group_size=64, adapts=True),
    PRESETS["w4a16"],
    PRESETS["w8a16"],
)
_BUDGETS = ("bits_per_weight", "megabytes", "kl")


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """The option `quantize` that chooses a scheme for each module itself. Exactly one of its three budgets is given.

    Raises LlmirError for budgets and candidates that cannot be meant.
    """

    bits_per_weight: float | None = None
    """At most so many on average over the quantized matrices, scales and the like counted."""
    megabytes: float | None = None
    """The quantized matrices have at most so many, of 10^6 bytes."""
    kl: float | None = None
    """The sum of the measured divergences is at most this, in nats a token; as small as possible under that."""
    candidates: tuple[str | Scheme, ...] = DEFAULT_CANDIDATES
    """Schemes, or names of them, to choose from: by default int4 in groups of 128, of 64, and of 32 with a minimum, and
    int8 in groups of 64, in smaller groups where these do not divide a matrix."""

    def __post_init__(self) -> None:
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise LlmirError(
                f"mixed precision: give exactly one of {', '.join(_BUDGETS)}, got {' and '.join(given) or 'none'}; "
                "such as MixedPrecision(bits_per_weight=4.5)"
            )
        budget = getattr(self, given[0])
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
            raise LlmirError(f"mixed precision: {given[0]} must be a positive number, got {budget!r}")
        candidates: Any = self.candidates
        if not isinstance(candidates, tuple | list) or not candidates:
            raise LlmirError(
                f"mixed precision: candidates must be several schemes, such as ('int4-g64', 'int8'), got {candidates!r}"
            )
        object.__setattr__(self, "candidates", tuple(candidates))
        self.schemes()

    def schemes(self) -> list[Scheme]:
        """The candidates, in their order. What is measured is what is served: no target decides about activations."""
        return [replace(parse_scheme(candidate), auto_activations=False) for candidate in self.candidates]


Quantize = Rules | MixedPrecision
"""What the option `quantize` takes."""


def check_quantize(quantize: Quantize) -> None:
    """Raises LlmirError for what the option can mean for no model: an unknown scheme, a rule that is none."""
    if not isinstance(quantize, MixedPrecision):
        check_rules(quantize)


def unit_of(path: str) -> str:
    """The module whose matrices get one width: "layers.3.attn" of "layers.3.attn.q.kernel".

    A matrix with fewer than three components in its path is a unit by itself.
    """
    components = path.split(".")
    return ".".join(components[:-2]) if len(components) > 2 else path


def mixed_precision_plan(
    option: MixedPrecision,
    shapes: Mapping[str, tuple[int, ...]],
    matrices: Mapping[str, tuple[int, int]],
    stored: Mapping[str, Scheme] | None,
    measure: Measure,
) -> Plan:
    """The plan for a model, with all of `matrices` quantized.

    `measure` is called for a few (unit, candidate): for what the best allocation wants, as far as is known; the others
    are guessed from what was measured of the same unit, until the best allocation is one that was measured. Candidates
    that leave a weight as the checkpoint has it have no error, and are not measured.

    Args:
        option: budget and candidates.
        shapes: path → shape of every parameter.
        matrices: path → [N, K] (outputs, inputs) of those that can be quantized.
        stored: path → format of those that the checkpoint has quantized.
        measure: see `Measure`.

    Raises:
        LlmirError: a matrix that can have none of the candidates; a budget that is too small, with what is needed; a
            divergence that is not finite.
    """
    stored = stored or {}
    if not matrices:
        raise LlmirError("mixed precision: the model has no matrices that can be quantized")
    units = _units(option.schemes(), matrices, stored)
    sizes = np.asarray([[math.inf if c is None else c.nbytes for c in unit.choices] for unit in units])
    search = _Search(units=units, sizes=sizes, measure=measure)
    if option.kl is None:
        choices = search.smallest_error(_budget_bytes(option, units, sizes, matrices))
    else:
        choices = search.smallest_size(option.kl)
    chosen: dict[str, Scheme] = {}
    for unit, index in zip(units, choices, strict=True):
        choice = unit.choices[index]
        assert choice is not None
        chosen.update(choice.schemes)
    kept = {path: NOT_A_MATRIX.format(list(shape)) for path, shape in shapes.items() if path not in chosen}
    return Plan(schemes={path: chosen[path] for path in shapes if path in chosen}, kept=kept)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A candidate, for the matrices of one unit."""

    scheme: Scheme
    schemes: Mapping[str, Scheme]
    """By path, fitted."""
    rounded: tuple[str, ...]
    """Paths of those that are not so in the checkpoint already."""
    nbytes: int
    guess: float
    """The squared error to expect, in relation to those of other choices."""


@dataclass(frozen=True, kw_only=True)
class _Unit:
    paths: tuple[str, ...]
    choices: tuple[_Choice | None, ...]
    """One for each candidate; None for what the unit cannot have, or what another is at least as good as."""


def _units(
    candidates: Sequence[Scheme], matrices: Mapping[str, tuple[int, int]], stored: Mapping[str, Scheme]
) -> list[_Unit]:
    members: dict[str, list[str]] = {}
    for path in matrices:
        members.setdefault(unit_of(path), []).append(path)
    return [_unit(tuple(paths), candidates, matrices, stored) for paths in members.values()]


def _unit(
    paths: tuple[str, ...],
    candidates: Sequence[Scheme],
    matrices: Mapping[str, tuple[int, int]],
    stored: Mapping[str, Scheme],
) -> _Unit:
    choices: list[_Choice | None] = []
    refusals: list[LlmirError] = []
    for candidate in candidates:
        try:
            schemes = {path: scheme_for(candidate, matrices[path], path, stored) for path in paths}
        except LlmirError as refusal:
            refusals.append(refusal)
            choices.append(None)
            continue
        choices.append(_choice(candidate, schemes, matrices, stored))
    found = [choice for choice in choices if choice is not None]
    if not found:
        raise LlmirError(f"mixed precision: {paths[0]} can have none of the candidates: {refusals[0]}")
    kept = [
        choice if choice is not None and not _is_idle(choice, i, choices) else None for i, choice in enumerate(choices)
    ]
    return _Unit(paths=paths, choices=tuple(kept))


def _choice(
    candidate: Scheme,
    schemes: Mapping[str, Scheme],
    matrices: Mapping[str, tuple[int, int]],
    stored: Mapping[str, Scheme],
) -> _Choice:
    rounded = tuple(
        path
        for path, scheme in schemes.items()
        if scheme.activations or path not in stored or not stored[path].same_storage(scheme, matrices[path])
    )
    return _Choice(
        scheme=replace(candidate, keeps_blocks=False),
        schemes=schemes,
        rounded=rounded,
        nbytes=sum(scheme.nbytes(matrices[path]) for path, scheme in schemes.items()),
        guess=sum(math.prod(matrices[path]) * _expected_error(schemes[path], matrices[path]) for path in rounded),
    )


def _is_idle(choice: _Choice, index: int, choices: Sequence[_Choice | None]) -> bool:
    """Whether another choice is the same, or without error and no larger, so that this one need not be measured."""
    for i, other in enumerate(choices):
        if other is None or i == index:
            continue
        if other.schemes == choice.schemes and i < index:
            return True
        if other.rounded or other.nbytes > choice.nbytes:
            continue
        if choice.rounded or other.nbytes < choice.nbytes or i < index:
            return True
    return False


def _expected_error(scheme: Scheme, shape: tuple[int, int]) -> float:
    """The mean squared error of plain rounding of normal values of variance 1, roughly."""
    size = math.prod(shape) if scheme.per_tensor else scheme.group_size or shape[1]
    low, high = scheme.integer_range
    step = 2 * math.sqrt(2 * math.log(2 * size)) / (high - low)  # of about twice the largest of so many
    return step**2 / 12


def _budget_bytes(
    option: MixedPrecision, units: Sequence[_Unit], sizes: np.ndarray, matrices: Mapping[str, tuple[int, int]]
) -> float:
    """The budget in bytes. Raises LlmirError if it is less than what the smallest choices take."""
    num_weights = sum(math.prod(shape) for shape in matrices.values())
    name, given, per_byte = "megabytes", option.megabytes, 1e-6
    if option.bits_per_weight is not None:
        name, given, per_byte = "bits_per_weight", option.bits_per_weight, 8 / num_weights
    assert given is not None
    smallest = sizes.min(1)
    budget = given / per_byte
    if smallest.sum() > budget * (1 + 1e-12):
        smallest_choices = [unit.choices[i] for unit, i in zip(units, sizes.argmin(1), strict=True)]
        names = {scheme.name for choice in smallest_choices if choice for scheme in choice.schemes.values()}
        raise LlmirError(
            f"mixed precision: {name}={given:g} is less than {smallest.sum() * per_byte:.6g}, which the smallest "
            f"candidates ({', '.join(sorted(names))}) take; allow so much, or add smaller candidates"
        )
    return max(budget, float(smallest.sum()))


@dataclass(kw_only=True)
class _Search:
    """What is known of the error of each choice, and what is guessed until it is."""

    units: Sequence[_Unit]
    sizes: np.ndarray
    """[num_units, num_candidates]; infinite for None."""
    measure: Measure
    known: dict[tuple[int, int], float] = field(default_factory=dict)

    def smallest_error(self, budget: float) -> list[int]:
        """The choices of the least error within a budget of bytes."""
        finite = np.where(np.isfinite(self.sizes), self.sizes, -1)
        if finite.max(1).sum() <= budget:
            # Larger is better, without a proof that it is: nothing else could be wanted.
            return self._widest()
        while True:
            choices = allocate(self.sizes, self._errors(), budget)
            if not self._measure_new(choices, skip_forced=True):
                return choices

    def smallest_size(self, kl: float) -> list[int]:
        """The choices of the least size whose errors add up to at most `kl`."""
        self._measure_new([int(i) for i in self.sizes.argmin(1)])
        while True:
            errors = self._errors()
            if math.fsum(errors.min(1)) <= kl:
                choices = allocate(errors, self.sizes, kl)
                if not self._measure_new(choices):
                    return choices
            elif not self._measure_new([int(i) for i in errors.argmin(1)]):
                raise LlmirError(
                    f"mixed precision: kl={kl:g} is less than {math.fsum(errors.min(1)):.3g} nats a token, what the "
                    "best candidates give; allow so much, or add wider candidates, such as 'int8-g32'"
                )

    def _widest(self) -> list[int]:
        guesses = [[math.inf if c is None else c.guess for c in unit.choices] for unit in self.units]
        return [int(i) for i in np.asarray(guesses).argmin(1)]

    def _errors(self) -> np.ndarray:
        """[num_units, num_candidates]: measured, or guessed."""
        return np.asarray([[self._error(u, i) for i in range(self.sizes.shape[1])] for u in range(len(self.units))])

    def _error(self, unit: int, index: int) -> float:
        choice = self.units[unit].choices[index]
        if choice is None:
            return math.inf
        if not choice.rounded:
            return 0.0
        if (unit, index) in self.known:
            return self.known[unit, index]
        nearest: tuple[float, float] | None = None
        for i, other in enumerate(self.units[unit].choices):
            if (unit, i) not in self.known or other is None:
                continue
            ratio = choice.guess / other.guess
            if nearest is None or abs(math.log(ratio)) < nearest[0]:
                nearest = abs(math.log(ratio)), self.known[unit, i] * ratio
        return choice.guess if nearest is None else nearest[1]

    def _measure_new(self, choices: Sequence[int], *, skip_forced: bool = False) -> bool:
        """Measure those of the choices that are not known yet; whether there were any."""
        new = False
        for u, (unit, index) in enumerate(zip(self.units, choices, strict=True)):
            choice = unit.choices[index]
            assert choice is not None
            forced = skip_forced and sum(c is not None for c in unit.choices) == 1
            if (u, index) in self.known or not choice.rounded or forced:
                continue
            error = float(self.measure(choice.rounded, choice.scheme))
            if not math.isfinite(error):
                raise LlmirError(
                    f"{choice.rounded[0]}: the divergence is {error} when it is rounded to "
                    f"{choice.scheme.weight_format.name!r}; leave that out of the candidates"
                )
            self.known[u, index] = max(error, 0.0)  # a sum of rounding errors may be a little less
            new = True
        return new
