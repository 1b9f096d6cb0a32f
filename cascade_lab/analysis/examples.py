"""Which texts to read first: frequent confusions, errors with high confidence, and texts near a threshold.

Every function takes `thresholds`, like `Run.replay`, to look at the same run at other thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import logit, logsumexp

from cascade_lab.analysis.outcomes import ERRORS, outcomes
from cascade_lab.by_block import by_block
from cascade_lab.calibrator import calibrated_logits
from cascade_lab.decisions import probabilities, stage_targets
from cascade_lab.exceptions import RunError, did_you_mean

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import StageSpec

Thresholds = Mapping[str, float] | None


def confused_texts(
    run: Run,
    n: int | None = 10,
    n_texts: int = 3,
    *,
    outcome: str | Sequence[str] | None = None,
    thresholds: Thresholds = None,
) -> pd.DataFrame:
    """Return the `n` pairs of true and predicted label with the most errors, each with its surest texts.

    Parameters
    ----------
    run : Run
    n : int or None
        None returns all pairs.
    n_texts : int
    outcome : str or sequence of str, optional
        Only these errors: "wrong class" (one class for another), "false reject", "false accept" or "wrong reject". By
        default all of them.
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Returns
    -------
    DataFrame
        One row per text, at most `n_texts` of each pair, the most frequent pair first: `label`, `predicted`;
        `n_examples` of the pair; `of_label`, the fraction that these are of all texts with that true label; then the
        other columns of `confident_errors`.

    Raises
    ------
    RunError
        `outcome` is not the name of an error.
    """
    table = confident_errors(run, None, thresholds=thresholds)
    if outcome is not None:
        wanted = [outcome] if isinstance(outcome, str) else list(outcome)
        for name in wanted:
            if name not in ERRORS:
                raise RunError(f"no error is named '{name}'{did_you_mean(name, ERRORS)}")
        table = table[np.isin(outcomes(run.spec, table["label"], table["predicted"]), wanted)]
    pair = ["label", "predicted"]
    counts = table.groupby(pair).size().rename("n_examples").reset_index()
    counts["of_label"] = counts["n_examples"] / counts["label"].map(run.examples["label"].value_counts()).astype(float)
    counts = counts.sort_values("n_examples", ascending=False, kind="stable")
    texts = table.groupby(pair, sort=False).head(n_texts)
    return (counts if n is None else counts.head(n)).merge(texts, on=pair, how="left")


def confident_errors(run: Run, n: int | None = 20, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the `n` errors of which the cascade was surest, the surest first (`surest_first`); None returns all.

    Returns
    -------
    DataFrame
        `example_id`, `text` (and `text_b`), `label`, `predicted`, `decided_by`, `probability`, `confidence`.
    """
    run = run.labelled.with_thresholds(thresholds)
    predictions = run.predictions
    table = with_texts(run, predictions)[predictions["label"] != predictions["predicted"]]
    table = surest_first(run, table)
    return (table if n is None else table.head(n)).reset_index(drop=True)


