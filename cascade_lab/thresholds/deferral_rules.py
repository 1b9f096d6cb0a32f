"""Is confidence enough to decide what to defer? A cross-validated comparison with a learned rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import mean_difference_interval
from cascade_lab.analysis.duplicates import n_different
from cascade_lab.analysis.sentences import Summary
from cascade_lab.decisions import require_scored, route
from cascade_lab.evidence import SCORES
from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.rejector import Rejector
from cascade_lab.spec import CascadeSpec
from cascade_lab.thresholds.rejector import (
    evidence_table,
    fit_logistic,
    origin_of,
    out_of_fold_confidence,
    shared_arrays,
    stratified_folds,
    with_rule,
    write_with_arrays,
)

if TYPE_CHECKING:
    from cascade_lab.run import Run

CONFIDENCE, LEARNED, WITH_NEXT = "confidence", "learned rule", "with the next stage's logits"
RULES = (CONFIDENCE, LEARNED, WITH_NEXT)
EVIDENCE = ("max_logit", "energy", "margin", "entropy")
MIN_TEXTS = 20


@dataclass(frozen=True, eq=False)
class DeferralRules:
    """Rules for what a deferral stage defers, compared at equal fractions of deferred texts.

    Attributes
    ----------
    name, stage : str
        The run's name, and the deferral stage.
    deferred : float
        The fraction of the texts that reach the stage and that it defers at the run's own threshold.
    table : DataFrame
        One row per rule of `RULES`. `accuracy`: of the cascade on the texts that reach the stage, if the rule defers
        the fraction `deferred` of them. `mean_accuracy`: the mean over all fractions from 0 to 1. Each with
        `<metric>_difference`, `_low` and `_high`: the paired difference to the rule *confidence* and its interval.
    spec : CascadeSpec
        The run's cascade with the learned rule as the stage's rejector, fitted on all texts, at a threshold that defers
        the same fraction of them.
    arrays : mapping of str to ndarray
        What scores of features need: `<stage>.<array>`.
    """

    name: str
    stage: str
    deferred: float
    table: pd.DataFrame
    spec: CascadeSpec
    arrays: Mapping[str, np.ndarray]

    def write(self, path: str | Path) -> None:
        """Write the cascade with the learned rule and, where it needs one, the .npz file of its arrays beside it.

        Raises
        ------
        SpecError
            A file cannot be written.
        """
        write_with_arrays(self.spec, self.arrays, path)

    @property
    def learned_is_better(self) -> bool:
        """Whether the interval of the learned rule's gain in accuracy, at the same fraction, lies above 0."""
        return bool(self.table.loc[LEARNED, "accuracy_low"] > 0)

    def summary(self) -> list[str]:
        """Return the answer in a few sentences."""
        row, ahead = self.table.loc[LEARNED], self.table.loc[WITH_NEXT]
        sentences = [
            f"Of the texts that reach it, {self.stage} defers {self.deferred:.1%}. Then "
            f"{self.table.loc[CONFIDENCE, 'accuracy']:.1%} are answered correctly by its confidence, and "
            f"{row['accuracy']:.1%} by a learned rule (difference {row['accuracy_difference']:+.1%}, 95% interval "
            f"{row['accuracy_low']:+.1%} to {row['accuracy_high']:+.1%})."
        ]
        if self.learned_is_better:
            sentences.append("Confidence is not enough here: use the learned rule.")
        else:
            sentences.append("No gain is shown: keep the confidence.")
        sentences.append(
            f"A rule that also saw the next stage's logits, which are not known when a text is deferred, gives "
            f"{ahead['accuracy']:.1%}."
        )
        return sentences


