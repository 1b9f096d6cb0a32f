"""How good a run is, per stage and end to end; undefined figures are NaN.

`summarize` is what `metrics.json` holds. `figures`, `class_figures`, `confused_pairs` and `confusion` return tables, of
one stage or, without one, of the whole cascade; figures come with an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, roc_auc_score

from cascade_lab.analysis.bootstrap import N_RESAMPLES, Interval, fraction_interval, interval, resample_counts
from cascade_lab.analysis.goals import FRACTIONS, figure_of
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_codes
from cascade_lab.analysis.resamples import cell_figures, ranking_figures
from cascade_lab.errors import RunError
from cascade_lab.run import Run
from cascade_lab.serial import answer, probabilities
from cascade_lab.spec import CascadeSpec, StageSpec

On = Literal["reached", "all"]
Normalize = Literal["true", "pred", "all"]


def summarize(run: Run) -> dict[str, Any]:
    """Return what `metrics.json` holds: `n_examples`, `end_to_end` and `stages`."""
    return {
        "n_examples": len(run.examples),
        "end_to_end": end_to_end(run),
        "stages": {stage.name: of_stage(run, stage.name) for stage in run.spec.stages},
    }


def end_to_end(run: Run) -> dict[str, float]:
    """Return the cascade's figures, over all examples, as `figures_of` has them."""
    return figures_of(run.spec, run.predictions)


def figures_of(spec: CascadeSpec, predictions: pd.DataFrame) -> dict[str, float]:
    """Return a cascade's figures on its live answers, or on those of a replay.

    Returns
    -------
    dict
        `accuracy`; `macro_f1` over the labels that occur in gold or answers; `in_scope_accuracy`: the
        fraction right of those whose gold label belongs to the last stage; `reject_recall`: the fraction of
        the others that are answered with their reject label; `reject_precision`: the fraction right of the
        answers that reject.
    """
    y_true = predictions["label"].to_numpy(dtype=object)
    y_pred = predictions["predicted"].to_numpy(dtype=object)
    right = y_true == y_pred
    in_scope = np.isin(y_true, spec.in_scope_labels)
    rejected = np.isin(y_pred, spec.reject_labels)
    return {
        "accuracy": _mean(right),
        "macro_f1": float(f1_score(y_true, y_pred, average="macro", zero_division=0.0)),
        "in_scope_accuracy": _mean(right[in_scope]),
        "reject_recall": _mean(right[~in_scope]),
        "reject_precision": _mean(right[rejected]),
    }


def of_stage(run: Run, stage: str) -> dict[str, float]:
    """Return one stage's figures, over the examples that reached it (shadow scores are left out).

    Returns
    -------
    dict
        `reach`: the fraction of all examples that arrive; `n_reached`; `n_gold`: how many of those have a
        gold label at this stage (an example that an earlier gate should have stopped has none); over these
        `accuracy` and `macro_f1` of the stage's decisions, and for a gate `auroc` and `average_precision` of
        the probability of its pass label.
    """
    spec, found = run.spec.stage(stage), judged(run, stage)
    y_true, y_pred = found.y_true, found.y_pred
    n_reached = int((~run.scores(stage).shadow).sum())
    result: dict[str, float] = {
        "reach": n_reached / len(run.examples),
        "n_reached": n_reached,
        "n_gold": len(y_true),
        "accuracy": _mean(y_true == y_pred),
        "macro_f1": (float(f1_score(y_true, y_pred, average="macro", zero_division=0.0)) if len(y_true) else math.nan),
    }
    if spec.is_gate:
        should_pass = y_true == spec.pass_label
        both = len(set(should_pass)) == 2
        result["auroc"] = float(roc_auc_score(should_pass, found.decisive)) if both else math.nan
        result["average_precision"] = float(average_precision_score(should_pass, found.decisive)) if both else math.nan
    return result


