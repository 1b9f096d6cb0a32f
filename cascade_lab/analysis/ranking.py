"""How well a score ranks texts of one kind above the others: AUROC and average precision, with intervals."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri, owens_t

from cascade_lab.analysis.bootstrap import (
    N_RESAMPLES,
    UNDEFINED,
    Interval,
    blocks,
    effective_n,
    resample_counts,
    score_interval,
)

_PRIOR_TEXTS = 40  # of the rarer kind: with fewer, a variance below that of normal scores is believed less than half


def ranking_intervals(
    positive: np.ndarray,
    score: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return `auroc` (see `auroc_interval`) and `average_precision` (see `bootstrap.score_interval`).

    Parameters
    ----------
    positive : ndarray of bool, shape (n,)
    score : ndarray, shape (n,)
        Higher for texts that are more likely positive.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    level : float
    n_resamples, seed
        Of the bootstrap.

    Returns
    -------
    dict
        NaN where all texts are positive or all are negative; `low` and `high` are NaN where one kind has a single text.

    Examples
    --------
    >>> found = ranking_intervals(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.6, 0.1]))
    >>> {name: round(interval.value, 3) for name, interval in found.items()}
    {'auroc': 0.75, 'average_precision': 0.833}
    """
    n = len(score)
    drawn = resample_counts(n, groups=groups, n_resamples=n_resamples, seed=seed)
    weights = np.ones((1, n), dtype=np.int32), drawn
    (_, value), (_, resampled) = (ranking_metrics(positive, score, weights=w) for w in weights)
    n_positive, n_negative = (
        effective_n(np.ones(int(kind.sum())), None if groups is None else groups[kind])
        for kind in (positive, ~positive)
    )
    size = n if min(n_positive, n_negative) >= 2 else 0  # one text shows no variance
    return {
        "auroc": auroc_interval(positive, score, groups=groups, level=level),
        "average_precision": score_interval(float(value[0]), resampled, n=size, n_least=n_positive, level=level),
    }


def auroc_interval(
    positive: np.ndarray, score: np.ndarray, *, groups: np.ndarray | None = None, level: float = 0.95
) -> Interval:
    """Return the area under the ROC curve with a score interval, which holds for few texts and for an area of 1.

    The interval contains every area that the measured one is compatible with, as method 5 of Newcombe (2006). The
    variance at an area is that of two normal distributions with equal variances (Owen's T function). It is multiplied
    by the ratio of the variance of the texts themselves (DeLong et al. 1988; of groups of texts: Obuchowski 1997) to
    the normal one. A ratio below 1 is believed the less, the fewer texts of the rarer kind there are.

    Simulated coverage at 0.95, with 10 to 60 texts of the rarer kind: 0.945 to 0.97 for normal scores of equal
    variance, up to an area of 0.998. If the scores of the rarer kind vary twice as much, 0.90 to 0.95; half as much,
    0.93 to 0.996: so few texts do not show the shape of the distributions.

    Parameters
    ----------
    positive : ndarray of bool, shape (n,)
    score : ndarray, shape (n,)
    groups : ndarray of int, shape (n,), optional
    level : float

    Returns
    -------
    Interval
        NaN where all texts are positive or all are negative. `low` and `high` are NaN where one kind has a single text.

    Examples
    --------
    >>> [round(number, 3) for number in auroc_interval(np.arange(40) >= 20, np.arange(40.0))]
    [1.0, 0.911, 1.0]
    """
    groups = np.arange(len(score)) if groups is None else groups
    sides = [np.asarray(score, dtype=np.float64)[kind] for kind in (positive, ~positive)]
    if not (len(sides[0]) and len(sides[1])):
        return UNDEFINED
    ordered = [np.sort(side) for side in sides]
    # For each text, the fraction of the texts of the other kind that it is ranked rightly against; a tie is a half.
    rank = [
        (np.searchsorted(other, side, "left") + np.searchsorted(other, side, "right")) / 2 / len(other)
        for side, other in zip(sides, ordered[::-1], strict=True)
    ]
    rank[1] = 1 - rank[1]
    area = float(rank[0].mean())
    of_kind = [groups[kind] for kind in (positive, ~positive)]
    m, n = (effective_n(np.ones(len(side)), group) for side, group in zip(sides, of_kind, strict=True))
    if min(m, n) < 2:
        return Interval(area, np.nan, np.nan)
    parts = np.concatenate([(part - area) / len(part) for part in rank])
    by_group = np.bincount(np.unique(np.concatenate(of_kind), return_inverse=True)[1], weights=parts)
    observed = float((by_group**2).sum()) * min(m, n) / (min(m, n) - 1)
    z, expected, degrees = ndtri((1 + level) / 2), _normal_variance(area, m, n), min(m, n) - 1
    ratio = 1.0
    if expected > 0:
        ratio = observed / expected
        if ratio < 1:
            ratio = 1 - (1 - ratio) * degrees / (degrees + _PRIOR_TEXTS)

    def excess(theta: float) -> float:  # 0 at an end of the interval, below 0 inside
        return (theta - area) ** 2 - z**2 * ratio * _normal_variance(theta, m, n)

    inside = min(max(area, 1e-12), 1 - 1e-12)  # at 0 and 1 the variance is 0 too
    low = brentq(excess, 0.0, inside) if area > 0 else 0.0
    high = brentq(excess, inside, 1.0) if area < 1 else 1.0
    return Interval(area, float(low), float(high))


def _normal_variance(area: float, m: float, n: float) -> float:
    """Return the variance of the area for `m` and `n` scores of two normal distributions with equal variances."""
    if not 0 < area < 1:
        return 0.0
    # The probability that two texts of one kind are both ranked rightly against one of the other kind.
    both = area - 2 * float(owens_t(ndtri(area), math.sqrt(1 / 3)))
    return (area * (1 - area) + (m + n - 2) * (both - area**2)) / (m * n)


def ranking_metrics(positive: np.ndarray, score: np.ndarray, *, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and average precision, as scikit-learn defines them, for many weightings of the examples at once.

    Parameters
    ----------
    positive : ndarray of bool, shape (n,)
    score : ndarray, shape (n,)
    weights : ndarray, shape (n_resamples, n)
        How often each example counts.

    Returns
    -------
    tuple of two ndarrays, shape (n_resamples,)
        NaN where the weighted examples are all positive or all negative.
    """
    order = np.argsort(score, kind="stable")
    score, positive = score[order], positive[order]
    starts = np.flatnonzero(np.append(True, np.diff(score) > 0)[: len(score)])  # of each group of equal scores
    auroc, average_precision = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    if not len(score):
        return auroc, average_precision
    for block in blocks(len(weights), len(score)):
        sorted_weights = weights[block][:, order].astype(np.float64)
        n_at = np.add.reduceat(sorted_weights, starts, axis=1)
        positive_at = np.add.reduceat(sorted_weights * positive, starts, axis=1)
        negative_at = n_at - positive_at
        n_positive, n_negative = positive_at.sum(axis=1), negative_at.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            negative_below = negative_at.cumsum(axis=1) - negative_at / 2  # a tie counts as half
            auroc[block] = (positive_at * negative_below).sum(axis=1) / (n_positive * n_negative)
            n_from, positive_from = (part[:, ::-1].cumsum(axis=1)[:, ::-1] for part in (n_at, positive_at))
            precision = np.where(positive_at > 0, positive_at * positive_from / n_from, 0.0)
            average_precision[block] = np.where(n_negative > 0, precision.sum(axis=1) / n_positive, np.nan)
    return auroc, average_precision
