"""Chooses thresholds that keep one or more bounds together on new texts, with a given probability."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import betainc

from cascade_lab.analysis.costs import count_codes
from cascade_lab.analysis.outcomes import FRACTIONS, IN_SCOPE, OUT_OF_SCOPE, number_of
from cascade_lab.exceptions import GoalError, InfeasibleError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.objective import LATENCIES, Goal
from cascade_lab.thresholds.search import BOTH_KINDS, Choice

if TYPE_CHECKING:
    from cascade_lab.run import Run

_IN_SEQUENCE = {"in_scope_accuracy": 1, "coverage": 1, "reject_recall": -1}
"""Metrics that a gate's threshold moves in one direction: 1 where a lower bound is safest at the lowest threshold."""
_MAX_DOUBLINGS = 10.0  # of the number of texts
_STEP = 10  # of the first stage's candidates, every tenth is tested for the other metrics


@dataclass(frozen=True)
class Guarantee:
    """Bounds that hold together on new texts with probability 1 - `delta`; see `choose_with_guarantee`.

    Attributes
    ----------
    at_least, at_most : mapping of str to float
        Bounds on metrics of `FRACTIONS`.
    delta : float
        The probability that at least one of them is broken.

    Raises
    ------
    GoalError
        No bound, a metric that cannot be guaranteed, or a `delta` that is not between 0 and 1.

    Examples
    --------
    >>> print(Guarantee({"in_scope_accuracy": 0.95, "reject_recall": 0.6}))
    in_scope_accuracy at least 0.95 and reject_recall at least 0.6, together with probability 0.9
    """

    at_least: Mapping[str, float]
    at_most: Mapping[str, float] = field(default_factory=dict)
    delta: float = 0.1

    def __post_init__(self) -> None:
        if not self.bounds:
            raise GoalError("a guarantee needs a bound; give --guarantee METRIC=VALUE, or --at-least with --confidence")
        for bound in self.bounds:
            if bound.metric not in FRACTIONS:
                raise GoalError(f"'{bound.metric}' cannot be guaranteed; {', '.join(FRACTIONS)} can")
        if not 0 < self.delta < 1:
            raise GoalError(f"the probability that a guarantee fails is {self.delta!r}; it must lie between 0 and 1")

    @property
    def bounds(self) -> list[Bound]:
        """Every bound."""
        return bounds_of(self.at_least, self.at_most)

    def __str__(self) -> str:
        together = ", together" if len(self.bounds) > 1 else ""
        return f"{' and '.join(map(str, self.bounds))}{together} with probability {1 - self.delta:g}"


class Bound(NamedTuple):
    """A metric that is to be at least `value` (`sign` is 1), or at most (-1).

    >>> print(Bound("risk", 0.05, -1), Bound("risk", 0.05, -1).holds(0.04))
    risk at most 0.05 True
    """

    metric: str
    value: float
    sign: int

    def __str__(self) -> str:
        return f"{self.metric} {'at least' if self.sign > 0 else 'at most'} {self.value:g}"

    def relax(self, share: float) -> Bound:
        """Return a bound that is weaker by a share of its distance to 0 (an upper bound: to 1), in three decimals.

        >>> Bound("coverage", 0.95, 1).relax(0.1).value, Bound("risk", 0.2, -1).relax(0.5).value
        (0.855, 0.6)
        """
        weaker = self.value + share * ((0 if self.sign > 0 else 1) - self.value)
        return self._replace(value=float(self.sign * np.floor(np.round(self.sign * weaker * 1000, 6)) / 1000))

    def holds(self, metric: float) -> bool:
        """Return whether a value of the metric keeps the bound; an undefined one does not."""
        return bool(self.sign * metric >= self.sign * self.value)


def bounds_of(at_least: Mapping[str, float], at_most: Mapping[str, float]) -> list[Bound]:
    """Return the bounds on metrics of the cascade; those on latencies are left out."""
    kept = [Bound(name, value, 1) for name, value in at_least.items()]
    return kept + [Bound(name, value, -1) for name, value in at_most.items() if name not in LATENCIES]


