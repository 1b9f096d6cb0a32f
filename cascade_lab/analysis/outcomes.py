"""The six outcomes of a text in a cascade, and the metrics that are fractions of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

RIGHT, RIGHT_REJECT = "right", "right reject"
FALSE_REJECT, FALSE_ACCEPT, WRONG_CLASS, WRONG_REJECT = "false reject", "false accept", "wrong class", "wrong reject"
OUTCOMES = (RIGHT, RIGHT_REJECT, FALSE_REJECT, FALSE_ACCEPT, WRONG_CLASS, WRONG_REJECT)
ERRORS = OUTCOMES[2:]
IN_SCOPE = (RIGHT, FALSE_REJECT, WRONG_CLASS)
OUT_OF_SCOPE = (RIGHT_REJECT, FALSE_ACCEPT, WRONG_REJECT)
ANSWERED = (RIGHT, WRONG_CLASS, FALSE_ACCEPT)

FRACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "accuracy": ((RIGHT, RIGHT_REJECT), OUTCOMES),
    "in_scope_accuracy": ((RIGHT,), IN_SCOPE),
    "reject_recall": ((RIGHT_REJECT,), OUT_OF_SCOPE),
    "reject_precision": ((RIGHT_REJECT,), (RIGHT_REJECT, FALSE_REJECT, WRONG_REJECT)),
    "coverage": (ANSWERED, OUTCOMES),
    "risk": ((WRONG_CLASS, FALSE_ACCEPT), ANSWERED),
}
"""Metric name to the outcomes that it counts, and the outcomes that it is a fraction of (which contain the first)."""
METRICS = (*FRACTIONS, "mean_cost")
COST_SUMS = ("cost in scope", "cost out of scope")
"""What counts have besides the numbers of texts of each outcome, where a cost matrix says what a text costs."""


class Scope(Protocol):
    """What outcomes need to know about a cascade; `CascadeSpec` has it."""

    @property
    def in_scope_labels(self) -> tuple[str, ...]: ...

    @property
    def reject_labels(self) -> tuple[str, ...]: ...


class LabelScope(NamedTuple):
    """Which labels are in scope and which reject, for predictions that have no `CascadeSpec`."""

    in_scope_labels: tuple[str, ...]
    reject_labels: tuple[str, ...]


def outcomes(spec: Scope, y_true: Any, y_pred: Any) -> np.ndarray:
    """Return the outcome of each example: an array of str, shape (n,), of `OUTCOMES`.

    In scope (the true label is a label of the last stage): *right*, *wrong class*, or *false reject* (rejected by any
    stage). Out of scope: *right reject*, *false accept* (a class is predicted), or *wrong reject* (rejected, with the
    label of another stage).

    Parameters
    ----------
    spec : CascadeSpec or LabelScope
    y_true, y_pred : array-like of str, shape (n,)
        True and predicted labels.

    Examples
    --------
    >>> scope = LabelScope(in_scope_labels=("pay", "play"), reject_labels=("oos",))
    >>> outcomes(scope, ["pay", "pay", "oos"], ["pay", "oos", "play"]).tolist()
    ['right', 'false reject', 'false accept']
    """
    return np.array(OUTCOMES, dtype=object)[outcome_codes(spec, y_true, y_pred)]


def outcome_codes(spec: Scope, y_true: Any, y_pred: Any) -> np.ndarray:
    """Return `outcomes` as indices into `OUTCOMES`: int, shape (n,)."""
    # pandas looks labels up by hash, numpy by sorting: a tenth of the time on 100,000 texts.
    in_scope = pd.Index(y_true).isin(spec.in_scope_labels)
    rejected = pd.Index(y_pred).isin(spec.reject_labels)
    right = np.asarray(y_true, dtype=object) == np.asarray(y_pred, dtype=object)
    kinds = [in_scope & right, ~in_scope & right, in_scope & rejected, ~in_scope & ~rejected, in_scope & ~rejected]
    return np.select(kinds, range(5), 5)


def outcome_counts(spec: Scope, predictions: pd.DataFrame) -> pd.Series:
    """Return how many of `predictions` (with `label` and `predicted`) have each outcome: int, in `OUTCOMES`' order."""
    codes = outcome_codes(spec, predictions["label"], predictions["predicted"])
    counts = np.bincount(codes, minlength=len(OUTCOMES))
    return pd.Series(counts, index=pd.Index(OUTCOMES), name="n_examples")


@cache
def is_outcome(names: tuple[str, ...]) -> np.ndarray:
    """Return which of `OUTCOMES` are named: bool, shape (6,), not to be changed."""
    named = np.isin(OUTCOMES, names)
    named.flags.writeable = False
    return named