def compare_deferral_rules(
    run: Run,
    stage: str | None = None,
    *,
    evidence: Sequence[str] = EVIDENCE,
    train_run: Run | None = None,
    seed: int = 0,
) -> DeferralRules:
    """Compare, by cross-validation, deferral by confidence with a learned deferral rule.

    A text should be deferred where the stages after this one answer rightly and this one does not; a threshold on the
    confidence is not the best rule for that where the later stages are wrong on the same texts, or are specialists
    (Jitkrittum et al. 2023, "When does confidence-based cascade deferral suffice?"). The learned rule is a logistic
    regression on scores of this stage's logits. It predicts whether the answer of this stage is at least as good as
    that of the stages after it, which shadow scores know of every text. A cascade with the learned rule
    (`DeferralRules.spec`) is to be tuned and reported on other texts than these.

    Parameters
    ----------
    run : Run
        With shadow scores and labels.
    stage : str, optional
        A deferral stage; by default the first.
    evidence : sequence of str
        Scores of the stage: see `evidence.SCORES`.
    train_run : Run, optional
        The training set with features; scores of features (`mahalanobis`, `relative_mahalanobis`, `knn`) need it.
    seed : int
        Of the folds.

    Raises
    ------
    RunError
        No such deferral stage, no shadow scores or features, or too few texts on which one answer is better than the
        other.
    """
    run = run.labelled
    own = _deferral_stage(run, stage)
    rows, own_right, later_right = _both_answers(run, own)
    keep, groups = own_right >= later_right, run.text_groups[rows]
    _check_both(run, own, keep, groups)
    following = [s.name for s in run.spec.stages][[s.name for s in run.spec.stages].index(own) + 1]
    names = [f"{own}.{_checked(run, score)}" for score in evidence]
    arrays = shared_arrays(run, own, names, train_run)
    values = evidence_table(run, names, arrays).to_numpy()[rows]
    ahead = evidence_table(run, [f"{following}.{score}" for score in EVIDENCE], {}).to_numpy()[rows]
    decision = run.decision(own).take(rows)
    confidence = {
        CONFIDENCE: decision.confidence,
        LEARNED: out_of_fold_confidence(values, keep, groups, seed),
        WITH_NEXT: out_of_fold_confidence(np.column_stack([values, ahead]), keep, groups, seed),
    }
    deferred = float((~decision.ends).mean())
    kept_share = {name: _rank_in_fold(value, keep, groups, seed) for name, value in confidence.items()}
    # A text is answered here if a fraction of at most its rank is deferred.
    right = {name: np.where(rank >= deferred, own_right, later_right) for name, rank in kept_share.items()}
    mean_right = {name: own_right * rank + later_right * (1 - rank) for name, rank in kept_share.items()}
    table = pd.DataFrame(index=pd.Index(RULES, name="rule"))
    for metric, per_text in (("accuracy", right), ("mean_accuracy", mean_right)):
        for name in RULES:
            difference = per_text[name].astype(float) - per_text[CONFIDENCE]
            found = mean_difference_interval(difference, groups=groups)
            table.loc[name, metric] = per_text[name].mean()
            table.loc[name, [f"{metric}_difference", f"{metric}_low", f"{metric}_high"]] = list(found)
        table.loc[CONFIDENCE, [f"{metric}_low", f"{metric}_high"]] = 0.0
    weights, bias = fit_logistic(values, keep)
    origin = origin_of(run, train_run if arrays else None)
    origin |= {"n_keep": int(keep.sum()), "n_defer": int((~keep).sum())}
    rejector = Rejector(tuple(names), tuple(map(float, weights)), float(bias), fitted_on=origin)
    learned = rejector.confidence(dict(zip(names, values.T, strict=True)))
    threshold = float(np.quantile(learned, deferred, method="higher"))
    spec = with_rule(run.spec, own, rejector, arrays).with_thresholds({own: threshold})
    return DeferralRules(run.name, own, deferred, table, replace(spec, tuned_on=None), arrays)


def learned_targets(run: Run, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows that a learned rule of a deferral stage is fitted on, and whether the text should be kept there.

    These are the texts that reach the stage at the run's thresholds. A text should be kept where the stage's answer is
    at least as good as that of the stages after it.

    Returns
    -------
    rows : ndarray of int, shape (n,)
    keep : ndarray of bool, shape (n,)
    """
    rows, own_right, later_right = _both_answers(run, stage)
    keep = own_right >= later_right
    _check_both(run, stage, keep, run.text_groups[rows])
    return rows, keep


def _both_answers(run: Run, stage: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows that reach a deferral stage, and whether it, and the stages after it, are right there."""
    y_true = run.examples["label"].to_numpy(dtype=object)
    decisions = {s.name: run.decision(s.name) for s in run.spec.stages}
    rows = np.flatnonzero(route(run.spec, decisions).reached[stage])
    taken = {name: decision.take(rows) for name, decision in decisions.items()}
    later = require_scored(route(run.spec, taken, force={stage: False}), run.name)
    return rows, taken[stage].label_above == y_true[rows], later.predicted == y_true[rows]


def deferral_summary(run: Run, *, seed: int = 0) -> Summary:
    """Return, for each deferral stage of a run, whether confidence is enough to decide what it defers, for people."""
    sentences = []
    for stage in run.spec.stages:
        if stage.is_deferral:
            try:
                sentences += compare_deferral_rules(run, stage.name, seed=seed).summary()
            except RunError as error:
                sentences.append(f"Whether confidence is enough at stage {stage.name} is not known: {error}")
    return Summary(sentences or ["No stage of this cascade defers."])


def _deferral_stage(run: Run, stage: str | None) -> str:
    names = [s.name for s in run.spec.stages if s.is_deferral]
    if stage is not None:
        run.spec.stage(stage)  # names the nearest stage
    if not names or (stage is not None and stage not in names):
        which = f"stage '{stage}' does not defer" if stage else "no stage defers"
        raise RunError(f'{run.name}: {which}; name a stage with the role "deferral"')
    return stage or names[0]


def _check_both(run: Run, stage: str, keep: np.ndarray, groups: np.ndarray) -> None:
    n_better = n_different(groups[~keep])
    if min(n_better, n_different(groups[keep])) < MIN_TEXTS:
        raise RunError(
            f"{run.name}: of the texts that reach {stage}, the later stages are right and it is wrong on {n_better:,}; "
            f"a rule needs at least {MIN_TEXTS} such texts, and {MIN_TEXTS} others"
        )


def _checked(run: Run, score: str) -> str:
    if score not in SCORES:
        raise RunError(f"{run.name}: no score is named '{score}'{did_you_mean(score, list(SCORES))}")
    return score


def _rank_in_fold(confidence: np.ndarray, keep: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return each text's rank by confidence among the texts of its fold, as a fraction: the lowest is deferred first.

    Within a fold, all confidences come from one regression.
    """
    rank = np.empty(len(confidence))
    for _, test in stratified_folds(keep, groups, seed=seed):
        order = np.argsort(np.argsort(confidence[test], kind="stable"), kind="stable")
        rank[test] = (order + 0.5) / len(test)
    return rank
