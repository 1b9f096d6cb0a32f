"""A run in plain sentences: how good it is, which stage causes its errors, and what to do next."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pandas as pd

from cascade_lab.analysis.deferral import HARMFUL, NEEDLESS, RIGHT_ANSWER, USEFUL, VAIN, deferrals
from cascade_lab.analysis.duplicates import repeats_sentences
from cascade_lab.analysis.errors import (
    RECOVERABLE,
    RECOVERABLE_ANSWER,
    UNRECOVERABLE,
    UNRECOVERABLE_ANSWER,
    blame,
    oracle_ladder,
)
from cascade_lab.analysis.latency import latency_summary
from cascade_lab.analysis.metrics import metric_intervals, stage_metrics
from cascade_lab.analysis.outcomes import ERRORS, FALSE_ACCEPT, FALSE_REJECT, WRONG_CLASS, WRONG_REJECT, outcome_counts
from cascade_lab.analysis.sentences import Summary, percent, percent_interval
from cascade_lab.analysis.slicing import slice_summary, slices
from cascade_lab.analysis.tuned_on import WARNING, is_tuning_set

if TYPE_CHECKING:
    from cascade_lab.analysis.examples import Thresholds
    from cascade_lab.run import Run

_ADVICE = {
    FALSE_ACCEPT: "false accepts (texts out of scope that were answered with a class). A higher threshold rejects more "
    "of them. More training texts out of scope help the stage that should reject them.",
    FALSE_REJECT: "false rejects (texts in scope that were rejected). A lower threshold rejects fewer of them. More "
    "training texts in scope help the stage that rejects them.",
    WRONG_CLASS: "confusions between the labels of the last stage. Read the most confused pairs, and check the labels "
    "of these texts (cascade-lab audit).",
    WRONG_REJECT: "texts out of scope that were rejected with a wrong label. Check whether the reject labels overlap.",
    RECOVERABLE_ANSWER: "overconfident answers that the later stages would have corrected. A higher threshold defers "
    "more of them, which costs time (cascade_lab.thresholds.cost_front).",
    UNRECOVERABLE_ANSWER: "overconfident answers that the later stages would not have corrected. A higher threshold "
    "does not help; more training texts of these labels do.",
}


def run_summary(run: Run) -> Summary:
    """Return how good a run is in a few sentences, a warning first (if there is one) and the advice last.

    Raises
    ------
    RunError
        No example has a label.
    """
    n, n_labelled = len(run.examples), len(run.labelled.examples)
    intervals = metric_intervals(run)
    last = run.spec.last.name
    sentences = [WARNING] if is_tuning_set(run) else []
    if n_labelled < n:
        sentences.append(f"{n_labelled:,} of {n:,} texts have a label; the metrics are computed on these.")
    accuracy, in_scope, rejected = (
        percent_interval(*intervals.loc[name]) for name in ("accuracy", "in_scope_accuracy", "reject_recall")
    )
    sentences.append(
        f"The cascade answers {accuracy} of {n_labelled:,} texts correctly (95% intervals in parentheses)."
    )
    if intervals["value"].notna()["in_scope_accuracy"]:
        sentences.append(f"Of the texts in scope, it answers {in_scope} correctly.")
    if intervals["value"].notna()["reject_recall"]:
        sentences.append(f"Of the texts out of scope, it rejects {rejected} with the right label.")
    sentences += repeats_sentences(run.labelled.text_groups)
    if len(run.spec.stages) > 1:
        sentences.append(f"{percent(stage_metrics(run, last)['reach'])} of the texts reach the last stage, {last}.")
    sentences += latency_summary(run)
    errors = outcome_counts(run.spec, run.labelled.predictions)[list(ERRORS)]
    if errors.sum():
        kind = errors.idxmax()
        sentences.append(f"Advice: {errors[kind] / errors.sum():.0%} of the errors are {_ADVICE[kind]}")
    return Summary(sentences)


def interval_notes(run: Run) -> Summary:
    """Return how many texts repeat, and why some intervals of `metric_intervals` are missing, end to end and by stage.

    Raises
    ------
    RunError
        No example has a label.
    """
    notes = list(metric_intervals(run, n_resamples=2).attrs["notes"])
    for stage in run.spec.stages:
        of_stage = metric_intervals(run, stage.name, n_resamples=2).attrs["notes"]
        notes += [f"Stage {stage.name}: {note}" for note in of_stage]
    return Summary(notes)


def error_summary(run: Run, *, thresholds: Thresholds = None) -> Summary:
    """Return which stage causes the errors of a run and what a better one would gain, in a few sentences.

    Raises
    ------
    RunError
        No example has a label, or a text that this needs has no shadow scores.
    """
    run = run.labelled.with_thresholds(thresholds)
    errors, n = blame(run), len(run.examples)
    if errors.empty:
        return Summary([f"All {n:,} texts are answered correctly."])
    repeats = repeats_sentences(run.text_groups)
    by_stage = errors["fault"].value_counts().reindex([stage.name for stage in run.spec.stages], fill_value=0)
    sentences = [f"{len(errors):,} of {n:,} texts ({percent(len(errors) / n)}) are answered wrongly."]
    sentences += [
        f"Stage {name} causes {count:,} of the errors ({count / len(errors):.0%})."
        for name, count in by_stage.items()
        if count
    ]
    n_recoverable, n_unrecoverable = (int((errors["kind"] == kind).sum()) for kind in (RECOVERABLE, UNRECOVERABLE))
    n_rejected = n_recoverable + n_unrecoverable
    if n_rejected:
        sentences.append(
            f"{n_rejected:,} texts in scope are rejected. For {n_recoverable:,} of them the last stage's most probable "
            f"label is right, so lower thresholds give the right answer; for {n_unrecoverable:,} no thresholds do."
        )
    sentences += _deferral_sentences(run)
    ladder = oracle_ladder(run).loc[[f"perfect {stage.name}" for stage in run.spec.stages]]
    best = ladder.loc[ladder["points"].idxmax()]
    sentences.append(
        f"If one stage made no mistakes, {best.name.removeprefix('perfect ')} would gain the most: "
        f"{best['points']:.1f} percentage points of accuracy ({best['points_low']:.1f} to {best['points_high']:.1f})."
    )
    sentences += repeats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that slices by wordpieces are left out, without a vocabulary
        sentences += slice_summary(slices(run))
    return Summary([*sentences, *_error_advice(errors, by_stage)])


def _deferral_sentences(run: Run) -> list[str]:
    """Return what each deferral stage does with the texts that reach it, one sentence per stage."""
    sentences = []
    table = deferrals(run) if any(stage.is_deferral for stage in run.spec.stages) else pd.DataFrame({"stage": []})
    for stage, rows in table.groupby("stage", sort=False):
        n = rows.set_index("kind")["n_examples"]
        n_overconfident = n[RECOVERABLE_ANSWER] + n[UNRECOVERABLE_ANSWER]
        n_answered, n_deferred = n[RIGHT_ANSWER] + n_overconfident, n[[USEFUL, NEEDLESS, HARMFUL, VAIN]].sum()
        sentences.append(
            f"Stage {stage} answers {n_answered:,} texts, {n_overconfident:,} of them wrongly "
            f"({n[RECOVERABLE_ANSWER]:,} of these the later stages would have answered rightly), and defers "
            f"{n_deferred:,}, {n[NEEDLESS]:,} of them needlessly: its own label was right too."
        )
    return sentences


def _error_advice(errors: pd.DataFrame, by_stage: pd.Series) -> list[str]:
    """Return one or two pieces of advice, from the errors of the stage that causes most of them."""
    stage = str(by_stage.idxmax())
    kinds = errors.loc[errors["fault"] == stage, "kind"]
    n_unrecoverable = int((kinds == UNRECOVERABLE).sum())
    outcome = kinds.replace({RECOVERABLE: FALSE_REJECT, UNRECOVERABLE: FALSE_REJECT}).value_counts()
    kind = str(outcome.idxmax())
    advice = [f"Advice: start with stage {stage}. {outcome[kind] / len(kinds):.0%} of its errors are {_ADVICE[kind]}"]
    if kind == FALSE_REJECT and n_unrecoverable > outcome[kind] / 2:
        advice.append(
            f"For most of these rejected texts ({n_unrecoverable:,} of {outcome[kind]:,}) no thresholds give the right "
            "answer, because the last stage's most probable label is wrong: improve the last stage first."
        )
    return advice
