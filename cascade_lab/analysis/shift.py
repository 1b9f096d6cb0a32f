"""Compare two samples of texts: fractions, scores and labels, with intervals and two-sample tests."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import fisher_exact, ks_2samp, norm

from cascade_lab.analysis.bootstrap import difference_interval, wilson
from cascade_lab.analysis.paired import holm

N_RESAMPLES = 9999
N_BINS = 10
N_EXACT = 50  # texts of the smaller sample, from which on the Kolmogorov-Smirnov test is asymptotic


class Change(NamedTuple):
    """One quantity in two samples of texts.

    Attributes
    ----------
    then, now : float
        A fraction, or a mean; NaN for labels, which have none.
    difference, low, high : float
        `now` - `then` with its interval. Of labels: the total variation distance, without an interval.
    psi : float
        The `stability_index`, which describes the size of the change and tests nothing.
    p_value : float
        Of the test that both samples come from the same distribution. NaN where a sample is empty.
    test : str
        Its name.
    """

    then: float
    now: float
    difference: float
    low: float
    high: float
    psi: float
    p_value: float
    test: str


def stability_index(then: Any, now: Any) -> float:
    """Return the population stability index of counts: the sum over bins of (q - p) log(q / p).

    It is the symmetric Kullback-Leibler divergence of the two samples. Half a text is added to each bin, so that no bin
    is empty. It grows with the number of bins, and in small samples it is above 0 without any change.

    Parameters
    ----------
    then, now : array-like of int, shape (n_bins,)
        Numbers of texts per bin.

    Examples
    --------
    >>> round(stability_index([500, 500], [400, 600]), 3)
    0.04
    """
    p, q = (np.asarray(counts, dtype=np.float64) + 0.5 for counts in (then, now))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def fraction_change(then: Any, now: Any, *, level: float = 0.95) -> Change:
    """Compare a fraction of two samples: Newcombe's interval (1998, method 10) and Fisher's exact test.

    Parameters
    ----------
    then, now : array-like of bool, shape (n,) and (m,)
    level : float

    Examples
    --------
    >>> change = fraction_change([True] * 10 + [False] * 90, [True] * 30 + [False] * 70)
    >>> [round(value, 4) for value in change[:5]]
    [0.1, 0.3, 0.2, 0.09, 0.3058]
    """
    then, now = (np.asarray(values, dtype=bool) for values in (then, now))
    sides = [wilson(int(values.sum()), len(values), level=level) for values in (then, now)]
    found = difference_interval(sides[0], sides[1], np.nan)
    counts = np.array([[values.sum(), (~values).sum()] for values in (then, now)])
    p_value = float(fisher_exact(counts).pvalue) if len(then) and len(now) else np.nan
    return Change(sides[0].value, sides[1].value, *found, _index_or_nan(*counts), p_value, "Fisher")


def score_change(then: Any, now: Any, *, level: float = 0.95) -> Change:
    """Compare the scores of two samples: the means with Welch's interval, the distributions with Kolmogorov-Smirnov.

    The test sees changes that the means do not show. Its p-value is exact where a sample has fewer than 50 texts,
    otherwise asymptotic; with ties it is too large. The stability index has ten bins, at the deciles of `then`.

    Parameters
    ----------
    then, now : array-like of float, shape (n,) and (m,)
    level : float

    Examples
    --------
    >>> change = score_change(np.linspace(0, 1, 101), np.linspace(0.1, 1.1, 101))
    >>> round(change.difference, 3), round(change.p_value, 3)
    (0.1, 0.557)
    """
    then, now = (np.asarray(values, dtype=np.float64) for values in (then, now))
    if not len(then) or not len(now):
        means = [float(values.mean()) if len(values) else np.nan for values in (then, now)]
        return Change(means[0], means[1], np.nan, np.nan, np.nan, np.nan, np.nan, "Kolmogorov-Smirnov")
    edges = np.unique(np.quantile(then, np.arange(1, N_BINS) / N_BINS))
    counts = (np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (then, now))
    difference = float(now.mean() - then.mean())
    half = np.nan
    if min(len(then), len(now)) > 1:
        error = np.sqrt(then.var(ddof=1) / len(then) + now.var(ddof=1) / len(now))
        half = float(norm.ppf((1 + level) / 2) * error)
    p_value = _kolmogorov_smirnov(then, now)
    found = (float(then.mean()), float(now.mean()), difference, difference - half, difference + half)
    return Change(*found, stability_index(*counts), p_value, "Kolmogorov-Smirnov")


def label_change(then: Any, now: Any, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Change:
    """Compare the labels of two samples: total variation distance, and the chi-square test by permutation.

    The p-value is right for rare labels too, because the texts are dealt to the two samples again at random
    (`n_resamples` times) instead of comparing with the chi-square distribution. It is at least 1 / (`n_resamples` + 1).

    Parameters
    ----------
    then, now : array-like of str, shape (n,) and (m,)
    n_resamples, seed : int

    Examples
    --------
    >>> change = label_change(list("aabb"), list("aacc"))
    >>> change.difference
    0.5
    """
    counts = label_counts(then, now).to_numpy().T
    n_then, n_now = counts.sum(axis=1)
    if not n_then or not n_now:
        return Change(np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, "chi-square")
    totals = counts.sum(axis=0)
    rng = np.random.default_rng(seed)
    dealt = rng.multivariate_hypergeometric(totals, n_then, size=n_resamples, method="marginals")
    # With the sums of both samples and of each label fixed, chi-square is a constant times this sum.
    expected = n_then * totals / totals.sum()
    distance, permuted = ((((each - expected) ** 2) / totals).sum(axis=-1) for each in (counts[0], dealt))
    p_value = (1 + int((permuted >= distance * (1 - 1e-12)).sum())) / (n_resamples + 1)
    variation = float(np.abs(counts[0] / n_then - counts[1] / n_now).sum() / 2)
    return Change(np.nan, np.nan, variation, np.nan, np.nan, stability_index(*counts), p_value, "chi-square")


def label_counts(then: Any, now: Any) -> pd.DataFrame:
    """Return one row per label that occurs: `then` and `now`, the numbers of texts; sorted by label."""
    sides = {
        name: pd.Series(np.asarray(labels, dtype=object)).value_counts()
        for name, labels in (("then", then), ("now", now))
    }
    return pd.DataFrame(sides).fillna(0).astype(int).rename_axis("label").sort_index()


def label_changes(then: Any, now: Any, *, level: float = 0.95) -> pd.DataFrame:
    """Compare how often each label occurs in two samples.

    Returns
    -------
    DataFrame
        One row per label: the fields of `fraction_change`, and `p_holm`, corrected for the number of labels. The
        smallest p-value first, then the largest difference.
    """
    counts, n = label_counts(then, now), (len(then), len(now))
    rows = {}
    for label, (n_then, n_now) in zip(counts.index, counts.to_numpy(), strict=True):
        sides = [wilson(k, size, level=level) for k, size in ((n_then, n[0]), (n_now, n[1]))]
        table = np.array([[n_then, n[0] - n_then], [n_now, n[1] - n_now]])
        p_value = float(fisher_exact(table).pvalue) if min(n) else np.nan
        found = difference_interval(sides[0], sides[1], np.nan)
        rows[label] = Change(sides[0].value, sides[1].value, *found, _index_or_nan(*table), p_value, "Fisher")
    found = with_holm(pd.DataFrame.from_dict(rows, orient="index", columns=Change._fields).rename_axis("label"))
    by_size = found.assign(size=-found["difference"].abs()).sort_values(["p_value", "size"], kind="stable")
    return by_size.drop(columns="size")


def with_holm(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of changes with `p_holm`, corrected for the number of tests in it; NaN where there is no test."""
    p_values = table["p_value"].to_numpy(dtype=np.float64)
    is_tested = ~np.isnan(p_values)
    adjusted = np.full(len(p_values), np.nan)
    adjusted[is_tested] = holm(p_values[is_tested])
    return table.assign(p_holm=adjusted)


def _kolmogorov_smirnov(then: np.ndarray, now: np.ndarray) -> float:
    method = "exact" if min(len(then), len(now)) < N_EXACT else "asymp"
    with warnings.catch_warnings():  # scipy takes "asymp" with a warning where the exact numbers are too large
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(ks_2samp(then, now, method=method).pvalue)


def _index_or_nan(then: np.ndarray, now: np.ndarray) -> float:
    return stability_index(then, now) if then.sum() and now.sum() else np.nan
