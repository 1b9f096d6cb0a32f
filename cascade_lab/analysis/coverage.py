"""Risk against coverage: how well a cascade's confidences tell what it should leave unanswered.

Every text gets the last stage's best class in scope, and a confidence in it; the texts below a threshold are left
unanswered. A text out of scope is answered wrongly wherever it is answered. *Coverage* is the fraction answered, *risk*
the error rate among those. Texts of one confidence are answered together; where an area has to order them, it is the
mean over all their orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import N_RESAMPLES, Interval, interval, resample_counts
from cascade_lab.analysis.goals import figure_of
from cascade_lab.analysis.metrics import in_scope_answers
from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.analysis.resamples import blocks
from cascade_lab.errors import RunError, did_you_mean
from cascade_lab.run import Run

Confidence = Literal["product", "last", "gate"]
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)
_MAX_POINTS = 200


def confidences(run: Run, confidence: Confidence = "product") -> tuple[np.ndarray, np.ndarray]:
    """Return a confidence in the best class in scope for every text, and whether that class is wrong.

    Parameters
    ----------
    run : Run
        With shadow scores.
    confidence : {"product", "last", "gate"}
        p(gate) · p(class), or one of the two factors; with more gates, p(gate) is the product of theirs.

    Returns
    -------
    confidence : ndarray of float64, shape (n,)
    wrong : ndarray of bool, shape (n,)

    Raises
    ------
    RunError
        The run has no shadow scores, the cascade has no gate to ask, or no confidence has that name.
    """
    if confidence not in CONFIDENCES:
        raise RunError(f"no confidence is named '{confidence}'{did_you_mean(confidence, list(CONFIDENCES))}")
    if confidence == "gate" and len(run.spec.stages) == 1:
        raise RunError(f"{run.directory}: has no gate, so no gate's confidence; ask for 'last'")
    found = in_scope_answers(run)
    values = {"product": found.p_gates * found.p_class, "last": found.p_class, "gate": found.p_gates}
    return values[confidence], ~found.right


def risk_coverage(
    run: Run,
    confidence: Confidence = "product",
    *,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the risk–coverage curve of a confidence, with a bootstrap interval of the risk at each coverage.

    Returns
    -------
    DataFrame
        A point a row, from the least coverage to all: `threshold` (the texts of at least that confidence are
        answered), `n_examples` (how many those are), `coverage`, and the risk as `value`, `low`, `high`. At most 200
        points, evenly spread over the distinct confidences.

    Raises
    ------
    RunError
        As `confidences` does.
    """
    score, wrong = confidences(run, confidence)
    ones, drawn = _weights(len(score), n_resamples, seed)
    ranked = _ranked(score, wrong, ones)
    kept = np.unique(np.linspace(0, len(ranked.thresholds) - 1, _MAX_POINTS).round().astype(int))
    n_answered = (ranked.before + ranked.size)[0, kept].astype(int)
    risks = np.concatenate([_risk_at(_ranked(score, wrong, drawn[rows]), n_answered) for rows in blocks(*drawn.shape)])
    values = _risk_at(ranked, n_answered)[0]
    return pd.DataFrame(
        {
            "threshold": ranked.thresholds[kept],
            "n_examples": n_answered,
            "coverage": n_answered / len(score),
            "value": values,
            "low": np.quantile(risks, (1 - level) / 2, axis=0),
            "high": np.quantile(risks, (1 + level) / 2, axis=0),
        }
    )


