"""Split the difference between two runs by stage, and join the runs on their common texts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import Interval, mean_difference_interval
from cascade_lab.analysis.duplicates import text_groups
from cascade_lab.decisions import require_scored, route
from cascade_lab.exceptions import RunError
from cascade_lab.spec import CascadeSpec

if TYPE_CHECKING:
    from cascade_lab.run import Run


class Decomposition(NamedTuple):
    """Which part of the cascade changes the accuracy: a 2×2 factorial design of earlier stages and last stages.

    Let acc(g, c) be the accuracy of the earlier stages of run g (its gates and deferral stages) in front of the last
    stage of run c. Then *gate* is acc(B, A) - acc(A, A), *classifier* is acc(A, B) - acc(A, A), and *interaction* is
    what both changes do beyond their sum, acc(B, B) - acc(B, A) - acc(A, B) + acc(A, A). The three add up to
    acc(B, B) - acc(A, A).

    Attributes
    ----------
    accuracies : dict of str to float
        Of `AA`, `BA`, `AB` and `BB`: the first letter is the run of the earlier stages, the second that of the last.
    effects : dict of str to Interval
        `gate`, `classifier` and `interaction`, with the intervals of `mean_difference_interval`.
    """

    accuracies: dict[str, float]
    effects: dict[str, Interval]

    def frame(self) -> pd.DataFrame:
        """Return the effects, one row each: `accuracy_gained`, `low`, `high`."""
        columns = ["accuracy_gained", "low", "high"]
        return pd.DataFrame.from_dict(self.effects, orient="index", columns=columns).rename_axis("effect")

    def _repr_html_(self) -> str:
        return self.frame().to_html()


def decompose(
    run_a: Run, run_b: Run, *, example_ids: Collection[str] | None = None, level: float = 0.95
) -> Decomposition:
    """Split the difference of two runs' accuracies into the effect of the earlier stages, of the last, and of both.

    The gates and deferral stages of each run are put in front of the last stage of the other, on kept logits.
    `example_ids` are the texts to count, by default all that both runs have.

    Raises
    ------
    RunError
        No common texts; a cascade of one stage; last stages with different labels; or a run that lacks the shadow
        scores which the other run's earlier stages need.
    """
    for run in (run_a, run_b):
        if len(run.spec.stages) < 2:
            raise RunError(f"{run.name}: has one stage only, so no stages can be swapped with another run")
    reject_labels = {*run_a.spec.reject_labels, *run_b.spec.reject_labels}
    labels_a, labels_b = (set(run.spec.last.labels) - reject_labels for run in (run_a, run_b))
    if labels_a != labels_b:
        raise RunError(
            f"{run_a.name} and {run_b.name}: only one of the last stages has the label {min(labels_a ^ labels_b)!r}, "
            "so they cannot be swapped; compare the cascades as a whole"
        )
    run_a, run_b = run_a.labelled, run_b.labelled
    rows_a, rows_b = common_rows(run_a, run_b, example_ids)
    sides = {"A": (run_a, rows_a), "B": (run_b, rows_b)}
    pairs = {"AA": ("A", "A"), "BA": ("B", "A"), "AB": ("A", "B"), "BB": ("B", "B")}
    y_true = run_a.examples["label"].to_numpy(dtype=object)[rows_a]
    right = {name: (_mixed_answers(sides, *pair) == y_true).astype(int) for name, pair in pairs.items()}
    aa, ba, ab, bb = right.values()
    effects = {"gate": ba - aa, "classifier": ab - aa, "interaction": bb - ba - ab + aa}
    groups = text_groups(run_a.examples.iloc[rows_a])
    return Decomposition(
        {name: float(of_pair.mean()) for name, of_pair in right.items()},
        {name: mean_difference_interval(effect, groups=groups, level=level) for name, effect in effects.items()},
    )


def common_rows(run_a: Run, run_b: Run, example_ids: Collection[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows in A and in B of the common examples, in A's order; check that their texts and labels agree.

    `example_ids` are those to keep, by default all.
    """
    ids = pd.Index(run_a.examples["example_id"])
    rows_b = pd.Index(run_b.examples["example_id"]).get_indexer(ids)
    if example_ids is not None:
        rows_b[~ids.isin(list(example_ids))] = -1
    rows_a = np.flatnonzero(rows_b >= 0)
    rows_b = rows_b[rows_a]
    both = f"{run_a.name} and {run_b.name}"
    if not len(rows_a):
        raise RunError(f"{both}: no labelled example_id in common; compare runs of one eval set")
    for column in ("text", "text_b", "label"):
        values_a, values_b = (
            run.examples[column].fillna("").to_numpy(dtype=object)[rows]
            for run, rows in ((run_a, rows_a), (run_b, rows_b))
        )
        differs = values_a != values_b
        if differs.any():
            first = str(ids[rows_a[differs][0]])
            raise RunError(f"{both}: example_id {first!r} has another {column} in each; compare runs of one eval set")
    return rows_a, rows_b


def _mixed_answers(sides: dict[str, tuple[Run, np.ndarray]], earlier: str, last: str) -> np.ndarray:
    """Return the answers of one side's earlier stages in front of the other's last stage, on the common examples."""
    parts = [(earlier, stage) for stage in sides[earlier][0].spec.stages[:-1]] + [(last, sides[last][0].spec.last)]
    stages, decisions = [], {}
    for side, stage in parts:
        run, rows = sides[side]
        name = f"{stage.name} of {side}"  # both sides may use one name for two stages
        stages.append(replace(stage, name=name))
        decisions[name] = run.decision(stage.name).take(rows)
    where = " and ".join(run.name for run, _ in sides.values())
    return require_scored(route(CascadeSpec("mixed", tuple(stages)), decisions), where).predicted
