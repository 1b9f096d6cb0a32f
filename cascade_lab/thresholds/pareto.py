"""What accuracy costs: the thresholds of deferral stages at which no other ones are both faster and more accurate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import fraction_interval
from cascade_lab.analysis.latency import stage_latencies
from cascade_lab.analysis.sentences import Summary
from cascade_lab.exceptions import GoalError, RunError
from cascade_lab.text import exact
from cascade_lab.thresholds.grid import ThresholdGrid, route_cases
from cascade_lab.thresholds.validation import check_separate

if TYPE_CHECKING:
    from cascade_lab.run import Run

MAX_LINES, MAX_COMBINATIONS = 256, 2048


def cost_front(
    run: Run,
    stages: Sequence[str] | None = None,
    *,
    stage_ms: Mapping[str, float] | None = None,
    thresholds: Mapping[str, float] | None = None,
    test: Run | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return the Pareto front of accuracy and predicted time over the thresholds of deferral stages.

    The predicted time of a text is the sum of the mean amortised times of the stages that it reaches (see
    `analysis.latency`), so it holds at the batch sizes of the run. At most 256 thresholds per stage and about 2,048
    combinations are tried: where there are more, thresholds that are evenly spaced by rank.

    Parameters
    ----------
    run : Run
        With shadow scores.
    stages : sequence of str, optional
        The stages whose thresholds move, in the order of the cascade; by default all that defer.
    stage_ms : mapping of str to float, optional
        Milliseconds per text of each stage, such as from a latency study; by default as the run measured them.
    thresholds : mapping of str to float, optional
        Thresholds of the other stages; by default the run's own.
    test : Run, optional
        A run of other texts: the accuracy on the texts of `run`, from which the thresholds come, is too good.
    level : float
        Of the intervals.

    Returns
    -------
    DataFrame
        One row per point of the front, the fastest first: a column for the threshold of each stage; `mean_ms`, the
        predicted milliseconds per text; `accuracy` with `accuracy_low` and `accuracy_high` (Wilson); `reach_last`, the
        fraction of texts that reach the last stage; with a test run `test_mean_ms`, `test_accuracy` and its interval.
        `attrs["own"]` has `mean_ms` and `accuracy` at the run's own thresholds of these stages.

    Raises
    ------
    RunError
        No stage defers, the run was not timed, or it lacks shadow scores.
    GoalError
        `stage_ms` lacks a stage, or `test` has the texts of `run`.
    """
    run = run.labelled
    deferral = [stage.name for stage in run.spec.stages if stage.is_deferral]
    if stages is None and not deferral:
        raise RunError(f'{run.name}: no stage defers; name stages, or give a stage the role "deferral"')
    grid = ThresholdGrid.from_run(run, deferral if stages is None else stages, thresholds)
    if test is not None:
        check_separate(run, test)
    spec = run.spec.with_thresholds(_other(thresholds or {}, grid))
    ms = _stage_ms(run, stage_ms)
    decisions = {stage.name: run.decision(stage.name).with_threshold(stage) for stage in spec.stages}
    # Row k: the time of a text that leaves at stage k of the grid. Last row: of one that goes on at all.
    routes = route_cases(spec, decisions, grid.stages)
    text_ms = np.array([sum(ms[name] * reached for name, reached in case.reached.items()) for case in routes])
    reaches_last = np.array([case.reached[spec.last.name] for case in routes])
    right = grid.predicted == grid.y_true
    n_lines = max(2, min(MAX_LINES, int(MAX_COMBINATIONS ** (1 / len(grid.stages)))))
    rows, columns = [], np.arange(len(grid.y_true))
    for indices in product(*grid.subsample(n_lines)):
        case = grid.cases_at(indices)
        rows.append((indices, text_ms[case, columns].mean(), right[case, columns].mean()))
    rows.sort(key=lambda row: (row[1], -row[2]))
    table, highest = [], -1.0
    for indices, mean_ms, accuracy in rows:
        if accuracy <= highest:
            continue
        highest, case = accuracy, grid.cases_at(indices)
        metrics = _accuracy(right[case, columns], grid.groups, level)
        reach_last = float(reaches_last[case, columns].mean())
        table.append({**grid.thresholds_at(indices), "mean_ms": mean_ms, **metrics, "reach_last": reach_last})
    front = pd.DataFrame(table)
    if test is not None:
        others = _other({name: value for name, value in spec.thresholds.items() if value is not None}, grid)
        points = front[list(grid.stages)].to_dict("records")
        tested = [_at(test.labelled.with_thresholds({**others, **point}), ms, level) for point in points]
        front = front.join(pd.DataFrame(tested).add_prefix("test_"))
    front.attrs["own"] = _at(run.with_thresholds(_other(thresholds or {}, grid)), ms, level)
    return front


