"""The multiple-choice knapsack: one choice for each unit, so that their costs fit a budget and their losses are least.

Costs and losses are of any unit: bytes and divergences, or divergences and bytes.
"""

import math
from itertools import pairwise

import numpy as np

from llmir_jax.errors import LlmirError

_MOST_MOVES = 1024  # of which pairs are tried
_CLOSE = 1e-9  # relative
_NEGLIGIBLE = 1e-12  # relative: a saving that is less is none


def allocate(costs: np.ndarray, losses: np.ndarray, budget: float) -> list[int]:
    """The choice for each unit: within the budget, with a small sum of losses.

    Starts from the cheapest choices and takes the step along the lower convex hull of a unit's (cost, loss) that saves
    the most for its cost, again and again, as long as it fits; then improves that, and each choice that is the same for
    all units, by exchanging one or two choices. So it is never worse than the best of the latter. Not always the best.

    Args:
        costs: float [num_units, num_choices]; infinite for a choice that a unit does not have.
        losses: float [num_units, num_choices], finite where costs are.
        budget: for the sum of the costs.

    Raises:
        LlmirError: the budget is less than what the cheapest choices cost.
    """
    costs, losses = np.asarray(costs, np.float64), np.asarray(losses, np.float64)
    losses = np.where(np.isfinite(costs), losses, np.inf)
    cheapest = [int(np.lexsort((loss, cost))[0]) for cost, loss in zip(costs, losses, strict=True)]
    if (least := _total(costs, cheapest)) > budget:
        raise LlmirError(f"a budget of {budget:.6g} is less than {least:.6g}, what the cheapest choices cost together")
    starts = [_along_hulls(costs, losses, cheapest, budget)]
    for choice in range(costs.shape[1]):
        uniform = [choice] * len(costs)
        if _total(costs, uniform) <= budget:
            starts.append(uniform)
    improved = [_exchanged(costs, losses, start, budget) for start in starts]
    return min(improved, key=lambda choices: _total(losses, choices))


def _total(numbers: np.ndarray, choices: list[int]) -> float:
    return math.fsum(numbers[np.arange(len(choices)), choices])


def _hull(costs: np.ndarray, losses: np.ndarray, start: int) -> list[int]:
    """Choices of one unit on the lower convex hull, from the cheapest on, each with a smaller loss than the last."""
    hull = [start]
    for choice in np.argsort(costs, kind="stable"):
        if not np.isfinite(costs[choice]) or losses[choice] >= losses[hull[-1]]:
            continue
        if costs[choice] == costs[hull[-1]]:
            hull.pop()
        # Leave out what is not below the line from the one before it to this one.
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            rise = (losses[last] - losses[before]) * (costs[choice] - costs[before])
            if rise < (losses[choice] - losses[before]) * (costs[last] - costs[before]):
                break
            hull.pop()
        hull.append(int(choice))
    return hull


def _along_hulls(costs: np.ndarray, losses: np.ndarray, cheapest: list[int], budget: float) -> list[int]:
    choices, spent = list(cheapest), _total(costs, cheapest)
    steps = []
    for unit, start in enumerate(cheapest):
        hull = _hull(costs[unit], losses[unit], start)
        for before, after in pairwise(hull):
            saved = losses[unit, before] - losses[unit, after]
            steps.append((saved / (costs[unit, after] - costs[unit, before]), unit, before, after))
    # Along a hull the savings fall, so that sorting keeps a unit's steps in order; ties are kept in it by stability.
    for _, unit, before, after in sorted(steps, key=lambda step: -step[0]):
        if choices[unit] != before:
            continue  # an earlier step of this unit did not fit
        choices[unit] = after
        spent += costs[unit, after] - costs[unit, before]
        # The sum is exact, but takes long, and is needed close to the budget only.
        if spent > budget * (1 - _CLOSE) and _total(costs, choices) > budget:
            choices[unit] = before
            spent -= costs[unit, after] - costs[unit, before]
    return choices


def _exchanged(costs: np.ndarray, losses: np.ndarray, choices: list[int], budget: float) -> list[int]:
    """Improved as long as another choice for one unit, or for two of them, lessens the loss within the budget."""
    choices = list(choices)
    while (changed := _best_exchange(costs, losses, choices, budget)) is not None:
        if _total(costs, changed) > budget or _total(losses, changed) >= _total(losses, choices):
            break  # by a rounding error
        choices = changed
    return choices


def _best_exchange(costs: np.ndarray, losses: np.ndarray, choices: list[int], budget: float) -> list[int] | None:
    rows = np.arange(len(choices))
    units, targets = np.nonzero(np.isfinite(costs) & (np.arange(costs.shape[1]) != np.asarray(choices)[:, None]))
    cost = costs[units, targets] - costs[rows, choices][units]
    loss = losses[units, targets] - losses[rows, choices][units]
    slack = budget - _total(costs, choices)
    gain = -_NEGLIGIBLE * np.abs(losses[rows, choices]).sum()
    fits = (cost <= slack) & (loss < gain)
    if fits.any():
        return _moved(choices, units, targets, [int(np.where(fits, loss, np.inf).argmin())])
    if not 0 < len(units) <= _MOST_MOVES:
        return None
    both = loss[:, None] + loss
    fits = (cost[:, None] + cost <= slack) & (both < gain) & (units[:, None] != units)
    if not fits.any():
        return None
    return _moved(choices, units, targets, np.unravel_index(np.where(fits, both, np.inf).argmin(), both.shape))


def _moved(choices: list[int], units: np.ndarray, targets: np.ndarray, moves: object) -> list[int]:
    changed = list(choices)
    for move in np.atleast_1d(np.asarray(moves)):
        changed[units[move]] = int(targets[move])
    return changed
