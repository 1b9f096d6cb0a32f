"""Intervals of measured times: exact ones of quantiles, and of ratios of sums such as milliseconds per text.

The times of a latency study are of certain texts, on one machine, during some minutes. An interval says what more
measurements of the same kind would give. It says nothing about other texts, another machine or a busier hour. It takes
the batches as independent: if the machine becomes slower and faster for a while, the intervals are too narrow.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom, t

from cascade_lab.analysis.bootstrap import Interval

MIN_BATCHES = 15
"""With fewer batches, the interval of a ratio misses the truth too often where some batches take much longer."""


def quantile_interval(values: np.ndarray, fraction: float, *, level: float = 0.95) -> Interval:
    """Return a quantile with its exact interval between two of the values, which holds for every distribution.

    The number of values below the true quantile has a binomial distribution, so it is known how probably two ordered
    values enclose it (David and Nagaraja 2003, Order Statistics, section 7.1).

    Parameters
    ----------
    values : array-like of float, shape (n,)
    fraction : float
        0.95 for the 95th percentile; at least 0.5.
    level : float

    Returns
    -------
    Interval
        The smallest value with at least that fraction of the values at or below it; NaN without values. `low` and
        `high` are NaN with fewer than `n_for_quantile` values.

    Examples
    --------
    >>> quantile_interval(np.arange(1, 101), 0.5)
    Interval(value=50.0, low=41.0, high=61.0)
    >>> quantile_interval(np.arange(1, 21), 0.95)
    Interval(value=19.0, low=nan, high=nan)
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if not n:
        return Interval(math.nan, math.nan, math.nan)
    value = float(ordered[max(math.ceil(n * fraction - 1e-9), 1) - 1])
    low, high = _ranks(n, fraction, level)
    if not low:
        return Interval(value, math.nan, math.nan)
    return Interval(value, float(ordered[low - 1]), float(ordered[high - 1]))


def n_for_quantile(fraction: float, *, level: float = 0.95) -> int:
    """Return how many values an interval of a quantile needs at least.

    >>> [n_for_quantile(fraction) for fraction in (0.5, 0.95, 0.99)]
    [6, 59, 299]
    """
    n = 1
    while 1 - fraction**n - (1 - fraction) ** n < level:  # the probability that not all values are on one side
        n += 1
    return n


def ratio_interval(part: np.ndarray, whole: np.ndarray, *, level: float = 0.95) -> Interval:
    """Return the ratio of two sums over batches, such as seconds per text, with an interval.

    The interval is Student's, of the logarithm of the ratio; its variance is that of the jackknife (Tukey 1958).

    Few batches do not show how long the slowest ones take, whatever the method. With 15 batches the simulated coverage
    at 0.95 is 0.95 if the times of equal batches have a standard deviation of 30% (log-normal), 0.93 with 60%, and 0.90
    with 100%; if one batch in twenty takes ten times as long, 0.53 with 15 batches, 0.75 with 30, and 0.93 with 200.
    With fewer than `MIN_BATCHES` batches there is no interval.

    Parameters
    ----------
    part, whole : array-like of float, shape (n_batches,)

    Returns
    -------
    Interval
        NaN where `whole` sums to 0; `low` and `high` are NaN with fewer than `MIN_BATCHES` batches, or where one batch
        alone has all of a sum.

    Examples
    --------
    >>> [round(number, 2) for number in ratio_interval([4, 6, 5, 5] * 4, [2, 2, 2, 2] * 4)]
    [2.5, 2.31, 2.7]
    """
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    if not whole.sum() > 0:
        return Interval(math.nan, math.nan, math.nan)
    ratio, n = float(part.sum() / whole.sum()), len(part)
    part_without, whole_without = part.sum() - part, whole.sum() - whole
    if n < MIN_BATCHES or min(part_without.min(), whole_without.min()) <= 0:
        return Interval(ratio, math.nan, math.nan)
    pseudo_values = n * math.log(ratio) - (n - 1) * np.log(part_without / whole_without)
    factor = math.exp(t.ppf((1 + level) / 2, n - 1) * pseudo_values.std(ddof=1) / math.sqrt(n))
    return Interval(ratio, ratio / factor, ratio * factor)


def _ranks(n: int, fraction: float, level: float) -> tuple[int, int]:
    """Return the ranks, counted from 1, of the values that enclose a quantile; the first is 0 if there are none.

    The upper tail gets half of the error at most. If that leaves no upper value, it is the largest one, and the lower
    tail gets what is left of the error.
    """
    high = min(int(binom.ppf((1 + level) / 2, n, fraction)) + 1, n)
    at_most = binom.cdf(np.arange(n), n, fraction)  # k of the values are below the quantile, or fewer
    low = int(np.searchsorted(at_most, at_most[high - 1] - level, side="right"))
    return low, high
