r"""Alarms on a stream of texts that may be read every day, with a bound on false alarms over the whole time.

A *hit* is a text of some kind, such as a rejected one. The null hypothesis: each text of the reference and of the
stream is a hit with the same probability, independently. An alarm has a bound and a test martingale:

1. The reference gives an upper bound u on the probability, too low with probability at most delta / 2 (Clopper and
   Pearson 1934).
2. For texts with s hits and f misses, the mean of (q / u)^s ((1 - q) / (1 - u))^f over a distribution of q > u is a
   nonnegative supermartingale whatever the probability up to u is. It starts at 1, so it ever reaches 2 / delta with
   probability at most delta / 2 (Ville 1939; Waudby-Smith and Ramdas 2023 bet in this way).

A change can begin on any day. So the evidence is a weighted sum of such martingales, one that begins on each day k; the
weights 1 / (k (k + 1)) add up to 1, so the sum is a supermartingale too. An alarm for too few hits is one for misses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import betaincc, betaln, logsumexp
from scipy.stats import beta

ALPHA = 0.01


def upper_bound(n_hits: int, n: int, delta: float) -> float:
    """Return the exact upper bound of a probability, of confidence 1 - `delta` (Clopper and Pearson 1934).

    >>> round(upper_bound(5, 100, 0.025), 4)
    0.1128
    """
    return 1.0 if n_hits >= n else float(beta.ppf(1 - delta, n_hits + 1, n - n_hits))


def log_evidence(hits: np.ndarray, misses: np.ndarray, bound: float) -> np.ndarray:
    """Return the logarithm of the test martingale against hits with a probability of at most `bound`.

    The distribution of q is the beta distribution with parameters 1 and 1 / `bound`, cut off below `bound`: an
    exponential decay on the scale of the bound.

    Parameters
    ----------
    hits, misses : ndarray of int, shape (...)
    bound : float
        Above 0; at 1 there is no evidence: 0 everywhere.

    Examples
    --------
    >>> np.exp(log_evidence(np.array([0, 1, 10]), np.array([0, 0, 90]), 0.05)).round(2).tolist()
    [1.0, 1.9, 4.35]
    """
    if bound >= 1:
        return np.zeros(np.broadcast(hits, misses).shape)
    a, b = 1.0, 1.0 / bound
    with np.errstate(divide="ignore"):  # a tail that underflows is no evidence
        tail = np.log(betaincc(hits + a, misses + b, bound)) - np.log(betaincc(a, b, bound))
    weight = betaln(hits + a, misses + b) - betaln(a, b)
    return weight + tail - hits * np.log(bound) - misses * np.log1p(-bound)


def watch(then_hits: int, then_n: int, hits: Any, counts: Any, *, delta: float, fewer: bool = False) -> pd.DataFrame:
    """Watch the number of hits day by day for an increase over a reference.

    Parameters
    ----------
    then_hits, then_n : int
        Hits and texts of the reference.
    hits, counts : array-like of int, shape (n_days,)
        Hits and texts of each day, in order.
    delta : float
        The probability of an alarm, ever, if nothing changes.
    fewer : bool
        Watch for a decrease instead.

    Returns
    -------
    DataFrame
        One row per day: `n_texts`; `rate`; `bound`, that of the reference; `limit`, the nearest rate that raises the
        alarm on that day, given the days before it (NaN where none does, and after an alarm); `evidence`, which raises
        the alarm when it reaches 1; `alarm`, raised on this day or before; and `since`, at an alarm the number of the
        row on which the change most probably began, else -1.

    Examples
    --------
    >>> table = watch(50, 1000, [5, 4, 14, 16, 18], [100] * 5, delta=0.01)
    >>> table["alarm"].tolist(), int(table["since"].iloc[-1])
    ([False, False, False, False, True], 2)
    >>> table["limit"].tolist()
    [0.19, 0.2, 0.21, 0.18, 0.13]
    """
    hits, counts = (np.asarray(values, dtype=np.int64) for values in (hits, counts))
    used, then_used = (counts - hits, then_n - then_hits) if fewer else (hits, then_hits)
    bound = upper_bound(then_used, then_n, delta / 2)
    needed = np.log(2 / delta)
    by_start, log_evidence_ = _by_start(used, used, counts, bound)
    alarm = np.logical_or.accumulate(log_evidence_ >= needed)
    low, high = np.full(len(counts), -1), counts + 1  # more hits are more evidence: at `low` too few, at `high` enough
    while (high - low > 1).any():
        middle = np.maximum((low + high) // 2, 0)
        is_enough = _by_start(middle, used, counts, bound)[1] >= needed
        low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
    limit = np.where((high <= counts) & ~np.concatenate([[False], alarm[:-1]]), high.astype(float), np.nan)
    return pd.DataFrame(
        {
            "n_texts": counts,
            "rate": _fraction(hits, counts),
            "bound": 1 - bound if fewer else bound,
            "limit": _fraction(counts - limit if fewer else limit, counts),
            "evidence": np.exp(np.minimum(log_evidence_ - needed, 700.0)),
            "alarm": alarm,
            "since": np.where(alarm, by_start[:, alarm.argmax()].argmax() if alarm.any() else -1, -1),
        }
    )


def _by_start(last: np.ndarray, hits: np.ndarray, counts: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the log evidence at the end of each day: by the day on which a change began, and of all together.

    Parameters
    ----------
    last : ndarray of int, shape (n_days,)
        The hits of each day, when it is the last day.
    hits, counts : ndarray of int, shape (n_days,)
        The hits and the texts of each day, when other days follow.
    bound : float

    Returns
    -------
    by_start : ndarray, shape (n_days, n_days)
        Weighted; the day of the beginning, and the last day. -inf where the change begins later.
    together : ndarray, shape (n_days,)
        With the weights of the days to come, for which nothing is known yet.
    """
    first, day = np.triu_indices(len(counts))
    before_hits, before = (np.concatenate([[0], np.cumsum(values)]) for values in (hits, counts))
    n_hits, n = before_hits[day] - before_hits[first] + last[day], before[day + 1] - before[first]
    by_start = np.full((len(counts), len(counts)), -np.inf)
    k = first + 1.0
    by_start[first, day] = log_evidence(n_hits, n - n_hits, bound) - np.log(k * (k + 1))
    return by_start, np.logaddexp(logsumexp(by_start, axis=0), -np.log(np.arange(len(counts)) + 2.0))


def _fraction(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return `part` / `whole`; NaN where `whole` is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
