"""Writes the result of a tuning as a few sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.duplicates import n_different, repeats_sentences
from cascade_lab.analysis.tuned_on import is_tuning_set
from cascade_lab.text import exact
from cascade_lab.thresholds.gain import share_sentences
from cascade_lab.thresholds.guarantee import bounds_of
from cascade_lab.thresholds.new_texts import MAX_UNDEFINED, MIN_TEXTS
from cascade_lab.thresholds.objective import LATENCIES
from cascade_lab.thresholds.out_of_fold import fitted_on_itself
from cascade_lab.thresholds.resampling import N_FOLDS
from cascade_lab.thresholds.search import BOTH_KINDS

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec
    from cascade_lab.thresholds.tuning import Tuning


def sentences(tuning: Tuning) -> list[str]:
    """Return the result of a tuning in a few sentences, with advice where something went wrong."""
    parts = (_verdict, _on_tuning_texts, _on_test_texts, _alternatives, notes, _advice)
    return [sentence for part in parts for sentence in part(tuning)]


def notes(tuning: Tuning) -> list[str]:
    """Return what limits how far the metrics of a tuning can be trusted, one sentence each."""
    grid, bootstrap, attrs = tuning.grid, tuning.bootstrap, tuning.cross_validation.attrs
    result = []
    for has, no, without in (
        (grid.in_scope, "in scope", "accept"),
        (~grid.in_scope, "out of scope", "reject"),
    ):
        if not has.any():
            result.append(f"No text is {no}, so there is nothing to {without}: {BOTH_KINDS}.")
    kinds = {"in scope": grid.in_scope, "out of scope": ~grid.in_scope}
    result += share_sentences(
        {kind: n_different(grid.groups[mask]) for kind, mask in kinds.items()},
        float((~grid.in_scope).mean()),
        test_share=None if tuning.test is None else _share_out_of_scope(tuning.test, tuning.run.spec),
        prevalence=tuning.goal.prevalence,
    )
    result += repeats_sentences(grid.groups)
    if is_tuning_set(tuning.run):
        result.append(
            "The run's own thresholds were chosen on these same texts, so its metrics are too high too, and a gain "
            "over them looks too small."
        )
    result += _how_often_kept(tuning)
    if attrs.get("n_thresholds"):
        result.append(
            f"To save time, cross-validation tried about {attrs['n_thresholds']} thresholds per stage, not every one."
        )
    if stages := fitted_on_itself(tuning.run):
        result.append(
            f"The rejector of {' and of '.join(stages)} was fitted on these texts, so each text's confidence there "
            "comes from a fit without that text."
        )
    if attrs["n_infeasible"]:
        result.append(
            f"On {attrs['n_infeasible']} of {attrs['n_folds']} folds of the cross-validation none of the tried "
            "thresholds satisfies the goal; the metrics on texts left out are of the others."
        )
    if not attrs["n_folds"]:
        result.append(
            f"There is no cross-validation: it needs at least {N_FOLDS} different texts in scope, or {N_FOLDS} out of "
            "scope."
        )
    if bootstrap.infeasible:
        lacks = "" if bootstrap.infeasible <= MAX_UNDEFINED else ", so the metrics have no interval"
        result.append(f"On {bootstrap.infeasible:.1%} of the resamples no thresholds satisfy the goal{lacks}.")
    few = [name for name, found in bootstrap.metrics.items() if not np.isnan(found.value) and np.isnan(found.low)]
    if few and bootstrap.infeasible <= MAX_UNDEFINED:
        result.append(
            f"No interval of {', '.join(few)}: fewer than {MIN_TEXTS} different texts count for it, or it is undefined "
            f"on more than {MAX_UNDEFINED:.0%} of the resamples."
        )
    return result


def _share_out_of_scope(run: Run, spec: CascadeSpec) -> float:
    return float((~run.examples["label"].isin(spec.in_scope_labels)).mean())


def _how_often_kept(tuning: Tuning) -> list[str]:
    """Return how often each bound of the goal holds on texts left out of the choice; nothing of guaranteed ones."""
    guaranteed = [] if tuning.guarantee is None else tuning.guarantee.bounds
    kept, n_folds = tuning.cross_validation["kept"], tuning.cross_validation.attrs["n_folds"]
    result = []
    for bound in bounds_of(tuning.goal.at_least, tuning.goal.at_most):
        if bound in guaranteed or np.isnan(kept[bound.metric]):
            continue
        result.append(
            f"Nothing promises {bound} on new texts: chosen in cross-validation, it holds on {kept[bound.metric]:.0%} "
            f"of the {n_folds} folds left out. A confidence of 0.9 (--confidence) makes it hold with that probability."
        )
    return result


def _verdict(tuning: Tuning) -> list[str]:
    return [tuning.verdict.sentence]


def _on_tuning_texts(tuning: Tuning) -> list[str]:
    thresholds = []
    for stage, row in tuning.thresholds.iterrows():
        chosen = "one per label" if np.isnan(row["chosen"]) else exact(row["chosen"])
        thresholds.append(f"stage {stage} {chosen}")
    name = tuning.goal.metric
    row = tuning.metrics.loc[name]
    result = [
        f"The thresholds to {tuning.goal}: {', '.join(thresholds)}.",
        f"{_words(name)} is {row['value']:.4f} on the {len(tuning.run.examples):,} tuning texts.",
    ]
    if not np.isnan(row["low"]):
        result.append(f"On new texts it is between {row['low']:.4f} and {row['high']:.4f} (95% interval).")
    if not np.isnan(row["cross_validated"]):
        result.append(
            f"In cross-validation it is {row['cross_validated']:.4f} on texts that were left out of the choice."
        )
    return result + ([f"Guarantee: {tuning.guarantee}."] if tuning.guarantee else [])


def _on_test_texts(tuning: Tuning) -> list[str]:
    if tuning.test is None or tuning.held_out is None:
        return []
    name = tuning.goal.metric
    value, n = _with_interval(tuning.held_out.loc[name]), len(tuning.test.examples)
    result = [f"{_words(name)} is {value} on the {n:,} test texts, which had no part in the choice."]
    if tuning.difference_on_test is not None:
        row = tuning.difference_on_test.loc[name]
        result.append(
            f"With the run's own thresholds it is {row['a']:.4f} there: the difference is {row['difference']:+.4f} "
            f"({row['low']:+.4f} to {row['high']:+.4f})."
        )
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
        thresholds = ", ".join(f"{stage} {exact(row[stage])}" for stage in tuning.stages)
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
    elif tuning.test is not None and not tuning.run.spec.last.reject_labels:
        result.append(tuning.not_compared)
    return result


def why_not_compared(tuning: Tuning) -> str:
    """Return why the cascade is not compared with its last stage alone, and what to do; empty where it is."""
    spec, reason = tuning.run.spec, ""
    if tuning.without_gate is None:
        if not any(stage.is_gate for stage in spec.stages):
            reason = "the cascade has no gate."
        elif not spec.last.reject_labels:
            reason = (
                f'stage {spec.last.name} alone cannot reject. Add reject_label = "{spec.reject_labels[0]}" to its '
                "table in cascade.toml, run the cascade on both sets again, and tune."
            )
        elif tuning.test is None:
            reason = "there is no test run; name a run of another set."
        else:
            reason = f"stage {spec.last.name} alone satisfies the goal at no threshold."
    return f"Whether the gate is useful is not known: {reason}" if reason else ""


def _advice(tuning: Tuning) -> list[str]:
    result = []
    if tuning.bootstrap.infeasible > MAX_UNDEFINED:
        result.append("Ask for less, or tune on more texts: this goal is barely met.")
    broken = [name for name, _, is_kept in _bounds_on_test(tuning) if not is_kept]
    if broken and tuning.guarantee is None:
        result.append("A guarantee makes a bound hold on new texts too; give a confidence, or tune on more texts.")
    return result


def _words(name: str, *, capital: bool = True) -> str:
    """Return a metric's name as words."""
    text = name.replace("_", " ")
    return text[0].upper() + text[1:] if capital else text


def _with_interval(row: pd.Series) -> str:
    return f"{row['held_out']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
