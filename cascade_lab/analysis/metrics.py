"""How good a run is: metrics with intervals and confusion matrices, of one stage or of the whole cascade.

`stage=None` means the whole cascade, end to end. Everything is computed on the labelled examples, and an undefined
metric is NaN. The functions on arrays are in `classification`, `outcomes` and `bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import (
    N_RESAMPLES,
    Interval,
    fraction_interval,
    interval,
    ranking_metrics,
    resample_counts,
)
from cascade_lab.analysis.classification import (
    Normalize,
    confusion_matrix_frame,
    confusion_metrics,
    macro_f1_score,
    matrix_confused_pairs,
    matrix_label_metrics,
)
from cascade_lab.analysis.outcomes import FRACTIONS, OUTCOMES, Scope, metric_from_counts, outcome_codes
from cascade_lab.decisions import missing_scores_error, softmax
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
    in_scope = np.isin(y_true, spec.in_scope_labels)
    rejected = np.isin(y_pred, spec.reject_labels)
    return {
        "accuracy": _mean(right),
        "macro_f1": macro_f1_score(y_true, y_pred),
        "in_scope_accuracy": _mean(right[in_scope]),
        "reject_recall": _mean(right[~in_scope]),
        "reject_precision": _mean(right[rejected]),
    }


def outcome_intervals(
    counts: np.ndarray,
    names: Sequence[str] = tuple(FRACTIONS),
    *,
    costs: Mapping[str, float] | None = None,
    prevalence: float | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return metrics of `outcomes.METRICS` with their bootstrap intervals, from the numbers of texts of each outcome.

    Parameters
    ----------
    counts : ndarray of int, shape (6,)
        In the order of `OUTCOMES`.
    names : sequence of str
        The metrics.
    costs, prevalence
        As `outcomes.metric_from_counts` takes them.
    level, n_resamples, seed
        Of the bootstrap over texts.
    """
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), n_resamples)
    result = {}
    for name in names:
        value, resampled = (metric_from_counts(name, n, costs=costs, prevalence=prevalence) for n in (counts, drawn))
        result[name] = interval(float(value), resampled, level=level)
    return result


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
        a target at this stage (an example without a label has none, nor one that an earlier gate should have stopped);
        on those with a target `accuracy` and `macro_f1` of the stage's decisions, and of a gate `auroc` and
        `average_precision` of its confidence, for the examples that it should pass.
    """
    spec, decisions = run.spec.stage(stage), labelled_decisions(run, stage)
    y_true, y_pred = decisions.y_true, decisions.y_pred
    n_reached = int(_is_considered(run, stage, "reached").sum())
    result: dict[str, float] = {
        "reach": n_reached / len(run.examples),
        "n_reached": n_reached,
        "n_with_target": len(y_true),
        "accuracy": _mean(y_true == y_pred),
        "macro_f1": macro_f1_score(y_true, y_pred),
    }
    if spec.is_gate:
        weights = np.ones((1, len(y_true)), dtype=np.int32)
        auroc, average_precision = ranking_metrics(y_true == spec.pass_label, decisions.confidence, weights=weights)
        result |= {"auroc": float(auroc[0]), "average_precision": float(average_precision[0])}
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
    logits : ndarray of float32, shape (n, n_labels)
    confidence : ndarray of float64, shape (n,)
        A gate's probability of its pass label; the last stage's highest probability.
    """

    rows: np.ndarray
    y_true: np.ndarray
    y_pred: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray


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
    return LabelledDecisions(rows, targets[rows], decision.label, run.scores(stage).logits[rows], decision.confidence)


class InScopePredictions(NamedTuple):
    """The most probable label in scope of each example, as if no stage rejected it.

    Attributes
    ----------
    p_gates : ndarray of float64, shape (n,)
        The product of the gates' probabilities of their pass labels; 1 without gates.
    p_class : ndarray of float64, shape (n,)
        The last stage's highest probability of a label in scope.
    correct : ndarray of bool, shape (n,)
        Whether that label is the true label; False for an example out of scope.
    """

    p_gates: np.ndarray
    p_class: np.ndarray
    correct: np.ndarray


