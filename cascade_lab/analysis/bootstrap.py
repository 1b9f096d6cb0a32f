"""Confidence intervals of metrics: Wilson's interval and its relatives, and the bootstrap over texts.

A fraction has Wilson's interval. Any other metric in [0, 1] has Wilson's interval too, with the number of texts that
would give a fraction the same variance; the variance is that of the bootstrap, or of the texts' influences. Texts that
repeat are no new evidence: `groups` says which texts are equal, and a group is counted, or resampled, as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import gammaincinv
from scipy.stats import norm
from scipy.stats import t as student_t

N_RESAMPLES = 1000


class Interval(NamedTuple):
    """A metric and the interval around it; NaN where it is undefined."""

    value: float
    low: float
    high: float


UNDEFINED = Interval(math.nan, math.nan, math.nan)


def resample_counts(
    n: int, *, groups: np.ndarray | None = None, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return how often each of `n` examples is drawn in each resample: int32, shape (n_resamples, n).

    Parameters
    ----------
    n : int
    groups : ndarray of int, shape (n,), optional
        Examples with the same number are drawn together (`duplicates.text_groups`). As many groups are drawn as there
        are, so the number of examples differs between resamples.
    n_resamples, seed : int

    Examples
    --------
    >>> resample_counts(4, n_resamples=2).sum(axis=1).tolist()
    [4, 4]
    >>> resample_counts(4, groups=np.array([0, 0, 1, 1]), n_resamples=1).tolist()
    [[0, 0, 2, 2]]
    """
    counts = np.zeros((n_resamples, n), dtype=np.int32)
    for row, drawn in zip(counts, resamples(n, groups=groups, n_resamples=n_resamples, seed=seed), strict=True):
        row += drawn
    return counts