class Judged(NamedTuple):
    """What a stage said of the examples that have a gold label there.

    Attributes
    ----------
    rows : ndarray of int, shape (n_judged,)
        Their rows in `Run.examples`.
    y_true, y_pred : ndarray of str, shape (n_judged,)
        What the stage should have said, and what it did: a gate that lets pass says its pass label.
    logits : ndarray of float32, shape (n_judged, n_labels)
    decisive : ndarray of float64, shape (n_judged,)
        A gate's probability of its pass label, the last stage's highest probability.
    """

    rows: np.ndarray
    y_true: np.ndarray
    y_pred: np.ndarray
    logits: np.ndarray
    decisive: np.ndarray


def judged(run: Run, stage: str, *, on: On = "reached") -> Judged:
    """Return what `stage` said where it has a gold label, on what reached it or on everything.

    Raises
    ------
    SpecError
        No such stage.
    RunError
        `on` is "all" and the run has no shadow scores.
    """
    spec, scores = run.spec.stage(stage), run.scores(stage)
    y_true = run.gold(stage)[scores.rows]
    kept = pd.notna(y_true) & _asked(run, stage, on)
    said = answer(spec, scores.logits[kept])
    y_pred = np.where(said.passes, spec.pass_label, said.predicted)
    return Judged(scores.rows[kept], y_true[kept], y_pred, scores.logits[kept], said.decisive)


class InScopeAnswers(NamedTuple):
    """The best class in scope for some texts, whatever the thresholds would have made of them.

    Attributes
    ----------
    p_gates : ndarray of float64, shape (n,)
        The product of the gates' probabilities of their pass labels; 1 without gates.
    p_class : ndarray of float64, shape (n,)
        The last stage's probability of its most probable class in scope.
    right : ndarray of bool, shape (n,)
        That class is the text's gold label; never for a text out of scope.
    """

    p_gates: np.ndarray
    p_class: np.ndarray
    right: np.ndarray


def in_scope_answers(run: Run, *, on: On = "all") -> InScopeAnswers:
    """Return the best class in scope for what reached the last stage, or for every text, in the order of `examples`.

    Raises
    ------
    RunError
        `on` is "all" and the run has no shadow scores.
    """
    last, labels = run.spec.last, run.spec.in_scope_labels
    scores = run.scores(last.name)
    kept = _asked(run, last.name, on)
    rows = scores.rows[kept]
    p = probabilities(scores.logits[kept], last.temperature)
    p = p[:, [last.labels.index(label) for label in labels]]
    right = run.examples["label"].to_numpy(dtype=object)[rows] == np.array(labels, dtype=object)[p.argmax(axis=1)]
    p_gates = np.ones(len(run.examples))
    for stage in run.spec.stages[:-1]:
        gate = run.scores(stage.name)
        p_gates[gate.rows] *= answer(stage, gate.logits).decisive
    order = np.argsort(rows)
    return InScopeAnswers(p_gates[rows[order]], p.max(axis=1)[order], right[order])


def confusion(
    run: Run, stage: str | None = None, *, on: On = "reached", normalize: Normalize | None = None
) -> pd.DataFrame:
    """Return a confusion matrix: gold labels in rows, answers in columns.

    Parameters
    ----------
    run : Run
    stage : str, optional
        Without it, end to end, where the labels that reject stand last. A stage's matrix has its own labels, and
        leaves out examples without a gold label there (which an earlier gate should have stopped).
    on : {"reached", "all"}
        Of a stage: what arrived there, or everything, through shadow scores.
    normalize : {"true", "pred", "all"}, optional
        Fractions of a gold label's examples, of an answer's, or of all, instead of counts; NaN where there are none.

    Raises
    ------
    SpecError, RunError
        As `judged` does.
    """
    if stage is None:
        labels = run.spec.labels
        y_true, y_pred = run.predictions["label"], run.predictions["predicted"]
    else:
        spec = run.spec.stage(stage)
        labels = tuple(dict.fromkeys((*spec.labels, *spec.reject_labels)))
        y_true, y_pred = judged(run, stage, on=on)[1:3]
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)
    if len(y_true):
        codes = [pd.Index(labels).get_indexer(y) for y in (y_true, y_pred)]
        counts = confusion_matrix(*codes, labels=range(len(labels)))
    totals = {
        None: 1,
        "true": counts.sum(axis=1, keepdims=True),
        "pred": counts.sum(axis=0, keepdims=True),
        "all": counts.sum(),
    }
    if normalize not in totals:
        raise RunError(f"normalize is {normalize!r}; it must be 'true', 'pred', 'all' or None")
    with np.errstate(invalid="ignore"):
        shares = counts if normalize is None else counts / totals[normalize]
    index, columns = (pd.Index(labels, name=name, dtype=object) for name in ("gold", "answer"))
    return pd.DataFrame(shares, index=index, columns=columns)


