"""Writes the result of a tuning as a few sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.thresholds.guarantee import GUARANTEED
from cascade_lab.thresholds.objective import LATENCIES

if TYPE_CHECKING:
    from cascade_lab.thresholds.tuning import Tuning


def sentences(tuning: Tuning) -> list[str]:
    """Return the result of a tuning in a few sentences, with advice where something went wrong."""
    return [*_on_tuning_texts(tuning), *_on_test_texts(tuning), *_alternatives(tuning), *_advice(tuning)]


def _on_tuning_texts(tuning: Tuning) -> list[str]:
    thresholds = []
    for stage, row in tuning.thresholds.iterrows():
        between = "" if np.isnan(row["low"]) else f" (95% of resamples: {row['low']:.4f} to {row['high']:.4f})"
        chosen = "one per label" if np.isnan(row["chosen"]) else f"{row['chosen']:.4f}"
        thresholds.append(f"stage {stage} {chosen}{between}")
    name = tuning.goal.metric
    row = tuning.metrics.loc[name]
    result = [
        f"The thresholds to {tuning.goal}: {', '.join(thresholds)}.",
        f"{_words(name)} is {row['value']:.4f} on the {len(tuning.run.examples):,} tuning texts. In cross-validation "
        f"it is {row['cross_validated']:.4f} on texts that were left out of the choice.",
    ]
    return result + ([f"Guarantee: {tuning.guarantee}."] if tuning.guarantee else [])


def _on_test_texts(tuning: Tuning) -> list[str]:
    if tuning.test is None or tuning.held_out is None:
        return []
    name = tuning.goal.metric
    value, n = _with_interval(tuning.held_out.loc[name]), len(tuning.test.examples)
    result = [f"{_words(name)} is {value} on the {n:,} test texts, which had no part in the choice."]
    for name, bound, is_kept in _bounds_on_test(tuning):
        verb = "keeps" if is_kept else "breaks"
        side = "at least" if name in tuning.goal.at_least else "at most"
        value = _with_interval(tuning.held_out.loc[name])
        result.append(f"{_words(name)} {verb} its bound of {side} {bound:g} there: it is {value}.")
    return result


def _bounds_on_test(tuning: Tuning) -> list[tuple[str, float, bool]]:
    """Return each bounded metric, its bound, and whether the test texts keep it. Latencies are left out."""
    if tuning.held_out is None:
        return []
    values, goal = tuning.held_out["held_out"], tuning.goal
    at_least = [(name, bound, bool(values[name] >= bound)) for name, bound in goal.at_least.items()]
    at_most = {name: bound for name, bound in goal.at_most.items() if name not in LATENCIES}
    return at_least + [(name, bound, bool(values[name] <= bound)) for name, bound in at_most.items()]


def _alternatives(tuning: Tuning) -> list[str]:
    result, name = [], tuning.goal.metric
    if tuning.per_label is not None:
        gain = tuning.per_label.gain
        used = "is used" if tuning.uses_per_label else "is not used"
        result.append(
            f"A threshold per label {used}: its gain in {_words(name, capital=False)} on texts left out is "
            f"{gain.value:.4f} ({gain.low:.4f} to {gain.high:.4f})."
        )
    rows = []
    for prevalence, row in tuning.by_prevalence.dropna(how="all").iterrows():
        thresholds = ", ".join(f"{stage} {row[stage]:.4f}" for stage in tuning.stages)
        rows.append(f"{thresholds} if {prevalence:.0%} of the texts are out of scope")
    if rows:
        result.append(
            f"With another fraction of texts out of scope, the thresholds to {tuning.prevalence_goal} are: "
            f"{'; '.join(rows)}."
        )
    if tuning.without_gate is not None:
        cascade, alone = tuning.without_gate[name]
        p_value = tuning.without_gate["p_value"].iloc[0]
        result.append(
            f"On the test texts {_words(name, capital=False)} is {cascade:.4f} with the gates, and {alone:.4f} with "
            f"the last stage alone (McNemar's test of their answers: p = {p_value:.2g})."
        )
    return result


def _advice(tuning: Tuning) -> list[str]:
    result = []
    if tuning.bootstrap is not None and tuning.bootstrap.infeasible > 0.05:
        result.append(
            f"On {tuning.bootstrap.infeasible:.0%} of the resamples no thresholds satisfy the goal. Ask for less, or "
            "tune on more texts."
        )
    broken = [name for name, _, is_kept in _bounds_on_test(tuning) if not is_kept]
    if any(name in GUARANTEED for name in broken) and tuning.guarantee is None:
        result.append("A guarantee makes a bound hold on new texts too; give one, or tune on more texts.")
    return result


def _words(name: str, *, capital: bool = True) -> str:
    """Return a metric's name as words."""
    text = name.replace("_", " ")
    return text[0].upper() + text[1:] if capital else text


def _with_interval(row: pd.Series) -> str:
    return f"{row['held_out']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