def resamples(
    n: int,
    *,
    groups: np.ndarray | None = None,
    kinds: np.ndarray | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the rows of `resample_counts` one by one: int32, shape (n,). All rows together may not fit into memory.

    Parameters
    ----------
    n, groups, n_resamples, seed
        As for `resample_counts`.
    kinds : ndarray of int, shape (n,), optional
        The kind of each example, from 0, where only the number of examples of each kind matters. The rows are then
        these numbers, int32 of shape (n_kinds,).

    Examples
    --------
    >>> [drawn.tolist() for drawn in resamples(4, kinds=np.array([0, 0, 0, 1]), n_resamples=2)]
    [[3, 1], [4, 0]]
    """
    groups, rng = repeated_groups(groups), np.random.default_rng(seed)
    n_kinds = 0 if kinds is None or not n else int(kinds.max()) + 1
    if groups is not None:
        groups = np.unique(groups, return_inverse=True)[1]
    n_drawn = n if groups is None else int(groups.max()) + 1
    for _ in range(n_resamples):
        drawn = rng.integers(0, n_drawn, n_drawn) if n else np.zeros(0, dtype=np.int64)
        if groups is None and kinds is not None:
            yield np.bincount(kinds[drawn], minlength=n_kinds).astype(np.int32)
            continue
        counts = np.bincount(drawn, minlength=n_drawn).astype(np.int32)
        counts = counts if groups is None else counts[groups]
        yield counts if kinds is None else np.bincount(kinds, counts, n_kinds).astype(np.int32)


def resample_blocks(
    n: int, *, groups: np.ndarray | None = None, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Yield the rows of `resample_counts`, several at a time: int32, shape (n_rows, n); see `blocks`."""
    rows = resamples(n, groups=groups, n_resamples=n_resamples, seed=seed)
    for block in blocks(n_resamples, n):
        yield np.stack(list(islice(rows, block.stop - block.start)))


def resample_codes(
    codes: np.ndarray,
    n_codes: int,
    *,
    groups: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Return how often each code occurs among the examples, and below that in each resample.

    A metric that depends only on these counts needs no resample of single examples: groups with the same codes are
    interchangeable, and how many of each kind are drawn has a multinomial distribution.

    Parameters
    ----------
    codes : ndarray of int, shape (n,)
        What a metric needs to know of each example, such as its outcome or its cell of a confusion matrix; at least 0.
    n_codes : int
    groups, n_resamples, seed
        As for `resample_counts`.
    strata : ndarray of int, shape (n_codes,), optional
        The stratum of each code: of each stratum as many examples, or groups, are drawn as there are. A group is in the
        stratum of its most frequent code.

    Returns
    -------
    ndarray of float64, shape (1 + n_resamples, n_codes)

    Examples
    --------
    >>> resample_codes(np.array([0, 0, 2]), 3, n_resamples=2).sum(axis=1).tolist()
    [3.0, 3.0, 3.0]
    """
    counts, groups = np.bincount(codes, minlength=n_codes), repeated_groups(groups)
    rng = np.random.default_rng(seed)
    result = np.zeros((1 + n_resamples, n_codes))  # numpy multiplies matrices of floats much faster
    if not len(codes):
        return result
    result[0] = counts
    if groups is None:
        _draw(result[1:], rng, counts, strata)
        return result
    groups = np.unique(groups, return_inverse=True)[1]
    n_groups = int(groups.max()) + 1
    in_group = csr_matrix((np.ones(len(codes)), (groups, codes)), shape=(n_groups, n_codes))
    # Groups with the same codes have the same sum of one random number per code.
    _, kinds, n_of_kind = np.unique(
        in_group @ np.random.default_rng(0).integers(1, 2**40, n_codes).astype(np.float64),
        return_index=True,
        return_counts=True,
    )
    kind_strata = None if strata is None else strata[np.asarray(in_group[kinds].argmax(axis=1)).ravel()]
    drawn = np.zeros((n_resamples, len(n_of_kind)))
    _draw(drawn, rng, n_of_kind, kind_strata)
    result[1:] = (in_group[kinds].T @ drawn.T).T
    return result


def _draw(drawn: np.ndarray, rng: np.random.Generator, counts: np.ndarray, strata: np.ndarray | None) -> None:
    """Write into `drawn`, shape (n_resamples, n_kinds), how often each kind is drawn if `counts` of each are there."""
    for stratum in [0] if strata is None else np.unique(strata[counts > 0]):
        kinds = slice(None) if strata is None else np.flatnonzero(strata == stratum)
        n = counts[kinds].sum()
        for block in blocks(len(drawn), len(counts)):
            drawn[block, kinds] = rng.multinomial(n, counts[kinds] / n, block.stop - block.start)


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
    if not len(resampled) or not np.isfinite(value):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    *,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return a statistic of `n` examples with its percentile bootstrap interval.

    Parameters
    ----------
    statistic : function
        Takes the weights of the examples (how often each counts; int, shape (n,)), like scikit-learn's
        `sample_weight`.
    n : int
    groups, level, n_resamples, seed
        As everywhere in this module.

    Examples
    --------
    >>> correct = np.array([1, 1, 1, 0])
    >>> bootstrap(lambda weights: np.average(correct, weights=weights), 4).value
    0.75
    """
    draws = resamples(n, groups=groups, n_resamples=n_resamples, seed=seed)
    resampled = np.array([statistic(weights) for weights in draws])
    return interval(float(statistic(np.ones(n, dtype=np.int32))), resampled, level=level)


def effective_n(values: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Return how many independent texts would have a mean as precise as that of `values`.

    Texts of one group belong together. The number is n / (1 + r (m - 1)): m is the mean size of a group, weighted by
    its size (Kish 1965), and r the correlation of two values of one group, from pairs (Fleiss and Cuzick 1979), between
    0 and 1. Where all values are equal, r is unknown and counts as 1.

    Parameters
    ----------
    values : ndarray, shape (n,)
    groups : ndarray of int, shape (n,), optional

    Examples
    --------
    >>> effective_n(np.array([1, 1, 0, 0]), groups=np.array([0, 0, 1, 1]))
    2.0
    """
    n, groups = len(values), repeated_groups(groups)
    if groups is None:
        return float(n)
    values, groups = np.asarray(values, dtype=np.float64), np.unique(groups, return_inverse=True)[1]
    sizes, sums, squares = (np.bincount(groups, weights=weights) for weights in (None, values, values**2))
    correlation, variance = 1.0, float(values.var())
    if variance > 0:
        within = (sizes * squares - sums**2).sum() / (sizes * (sizes - 1)).sum()
        correlation = float(np.clip(1 - within / variance, 0, 1))
    return float(n / (1 + correlation * ((sizes**2).sum() / n - 1)))


def effective_shares(codes: np.ndarray, n_codes: int, groups: np.ndarray) -> np.ndarray:
    """Return `effective_n` / n of the texts with each code, if all texts of a group are alike: shape (n_codes,).

    >>> effective_shares(np.array([0, 0, 1, 1]), 2, groups=np.array([0, 0, 1, 2])).tolist()
    [0.5, 1.0]
    """
    if repeated_groups(groups) is None:
        return np.ones(n_codes)
    pairs, sizes = np.unique(np.stack([codes, groups]), axis=1, return_counts=True)
    n, squares = (np.bincount(pairs[0], weights=weights, minlength=n_codes) for weights in (sizes, sizes**2))
    return np.where(squares > 0, n / np.maximum(squares, 1), 1.0)


def wilson(n_hits: float, n: float, *, level: float = 0.95) -> Interval:
    """Return the fraction `n_hits` / `n` with Wilson's interval (1927); NaN where `n` is 0.

    With up to three hits or misses, the end of the interval that lies nearer to 0 or 1 is that of the Poisson
    distribution (Brown, Cai and DasGupta 2001); otherwise true fractions just outside are missed too often.

    A fraction has few possible values, so no interval covers 0.95 exactly. At 0.95, with 60 to 1,000 texts, this one
    covers 0.93 to 0.97 where at least 10 hits and 10 misses are expected; 0.925 to 0.98 where at least 5 are; and up to
    1.0 nearer to 0 and 1, where a set without any hit, or any miss, is the usual one. The mean over all fractions is
    0.95 to 0.96.

    Parameters
    ----------
    n_hits, n : float
        Whole numbers, or effective sizes (`effective_n`).
    level : float

    Examples
    --------
    >>> [round(number, 3) for number in wilson(30, 30)]
    [1.0, 0.886, 1.0]
    """
    if not n > 0:
        return UNDEFINED
    p, z = float(n_hits / n), norm.ppf((1 + level) / 2)
    middle, half = p + z**2 / (2 * n), z * math.sqrt(max(p * (1 - p), 0.0) / n + z**2 / (4 * n**2))
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    if n_hits <= min(3, n / 2):
        low = min(low, float(gammaincinv(n_hits, 1 - level)) / n) if n_hits > 0 else 0.0
    if n - n_hits <= min(3, n / 2):
        high = max(high, 1 - float(gammaincinv(n - n_hits, 1 - level)) / n) if n > n_hits else 1.0
    return Interval(p, max(float(low), 0.0), min(float(high), 1.0))


def fraction_interval(
    hits: np.ndarray, of: np.ndarray, *, groups: np.ndarray | None = None, level: float = 0.95
) -> Interval:
    """Return the fraction of the examples `of` that are `hits` (bool, shape (n,)), with Wilson's interval.

    `groups` are the texts that are equal; the interval then has the size of `effective_n`.

    >>> [round(number, 3) for number in fraction_interval(np.array([True] * 20), np.array([True] * 20))]
    [1.0, 0.839, 1.0]
    """
    of = np.asarray(of, dtype=bool)
    right = np.asarray(hits, dtype=bool)[of]
    if not len(right):
        return UNDEFINED
    n = effective_n(right, None if groups is None else groups[of])
    return Interval(float(right.mean()), *wilson(n * right.mean(), n, level=level)[1:])


def score_interval(
    value: float,
    resampled: np.ndarray,
    *,
    n: float,
    n_least: float | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
) -> Interval:
    """Return a metric between two bounds with Wilson's interval of a fraction that has the same variance.

    The variance is that of the bootstrap (see `wilson_of_variance`). A metric such as macro F1 is lower in samples than
    it is in truth, and lower again in resamples. How much lower depends on how the texts were drawn, so the interval is
    moved by half of the bootstrap's bias, and widened by the other half.

    Parameters
    ----------
    value : float
        The metric on the examples themselves.
    resampled : ndarray, shape (n_resamples,)
        The metric on each resample; NaN (undefined) is left out.
    n : float
        The largest effective number: that of the texts, or groups of texts, which the metric is about. Where nothing
        varies, because all texts are right or all wrong, it is the effective number.
    n_least : float, optional
        The number of texts of the rarest kind, if it is small: Student's t distribution then replaces the normal one.
    bounds : tuple of float
        The lowest and the highest possible value.
    level : float
    """
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled) < 2 or np.isnan(value) or not n > 0:
        return Interval(value, np.nan, np.nan)
    half_bias = (float(resampled.mean()) - value) / 2
    variance = float(resampled.var(ddof=1)) + half_bias**2
    degrees = math.inf if n_least is None else max(n_least - 1, 1)
    n_constant = n if n_least is None else n_least
    options: dict[str, Any] = {"n_constant": n_constant, "n_most": n, "degrees": degrees, "bounds": bounds}
    low, high = wilson_of_variance(value - half_bias, variance, **options, level=level)
    return Interval(float(value), min(value, low), max(value, high))


def wilson_of_variance(
    value: float,
    variance: float,
    *,
    n_constant: float,
    n_most: float = math.inf,
    degrees: float = math.inf,
    bounds: tuple[float, float] = (0.0, 1.0),
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the ends of Wilson's interval of a fraction that has this value and this variance.

    Its number of texts is value (1 - value) / variance (for fractions of surveys: Korn and Graubard 1998).

    Parameters
    ----------
    value, variance : float
    n_constant : float
        The number of texts where the variance is 0: all of them are right, or all are wrong.
    n_most : float
        The largest number of texts.
    degrees : float
        Those of Student's t distribution, which replaces the normal one where few texts show the variance.
    bounds : tuple of float
        The lowest and the highest possible value.
    level : float

    Examples
    --------
    >>> [round(end, 3) for end in wilson_of_variance(0.9, 0.0009, n_constant=100)]
    [0.826, 0.945]
    """
    lowest, width = bounds[0], bounds[1] - bounds[0]
    fraction, variance = float(np.clip((value - lowest) / width, 0.0, 1.0)), variance / width**2
    n = n_constant
    if variance > 1e-20 and 0 < fraction < 1:
        n = min(n_most, fraction * (1 - fraction) / variance)
    z = norm.ppf((1 + level) / 2)
    n *= float(z / (student_t.ppf((1 + level) / 2, degrees) if math.isfinite(degrees) else z)) ** 2
    _, low, high = wilson(n * fraction, n, level=level)
    return lowest + width * low, lowest + width * high


def mean_difference_interval(
    differences: np.ndarray, *, groups: np.ndarray | None = None, level: float = 0.95
) -> Interval:
    """Return the mean of differences per text, from -2 to 2, with the interval of Bonett and Price (2012).

    It is the normal interval with one more text that differs in each direction, so it is not empty where no text
    differs.

    >>> [round(number, 3) for number in mean_difference_interval(np.array([1, 1, 1, 1] + [0] * 96))]
    [0.04, -0.007, 0.086]
    """
    differences = np.asarray(differences, dtype=np.float64)
    if not len(differences):
        return UNDEFINED
    n = effective_n(differences, groups)
    mean = differences.mean() * n / (n + 2)
    variance = ((differences**2).mean() * n + 2) / (n + 2) - mean**2
    half = norm.ppf((1 + level) / 2) * math.sqrt(variance / (n + 2))
    largest = max(1.0, float(np.abs(differences).max()))
    low, high = max(mean - half, -largest), min(mean + half, largest)
    return Interval(float(differences.mean()), float(low), float(high))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two metrics over the same resamples; NaN where one of them does not vary.

    >>> round(correlation(np.array([0.1, 0.2, 0.4]), np.array([0.3, 0.4, 0.6])), 3)
    1.0
    """
    is_defined = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[is_defined], b[is_defined]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def difference_interval(a: Interval, b: Interval, r: float) -> Interval:
    """Return b - a with an interval from the intervals of both (Zou and Donner 2008).

    Parameters
    ----------
    a, b : Interval
        Of two metrics of the same texts.
    r : float
        The `correlation` of the two metrics; NaN counts as 0.
    """
    r = 0.0 if np.isnan(r) else r
    (low_a, high_a), (low_b, high_b) = ((abs(x.value - x.low), abs(x.high - x.value)) for x in (a, b))
    difference = b.value - a.value
    low = difference - math.sqrt(max(low_b**2 + high_a**2 - 2 * r * low_b * high_a, 0.0))
    high = difference + math.sqrt(max(high_b**2 + low_a**2 - 2 * r * high_b * low_a, 0.0))
    return Interval(difference, low, high)


def repeated_groups(groups: Any) -> np.ndarray | None:
    """Return `groups` as an array, or None where no two texts belong together."""
    if groups is None:
        return None
    groups = np.asarray(groups)
    rises = bool((groups[1:] > groups[:-1]).all())  # as where no texts are equal, and much faster to see
    return None if rises or pd.Index(groups).is_unique else groups


def blocks(n_resamples: int, n: int) -> list[slice]:
    """Return slices over resamples of `n` examples such that a float table of one slice takes about 16 MB at most."""
    step = max(1, 2_000_000 // max(n, 1))
    return [slice(start, min(start + step, n_resamples)) for start in range(0, n_resamples, step)]
