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
from cascade_lab.analysis.costs import CostMatrix, run_codes
from cascade_lab.atomic import refuse_existing
from cascade_lab.exceptions import GoalError, InfeasibleError
from cascade_lab.object_html import tuning_html
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import exact
from cascade_lab.thresholds.gain import Verdict, compare_with_own, judge
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.guarantee import Guarantee, check_guarantee, choose_or_abstain, is_of_one_kind
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.out_of_fold import fitted_on_itself, out_of_fold_run
from cascade_lab.thresholds.per_label import (
    PerLabelThresholds,
    check_per_label,
    per_label_procedure,
    per_label_thresholds,
)
from cascade_lab.thresholds.resampling import (
    Procedure,
    ThresholdBootstrap,
    bootstrap_thresholds,
    choose_thresholds,
    cross_validate,
    threshold_procedure,
)
from cascade_lab.thresholds.search import Choice, min_held_fraction
from cascade_lab.thresholds.summary import notes, sentences, why_not_compared
from cascade_lab.thresholds.validation import (
    check_separate,
    choose_by_prevalence,
    compare_without_gate,
    difference_on,
    held_out,
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
    bootstrap : ThresholdBootstrap
        Of the whole choice, with the guarantee or the thresholds per label of the tuned cascade: see
        `bootstrap_thresholds`.
    cross_validation : DataFrame
        Of the whole choice too: see `cross_validate`.
    per_label : PerLabelThresholds or None
        Where a threshold per label was tried.
    own, outcomes : ndarray of int, shape (n,)
        The outcome of each text with the run's own thresholds, and with the chosen ones (see `costs.text_codes`).
    guarantee : Guarantee or None
        What is guaranteed; `str` of it is a sentence.
    test : Run or None
        Another run: its labelled texts.
    held_out : DataFrame or None
        The tuned cascade on the texts of `test`: see `validation.held_out`.
    difference_on_test : DataFrame or None
        The run's own thresholds (`a`) and the chosen ones (`b`) on the texts of `test`: see `outcome_differences`.
    prevalences : tuple of float
        For `by_prevalence`.
    """

    run: Run
    goal: Goal
    grid: ThresholdGrid
    choice: Choice
    bootstrap: ThresholdBootstrap
    cross_validation: pd.DataFrame
    own: np.ndarray
    outcomes: np.ndarray
    per_label: PerLabelThresholds | None = None
    guarantee: Guarantee | None = None
    test: Run | None = None
    held_out: pd.DataFrame | None = None
    difference_on_test: pd.DataFrame | None = None
    prevalences: tuple[float, ...] = PREVALENCES

    @property
    def uses_per_label(self) -> bool:
        """The tuned cascade has a minimum probability per label, because that improves on one for all."""
        return self.per_label is not None and self.per_label.improves

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose thresholds are chosen."""
        return self.grid.stages

    @property
    def intervals(self) -> dict[str, Interval]:
        """Every metric of the tuned cascade on the run's texts, with the 95% interval of its value on new texts."""
        return self.bootstrap.metrics

    @cached_property
    def thresholds(self) -> pd.DataFrame:
        """One row per tuned stage: `own`, the run's threshold, and `chosen`.

        Where a threshold per label is used, the last stage has no other: `chosen` is NaN there. No interval is given:
        with few texts of a kind, the bootstrap's interval of a threshold contains the best one less often than it says.
        """
        last_chosen = np.nan if self.uses_per_label else self.choice.thresholds.get(self.run.spec.last.name)
        chosen = {**self.choice.thresholds, self.run.spec.last.name: last_chosen}
        return pd.DataFrame(
            {
                "own": [np.nan if value is None else value for value in map(self.run.spec.thresholds.get, self.stages)],
                "chosen": [chosen[stage] for stage in self.stages],
            },
            index=pd.Index(self.stages, name="stage"),
        )

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per metric, of the tuned cascade.

        `value`: on the tuning texts, where it is too good. `low`, `high`: the 95% interval of its value on new texts,
        which allows for the choice. `cross_validated`: on texts left out of the choice; `optimism`: how much better the
        texts of the choice look; and its `standard_error`. With a test run also `test`, `test_low` and `test_high`.
        """
        table = pd.DataFrame.from_dict(self.intervals, orient="index", columns=Interval._fields).rename_axis("metric")
        columns = {"held_out": "cross_validated", "optimism": "optimism", "standard_error": "standard_error"}
        table = table.join(self.cross_validation[list(columns)].rename(columns=columns))
        if self.held_out is not None:
            columns = {"held_out": "test", "low": "test_low", "high": "test_high"}
            table = table.join(self.held_out[list(columns)].rename(columns=columns))
        return table

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """Every metric with the run's own thresholds and with the chosen ones: see `gain.compare_with_own`."""
        parts = self.bootstrap, self.cross_validation, self.difference_on_test
        return compare_with_own(self.goal, self.own, self.outcomes, *parts)

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the chosen thresholds are to replace the run's own, and why: see `gain.judge`."""
        parts = self.own, self.outcomes, self.comparison, self.guarantee
        return judge(self.run, self.goal, self.grid, *parts)

    @property
    def prevalence_goal(self) -> Goal:
        """The goal of `by_prevalence`: this goal, or accuracy if the goal's metrics do not depend on the prevalence.

        In-scope accuracy and reject recall are each of one kind of text, in scope or out of scope.
        """
        names = {self.goal.metric, *self.goal.at_least, *self.goal.at_most}
        return Goal("accuracy") if names <= {"in_scope_accuracy", "reject_recall"} else self.goal

    @cached_property
    def by_prevalence(self) -> pd.DataFrame:
        """One threshold per stage at other prevalences, computed when needed: see `choose_by_prevalence`.

        Empty where the guarantee is of a metric that depends on the prevalence.
        """
        if self.guarantee is not None and not all(is_of_one_kind(bound.metric) for bound in self.guarantee.bounds):
            return pd.DataFrame(columns=[*self.stages, *self.prevalence_goal.metrics]).rename_axis("prevalence")
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
    def not_compared(self) -> str:
        """Why `without_gate` is None, and what to do about it, as a sentence; empty where it is not None."""
        return why_not_compared(self)

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
        details["gain"] = self.verdict.sentence
        details["optimism"] = self.cross_validation["optimism"].dropna().to_dict()
        if self.notes:
            details["notes"] = self.notes
        return tuned_on(self.run, {name: found.value for name, found in self.intervals.items()}, self.goal, details)

    @property
    def spec(self) -> CascadeSpec:
        """The run's cascade at the chosen thresholds, with `tuned_on`.

        It has a minimum probability per label where that improves on one for all (see `PerLabelThresholds.improves`).
        """
        return replace(tuned_spec(self.run.spec, self.choice, self.per_label), tuned_on=self.tuned_on)

    def write(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the tuned cascade as a `cascade.toml`; paths in it are relative to its folder.

        It is written whether or not it is better than the run's own (`verdict`).

        Raises
        ------
        CascadeLabError
            `path` exists already and `overwrite` is false.
        SpecError
            The file cannot be written.
        """
        refuse_existing(path, overwrite=overwrite)
        self.spec.write(path)

    @cached_property
    def notes(self) -> list[str]:
        """What limits how far the metrics can be trusted, one sentence each, such as repeated or too few texts."""
        return notes(self)

    def summary(self) -> list[str]:
        """Return the result in a few sentences, with advice where something went wrong."""
        return sentences(self)

    def __repr__(self) -> str:
        chosen = {k: "per label" if np.isnan(v) else exact(v) for k, v in self.thresholds["chosen"].items()}
        thresholds = ", ".join(f"{stage} {value}" for stage, value in chosen.items())
        metric = f"{self.goal.metric} {self.intervals[self.goal.metric].value:.4f}"
        return f"<Tuning {self.run.name}: {self.goal}: {thresholds}; {metric}>"

    def _repr_html_(self) -> str:
        return tuning_html(self)


def tune(
    run: Run,
    goal: Goal,
    *,
    stages: Sequence[str] | None = None,
    test: Run | None = None,
    guarantee: Mapping[str, float] | None = None,
    delta: float = 0.1,
    confidence: float | None = None,
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
    guarantee : mapping of str to float, optional
        The least values of metrics, which all hold on new texts with probability 1 - `delta` (see
        `choose_with_guarantee`).
    delta : float
        The probability that the guarantee fails, over draws of the tuning set.
    confidence : float, optional
        All bounds of the goal hold on new texts with this probability: they are guaranteed too. Not with `guarantee`.
        Without it, `cross_validation["kept"]` says how often a bound holds on texts left out of the choice.
    by_label : bool
        Try a threshold for each label of the last stage too; they are used if they improve. Not with a guarantee.
    n_resamples : int
        Of the bootstrap.
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
        `test` has the texts of `run`, the goal does not go with `guarantee` or `by_label`, or both are given; or a cost
        matrix has other labels than the cascade can answer.
    InfeasibleError
        No thresholds satisfy the goal; the message names the nearest ones. With a guarantee: it says what can be
        guaranteed, and how many more texts would be needed (see `guarantee.abstention`).
    RunError
        As `ThresholdGrid.from_run`; or `test` has other stages than `run`.

    Examples
    --------
    >>> from cascade_lab import Run
    >>> tuning = tune(Run.read("runs/val"), Goal("accuracy"), test=Run.read("runs/test"))  # doctest: +SKIP
    >>> tuning.write("tuned.toml")  # doctest: +SKIP
    """
    guaranteed = _guarantee(goal, guarantee, delta, confidence)
    if guaranteed is not None:
        check_guarantee(goal, guaranteed)
        if by_label:
            raise GoalError(
                "a guarantee or a confidence is of one threshold per stage, and does not hold with a threshold per "
                "label; leave out guarantee (--guarantee) or by_label (--by-label)"
            )
    if by_label:
        check_per_label(goal)
    if isinstance(goal.used_costs, CostMatrix):
        goal.used_costs.check(run.spec)
    run, test = run.labelled, None if test is None else test.labelled
    if test is not None:
        check_separate(run, test)
    if fitted_on_itself(run):
        run = out_of_fold_run(run, seed=seed)
    grid = ThresholdGrid.from_run(run, stages).with_costs(goal.used_costs)
    if guaranteed is None:
        choice = choose_thresholds(grid, goal, min_held=min_held_fraction(run, goal))
    else:
        choice = choose_or_abstain(grid, goal, guaranteed)
    per_label = per_label_thresholds(run, goal, choice.thresholds, seed=seed) if by_label else None
    tuned_run = run.with_spec(tuned_spec(run.spec, choice, per_label))
    procedure: Procedure | None = None
    fast_procedure: Procedure | None = None  # by default one of the thresholds that `near` is of
    if per_label is not None and per_label.improves:
        procedure, fast_procedure = (
            per_label_procedure(run, goal, grid, near=near) for near in (None, choice.thresholds)
        )
    elif guaranteed is not None:
        procedure = fast_procedure = threshold_procedure(run, goal, grid, guaranteed)
    own, outcomes = (run_codes(each, goal.used_costs) for each in (run, tuned_run))
    options: dict[str, Any] = {"grid": grid, "own": own, "seed": seed, "progress": progress}
    return Tuning(
        run=run,
        goal=goal,
        grid=grid,
        choice=choice,
        per_label=per_label,
        bootstrap=bootstrap_thresholds(
            run,
            goal,
            procedure=fast_procedure,
            outcomes=outcomes,
            near=choice.thresholds,
            n_resamples=n_resamples,
            **options,
        ),
        cross_validation=cross_validate(run, goal, procedure=procedure, n_repeats=n_repeats, **options),
        own=own,
        outcomes=outcomes,
        guarantee=guaranteed,
        test=test,
        held_out=None if test is None else held_out(tuned_run, test, {}, goal),
        difference_on_test=None if test is None else difference_on(test, run.spec, tuned_run.spec, goal),
        prevalences=tuple(prevalences),
    )


def _guarantee(
    goal: Goal, at_least: Mapping[str, float] | None, delta: float, confidence: float | None
) -> Guarantee | None:
    """Return what is to be guaranteed: some bounds, or with a confidence those of the goal."""
    if confidence is None:
        return None if not at_least else Guarantee(at_least, delta=delta)
    if at_least:
        raise GoalError(
            "with a confidence, the goal's own bounds are guaranteed; leave out confidence (--confidence) or guarantee "
            "(--guarantee)"
        )
    if not 0 < confidence < 1:
        raise GoalError(f"confidence is {confidence!r}; it must lie between 0 and 1")
    return Guarantee(goal.at_least, goal.at_most, round(1 - confidence, 12))


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
        **(_costs_entry(goal) if isinstance(goal, Goal) else {}),
        **({"prevalence": goal.prevalence} if isinstance(goal, Goal) and goal.prevalence else {}),
        "figures": {name: value for name, value in metrics.items() if not np.isnan(value)},
        **(details or {}),
    }


def _costs_entry(goal: Goal) -> dict[str, Any]:
    """Return the goal's costs as `[tuned_on]` has them; nothing without costs."""
    if isinstance(goal.used_costs, CostMatrix):
        return {"cost_matrix": goal.used_costs.lines()}
    return {"costs": dict(goal.costs)} if goal.costs else {}


def write_tuned(run: Run, choice: Choice, goal: Goal | str, output: str | Path) -> None:
    """Write the run's cascade at given thresholds as a `cascade.toml`, with the table `[tuned_on]`.

    Paths in it are relative to `output`'s folder. `goal` may be a sentence that says where the thresholds come from.

    Raises
    ------
    SpecError
        The file cannot be written.
    """
    replace(tuned_spec(run.spec, choice), tuned_on=tuned_on(run, choice.metrics, goal)).write(output)
