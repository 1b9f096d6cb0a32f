"""Which texts to read first: of the fullest confusions, of the surest errors, and next to a threshold.

Every function takes `thresholds`, as `Run.replay` does, to look at the same run under others.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.special import logit, logsumexp

from cascade_lab.errors import RunError
from cascade_lab.run import Run
from cascade_lab.serial import answer

Thresholds = Mapping[str, float] | None


def confused_texts(run: Run, n: int = 10, n_texts: int = 3, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the `n` pairs of gold label and answer with the most errors, end to end, with their surest texts.

    Returns
    -------
    DataFrame
        A text a row, at most `n_texts` of each pair, the fullest pair first: `label`, `predicted`; `n_examples` of the
        pair; `of_label`, the fraction of the gold label's texts; then `example_id`, `text`, `decided_by`,
        `probability`.
    """
    table = confident_errors(run, None, thresholds=thresholds)
    pair = ["label", "predicted"]
    counts = table.groupby(pair).size().rename("n_examples").reset_index()
    counts["of_label"] = counts["n_examples"] / counts["label"].map(run.examples["label"].value_counts()).astype(float)
    counts = counts.sort_values("n_examples", ascending=False, kind="stable").head(n)
    texts = table.groupby(pair, sort=False).head(n_texts)
    return counts.merge(texts, on=pair, how="left")


def confident_errors(run: Run, n: int | None = 20, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the `n` errors that the deciding stage was surest of, the surest first; all of them where `n` is None.

    Returns
    -------
    DataFrame
        `example_id`, `text` (and `text_b`), `label`, `predicted`, `decided_by`, `probability`.
    """
    answers = run.replay(thresholds)
    table = with_texts(run, answers)[answers["label"] != answers["predicted"]]
    table = table.sort_values("probability", ascending=False, kind="stable")
    return (table if n is None else table.head(n)).reset_index(drop=True)


def near_threshold(run: Run, stage: str, n: int = 10, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the texts that reached a stage and lie nearest to its threshold: at most `n` below it and `n` above.

    The last stage's threshold is its `min_probability`, or that of the label in question. A tie counts as above.

    Returns
    -------
    DataFrame
        By distance, from the lowest up: `example_id`, `text` (and `text_b`), `label`, `predicted` (the cascade's
        answer), `right`; `threshold`, and the stage's `p` that is held against it; `distance`, `p - threshold`;
        `logit_distance`, the same in log odds, infinite at a threshold of 0 or 1.

    Raises
    ------
    RunError
        The last stage has no `min_probability`.
    SpecError
        No such stage.
    """
    spec = run.spec.with_thresholds(thresholds or {})
    found, names = spec.stage(stage), [s.name for s in spec.stages]
    if not found.is_gate and found.min_probability is None and not found.min_probabilities:
        raise RunError(f"{run.directory}: stage '{stage}' has no min_probability, so nothing is near it; give one")
    answers = run.replay(thresholds)
    arrived = answers["decided_by"].map(names.index).to_numpy(dtype=int) >= names.index(stage)
    scores = run.scores(stage)
    kept = arrived[scores.rows]
    rows, logits = scores.rows[kept], scores.logits[kept].astype(np.float64) / found.temperature
    column = np.full(len(rows), found.labels.index(found.pass_label)) if found.is_gate else logits.argmax(axis=1)
    if found.is_gate:
        threshold = np.full(len(rows), found.threshold)
    else:
        least = [found.min_probabilities.get(label, found.min_probability or 0.0) for label in found.labels]
        threshold = np.array(least)[column]
    p = answer(found, scores.logits[kept]).decisive
    others = logits.copy()
    others[np.arange(len(rows)), column] = -np.inf
    log_odds = logits[np.arange(len(rows)), column] - logsumexp(others, axis=1)
    table = with_texts(run, answers).drop(columns=["decided_by", "probability"]).iloc[rows]
    table = table.assign(right=table["label"] == table["predicted"], threshold=threshold, p=p, distance=p - threshold)
    table["logit_distance"] = log_odds - logit(threshold)
    table = table.sort_index().sort_values("distance", kind="stable")
    below, above = table[table["p"] < table["threshold"]], table[table["p"] >= table["threshold"]]
    return pd.concat([below.tail(n) if n else below.head(0), above.head(n)]).reset_index(drop=True)


def with_texts(run: Run, answers: pd.DataFrame) -> pd.DataFrame:
    """Put the texts into a table of answers, whose rows are those of the examples."""
    texts = ["text"] if run.examples["text_b"].isna().all() else ["text", "text_b"]
    return pd.concat([answers[["example_id"]], run.examples[texts], answers.drop(columns="example_id")], axis=1)