def in_scope_predictions(run: Run, *, on: On = "all") -> InScopePredictions:
    """Return the most probable label in scope of the labelled examples, in the order of `run.labelled.examples`.

    `on` selects the examples that reached the last stage, or all of them, from shadow scores.

    Raises
    ------
    RunError
        No example has a label; or `on` is "all", and an example has no shadow scores.
    """
    run = run.labelled
    last, labels = run.spec.last, run.spec.in_scope_labels
    rows = np.flatnonzero(_is_considered(run, last.name, on))
    p_gates = np.ones(len(rows))
    for stage in run.spec.stages[:-1]:
        _is_considered(run, stage.name, on)
        p_gates *= run.decision(stage.name).confidence[rows]
    p = softmax(run.scores(last.name).logits[rows], last.temperature)
    p = p[:, [last.labels.index(label) for label in labels]]
    best = np.array(labels, dtype=object)[p.argmax(axis=1)]
    return InScopePredictions(p_gates, p.max(axis=1), run.examples["label"].to_numpy(dtype=object)[rows] == best)


def confusion(
    run: Run, stage: str | None = None, *, on: On = "reached", normalize: Normalize | None = None
) -> pd.DataFrame:
    """Return a confusion matrix: true labels in rows, predicted labels in columns.

    Parameters
    ----------
    run : Run
    stage : str, optional
        Without it, end to end; the labels that reject are then the last rows and columns. A stage's matrix has its own
        labels, and leaves out examples without a target there (an earlier gate should have stopped them).
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
        labels = tuple(dict.fromkeys((*spec.labels, *spec.reject_labels)))
        _, y_true, y_pred, *_ = labelled_decisions(run, stage, on=on)
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
    return matrix_label_metrics(confusion(run, stage, on=on), level=level)


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
    """Return the metrics of one stage or of the whole cascade, with bootstrap intervals over the examples.

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
        (see `confusion_metrics`); of a gate also `auroc` and `average_precision` of its confidence; of the last stage
        `top_<k>_accuracy`; end to end `in_scope_accuracy`, `reject_recall`, `reject_precision`, `coverage` and `risk`.

    Raises
    ------
    SpecError, RunError
        As `confusion` does.
    """
    run = run.labelled
    matrix = confusion(run, stage, on=on)
    counts, labels = matrix.to_numpy(), matrix.index
    rows, columns = np.nonzero(counts)
    cells = counts[rows, columns]
    # These metrics depend only on the cell of each example; the sizes of cells in a resample are multinomial.
    n, rng = len(run.examples), np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.append(cells, n - cells.sum()) / n, n_resamples)[:, :-1]
    values, resampled = (confusion_metrics(rows, columns, len(labels), weights) for weights in (cells[None], drawn))
    if stage is None:
        is_outcome = np.eye(len(OUTCOMES))[outcome_codes(run.spec, labels[rows], labels[columns])]
        for name in FRACTIONS:
            values[name], resampled[name] = (metric_from_counts(name, w @ is_outcome) for w in (cells[None], drawn))
    metrics = {name: interval(float(values[name][0]), resampled[name], level=level) for name in values}
    if stage is not None:
        spec, decisions = run.spec.stage(stage), labelled_decisions(run, stage, on=on)
        options: dict[str, Any] = {"level": level, "n_resamples": n_resamples, "seed": seed}
        metrics |= (
            _gate_metrics(spec, decisions, **options)
            if spec.is_gate
            else _top_k_metrics(spec, decisions, n, top_k, **options)
        )
    return pd.DataFrame.from_dict(metrics, orient="index", columns=Interval._fields).rename_axis("metric")


def _gate_metrics(
    gate: StageSpec, decisions: LabelledDecisions, *, level: float, n_resamples: int, seed: int
) -> dict[str, Interval]:
    """Return `auroc` and `average_precision` of a gate."""
    should_pass, n = decisions.y_true == gate.pass_label, len(decisions.y_true)
    weights = np.ones((1, n), dtype=np.int32), resample_counts(n, n_resamples=n_resamples, seed=seed)
    values, resampled = (ranking_metrics(should_pass, decisions.confidence, weights=w) for w in weights)
    return {
        name: interval(float(value[0]), drawn, level=level)
        for name, value, drawn in zip(("auroc", "average_precision"), values, resampled, strict=True)
    }


def _top_k_metrics(
    last: StageSpec, decisions: LabelledDecisions, n: int, top_k: Sequence[int], **options: Any
) -> dict[str, Interval]:
    """Return `top_<k>_accuracy` of the last stage, for each k below its number of labels, in a run of `n` examples."""
    n_decided = len(decisions.y_true)
    columns = pd.Index(last.labels).get_indexer(decisions.y_true)
    logit_of_label = decisions.logits[np.arange(n_decided), columns]
    rank = np.full(n, len(last.labels) + 1)
    rank[:n_decided] = 1 + (decisions.logits > logit_of_label[:, None]).sum(axis=1)
    is_decided = np.arange(n) < n_decided
    return {
        f"top_{k}_accuracy": fraction_interval(rank <= k, is_decided, **options) for k in top_k if k < len(last.labels)
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