def coverage_figures(
    run: Run,
    which: Sequence[Confidence] | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well each confidence ranks the texts that the last stage gets right before the others.

    Parameters
    ----------
    run : Run
    which : sequence of {"product", "last", "gate"}, optional
        By default all that the cascade has.

    Returns
    -------
    DataFrame
        Three rows a confidence: `confidence`, `figure`, `value`, `low`, `high` (bootstrap over texts). The figures are
        `aurc`, the mean risk over all coverages (Geifman and El-Yaniv 2017), `excess_aurc`, that less the same of a
        perfect order (Geifman et al. 2019), and `augrc`, the area under the generalized risk, the fraction of all texts
        that are answered wrongly (Traub et al. 2024). For each of them less is better.

    Raises
    ------
    RunError
        As `confidences` does.
    """
    rows = []
    for confidence in which or (CONFIDENCES if len(run.spec.stages) > 1 else ("last",)):
        score, wrong = confidences(run, confidence)
        weightings = _weights(len(score), n_resamples, seed)
        for name, value, drawn in zip(
            ("aurc", "excess_aurc", "augrc"), *(areas(score, wrong, weights=w) for w in weightings), strict=True
        ):
            rows.append((confidence, name, *interval(float(value[0]), drawn, level=level)))
    return pd.DataFrame(rows, columns=["confidence", "figure", *Interval._fields])


def areas(score: np.ndarray, wrong: np.ndarray, *, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return AURC, its excess over a perfect order, and AUGRC, for many weightings of the examples at once.

    With `n` texts of which the `k` most confident have `E(k)` errors, AURC is the mean of `E(k) / k` over k = 1 … n,
    and AUGRC the area under `E(k) / n` over `k / n` by the trapezoid rule, which is (1 - AUROC) · a · (1 - a) +
    (1 - a)² / 2 at an accuracy of a (Traub et al. 2024).

    Parameters
    ----------
    score : ndarray, shape (n,)
    wrong : ndarray of bool, shape (n,)
    weights : ndarray of int, shape (n_resamples, n)
        How often each example counts.

    Returns
    -------
    tuple of three ndarrays, shape (n_resamples,)

    Examples
    --------
    Right, wrong, right: the risks are 0, 1/2, 1/3, and a perfect order's 0, 0, 1/3.

    >>> score, wrong = np.array([0.9, 0.8, 0.7]), np.array([False, True, False])
    >>> [float(round(area[0], 4)) for area in areas(score, wrong, weights=np.ones((1, 3), dtype=int))]
    [0.2778, 0.1667, 0.1667]
    """
    n_all = weights.sum(axis=1)
    # The sum of 1/k over k = 1 … n, by n.
    harmonic = np.append(0.0, np.cumsum(1 / np.arange(1, n_all.max() + 1)))
    found = [_areas(_ranked(score, wrong, weights[rows]), harmonic) for rows in blocks(*weights.shape)]
    aurc, n_wrong, augrc = (np.concatenate(part) for part in zip(*found, strict=True))
    n_right = n_all - n_wrong
    # A perfect order has no error among the first n_right, and one more in each step after.
    perfect = (n_wrong - n_right * (harmonic[n_all] - harmonic[n_right])) / n_all
    return aurc, aurc - perfect, augrc


def operating_point(
    run: Run, *, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Return the `coverage` and the `risk` that the cascade has at its own thresholds, with bootstrap intervals."""
    counts = outcome_counts(run.spec, run.predictions).to_numpy()
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), n_resamples)
    return {
        name: interval(float(figure_of(name, counts)), figure_of(name, drawn), level=level)
        for name in ("coverage", "risk")
    }


class _Ranked(NamedTuple):
    """Examples in groups of one confidence, the highest first.

    `thresholds`, shape (n_groups,), are the confidences. `size` and `errors`, shape (n_resamples, n_groups), are how
    many texts and errors a group has; `before` and `errors_before` how many are in the groups before it.
    """

    thresholds: np.ndarray
    size: np.ndarray
    errors: np.ndarray
    before: np.ndarray
    errors_before: np.ndarray


def _weights(n: int, n_resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((1, n), dtype=np.int32), resample_counts(n, n_resamples=n_resamples, seed=seed)


def _ranked(score: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> _Ranked:
    order = np.argsort(-score, kind="stable")
    score = score[order]
    starts = np.flatnonzero(np.append(True, np.diff(score) < 0))
    drawn = weights[:, order].astype(np.int64)
    size = np.add.reduceat(drawn, starts, axis=1)
    errors = np.add.reduceat(drawn * wrong[order], starts, axis=1)
    return _Ranked(score[starts], size, errors, size.cumsum(axis=1) - size, errors.cumsum(axis=1) - errors)


def _areas(ranked: _Ranked, harmonic: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return AURC, the number of errors, and AUGRC."""
    _, size, errors, before, errors_before = ranked
    n = size.sum(axis=1)
    # Of a group of m texts with e errors, the j-th adds e/m in the mean over its orders, so that the risks in it are
    # (E + e j / m) / (N + j) for j = 1 … m: their sum is e + (E - e N / m) (H(N + m) - H(N)).
    share = errors / np.maximum(size, 1)
    sums = errors + (errors_before - share * before) * (harmonic[before + size] - harmonic[before])
    trapezoids = size * (errors_before + errors / 2)
    return sums.sum(axis=1) / n, errors.sum(axis=1), trapezoids.sum(axis=1) / n**2


def _risk_at(ranked: _Ranked, n_answered: np.ndarray) -> np.ndarray:
    """Return the risk among so many of the most confident: shape (n_resamples, n_points)."""
    ends = ranked.before + ranked.size
    risks = np.empty((len(ends), len(n_answered)))
    for row, until in enumerate(ends):
        group = np.searchsorted(until, n_answered)
        into = (n_answered - ranked.before[row, group]) / ranked.size[row, group]
        risks[row] = (ranked.errors_before[row, group] + into * ranked.errors[row, group]) / n_answered
    return risks
