"""Answers of A and B to the same texts: differences of figures with intervals, and exact paired tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from cascade_lab.analysis.bootstrap import N_RESAMPLES, interval
from cascade_lab.analysis.goals import FRACTIONS, IN_SCOPE, OUT_OF_SCOPE, among, figure_of
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_codes


def paired_figures(
    y_true: Any,
    y_pred_a: Any,
    y_pred_b: Any,
    reject_labels: set[str],
    *,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the figures of two series of answers to the same texts, and their differences.

    Parameters
    ----------
    y_true, y_pred_a, y_pred_b : array-like of str, shape (n,)
        Gold labels, and the answers of A and B.
    reject_labels : set of str
        Gold labels out of scope, and answers that reject.
    level : float
    n_resamples, seed : int

    Returns
    -------
    DataFrame
        A row each for `accuracy`, `macro_f1` (over the labels in gold or answers), `in_scope_accuracy`,
        `reject_recall`, `reject_precision`, `coverage` and `risk`: `a`, `b`, `difference` (B - A), its percentile
        bootstrap interval over texts, `low` and `high` (Efron 1979), and `p_value`, McNemar's exact test, where both
        fractions are of the same texts.

    Examples
    --------
    >>> found = paired_figures(list("xxyy"), list("xyyy"), list("xxyx"), set())
    >>> found.loc["accuracy", ["a", "b", "difference", "p_value"]].tolist()
    [0.75, 0.75, 0.0, 1.0]
    """
    # A figure depends on how often each triple occurs alone; resampling their counts is resampling texts.
    texts = pd.DataFrame({"gold": np.asarray(y_true), "a": np.asarray(y_pred_a), "b": np.asarray(y_pred_b)})
    counts = texts.groupby(["gold", "a", "b"], observed=True).size()
    cells = counts.index.to_frame(index=False)
    labels = pd.Index(pd.unique(cells.to_numpy().ravel())).sort_values()
    scope = _Scope(tuple(label for label in labels if label not in reject_labels), tuple(reject_labels))
    drawn = with_resamples(counts.to_numpy(), n_resamples, seed)
    rows, codes = {}, [outcome_codes(scope, cells["gold"], cells[side]) for side in "ab"]
    by_outcome = [drawn @ np.eye(len(OUTCOMES))[code] for code in codes]
    for name, (part, whole) in FRACTIONS.items():
        a, b = (figure_of(name, of_outcome) for of_outcome in by_outcome)
        p_value = np.nan
        if whole in (OUTCOMES, IN_SCOPE, OUT_OF_SCOPE):
            hits = [among(part)[code] for code in codes]
            p_value = mcnemar(*(int(drawn[0] @ (hits[1 - k] & ~hits[k])) for k in (0, 1)))
            p_value = p_value if not np.isnan(a[0]) else np.nan
        rows[name] = [a[0], b[0], *interval(b[0] - a[0], (b - a)[1:], level=level), p_value]
    a, b = (_macro_f1(drawn, cells["gold"], cells[side], labels) for side in "ab")
    rows["macro_f1"] = [a[0], b[0], *interval(b[0] - a[0], (b - a)[1:], level=level), np.nan]
    order = ["accuracy", "macro_f1", *(name for name in FRACTIONS if name != "accuracy")]
    columns = ["a", "b", "difference", "low", "high", "p_value"]
    return pd.DataFrame.from_dict({k: rows[k] for k in order}, orient="index", columns=columns).rename_axis("figure")


def mcnemar(wins: int, losses: int) -> float:
    """Return the exact p-value of McNemar's (1947) test: are wins and losses equally likely? 1 where there are none.

    >>> mcnemar(5, 0)
    0.0625
    """
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return p-values corrected for looking at all of them (Holm 1979): the chance of one false alarm is bounded.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * p_values[order])
    return np.minimum(adjusted, 1.0)


def paired_tests(groups: Any, right_a: np.ndarray, right_b: np.ndarray, *, name: str = "") -> pd.DataFrame:
    """Return a row for each group of texts, the smallest p-value first.

    Parameters
    ----------
    groups : array-like of str, shape (n,)
    right_a, right_b : ndarray of bool, shape (n,)
    name : str
        The column that `groups` comes from.

    Returns
    -------
    DataFrame
        Indexed by `column` and `value`: `n_examples`, `accuracy_a`, `accuracy_b`, `difference` (B - A), `wins`,
        `losses`, `p_value` (McNemar, exact) and `p_holm`, corrected for all rows.
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


def with_resamples(counts: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Return the counts of kinds of texts, and below them those of resamples: shape (1 + n_resamples, n_kinds)."""
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), n_resamples)
    return np.vstack([counts, drawn]).astype(np.float64)  # products of floats are the fast ones


def sorted_with_holm(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `paired_tests` with `p_holm` for all of them, the smallest `p_value` first."""
    table = table.assign(p_holm=holm(table["p_value"].to_numpy()))
    by_difference = table.assign(size=-table["difference"].abs()).sort_index()
    return table.loc[by_difference.sort_values(["p_value", "size"], kind="stable").index]


class _Scope(NamedTuple):
    """What `outcome_codes` asks of a cascade, of two cascades at once."""

    in_scope_labels: tuple[str, ...]
    reject_labels: tuple[str, ...]


def _macro_f1(drawn: np.ndarray, y_true: pd.Series, y_pred: pd.Series, labels: pd.Index) -> np.ndarray:
    """Return scikit-learn's macro F1 for every row of counts, over the labels that occur in it."""
    of_gold, of_answer = (np.eye(len(labels))[labels.get_indexer(y)] for y in (y_true, y_pred))
    right, either = drawn @ (of_gold * of_answer), drawn @ (of_gold + of_answer)
    occurs = either > 0
    return (2 * right / np.where(occurs, either, 1)).sum(axis=1) / occurs.sum(axis=1)
