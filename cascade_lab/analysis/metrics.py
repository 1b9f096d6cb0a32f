"""How good a run is: metrics with intervals and confusion matrices, of one stage or of the whole cascade.

`stage=None` means the whole cascade, end to end. Everything is computed on the labelled examples, and an undefined
metric is NaN. The functions on arrays are in `classification`, `intervals`, `outcomes` and `ranking`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import N_RESAMPLES, Interval, effective_shares, fraction_interval
from cascade_lab.analysis.classification import (
    Normalize,
    confusion_matrix_frame,
    macro_f1_score,
    matrix_confused_pairs,
    matrix_label_metrics,
    too_few_texts,
)
from cascade_lab.analysis.duplicates import repeats_sentences
from cascade_lab.analysis.intervals import outcome_intervals, prediction_intervals
from cascade_lab.analysis.outcomes import Scope, outcome_codes
from cascade_lab.analysis.ranking import ranking_intervals, ranking_metrics
from cascade_lab.by_block import by_block
from cascade_lab.calibrator import calibrated_logits
from cascade_lab.decisions import has_right_decision, missing_scores_error, probabilities
from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import StageSpec

On = Literal["reached", "all"]


def prediction_metrics(spec: Scope, predictions: pd.DataFrame) -> dict[str, float]:
    """Return the metrics of a cascade's predictions, live or replayed.

    Parameters
    ----------
    spec : CascadeSpec or LabelScope
    predictions : DataFrame
        With `label` and `predicted`; every row has a label.

    Returns
    -------
    dict
        `accuracy`; `macro_f1`, as the function has it; `in_scope_accuracy`: the fraction right of the examples whose
        true label is in scope (a label of the last stage that does not reject); `reject_recall`: the fraction of the
        other examples that are rejected with their own label; `reject_precision`: the fraction right of the examples
        that are rejected.
    """
    y_true, y_pred = (predictions[column].to_numpy(dtype=object) for column in ("label", "predicted"))
    right = y_true == y_pred
    in_scope = pd.Index(y_true).isin(spec.in_scope_labels)
    rejected = pd.Index(y_pred).isin(spec.reject_labels)
    return {
        "accuracy": _mean(right),
        "macro_f1": macro_f1_score(y_true, y_pred),
        "in_scope_accuracy": _mean(right[in_scope]),
        "reject_recall": _mean(right[~in_scope]),
        "reject_precision": _mean(right[rejected]),
    }


def summarize(run: Run) -> dict[str, Any]:
    """Return the content of `metrics.json`: `n_examples`, `n_labelled`, `end_to_end` and `stages`.

    `end_to_end` is as `prediction_metrics` returns it, and `stages` has the `stage_metrics` of each stage.
    """
    return {
        "n_examples": len(run.examples),
        "n_labelled": len(run.labelled.examples),
        "end_to_end": prediction_metrics(run.spec, run.labelled.predictions),
        "stages": {stage.name: stage_metrics(run, stage.name) for stage in run.spec.stages},
    }


def stage_metrics(run: Run, stage: str) -> dict[str, float]:
    """Return the metrics of one stage on the examples that reached it (shadow scores are left out).

    Returns
    -------
    dict
        `reach`: the fraction of all examples that reach the stage; `n_reached`; `n_with_target`: how many of these have
        a target at this stage (see `decisions.stage_targets`; an example without a label has none, nor has one out of
        scope at a last stage without a label for it); `n_out_of_scope`: how many of those with a target are out of
        scope. On those with a target `accuracy` and `macro_f1` of the stage's decisions, and of a gate `auroc` and
        `average_precision` of 1 - its confidence, where the examples that it should stop are the positives. Of a
        deferral stage all but the reach is about the examples that it answers (see `stage_decisions`), and `answered`
        is their fraction of those that reach it.
    """
    spec, decisions = run.spec.stage(stage), stage_decisions(run, stage)
    y_true, y_pred = decisions.y_true, decisions.y_pred
    n_reached = int(_is_considered(run, stage, "reached").sum())
    result: dict[str, float] = {
        "reach": n_reached / len(run.examples),
        "n_reached": n_reached,
        "n_with_target": len(y_true),
        "n_out_of_scope": int(decisions.out_of_scope.sum()),
        "accuracy": _mean(y_true == y_pred),
        "macro_f1": macro_f1_score(y_true, y_pred),
    }
    if spec.is_gate:
        weights = np.ones((1, len(y_true)), dtype=np.int32)
        auroc, average_precision = ranking_metrics(y_true != spec.pass_label, -decisions.confidence, weights=weights)
        result |= {"auroc": float(auroc[0]), "average_precision": float(average_precision[0])}
    if spec.is_deferral:
        n_answered = int((run.predictions["decided_by"] == stage).sum())
        result["answered"] = n_answered / n_reached if n_reached else math.nan
    return result


class LabelledDecisions(NamedTuple):
    """What a stage decided about the examples that have a target there, and what it should have decided.

    Attributes
    ----------
    rows : ndarray of int, shape (n,)
        The places of these examples in `Run.examples`.
    y_true, y_pred : ndarray of str, shape (n,)
        The stage's targets (see `decisions.stage_targets`), and its decisions as labels: its pass label where a gate
        passes an example.
    confidence : ndarray of float64, shape (n,)
        What the stage compares with its threshold.
    out_of_scope : ndarray of bool, shape (n,)
        Whether the example's true label is out of scope.
    all_logits : ndarray of float32, shape (n_examples, n_labels)
        Those of all examples of the run, not copied.
    """

    rows: np.ndarray
    y_true: np.ndarray
    y_pred: np.ndarray
    confidence: np.ndarray
    out_of_scope: np.ndarray
    all_logits: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """The logits of these examples, a copy: float32, shape (n, n_labels)."""
        return self.all_logits[self.rows]


def labelled_decisions(run: Run, stage: str, *, on: On = "reached") -> LabelledDecisions:
    """Return the decisions of `stage` about the labelled examples that have a target there.

    Parameters
    ----------
    run : Run
    stage : str
    on : {"reached", "all"}
        The examples that reached the stage, or all, from shadow scores.

    Raises
    ------
    SpecError
        No such stage.
    RunError
        `on` is "all", and an example has no shadow scores.
    """
    targets = run.targets(stage)
    has_target = pd.notna(targets) & run.examples["label"].notna().to_numpy()
    rows = np.flatnonzero(has_target & _is_considered(run, stage, on, needed=has_target))
    decision = run.decision(stage).take(rows)
    out_of_scope = ~run.examples["label"].iloc[rows].isin(run.spec.in_scope_labels).to_numpy()
    logits = run.scores(stage).logits
    return LabelledDecisions(rows, targets[rows], decision.label, decision.confidence, out_of_scope, logits)


def stage_decisions(run: Run, stage: str, *, on: On = "reached") -> LabelledDecisions:
    """Return the decisions of `stage` that its metrics and its confusion matrix are about: those that it answers for.

    They are `labelled_decisions`, but for a deferral stage. Of the examples that reached it, only those that it answers
    are included; with `on="all"`, all examples, as if it answered every one. An example that only a later stage can
    answer rightly is included too, with its true label as the target: the stage should have deferred it.

    Raises
    ------
    SpecError, RunError
        As `labelled_decisions` does.
    """
    decisions = labelled_decisions(run, stage, on=on)
    if not run.spec.stage(stage).is_deferral:
        return decisions
    y_true = run.examples["label"].to_numpy(dtype=object)
    target = run.targets(stage)
    for_later = pd.isna(target) & pd.notna(y_true) & has_right_decision(run.spec, stage, y_true)
    target = np.where(for_later, y_true, target)
    considered = _is_considered(run, stage, on, needed=pd.notna(target))
    if on == "reached":
        considered = considered & run.decision(stage).ends
    rows = np.flatnonzero(considered & pd.notna(target) & pd.notna(y_true))
    decision = run.decision(stage).take(rows)
    out_of_scope = ~pd.Index(y_true[rows]).isin(run.spec.in_scope_labels)
    logits = run.scores(stage).logits
    return LabelledDecisions(rows, target[rows], decision.label, decision.confidence, out_of_scope, logits)


class InScopePredictions(NamedTuple):
    """The most probable label in scope of each example, as if no stage rejected it.

    Where a deferral stage answers the example if every gate passes it, the label is that stage's.

    Attributes
    ----------
    rows : ndarray of int, shape (n,)
        The places of these examples in `run.labelled.examples`.
    p_gates : ndarray of float64, shape (n,)
        The product of the gates' probabilities of their pass labels; 1 without gates.
    p_class : ndarray of float64, shape (n,)
        The highest probability of a label in scope, of the last stage or of the deferral stage that answers.
    correct : ndarray of bool, shape (n,)
        Whether that label is the true label; False for an example out of scope.
    out_of_scope : ndarray of bool, shape (n,)
        Whether the example's true label is out of scope.
    """

    rows: np.ndarray
    p_gates: np.ndarray
    p_class: np.ndarray
    correct: np.ndarray
    out_of_scope: np.ndarray


def in_scope_predictions(run: Run, *, on: On = "all") -> InScopePredictions:
    """Return the most probable label in scope of the labelled examples, in the order of `run.labelled.examples`.

    `on` selects the examples that reached the last stage, or all of them, from shadow scores. In a cascade with a
    deferral stage, "reached" selects those that no gate stopped.

    Raises
    ------
    RunError
        No example has a label; or `on` is "all", and an example has no shadow scores.
    """
    run = run.labelled
    last, labels = run.spec.last, run.spec.in_scope_labels
    deferral = [stage for stage in run.spec.stages if stage.is_deferral]
    if deferral and on == "reached":
        gates = [stage.name for stage in run.spec.stages if stage.is_gate]
        rows = np.flatnonzero(~run.predictions["decided_by"].isin(gates).to_numpy())
    else:
        rows = np.flatnonzero(_is_considered(run, last.name, on))
    is_open = np.ones(len(rows), dtype=bool)  # no deferral stage has answered the example yet
    p_gates, p_class, best = np.ones(len(rows)), np.zeros(len(rows)), np.full(len(rows), None, dtype=object)
    in_scope = set(labels)
    for stage in run.spec.stages:
        if on == "all":
            _is_considered(run, stage.name, on)
        decision = run.decision(stage.name).take(rows)
        if stage.is_gate:
            p_gates[is_open] *= decision.confidence[is_open]
            continue
        answers = is_open & (decision.above | (stage is last))
        own = [label for label in stage.labels if label in in_scope]
        if own and answers.any():
            place, p_class[answers] = _most_probable(stage, run.scores(stage.name).logits, rows[answers], own)
            best[answers] = np.array(own, dtype=object)[place]
        is_open &= ~answers
    y_true = run.examples["label"].to_numpy(dtype=object)[rows]
    return InScopePredictions(rows, p_gates, p_class, y_true == best, ~pd.Index(y_true).isin(labels))


def _most_probable(
    stage: StageSpec, logits: np.ndarray, rows: np.ndarray, labels: Sequence[str]
) -> tuple[np.ndarray, ...]:
    """Return which of some labels of a stage is the most probable for each of some rows, and its probability."""
    columns = [stage.labels.index(label) for label in labels]

    def of_block(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        p = probabilities(stage, logits[rows])[:, columns]
        return p.argmax(axis=1), p.max(axis=1)

    return by_block(of_block, rows, n_columns=logits.shape[1])


def confusion(
    run: Run, stage: str | None = None, *, on: On = "reached", normalize: Normalize | None = None
) -> pd.DataFrame:
    """Return a confusion matrix: true labels in rows, predicted labels in columns.

    Parameters
    ----------
    run : Run
    stage : str, optional
        Without it, end to end; the labels that reject are then the last rows and columns. A stage's matrix has its own
        labels, and leaves out examples without a target there (an earlier gate should have stopped them). That of a
        deferral stage has the examples that it answers, or with `on="all"` all, as if it answered every one.
    on : {"reached", "all"}
        For a stage: the examples that reached it, or all, from shadow scores.
    normalize : {"true", "pred", "all"}, optional
        See `confusion_matrix_frame`.

    Raises
    ------
    SpecError, RunError
        As `labelled_decisions` does; RunError also if no example has a label.
    """
    run = run.labelled
    if stage is None:
        labels = run.spec.labels
        y_true, y_pred = run.predictions["label"], run.predictions["predicted"]
    else:
        spec = run.spec.stage(stage)
        _, y_true, y_pred, *_ = stage_decisions(run, stage, on=on)
        of_later = [label for label in run.spec.labels if spec.is_deferral and label in set(y_true)]
        labels = tuple(dict.fromkeys((*spec.labels, *spec.reject_labels, *of_later)))
    return confusion_matrix_frame(y_true, y_pred, labels, normalize=normalize)


def confused_pairs(run: Run, stage: str | None = None, *, on: On = "reached", n: int | None = 20) -> pd.DataFrame:
    """Return the `n` most frequent confusions (None: all), of one stage or end to end; `on` as for `confusion`.

    Returns
    -------
    DataFrame
        `label`, `predicted`, `n_examples`, and `fraction_of_label`, of the examples with that true label. The most
        frequent first; among equals the larger fraction first, then in the order of the labels.
    """
    return matrix_confused_pairs(confusion(run, stage, on=on), n=n)


def label_metrics(run: Run, stage: str | None = None, *, on: On = "reached", level: float = 0.95) -> pd.DataFrame:
    """Return precision, recall and F1 of every label, of one stage or end to end, with Wilson's intervals.

    Precision and recall are fractions, and F1 is a monotone function of one, TP / (TP + FP + FN); so Wilson's interval
    (1927) applies to all three. Unlike a bootstrap interval it is not empty where all of a label's few texts are right.
    Equal texts count as one observation.

    Returns
    -------
    DataFrame
        Three rows per label, in the order of the labels: `label`, `support` (examples with that true label), `metric`,
        `value`, `low`, `high`. NaN where the metric is undefined.

    Raises
    ------
    SpecError, RunError
        As `confusion` does.
    """
    run = run.labelled
    matrix = confusion(run, stage, on=on)
    y_true, y_pred, groups = _labels_and_groups(run, stage, on)
    true, predicted = (matrix.index.get_indexer(y) for y in (y_true, y_pred))
    differs = true != predicted
    either, twice = np.append(true, predicted[differs]), np.append(groups, groups[differs])
    of_metric = {"precision": (predicted, groups), "recall": (true, groups), "f1": (either, twice)}
    shares = {name: effective_shares(codes, len(matrix), of) for name, (codes, of) in of_metric.items()}
    return matrix_label_metrics(matrix, shares=shares, level=level)


def metric_intervals(
    run: Run,
    stage: str | None = None,
    *,
    on: On = "reached",
    top_k: Sequence[int] = (1, 3, 5),
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the metrics of one stage or of the whole cascade, with intervals.

    Fractions have Wilson's interval, and the other metrics relatives of it that cover their true value in simulations
    (`bootstrap.score_interval`, `ranking.auroc_interval`). Equal texts count as one observation.

    Parameters
    ----------
    run : Run
    stage : str, optional
    on : {"reached", "all"}
        For a stage: the examples that reached it, or all, from shadow scores.
    top_k : sequence of int
        For the last stage: each k below its number of labels gives `top_<k>_accuracy`, the fraction of examples whose
        true label is among the k most probable ones.

    Returns
    -------
    DataFrame
        One row per metric, with `value`, `low` and `high`: `accuracy`, `macro_precision`, `macro_recall` and `macro_f1`
        (see `confusion_metrics`); of a gate also `auroc` and `average_precision` (see `stage_metrics`); of another
        stage `top_<k>_accuracy`; end to end `in_scope_accuracy`, `reject_recall`, `reject_precision`, `coverage` and
        `risk`. `low` and `high` are NaN where there are too few texts. `attrs["notes"]` are sentences that say so, and
        how many texts repeat others.

    Raises
    ------
    SpecError, RunError
        As `confusion` does.
    """
    run = run.labelled
    y_true, y_pred, groups = _labels_and_groups(run, stage, on)
    options: dict[str, Any] = {"groups": groups, "level": level, "n_resamples": n_resamples, "seed": seed}
    metrics = prediction_intervals(y_true, y_pred, **options)
    reason = too_few_texts(pd.Series(y_true).value_counts().to_numpy())
    notes = [*repeats_sentences(groups), *([reason] if reason else [])]
    if stage is None:
        metrics |= outcome_intervals(outcome_codes(run.spec, y_true, y_pred), groups=groups, level=level)
        return _with_notes(metrics, notes)
    decisions = stage_decisions(run, stage, on=on)
    if run.spec.stage(stage).is_gate:
        should_stop = decisions.y_true != run.spec.stage(stage).pass_label
        metrics |= ranking_intervals(should_stop, -decisions.confidence, groups=groups, level=level)
        if math.isnan(metrics["auroc"].low) and not math.isnan(metrics["auroc"].value):
            notes.append("AUROC and average precision have no interval: one kind has a single text.")
    else:
        metrics |= _top_k_metrics(run.spec.stage(stage), decisions, top_k, groups=groups, level=level)
    return _with_notes(metrics, notes)


