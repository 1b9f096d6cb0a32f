"""Intervals by resampling whole examples (Efron 1979), the percentile form."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

N_RESAMPLES = 1000


class Interval(NamedTuple):
    """A figure and the interval around it; NaN where it is undefined."""

    value: float
    low: float
    high: float


def resample_counts(n: int, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return how often each of `n` examples is drawn in each resample: int32, shape (n_resamples, n).

    >>> resample_counts(4, n_resamples=2).sum(axis=1).tolist()
    [4, 4]
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((n_resamples, n), dtype=np.int32)
    for row in counts:
        row += np.bincount(rng.integers(0, n, n), minlength=n).astype(np.int32) if n else 0
    return counts


def fraction_interval(
    hits: np.ndarray, of: np.ndarray, *, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Interval:
    """Return `hits` among `of` (bool, shape (n,)) as a fraction, with its percentile bootstrap interval."""
    hits, of = np.asarray(hits, dtype=bool), np.asarray(of, dtype=bool)
    n, n_of = len(of), int(of.sum())
    if not n_of:
        return Interval(np.nan, np.nan, np.nan)
    # A resample of rows draws from three kinds alone, so the multinomial says the same as drawing rows.
    n_hits = int((hits & of).sum())
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n, np.array([n_hits, n_of - n_hits, n - n_of]) / n, n_resamples)
    with np.errstate(invalid="ignore"):
        return interval(n_hits / n_of, drawn[:, 0] / (drawn[:, 0] + drawn[:, 1]), level=level)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return `statistic` with its interval; it takes how often each of `n` examples counts, as `sample_weight`."""
    drawn = np.array([statistic(row) for row in resample_counts(n, n_resamples=n_resamples, seed=seed)])
    return interval(float(statistic(np.ones(n, dtype=np.int32))), drawn, level=level)


def interval(value: float, drawn: np.ndarray, *, level: float = 0.95) -> Interval:
    """Return `value` with the percentiles of what resamples gave; undefined resamples (NaN) are left out."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn) or np.isnan(value):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
