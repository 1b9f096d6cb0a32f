"""Proposes thresholds for another fraction of texts out of scope, as it was estimated on texts without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.costs import run_codes
from cascade_lab.analysis.prevalence import N_LEAST, N_LEAST_OF_KIND
from cascade_lab.atomic import refuse_existing
from cascade_lab.exceptions import GoalError
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.out_of_fold import fitted_on_itself, out_of_fold_run
from cascade_lab.thresholds.search import Choice, choose_on_grid, min_held_fraction
from cascade_lab.thresholds.tuning import write_tuned
from cascade_lab.thresholds.validation import choose_by_prevalence

if TYPE_CHECKING:
    from cascade_lab.run import Run

LEAST = 0.001
ONE_KIND = {"in_scope_accuracy", "reject_recall"}


@dataclass(frozen=True, eq=False)
class Proposal:
    """Thresholds at an estimated prevalence; `propose_thresholds` makes one.

    Attributes
    ----------
    run : Run
        The labelled texts that they are chosen on.
    goal : Goal
        With the estimated prevalence.
    choice : Choice
    thresholds : DataFrame
        One row per stage: `own`, the cascade's; `chosen`; and `at_low` and `at_high`, chosen at the ends of the
        interval of the prevalence (NaN where no thresholds satisfy the goal there).
    metrics : DataFrame
        One row per metric of the goal, at the estimated prevalence: `own` and `chosen`, on the texts of the choice,
        where `chosen` is too good.
    """

    run: Run
    goal: Goal
    choice: Choice
    thresholds: pd.DataFrame
    metrics: pd.DataFrame

    @property
    def depends_on_prevalence(self) -> bool:
        """Whether the goal's metrics do: in-scope accuracy and reject recall are each of one kind of text."""
        return not {self.goal.metric, *self.goal.at_least, *self.goal.at_most} <= ONE_KIND

    def write(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the cascade with the chosen thresholds as a `cascade.toml`; raise CascadeLabError where it cannot."""
        refuse_existing(path, overwrite=overwrite)
        write_tuned(self.run, self.choice, self.goal, path)


def propose_thresholds(run: Run, goal: Goal, prevalence: Sequence[float]) -> Proposal:
    """Choose thresholds on labelled texts, reweighted to an estimated prevalence.

    The choice holds if only the prevalence has changed.

    Parameters
    ----------
    run : Run
        With labels and shadow scores, such as the reference of `monitor`. Its labelled texts count equally: weights are
        left out.
    goal : Goal
        Its own prevalence is not used.
    prevalence : sequence of three floats
        The estimate, and the ends of its interval. Values outside 0.001 to 0.999 are moved there.

    Raises
    ------
    GoalError
        The prevalence is not known.
    InfeasibleError
        No thresholds satisfy the goal.
    RunError
        As `ThresholdGrid.from_run`.
    """
    if np.isnan(prevalence).any():
        raise GoalError(
            f"{run.name}: the prevalence is not known; it needs {N_LEAST} texts, {N_LEAST_OF_KIND} labelled texts in "
            f"scope and {N_LEAST_OF_KIND} out of scope, and scores that tell them apart"
        )
    estimate, *ends = (float(value) for value in np.clip(prevalence, LEAST, 1 - LEAST))
    run = run.labelled
    if fitted_on_itself(run):
        run = out_of_fold_run(run, seed=0)
    goal = replace(goal, prevalence=estimate)
    grid = ThresholdGrid.from_run(run).with_costs(goal.used_costs)
    choice = choose_on_grid(grid, goal, min_held=min_held_fraction(run, goal))
    at_ends = choose_by_prevalence(run, goal, ends, grid=grid)
    own = {stage: run.spec.thresholds[stage] for stage in grid.stages}
    thresholds = pd.DataFrame(
        {
            "own": [np.nan if own[stage] is None else own[stage] for stage in grid.stages],
            "chosen": [choice.thresholds[stage] for stage in grid.stages],
            "at_low": at_ends[list(grid.stages)].iloc[0].to_numpy(dtype=float),
            "at_high": at_ends[list(grid.stages)].iloc[-1].to_numpy(dtype=float),
        },
        index=pd.Index(grid.stages, name="stage"),
    )
    counts = [goal.count(run_codes(run, goal.used_costs)), choice.counts]
    values = {name: [float(goal.value(name, each)) for each in counts] for name in goal.metrics}
    metrics = pd.DataFrame.from_dict(values, orient="index", columns=["own", "chosen"]).rename_axis("metric")
    return Proposal(run, goal, choice, thresholds, metrics)
