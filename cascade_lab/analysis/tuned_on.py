"""Where a run's thresholds come from, and whether its metrics hold on texts that had no part in choosing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from cascade_lab.analysis.costs import CostMatrix, Costs, run_codes
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.metrics import metric_intervals
from cascade_lab.analysis.outcomes import FRACTIONS, METRICS
from cascade_lab.analysis.sentences import Summary
from cascade_lab.text import exact

if TYPE_CHECKING:
    from cascade_lab.run import Run

WARNING = (
    "Warning: the thresholds were chosen on these same texts, so the metrics of this run are too high. Run the tuned "
    "cascade on other texts."
)


@dataclass(frozen=True)
class TuningOrigin:
    """What is known of the tuning of a run's thresholds.

    Attributes
    ----------
    thresholds : dict of str to float or None
        Stage name to its threshold; None where the stage has none.
    tuned_on : mapping or None
        The table `[tuned_on]` of the cascade: `run_id`, `evalset`, `goal` and what else the tuning wrote; None where
        the thresholds were not tuned.
    metrics : DataFrame or None
        One row per metric that the tuning wrote; columns `("on the tuning set", c)` for c of `value`; `low` and `high`,
        the interval that the tuning gives for new texts; and `optimism` (how much higher the metric looks on the tuning
        set than on other texts, from cross-validation); and `("on this set", c)` for c of `value`, `low`, `high`. NaN
        where the tuning did not write it.
    same_texts : bool
        This run has the texts that the thresholds were chosen on.
    """

    thresholds: dict[str, float | None]
    tuned_on: Mapping[str, Any] | None
    metrics: pd.DataFrame | None
    same_texts: bool

    def frame(self) -> pd.DataFrame:
        """Return `metrics`, or an empty table where the thresholds were not tuned."""
        return pd.DataFrame() if self.metrics is None else self.metrics

    def summary(self) -> Summary:
        """Return the thresholds and their origin in a few sentences."""
        sentences = [
            f"Stage {name}: {'no threshold' if value is None else f'threshold {exact(value)}'}."
            for name, value in self.thresholds.items()
        ]
        if self.tuned_on is None:
            return Summary([*sentences, "The thresholds were not tuned."])
        n = self.tuned_on["evalset"]["n_examples"]
        sentences.append(f"They were tuned on {n:,} texts (run {self.tuned_on['run_id']}), to {self.tuned_on['goal']}.")
        notes = self.tuned_on.get("notes")
        notes = [f"Of the tuning: {note}" for note in notes] if isinstance(notes, list) else []
        return Summary([*sentences, *notes, *([WARNING] if self.same_texts else [])])


def tuning_origin(run: Run) -> TuningOrigin:
    """Return where the thresholds of a run come from, and its metrics beside those on the tuning set.

    Raises
    ------
    RunError
        No example has a label.
    """
    tuned_on = run.spec.tuned_on
    if not tuned_on:
        return TuningOrigin(run.spec.thresholds, None, None, False)
    values, optimism = (pd.Series(tuned_on.get(key, {}), dtype=float) for key in ("figures", "optimism"))
    intervals = pd.DataFrame(tuned_on.get("intervals", {}), index=["low", "high"], dtype=float).T
    there = intervals.reindex(values.index).assign(value=values, optimism=optimism)
    there = there[["value", "low", "high", "optimism"]]
    costs: Costs = tuned_on.get("costs") or {}
    if tuned_on.get("cost_matrix"):
        costs = CostMatrix.from_lines(tuned_on["cost_matrix"], f"{run.name}: tuned_on.cost_matrix")
    prevalence = tuned_on.get("prevalence")
    if costs or prevalence is not None:
        labelled = run.labelled
        outcome = run_codes(labelled, costs)
        names = METRICS if costs else tuple(FRACTIONS)
        groups = labelled.text_groups
        metrics = outcome_intervals(outcome, names, groups=groups, costs=costs, prevalence=prevalence)
        here = pd.DataFrame(metrics, index=["value", "low", "high"]).T
    else:
        here = metric_intervals(run)
    both = pd.concat({"on the tuning set": there, "on this set": here}, axis=1)
    both = both.reindex([name for name in here.index if name in there.index]).rename_axis("metric")
    return TuningOrigin(run.spec.thresholds, tuned_on, both, is_tuning_set(run))


def is_tuning_set(run: Run) -> bool:
    """Return whether a run has the texts that its thresholds were chosen on, as far as its manifest tells."""
    tuned_on, evalset = run.spec.tuned_on, run.manifest["evalset"]
    if not tuned_on:
        return False
    other = tuned_on["evalset"]
    same_file = evalset.get("sha256") is not None and evalset["sha256"] == other.get("sha256")
    return tuned_on["run_id"] == run.manifest["run_id"] or (same_file and evalset.get("split") == other.get("split"))
