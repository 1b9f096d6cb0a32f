"""A least probability for each label of the last stage, kept only where cross-validation says that it pays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.goals import FRACTIONS, IN_SCOPE, OUT_OF_SCOPE, Goal, Totals, among, figure_of
from cascade_lab.analysis.outcomes import OUTCOMES
from cascade_lab.analysis.quadrants import Points, points
from cascade_lab.analysis.thresholds import choose_among
from cascade_lab.analysis.tuning import corrected_error, folds
from cascade_lab.errors import GoalError, InfeasibleError
from cascade_lab.run import Run

_MAX_PRICE = 2.0**20


class PerClass(NamedTuple):
    """Least probabilities by label, and what they are worth.

    Attributes
    ----------
    min_probabilities : dict of str to float
        As `StageSpec.min_probabilities` has them; a label that is not named is never rejected.
    gain : Interval
        What they add to the goal's figure (in its own direction) on texts left out, over one `min_probability` for all
        labels, with its 95% interval by repeated cross-validation.
    held_out : dict of str to tuple of float
        Of each constrained figure, the mean on texts left out: one for all labels, and one for each.
    pays : bool
        The interval is above zero, and each constrained figure within its bound, or no worse than with one for all.
    """

    min_probabilities: dict[str, float]
    gain: Interval
    held_out: dict[str, tuple[float, float]]
    pays: bool


def per_class(
    run: Run,
    goal: Goal,
    thresholds: Mapping[str, float],
    *,
    n_repeats: int = 5,
    n_folds: int = 5,
    seed: int = 0,
) -> PerClass:
    """Choose a least probability for each label of the last stage, the gates standing at `thresholds`.

    The figures that this takes are sums over texts, so at a given price of the constrained figure in units of the other
    (a Lagrange multiplier) each label has its own best threshold; the price is the least that satisfies the constraint.

    Raises
    ------
    GoalError
        A goal with more than one constraint, or with a figure that is not a sum over texts (`reject_precision`, `risk`,
        a latency).
    InfeasibleError
        No least probabilities satisfy the goal.
    """
    bounds = [*goal.at_least.items(), *goal.at_most.items()]
    for name in (goal.figure, *(name for name, _ in bounds)):
        if name != "mean_cost" and FRACTIONS.get(name, ((), ()))[1] not in (OUTCOMES, IN_SCOPE, OUT_OF_SCOPE):
            raise GoalError(f"thresholds by label cannot be chosen for {name}; take accuracy or a cost")
    if len(bounds) > 1:
        raise GoalError("thresholds by label take a goal with one constraint at the most; drop the others")
    last = run.spec.last.name
    gates = {name: value for name, value in thresholds.items() if name != last}
    found = points(run, [last], gates)
    places = _choose(found, goal, np.ones(len(found.in_scope), dtype=int), f"{run.directory}")
    gains, held = [], []
    for train, test in folds(found, n_repeats, n_folds, seed):
        try:
            each = _outcomes_at(found, _choose(found, goal, train, "the fold"))
            one = choose_among(found, goal, weights=train).thresholds[last]
        except InfeasibleError:
            continue
        place = int(np.searchsorted(found.thresholds[0], one))
        both = [
            np.bincount(became, test, len(OUTCOMES))
            for became in (np.where(found.ranks[0] > place, found.becomes[2], found.becomes[0]), each)
        ]
        values = [float(figure_of(goal.figure, counts, goal)) for counts in both]
        gains.append(goal.sign * (values[1] - values[0]))
        held.append({name: [float(figure_of(name, counts, goal)) for counts in both] for name, _ in bounds})
    mean, error = float(np.mean(gains)), corrected_error(np.array(gains), n_folds)
    half = error * float(student_t.ppf(0.975, max(len(gains) - 1, 1)))
    kept = {name: tuple(np.mean([row[name] for row in held], axis=0).tolist()) for name, _ in bounds}
    pays = mean - half > 0
    for name, bound in bounds:
        one, each = kept[name]
        pays &= each >= min(bound, one) if name in goal.at_least else each <= max(bound, one)
    values = found.thresholds[0]
    chosen = {label: float(values[place]) for label, place in places.items() if place}
    return PerClass(chosen, Interval(mean, mean - half, mean + half), kept, bool(pays))


def _choose(found: Points, goal: Goal, weights: np.ndarray, where: str) -> dict[str, int]:
    """Return by label the place in `found.thresholds[0]` below which it is rejected; 0 rejects nothing."""
    totals = Totals(weights[found.in_scope].sum(), weights[~found.in_scope].sum(), goal.prevalence)
    bounds = [(name, bound, +1) for name, bound in goal.at_least.items()]
    bounds += [(name, bound, -1) for name, bound in goal.at_most.items()]
    worth = goal.sign * _worth(goal.figure, goal, totals)
    if not bounds:
        return _best(found, weights, worth)
    name, bound, direction = bounds[0]
    priced = direction * _worth(name, goal, totals)

    def at(price: float) -> tuple[dict[str, int], bool]:
        chosen = _best(found, weights, worth + price * priced)
        counts = np.bincount(_outcomes_at(found, chosen), weights, len(OUTCOMES))
        return chosen, direction * float(figure_of(name, counts, goal)) >= direction * bound

    low, high = 0.0, 1.0
    chosen, holds = at(low)
    if holds:
        return chosen
    while not (found_at := at(high))[1]:
        low, high = high, 2 * high
        if high > _MAX_PRICE:
            raise InfeasibleError(f"{where}: infeasible: no least probabilities by label satisfy: {goal}; ask for less")
    chosen = found_at[0]
    for _ in range(25):
        middle = (low + high) / 2
        candidate, holds = at(middle)
        low, high, chosen = (low, middle, candidate) if holds else (middle, high, chosen)
    return chosen


def _worth(name: str, goal: Goal, totals: Totals) -> np.ndarray:
    """Return what a text of each outcome adds to a figure that is a sum over texts: shape (6,)."""
    weights = totals.weigh(np.ones(len(OUTCOMES)))
    if name == "mean_cost":
        return weights * [goal.costs.get(outcome, 0.0) for outcome in OUTCOMES] / totals.n
    part, whole = FRACTIONS[name]
    sizes = {OUTCOMES: totals.n, IN_SCOPE: totals.weights[0] * totals.in_scope}
    size = sizes.get(whole, totals.weights[1] * totals.out_of_scope)
    return weights * among(part) / size


def _best(found: Points, weights: np.ndarray, worth: np.ndarray) -> dict[str, int]:
    """Return by label the place of the threshold at which the texts of that label are worth most."""
    rank = found.ranks[0]
    arrives = rank > 0
    gain = (weights * (worth[found.becomes[0]] - worth[found.becomes[2]]))[arrives]
    labels, code = np.unique(found.answers[2][arrives].astype(str), return_inverse=True)
    order = np.lexsort((rank[arrives], code))
    starts = np.searchsorted(code[order], np.arange(len(labels) + 1))
    chosen = {}
    for k, label in enumerate(labels):
        own = order[starts[k] : starts[k + 1]]
        steps = rank[arrives][own]
        # Texts of one probability are rejected together, after the last of them.
        ends = np.append(steps[1:] != steps[:-1], True)
        total = gain[own].cumsum()[ends]
        best = int(total.argmax())
        chosen[str(label)] = int(steps[ends][best]) if total[best] > 1e-12 else 0
    return chosen


def _outcomes_at(found: Points, places: Mapping[str, int]) -> np.ndarray:
    """Return each text's outcome where each label has its own threshold: places in `OUTCOMES`, shape (n,)."""
    place = np.array([places.get(str(label), 0) for label in found.answers[2]])
    return np.where(found.ranks[0] > place, found.becomes[2], found.becomes[0])