def _labels_and_groups(run: Run, stage: str | None, on: On) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the true labels, the predicted labels and the groups of equal texts that `confusion` counts."""
    groups = run.text_groups
    if stage is None:
        y_true, y_pred = (run.predictions[column].to_numpy(dtype=object) for column in ("label", "predicted"))
        return y_true, y_pred, groups
    decisions = stage_decisions(run, stage, on=on)
    return decisions.y_true, decisions.y_pred, groups[decisions.rows]


def _with_notes(metrics: dict[str, Interval], notes: list[str]) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(metrics, orient="index", columns=Interval._fields).rename_axis("metric")
    table.attrs["notes"] = notes
    return table


def _top_k_metrics(
    last: StageSpec, decisions: LabelledDecisions, top_k: Sequence[int], *, groups: np.ndarray, level: float
) -> dict[str, Interval]:
    """Return `top_<k>_accuracy` of a stage that answers, for each k below its number of labels."""
    columns = pd.Index(last.labels).get_indexer(decisions.y_true)

    def ranks(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray]:
        logits = calibrated_logits(last, decisions.all_logits[rows])
        of_label = logits[np.arange(len(columns)), columns]
        of_label = np.where(columns < 0, -np.inf, of_label)  # a label of a later stage is never among the best
        return (1 + (logits > of_label[:, None]).sum(axis=1),)

    (rank,) = by_block(ranks, decisions.rows, columns, n_columns=len(last.labels))
    everything = np.ones(len(rank), dtype=bool)
    return {
        f"top_{k}_accuracy": fraction_interval(rank <= k, everything, groups=groups, level=level)
        for k in top_k
        if k < len(last.labels)
    }


def _is_considered(run: Run, stage: str, on: On, *, needed: np.ndarray | None = None) -> np.ndarray:
    """Return which examples `on` selects at a stage: bool, shape (n,). Raises where a needed one has no scores."""
    scores = run.scores(stage)
    if on == "reached":
        return scores.scored & ~scores.shadow
    if on != "all":
        raise RunError(
            f"on is {on!r}; it must be 'reached' (examples that reached the stage) or 'all' (needs shadow scores)"
        )
    missing = ~scores.scored if needed is None else ~scores.scored & needed
    if missing.any():
        raise missing_scores_error(run.name, stage, int(missing.sum()))
    return np.ones(len(scores.scored), dtype=bool)


def _mean(right: np.ndarray) -> float:
    return float(np.mean(right)) if len(right) else math.nan
