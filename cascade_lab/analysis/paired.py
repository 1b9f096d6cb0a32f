"""Two series of predictions for the same texts: differences of metrics with intervals, and exact paired tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from cascade_lab.analysis.bootstrap import (
    N_RESAMPLES,
    Interval,
    correlation,
    difference_interval,
    effective_n,
    fraction_interval,
    mean_difference_interval,
    repeated_groups,
    resample_codes,
    score_interval,
)
from cascade_lab.analysis.classification import macro_f1, too_few_texts
from cascade_lab.analysis.costs import Costs, counts_of_codes, n_codes, prices
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.outcomes import (
    FRACTIONS,
    IN_SCOPE,
    OUT_OF_SCOPE,
    OUTCOMES,
    LabelScope,
    has_outcome,
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
    groups: np.ndarray | None = None,
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
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    level : float
    n_resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    DataFrame
        One row each for `accuracy`, `macro_f1`, `in_scope_accuracy`, `reject_recall`, `reject_precision`, `coverage`
        and `risk`: `a`, `b`, `difference` (B - A) and its interval, `low` and `high`. Where both fractions are of the
        same texts, the interval is that of `mean_difference_interval`, and `p_value` that of McNemar's exact test;
        elsewhere the interval is that of `difference_interval`, with the correlation from the bootstrap. The interval
        of macro F1 is NaN where `too_few_texts` says so.

    Examples
    --------
    >>> metrics = paired_metrics(list("xxyy"), list("xyyy"), list("xxyx"), set())
    >>> metrics.loc["accuracy", ["a", "b", "difference", "p_value"]].tolist()
    [0.75, 0.75, 0.0, 1.0]
    """
    # A metric depends only on how often each triple of labels occurs, so these counts are resampled instead of texts.
    texts = pd.DataFrame({"label": np.asarray(y_true), "a": np.asarray(y_pred_a), "b": np.asarray(y_pred_b)})
    triple_of = texts.groupby(["label", "a", "b"], observed=True).ngroup().to_numpy()
    triples = texts.iloc[np.unique(triple_of, return_index=True)[1]].reset_index(drop=True)
    labels = pd.Index(pd.unique(triples.to_numpy().ravel())).sort_values()
    scope = LabelScope(tuple(label for label in labels if label not in reject_labels), tuple(reject_labels))
    resampled = resample_codes(triple_of, len(triples), groups=groups, n_resamples=n_resamples, seed=seed)
    codes = [outcome_codes(scope, triples["label"], triples[side]) for side in "ab"]
    outcome_counts = [resampled @ np.eye(len(OUTCOMES))[code] for code in codes]
    rows = {}
    for name, (part, whole) in FRACTIONS.items():
        a, b = (metric_from_counts(name, n) for n in outcome_counts)
        hit_a, hit_b = (is_outcome(part)[code][triple_of] for code in codes)
        of_a, of_b = (is_outcome(whole)[code][triple_of] for code in codes)
        if whole in (OUTCOMES, IN_SCOPE, OUT_OF_SCOPE):
            of = None if groups is None else groups[of_a]
            gains = hit_b[of_a].astype(int) - hit_a[of_a]
            found = mean_difference_interval(gains, groups=of, level=level)
            p_value = mcnemar(*wins_and_losses(gains, of)) if len(gains) else np.nan
        else:
            side_a = fraction_interval(hit_a, of_a, groups=groups, level=level)
            side_b = fraction_interval(hit_b, of_b, groups=groups, level=level)
            found, p_value = difference_interval(side_a, side_b, correlation(a[1:], b[1:])), np.nan
        rows[name] = [a[0], b[0], *found, p_value]
    is_true, is_a, is_b = (np.eye(len(labels))[labels.get_indexer(triples[column])] for column in ("label", "a", "b"))
    support = resampled @ is_true
    a, b = (macro_f1(resampled @ (is_true * is_label), support, resampled @ is_label) for is_label in (is_a, is_b))
    if too_few_texts(support[0]):
        found = Interval(b[0] - a[0], np.nan, np.nan)
    else:
        n = effective_n(np.ones(len(texts)), groups)
        side_a, side_b = (score_interval(float(f1[0]), f1[1:], n=n, level=level) for f1 in (a, b))
        found = difference_interval(side_a, side_b, correlation(a[1:], b[1:]))
    order = ["accuracy", "macro_f1", *FRACTIONS]
    rows["macro_f1"] = [a[0], b[0], *found, np.nan]
    columns = ["a", "b", "difference", "low", "high", "p_value"]
    table = pd.DataFrame.from_dict({name: rows[name] for name in order}, orient="index", columns=columns)
    return table.rename_axis("metric")