def choose_with_guarantee(
    run: Run,
    goal: Goal,
    at_least: Mapping[str, float],
    *,
    at_most: Mapping[str, float] | None = None,
    delta: float = 0.1,
    stages: Sequence[str] | None = None,
    grid: ThresholdGrid | None = None,
) -> Choice:
    """Choose thresholds so that bounds on metrics hold together on new texts, with probability 1 - `delta`.

    Learn then Test (Angelopoulos et al. 2021): the candidates are fixed before the texts are looked at, and each bound
    of each candidate is tested by an exact binomial test. Of the candidates whose bounds all pass, the best for `goal`
    is chosen; the goal's own bounds hold on these texts, without a guarantee. However the candidate is chosen, a bound
    is broken with probability `delta` at most, because the tests share `delta`:

    - The combinations of the later stages' thresholds share it equally (Bonferroni).
    - Bounds that are tested in the same order share nothing: a candidate passes if each of its tests does, and if one
      bound is broken, its test passes with the whole probability at most (Berger 1982). Bounds that are tested in
      different orders share it equally.
    - In-scope accuracy, coverage and reject recall: the first stage's thresholds are tested in order, from the safest
      on, as long as they pass; each test has the whole share.
    - Other metrics, and cascades with a deferral stage, where no direction is known to be safe: of 49 thresholds of
      the first stage each has an equal share.

    This is safe, and costs power. In simulations with 300 texts and `delta` 0.1, a bound on in-scope accuracy was
    broken in 16 of 400 sets with one threshold, and in 3 of 400 with two; bounds on risk or reject precision in none,
    but in 7% to 78% of the sets nothing could be guaranteed. With fewer thresholds to choose, more can be guaranteed.

    A text that repeats is no new evidence. With repeated texts, each test is of the effective number of texts (Kish
    1965), as in the confidence limits of Korn and Graubard (1998); it is then no longer exact, but simulations in the
    tests hold `delta`.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`.
    at_least, at_most : mapping of str to float
        What is guaranteed: bounds on metrics of `FRACTIONS`.
    delta : float
        The probability that a bound is broken, over draws of the tuning set.

    Raises
    ------
    GoalError
        A metric that cannot be guaranteed, or a goal with a bound on a latency.
    InfeasibleError
        No candidate passes the tests and satisfies the goal's bounds: the choice is to abstain. The message says what
        can be guaranteed on these texts, and how many more of them would be needed (see `abstention`).
    RunError
        As `ThresholdGrid.from_run`.

    Examples
    --------
    >>> from cascade_lab import Run
    >>> both = {"in_scope_accuracy": 0.9, "reject_recall": 0.6}
    >>> choose_with_guarantee(Run.read("runs/val"), Goal("accuracy"), both).thresholds  # doctest: +SKIP
    """
    guarantee = Guarantee(at_least, at_most or {}, delta)
    check_guarantee(goal, guarantee)
    return choose_or_abstain(grid or ThresholdGrid.from_run(run, stages), goal, guarantee)


def check_guarantee(goal: Goal, guarantee: Guarantee) -> None:
    """Raise GoalError if bounds cannot be guaranteed with this goal."""
    if any(name in LATENCIES for name in goal.at_most):
        raise GoalError("a guarantee cannot be combined with a bound on a latency; leave out one of the two")
    for bound in guarantee.bounds:
        if goal.prevalence is not None and not is_of_one_kind(bound.metric):
            raise GoalError(
                f"{bound.metric} cannot be guaranteed for another fraction of out-of-scope texts; leave out the "
                "prevalence, or guarantee in_scope_accuracy or reject_recall"
            )


def is_of_one_kind(metric: str) -> bool:
    """Return whether a metric is of the texts in scope alone, or of those out of scope: no prevalence changes it."""
    return metric in FRACTIONS and FRACTIONS[metric][1] in (IN_SCOPE, OUT_OF_SCOPE)


def choose_with_guarantee_on_grid(
    grid: ThresholdGrid, goal: Goal, guarantee: Guarantee, *, weights: np.ndarray | None = None
) -> Choice:
    """Choose as `choose_with_guarantee`, on the texts of a grid; `weights` says how often each text counts.

    Texts that count twice are taken for two texts that were drawn independently, as on a resample.

    Raises
    ------
    InfeasibleError
        No candidate passes the tests and satisfies the goal's bounds.
    """
    first, later, counts = _candidates(grid.with_costs(goal.used_costs), weights)
    allowed = _passed(grid, guarantee, counts, weights) & _satisfies(goal, counts)
    if not allowed.any():
        raise InfeasibleError(
            f"{grid.name}: no thresholds have {guarantee} and satisfy: {goal}; ask for less, or tune on more texts"
        )
    value = np.where(allowed, goal.sign * goal.value(goal.metric, counts), -np.inf)
    i, j = np.unravel_index(int(value.argmax()), value.shape)
    thresholds = {grid.stages[0]: float(first[i]), **{stage: float(value) for stage, value in later[j].items()}}
    return Choice(thresholds, counts[i, j], {name: float(goal.value(name, counts[i, j])) for name in goal.metrics})


