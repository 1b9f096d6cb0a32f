"""The metrics of predicted labels, from arrays, with intervals that cover their true values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import (
    N_RESAMPLES,
    Interval,
    effective_n,
    fraction_interval,
    resample_codes,
    score_interval,
)
from cascade_lab.analysis.classification import confusion_metrics, too_few_texts
from cascade_lab.analysis.costs import Costs, cost_bounds, count_codes, counts_of_codes, prices
from cascade_lab.analysis.outcomes import (
    FRACTIONS,
    IN_SCOPE,
    OUT_OF_SCOPE,
    OUTCOMES,
    has_outcome,
    metric_from_counts,
)


def prediction_intervals(
    y_true: np.ndarray,
    y_pred: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return `accuracy`, `macro_precision`, `macro_recall` and `macro_f1` with intervals.

    Accuracy has Wilson's interval, macro metrics that of `bootstrap.score_interval`, or NaN where `too_few_texts` says
    why. If more than half of the labels have the same number of texts (CLINC150), the texts were chosen per label, and
    each label's texts are resampled for themselves: in such a set macro precision is higher than in truth.

    Parameters
    ----------
    y_true, y_pred : array-like of str, shape (n,)
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    level : float
    n_resamples, seed
        Of the bootstrap.

    Examples
    --------
    >>> found = prediction_intervals(np.array(["a", "b"] * 10), np.array(["a", "b"] * 9 + ["a", "a"]))
    >>> [round(number, 3) for number in found["macro_f1"]]
    [0.95, 0.766, 0.998]
    """
    # Macro metrics depend only on how often each pair of a true and a predicted label occurs.
    codes, labels = pd.factorize(np.concatenate([y_true, y_pred]))
    n, n_labels = len(y_true), len(labels)
    pairs, cell = np.unique(codes[:n] * max(n_labels, 1) + codes[n:], return_inverse=True)
    support = np.bincount(codes[:n], minlength=n_labels)
    strata = pairs // max(n_labels, 1) if _is_balanced(support) else None
    resampled = resample_codes(cell, len(pairs), groups=groups, strata=strata, n_resamples=n_resamples, seed=seed)
    right = codes[:n] == codes[n:]
    intervals = {"accuracy": fraction_interval(right, np.ones(n, dtype=bool), groups=groups, level=level)}
    is_refused = too_few_texts(support) != ""
    size = 0.0 if is_refused else effective_n(np.ones(n), groups)
    rows, columns = pairs // max(n_labels, 1), pairs % max(n_labels, 1)
    for name, values in confusion_metrics(rows, columns, n_labels, resampled).items():
        if name not in intervals:
            intervals[name] = score_interval(float(values[0]), values[1:], n=size, level=level)
    return intervals


def _is_balanced(support: np.ndarray) -> bool:
    """Return whether more than half of the labels that occur have the same number of texts."""
    return bool(np.bincount(support[support > 0], minlength=1).max() * 2 > (support > 0).sum())


def outcome_intervals(
    outcome: np.ndarray,
    names: Sequence[str] = tuple(FRACTIONS),
    *,
    groups: np.ndarray | None = None,
    costs: Costs | None = None,
    prevalence: float | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return metrics of `outcomes.METRICS` with their intervals, from the outcome of each text.

    A fraction has Wilson's interval (`fraction_interval`). The mean cost, and metrics at another prevalence, have the
    interval of `score_interval`.

    Parameters
    ----------
    outcome : ndarray of int, shape (n,)
        As `outcomes.outcome_codes` returns it; with a cost matrix, as `costs.text_codes` does.
    names : sequence of str
        The metrics.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    costs : mapping of str to float, or CostMatrix, optional
        What each outcome costs, or each pair of labels.
    prevalence
        As `outcomes.metric_from_counts` takes it.
    level : float
    n_resamples, seed
        Of the bootstrap.

    Examples
    --------
    >>> outcome_intervals(np.array([0, 0, 0, 2]), ["accuracy"])["accuracy"].value
    0.75
    """
    counts = count_codes(outcome, costs=costs)
    options: dict[str, Any] = {"costs": prices(costs), "prevalence": prevalence}

    def size(kinds: tuple[str, ...]) -> float:
        is_counted = has_outcome(outcome, kinds)
        return effective_n(np.ones(int(is_counted.sum())), None if groups is None else groups[is_counted])

    resampled, result = None, {}
    for name in names:
        value = float(metric_from_counts(name, counts, **options))
        part, whole = FRACTIONS.get(name, ((), OUTCOMES))
        # A prevalence changes no fraction of the texts in scope, nor of those out of scope.
        if name in FRACTIONS and (prevalence is None or whole in (IN_SCOPE, OUT_OF_SCOPE)):
            hits, of = (has_outcome(outcome, kinds) for kinds in (part, whole))
            result[name] = fraction_interval(hits, of, groups=groups, level=level)
            continue
        if resampled is None:
            found, kinds = np.unique(outcome, return_inverse=True)
            drawn = resample_codes(kinds, len(found), groups=groups, n_resamples=n_resamples, seed=seed)[1:]
            resampled = drawn @ counts_of_codes(costs)[found]
        drawn, n = metric_from_counts(name, resampled, **options), size(whole)
        bounds = (0.0, 1.0)
        if name == "mean_cost":
            bounds = cost_bounds(costs)
        # Where the texts are reweighted, no more of them can count than of the rarer kind.
        n_least = n if prevalence is None else min(n, size(IN_SCOPE), size(OUT_OF_SCOPE))
        if bounds[0] == bounds[1]:
            result[name] = Interval(value, value, value)
        else:
            n = math.inf if name == "mean_cost" else n  # unlike a fraction, a mean can vary less than a fraction of n
            result[name] = score_interval(value, drawn, n=n, n_least=n_least, bounds=bounds, level=level)
    return result
