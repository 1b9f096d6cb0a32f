"""Two series of predictions for the same texts: differences of metrics with intervals, and exact paired tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from cascade_lab.analysis.bootstrap import N_RESAMPLES, interval, with_resamples
from cascade_lab.analysis.classification import macro_f1
from cascade_lab.analysis.outcomes import (
    FRACTIONS,
    IN_SCOPE,
    OUT_OF_SCOPE,
    OUTCOMES,
    LabelScope,
    is_outcome,
    metric_from_counts,
    outcome_codes,
)


def paired_metrics(
    y_true: Any,
    y_pred_a: Any,
    y_pred_b: Any,
    reject_labels: set[str],
    *,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the metrics of two series of predictions for the same texts, and their differences.

    Parameters
    ----------
    y_true, y_pred_a, y_pred_b : array-like of str, shape (n,)
        True labels, and the labels that A and B predict.
    reject_labels : set of str
        As a true label: the text is out of scope. As a predicted label: the text is rejected.
    level : float
    n_resamples, seed : int

    Returns
    -------
    DataFrame
        One row each for `accuracy`, `macro_f1`, `in_scope_accuracy`, `reject_recall`, `reject_precision`, `coverage`
        and `risk`: `a`, `b`, `difference` (B - A) with its percentile bootstrap interval over texts, `low` and `high`
        (Efron 1979), and the `p_value` of McNemar's exact test where both fractions are of the same texts.

    Examples
    --------
    >>> metrics = paired_metrics(list("xxyy"), list("xyyy"), list("xxyx"), set())
    >>> metrics.loc["accuracy", ["a", "b", "difference", "p_value"]].tolist()
    [0.75, 0.75, 0.0, 1.0]
    """
    # A metric depends only on how often each triple of labels occurs, so these counts are resampled instead of texts.
    texts = pd.DataFrame({"label": np.asarray(y_true), "a": np.asarray(y_pred_a), "b": np.asarray(y_pred_b)})
    counts = texts.groupby(["label", "a", "b"], observed=True).size()
    triples = counts.index.to_frame(index=False)
    labels = pd.Index(pd.unique(triples.to_numpy().ravel())).sort_values()
    scope = LabelScope(tuple(label for label in labels if label not in reject_labels), tuple(reject_labels))
    resampled = with_resamples(counts.to_numpy(), n_resamples=n_resamples, seed=seed)
    codes = [outcome_codes(scope, triples["label"], triples[side]) for side in "ab"]
    outcome_counts = [resampled @ np.eye(len(OUTCOMES))[code] for code in codes]
    fractions, p_values = {}, {}
    for name, (part, whole) in FRACTIONS.items():
        fractions[name] = [metric_from_counts(name, n) for n in outcome_counts]
        if whole in (OUTCOMES, IN_SCOPE, OUT_OF_SCOPE) and not np.isnan(fractions[name][0][0]):
            hit_a, hit_b = (is_outcome(part)[code] for code in codes)
            p_values[name] = mcnemar(*(int(resampled[0] @ only) for only in (hit_b & ~hit_a, hit_a & ~hit_b)))
    is_true, is_a, is_b = (np.eye(len(labels))[labels.get_indexer(triples[column])] for column in ("label", "a", "b"))
    f1 = [
        macro_f1(resampled @ (is_true * is_predicted), resampled @ is_true, resampled @ is_predicted)
        for is_predicted in (is_a, is_b)
    ]
    values = {"accuracy": fractions["accuracy"], "macro_f1": f1, **fractions}
    rows = {
        name: [a[0], b[0], *interval(b[0] - a[0], (b - a)[1:], level=level), p_values.get(name, np.nan)]
        for name, (a, b) in values.items()
    }
    columns = ["a", "b", "difference", "low", "high", "p_value"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("metric")


def mcnemar(wins: int, losses: int) -> float:
    """Return the exact p-value of McNemar's test (1947) that wins and losses are equally likely; 1 if there are none.

    >>> mcnemar(5, 0)
    0.0625
    """
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return p-values corrected for the number of tests (Holm 1979); this bounds the chance of any false alarm.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * p_values[order])
    return np.minimum(adjusted, 1.0)


def paired_tests(groups: Any, right_a: np.ndarray, right_b: np.ndarray, *, name: str = "") -> pd.DataFrame:
    """Compare A and B within each group of texts: one row per group, the smallest p-value first.

    Parameters
    ----------
    groups : array-like of str, shape (n,)
        The group of each text.
    right_a, right_b : ndarray of bool, shape (n,)
        Whether A and B predict the true label.
    name : str
        What the groups are, such as the name of a column.

    Returns
    -------
    DataFrame
        Indexed by `column` (`name`) and `value` (the group): `n_examples`, `accuracy_a`, `accuracy_b`, `difference`
        (B - A), `wins` (A wrong, B right), `losses`, `p_value` (McNemar, exact) and `p_holm`, corrected for all rows.
    """
    texts = pd.DataFrame({"value": np.asarray(groups, dtype=object), "a": right_a, "b": right_b})
    texts["wins"], texts["losses"] = texts["b"] & ~texts["a"], texts["a"] & ~texts["b"]
    by_value = texts.groupby("value")
    table = by_value[["a", "b"]].mean().set_axis(["accuracy_a", "accuracy_b"], axis=1)
    table.insert(0, "n_examples", by_value.size())
    table["difference"] = (by_value["b"].sum() - by_value["a"].sum()) / table["n_examples"]
    table[["wins", "losses"]] = by_value[["wins", "losses"]].sum()
    table["p_value"] = [mcnemar(int(w), int(x)) for w, x in zip(table["wins"], table["losses"], strict=True)]
    return sorted_with_holm(pd.concat({name: table}, names=["column", "value"]))


def sorted_with_holm(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `paired_tests` with `p_holm` over all of them, the smallest `p_value` first."""
    table = table.assign(p_holm=holm(table["p_value"].to_numpy()))
    by_difference = table.assign(size=-table["difference"].abs()).sort_index()
    return table.loc[by_difference.sort_values(["p_value", "size"], kind="stable").index]
