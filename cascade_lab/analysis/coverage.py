"""Measure how well confidences rank correct predictions first: risk against coverage, and the areas under the curve.

The last stage's most probable in-scope label is a text's prediction. The texts whose confidence is below a threshold
are not answered. A text out of scope has no correct in-scope label, so answering it is always an error. *Coverage* is
the fraction of texts that are answered, *risk* the error rate among them. Texts with equal confidence are answered
together; an area takes the mean over all their orders.

`risk_coverage_curve` and `risk_coverage_areas` take plain arrays; `risk_coverage` and `coverage_metrics` take a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import (
    N_RESAMPLES,
    Interval,
    blocks,
    effective_n,
    resample_blocks,
    score_interval,
    wilson_of_variance,
)
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.metrics import in_scope_predictions
from cascade_lab.analysis.outcomes import outcome_codes
from cascade_lab.exceptions import RunError, did_you_mean

if TYPE_CHECKING:
    from cascade_lab.run import Run

Confidence = Literal["product", "last", "gate"]
CONFIDENCES: tuple[Confidence, ...] = get_args(Confidence)
AREAS = ("aurc", "excess_aurc", "augrc")
_ADDED_ERRORS = 0.2
_SQUARED_WEIGHT = {"aurc": 2.0, "excess_aurc": 2.0, "augrc": 1 / 3}
"""The mean of w² over all ranks: an error adds w / n, w is -log(rank / n) for AURC and 1 - rank / n for AUGRC."""
_MAX_POINTS = 200


def correct_and_confidence(run: Run, confidence: Confidence = "product") -> tuple[np.ndarray, np.ndarray]:
    """Return whether the most probable in-scope label of each text is correct, and a confidence in it.

    Parameters
    ----------
    run : Run
        With shadow scores. Unlabelled texts are left out.
    confidence : {"product", "last", "gate"}
        p(gate) · p(class), or only one of the two factors: "last" is p(class). With several gates, p(gate) is the
        product of their probabilities of the pass label. Where a deferral stage answers, p(class) is that stage's.

    Returns
    -------
    correct : ndarray of bool, shape (n,)
    confidence : ndarray of float64, shape (n,)

    Raises
    ------
    RunError
        The run has no shadow scores or no labels, the cascade has no gate, or no confidence has that name.
    """
    if confidence not in CONFIDENCES:
        raise RunError(f"no confidence is named '{confidence}'{did_you_mean(confidence, list(CONFIDENCES))}")
    if confidence == "gate" and not any(stage.is_gate for stage in run.spec.stages):
        raise RunError(f"{run.name}: the cascade has no gate, so there is no confidence 'gate'; use 'last'")
    best = in_scope_predictions(run.labelled)
    values = {"product": best.p_gates * best.p_class, "last": best.p_class, "gate": best.p_gates}
    return best.correct, values[confidence]


def risk_coverage(
    run: Run,
    confidence: Confidence = "product",
    *,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the risk–coverage curve of a confidence of a run: see `risk_coverage_curve`.

    Raises
    ------
    RunError
        As for `correct_and_confidence`.
    """
    correct, values = correct_and_confidence(run, confidence)
    groups = run.labelled.text_groups
    return risk_coverage_curve(correct, values, groups=groups, level=level, n_resamples=n_resamples, seed=seed)


