"""Compares chosen thresholds: on other texts, at other fractions of texts out of scope, and without the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.costs import run_codes, text_codes
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.latency import stage_latencies
from cascade_lab.analysis.paired import mcnemar, outcome_differences
from cascade_lab.exceptions import GoalError, InfeasibleError, RunError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.guarantee import Guarantee
from cascade_lab.thresholds.objective import LATENCIES, Goal
from cascade_lab.thresholds.resampling import choose_thresholds
from cascade_lab.thresholds.search import min_held_fraction

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec


def held_out(tuned: Run, test: Run, thresholds: Mapping[str, float], goal: Goal) -> pd.DataFrame:
    """Return what thresholds that were chosen on `tuned` do on another run.

    On both runs the cascade is that of `tuned` at these thresholds: whatever else `test` was made with, such as
    another temperature, is not used.

    Returns
    -------
    DataFrame
        One row per metric: `tuned`, on the texts that the thresholds were chosen on; `held_out`, on the texts of
        `test`; `low` and `high`, the 95% interval of the latter (see `metrics_at`).

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


def difference_on(test: Run, own: CascadeSpec, chosen: CascadeSpec, goal: Goal) -> pd.DataFrame:
    """Compare two cascades on the texts of another run, with paired intervals: see `outcome_differences`.

    Raises
    ------
    RunError
        `test` has other stages than they.
    """
    outcome_a, outcome_b = (run_codes(_as_cascade(test, spec), goal.used_costs) for spec in (own, chosen))
    options: dict[str, Any] = {"costs": goal.used_costs, "prevalence": goal.prevalence}
    return outcome_differences(outcome_a, outcome_b, goal.metrics, groups=test.text_groups, **options)


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
        What the chosen thresholds guarantee: bounds on metrics that no prevalence changes.

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
    last = tuned.spec.last
    # A gate passes every text at 0, and a deferral stage defers every text at 1 (but one of which it is entirely sure).
    gates = {stage.name: 0.0 if stage.is_gate else 1.0 for stage in tuned.spec.stages[:-1]}
    if not any(stage.is_gate for stage in tuned.spec.stages) or not last.reject_labels:
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
    """Return every metric of the goal at given thresholds, with its interval over texts (see `outcome_intervals`).

    The interval is for thresholds that were not chosen on this run's texts.

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
    predictions = run.replay(thresholds)
    return outcome_intervals(
        text_codes(run.spec, predictions["label"], predictions["predicted"], goal.used_costs),
        goal.metrics,
        groups=run.text_groups,
        costs=goal.used_costs,
        prevalence=goal.prevalence,
        level=level,
        n_resamples=n_resamples,
        seed=seed,
    )
