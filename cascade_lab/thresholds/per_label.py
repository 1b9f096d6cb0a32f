"""Chooses a minimum probability for each label of the last stage, and tests whether that improves on one for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.costs import counts_of_codes, prices
from cascade_lab.analysis.outcomes import FRACTIONS, IN_SCOPE, OUT_OF_SCOPE, OUTCOMES, Totals, number_of, price_vector
from cascade_lab.exceptions import GoalError, InfeasibleError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.resampling import N_FOLDS, Chosen, Procedure, choose_thresholds, folds, pooled
from cascade_lab.thresholds.search import choose_on_grid

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

_MAX_PRICE = 2.0**20


class PerLabelThresholds(NamedTuple):
    """Minimum probabilities by label, and how much they gain.

    Attributes
    ----------
    min_probabilities : dict of str to float
        As in `StageSpec.min_probabilities`. A label that is not named is never rejected.
    gain : Interval
        How much they improve the goal's metric on texts left out, compared with one `min_probability` for all labels
        (but for those to which the run's cascade gives a minimum of their own): from the outcomes of all folds of a
        repeated cross-validation, and its 95% interval. Above 0 is better; NaN where no fold allows a choice.
    held_out : dict of str to tuple of two floats
        Each bounded metric on texts left out: with one minimum for all labels, and with one per label.
    improves : bool
        The interval lies above 0, and each bounded metric keeps its bound or is no worse than with one for all.
    """

    min_probabilities: dict[str, float]
    gain: Interval
    held_out: dict[str, tuple[float, float]]
    improves: bool

    def apply(self, spec: CascadeSpec) -> CascadeSpec:
        """Return a cascade with these minimums at its last stage, which then has none for all labels."""
        last = replace(spec.last, min_probability=None, min_probabilities=self.min_probabilities)
        return replace(spec, stages=(*spec.stages[:-1], last))


def per_label_thresholds(
    run: Run,
    goal: Goal,
    thresholds: Mapping[str, float],
    *,
    n_repeats: int = 5,
    n_folds: int = N_FOLDS,
    seed: int = 0,
) -> PerLabelThresholds:
    """Choose a minimum probability for each label of the last stage, with the gates at given thresholds.

    The metrics that this accepts are sums over texts. So each label has its own best threshold at a given *price*: how
    much of the goal's metric one unit of the bounded metric is worth (a Lagrange multiplier). The price is the lowest
    at which the bound holds.

    Parameters
    ----------
    run : Run
        With shadow scores.
    goal : Goal
        With at most one bound.
    thresholds : mapping of str to float
        Thresholds of the gates; that of the last stage is not used.
    n_repeats, n_folds, seed : int
        Of the cross-validation.

    Raises
    ------
    GoalError
        A goal with more than one bound, or with a metric that is not a sum over texts (`reject_precision`, `risk`, a
        latency).
    InfeasibleError
        No minimum probabilities satisfy the goal.
    """
    check_per_label(goal)
    bounds = _bounds(goal)
    last = run.spec.last.name
    gates = {name: value for name, value in thresholds.items() if name != last}
    # The run's own minimums per label are part of the choice that these are compared with, and not of these.
    grid, free_grid = (
        ThresholdGrid.from_run(r, [last], gates).with_costs(goal.used_costs) for r in (run, _without_minimums(run))
    )
    indices = _choose(free_grid, goal, np.ones(len(grid.in_scope), dtype=int))
    counts = []
    for train, test in folds(grid, n_repeats, n_folds, seed):
        try:
            outcomes_per_label = _outcomes_at(free_grid, _choose(free_grid, goal, train))
            common = choose_on_grid(grid, goal, weights=train).thresholds
        except InfeasibleError:
            continue
        both = (grid.outcomes_at(grid.indices(common)), outcomes_per_label)
        counts.append([goal.count(outcomes, test) for outcomes in both])
    thresholds_of_last = free_grid.thresholds[0]
    chosen = {label: float(thresholds_of_last[index]) for label, index in indices.items() if index}
    if not counts:
        undefined = Interval(np.nan, np.nan, np.nan)
        return PerLabelThresholds(chosen, undefined, {name: (np.nan, np.nan) for name, _ in bounds}, False)
    by_fold = np.array(counts)
    mean, error = pooled(lambda c: goal.sign * np.diff(goal.value(goal.metric, c))[..., 0], by_fold, n_folds)
    half = error * float(student_t.ppf(0.975, max(len(counts) - 1, 1)))
    held_out = {name: tuple(goal.value(name, by_fold.sum(axis=0)).tolist()) for name, _ in bounds}
    improves = mean - half > 0
    for name, bound in bounds:
        for_all, per_label = held_out[name]
        improves &= per_label >= min(bound, for_all) if name in goal.at_least else per_label <= max(bound, for_all)
    return PerLabelThresholds(chosen, Interval(mean, mean - half, mean + half), held_out, bool(improves))


def check_per_label(goal: Goal) -> None:
    """Raise GoalError if minimum probabilities per label cannot be chosen for a goal."""
    bounds = _bounds(goal)
    for name in (goal.metric, *(name for name, _ in bounds)):
        if name != "mean_cost" and FRACTIONS.get(name, ((), ()))[1] not in (OUTCOMES, IN_SCOPE, OUT_OF_SCOPE):
            raise GoalError(f"thresholds per label cannot be chosen for {name}; take accuracy or a cost")
    if len(bounds) > 1:
        raise GoalError("thresholds per label need a goal with at most one bound; drop the others")


def per_label_procedure(
    run: Run, goal: Goal, grid: ThresholdGrid, *, near: Mapping[str, float] | None = None
) -> Procedure:
    """Return the procedure that chooses the thresholds of a run's grid, and then a minimum for each label.

    The threshold of the last stage is NaN in its result. `near` is as for `choose_thresholds`.
    """
    last = run.spec.last.name
    gates = [stage for stage in grid.stages if stage != last]
    free_grid = ThresholdGrid.from_run(_without_minimums(run), [*gates, last]).with_costs(goal.used_costs)

    def choose_again(weights: np.ndarray) -> Chosen:
        thresholds = choose_thresholds(grid, goal, weights=weights, near=near).thresholds
        # The gates' confidences are those of `grid`, so each threshold is found again.
        fixed = free_grid.fix(
            {stage: int(free_grid.index(stage, thresholds[stage])) for stage in free_grid.stages if stage != last}
        )
        chosen = {stage: np.nan if stage == last else value for stage, value in thresholds.items()}
        return Chosen(chosen, _outcomes_at(fixed, _choose(fixed, goal, weights)))

    return choose_again


def _bounds(goal: Goal) -> list[tuple[str, float]]:
    return [*goal.at_least.items(), *goal.at_most.items()]


def _without_minimums(run: Run) -> Run:
    """Return a run whose last stage has no minimum probability per label."""
    if not run.spec.last.min_probabilities:
        return run
    last = replace(run.spec.last, min_probabilities={})
    return run.with_spec(replace(run.spec, stages=(*run.spec.stages[:-1], last)))


def _choose(grid: ThresholdGrid, goal: Goal, weights: np.ndarray) -> dict[str, int]:
    """Return for each label the index in `grid.thresholds[0]` of its best threshold; 0 rejects nothing."""
    totals = Totals(weights[grid.in_scope].sum(), weights[~grid.in_scope].sum(), goal.prevalence)
    bounds = [(name, bound, +1) for name, bound in goal.at_least.items()]
    bounds += [(name, bound, -1) for name, bound in goal.at_most.items()]
    value = goal.sign * _contributions(goal.metric, goal, totals)
    if not bounds:
        return _best(grid, weights, value)
    name, bound, direction = bounds[0]
    bounded = direction * _contributions(name, goal, totals)

    def choose_at(price: float) -> tuple[dict[str, int], bool]:
        """Return the best indices at a price, and whether the bound holds there."""
        indices = _best(grid, weights, value + price * bounded)
        counts = goal.count(_outcomes_at(grid, indices), weights)
        return indices, direction * float(goal.value(name, counts)) >= direction * bound

    low, high = 0.0, 1.0
    indices, holds = choose_at(low)
    if holds:
        return indices
    indices, holds = choose_at(high)
    while not holds:
        low, high = high, 2 * high
        if high > _MAX_PRICE:
            raise InfeasibleError(
                f"{grid.name}: infeasible: no minimum probabilities per label satisfy: {goal}; ask for less"
            )
        indices, holds = choose_at(high)
    for _ in range(25):
        middle = (low + high) / 2
        candidate, holds = choose_at(middle)
        low, high, indices = (low, middle, candidate) if holds else (middle, high, indices)
    return indices


def _contributions(name: str, goal: Goal, totals: Totals) -> np.ndarray:
    """Return how much a text of each code adds to a metric that is a sum over texts: shape (6,), or more with costs."""
    counts = totals.reweight(counts_of_codes(goal.used_costs))
    if name == "mean_cost":
        return counts @ price_vector(prices(goal.used_costs), counts.shape[-1]) / totals.n
    part, whole = FRACTIONS[name]
    sizes = {OUTCOMES: totals.n, IN_SCOPE: totals.weights[0] * totals.in_scope}
    size = sizes.get(whole, totals.weights[1] * totals.out_of_scope)
    return number_of(counts, part) / size


def _best(grid: ThresholdGrid, weights: np.ndarray, value: np.ndarray) -> dict[str, int]:
    """Return for each label the index of the threshold that maximizes the sum of `value`, by code, of its texts."""
    rank = grid.ranks[0]
    arrives = rank > 0
    gain = (weights * (value[grid.outcomes[0]] - value[grid.outcomes[1]]))[arrives]
    labels, code = np.unique(grid.predicted[1][arrives].astype(str), return_inverse=True)
    order = np.lexsort((rank[arrives], code))
    starts = np.searchsorted(code[order], np.arange(len(labels) + 1))
    chosen = {}
    for k, label in enumerate(labels):
        own = order[starts[k] : starts[k + 1]]
        steps = rank[arrives][own]
        # Texts with equal probability are rejected together, at the step after the last of them.
        is_last = np.append(steps[1:] != steps[:-1], True)
        # No threshold rejects a probability of 1, which reaches all of them.
        is_last &= steps < len(grid.thresholds[0])
        total = np.append(0.0, gain[own].cumsum()[is_last])
        best = int(total.argmax())
        chosen[str(label)] = int(steps[is_last][best - 1]) if total[best] > 1e-12 else 0
    return chosen


def _outcomes_at(grid: ThresholdGrid, indices: Mapping[str, int]) -> np.ndarray:
    """Return each text's outcome, as in `ThresholdGrid.outcomes`, with one threshold per label: shape (n,)."""
    index = np.array([indices.get(str(label), 0) for label in grid.predicted[1]])
    return np.where(grid.ranks[0] > index, grid.outcomes[1], grid.outcomes[0])