def choose_or_abstain(grid: ThresholdGrid, goal: Goal, guarantee: Guarantee) -> Choice:
    """Choose as `choose_with_guarantee_on_grid`; where that cannot be done, say what can be guaranteed instead.

    Raises
    ------
    InfeasibleError
        No candidate passes the tests and satisfies the goal's bounds. The message is that of `abstention`.
    """
    try:
        return choose_with_guarantee_on_grid(grid, goal, guarantee)
    except InfeasibleError as error:
        raise InfeasibleError(f"{grid.name}: {abstention(grid, goal, guarantee)}") from error


def _candidates(
    grid: ThresholdGrid, weights: np.ndarray | None
) -> tuple[np.ndarray, list[dict[str, float]], np.ndarray]:
    """Return the first stage's thresholds, the combinations of the later ones', and the counts of each pair of them."""
    first, later_stages = _first_candidates(), grid.stages[1:]
    combinations = product(np.arange(10) / 10, repeat=len(later_stages))
    later = [dict(zip(later_stages, values, strict=True)) for values in combinations]
    grids = [_at_later_thresholds(grid, thresholds) for thresholds in later]
    return first, later, np.stack([fixed.counts_at(first, weights=weights) for fixed in grids], axis=1)


def _passed(grid: ThresholdGrid, guarantee: Guarantee, counts: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return which candidates pass the tests of all bounds: bool, shape (n_first, n_later)."""
    n_first, n_later = counts.shape[:2]
    passed = np.ones((n_first, n_later), dtype=bool)
    is_known = not any(grid.defers)
    directions = [is_known * _IN_SEQUENCE.get(bound.metric, 0) * bound.sign for bound in guarantee.bounds]
    delta = guarantee.delta / len(set(directions)) / n_later
    for direction in set(directions):
        together = [bound for bound, own in zip(guarantee.bounds, directions, strict=True) if own == direction]
        # If one of several bounds is broken, its own p-value is small with that probability only: the largest decides.
        p_value = np.max([_p_values(grid, bound, counts, weights) for bound in together], axis=0)
        if direction:
            order = slice(None, None, direction)
            passed &= np.logical_and.accumulate(p_value[order] <= delta, axis=0)[order]
        else:
            tested = (np.arange(n_first) % _STEP == 0)[:, None]
            passed &= tested & (p_value <= delta / tested.sum())
    return passed


def _satisfies(goal: Goal, counts: np.ndarray) -> np.ndarray:
    """Return at which candidates the goal's own bounds hold on the texts, and its metric is defined."""
    satisfied = ~np.isnan(goal.value(goal.metric, counts))
    for bound in bounds_of(goal.at_least, goal.at_most):
        satisfied &= bound.sign * goal.value(bound.metric, counts) >= bound.sign * bound.value
    return np.asarray(satisfied)


def abstention(grid: ThresholdGrid, goal: Goal, guarantee: Guarantee) -> str:
    """Return, as one line, that no thresholds have a guarantee, and which bounds or which number of texts would do.

    The bounds are the nearest ones for which a candidate passes: one bound relaxed and the others kept; or, where that
    is not enough, all relaxed by the same fraction of the way to 0 (an upper bound: to 1). The number of texts is the
    smallest with which a candidate would pass if further texts had the same outcomes in the same proportions.

    Raises
    ------
    InfeasibleError
        A bounded metric is undefined at all thresholds.
    """
    _, _, counts = _candidates(grid.with_costs(goal.used_costs), None)
    satisfied, bounds = _satisfies(goal, counts), guarantee.bounds
    if not satisfied.any():
        return f"infeasible: no thresholds that are tested for a guarantee satisfy: {goal}; ask for less"

    def is_possible(of: Sequence[Bound], times: float = 1.0) -> bool:
        at_least, at_most = ({bound.metric: bound.value for bound in of if bound.sign == sign} for sign in (1, -1))
        passed = _passed(grid, Guarantee(at_least, at_most, guarantee.delta), counts * times, None)
        return bool((passed & satisfied).any())

    def nearest(relaxed: Sequence[Bound]) -> list[Bound]:
        """Return these bounds as strict as is possible with the others kept; none where no strictness is."""

        def at(share: float) -> list[Bound]:
            return [bound.relax(share) if bound in relaxed else bound for bound in bounds]

        share = _smallest(lambda share: is_possible(at(share)), 0.0, 1.0)
        found = [] if share is None else [bound.relax(share) for bound in relaxed]
        return [] if any(bound.value in (0, 1) for bound in found) else found

    possible = [str(found[0]) for bound in bounds if (found := nearest([bound]))]
    less = f": {' or '.join(possible)} can be guaranteed" if possible else ""
    if len(bounds) > 1 and possible:
        less += ", with the other bounds kept"
    elif len(bounds) > 1 and (together := nearest(bounds)):
        less = f": {' and '.join(map(str, together))} can be guaranteed"
    n_texts, log_times = len(grid.in_scope), _smallest(lambda x: is_possible(bounds, 2.0**x), 0.0, _MAX_DOUBLINGS)
    more = (
        "no number of texts like these is enough"
        if log_times is None
        else f"or tune on about {float(f'{n_texts * 2.0**log_times:.2g}'):,.0f} texts like these {n_texts:,}"
    )
    too = f" and satisfy: {goal}" if goal.at_least or goal.at_most else ""
    return f"abstained: no thresholds have {guarantee}{too}; ask for less{less}; {more}"


def _smallest(holds: Callable[[float], bool], low: float, high: float) -> float | None:
    """Return the smallest number from `low` on for which a condition holds that holds above it too; None: at none."""
    if not holds(high):
        return None
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def keeps_guarantee(grid: ThresholdGrid, outcomes: np.ndarray, guarantee: Guarantee) -> bool:
    """Return whether thresholds that were not chosen on these texts pass the tests of a guarantee.

    `outcomes`, int of shape (n,), are those of the grid's texts at these thresholds.
    """
    counts = count_codes(outcomes)
    return all(float(_p_values(grid, bound, counts, None)) <= guarantee.delta for bound in guarantee.bounds)


def effective_size(groups: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the effective number of texts where groups of them are equal (Kish 1965); 0 for no text.

    It is the square of the sum of the groups' sizes, over the sum of their squares. `weights` says how often each text
    counts; a group that counts twice is two groups.

    >>> effective_size(np.array([0, 0, 0, 1, 1, 1])), effective_size(np.array([0, 1, 2, 3, 3]))
    (2.0, 3.5714285714285716)
    """
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weights = np.ones(len(groups)) if weights is None else weights
    total = float((weights * sizes[codes]).sum())
    return float(weights.sum() ** 2 / total) if total else 0.0


def _first_candidates() -> np.ndarray:
    """Return 483 thresholds from 0 to 1, evenly spaced in log-odds, that have few digits."""
    rarer = [float(f"{1 / (1 + np.exp(x)):.3g}") for x in np.linspace(0, 12, 241)]
    return np.array([0.0, *rarer[::-1], *(round(1 - value, 12) for value in rarer[1:]), 1.0])


def _p_values(grid: ThresholdGrid, bound: Bound, counts: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the p-value of the hypothesis that a bound is broken, for counts of shape (..., 6 or 8) to (...).

    Raises InfeasibleError where no text counts for the metric, whatever the thresholds.
    """
    hits, n = (number_of(counts, names) for names in FRACTIONS[bound.metric])
    if not np.any(n):
        raise InfeasibleError(f"{grid.name}: {bound.metric} is undefined, no text counts for it; {BOTH_KINDS}")
    of_scope = {IN_SCOPE: grid.in_scope, OUT_OF_SCOPE: ~grid.in_scope}
    whole = FRACTIONS[bound.metric][1]
    # Which texts are answered or rejected depends on the thresholds: the kind of text that repeats the most decides.
    kinds = [of_scope[whole]] if whole in of_scope else [*of_scope.values(), np.ones_like(grid.in_scope)]
    shares = []
    for is_counted in kinds:
        counted = None if weights is None else weights[is_counted]
        n_counted = is_counted.sum() if counted is None else counted.sum()
        if n_counted:
            shares.append(effective_size(grid.groups[is_counted], counted) / n_counted)
    share = min(shares)
    misses, at_least = (n - hits, bound.value) if bound.sign > 0 else (hits, 1 - bound.value)
    return _binomial_cdf(misses * share, n * share, 1 - at_least)


def _binomial_cdf(k: np.ndarray, n: np.ndarray, p: float) -> np.ndarray:
    """Return the probability of at most `k` of `n`, which need not be whole numbers (the incomplete beta function)."""
    with np.errstate(invalid="ignore"):
        return np.where(k >= n, 1.0, betainc(n - k, k + 1, 1 - p))


def _at_later_thresholds(grid: ThresholdGrid, thresholds: Mapping[str, float]) -> ThresholdGrid:
    """Return the grid of the first stage, with the later stages' thresholds fixed."""
    return grid.fix({stage: int(grid.index(stage, value)) for stage, value in thresholds.items()})
