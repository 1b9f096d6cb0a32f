"""Compares rejectors by cross-validation: which evidence tells in-scope from out-of-scope texts, and at what gain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits

from cascade_lab.analysis.bootstrap import blocks, interval, resample_counts
from cascade_lab.analysis.sentences import Summary
from cascade_lab.evidence import SCORES
from cascade_lab.exceptions import InfeasibleError
from cascade_lab.thresholds.rejector import (
    choose_rejecting,
    distance_arrays,
    evidence_table,
    in_scope_accuracy,
    is_in_scope,
    out_of_fold_confidence,
    prepared_run,
    without_rejection,
)

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
        fraction of them that is accepted where 95% of the texts in scope are. What a deferral stage answers counts as
        accepted, with its label, at every threshold.
    proposed : str
        The rule with the fewest scores whose recall is within one standard error of the best (Breiman et al. 1984).
    confidence : DataFrame
        The out-of-fold confidence of each text under each rule; 1 where a deferral stage answers.
    in_scope, correct : ndarray of bool, shape (n,)
        The text is in scope; and the cascade's label, if nothing is rejected, is its true one.
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
            sentences.append(f"Fit it: cascade-lab fit-rejector RUN --evidence {names} --output rejector.toml")
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
    stand open: a rule that uses a gate has its log-odds as evidence. Deferral stages keep their thresholds.

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
    in_scope, groups, open_route = is_in_scope(run), run.text_groups, without_rejection(run)
    correct = open_route.predicted == run.examples["label"].to_numpy(dtype=object)
    reachable = float(correct[in_scope].mean())
    if reachable < at_least:
        raise InfeasibleError(
            f"{run.name}: an in-scope accuracy of {at_least:g} is reached at no threshold; without rejection it is "
            f"{reachable:.4f}; ask for less"
        )
    rules = candidates(run.spec, features=train_run is not None)
    names = list(dict.fromkeys(name for rule in rules for name in rule))
    short = {f"{run.spec.last.name}.{score}": score for score in SCORES}
    short |= {f"{stage.name}.log_odds": stage.name for stage in run.spec.stages if stage.is_gate}
    labels = [" + ".join(short[name] for name in rule) for rule in rules]
    arrives = open_route.reached[run.spec.last.name]
    confidence = {NOW: _rule_of_now(run, at_least)}
    with threadpool_limits(1, user_api="blas"):  # for small matrices, several threads wait for each other longer
        values = evidence_table(run, names, distance_arrays(run, names, train_run))
        for label, rule in zip(labels, rules, strict=True):
            found = out_of_fold_confidence(values[rule].to_numpy(), in_scope, groups, seed)
            confidence[label] = np.where(arrives, found, 1.0)  # what a deferral stage answers is accepted
    n = len(in_scope)
    n_resamples = n_resamples or max(100, min(500, 2_000_000 // n))
    drawn = resample_counts(n, groups=groups, n_resamples=n_resamples, seed=seed)
    weights = np.vstack([np.ones((1, n), dtype=drawn.dtype), drawn])  # the first row is of the texts themselves
    results = {
        label: rule_metrics(values, correct, in_scope, at_least, weights=weights)
        for label, values in confidence.items()
    }
    rows = {}
    for label, result in results.items():
        row: dict[str, float] = {"n_scores": 0 if label == NOW else len(label.split(" + "))}
        for name in RULE_METRICS:
            difference = result[name] - results[NOW][name]
            between = interval(float(difference[0]), difference[1:])
            row |= {name: float(result[name][0]), f"{name}_difference": between.value}
            row |= {f"{name}_low": between.low, f"{name}_high": between.high}
        row["standard_error"] = float(np.nanstd(result["recall"][1:]))
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
    result = {name: np.full(len(weights), np.nan) for name in RULE_METRICS}
    if not len(confidence):
        return result
    segment = _segments(confidence, in_scope)
    n_segments, n = int(segment.max()) + 1, len(confidence)
    kind = np.where(in_scope, np.where(correct, 0, 1), 2)
    sums = csr_matrix((np.ones(n), (kind * n_segments + segment, np.arange(n))), shape=(3 * n_segments, n))
    for block in blocks(len(weights), n):
        # One row per segment, the highest confidence first, and one column per weighting.
        right, wrong, out = (sums @ weights[block].T.astype(np.float64)).reshape(3, n_segments, -1)
        inside = right + wrong
        n_in, n_out = inside.cumsum(axis=0), out.cumsum(axis=0)  # the texts that are accepted at a segment's threshold
        all_in, all_out = n_in[-1], n_out[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            ranked_rightly = (inside * (all_out - n_out + out / 2)).sum(axis=0)  # a tie counts as half
            result["auroc"][block] = ranked_rightly / (all_in * all_out)
            out_from = all_out - n_out + out
            precision = out_from / (out_from + all_in - n_in + inside)
            precision_sum = np.where(out > 0, out * precision, 0.0).sum(axis=0)
            result["aupr"][block] = np.where(all_in > 0, precision_sum / all_out, np.nan)
            for name, reached in (
                ("recall", right.cumsum(axis=0) / all_in >= at_least - 1e-12),
                ("fpr95", n_in / all_in >= 0.95),
            ):
                accepted = n_out[reached.argmax(axis=0), np.arange(out.shape[1])] / all_out
                result[name][block] = np.where(reached.any(axis=0), accepted, np.nan)
    return result | {"recall": 1 - result["recall"]}


def _segments(confidence: np.ndarray, in_scope: np.ndarray) -> np.ndarray:
    """Return the number of each text's segment, in order of falling confidence: shape (n,).

    Texts with one confidence are in one segment. So are neighbours without an out-of-scope text between or among them,
    since no metric of a rule differs between the thresholds there: these are the segments to count in.
    """
    order = np.argsort(-confidence, kind="stable")
    rank = np.append(0, np.cumsum(np.diff(confidence[order]) < 0))  # of each text's confidence
    has_out = np.bincount(rank, weights=~in_scope[order]) > 0
    starts = has_out | np.append(True, has_out[:-1])
    segment = np.empty(len(confidence), dtype=int)
    segment[order] = (np.cumsum(starts) - 1)[rank]
    return segment


def _rule_of_now(run: Run, at_least: float) -> np.ndarray:
    """Return the rule of the cascade as it is, one threshold per stage, as one number per text: shape (n,).

    The number is the smallest ratio of a stage's confidence to its threshold, at the best thresholds for the accuracy.
    Texts with 1 or more are accepted at these thresholds; those with c or more where all thresholds are c times as
    high.
    """
    try:
        thresholds: Mapping[str, float | None] = choose_rejecting(run, at_least).thresholds
    except InfeasibleError:
        thresholds = run.spec.thresholds
    ratio, arrives = np.full(len(run.examples), np.inf), np.ones(len(run.examples), dtype=bool)
    for stage in run.spec.stages:
        decision, threshold = run.decision(stage.name), thresholds.get(stage.name)
        if stage.is_deferral:
            arrives &= ~decision.ends
        elif threshold:
            ratio[arrives] = np.minimum(ratio, decision.confidence / threshold)[arrives]
    accepted = np.isinf(ratio)  # at any thresholds
    return np.where(accepted, max(1.0, ratio[~accepted].max(initial=1.0)), ratio)
