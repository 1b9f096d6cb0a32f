"""Metrics of all texts of a run from the labels of a sample that was drawn with known, unequal probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student_t

from cascade_lab.analysis.bootstrap import UNDEFINED, Interval, wilson
from cascade_lab.analysis.outcomes import FRACTIONS, OUT_OF_SCOPE, OUTCOMES, is_outcome, outcome_codes
from cascade_lab.label_files import WEIGHT

if TYPE_CHECKING:
    from cascade_lab.run import Run

_METRICS = ("accuracy", "in_scope_accuracy", "reject_recall", "reject_precision")


def weighted_fraction_interval(
    hits: np.ndarray,
    of: np.ndarray,
    weights: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    level: float = 0.95,
) -> Interval:
    """Return the fraction of all texts `of` that are `hits`, with its interval, from a sample with weights.

    The fraction is Hájek's (1971): the sum of the weights of the hits by the sum of the weights. The interval is
    Wilson's, with the number of texts that would give a fraction the same variance (Korn and Graubard 1998). The
    variance is that of the linearized ratio, with units drawn independently. Where the few errors that were drawn have
    small weights it is too small, so the number of texts is at most (sum of weights)² / sum of squared weights (Kish
    1965); Student's t distribution replaces the normal one. With equal weights it is nearly Wilson's interval.

    Parameters
    ----------
    hits, of : ndarray of bool, shape (n,)
        One value per text of the sample.
    weights : ndarray of float, shape (n,)
        Each is 1 divided by the probability with which the text was drawn, or a multiple of that: only ratios count.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    level : float

    Examples
    --------
    >>> right, all_of_them = np.array([True] * 15 + [False] * 5), np.ones(20, dtype=bool)
    >>> found = weighted_fraction_interval(right, all_of_them, np.array([1.0] * 15 + [3.0] * 5))
    >>> [round(number, 3) for number in found]
    [0.5, 0.258, 0.742]
    """
    of = np.asarray(of, dtype=bool)
    y, w = np.asarray(hits, dtype=np.float64)[of], np.asarray(weights, dtype=np.float64)[of]
    if not len(y):
        return UNDEFINED
    p = float(np.average(y, weights=w))
    unit = np.arange(len(y)) if groups is None else np.unique(groups[of], return_inverse=True)[1]
    of_unit, residual = np.bincount(unit, weights=w), np.bincount(unit, weights=w * (y - p))
    total = w.sum()
    n = kish = float(total**2 / (of_unit**2).sum())
    variance = float((residual**2).sum() / total**2)
    if variance > 0:
        n = min(kish, p * (1 - p) / variance)
    n *= (norm.ppf((1 + level) / 2) / student_t.ppf((1 + level) / 2, max(kish - 1, 1))) ** 2
    return Interval(p, *wilson(n * p, n, level=level)[1:])


def sampled_metrics(run: Run, *, level: float = 0.95) -> pd.DataFrame:
    """Return metrics of all texts of a run from its labelled ones, weighted by their column `label_weight`.

    Without that column the labels count equally, as those of a simple random sample do.

    Parameters
    ----------
    run : Run
    level : float

    Returns
    -------
    DataFrame
        Rows `accuracy`, `in_scope_accuracy`, `reject_recall`, `reject_precision` (as `metrics.prediction_metrics` has
        them) and `out_of_scope` (the fraction of texts out of scope). Columns `value`, `low`, `high`, and `n_labelled`:
        the number of labelled texts that the metric is about.

    Raises
    ------
    RunError
        No example has a label.
    """
    run = run.labelled
    weights = run.examples[WEIGHT].to_numpy(np.float64) if WEIGHT in run.examples else np.ones(len(run.examples))
    codes = outcome_codes(run.spec, run.predictions["label"], run.predictions["predicted"])
    groups = run.text_groups
    kinds = {name: FRACTIONS[name] for name in _METRICS} | {"out_of_scope": (OUT_OF_SCOPE, OUTCOMES)}
    rows = {}
    for name, (part, whole) in kinds.items():
        hits, of = (is_outcome(outcomes)[codes] for outcomes in (part, whole))
        rows[name] = (*weighted_fraction_interval(hits, of, weights, groups=groups, level=level), int(of.sum()))
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high", "n_labelled"])
