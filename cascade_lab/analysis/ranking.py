"""How well a score ranks texts of one kind above the others: AUROC and average precision, with intervals."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, owens_t

from cascade_lab.analysis.bootstrap import (
    UNDEFINED,
    Interval,
    blocks,
    effective_n,
    wilson_of_variance,
)

_PRIOR_TEXTS = 20  # of the rarer kind: with fewer, the variance of normal scores counts more than that of the texts
_SPREADS = np.exp(np.linspace(-math.log(6), math.log(6), 25))
_MAX_PLACES = 1000


def ranking_intervals(
    positive: np.ndarray, score: np.ndarray, *, groups: np.ndarray | None = None, level: float = 0.95
) -> dict[str, Interval]:
    """Return `auroc` (see `auroc_interval`) and `average_precision` (see `average_precision_interval`).

    Parameters
    ----------
    positive : ndarray of bool, shape (n,)
    score : ndarray, shape (n,)
        Higher for texts that are more likely positive.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    level : float

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
    of = {"auroc": auroc_interval, "average_precision": average_precision_interval}
    return {name: function(positive, score, groups=groups, level=level) for name, function in of.items()}


def auroc_interval(
    positive: np.ndarray, score: np.ndarray, *, groups: np.ndarray | None = None, level: float = 0.95
) -> Interval:
    """Return the area under the ROC curve with a score interval, which holds for few texts and for an area of 1.

    The interval contains every area that the measured one is compatible with, as method 5 of Newcombe (2006). The
    variance at an area is that of two normal distributions (Owen's T function). How many times as much the rarer kind
    varies is not assumed: at each area, it is the most likely number by the ranks of its texts among the others (a
    constrained maximum likelihood estimate, as in the score test of Miettinen and Nurminen 1985).

    The variance is multiplied by the ratio of that of the texts themselves (DeLong et al. 1988; of groups of texts:
    Obuchowski 1997) to the normal one, which is moved towards 1 the more, the fewer texts of the rarer kind there are.

    Simulated coverage at 0.95, with 10 to 60 texts of the rarer kind: 0.93 to 0.97 for normal scores whose spreads are
    equal, or differ by a factor of up to 3, for exponential ones, and where some texts of the rarer kind look like the
    others. With outliers in both kinds (Student's t with 3 degrees of freedom) 0.90 to 0.95: few texts do not show
    them.

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
    [1.0, 0.86, 1.0]
    """
    groups = np.arange(len(score)) if groups is None else groups
    kinds, score = (positive, ~positive), np.asarray(score, dtype=np.float64)
    if not (positive.any() and (~positive).any()):
        return UNDEFINED
    sizes = [effective_n(np.ones(int(kind.sum())), groups[kind]) for kind in kinds]
    if sizes[1] < sizes[0]:  # the area is the same if both kinds, and the order, are exchanged
        kinds, score, sizes = kinds[::-1], -score, sizes[::-1]
    sides = [score[kind] for kind in kinds]  # the rarer kind first
    # How many texts of the other kind are below a text, and how many are below it or equal.
    below, up_to = (
        [np.searchsorted(np.sort(other), side, end) for side, other in zip(sides, sides[::-1], strict=True)]
        for end in ("left", "right")
    )
    # For each text, the fraction of the texts of the other kind that it is ranked rightly against; a tie is a half.
    rank = [(below[0] + up_to[0]) / 2 / len(sides[1]), 1 - (below[1] + up_to[1]) / 2 / len(sides[0])]
    area = float(rank[0].mean())
    m, n = sizes
    if m < 2:
        return Interval(area, np.nan, np.nan)
    parts = np.concatenate([(part - area) / len(part) for part in rank])
    group = np.unique(np.concatenate([groups[kind] for kind in kinds]), return_inverse=True)[1]
    observed = float((np.bincount(group, weights=parts) ** 2).sum()) * m / (m - 1)
    places, z = _places(below[0], up_to[0], len(sides[1])), ndtri((1 + level) / 2)

    def variance(theta: float) -> float:
        return _normal_variance(theta, m, n, spread=_likely_spread(*places, theta))

    expected = variance(area)
    ratio = 1.0
    if expected > 0:
        ratio += (observed / expected - 1) * (m - 1) / (m - 1 + _PRIOR_TEXTS)

    def excess(theta: float) -> float:  # 0 at an end of the interval, below 0 inside
        return (theta - area) ** 2 - z**2 * ratio * variance(theta)

    inside = min(max(area, 1e-12), 1 - 1e-12)  # at 0 and 1 the variance is 0 too
    low = brentq(excess, 0.0, inside) if area > 0 else 0.0
    high = brentq(excess, inside, 1.0) if area < 1 else 1.0
    return Interval(area, float(low), float(high))