def confused_pairs(run: Run, stage: str | None = None, *, on: On = "reached", n: int | None = 20) -> pd.DataFrame:
    """Return the `n` most frequent confusions (None: all), of one stage or end to end.

    Returns
    -------
    DataFrame
        `gold`, `answer`, `n_examples`, and `fraction_of_gold`, of the examples with that gold label. Most frequent
        first; among equals, the larger fraction first, then in the order of the labels.
    """
    matrix = confusion(run, stage, on=on)
    counts = matrix.to_numpy()
    gold, said = np.nonzero(counts * (1 - np.eye(len(counts), dtype=np.int64)))
    table = pd.DataFrame(
        {
            "gold": matrix.index[gold],
            "answer": matrix.columns[said],
            "n_examples": counts[gold, said],
            "fraction_of_gold": counts[gold, said] / counts.sum(axis=1)[gold],
        }
    )
    table = table.sort_values(["n_examples", "fraction_of_gold"], ascending=False, kind="stable", ignore_index=True)
    return table if n is None else table.head(n)


def figures(
    run: Run,
    stage: str | None = None,
    *,
    on: On = "reached",
    top_k: Sequence[int] = (1, 3, 5),
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the figures of one stage or, without one, of the whole cascade, with bootstrap intervals over texts.

    Parameters
    ----------
    run : Run
    stage : str, optional
    on : {"reached", "all"}
        Of a stage: what arrived there, or everything, through shadow scores.
    top_k : sequence of int
        Of the last stage: how often the gold label is among so many of the most probable, fewer than it has labels.

    Returns
    -------
    DataFrame
        A figure a row, `value`, `low` and `high`: `accuracy`, `macro_precision`, `macro_recall` and `macro_f1` (over
        the labels that occur in gold or answers, a quotient of nothing counting 0, as in scikit-learn). Of a gate also
        `auroc` and `average_precision` of the probability of its pass label; of the last stage `top_<k>_accuracy`; end
        to end `in_scope_accuracy`, `reject_recall`, `reject_precision`, `coverage` and `risk`.

    Raises
    ------
    SpecError, RunError
        As `judged` does.
    """
    matrix = confusion(run, stage, on=on)
    counts, labels = matrix.to_numpy(), matrix.index
    gold, said = np.nonzero(counts)
    cells = counts[gold, said]
    # All that these figures ask of a text is its cell, and a resample of texts is a multinomial draw of cells.
    n, rng = len(run.examples), np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.append(cells, n - cells.sum()) / n, n_resamples)[:, :-1]
    values, resampled = (cell_figures(gold, said, len(labels), weights) for weights in (cells[None], drawn))
    if stage is None:
        kinds = np.eye(len(OUTCOMES))[outcome_codes(run.spec, labels[gold], labels[said])]
        for name in FRACTIONS:
            values[name], resampled[name] = (figure_of(name, weights @ kinds) for weights in (cells[None], drawn))
    rows = {name: interval(float(values[name][0]), resampled[name], level=level) for name in values}
    if stage is not None:
        spec, found = run.spec.stage(stage), judged(run, stage, on=on)
        how = {"level": level, "n_resamples": n_resamples, "seed": seed}
        rows |= _of_ranks(spec, found, **how) if spec.is_gate else _of_places(spec, found, n, top_k, **how)
    return pd.DataFrame.from_dict(rows, orient="index", columns=Interval._fields).rename_axis("figure")


def class_figures(run: Run, stage: str | None = None, *, on: On = "reached", level: float = 0.95) -> pd.DataFrame:
    """Return precision, recall and F1 of every label, of one stage or end to end, with Wilson's intervals.

    Each is a proportion, or for F1 a monotone function of one, TP / (TP + FP + FN), so that Wilson's interval (1927)
    holds. It keeps a width where a label is right on all of its few texts, and a bootstrap would have none.

    Returns
    -------
    DataFrame
        Three rows a label, in the order of the labels: `label`, `support` (examples with that gold label), `figure`,
        `value`, `low`, `high`. NaN where there is nothing to take a fraction of.

    Raises
    ------
    SpecError, RunError
        As `judged` does.
    """
    matrix = confusion(run, stage, on=on)
    counts = matrix.to_numpy()
    right, support, answered = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    rows = []
    for label, tp, gold, said in zip(matrix.index, right, support, answered, strict=True):
        found = {"precision": wilson(tp, said, level=level), "recall": wilson(tp, gold, level=level)}
        overlap = wilson(tp, gold + said - tp, level=level)
        found["f1"] = Interval(*(2 * share / (1 + share) for share in overlap))
        rows += [(label, gold, name, *values) for name, values in found.items()]
    return pd.DataFrame(rows, columns=["label", "support", "figure", *Interval._fields])


def wilson(hits: int, of: int, *, level: float = 0.95) -> Interval:
    """Return the fraction `hits` / `of` with Wilson's interval (1927).

    >>> [round(number, 3) for number in wilson(30, 30)]
    [1.0, 0.886, 1.0]
    """
    if not of:
        return Interval(math.nan, math.nan, math.nan)
    low, high = binomtest(int(hits), int(of)).proportion_ci(level, method="wilson")
    return Interval(float(hits / of), float(low), float(high))


def _of_ranks(gate: StageSpec, found: Judged, *, level: float, n_resamples: int, seed: int) -> dict[str, Interval]:
    """Return `auroc` and `average_precision` of a gate."""
    passing, n = found.y_true == gate.pass_label, len(found.y_true)
    weights = np.ones((1, n), dtype=np.int32), resample_counts(n, n_resamples=n_resamples, seed=seed)
    values, drawn = (ranking_figures(passing, found.decisive, weights=w) for w in weights)
    return {
        name: interval(float(value[0]), resamples, level=level)
        for name, value, resamples in zip(("auroc", "average_precision"), values, drawn, strict=True)
    }


def _of_places(last: StageSpec, found: Judged, n: int, top_k: Sequence[int], **how: Any) -> dict[str, Interval]:
    """Return `top_<k>_accuracy` of the last stage, for each k below its number of labels, in a run of `n` examples."""
    codes = pd.Index(last.labels).get_indexer(found.y_true)
    own = found.logits[np.arange(len(codes)), codes]
    place = np.full(n, len(last.labels) + 1)
    place[: len(codes)] = 1 + (found.logits > own[:, None]).sum(axis=1)
    is_judged = np.arange(n) < len(codes)
    return {f"top_{k}_accuracy": fraction_interval(place <= k, is_judged, **how) for k in top_k if k < len(last.labels)}


def _asked(run: Run, stage: str, on: On) -> np.ndarray:
    """Return which of a stage's scores are of what reached it, or that all are: bool, shape (n_scored,)."""
    shadow = run.scores(stage).shadow
    if on == "reached":
        return ~shadow
    if on != "all":
        raise RunError(f"on is {on!r}; it must be 'reached' (what arrived at the stage) or 'all' (with shadow scores)")
    if len(shadow) < len(run.examples):
        raise RunError(
            f"{run.directory}: stage '{stage}' scored only what reached it; run the cascade again with shadow scores"
        )
    return np.ones(len(shadow), dtype=bool)


def _mean(right: np.ndarray) -> float:
    return float(np.mean(right)) if len(right) else math.nan