def outcome_differences(
    outcome_a: np.ndarray,
    outcome_b: np.ndarray,
    names: Sequence[str] = tuple(FRACTIONS),
    *,
    groups: np.ndarray | None = None,
    costs: Costs | None = None,
    prevalence: float | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return metrics of two cascades on the same texts, and their differences, from the outcomes of each text.

    Where both fractions are of the same texts, the interval is that of `mean_difference_interval`; elsewhere that of
    `difference_interval`, with the correlation from the bootstrap.

    Parameters
    ----------
    outcome_a, outcome_b : ndarray of int, shape (n,)
        As `outcomes.outcome_codes` returns them; with a cost matrix, as `costs.text_codes` does.
    names : sequence of str
        The metrics, of `outcomes.METRICS`.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    costs, prevalence
        As `intervals.outcome_intervals` takes them.
    level : float
    n_resamples, seed : int
        Of the bootstrap.

    Returns
    -------
    DataFrame
        One row per metric: `a`, `b`, `difference` (B - A), `low` and `high`.

    Examples
    --------
    >>> table = outcome_differences(np.array([0, 0, 2, 1, 3]), np.array([0, 0, 0, 1, 3]), ["accuracy"])
    >>> table.loc["accuracy", ["a", "b", "difference"]].round(3).tolist()
    [0.6, 0.8, 0.2]
    """
    options: dict[str, Any] = {"costs": costs, "prevalence": prevalence}
    pairs, codes = np.unique(outcome_a * n_codes(costs) + outcome_b, return_inverse=True)
    resampled = resample_codes(codes, len(pairs), groups=groups, n_resamples=n_resamples, seed=seed)
    counts = [resampled @ counts_of_codes(costs)[side] for side in np.divmod(pairs, n_codes(costs))]
    sides = [
        outcome_intervals(codes, names, groups=groups, level=level, n_resamples=n_resamples, seed=seed, **options)
        for codes in (outcome_a, outcome_b)
    ]
    rows = {}
    for name in names:
        part, whole = FRACTIONS.get(name, ((), ()))
        side_a, side_b = (side[name] for side in sides)
        if whole in (IN_SCOPE, OUT_OF_SCOPE) or (whole == OUTCOMES and prevalence is None):
            counted = has_outcome(outcome_a, whole)
            gains = has_outcome(outcome_b[counted], part).astype(int) - has_outcome(outcome_a[counted], part)
            found = mean_difference_interval(gains, groups=None if groups is None else groups[counted], level=level)
        else:
            a, b = (metric_from_counts(name, side, costs=prices(costs), prevalence=prevalence)[1:] for side in counts)
            found = difference_interval(side_a, side_b, correlation(a, b))
        rows[name] = [side_a.value, side_b.value, *found]
    columns = ["a", "b", "difference", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("metric")


def wins_and_losses(gains: np.ndarray, groups: np.ndarray | None = None) -> tuple[int, int]:
    """Return how many texts B wins and how many it loses; equal texts count as one, by their sum.

    Parameters
    ----------
    gains : ndarray of int, shape (n,)
        1 where only B is right, -1 where only A is, else 0.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number.

    Examples
    --------
    >>> wins_and_losses(np.array([1, 1, -1]), np.array([0, 0, 1]))
    (1, 1)
    """
    groups = repeated_groups(groups)
    if groups is not None:
        gains = np.bincount(np.unique(groups, return_inverse=True)[1], weights=gains)
    return int((gains > 0).sum()), int((gains < 0).sum())


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


def holm_over_runs(tables: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Return tables of `paired_metrics`, of several runs against the same one, with the column `p_holm`.

    The p-values of each metric are corrected for the number of runs, each metric by itself: not for the number of
    metrics. The chance that at least one of several runs that do not differ seems to differ in a metric is then at most
    the threshold of its p-values. The intervals are not corrected.

    >>> tables = [pd.DataFrame({"p_value": [p, np.nan]}, index=["accuracy", "risk"]) for p in (0.01, 0.04, 0.03)]
    >>> [table["p_holm"].tolist() for table in holm_over_runs(tables)]
    [[0.03, nan], [0.06, nan], [0.06, nan]]
    """
    p_values = np.array([table["p_value"] for table in tables])
    corrected = np.transpose([holm(of_metric) for of_metric in p_values.T])
    return [table.assign(p_holm=p_holm) for table, p_holm in zip(tables, corrected, strict=True)]


def paired_tests(
    values: Any, right_a: np.ndarray, right_b: np.ndarray, *, groups: np.ndarray | None = None, name: str = ""
) -> pd.DataFrame:
    """Compare A and B among the texts with each value of a column: one row per value, the smallest p-value first.

    Parameters
    ----------
    values : array-like of str, shape (n,)
        The value of each text.
    right_a, right_b : ndarray of bool, shape (n,)
        Whether A and B predict the true label.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count once in a test.
    name : str
        The name of the column.

    Returns
    -------
    DataFrame
        Indexed by `column` (`name`) and `value`: `n_examples`, `accuracy_a`, `accuracy_b`, `difference` (B - A),
        `wins` (texts that A gets wrong and B right), `losses`, `p_value` (McNemar, exact; `wins_and_losses`) and
        `p_holm`, corrected for all rows.
    """
    texts = pd.DataFrame({"value": np.asarray(values, dtype=object), "a": right_a, "b": right_b})
    texts["wins"], texts["losses"] = texts["b"] & ~texts["a"], texts["a"] & ~texts["b"]
    by_value = texts.groupby("value")
    table = by_value[["a", "b"]].mean().set_axis(["accuracy_a", "accuracy_b"], axis=1)
    table.insert(0, "n_examples", by_value.size())
    table["difference"] = (by_value["b"].sum() - by_value["a"].sum()) / table["n_examples"]
    table[["wins", "losses"]] = by_value[["wins", "losses"]].sum()
    tested = table[["wins", "losses"]]
    groups = repeated_groups(groups)
    if groups is not None:
        gains = (texts["wins"].astype(int) - texts["losses"]).groupby([texts["value"], groups]).sum()
        tested = pd.DataFrame({"wins": gains > 0, "losses": gains < 0}).groupby(level=0).sum()
    table["p_value"] = [mcnemar(int(w), int(x)) for w, x in tested.loc[table.index].itertuples(index=False)]
    return sorted_with_holm(pd.concat({name: table}, names=["column", "value"]))


def sorted_with_holm(table: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `paired_tests` with `p_holm` over all of them, the smallest `p_value` first."""
    table = table.assign(p_holm=holm(table["p_value"].to_numpy()))
    by_difference = table.assign(size=-table["difference"].abs()).sort_index()
    return table.loc[by_difference.sort_values(["p_value", "size"], kind="stable").index]
