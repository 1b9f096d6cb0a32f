"""Chooses thresholds that keep a bound on new texts, with a given probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import binom

from cascade_lab.analysis.outcomes import FRACTIONS, is_outcome
from cascade_lab.exceptions import GoalError, InfeasibleError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.objective import LATENCIES, Goal
from cascade_lab.thresholds.search import Choice

if TYPE_CHECKING:
    from cascade_lab.run import Run

GUARANTEED = ("in_scope_accuracy", "reject_recall")


class Guarantee(NamedTuple):
    """A bound that holds on new texts with probability 1 - `delta`; see `choose_with_guarantee`."""

    metric: str
    at_least: float
    delta: float = 0.1

    def __str__(self) -> str:
        return f"{self.metric} at least {self.at_least:g} with probability {1 - self.delta:g}"


def choose_with_guarantee(
    run: Run,
    goal: Goal,
    metric: str,
    at_least: float,
    *,
    delta: float = 0.1,
    stages: Sequence[str] | None = None,
    grid: ThresholdGrid | None = None,
) -> Choice:
    """Choose thresholds so that `metric` is at least `at_least` on new texts, with probability 1 - `delta`.

    Learn then Test (Angelopoulos et al. 2021): the candidates are fixed before the texts are looked at. For each
    combination of the later stages' thresholds, those of the first stage are tested in order, from the safest on, by
    exact binomial tests, as long as they pass. The combinations share `delta` equally (Bonferroni). Of the candidates
    that pass, the best for `goal` is chosen; the goal's own bounds hold on these texts, without a guarantee.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`.
    metric : {"in_scope_accuracy", "reject_recall"}
        What is guaranteed.
    at_least : float
        Its least value.
    delta : float
        The probability that the guarantee fails, over draws of the tuning set.

    Raises
    ------
    GoalError
        Another metric, or a goal with a bound on a latency.
    InfeasibleError
        No candidate passes the test and satisfies the goal's bounds.
    RunError
        As `ThresholdGrid.from_run`.
    """
    guarantee = Guarantee(metric, at_least, delta)
    check_guarantee(goal, guarantee)
    return choose_with_guarantee_on_grid(grid or ThresholdGrid.from_run(run, stages), goal, guarantee)


def check_guarantee(goal: Goal, guarantee: Guarantee) -> None:
    """Raise GoalError if the metric cannot be guaranteed, or not with this goal."""
    if guarantee.metric not in GUARANTEED:
        raise GoalError(f"'{guarantee.metric}' cannot be guaranteed; {' and '.join(GUARANTEED)} can")
    if any(name in LATENCIES for name in goal.at_most):
        raise GoalError("a guarantee cannot be combined with a bound on a latency; leave out one of the two")


def choose_with_guarantee_on_grid(
    grid: ThresholdGrid, goal: Goal, guarantee: Guarantee, *, weights: np.ndarray | None = None
) -> Choice:
    """Choose as `choose_with_guarantee`, on the texts of a grid; `weights` says how often each text counts.

    Weights other than 0 and 1 repeat texts, and the guarantee then holds no longer.

    Raises
    ------
    InfeasibleError
        No candidate passes the test and satisfies the goal's bounds.
    """
    metric, at_least, delta = guarantee
    first_stage, *later_stages = grid.stages
    first = np.concatenate([[0.0], 1 / (1 + np.exp(-np.linspace(-12, 12, 481))), [1.0]])
    combinations = product(np.arange(10) / 10, repeat=len(later_stages))
    later = [dict(zip(later_stages, values, strict=True)) for values in combinations]
    grids = [_at_later_thresholds(grid, thresholds) for thresholds in later]
    counts = np.stack([fixed.counts_at(first, weights=weights) for fixed in grids], axis=1)
    hits, n = (counts @ is_outcome(names) for names in FRACTIONS[metric])
    p_value = binom.cdf(n - hits, n, 1 - at_least)
    # In-scope accuracy is safest at the lowest threshold, reject recall at the highest. (With several gates that have
    # reject labels of their own it need not be; the guarantee holds in any order, but fewer candidates may pass.)
    order = slice(None, None, -1) if metric == "reject_recall" else slice(None)
    passed = np.logical_and.accumulate(p_value[order] <= delta / len(later), axis=0)[order] & (n > 0)
    for name, least in goal.at_least.items():
        passed &= goal.value(name, counts) >= least
    for name, most in goal.at_most.items():
        passed &= goal.value(name, counts) <= most
    value = goal.sign * goal.value(goal.metric, counts)
    value = np.where(passed & ~np.isnan(value), value, -np.inf)
    if value.max() == -np.inf:
        raise InfeasibleError(
            f"{grid.name}: no thresholds have {metric} of at least {at_least:g} with probability {1 - delta:g} and "
            f"satisfy: {goal}; ask for less, or tune on more texts"
        )
    i, j = np.unravel_index(int(value.argmax()), value.shape)
    thresholds = {first_stage: float(first[i]), **{stage: float(value) for stage, value in later[j].items()}}
    return Choice(thresholds, counts[i, j], {name: float(goal.value(name, counts[i, j])) for name in goal.metrics})


def _at_later_thresholds(grid: ThresholdGrid, thresholds: Mapping[str, float]) -> ThresholdGrid:
    """Return the grid of the first stage, with the later stages' thresholds fixed."""
    values = dict(zip(grid.stages, grid.thresholds, strict=True))
    return grid.fix({stage: int(np.searchsorted(values[stage], value)) for stage, value in thresholds.items()})