def surest_first(run: Run, table: pd.DataFrame, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the rows of a table sorted by how sure the cascade was of its predictions, the surest first.

    Of most predictions the cascade is as sure as their probability is high. A rejection by `min_probability` is the
    opposite: the probability is that of the label that was *not* predicted, so the rejection is as sure as that
    probability is low. It counts as 1 - probability, as a gate's rejection counts as 1 - P(pass label).

    Parameters
    ----------
    run : Run
    table : DataFrame
        With the columns `example_id`, `predicted`, `decided_by` and `probability` of the run at `thresholds`: those of
        `confident_errors`, of `blame`, or of `run.predictions`.
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Returns
    -------
    DataFrame
        The same rows and columns; equally sure rows keep their order.
    """
    run = run.with_thresholds(thresholds)
    last = run.spec.last
    decision = run.decision(last.name)
    by_minimum = ~decision.above & (decision.label_above != decision.label_below)
    ids = run.predictions["example_id"][by_minimum & (run.predictions["decided_by"] == last.name).to_numpy()]
    probability = table["probability"].to_numpy()
    sureness = np.where(table["example_id"].isin(ids), 1 - probability, probability)
    return table.iloc[np.argsort(-sureness, kind="stable")]


def near_threshold(run: Run, stage: str, n: int = 10, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the texts that reached a stage and are nearest to its threshold: at most `n` below it and `n` above.

    The last stage's threshold is its `min_probability`, or the minimum of its most probable label. A tie counts as
    above.

    Returns
    -------
    DataFrame
        Sorted by `distance`, the lowest first: `example_id`, `text` (and `text_b`), `label`, `predicted` (by the
        cascade), `correct` (missing where there is no label); `threshold`, and the stage's `confidence` that is
        compared with it; `distance`, `confidence - threshold`; `logit_distance`, the same in log-odds, infinite at a
        threshold of 0 or 1.

    Raises
    ------
    RunError
        The last stage has no `min_probability`.
    SpecError
        No such stage.
    """
    run = run.with_thresholds(thresholds)
    spec, scores = run.spec.stage(stage), run.scores(stage)
    if spec.role == "final" and spec.min_probability is None and not spec.min_probabilities:
        raise RunError(f"{run.name}: stage '{stage}' has no min_probability, so no text is near it; set one")
    rows = np.flatnonzero(scores.scored & ~scores.shadow)
    decision = run.decision(stage).take(rows)
    confidence, threshold = decision.confidence, decision.threshold
    table = with_texts(run, run.predictions).drop(columns=["decided_by", "probability", "confidence"]).iloc[rows]
    table["correct"] = (table["label"] == table["predicted"]).where(table["label"].notna())
    table = table.assign(threshold=threshold, confidence=confidence, distance=confidence - threshold)
    table = table.sort_values("distance", kind="stable")
    below, above = table[table["confidence"] < table["threshold"]], table[table["confidence"] >= table["threshold"]]
    table = pd.concat([below.tail(n) if n else below.head(0), above.head(n)])
    if spec.rejector is not None:  # the threshold is one of its output
        log_odds = logit(table["confidence"].to_numpy())
    else:
        logits = calibrated_logits(spec, scores.logits[table.index]).astype(np.float64)
        labels = run.decision(stage).label_above[table.index]
        own = np.arange(len(table)), pd.Index(spec.labels).get_indexer(labels)
        with np.errstate(over="ignore", invalid="ignore"):  # at a very small temperature log odds are infinite
            others = (logits - logits[own][:, None]) / spec.temperature
            others[own] = -np.inf
            log_odds = -logsumexp(others, axis=1)
    with np.errstate(invalid="ignore"):
        table["logit_distance"] = log_odds - logit(table["threshold"].to_numpy())
    return table.reset_index(drop=True)


def stage_probabilities(run: Run, rows: np.ndarray | None = None) -> pd.DataFrame:
    """Return what each stage computed for some examples: its most probable label, and that of the true label.

    Parameters
    ----------
    run : Run
    rows : ndarray of int, optional
        The places of the examples in `run.examples`; by default all.

    Returns
    -------
    DataFrame
        One row per example, with `example_id` and for each stage: `<stage>_label`, its most probable label;
        `<stage>_probability` of that label; `<stage>_true_label`, the label of the stage that leads to the true label
        (the pass label of a gate for a text in scope), missing where it has none; `<stage>_true_probability` of it; and
        `<stage>_reached`, whether the text reached the stage. Missing where the stage did not score the example.
    """
    rows = np.arange(len(run.examples)) if rows is None else np.asarray(rows, dtype=int)
    columns: dict[str, Any] = {"example_id": run.examples["example_id"].to_numpy()[rows]}
    y_true = run.examples["label"].to_numpy(dtype=object)[rows]
    for stage in run.spec.stages:
        scores = run.scores(stage.name)
        scored = scores.scored[rows]
        labels = np.array(stage.labels, dtype=object)
        target = stage_targets(run.spec, stage.name, y_true, assume_reached=True)
        target[~(pd.Index(target).isin(stage.labels) & scored)] = None
        codes = pd.Index(stage.labels).get_indexer(target[scored])
        best, (best_p, true_p) = np.full(len(rows), None, dtype=object), np.full((2, len(rows)), np.nan)
        if scored.any():
            most_probable, best_p[scored], of_code = _probabilities_of(stage, scores.logits, rows[scored], codes)
            best[scored] = labels[most_probable]
            true_p[scored] = np.where(codes >= 0, of_code, np.nan)
        values = (best, best_p, target, true_p, scored & ~scores.shadow[rows])
        parts = ("label", "probability", "true_label", "true_probability", "reached")
        columns |= {f"{stage.name}_{part}": value for part, value in zip(parts, values, strict=True)}
    return pd.DataFrame(columns)


def _probabilities_of(
    stage: StageSpec, logits: np.ndarray, rows: np.ndarray, codes: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return the column of the most probable label of some rows, its probability, and that of the column `codes`."""

    def of_block(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, ...]:
        p = probabilities(stage, logits[rows])
        return p.argmax(axis=1), p.max(axis=1), p[np.arange(len(p)), codes]

    return by_block(of_block, rows, codes, n_columns=logits.shape[1])


def with_texts(run: Run, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return `predictions` (rows as in `run.examples`) with the columns `text` and, where a text has one, `text_b`."""
    texts = ["text"] if run.examples["text_b"].isna().all() else ["text", "text_b"]
    ids, others = predictions[["example_id"]], predictions.drop(columns="example_id")
    return pd.concat([ids, run.examples[texts], others], axis=1)