def has_outcome(codes: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Return which texts have one of the named outcomes, from their codes (`costs.text_codes`): bool, shape (n,)."""
    return is_outcome(names)[codes % len(OUTCOMES)]


def number_of(counts: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Return how many texts have one of the named outcomes, from counts of shape (..., 6) or (..., 8)."""
    # numpy multiplies matrices of whole numbers slowly.
    columns = (counts[..., OUTCOMES.index(name)] for name in names)
    return sum(columns, np.zeros(counts.shape[:-1], dtype=counts.dtype)[()])


def price_vector(costs: Mapping[str, float], n_columns: int) -> np.ndarray:
    """Return what one of each number in counts costs: shape (n_columns,), which is 6 or 8."""
    return np.array([costs.get(counted, 0.0) for counted in (*OUTCOMES, *COST_SUMS)[:n_columns]])


class Totals(NamedTuple):
    """How many texts are in scope and out of scope, which no threshold changes: arrays of shape (...), or numbers.

    `prevalence` is the fraction of texts out of scope to reweight them to; None keeps the eval set's own.
    """

    in_scope: np.ndarray
    out_of_scope: np.ndarray
    prevalence: float | None = None

    @classmethod
    def from_counts(cls, counts: np.ndarray, prevalence: float | None = None) -> Totals:
        """Take the totals from counts, as `metric_from_counts` takes them."""
        return cls(number_of(counts, IN_SCOPE), number_of(counts, OUT_OF_SCOPE), prevalence)

    @property
    def n(self) -> np.ndarray:
        return self.in_scope + self.out_of_scope

    @property
    def weights(self) -> tuple[np.ndarray | int, np.ndarray | int]:
        """The weights of a text in scope and of one out of scope that make the latter `prevalence` of all."""
        if self.prevalence is None:
            return 1, 1
        in_scope, out_of_scope = (np.where(n > 0, n, np.nan) for n in (self.in_scope, self.out_of_scope))
        return (1 - self.prevalence) * self.n / in_scope, self.prevalence * self.n / out_of_scope

    def reweight(self, counts: np.ndarray) -> np.ndarray:
        """Return counts, shape (..., 6) or (..., 8), reweighted to the prevalence."""
        if self.prevalence is None:
            return counts
        in_scope, out_of_scope = (np.asarray(w)[..., None] for w in self.weights)
        is_in_scope = np.isin((*OUTCOMES, *COST_SUMS), (*IN_SCOPE, COST_SUMS[0]))[: counts.shape[-1]]
        return counts * np.where(is_in_scope, in_scope, out_of_scope)


def metric_from_counts(
    name: str, counts: np.ndarray, *, costs: Mapping[str, float] | None = None, prevalence: float | None = None
) -> np.ndarray:
    """Return a metric from the numbers of texts of each outcome.

    Parameters
    ----------
    name : str
        One of `METRICS`.
    counts : ndarray, shape (..., 6) or (..., 8)
        In the order of `OUTCOMES`. With a cost matrix, followed by `COST_SUMS` (see `costs.count_codes`).
    costs : mapping of str to float, optional
        What each outcome costs, for `mean_cost`; an outcome that is not named costs nothing. With a cost matrix, what a
        unit of `COST_SUMS` costs (`costs.prices`).
    prevalence : float, optional
        The fraction of texts out of scope to reweight to; by default the eval set's own.

    Returns
    -------
    ndarray, shape (...)
        NaN where the metric is undefined.

    Examples
    --------
    >>> counts = np.array([6, 2, 1, 1, 0, 0])  # right, right reject, false reject, false accept, ...
    >>> float(metric_from_counts("accuracy", counts))
    0.8
    """
    totals = Totals.from_counts(counts, prevalence)
    return extreme_metric(name, counts, counts, highest=True, totals=totals, costs=costs or {})


def extreme_metric(
    name: str,
    low_counts: np.ndarray,
    high_counts: np.ndarray,
    *,
    highest: bool,
    totals: Totals,
    costs: Mapping[str, float],
) -> np.ndarray:
    """Return the highest or the lowest value that a metric can have if each count lies between two counts.

    Where `low_counts` equals `high_counts`, it is the metric itself (interval arithmetic). Shapes and `costs` as in
    `metric_from_counts`.
    """
    toward, away = (
        totals.reweight(counts) for counts in ((high_counts, low_counts) if highest else (low_counts, high_counts))
    )
    if name == "mean_cost":
        cost = price_vector(costs, toward.shape[-1])
        with np.errstate(invalid="ignore"):  # of no text
            return (toward @ np.maximum(cost, 0) + away @ np.minimum(cost, 0)) / totals.n
    part, whole = FRACTIONS[name]
    hits, misses = number_of(toward, part), number_of(away, tuple(kind for kind in whole if kind not in part))
    w_in, w_out = totals.weights
    sizes = {OUTCOMES: totals.n, IN_SCOPE: w_in * totals.in_scope, OUT_OF_SCOPE: w_out * totals.out_of_scope}
    with np.errstate(invalid="ignore", divide="ignore"):
        if whole not in sizes:
            return hits / (hits + misses)
        # The size of the whole is fixed here, so it bounds the metric from both sides; the tighter bound holds.
        tighter = np.minimum if highest else np.maximum
        return tighter(hits, sizes[whole] - misses) / np.float64(sizes[whole])
