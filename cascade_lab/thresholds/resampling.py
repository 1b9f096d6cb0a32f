"""Says how far a choice can be trusted from its own texts: choosing again on resampled texts, and cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import RepeatedStratifiedKFold
from tqdm.auto import tqdm

from cascade_lab.analysis.bootstrap import Interval, resamples
from cascade_lab.exceptions import InfeasibleError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.grid_part import kinds_of_texts
from cascade_lab.thresholds.guarantee import (
    Bound,
    Guarantee,
    bounds_of,
    choose_with_guarantee_on_grid,
)
from cascade_lab.thresholds.new_texts import difference_on_new_texts, interval_on_new_texts
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.search import Choice, choose_on_grid, min_held_fraction

if TYPE_CHECKING:
    from cascade_lab.run import Run

N_FOLDS = 5
MAX_EXACT = 200_000
"""With more texts, cross-validation does not try every threshold: the search of one fold would take seconds."""
MAX_THRESHOLDS = 512
"""How many thresholds per stage it tries then."""
_MAX_ON_RESAMPLE = 160  # thresholds per stage on a resample
_N_STARTS = 1  # random starts on a resample, with three or more stages


class Chosen(NamedTuple):
    """A cascade that a `Procedure` chose: its thresholds, and each text's outcome in it, shape (n,)."""

    thresholds: dict[str, float]
    outcomes: np.ndarray


Procedure = Callable[[np.ndarray], Chosen]
"""Chooses a cascade on texts of a grid; takes how often each text counts, shape (n,).

It raises InfeasibleError where nothing can be chosen.
"""


def choose_thresholds(
    grid: ThresholdGrid,
    goal: Goal,
    guarantee: Guarantee | None = None,
    *,
    min_held: float = 0.0,
    weights: np.ndarray | None = None,
    near: Mapping[str, float] | None = None,
    indices: Sequence[np.ndarray] | None = None,
) -> Choice:
    """Choose thresholds on a grid, with a guarantee or without; `min_held` and `weights` as in `choose_on_grid`.

    With `near`, the choice on all texts, the search is faster: without a guarantee it tries about 160 thresholds per
    stage, half of them spread evenly over the texts in scope and half over the others; and with three or more stages it
    starts from `near` and from one random start. `indices` are as in `choose_on_grid`.
    """
    if guarantee is not None:
        return choose_with_guarantee_on_grid(grid, goal, guarantee, weights=weights)
    fast: dict[str, Any] = {} if near is None else {"max_lines": _MAX_ON_RESAMPLE, "start": near, "n_starts": _N_STARTS}
    fast |= {} if indices is None else {"indices": indices}
    return choose_on_grid(grid, goal, min_held=min_held, weights=weights, **fast)


def threshold_procedure(
    run: Run,
    goal: Goal,
    grid: ThresholdGrid,
    guarantee: Guarantee | None = None,
    *,
    near: Mapping[str, float] | None = None,
    indices: Sequence[np.ndarray] | None = None,
) -> Procedure:
    """Return the procedure that chooses the thresholds of a grid; the options are those of `choose_thresholds`."""
    min_held, grid = min_held_fraction(run, goal), grid.with_costs(goal.used_costs)

    def choose_again(weights: np.ndarray) -> Chosen:
        options: dict[str, Any] = {"min_held": min_held, "weights": weights, "near": near, "indices": indices}
        choice = choose_thresholds(grid, goal, guarantee, **options)
        thresholds = choice.thresholds
        return Chosen(thresholds, grid.outcomes_at(grid.indices(thresholds)))

    return choose_again


class ThresholdBootstrap(NamedTuple):
    """Thresholds chosen again on resampled texts.

    Attributes
    ----------
    thresholds : DataFrame
        One row per resample, one column per stage; without the resamples on which the goal is infeasible.
    metrics : dict of str to Interval
        Each metric of the choice on the texts themselves, with the interval of what it is on new texts; the interval
        allows for the choice.
    infeasible : float
        The fraction of resamples on which no thresholds satisfy the goal.
    differences : dict of str to Interval
        Each metric of the choice minus that of the cascade `own`, with the interval of the difference on new texts;
        empty without `own`.
    """

    thresholds: pd.DataFrame
    metrics: dict[str, Interval]
    infeasible: float
    differences: dict[str, Interval]


