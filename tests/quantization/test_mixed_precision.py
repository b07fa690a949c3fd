"""Automated mixed precision: the knapsack, and which divergences are measured to fill it."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmir_jax.errors import LlmirError
from llmir_jax.quantization import MixedPrecision, Plan, Scheme, mixed_precision_plan, parse_scheme, quantize
from llmir_jax.quantization.allocation import allocate
from llmir_jax.quantization.mixed_precision import unit_of

# -- the knapsack ------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn, most_units: int = 12) -> tuple[np.ndarray, np.ndarray, float]:
    """Costs and losses, with ties, choices that are no good, and choices that are missing; a budget that is enough."""
    num_units, num_choices = draw(st.integers(1, most_units)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = num_units, num_choices
    costs = rng.integers(1, draw(st.sampled_from([3, 10, 10_000])), shape).astype(np.float64)
    losses = rng.integers(0, 5, shape) if draw(st.booleans()) else rng.lognormal(-3, 3, shape)
    if draw(st.booleans()):
        costs, losses = np.sort(costs), -np.sort(-losses)
    missing = rng.random(shape) < draw(st.sampled_from([0, 0.3]))
    missing[np.arange(num_units), rng.integers(0, num_choices, num_units)] = False
    costs[missing] = math.inf
    least, most = costs.min(1).sum(), np.where(missing, 0, costs).max(1).sum()
    return costs, losses.astype(np.float64), least + draw(st.floats(0, 1.1)) * (most - least)


def total(numbers: np.ndarray, choices: Any) -> float:
    return math.fsum(row[choice] for row, choice in zip(numbers, choices, strict=True))


@given(tables())
def test_never_over_the_budget_and_never_worse_than_the_same_for_all(
    table: tuple[np.ndarray, np.ndarray, float],
) -> None:
    costs, losses, budget = table
    choices = allocate(costs, losses, budget)
    assert total(costs, choices) <= budget
    for choice in range(costs.shape[1]):
        uniform = [choice] * len(costs)
        if total(costs, uniform) <= budget:
            assert total(losses, choices) <= total(losses, uniform) * (1 + 1e-9)


@given(tables(), st.floats(0, 1))
def test_bytes_under_a_budget_of_losses(table: tuple[np.ndarray, np.ndarray, float], share: float) -> None:
    """The other way round, with budgets that are no whole numbers."""
    sizes, errors, _ = table
    errors = np.where(np.isfinite(sizes), errors, math.inf)
    least, most = math.fsum(errors.min(1)), math.fsum(np.where(np.isfinite(errors), errors, 0).max(1))
    budget = least + share * (most - least)
    choices = allocate(errors, sizes, budget)
    assert total(errors, choices) <= budget and total(sizes, choices) < math.inf


@settings(max_examples=60)
@given(tables(most_units=5))
def test_close_to_the_best(table: tuple[np.ndarray, np.ndarray, float]) -> None:
    """Of all allocations: at most the greatest saving of one step is lost; where all fits, nothing."""
    costs, losses, budget = table
    indices = [[i for i in range(costs.shape[1]) if costs[u, i] < math.inf] for u in range(len(costs))]
    allowed = [c for c in itertools.product(*indices) if total(costs, c) <= budget]
    best = min(total(losses, c) for c in allowed)
    found = total(losses, allocate(costs, losses, budget))
    widest_step = max(max(losses[u, i]) - min(losses[u, i]) for u, i in enumerate(indices))
    assert best <= found * (1 + 1e-9) and found <= best + widest_step * (1 + 1e-9)
    if budget >= total(costs, [max(i, key=lambda i, u=u: costs[u, i]) for u, i in enumerate(indices)]):
        assert math.isclose(found, sum(min(losses[u, i]) for u, i in enumerate(indices)), abs_tol=1e-12)


@given(tables())
def test_a_budget_that_is_too_small(table: tuple[np.ndarray, np.ndarray, float]) -> None:
    costs, losses, _ = table
    least = costs.min(1).sum()
    with pytest.raises(LlmirError, match=rf"a budget of \S+ is less than {least:.6g}"):
        allocate(costs, losses, least * 0.99)


def test_it_takes_what_saves_most() -> None:
    sizes = np.asarray([[4, 8], [4, 8], [4, 8]])
    errors = np.asarray([[1.0, 0.0], [9.0, 0.1], [5.0, 0.0]])
    assert allocate(sizes, errors, 16) == [0, 1, 0]
    assert allocate(sizes, errors, 19.9) == [0, 1, 0]
    assert allocate(sizes, errors, 20) == [0, 1, 1]
    # An exchange of two: the greatest saving a byte, first, leaves too little for the greatest saving.
    assert allocate(np.asarray([[1, 4], [1, 5]]), np.asarray([[10.0, 0], [11, 0]]), 6) == [0, 1]


def test_many_units() -> None:
    rng = np.random.default_rng(0)
    sizes = np.cumsum(rng.integers(1, 1000, (2000, 4)), 1)
    errors = -np.sort(-rng.lognormal(size=(2000, 4)), 1)
    budget = sizes.mean(1).sum()
    choices = allocate(sizes, errors, budget)
    assert 0.999 * budget < total(sizes, choices) <= budget


# -- the option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of bits_per_weight, megabytes, kl, got none; .*bits_per_weight=4.5"),
        ({"kl": 0.1, "megabytes": 3}, "exactly one of bits_per_weight, megabytes, kl, got megabytes and kl"),
        ({"kl": 0}, "kl must be a positive number, got 0"),
        ({"megabytes": -1.5}, r"megabytes must be a positive number, got -1\.5"),
        ({"megabytes": "70"}, "megabytes must be a positive number, got '70'"),
        ({"bits_per_weight": math.nan}, "bits_per_weight must be a positive number, got nan"),
        ({"bits_per_weight": True}, "bits_per_weight must be a positive number, got True"),
        ({"kl": 1, "candidates": ()}, r"candidates must be several schemes, .* got \(\)"),
        ({"kl": 1, "candidates": "int4"}, "candidates must be several schemes, .* got 'int4'"),
        ({"kl": 1, "candidates": ("int4", "int5")}, "unknown scheme 'int5'"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmirError, match=message):
        MixedPrecision(**options)


def test_units() -> None:
    assert unit_of("layers.3.attn.q.kernel") == unit_of("layers.3.attn.k.kernel") == "layers.3.attn"
    assert unit_of("embed.embedding") == "embed.embedding" and unit_of("head") == "head"


# -- plans -------------------------------------------------------------------------------------------------------------

MATRICES = {"embed.embedding": (96, 64)} | {
    f"layers.{i}.{name}.kernel": shape
    for i in range(3)
    for name, shape in {"attn.q": (64, 64), "attn.o": (64, 64), "mlp.up": (256, 64), "mlp.down": (64, 256)}.items()
}
SHAPES: dict[str, tuple[int, ...]] = {path: shape[::-1] for path, shape in MATRICES.items()} | {"norm.scale": (64,)}
NUM_WEIGHTS = sum(math.prod(shape) for shape in MATRICES.values())
CANDIDATES = ("int4-g64", "int4-g32", "int4-g32-min", "int8-g64")


class Model:
    """A made-up one: how much each unit suffers, by the squared error of a scheme."""

    def __init__(self, **sensitivity: float) -> None:
        self._sensitivity = sensitivity
        self.measured: list[tuple[tuple[str, ...], str]] = []

    def error(self, unit: str, scheme: Scheme) -> float:
        levels, group = 2**scheme.bits - (2 if scheme.kind == "symmetric" else 1), scheme.group_size or 64
        weight = max((w for name, w in self._sensitivity.items() if name in unit.replace(".", "_")), default=1.0)
        return weight * math.log(2 * group) / levels**2

    def measure(self, paths: tuple[str, ...], scheme: Scheme) -> float:
        (unit,) = {unit_of(path) for path in paths}
        assert (paths, scheme.name) not in self.measured, "measured twice"
        self.measured.append((paths, scheme.name))
        return self.error(unit, scheme)

    def plan(self, option: MixedPrecision, **options: Any) -> Plan:
        made = mixed_precision_plan(option, SHAPES, MATRICES, options.get("stored"), self.measure)
        assert set(made.schemes) == set(MATRICES)
        assert made.kept == {"norm.scale": "[64] is not multiplied as a matrix"}
        for path, scheme in made.schemes.items():
            assert scheme.fitted(MATRICES[path], name=path) == scheme and not scheme.adapts
        units: dict[str, set[str]] = {}
        for path, scheme in made.schemes.items():
            units.setdefault(unit_of(path), set()).add(scheme.weight_format.name)
        assert options.get("stored") or all(len(names) == 1 for names in units.values())
        return made

    def error_of(self, plan: Plan) -> float:
        return sum({unit_of(p): self.error(unit_of(p), s) for p, s in plan.schemes.items()}.values())


def nbytes(plan: Plan) -> int:
    return sum(scheme.nbytes(MATRICES[path]) for path, scheme in plan.schemes.items())


@settings(max_examples=40, deadline=None)
@given(st.floats(4.25, 9), st.dictionaries(st.sampled_from(["0", "1_attn", "2_mlp", "embed"]), st.floats(0.01, 100)))
def test_bits_per_weight(bits: float, sensitivity: dict[str, float]) -> None:
    """Never over; never worse than a candidate for all that fits, as the made-up errors are as guessed but for size."""
    model = Model(**sensitivity)
    plan = model.plan(MixedPrecision(bits_per_weight=bits, candidates=CANDIDATES))
    assert nbytes(plan) * 8 <= bits * NUM_WEIGHTS * (1 + 1e-9)
    uniform = [Plan(schemes=dict.fromkeys(MATRICES, parse_scheme(name))) for name in CANDIDATES]
    fitting = [model.error_of(other) for other in uniform if nbytes(other) * 8 <= bits * NUM_WEIGHTS]
    assert model.error_of(plan) <= min(fitting) * 1.5
    assert len(model.measured) <= 7 * len(CANDIDATES)


def test_what_suffers_most_gets_most() -> None:
    model = Model(layers_1_attn=50.0)
    plan = model.plan(MixedPrecision(bits_per_weight=4.75, candidates=CANDIDATES))
    assert plan.schemes["layers.1.attn.o.kernel"].bits == 8
    assert plan.schemes["layers.0.attn.o.kernel"].bits == 4
    assert len(model.measured) < 20  # of 28
    same = Model(layers_1_attn=50.0).plan(MixedPrecision(megabytes=4.75 * NUM_WEIGHTS / 8e6, candidates=CANDIDATES))
    assert same == plan


def test_what_need_not_be_measured() -> None:
    """Where everything fits, or nothing else does, or a weight stays as the checkpoint has it."""
    model = Model()
    plan = model.plan(MixedPrecision(bits_per_weight=8.5, candidates=CANDIDATES))
    assert {scheme.name for scheme in plan.schemes.values()} == {"int8-g64-f16"} and not model.measured
    plan = model.plan(MixedPrecision(bits_per_weight=4.5, candidates=("int4-g64",)))
    assert {scheme.name for scheme in plan.schemes.values()} == {"int4-g64-f16"} and not model.measured

    stored = dict.fromkeys(MATRICES, parse_scheme("int4-g32-min"))
    assert all(
        scheme == parse_scheme("int4-g32-min")
        for scheme in model.plan(MixedPrecision(bits_per_weight=5), stored=stored).schemes.values()
    )
    model.plan(MixedPrecision(kl=1e-9), stored=stored)
    # The rest is float: only its divergences count.
    stored = {path: scheme for path, scheme in stored.items() if "mlp" in path}
    model = Model()
    plan = model.plan(MixedPrecision(bits_per_weight=5), stored=stored)
    assert all(not any("mlp" in path for path in paths) or name != "int4-g32-min-f16" for paths, name in model.measured)
    assert plan.schemes["layers.0.mlp.up.kernel"].name == "int4-g32-min-f16"


def test_blocks_that_the_checkpoint_has_in_eight_bits() -> None:
    """ "int4" keeps them beside others in four, without error, and at their size."""
    stored = dict.fromkeys(MATRICES, parse_scheme("int4-g32-min")) | {"embed.embedding": parse_scheme("int8-g32")}
    model = Model()
    plan = model.plan(MixedPrecision(kl=1e-9), stored=stored)
    assert plan.schemes["embed.embedding"].name == "int8-g32-f16"
    assert plan.schemes["layers.0.mlp.up.kernel"].name == "int4-g32-min-f16"


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-4, 1), st.dictionaries(st.sampled_from(["0", "1_attn", "2_mlp", "embed"]), st.floats(0.01, 3)))
def test_divergence(kl: float, sensitivity: dict[str, float]) -> None:
    """Measured to the last, and no larger than the smallest candidate for all that does."""
    model = Model(**sensitivity)
    uniform = [Plan(schemes=dict.fromkeys(MATRICES, parse_scheme(name))) for name in CANDIDATES]
    fitting = [nbytes(other) for other in uniform if model.error_of(other) <= kl]
    if not fitting:
        with pytest.raises(LlmirError, match=r"mixed precision: kl=\S+ is less than \S+ nats a token"):
            model.plan(MixedPrecision(kl=kl, candidates=CANDIDATES))
        return
    plan = model.plan(MixedPrecision(kl=kl, candidates=CANDIDATES))
    assert model.error_of(plan) <= kl * (1 + 1e-9)
    assert nbytes(plan) <= 1.15 * min(fitting)
    names = {(paths, name) for paths, name in model.measured}
    for path, scheme in plan.schemes.items():
        assert any(path in paths and name == scheme.name for paths, name in names)


def test_budgets_that_are_too_small() -> None:
    for option, message in (
        (
            {"bits_per_weight": 4.0},
            r"bits_per_weight=4 is less than 4\.25, which the smallest .* \(int4-g64-f16\) take",
        ),
        ({"megabytes": 0.01}, r"megabytes=0\.01 is less than 0\.\d+, which the smallest"),
        ({"kl": 1e-9}, r"kl=1e-09 is less than 0\.00\d+ nats a token, what the best candidates give"),
    ):
        model = Model()
        with pytest.raises(LlmirError, match=f"^mixed precision: {message}") as caught:
            model.plan(MixedPrecision(**option, candidates=CANDIDATES))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert not model.measured or "kl" in option


def test_candidates_that_a_matrix_cannot_have() -> None:
    """They are left out for its unit; an error if none is left. By default groups adapt."""
    matrices = {"a.b.kernel": (8, 96), "c.d.e.kernel": (8, 128), "c.d.f.kernel": (8, 96)}
    shapes: dict[str, tuple[int, ...]] = dict(matrices)
    option = MixedPrecision(bits_per_weight=8.5, candidates=("int8-g32", "int8-g64"))
    plan = mixed_precision_plan(option, shapes, matrices, {}, lambda *_: 0.0)
    assert {scheme.group_size for scheme in plan.schemes.values()} == {32}
    for names in (("int8-g64",), ("int4-g64", "int8-g128")):
        with pytest.raises(
            LlmirError, match=r"a\.b\.kernel can have none of the candidates: .* does not divide its 96"
        ):
            mixed_precision_plan(
                MixedPrecision(bits_per_weight=9, candidates=names), shapes, matrices, {}, lambda *_: 0.0
            )
    plan = mixed_precision_plan(MixedPrecision(bits_per_weight=4.5), shapes, matrices, {}, lambda *_: 0.1)
    assert all(scheme.bits == 4 for scheme in plan.schemes.values())
    with pytest.raises(LlmirError, match="no matrices"):
        mixed_precision_plan(option, {"norm": (8,)}, {}, {}, lambda *_: 0.0)


def test_a_divergence_that_is_no_number() -> None:
    with pytest.raises(LlmirError, match=r"^embed\.embedding: the divergence is nan when it is rounded to 'int4-"):
        mixed_precision_plan(MixedPrecision(bits_per_weight=4.5), SHAPES, MATRICES, {}, lambda *_: math.nan)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_bytes_of_a_scheme(data: st.DataObject) -> None:
    """As many as the quantized array has."""
    name = "-".join(
        [
            data.draw(st.sampled_from(["int4", "int8"])),
            data.draw(st.sampled_from(["g2", "g8", "channel", "tensor"])),
            *data.draw(st.sampled_from([[], ["zp"], ["min"]])),
            data.draw(st.sampled_from(["f16", "bf16", "f32"])),
        ]
    )
    shape = data.draw(st.sampled_from([(1, 8), (3, 16), (2, 24)]))
    scheme = parse_scheme(name).fitted(shape, name="w")
    assume(scheme.group_size is None or shape[1] % scheme.group_size == 0)
    assert scheme.nbytes(shape) == quantize(np.ones(shape, np.float32), scheme).nbytes