def cost_summary(front: pd.DataFrame) -> Summary:
    """Return what the front of `cost_front` says about the run's own thresholds, for people.

    Parameters
    ----------
    front : DataFrame
        What `cost_front` returns.
    """
    own, highest = front.attrs["own"], front.iloc[-1]
    sentences = [
        f"The thresholds of the run give an accuracy of {own['accuracy']:.4f} in {own['mean_ms']:.2f} ms per text; the "
        f"most accurate ones on these texts give {highest['accuracy']:.4f} in {highest['mean_ms']:.2f} ms."
    ]
    as_good = front[(front["accuracy"] >= own["accuracy"]) & (front["mean_ms"] < own["mean_ms"])]
    if len(as_good):
        first = as_good.iloc[0]
        stages = front.columns[: list(front.columns).index("mean_ms")]
        thresholds = ", ".join(f"{stage} {exact(first[stage])}" for stage in stages)
        saved = 1 - first["mean_ms"] / own["mean_ms"]
        on_test = f" (on the test run {first['test_accuracy']:.4f})" if "test_accuracy" in front else ""
        sentences.append(
            f"{thresholds}: an accuracy of {first['accuracy']:.4f}{on_test} in {first['mean_ms']:.2f} ms, "
            f"{saved:.0%} less time than now and no less accurate on these texts."
        )
    else:
        sentences.append("No other thresholds are as accurate and faster.")
    return Summary(sentences)


def _stage_ms(run: Run, stage_ms: Mapping[str, float] | None) -> dict[str, float]:
    names = [stage.name for stage in run.spec.stages]
    if stage_ms is not None:
        for name in names:
            if name not in stage_ms:
                raise GoalError(f"stage_ms lacks stage '{name}'; give the milliseconds per text of each stage")
        return {name: float(stage_ms[name]) for name in names}
    latencies = stage_latencies(run)
    for name in names:
        if not len(latencies[name].text_ms):
            raise RunError(f"{run.name}: no text reached stage '{name}', so its time is not known; give stage_ms")
    return {name: float(latencies[name].text_ms.mean()) for name in names}


def _other(thresholds: Mapping[str, float], grid: ThresholdGrid) -> dict[str, float]:
    """Return the thresholds of the stages that the grid does not move."""
    return {name: value for name, value in thresholds.items() if name not in grid.stages}


def _at(run: Run, ms: Mapping[str, float], level: float) -> dict[str, float]:
    """Return the predicted time and the accuracy of a run at its own thresholds."""
    right = (run.predictions["predicted"] == run.predictions["label"]).to_numpy()
    reached = {stage.name: run.scores(stage.name) for stage in run.spec.stages}
    mean_ms = sum(ms[name] * float((scores.scored & ~scores.shadow).mean()) for name, scores in reached.items())
    return {"mean_ms": float(mean_ms), **_accuracy(right, run.text_groups, level)}


def _accuracy(right: np.ndarray, groups: np.ndarray, level: float) -> dict[str, float]:
    found = fraction_interval(right, np.ones(len(right), dtype=bool), groups=groups, level=level)
    return {"accuracy": found.value, "accuracy_low": found.low, "accuracy_high": found.high}