def bootstrap_thresholds(
    run: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    grid: ThresholdGrid | None = None,
    procedure: Procedure | None = None,
    outcomes: np.ndarray | None = None,
    near: Mapping[str, float] | None = None,
    own: np.ndarray | None = None,
    n_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> ThresholdBootstrap:
    """Choose thresholds again on resampled texts (bootstrap; Efron 1979). Texts that are equal are drawn together.

    A metric of the chosen cascade is too high on the texts that it was chosen on. How much too high is estimated by
    what happens on the resamples: the metric of their choice on the resample, minus that on all texts (Efron 1983).
    The mean of these differences is subtracted from the metric. Their variance gives the number of texts of Wilson's
    interval (1927) around the result. The interval is widened to contain the metric itself where it does not.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`.
    procedure : function, optional
        How the cascade is chosen (see `Procedure`); by default the thresholds that are best for `goal`, by the faster
        search of `choose_thresholds`.
    outcomes : ndarray of int, shape (n,), optional
        Each text's outcome in the cascade that the metrics are of; by default the one that `choose` returns.
    near : mapping of str to float, optional
        The thresholds that `choose` returns, where they are known.
    own : ndarray of int, shape (n,), optional
        Each text's outcome in a cascade that was not chosen on these texts, to compare with.
    n_resamples, seed : int
    level : float
        Of the intervals.
    progress : bool
        Show a progress bar.

    Raises
    ------
    InfeasibleError
        No thresholds satisfy the goal on the texts themselves.
    RunError
        As `ThresholdGrid.from_run`.
    """
    grid = (grid or ThresholdGrid.from_run(run, stages)).with_costs(goal.used_costs)
    if outcomes is None or (procedure is None and near is None):
        chosen = threshold_procedure(run, goal, grid)(np.ones(len(grid.in_scope), dtype=np.int64))
        outcomes = chosen.outcomes if outcomes is None else outcomes
        near = near or chosen.thresholds
    n_texts, kinds, own_codes = None, None, own
    if procedure is None and len(grid.stages) <= 2:
        # The faster search tries the same thresholds on each resample. It needs the texts of each kind, not each text.
        indices = grid.subsample_by_scope(_MAX_ON_RESAMPLE)
        codes = np.zeros(len(grid.in_scope), dtype=np.int64) if own is None else own
        of_kind, kinds, n_texts, codes = kinds_of_texts(grid, indices, codes)
        own_codes = None if own is None else codes
        procedure = threshold_procedure(run, goal, of_kind, indices=indices)
    procedure = procedure or threshold_procedure(run, goal, grid, near=near)
    options: dict[str, Any] = {"n_resamples": n_resamples, "level": level}
    draws = resamples(len(grid.in_scope), groups=grid.groups, kinds=kinds, n_resamples=n_resamples, seed=seed)
    thresholds, on_resample, on_texts, own_on_resample = [], [], [], []
    for weights in tqdm(draws, "resamples", total=n_resamples, disable=not progress, leave=False):
        try:
            again = procedure(weights)
        except InfeasibleError:
            continue
        thresholds.append(again.thresholds)
        on_resample.append(goal.count(again.outcomes, weights))
        on_texts.append(goal.count(again.outcomes, n_texts))
        if own_codes is not None:
            own_on_resample.append(goal.count(own_codes, weights))
    shape = (len(thresholds), len(goal.count(outcomes)))
    resampled = np.reshape(on_resample, shape), np.reshape(on_texts, shape)
    differences = {}
    if own is not None:
        compared = outcomes, own, *resampled, np.reshape(own_on_resample, shape)
        differences = {name: difference_on_new_texts(name, goal, grid, *compared, **options) for name in goal.metrics}
    return ThresholdBootstrap(
        pd.DataFrame(thresholds, columns=list(grid.stages)),
        {name: interval_on_new_texts(name, goal, grid, outcomes, *resampled, **options) for name in goal.metrics},
        1 - len(thresholds) / n_resamples,
        differences,
    )


def cross_validate(
    run: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    grid: ThresholdGrid | None = None,
    procedure: Procedure | None = None,
    own: np.ndarray | None = None,
    n_repeats: int = 10,
    n_folds: int = N_FOLDS,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return how much better metrics are on the texts that thresholds are chosen on than on other texts.

    Repeated cross-validation, stratified by whether a text is in scope; equal texts are in one fold. Thresholds are
    chosen on all folds but one, and replayed there and on the fold left out. Outcomes are counted over all folds, and
    each metric is computed once from these counts.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`.
    procedure : function, optional
        How the cascade is chosen (see `Procedure`); by default the thresholds that are best for `goal`. With more than
        `MAX_EXACT` texts, these are the best of about 512 per stage, at equal distances among all of them.
    own : ndarray of int, shape (n,), optional
        Each text's outcome in a cascade that was not chosen on these texts, to compare with.
    n_repeats, n_folds, seed : int
    progress : bool
        Show a progress bar.

    Returns
    -------
    DataFrame
        One row per metric: `tuned`, on the texts of the choices; `held_out`, on the folds left out; `optimism`, the
        first minus the second; and its `standard_error` (see `corrected_standard_error`). With `own` also `own`, that
        cascade on the folds left out. `kept` is the fraction of folds left out on which the goal's bounds on the metric
        hold; NaN without a bound. `attrs["n_folds"]` is how many folds there are, in all repeats, and
        `attrs["n_infeasible"]` on how many of them no thresholds satisfy the goal; these are left out.
        `attrs["n_thresholds"]` is how many of each stage were tried, where that was not every one. With too few
        texts for `folds`, there are none, and everything is NaN.

    Raises
    ------
    RunError
        As `ThresholdGrid.from_run`.
    """
    grid = (grid or ThresholdGrid.from_run(run, stages)).with_costs(goal.used_costs)
    indices = None
    if procedure is None:
        has_many = len(grid.in_scope) > MAX_EXACT and max(map(len, grid.thresholds)) > MAX_THRESHOLDS
        indices = grid.subsample(MAX_THRESHOLDS) if has_many and len(grid.stages) <= 2 else None
        procedure = threshold_procedure(run, goal, grid, indices=indices)
    counts, n_splits = [], 0
    own_counts = 0.0 * goal.count(grid.outcomes[0])
    splits = folds(grid, n_repeats, n_folds, seed)
    for train, test in tqdm(splits, "folds", total=n_repeats * n_folds, disable=not progress, leave=False):
        n_splits += 1
        try:
            outcomes = procedure(train).outcomes
        except InfeasibleError:
            continue
        counts.append([goal.count(outcomes, weights) for weights in (train, test)])
        own_counts += 0 if own is None else goal.count(own, test)
    by_fold = np.reshape(counts, (len(counts), 2, len(own_counts)))
    rows = {}
    for name in goal.metrics:
        tuned, held_out = (float(value) for value in goal.value(name, by_fold.sum(axis=0)))
        optimism, error = pooled(partial(_optimism, name, goal), by_fold, n_folds)
        rows[name] = [tuned, held_out, optimism, error]
    columns = ["tuned", "held_out", "optimism", "standard_error"]
    result = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("metric")
    if own is not None:
        result["own"] = [float(goal.value(name, own_counts)) for name in goal.metrics]
    bounds = bounds_of(goal.at_least, goal.at_most)
    result["kept"] = [_fraction_kept(name, goal, bounds, by_fold[:, 1]) for name in goal.metrics]
    result.attrs |= {"n_folds": n_splits, "n_infeasible": n_splits - len(counts)}
    result.attrs |= {} if indices is None else {"n_thresholds": MAX_THRESHOLDS}
    return result


def _fraction_kept(name: str, goal: Goal, bounds: Sequence[Bound], by_fold: np.ndarray) -> float:
    """Return the fraction of folds on which all bounds on a metric hold; NaN where none is defined, or without one."""
    values = goal.value(name, by_fold)
    values = values[~np.isnan(values)]
    of_metric = [bound for bound in bounds if bound.metric == name]
    if not of_metric or not len(values):
        return np.nan
    return float(np.mean([all(bound.holds(value) for bound in of_metric) for value in values]))


def _optimism(name: str, goal: Goal, counts: np.ndarray) -> np.ndarray:
    """Return a metric on the texts of the choice minus that on the others: counts of shape (..., 2, 6) to (...)."""
    return -np.diff(goal.value(name, counts))[..., 0]


def folds(grid: ThresholdGrid, n_repeats: int, n_folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the weights, 0 or 1, of the texts in each training part and in the fold left out: shapes (n,).

    Folds are stratified by whether a text is in scope, and equal texts are in one fold. There are none where neither
    the texts in scope nor those out of scope are at least `n_folds` different ones.
    """
    _, first, codes, sizes = np.unique(grid.groups, return_index=True, return_inverse=True, return_counts=True)
    in_scope = np.bincount(codes, grid.in_scope) * 2 >= sizes
    # In the order of their first texts, so that distinct texts are split as without groups.
    order = np.argsort(first)
    if max(in_scope.sum(), (~in_scope).sum()) < n_folds:
        return
    with warnings.catch_warnings():
        # scikit-learn warns of fewer texts of one kind than folds; some folds then have none of that kind.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        split = RepeatedStratifiedKFold(n_splits=n_folds, n_repeats=n_repeats, random_state=seed)
        for _, test in split.split(order, in_scope[order]):
            left_out = np.zeros(len(order), dtype=np.int64)
            left_out[order[test]] = 1
            yield 1 - left_out[codes], left_out[codes]


def pooled(statistic: Callable[[np.ndarray], np.ndarray], by_fold: np.ndarray, n_folds: int) -> tuple[float, float]:
    """Return a statistic of the sum of all folds' counts, and its standard error.

    The error is that of the mean of the folds' pseudo-values (the jackknife: Tukey 1958): `corrected_standard_error`.

    Parameters
    ----------
    statistic : function
        Takes counts, shape (..., *shape of one fold's counts), and returns shape (...).
    by_fold : ndarray, shape (n, ...)
        The counts of each fold of all repeats.
    n_folds : int
        Folds per repeat.
    """
    n, total = len(by_fold), by_fold.sum(axis=0)
    value = float(statistic(total))
    pseudo_values = n * value - (n - 1) * np.reshape(statistic(total - by_fold), n)
    return value, corrected_standard_error(pseudo_values, n_folds)


def corrected_standard_error(values: np.ndarray, n_folds: int) -> float:
    """Return the standard error of a mean over folds whose training parts share texts (Nadeau and Bengio 2003).

    The variance of `values` is multiplied by 1 / n + 1 / (n_folds - 1) instead of 1 / n. NaN where fewer than two of
    them are defined.

    >>> round(corrected_standard_error(np.array([0.1, 0.3, 0.2, 0.4]), 5), 4)
    0.0913
    """
    n = int((~np.isnan(values)).sum())
    return float(np.sqrt((1 / n + 1 / (n_folds - 1)) * np.nanvar(values, ddof=1))) if n > 1 else np.nan
