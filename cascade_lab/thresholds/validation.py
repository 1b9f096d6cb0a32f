"""Says how far chosen thresholds can be trusted: bootstrap, cross-validation, other texts, other prevalences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.model_selection import RepeatedStratifiedKFold
from tqdm.auto import tqdm

from cascade_lab.analysis.bootstrap import Interval, interval, resample_counts
from cascade_lab.analysis.latency import stage_latencies
from cascade_lab.analysis.metrics import outcome_intervals
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.analysis.paired import mcnemar
from cascade_lab.exceptions import GoalError, InfeasibleError, RunError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.guarantee import Guarantee, choose_with_guarantee_on_grid
from cascade_lab.thresholds.objective import LATENCIES, Goal
from cascade_lab.thresholds.search import Choice, choose_on_grid, min_held_fraction

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

Procedure = Callable[[np.ndarray], np.ndarray]
"""Takes how often each text counts, shape (n,), and returns each text's outcome in the cascade chosen on these texts.

It raises InfeasibleError where nothing can be chosen.
"""

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
    procedure: Procedure | None = None,
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
    procedure : function, optional
        How the cascade is chosen, and what its texts' outcomes are then (see `Procedure`); by default the thresholds
        that are best for `goal`.
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
    procedure = procedure or threshold_procedure(run, goal, grid)
    rows, splits = [], list(folds(grid, n_repeats, n_folds, seed))
    for train, test in tqdm(splits, "folds", disable=not progress, leave=False):
        try:
            outcomes = procedure(train)
        except InfeasibleError:
            continue
        parts = {"tuned": train, "held_out": test}
        counts = {part: np.bincount(outcomes, weights, len(OUTCOMES)) for part, weights in parts.items()}
        rows.append({(name, part): float(goal.value(name, counts[part])) for name in goal.metrics for part in parts})
    columns = pd.MultiIndex.from_product([goal.metrics, ["tuned", "held_out"]])
    table = pd.DataFrame(rows, columns=columns, dtype=np.float64)
    result = {}
    for name in goal.metrics:
        tuned, left_out = table[name, "tuned"], table[name, "held_out"]
        optimism = tuned - left_out
        error = corrected_standard_error(optimism.to_numpy(), n_folds)
        result[name] = [tuned.mean(), left_out.mean(), optimism.mean(), error]
    columns = ["tuned", "held_out", "optimism", "standard_error"]
    result = pd.DataFrame.from_dict(result, orient="index", columns=columns).rename_axis("metric")
    result.attrs["infeasible"] = 1 - len(rows) / len(splits)
    return result


def threshold_procedure(run: Run, goal: Goal, grid: ThresholdGrid, guarantee: Guarantee | None = None) -> Procedure:
    """Return the procedure that chooses the thresholds of a grid, with a guarantee or without."""
    min_held = min_held_fraction(run, goal)

    def outcomes(weights: np.ndarray) -> np.ndarray:
        chosen = choose_thresholds(grid, goal, guarantee, min_held=min_held, weights=weights)
        return grid.outcomes_at(grid.indices(chosen.thresholds))

    return outcomes


def choose_thresholds(
    grid: ThresholdGrid,
    goal: Goal,
    guarantee: Guarantee | None = None,
    *,
    min_held: float = 0.0,
    weights: np.ndarray | None = None,
) -> Choice:
    """Choose thresholds on a grid, with a guarantee or without; `min_held` and `weights` as in `choose_on_grid`."""
    if guarantee is not None:
        return choose_with_guarantee_on_grid(grid, goal, guarantee, weights=weights)
    return choose_on_grid(grid, goal, min_held=min_held, weights=weights)


def held_out(tuned: Run, test: Run, thresholds: Mapping[str, float], goal: Goal) -> pd.DataFrame:
    """Return what thresholds that were chosen on `tuned` do on another run.

    On both runs the cascade is that of `tuned` at these thresholds: whatever else `test` was made with, such as
    another temperature, is not used.

    Returns
    -------
    DataFrame
        One row per metric: `tuned`, on the texts that the thresholds were chosen on; `held_out`, on the texts of
        `test`; `low` and `high`, the 95% interval of the latter (bootstrap).

    Raises
    ------
    GoalError
        Most texts of `test` are texts of `tuned`.
    RunError
        `test` has other stages than `tuned`.
    """
    check_separate(tuned, test)
    test = _as_cascade(test, tuned.spec)
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
    guarantee: Guarantee | None = None,
) -> pd.DataFrame:
    """Choose thresholds again for other fractions of texts out of scope, by reweighting the run's texts.

    Parameters
    ----------
    run, goal, stages, grid
        As in `choose`; the goal's own prevalence is not used.
    prevalences : sequence of float
        Fractions of texts out of scope, between 0 and 1.
    guarantee : Guarantee, optional
        What the chosen thresholds guarantee, at any prevalence.

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
            chosen = choose_thresholds(grid, reweighted, guarantee, min_held=min_held_fraction(run, reweighted))
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
    guarantee: Guarantee | None = None,
    cascade: CascadeSpec | None = None,
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
    guarantee : Guarantee, optional
        What the thresholds of both guarantee.
    cascade : CascadeSpec, optional
        The cascade as it was tuned already; then only the last stage alone is tuned here.

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
    # A bound on the latency of a cascade says nothing of its last stage alone.
    alone_goal = replace(goal, at_most={name: value for name, value in goal.at_most.items() if name not in LATENCIES})
    if cascade is None:
        grid = grid or ThresholdGrid.from_run(tuned, stages)
        min_held = min_held_fraction(tuned, goal)
        cascade = tuned.spec.with_thresholds(choose_thresholds(grid, goal, guarantee, min_held=min_held).thresholds)
    alone_grid = ThresholdGrid.from_run(tuned, [last.name], gates)
    alone = {**gates, **choose_thresholds(alone_grid, alone_goal, guarantee).thresholds}
    specs = {"cascade": cascade, "last stage alone": tuned.spec.with_thresholds(alone)}
    rows, correct = [], []
    for name, spec in specs.items():
        run = _as_cascade(test.labelled, spec)
        correct.append((run.predictions["label"] == run.predictions["predicted"]).to_numpy())
        thresholds = {stage: value for stage, value in spec.thresholds.items() if value is not None}
        row: dict[str, Any] = {"": name, "thresholds": thresholds}
        for metric, found in metrics_at(run, {}, goal).items():
            row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
        rows.append({**row, "mean_ms": _mean_ms(run, [last.name] if name == "last stage alone" else None)})
    wins, losses = int((correct[0] & ~correct[1]).sum()), int((correct[1] & ~correct[0]).sum())
    return pd.DataFrame(rows).set_index("").assign(p_value=mcnemar(wins, losses))


def _mean_ms(run: Run, stages: Sequence[str] | None = None) -> float:
    """Return the mean time of a text at the stages that it reaches, or at some stages alone; NaN without times."""
    if not len(run.timings):
        return np.nan
    ms = {name: latency.text_ms.mean() for name, latency in stage_latencies(run).items() if len(latency.text_ms)}
    if stages is not None:
        return float(sum(ms.get(name, np.nan) for name in stages))
    total = 0.0
    for stage in run.spec.stages:
        scores = run.scores(stage.name)
        reach = float((scores.scored & ~scores.shadow).mean())
        total += reach * ms.get(stage.name, np.nan) if reach else 0.0
    return float(total)


def _as_cascade(test: Run, spec: CascadeSpec) -> Run:
    """Return `test` as the cascade `spec` would have made it; raise RunError if it has other stages."""
    for own, wanted in zip_longest(test.spec.stages, spec.stages):
        if own is None or wanted is None or (own.name, own.labels) != (wanted.name, wanted.labels):
            names = ", ".join(stage.name for stage in spec.stages)
            raise RunError(
                f"{test.name}: its stages or their labels are not those of the tuned cascade ({names}); give a run of "
                "the same cascade on other texts"
            )
    return test.with_spec(spec)


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
