"""Compares rejectors by cross-validation: which evidence tells in-scope from out-of-scope texts, and at what gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import blocks, interval, resample_counts
from cascade_lab.analysis.duplicates import text_groups
from cascade_lab.analysis.ranking import ranking_metrics
from cascade_lab.analysis.sentences import Summary
from cascade_lab.evidence import SCORES
from cascade_lab.exceptions import InfeasibleError
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.rejector import (
    distance_arrays,
    evidence_table,
    in_scope_accuracy,
    is_correct,
    is_in_scope,
    out_of_fold_confidence,
    prepared_run,
)
from cascade_lab.thresholds.search import choose

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

RULE_METRICS = ("recall", "auroc", "aupr", "fpr95")
NOW = "one threshold per stage (now)"


@dataclass(frozen=True, eq=False)
class RejectorComparison:
    """Rejectors compared on out-of-fold confidences; `compare_rejectors` makes one.

    Attributes
    ----------
    table : DataFrame
        One row per rule, the best recall first: `n_scores`; and for `recall`, `auroc`, `aupr` and `fpr95` the value,
        `<metric>_difference` from the rule that the cascade has now, and the 95% interval of the difference,
        `<metric>_low` and `<metric>_high`. `recall` is the out-of-scope recall at the highest threshold with an
        in-scope accuracy of at least `at_least`; `aupr` has the out-of-scope texts as positives; `fpr95` is the
        fraction of them that is accepted where 95% of the texts in scope are.
    proposed : str
        The rule with the fewest scores whose recall is within one standard error of the best (Breiman et al. 1984).
    confidence : DataFrame
        The out-of-fold confidence of each text under each rule.
    in_scope, correct : ndarray of bool, shape (n,)
        The text is in scope; and the last stage's label is its true one.
    at_least : float
    """

    table: pd.DataFrame
    proposed: str
    confidence: pd.DataFrame
    in_scope: np.ndarray
    correct: np.ndarray
    at_least: float

    def summary(self) -> Summary:
        """Return the result in a few sentences, with advice."""
        proposed, now = self.table.loc[self.proposed], self.table.loc[NOW]
        sentences = [
            f"At an in-scope accuracy of {self.at_least:.4g}, the rule {self.proposed} rejects "
            f"{proposed['recall']:.1%} of the out-of-scope texts; one threshold per stage, as now, "
            f"{now['recall']:.1%}.",
            f"The difference is {proposed['recall_difference']:+.1%} (95% interval {proposed['recall_low']:+.1%} to "
            f"{proposed['recall_high']:+.1%}), by cross-validation on {len(self.in_scope):,} texts, "
            f"{int((~self.in_scope).sum()):,} of them out of scope.",
        ]
        if proposed["recall_low"] > 0:
            names = self.proposed.replace(" + ", ",")
            sentences.append(f"Fit it with `cascade-lab fit-rejector RUN --evidence {names} --output rejector.toml`.")
        else:
            sentences.append("The interval contains no difference: keep one threshold per stage, or add texts.")
        return Summary(sentences)


def compare_rejectors(
    run: Run,
    *,
    train_run: Run | None = None,
    at_least: float | None = None,
    n_resamples: int | None = None,
    seed: int = 0,
) -> RejectorComparison:
    """Compare rejectors by cross-validation with the rule that the cascade has now.

    Every rule is fitted on four fifths of the texts and applied to the rest, with equal texts in one fold. All gates
    stand open: a rule that uses a gate has its log-odds as evidence.

    Parameters
    ----------
    run, train_run, at_least, seed
        As in `fit_rejector`.
    n_resamples : int, optional
        By default 500, and fewer above 4,000 texts.

    Raises
    ------
    InfeasibleError, RunError
        As `fit_rejector`.
    """
    run = prepared_run(run)
    at_least = in_scope_accuracy(run) if at_least is None else at_least
    in_scope, correct, groups = is_in_scope(run), is_correct(run), text_groups(run.examples)
    reachable = float(correct[in_scope].mean())
    if reachable < at_least:
        raise InfeasibleError(
            f"{run.name}: an in-scope accuracy of {at_least:g} is reached at no threshold; without rejection the last "
            f"stage has {reachable:.4f}; ask for less"
        )
    rules = candidates(run.spec, features=train_run is not None)
    names = list(dict.fromkeys(name for rule in rules for name in rule))
    values = evidence_table(run, names, distance_arrays(run, names, train_run))
    short = {f"{run.spec.last.name}.{score}": score for score in SCORES}
    short |= {f"{stage.name}.log_odds": stage.name for stage in run.spec.stages if stage.is_gate}
    labels = [" + ".join(short[name] for name in rule) for rule in rules]
    confidence = {NOW: _rule_of_now(run, at_least)} | {
        label: out_of_fold_confidence(values[rule].to_numpy(), in_scope, groups, seed)
        for label, rule in zip(labels, rules, strict=True)
    }
    n = len(in_scope)
    n_resamples = n_resamples or max(100, min(500, 2_000_000 // n))
    weights = resample_counts(n, groups=groups, n_resamples=n_resamples, seed=seed)
    results = {
        label: [rule_metrics(values, correct, in_scope, at_least, weights=w) for w in (np.ones((1, n), int), weights)]
        for label, values in confidence.items()
    }
    base_value, base_resampled = results[NOW]
    rows = {}
    for label, (value, resampled) in results.items():
        row: dict[str, float] = {"n_scores": 0 if label == NOW else len(label.split(" + "))}
        for name in RULE_METRICS:
            difference = float((value[name] - base_value[name])[0])
            between = interval(difference, resampled[name] - base_resampled[name])
            row |= {name: float(value[name][0]), f"{name}_difference": difference}
            row |= {f"{name}_low": between.low, f"{name}_high": between.high}
        row["standard_error"] = float(np.nanstd(resampled["recall"]))
        rows[label] = row
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("rule")
    table["n_scores"] = table["n_scores"].astype(int)
    table = table.sort_values(["recall", "auroc"], ascending=False, kind="stable")
    fitted = table[table["n_scores"] > 0]
    best = fitted.iloc[0]
    near = fitted[fitted["recall"] >= best["recall"] - best["standard_error"]]
    proposed = str(near.sort_values("n_scores", kind="stable").index[0]) if len(near) else str(fitted.index[0])
    return RejectorComparison(table, proposed, pd.DataFrame(confidence), in_scope, correct, at_least)


def candidates(spec: CascadeSpec, *, features: bool) -> list[list[str]]:
    """Return the rules that `compare_rejectors` tries: each score, and the pairs that join two kinds of evidence."""
    gates = [f"{stage.name}.log_odds" for stage in spec.stages if stage.is_gate]
    of_logits, of_features = (
        [f"{spec.last.name}.{name}" for name, score in SCORES.items() if score.of_features == wanted]
        for wanted in (False, True)
    )
    of_features = of_features if features else []
    singles = [[name] for name in (*gates, *of_logits, *of_features)]
    joined = [[*gates, name] for name in (*of_logits, *of_features)] if gates else []
    energy = f"{spec.last.name}.energy"
    return singles + joined + [[*gates, energy, name] for name in of_features]


def rule_metrics(
    confidence: np.ndarray, correct: np.ndarray, in_scope: np.ndarray, at_least: float, *, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return `recall`, `auroc`, `aupr` and `fpr95` of a confidence, for many weightings of the texts at once.

    Parameters
    ----------
    confidence : ndarray, shape (n,)
    correct, in_scope : ndarray of bool, shape (n,)
        The label without rejection is right; the text is in scope.
    at_least : float
        The in-scope accuracy at which `recall` is taken.
    weights : ndarray of int, shape (n_resamples, n)

    Returns
    -------
    dict of str to ndarray, shape (n_resamples,)
        NaN where undefined, or where the in-scope accuracy is reached at no threshold.
    """
    auroc, _ = ranking_metrics(in_scope, confidence, weights=weights)
    _, aupr = ranking_metrics(~in_scope, -confidence, weights=weights)
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(confidence[order]) < 0, True))  # the last text of each confidence
    recall, fpr95 = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    for block in blocks(len(weights), len(confidence)):
        w = weights[block][:, order].astype(np.float64)
        # Row by row: how much is accepted where the threshold is each of the confidences in turn.
        parts = (correct & in_scope, in_scope, ~in_scope)
        n_right, n_in, n_out = ((w * part[order]).cumsum(axis=1)[:, ends] for part in parts)
        all_in, all_out = ((w * part[order]).sum(axis=1) for part in (in_scope, ~in_scope))
        with np.errstate(invalid="ignore", divide="ignore"):
            accepted = n_out / all_out[:, None]
            for target, reached in (
                (recall, n_right / all_in[:, None] >= at_least - 1e-12),
                (fpr95, n_in / all_in[:, None] >= 0.95),
            ):
                first = accepted[np.arange(len(w)), reached.argmax(axis=1)]
                target[block] = np.where(reached.any(axis=1), first, np.nan)
    return {"recall": 1 - recall, "auroc": auroc, "aupr": aupr, "fpr95": fpr95}


def _rule_of_now(run: Run, at_least: float) -> np.ndarray:
    """Return the rule of the cascade as it is, one threshold per stage, as one number per text: shape (n,).

    The number is the smallest ratio of a stage's confidence to its threshold, at the best thresholds for the accuracy.
    Texts with 1 or more are accepted at these thresholds; those with c or more where all thresholds are c times as
    high.
    """
    goal = Goal(maximize="reject_recall", at_least={"in_scope_accuracy": at_least})
    try:
        thresholds = choose(run, goal).thresholds
    except InfeasibleError:
        thresholds = {name: value for name, value in run.spec.thresholds.items() if value}
    ratio = np.full(len(run.examples), np.inf)
    for name, threshold in thresholds.items():
        if threshold > 0:
            ratio = np.minimum(ratio, run.decision(name).confidence / threshold)
    return np.minimum(ratio, np.finfo(float).max)
