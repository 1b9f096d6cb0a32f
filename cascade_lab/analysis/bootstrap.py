"""Confidence intervals of metrics: the bootstrap over examples, and Wilson's interval of a fraction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

N_RESAMPLES = 1000


class Interval(NamedTuple):
    """A metric and the interval around it; NaN where it is undefined."""

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


def with_resamples(counts: np.ndarray, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return counts of groups of examples, and below them the counts in resamples.

    A metric that depends only on the size of each group needs no resample of single examples: the sizes in a resample
    have a multinomial distribution.

    Parameters
    ----------
    counts : ndarray of int, shape (n_groups,)

    Returns
    -------
    ndarray of float64, shape (1 + n_resamples, n_groups)
        The first row is `counts`.
    """
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), n_resamples)
    return np.vstack([counts, drawn]).astype(np.float64)  # numpy multiplies matrices of floats much faster


def interval(value: float, resampled: np.ndarray, *, level: float = 0.95) -> Interval:
    """Return `value` with the percentile interval of its resampled values (Efron 1979).

    Parameters
    ----------
    value : float
        The metric on the examples themselves.
    resampled : ndarray, shape (n_resamples,)
        The metric on each resample; NaN (undefined) is left out.
    level : float
    """
    resampled = resampled[~np.isnan(resampled)]
    if not len(resampled) or np.isnan(value):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return a statistic of `n` examples with its bootstrap interval.

    Parameters
    ----------
    statistic : function
        Takes the weights of the examples (how often each counts; int, shape (n,)), like scikit-learn's
        `sample_weight`.
    n : int
    level, n_resamples, seed
        As everywhere in this module.

    Examples
    --------
    >>> correct = np.array([1, 1, 1, 0])
    >>> bootstrap(lambda weights: np.average(correct, weights=weights), 4).value
    0.75
    """
    resampled = np.array([statistic(weights) for weights in resample_counts(n, n_resamples=n_resamples, seed=seed)])
    return interval(float(statistic(np.ones(n, dtype=np.int32))), resampled, level=level)


def fraction_interval(
    hits: np.ndarray, of: np.ndarray, *, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Interval:
    """Return the fraction of the examples `of` that are `hits` (bool, shape (n,)), with its bootstrap interval."""
    hits, of = np.asarray(hits, dtype=bool), np.asarray(of, dtype=bool)
    n, n_of = len(of), int(of.sum())
    if not n_of:
        return Interval(np.nan, np.nan, np.nan)
    # There are three groups of examples, and their sizes in a resample have a multinomial distribution.
    n_hits = int((hits & of).sum())
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(n, np.array([n_hits, n_of - n_hits, n - n_of]) / n, n_resamples)
    with np.errstate(invalid="ignore"):
        return interval(n_hits / n_of, sizes[:, 0] / (sizes[:, 0] + sizes[:, 1]), level=level)


def wilson(n_hits: int, n: int, *, level: float = 0.95) -> Interval:
    """Return the fraction `n_hits` / `n` with Wilson's interval (1927); NaN where `n` is 0.

    >>> [round(number, 3) for number in wilson(30, 30)]
    [1.0, 0.886, 1.0]
    """
    if not n:
        return Interval(math.nan, math.nan, math.nan)
    low, high = binomtest(int(n_hits), int(n)).proportion_ci(level, method="wilson")
    return Interval(float(n_hits / n), float(low), float(high))


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


def blocks(n_resamples: int, n: int) -> list[slice]:
    """Return slices over resamples of `n` examples such that a float table of one slice takes about 16 MB at most."""
    step = max(1, 2_000_000 // max(n, 1))
    return [slice(start, start + step) for start in range(0, n_resamples, step)]
