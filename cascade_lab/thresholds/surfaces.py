"""Counts what a cascade does at every threshold of one stage, or at the pairs of thresholds of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.classification import macro_f1
from cascade_lab.analysis.outcomes import FRACTIONS, OUTCOMES, metric_from_counts
from cascade_lab.exceptions import RunError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.objective import Goal

if TYPE_CHECKING:
    from cascade_lab.run import Run

MAX_LINES = 512


class Surface(NamedTuple):
    """What a cascade does at the pairs of two thresholds.

    Attributes
    ----------
    stages : tuple of str
        The stages whose thresholds move: one or two.
    first : ndarray, shape (n_first,)
        Thresholds of the first stage, ascending.
    second : ndarray, shape (n_second,)
        Thresholds of the second stage, ascending; `[0.]` with one stage.
    counts : ndarray of int, shape (n_first, n_second, 6)
        Number of texts of each outcome, in the order of `OUTCOMES`; with a cost matrix, the last dimension is 8 (see
        `GridCounts`).
    exact : bool
        Every pair that makes a difference is included. Otherwise the thresholds are a selection, evenly spaced by rank.
    """

    stages: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    counts: np.ndarray
    exact: bool

    def metric(self, name: str, goal: Goal | None = None) -> np.ndarray:
        """Return a metric at every pair, shape (n_first, n_second), at the costs and the prevalence of `goal`.

        A goal with a cost matrix must be the one that the surface was counted for.
        """
        return metric_from_counts(name, self.counts) if goal is None else goal.value(name, self.counts)


def surface(
    run: Run,
    stages: Sequence[str] | None = None,
    *,
    thresholds: Mapping[str, float] | None = None,
    grid: ThresholdGrid | None = None,
    goal: Goal | None = None,
    max_lines: int = MAX_LINES,
) -> Surface:
    """Count the outcomes at the pairs of thresholds of two stages.

    Parameters
    ----------
    run : Run
        With shadow scores.
    stages : sequence of str, optional
        One or two; by default those that can reject.
    thresholds : mapping of str to float, optional
        Thresholds of the other stages; by default the run's own.
    grid : ThresholdGrid, optional
        The grid of `run`, if it is built already; `stages` and `thresholds` are then not used.
    goal : Goal, optional
        If it has a cost matrix, the costs are counted too.
    max_lines : int
        The most thresholds per stage. Each is a confidence that occurs, and the counts there are those of a replay.

    Raises
    ------
    RunError
        More than two stages, or as `ThresholdGrid.from_run`.
    """
    grid = grid or ThresholdGrid.from_run(run, stages, thresholds)
    if len(grid.stages) > 2:
        raise RunError(f"{grid.name}: a surface has one or two stages; name two of {', '.join(grid.stages)}")
    grid = grid.with_costs({} if goal is None else goal.used_costs)
    indices = grid.subsample(max_lines)
    first, second = (*(values[i] for values, i in zip(grid.thresholds, indices, strict=True)), np.zeros(1))[:2]
    exact = all(len(i) == len(values) for values, i in zip(grid.thresholds, indices, strict=True))
    counts = grid.count(indices).counts
    # The grid's thresholds of a deferral stage are in descending order.
    if len(first) > 1 and first[0] > first[-1]:
        first, counts = first[::-1], counts[::-1]
    if len(second) > 1 and second[0] > second[-1]:
        second, counts = second[::-1], counts[:, ::-1]
    return Surface(grid.stages, first, second, counts, exact)


def sweep(
    run: Run, stage: str, *, thresholds: Mapping[str, float] | None = None, goal: Goal | None = None
) -> pd.DataFrame:
    """Return what the cascade does at every threshold of one stage that makes a difference.

    Parameters
    ----------
    run : Run
        With shadow scores.
    stage : str
    thresholds : mapping of str to float, optional
        Thresholds of the other stages; by default the run's own.
    goal : Goal, optional
        Its costs and its prevalence are used.

    Returns
    -------
    DataFrame
        One row per threshold, ascending: `threshold`; the number of texts of each outcome; `reach`, the fraction of
        texts that get beyond the stage; the metrics of `FRACTIONS`; `mean_cost` where the goal has costs; and
        `macro_f1` over the labels that occur as true label.

    Raises
    ------
    RunError
        As `ThresholdGrid.from_run`.
    """
    grid = ThresholdGrid.from_run(run, [stage], thresholds).with_costs({} if goal is None else goal.used_costs)
    counts = grid.count([np.arange(len(grid.thresholds[0]))]).counts[:, 0]
    table = pd.DataFrame(counts[:, : len(OUTCOMES)].astype(np.int64), columns=list(OUTCOMES))
    table.insert(0, "threshold", grid.thresholds[0])
    n_steps = len(grid.thresholds[0])
    table["reach"] = 1 - np.bincount(grid.ranks[0], minlength=n_steps)[:n_steps].cumsum() / len(grid.in_scope)
    for name in goal.metrics if goal else FRACTIONS:
        table[name] = goal.value(name, counts) if goal else metric_from_counts(name, counts)
    table["macro_f1"] = _macro_f1(grid)
    return table.sort_values("threshold", ignore_index=True)


def _macro_f1(grid: ThresholdGrid) -> np.ndarray:
    """Return macro F1 at every threshold of the one stage of `grid`, from what each threshold changes.

    Counts of all labels at all thresholds would be a table of 15 million on 100,000 texts and 150 labels; the events,
    at most three per text, are 300,000.
    """
    n_steps, ranks = len(grid.thresholds[0]), grid.ranks[0]
    labels, codes = np.unique([*grid.y_true, *grid.predicted[0], *grid.predicted[-1]], return_inverse=True)
    y_true, below, above = codes.reshape(3, -1)
    # A text has the answer that it gets further on at the steps before its rank, and this stage's from there on.
    events = [(np.zeros_like(ranks), above, 1), (ranks, above, -1), (ranks, below, 1)]
    step = np.concatenate([steps for steps, _, _ in events])
    label = np.concatenate([answers for _, answers, _ in events])
    change = np.concatenate([np.full(len(steps), k) for steps, _, k in events])
    hit = np.concatenate([k * (answers == y_true) for _, answers, k in events])
    order = np.lexsort((step, label))
    step, label, change, hit = step[order], label[order], change[order], hit[order]
    # Within a label, events in the order of steps: its counts and its F1 after each step.
    is_last = np.append((label[1:] != label[:-1]) | (step[1:] != step[:-1]), True)
    base = np.append(0, np.flatnonzero(label[1:] != label[:-1]) + 1)
    sizes = np.diff(np.append(base, len(label)))
    n_predicted, n_hits = (
        (np.cumsum(x) - np.repeat(np.cumsum(x)[base] - x[base], sizes))[is_last] for x in (change, hit)
    )
    step, label = step[is_last], label[is_last]
    support = np.bincount(y_true, minlength=len(labels))
    # 0 for a label that is only predicted, which the mean leaves out.
    f1 = np.nan_to_num(macro_f1(n_hits[:, None], support[label][:, None], n_predicted[:, None]))
    # What each step changes in the sum of F1 over the labels.
    is_first = np.append(True, label[1:] != label[:-1])
    change = f1 - np.where(is_first, 0, np.roll(f1, 1))
    return np.bincount(step, change, n_steps + 1)[:n_steps].cumsum() / (support > 0).sum()
