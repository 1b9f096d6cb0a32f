"""Says how far chosen thresholds can be trusted: bootstrap, cross-validation, other texts, other prevalences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import RepeatedStratifiedKFold
from tqdm.auto import tqdm

from cascade_lab.analysis.bootstrap import Interval, interval, resample_counts
from cascade_lab.analysis.latency import predicted_latency
from cascade_lab.analysis.metrics import outcome_intervals
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.analysis.paired import mcnemar
from cascade_lab.exceptions import GoalError, InfeasibleError, RunError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.search import choose, choose_on_grid, min_held_fraction

if TYPE_CHECKING:
    from cascade_lab.run import Run

_MAX_LINES = 160  # thresholds per stage on a resample
_N_STARTS = 1  # random starts on a resample, with three or more stages


class ThresholdBootstrap(NamedTuple):
    """Thresholds chosen again on resampled texts.

    Attributes
    ----------
    thresholds : DataFrame
        One row per resample, one column per stage; without the resamples on which the goal is infeasible.
    metrics : dict of str to Interval
        Each metric of the choice on the texts themselves, with the interval of what the choice on each resample
        reaches on that resample.
    infeasible : float
        The fraction of resamples on which no thresholds satisfy the goal.
    """

    thresholds: pd.DataFrame
    metrics: dict[str, Interval]
    infeasible: float


def bootstrap_thresholds(
    run: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    grid: ThresholdGrid | None = None,
    n_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> ThresholdBootstrap:
    """Choose thresholds again on resampled texts (bootstrap; Efron 1979), out of about 160 per stage.

    Half of the 160 are spread evenly over the texts in scope, and half over the others. With three or more stages, each
    search starts from the choice on all texts and from one random start.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`.
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
    grid = grid or ThresholdGrid.from_run(run, stages)
    min_held = min_held_fraction(run, goal)
    chosen = choose_on_grid(grid, goal, min_held=min_held)
    draws = resample_counts(len(grid.in_scope), n_resamples=n_resamples, seed=seed)
    thresholds, metrics = [], []
    for weights in tqdm(draws, "resamples", disable=not progress, leave=False):
        try:
            again = choose_on_grid(
                grid,
                goal,
                min_held=min_held,
                weights=weights,
                max_lines=_MAX_LINES,
                start=chosen.thresholds,
                n_starts=_N_STARTS,
            )
        except InfeasibleError:
            continue
        thresholds.append(again.thresholds)
        metrics.append(again.metrics)
    table = pd.DataFrame(metrics, columns=list(goal.metrics))
    return ThresholdBootstrap(
        pd.DataFrame(thresholds, columns=list(grid.stages)),
        {name: interval(value, table[name].to_numpy(), level=level) for name, value in chosen.metrics.items()},
        1 - len(thresholds) / n_resamples,
    )


def cross_validate(
    run: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    grid: ThresholdGrid | None = None,
    n_repeats: int = 10,
    n_folds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return how much better metrics are on the texts that thresholds are chosen on than on other texts.

    Repeated cross-validation, stratified by whether a text is in scope: thresholds are chosen on all folds but one, and
    their metrics there are compared with those on the fold left out.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`.
    n_repeats, n_folds, seed : int
    progress : bool
        Show a progress bar.

    Returns
    -------
    DataFrame
        One row per metric: `tuned` and `held_out`, means over folds; `optimism`, the first minus the second; and its
        `standard_error` (see `corrected_standard_error`). `attrs["infeasible"]` is the fraction of folds on which no
        thresholds satisfy the goal.

    Raises
    ------
    RunError
        As `ThresholdGrid.from_run`.
    """
    grid = grid or ThresholdGrid.from_run(run, stages)
    min_held, rows = min_held_fraction(run, goal), []
    splits = list(folds(grid, n_repeats, n_folds, seed))
    for train, test in tqdm(splits, "folds", disable=not progress, leave=False):
        try:
            chosen = choose_on_grid(grid, goal, min_held=min_held, weights=train)
        except InfeasibleError:
            continue
        counts = np.bincount(grid.outcomes_at(grid.indices(chosen.thresholds)), test, len(OUTCOMES))
        held_out = {(name, "held_out"): float(goal.value(name, counts)) for name in goal.metrics}
        rows.append({**{(name, "tuned"): value for name, value in chosen.metrics.items()}, **held_out})
    table = pd.DataFrame(rows, columns=pd.MultiIndex.from_product([goal.metrics, ["tuned", "held_out"]]))
    result = {}
    for name in goal.metrics:
        tuned, left_out = table[name, "tuned"], table[name, "held_out"]
        optimism = (tuned - left_out).to_numpy()
        error = corrected_standard_error(optimism, n_folds)
        result[name] = [tuned.mean(), left_out.mean(), np.nanmean(optimism) if rows else np.nan, error]
    columns = ["tuned", "held_out", "optimism", "standard_error"]
    result = pd.DataFrame.from_dict(result, orient="index", columns=columns).rename_axis("metric")
    result.attrs["infeasible"] = 1 - len(rows) / len(splits)
    return result


def held_out(tuned: Run, test: Run, thresholds: Mapping[str, float], goal: Goal) -> pd.DataFrame:
    """Return what thresholds that were chosen on `tuned` do on another run.

    Returns
    -------
    DataFrame
        One row per metric: `tuned`, on the texts that the thresholds were chosen on; `held_out`, on the texts of
        `test`; `low` and `high`, the 95% interval of the latter (bootstrap).

    Raises
    ------
    GoalError
        Most texts of `test` are texts of `tuned`.
    """
    check_separate(tuned, test)
    on_tuned, on_test = metrics_at(tuned, thresholds, goal), metrics_at(test, thresholds, goal)
    rows = {name: [on_tuned[name].value, *on_test[name]] for name in goal.metrics}
    columns = ["tuned", "held_out", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("metric")


def choose_by_prevalence(
    run: Run,
    goal: Goal,
    prevalences: Sequence[float],
    stages: Sequence[str] | None = None,
    *,
    grid: ThresholdGrid | None = None,
) -> pd.DataFrame:
    """Choose thresholds again for other fractions of texts out of scope, by reweighting the run's texts.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`; the goal's own prevalence is not used.
    prevalences : sequence of float
        Fractions of texts out of scope, between 0 and 1.

    Returns
    -------
    DataFrame
        One row per prevalence: the thresholds, one column per stage, and the goal's metrics at that prevalence. NaN
        where no thresholds satisfy the goal.
    """
    grid, rows = grid or ThresholdGrid.from_run(run, stages), {}
    for prevalence in prevalences:
        reweighted = replace(goal, prevalence=prevalence)
        try:
            chosen = choose_on_grid(grid, reweighted, min_held=min_held_fraction(run, reweighted))
            rows[prevalence] = {**chosen.thresholds, **chosen.metrics}
        except InfeasibleError:
            rows[prevalence] = {}
    columns = [*grid.stages, *goal.metrics]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).rename_axis("prevalence")


def compare_without_gate(
    tuned: Run,
    test: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    grid: ThresholdGrid | None = None,
) -> pd.DataFrame:
    """Compare the cascade with its last stage alone, each with thresholds chosen for `goal`.

    Thresholds are chosen on `tuned`, and compared on `test`. The last stage alone rejects by its `min_probability`.

    Parameters
    ----------
    tuned, test : Run
        With shadow scores.
    goal : Goal
    stages, grid
        For the cascade, as in `choose`.

    Returns
    -------
    DataFrame
        Rows `cascade` and `last stage alone`: `thresholds`; the goal's metrics and their 95% intervals
        (`<metric>_low`, `<metric>_high`); `mean_ms`, the predicted milliseconds per text from the times of `test` (NaN
        where it has none); and `p_value`, of McNemar's exact test that both are right equally often.

    Raises
    ------
    GoalError
        Most texts of `test` are texts of `tuned`.
    RunError
        The cascade has no gate, or its last stage cannot reject.
    """
    check_separate(tuned, test)
    last, gates = tuned.spec.last, {stage.name: 0.0 for stage in tuned.spec.stages if stage.is_gate}
    if not gates or not last.reject_labels:
        raise RunError(f"{tuned.name}: this comparison needs a gate, and a reject_label of the last stage; add them")
    chosen = {
        "cascade": choose(tuned, goal, stages, grid=grid).thresholds,
        "last stage alone": {**gates, **choose(tuned, goal, [last.name], thresholds=gates).thresholds},
    }
    test, rows, correct = test.labelled, [], []
    for name, thresholds in chosen.items():
        predictions = test.replay(thresholds)
        correct.append((predictions["label"] == predictions["predicted"]).to_numpy())
        row: dict[str, Any] = {"": name, "thresholds": thresholds}
        for metric, found in metrics_at(test, thresholds, goal).items():
            row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
        reach = float((predictions["decided_by"] != test.spec.stages[0].name).mean())
        rows.append({**row, "mean_ms": _mean_ms(test, reach) if name == "cascade" else _mean_ms_of_later_stages(test)})
    wins, losses = int((correct[0] & ~correct[1]).sum()), int((correct[1] & ~correct[0]).sum())
    return pd.DataFrame(rows).set_index("").assign(p_value=mcnemar(wins, losses))


def _mean_ms(run: Run, reach: float) -> float:
    return float(predicted_latency(run, reach)["mean_ms"][0]) if len(run.timings) else np.nan


def _mean_ms_of_later_stages(run: Run) -> float:
    return _mean_ms(run, 1.0) - _mean_ms(run, 0.0)


def check_separate(tuned: Run, test: Run) -> None:
    """Raise GoalError if most texts of `test` are texts of `tuned`: metrics on them would be too good."""
    tuned_texts, test_texts = (
        {*zip(run.examples["text"], run.examples["text_b"], strict=True)} for run in (tuned, test)
    )
    if len(tuned_texts & test_texts) > len(test_texts) / 2:
        raise GoalError(
            f"{test.name} has the texts of {tuned.name}, and thresholds look better on the texts that they were chosen "
            "on; report on a run of another set"
        )


def metrics_at(
    run: Run,
    thresholds: Mapping[str, float],
    goal: Goal,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return every metric of the goal at given thresholds, with its bootstrap interval over texts.

    Parameters
    ----------
    run : Run
    thresholds : mapping of str to float
        As `Run.replay` takes them.
    goal : Goal
        Its costs and its prevalence are used.
    level : float
        Of the intervals.
    n_resamples, seed : int
    """
    run = run.labelled
    counts = outcome_counts(run.spec, run.replay(thresholds)).to_numpy()
    return outcome_intervals(
        counts,
        goal.metrics,
        costs=goal.costs,
        prevalence=goal.prevalence,
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )


def folds(grid: ThresholdGrid, n_repeats: int, n_folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the weights, 0 or 1, of the texts in each training part and in the fold left out: shapes (n,)."""
    n = len(grid.in_scope)
    split = RepeatedStratifiedKFold(n_splits=n_folds, n_repeats=n_repeats, random_state=seed)
    for train, test in split.split(np.zeros(n), grid.in_scope):
        yield np.bincount(train, minlength=n), np.bincount(test, minlength=n)


def corrected_standard_error(differences: np.ndarray, n_folds: int) -> float:
    """Return the standard error of a mean over folds whose training parts share texts (Nadeau and Bengio 2003).

    The variance of `differences` is multiplied by 1 / n + 1 / (n_folds - 1) instead of 1 / n. NaN where fewer than two
    of them are defined.

    >>> round(corrected_standard_error(np.array([0.1, 0.3, 0.2, 0.4]), 5), 4)
    0.0913
    """
    n = int((~np.isnan(differences)).sum())
    return float(np.sqrt((1 / n + 1 / (n_folds - 1)) * np.nanvar(differences, ddof=1))) if n > 1 else np.nan