def average_precision_interval(
    positive: np.ndarray, score: np.ndarray, *, groups: np.ndarray | None = None, level: float = 0.95
) -> Interval:
    """Return the average precision, as scikit-learn defines it, with an interval.

    The interval is Wilson's of a fraction with the variance of the average precision (`bootstrap.wilson_of_variance`),
    of at most three times as many texts as are positive, with Student's t distribution. The variance is that of the
    texts' influences on it (the infinitesimal jackknife, Efron 1982). Each positive text counts itself among the
    positive ones at or above its score, so the value is too high if there are few. The middle of the interval counts
    half of it.

    The average precision depends on the fraction of the texts that are positive. The interval is for texts of which as
    many are positive as of all texts that these were drawn from.

    Simulated coverage at 0.95, with 10 to 60 positive texts of 60 to 1,000, whose number was fixed or random: 0.93 to
    0.97. If nearly all positive texts rank first, so that many sets have a value of 1, up to 0.99 (see `wilson`).

    Parameters
    ----------
    positive : ndarray of bool, shape (n,)
    score : ndarray, shape (n,)
    groups : ndarray of int, shape (n,), optional
    level : float

    Returns
    -------
    Interval
        As `auroc_interval` returns it.

    Examples
    --------
    >>> [round(number, 3) for number in average_precision_interval(np.arange(40) >= 20, np.arange(40.0))]
    [1.0, 0.82, 1.0]
    """
    groups = np.arange(len(score)) if groups is None else groups
    if not (positive.any() and (~positive).any()):
        return UNDEFINED
    n_positive, n_negative = (effective_n(np.ones(int(kind.sum())), groups[kind]) for kind in (positive, ~positive))
    tie = np.unique(-np.asarray(score, dtype=np.float64), return_inverse=True)[1]  # the highest score is 0
    n_at, positive_at = np.bincount(tie), np.bincount(tie, weights=positive)
    n_from, positive_from, n_all = n_at.cumsum(), positive_at.cumsum(), positive_at.sum()
    precision = positive_from / n_from
    value = float((positive_at * precision).sum() / n_all)
    if min(n_positive, n_negative) < 2:
        return Interval(value, np.nan, np.nan)
    # One more positive text raises the precision at every score up to its own, one more negative text lowers it.
    raised, lowered = (
        (positive_at * change / n_from)[::-1].cumsum()[::-1][tie] for change in (1 - precision, precision)
    )
    influence = np.where(positive, precision[tie] - value + raised, -lowered) / n_all
    by_group = np.bincount(np.unique(groups, return_inverse=True)[1], weights=influence)
    half = n_all / n_positive / 2  # of a text with its copies
    middle = float((positive_at * (positive_from - half) / (n_from - half)).sum() / n_all)
    low, high = wilson_of_variance(
        middle,
        float(len(by_group) * by_group.var(ddof=1)),
        n_constant=n_positive,
        n_most=3 * n_positive,
        degrees=max(n_positive - 1, 1),
        level=level,
    )
    return Interval(value, min(low, value), max(high, value))


def _normal_variance(area: float, m: float, n: float, *, spread: float = 1.0) -> float:
    """Return the variance of the area for normal scores, `m` and `n` of them; the first vary `spread` times as much."""
    if not 0 < area < 1:
        return 0.0
    shared = spread**2 / (1 + spread**2)  # the part of the variance of a difference that is of the first kind
    # The probability that one text of a kind is ranked rightly against two of the other, less that of two alone.
    one_of_first, one_of_second = (
        area - 2 * float(owens_t(ndtri(area), math.sqrt((1 - part) / (1 + part)))) - area**2
        for part in (shared, 1 - shared)
    )
    return (area * (1 - area) + (n - 1) * one_of_first + (m - 1) * one_of_second) / (m * n)


def _places(below: np.ndarray, up_to: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return between which of `n` texts of the other kind texts of the rarer kind are ranked, and how many of them.

    Scores are scaled such that those of the other kind are standard normal. The ends of the places, and the numbers of
    texts: three arrays of shape (n_places,).
    """
    step = 1 + n // _MAX_PLACES  # neighbouring places are taken together
    places, counts = np.unique(np.stack([below // step, -(-(up_to + 1) // step)]), axis=1, return_counts=True)
    low, high = (ndtri(np.minimum(ends * step / (n + 1), 1.0)) for ends in places)
    return low, high, counts


def _likely_spread(low: np.ndarray, high: np.ndarray, counts: np.ndarray, area: float) -> float:
    """Return how many times as much as the others texts of the rarer kind most likely vary, if the area is `area`.

    `low`, `high` and `counts` are those of `_places`. The result is between 1/6 and 6: where all texts are above the
    others, their ranks do not tell.
    """
    if not 0 < area < 1:
        return 1.0
    mean = ndtri(area) * np.sqrt(1 + _SPREADS**2)
    low, high = ((ends[:, None] - mean) / _SPREADS for ends in (low, high))
    above = low > 0  # of two numbers near 1, the difference would be rounded to 0
    chance = np.where(above, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
    log_spread = np.log(_SPREADS)
    likelihood = counts @ np.log(np.maximum(chance, 1e-300))
    best = int(np.clip(likelihood.argmax(), 1, len(_SPREADS) - 2))
    before, at, after = likelihood[best - 1 : best + 2]
    curvature = before - 2 * at + after  # the top of the parabola through three points
    shift = 0.5 * (before - after) / curvature if curvature < 0 else float(np.sign(after - before))
    return float(np.exp(log_spread[best] + np.clip(shift, -1, 1) * (log_spread[1] - log_spread[0])))


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