def risk_coverage_curve(
    correct: Any,
    confidence: Any,
    *,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the error rate among the most confident texts, with an interval at each coverage.

    The interval is that of `bootstrap.score_interval`. It is for the risk at this coverage, so it counts that the
    threshold would be another one on other texts. Where no answered text is wrong, it is Wilson's interval.

    Parameters
    ----------
    correct : array-like of bool, shape (n,)
        Whether each prediction is correct.
    confidence : array-like of float, shape (n,)
        Higher where the prediction is more certain; any scale.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    level, n_resamples, seed
        Of the bootstrap.

    Returns
    -------
    DataFrame
        One row per point, from the lowest coverage to 1: `threshold` (texts with at least this confidence are
        answered), `n_examples` (the number of those texts), `coverage`, and the risk as `value`, `low`, `high`. At most
        200 points, evenly spaced over the distinct confidences.

    Raises
    ------
    RunError
        The shapes differ, or there are no texts.

    Examples
    --------
    >>> risk_coverage_curve([True, False, True], [0.9, 0.8, 0.7])[["threshold", "coverage", "value"]].round(2)
       threshold  coverage  value
    0        0.9      0.33   0.00
    1        0.8      0.67   0.50
    2        0.7      1.00   0.33
    """
    correct, confidence = _checked(correct, confidence)
    n = len(confidence)
    ranked = _ranked(correct, confidence, np.ones((1, n), dtype=np.int32))
    points = np.unique(np.linspace(0, len(ranked.thresholds) - 1, _MAX_POINTS).round().astype(int))
    n_answered = (ranked.before + ranked.size)[0, points].astype(int)
    draws = resample_blocks(n, groups=groups, n_resamples=n_resamples, seed=seed)
    risks = np.concatenate([_risk_at(_ranked(correct, confidence, weights), n_answered / n) for weights in draws])
    distinct = effective_n(np.ones(n), groups) / n  # the fraction of the texts that are new evidence
    intervals = [
        score_interval(float(value), risk, n=k * distinct, level=level)
        for value, risk, k in zip(_risk_at(ranked, n_answered / n)[0], risks.T, n_answered, strict=True)
    ]
    return pd.DataFrame(
        {
            "threshold": ranked.thresholds[points],
            "n_examples": n_answered,
            "coverage": n_answered / n,
            **dict(zip(Interval._fields, np.array(intervals).T, strict=True)),
        }
    )


def coverage_metrics(
    run: Run,
    which: Sequence[Confidence] | None = None,
    *,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return how well each confidence of a run ranks correct predictions first.

    Parameters
    ----------
    run : Run
    which : sequence of {"product", "last", "gate"}, optional
        By default all that the cascade has.
    level : float

    Returns
    -------
    DataFrame
        Three rows per confidence: `confidence`, `metric`, `value`, `low`, `high`; the metrics are those of
        `risk_coverage_areas`.

    Raises
    ------
    RunError
        As for `correct_and_confidence`.
    """
    tables, groups = {}, run.labelled.text_groups
    for name in which or (CONFIDENCES if any(stage.is_gate for stage in run.spec.stages) else ("last",)):
        correct, values = correct_and_confidence(run, name)
        tables[name] = risk_coverage_areas(correct, values, groups=groups, level=level)
    return pd.concat(tables, names=["confidence"]).reset_index()


def risk_coverage_areas(
    correct: Any, confidence: Any, *, groups: np.ndarray | None = None, level: float = 0.95
) -> pd.DataFrame:
    """Return the areas under the risk–coverage curve, with intervals. Lower is better.

    An interval is Wilson's of a fraction with the variance of the area (`bootstrap.wilson_of_variance`), and the
    variance is that of the texts' influences on it (the infinitesimal jackknife, Efron 1982). An error among the
    surest texts is rare and weighs much, so a set without one shows too small a variance. For the upper end, a fifth
    of another error, at a random place, is added to it.

    Simulated coverage at 0.95, with 100 to 1,000 texts of five kinds of classifiers, where 9 errors or more are
    expected: 0.93 to 0.975 of `aurc` and `augrc`, 0.925 to 0.98 of `excess_aurc`. With fewer errors up to 0.995, as for
    fractions near 0 (see `wilson`). With a variance of at least that of a fraction, `aurc` was covered in 0.985.

    Parameters
    ----------
    correct : array-like of bool, shape (n,)
        Whether each prediction is correct.
    confidence : array-like of float, shape (n,)
        Higher where the prediction is more certain; any scale.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    level : float

    Returns
    -------
    DataFrame
        One row per metric: `value`, `low`, `high`.

        - `aurc`: the mean risk over all coverages (Geifman and El-Yaniv 2017).
        - `excess_aurc`: `aurc` minus the AURC of a perfect order (Geifman et al. 2019).
        - `augrc`: the area under the generalized risk, which is the fraction of all texts that are answered wrongly
          (Traub et al. 2024).

    Raises
    ------
    RunError
        The shapes differ, or there are no texts.

    Examples
    --------
    The risks are 0, 1/2, 1/3; those of a perfect order 0, 0, 1/3.

    >>> risk_coverage_areas([True, False, True], [0.9, 0.8, 0.7])["value"].round(4).to_dict()
    {'aurc': 0.2778, 'excess_aurc': 0.1667, 'augrc': 0.1667}
    """
    correct, confidence = _checked(correct, confidence)
    n = len(confidence)
    values = weighted_areas(correct, confidence, weights=np.ones((1, n), dtype=np.int32))
    group = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    n_groups, n_texts = int(group.max()) + 1, effective_n(np.ones(n), groups)
    rows = []
    for name, value, influence in zip(AREAS, values, _influences(correct, confidence), strict=True):
        variance = float((np.bincount(group, weights=influence) ** 2).sum()) / n**2 * n_groups / max(n_groups - 1, 1)
        # AUGRC is at most 1/2: all texts are wrong.
        options: dict[str, Any] = {"bounds": (0.0, 0.5 if name == "augrc" else 1.0), "n_constant": n_texts}
        low, high = (
            wilson_of_variance(float(value[0]), variance + more, **options, level=level)[end]
            for end, more in ((0, 0.0), (1, _ADDED_ERRORS * _SQUARED_WEIGHT[name] / n_texts**2))
        )
        rows.append(Interval(float(value[0]), low, high))
    return pd.DataFrame(rows, index=pd.Index(AREAS, name="metric"), columns=list(Interval._fields))


def weighted_areas(
    correct: np.ndarray, confidence: np.ndarray, *, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return AURC, excess AURC and AUGRC for many weightings of the texts at once.

    Let E(k) be the number of errors among the k most confident of n texts. AURC is the mean of E(k) / k over
    k = 1 … n. AUGRC is the area under E(k) / n over k / n by the trapezoid rule; it equals (1 - AUROC) · a · (1 - a) +
    (1 - a)² / 2 with the accuracy a (Traub et al. 2024).

    Parameters
    ----------
    correct : ndarray of bool, shape (n,)
    confidence : ndarray, shape (n,)
    weights : ndarray of int, shape (n_resamples, n)
        How often each text counts.

    Returns
    -------
    tuple of three ndarrays, shape (n_resamples,)
    """
    n_all = weights.sum(axis=1)
    # The sum of 1/k for k = 1 … n, at index n.
    harmonic = np.append(0.0, np.cumsum(1 / np.arange(1, n_all.max() + 1)))
    parts = [_areas(_ranked(correct, confidence, weights[block]), harmonic) for block in blocks(*weights.shape)]
    aurc, n_wrong, augrc = (np.concatenate(part) for part in zip(*parts, strict=True))
    n_correct = n_all - n_wrong
    # A perfect order has no error among the first n_correct texts, and one more error at each later text.
    perfect = (n_wrong - n_correct * (harmonic[n_all] - harmonic[n_correct])) / n_all
    return aurc, aurc - perfect, augrc


def operating_point(run: Run, *, level: float = 0.95) -> dict[str, Interval]:
    """Return the `coverage` and the `risk` of the cascade at its own thresholds, with Wilson's intervals."""
    run = run.labelled
    outcome = outcome_codes(run.spec, run.predictions["label"], run.predictions["predicted"])
    return outcome_intervals(outcome, ("coverage", "risk"), groups=run.text_groups, level=level)


class _Ranked(NamedTuple):
    """Texts in groups of equal confidence, the highest first.

    `thresholds`, shape (n_groups,), are the confidences. `size` and `errors`, shape (n_resamples, n_groups), count the
    texts and the errors of each group; `before` and `errors_before` those of the groups before it.
    """

    thresholds: np.ndarray
    size: np.ndarray
    errors: np.ndarray
    before: np.ndarray
    errors_before: np.ndarray


def _checked(correct: Any, confidence: Any) -> tuple[np.ndarray, np.ndarray]:
    correct, confidence = np.asarray(correct, dtype=bool), np.asarray(confidence, dtype=np.float64)
    if correct.ndim != 1 or correct.shape != confidence.shape or not len(correct):
        raise RunError(
            f"correct has shape {correct.shape} and confidence {confidence.shape}; give one value of each per text"
        )
    return correct, confidence


def _ranked(correct: np.ndarray, confidence: np.ndarray, weights: np.ndarray) -> _Ranked:
    order = np.argsort(-confidence, kind="stable")
    confidence = confidence[order]
    starts = np.flatnonzero(np.append(True, np.diff(confidence) < 0))
    counts = weights[:, order].astype(np.int64)
    size = np.add.reduceat(counts, starts, axis=1)
    errors = np.add.reduceat(counts * ~correct[order], starts, axis=1)
    return _Ranked(confidence[starts], size, errors, size.cumsum(axis=1) - size, errors.cumsum(axis=1) - errors)


def _areas(ranked: _Ranked, harmonic: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return AURC, the number of errors, and AUGRC."""
    _, size, errors, before, errors_before = ranked
    n = size.sum(axis=1)
    # In a group of m texts with e errors, each text adds e/m errors in the mean over the orders of the group. So the
    # risks in it are (E + e j / m) / (N + j) for j = 1 … m. Their sum is e + (E - e N / m) (H(N + m) - H(N)).
    error_rate = errors / np.maximum(size, 1)
    sums = errors + (errors_before - error_rate * before) * (harmonic[before + size] - harmonic[before])
    trapezoids = size * (errors_before + errors / 2)
    return sums.sum(axis=1) / n, errors.sum(axis=1), trapezoids.sum(axis=1) / n**2


def _influences(correct: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return by how much n more weight of one text would change AURC, excess AURC and AUGRC: arrays of shape (n,).

    The mean of AURC's terms E(k) / k changes by the new text's own term; and if it is wrong, by 1 / j for each text j
    at or below it; and the weight below each text j lowers its term by E(j) / j². Of equal confidences, the means over
    all orders are taken.
    """
    n, order = len(confidence), np.argsort(-confidence, kind="stable")
    ranked = _ranked(correct, confidence, np.ones((1, n), dtype=np.int32))
    size, errors, before, errors_before = (np.asarray(part[0], dtype=np.float64) for part in ranked[1:])
    tie = np.repeat(np.arange(len(size)), size.astype(int))
    wrong, rank = (~correct[order]).astype(np.float64), np.arange(1, n + 1)
    risk = (errors_before[tie] + (rank - before[tie]) * (errors / size)[tie]) / rank

    def from_here(terms: np.ndarray) -> np.ndarray:
        return terms[::-1].cumsum()[::-1]

    def mean_of_ties(terms: np.ndarray) -> np.ndarray:
        return (np.bincount(tie, weights=terms) / size)[tie]

    aurc = mean_of_ties(risk - from_here(risk / rank)) + wrong * mean_of_ties(from_here(1 / rank)) - risk.mean()
    error_rate = float(wrong.mean())
    # The AURC of a perfect order is about e + (1 - e) log(1 - e), for an error rate e.
    excess = aurc + np.log(max(1 - error_rate, 1 / n)) * (wrong - error_rate)
    middle = (errors_before + errors / 2)[tie] + wrong * (n - before - size / 2)[tie]
    augrc = middle / n - 2 * float((size * (errors_before + errors / 2)).sum()) / n**2
    place = np.argsort(order)
    return aurc[place], excess[place], augrc[place]


def _risk_at(ranked: _Ranked, coverage: np.ndarray) -> np.ndarray:
    """Return the risk among the most confident fractions `coverage` of the texts: shape (n_resamples, n_points)."""
    ends = ranked.before + ranked.size
    risks = np.empty((len(ends), len(coverage)))
    for row, end in enumerate(ends):
        n_answered = np.minimum(coverage * end[-1], end[-1])
        group = np.searchsorted(end, n_answered)
        fraction = (n_answered - ranked.before[row, group]) / ranked.size[row, group]
        risks[row] = (ranked.errors_before[row, group] + fraction * ranked.errors[row, group]) / n_answered
    return risks
