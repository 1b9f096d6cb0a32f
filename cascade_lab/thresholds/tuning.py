"""Chooses thresholds for a goal, checks how far they can be trusted, and writes the tuned cascade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.atomic import refuse_existing
from cascade_lab.exceptions import GoalError, InfeasibleError
from cascade_lab.spec import CascadeSpec
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.guarantee import Guarantee, check_guarantee
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.per_label import (
    PerLabelThresholds,
    check_per_label,
    per_label_procedure,
    per_label_thresholds,
)
from cascade_lab.thresholds.search import Choice, min_held_fraction
from cascade_lab.thresholds.summary import sentences
from cascade_lab.thresholds.validation import (
    ThresholdBootstrap,
    bootstrap_thresholds,
    check_separate,
    choose_by_prevalence,
    choose_thresholds,
    compare_without_gate,
    cross_validate,
    held_out,
    metrics_at,
    threshold_procedure,
)

if TYPE_CHECKING:
    from cascade_lab.run import Run

PREVALENCES = (0.01, 0.1, 0.5)


@dataclass(frozen=True, eq=False, repr=False)
class Tuning:
    """Thresholds chosen for a goal, and how far they can be trusted; `tune` makes one.

    Attributes
    ----------
    run : Run
        The run that the thresholds are chosen on: its labelled texts.
    goal : Goal
    grid : ThresholdGrid
        The run's texts as the tuned stages see them.
    choice : Choice
        One threshold per stage, and every metric with them on the run's texts. Where a threshold per label is used
        (`uses_per_label`), the tuned cascade has it in place of the last stage's, and other metrics: see `metrics`.
    intervals : dict of str to Interval
        Every metric of the tuned cascade on the run's texts, with its 95% interval over texts.
    cross_validation : DataFrame
        Of the whole choice: with a guarantee or thresholds per label, where the tuned cascade has them. See
        `cross_validate`.
    bootstrap : ThresholdBootstrap or None
        Of one threshold per stage: see `bootstrap_thresholds`; None with a guarantee.
    per_label : PerLabelThresholds or None
        Where a threshold per label was tried.
    guarantee : Guarantee or None
        What is guaranteed; `str` of it is a sentence.
    test : Run or None
        Another run: its labelled texts.
    held_out : DataFrame or None
        The tuned cascade on the texts of `test`: see `validation.held_out`.
    prevalences : tuple of float
        For `by_prevalence`.
    """

    run: Run
    goal: Goal
    grid: ThresholdGrid
    choice: Choice
    intervals: dict[str, Interval]
    cross_validation: pd.DataFrame
    bootstrap: ThresholdBootstrap | None = None
    per_label: PerLabelThresholds | None = None
    guarantee: Guarantee | None = None
    test: Run | None = None
    held_out: pd.DataFrame | None = None
    prevalences: tuple[float, ...] = PREVALENCES

    @property
    def uses_per_label(self) -> bool:
        """The tuned cascade has a minimum probability per label, because that improves on one for all."""
        return self.per_label is not None and self.per_label.improves

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose thresholds are chosen."""
        return self.grid.stages

    @cached_property
    def thresholds(self) -> pd.DataFrame:
        """One row per tuned stage: `own`, the run's threshold; `chosen`; and on resamples `low`, `median`, `high`.

        `low` and `high` enclose 95% of the thresholds chosen on resamples; NaN with a guarantee. Where a threshold per
        label is used, the last stage has no other: its row is NaN but for `own`.
        """
        table = pd.DataFrame(
            {
                "own": [np.nan if value is None else value for value in map(self.run.spec.thresholds.get, self.stages)],
                "chosen": [self.choice.thresholds[stage] for stage in self.stages],
            },
            index=pd.Index(self.stages, name="stage"),
        )
        chosen_again = self.bootstrap.thresholds if self.bootstrap else pd.DataFrame(columns=list(self.stages))
        quantiles = chosen_again.astype(float).quantile([0.025, 0.5, 0.975])
        table = table.join(quantiles.set_axis(["low", "median", "high"]).T)
        if self.uses_per_label:
            table.loc[table.index == self.run.spec.last.name, ["chosen", "low", "median", "high"]] = np.nan
        return table

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per metric, of the tuned cascade.

        `value`, `low`, `high`: on the tuning texts, with the 95% interval over texts. `chosen_again_low`,
        `chosen_again_high`: the interval where thresholds are chosen again on each resample (not with a guarantee, nor
        with thresholds per label). `cross_validated`: on texts left out of the choice; `optimism`: how much better the
        tuning texts look; and its `standard_error`. With a test run also `test`, `test_low` and `test_high`.
        """
        table = pd.DataFrame.from_dict(self.intervals, orient="index", columns=Interval._fields).rename_axis("metric")
        if self.bootstrap is not None and not self.uses_per_label:
            again = self.bootstrap.metrics
            table["chosen_again_low"] = [again[name].low for name in table.index]
            table["chosen_again_high"] = [again[name].high for name in table.index]
        columns = {"held_out": "cross_validated", "optimism": "optimism", "standard_error": "standard_error"}
        table = table.join(self.cross_validation[list(columns)].rename(columns=columns))
        if self.held_out is not None:
            columns = {"held_out": "test", "low": "test_low", "high": "test_high"}
            table = table.join(self.held_out[list(columns)].rename(columns=columns))
        return table

    @property
    def prevalence_goal(self) -> Goal:
        """The goal of `by_prevalence`: this goal, or accuracy if the goal's metrics do not depend on the prevalence.

        In-scope accuracy and reject recall are each of one kind of text, in scope or out of scope.
        """
        names = {self.goal.metric, *self.goal.at_least, *self.goal.at_most}
        return Goal("accuracy") if names <= {"in_scope_accuracy", "reject_recall"} else self.goal

    @cached_property
    def by_prevalence(self) -> pd.DataFrame:
        """One threshold per stage at other prevalences, computed when needed: see `choose_by_prevalence`."""
        options: dict[str, Any] = {"grid": self.grid, "guarantee": self.guarantee}
        return choose_by_prevalence(self.run, self.prevalence_goal, self.prevalences, **options)

    @cached_property
    def without_gate(self) -> pd.DataFrame | None:
        """The tuned cascade compared with its last stage alone: see `compare_without_gate`. Computed when needed.

        None without a test run, without a gate, or if the last stage cannot reject, or alone satisfies the goal at no
        threshold.
        """
        spec = self.run.spec
        if self.test is None or not spec.last.reject_labels or not any(stage.is_gate for stage in spec.stages):
            return None
        cascade = tuned_spec(self.run.spec, self.choice, self.per_label)
        try:
            return compare_without_gate(self.run, self.test, self.goal, guarantee=self.guarantee, cascade=cascade)
        except InfeasibleError:
            return None

    @property
    def tuned_on(self) -> dict[str, Any]:
        """The content of `[tuned_on]` in the tuned cascade's file; undefined metrics are left out."""
        details: dict[str, Any] = {}
        if self.guarantee is not None:
            details["guarantee"] = str(self.guarantee)
        if self.per_label is not None:
            gain = self.per_label.gain
            details["by_label"] = f"a gain of {gain.value:.4f} ({gain.low:.4f} to {gain.high:.4f})"
        details["intervals"] = {
            name: [found.low, found.high] for name, found in self.intervals.items() if not np.isnan(found.low)
        }
        details["optimism"] = self.cross_validation["optimism"].dropna().to_dict()
        return tuned_on(self.run, {name: found.value for name, found in self.intervals.items()}, self.goal, details)

    @property
    def spec(self) -> CascadeSpec:
        """The run's cascade at the chosen thresholds, with `tuned_on`.

        It has a minimum probability per label where that improves on one for all (see `PerLabelThresholds.improves`).
        """
        return replace(tuned_spec(self.run.spec, self.choice, self.per_label), tuned_on=self.tuned_on)

    def write(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the tuned cascade as a `cascade.toml`; paths in it are relative to its folder.

        Raises
        ------
        CascadeLabError
            `path` exists already and `overwrite` is false.
        SpecError
            The file cannot be written.
        """
        refuse_existing(path, overwrite=overwrite)
        self.spec.write(path)

    def summary(self) -> list[str]:
        """Return the result in a few sentences, with advice where something went wrong."""
        return sentences(self)

    def __repr__(self) -> str:
        chosen = {k: "per label" if np.isnan(v) else f"{v:.4f}" for k, v in self.thresholds["chosen"].items()}
        thresholds = ", ".join(f"{stage} {value}" for stage, value in chosen.items())
        metric = f"{self.goal.metric} {self.intervals[self.goal.metric].value:.4f}"
        return f"<Tuning {self.run.name}: {self.goal}: {thresholds}; {metric}>"

    def _repr_html_(self) -> str:
        tables = (self.thresholds, self.metrics)
        return "".join(table.to_html(na_rep="–", float_format="{:.4f}".format) for table in tables)


def tune(
    run: Run,
    goal: Goal,
    *,
    stages: Sequence[str] | None = None,
    test: Run | None = None,
    guarantee: tuple[str, float] | None = None,
    delta: float = 0.1,
    by_label: bool = False,
    n_resamples: int = 500,
    n_repeats: int = 4,
    prevalences: Sequence[float] = PREVALENCES,
    seed: int = 0,
    progress: bool = False,
) -> Tuning:
    """Choose thresholds for a goal on the kept logits of a run, and check how far they can be trusted.

    Parameters
    ----------
    run : Run
        A run of the set to tune on, with shadow scores.
    goal : Goal
    stages : sequence of str, optional
        The stages whose thresholds are chosen; by default all that can reject.
    test : Run, optional
        A run of other texts, with shadow scores, to report metrics on.
    guarantee : tuple of str and float, optional
        `in_scope_accuracy` or `reject_recall`, and its least value (see `choose_with_guarantee`).
    delta : float
        The probability that the guarantee fails, over draws of the tuning set.
    by_label : bool
        Try a threshold for each label of the last stage too; they are used if they improve. Not with a guarantee.
    n_resamples : int
        Of the bootstrap of the thresholds.
    n_repeats : int
        Of the five-fold cross-validation.
    prevalences : sequence of float
        Fractions of texts out of scope, for `Tuning.by_prevalence`.
    seed : int
    progress : bool
        Show progress bars.

    Raises
    ------
    GoalError
        `test` has the texts of `run`, the goal does not go with `guarantee` or `by_label`, or both are given.
    InfeasibleError
        No thresholds satisfy the goal; the message names the nearest ones.
    RunError
        As `ThresholdGrid.from_run`; or `test` has other stages than `run`.

    Examples
    --------
    >>> from cascade_lab import Run
    >>> tuning = tune(Run.read("runs/val"), Goal("accuracy"), test=Run.read("runs/test"))  # doctest: +SKIP
    >>> tuning.write("tuned.toml")  # doctest: +SKIP
    """
    guaranteed = None if guarantee is None else Guarantee(*guarantee, delta)
    if guaranteed is not None:
        check_guarantee(goal, guaranteed)
        if by_label:
            raise GoalError(
                "a guarantee is of one threshold per stage, and does not hold with a threshold per label; leave out "
                "guarantee (--guarantee) or by_label (--by-label)"
            )
    if by_label:
        check_per_label(goal)
    run, test = run.labelled, None if test is None else test.labelled
    if test is not None:
        check_separate(run, test)
    grid = ThresholdGrid.from_run(run, stages)
    choice = choose_thresholds(grid, goal, guaranteed, min_held=min_held_fraction(run, goal))
    per_label = per_label_thresholds(run, goal, choice.thresholds, seed=seed) if by_label else None
    tuned_run = run.with_spec(tuned_spec(run.spec, choice, per_label))
    options: dict[str, Any] = {"grid": grid, "seed": seed, "progress": progress}
    procedure = (
        per_label_procedure(run, goal, grid)
        if per_label is not None and per_label.improves
        else threshold_procedure(run, goal, grid, guaranteed)
    )
    return Tuning(
        run=run,
        goal=goal,
        grid=grid,
        choice=choice,
        per_label=per_label,
        bootstrap=None if guarantee else bootstrap_thresholds(run, goal, n_resamples=n_resamples, **options),
        cross_validation=cross_validate(run, goal, procedure=procedure, n_repeats=n_repeats, **options),
        intervals=metrics_at(tuned_run, {}, goal, seed=seed),
        guarantee=guaranteed,
        test=test,
        held_out=None if test is None else held_out(tuned_run, test, {}, goal),
        prevalences=tuple(prevalences),
    )


def tuned_spec(spec: CascadeSpec, choice: Choice, per_label: PerLabelThresholds | None = None) -> CascadeSpec:
    """Return a cascade at the chosen thresholds, with a minimum probability per label where that improves."""
    spec = spec.with_thresholds(choice.thresholds)
    return per_label.apply(spec) if per_label is not None and per_label.improves else spec


def tuned_on(
    run: Run, metrics: Mapping[str, float], goal: Goal | str, details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of `[tuned_on]`: the run, its eval set, the goal and the metrics; undefined ones are left out.

    `goal` may be a sentence; `details` is added.
    """
    return {
        "run_id": run.manifest["run_id"],
        "evalset": {key: value for key, value in run.manifest["evalset"].items() if value is not None},
        "goal": str(goal),
        **({"costs": dict(goal.costs)} if isinstance(goal, Goal) and goal.costs else {}),
        **({"prevalence": goal.prevalence} if isinstance(goal, Goal) and goal.prevalence else {}),
        "figures": {name: value for name, value in metrics.items() if not np.isnan(value)},
        **(details or {}),
    }


def write_tuned(run: Run, choice: Choice, goal: Goal | str, output: str | Path) -> None:
    """Write the run's cascade at given thresholds as a `cascade.toml`, with the table `[tuned_on]`.

    Paths in it are relative to `output`'s folder. `goal` may be a sentence that says where the thresholds come from.

    Raises
    ------
    SpecError
        The file cannot be written.
    """
    replace(tuned_spec(run.spec, choice), tuned_on=tuned_on(run, choice.metrics, goal)).write(output)
