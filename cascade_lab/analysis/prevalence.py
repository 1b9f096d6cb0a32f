"""Estimate the fraction of texts out of scope, and the accuracy, of texts without labels, from a labelled sample.

All of it holds under *label shift*: the share of texts out of scope may differ from that of the labelled sample, but
texts in scope look alike in both, and so do texts out of scope. `fits_prevalence_shift` tests whether the scores allow
that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm

from cascade_lab.analysis.bootstrap import wilson, wilson_of_variance

N_RESAMPLES = 200
N_BINS = 500
N_HALVINGS = 30
N_LEAST, N_LEAST_OF_KIND = 20, 10
"""Texts that each sample needs for estimates, and labelled texts that are needed in scope and out of scope."""
ROUNDING = 1e-6  # smaller differences of scores, and of probabilities, may be rounding errors


def shifted_prevalence(posterior: Any, prior: float, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the most likely prevalence of a sample, from each text's probability of being out of scope elsewhere.

    It is what the EM algorithm of Saerens, Latinne and Decaestecker (2002) converges to. The likelihood is concave in
    the prevalence, so halving intervals finds its maximum sooner.

    Parameters
    ----------
    posterior : array-like of float, shape (n,)
        The probability that the text is out of scope, if the prevalence is `prior`.
    prior : float
        Between 0 and 1.
    weights : ndarray, shape (..., n), optional
        How often each text counts; several samples at once.

    Returns
    -------
    ndarray of float, shape (...)
        NaN where a sample is empty, and where every posterior is the prior up to rounding: the texts say nothing.

    Examples
    --------
    In balanced texts a score is "high" for 80% of the texts out of scope, and for 20% of the others. 50% are high now.

    >>> [float(shifted_prevalence([0.8] * n + [0.2] * (10 - n), 0.5).round(4)) for n in (5, 3)]
    [0.5, 0.1667]
    """
    posterior = np.asarray(posterior, dtype=np.float64)
    out, inside = posterior / prior, (1 - posterior) / (1 - prior)
    weights = np.ones(len(posterior)) if weights is None else weights
    is_known = ((weights > 0) & (np.abs(out - inside) > ROUNDING)).any(axis=-1)
    low, high = np.zeros(weights.shape[:-1]), np.ones(weights.shape[:-1])

    def rises(prevalence: np.ndarray) -> np.ndarray:
        """Return whether the likelihood rises at the prevalence."""
        likelihood = inside + prevalence[..., None] * (out - inside)
        return (weights * ((out - inside) / np.maximum(likelihood, 1e-300))).sum(axis=-1) > 0

    for _ in range(N_HALVINGS):
        middle = (low + high) / 2
        is_higher = rises(middle)
        low, high = np.where(is_higher, middle, low), np.where(is_higher, high, middle)
    ends = np.where(high >= 1, 1.0, np.where(low <= 0, 0.0, (low + high) / 2))
    return np.where(is_known, ends, np.nan)


def black_box_prevalence(reject_rate: Any, reject_recall: Any, false_reject_rate: Any) -> np.ndarray:
    """Return the prevalence at which a cascade rejects as many texts as it does, by its confusion matrix.

    Black-box shift estimation (Lipton, Wang and Smola 2018) with two classes; also Rogan and Gladen (1978).

    Parameters
    ----------
    reject_rate : array-like of float
        Of the texts without labels.
    reject_recall, false_reject_rate : array-like of float
        The fraction of the texts out of scope that is rejected, with any label, and that of the texts in scope.

    Returns
    -------
    ndarray of float
        In [0, 1]; NaN where texts out of scope are not rejected more often than others.

    Examples
    --------
    >>> float(black_box_prevalence(0.2, 0.8, 0.05).round(4))
    0.2
    """
    rate, recall, false_rate = (
        np.asarray(x, dtype=np.float64) for x in (reject_rate, reject_recall, false_reject_rate)
    )
    differs = recall > false_rate
    prevalence = (rate - false_rate) / np.where(differs, recall - false_rate, 1.0)
    return np.where(differs, np.clip(prevalence, 0.0, 1.0), np.nan)


def threshold_accuracy(confidence: Any, correct: Any, new_confidence: Any) -> float:
    """Estimate the accuracy of texts without labels: the average thresholded confidence of Garg et al. (2022).

    A threshold is chosen such that as many labelled texts lie below it as are wrong. The estimate is the fraction of
    the new texts at or above it. It can be wrong by any amount where confidence means something else on the new texts,
    as with texts of a new kind that are answered confidently.

    Parameters
    ----------
    confidence : array-like of float, shape (n,)
    correct : array-like of bool, shape (n,)
    new_confidence : array-like of float, shape (m,)

    Examples
    --------
    >>> threshold_accuracy([0.2, 0.4, 0.6, 0.8], [False, False, True, True], [0.5, 0.55, 0.7, 0.9])
    0.5
    """
    confidence, correct, new = (np.asarray(values) for values in (confidence, correct, new_confidence))
    if not len(confidence) or not len(new):
        return np.nan
    n_wrong = int((~correct.astype(bool)).sum())
    threshold = np.inf if n_wrong == len(confidence) else np.partition(confidence, n_wrong)[n_wrong]
    return float((new >= threshold).mean())


class Labelled(NamedTuple):
    """A labelled sample, for `estimate_shift`.

    Attributes
    ----------
    evidence : ndarray of float64, shape (n, n_scores)
        Scores that tell texts out of scope from others.
    rejected : ndarray of bool, shape (n,)
    stage : ndarray of int, shape (n,)
        The stage that gave the answer.
    confidence : ndarray of float64, shape (n,)
        In the answer. Compared with that of answers of the same stage only.
    out_of_scope, correct : ndarray of bool, shape (n,)
    """

    evidence: np.ndarray
    rejected: np.ndarray
    stage: np.ndarray
    confidence: np.ndarray
    out_of_scope: np.ndarray
    correct: np.ndarray


class Unlabelled(NamedTuple):
    """A sample without labels: the first four fields of `Labelled`."""

    evidence: np.ndarray
    rejected: np.ndarray
    stage: np.ndarray
    confidence: np.ndarray


ESTIMATES = {
    "prevalence_em": "the scores' likelihood (EM, Saerens et al. 2002)",
    "prevalence_black_box": "the reject rate (black-box shift estimation, Lipton et al. 2018)",
    "accuracy_reweighted": "the labelled texts, at prevalence_em",
    "accuracy_atc": "the confidences, stage by stage (ATC, Garg et al. 2022)",
}
"""The rows of `estimate_shift`, and what each is estimated from."""


def estimate_shift(
    labelled: Labelled,
    unlabelled: Unlabelled,
    *,
    n_resamples: int = N_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate the prevalence and the accuracy of texts without labels, in two ways each.

    Variances are from the bootstrap of both samples; the regression that turns the evidence into probabilities is
    fitted again on each resample. Intervals are Wilson's of fractions with these variances
    (`bootstrap.wilson_of_variance`); that of `prevalence_black_box` is `black_box_interval`.

    Texts out of scope are often answered with another confidence than texts in scope, so `accuracy_atc` is right only
    if the share out of scope is the same. If it was 10% and is 30%, an interval of 95% contained the accuracy in 75% of
    simulations. So `accuracy_atc` has an interval only where `then` lies in the interval of the prevalence.

    Simulated coverage at 0.95 of each interval that is given, with 300 or 1,000 labelled texts, 10% out of scope, and
    300 or 1,500 texts of which 2% to 30% are: 0.93 to 0.97.

    Returns
    -------
    DataFrame
        One row per name in `ESTIMATES`: `then`, of the labelled sample; `now`, the estimate; `low` and `high`. NaN
        where too little is known: `estimate_notes` says why.
    """
    rng = np.random.default_rng(seed)
    n, m = len(labelled.correct), len(unlabelled.rejected)
    now = _estimates(labelled, unlabelled)
    if min(n, m) < N_LEAST:
        now = [np.nan] * len(ESTIMATES)
    elif not _has_both_kinds(labelled):
        now[:3] = [np.nan] * 3
    resampled = np.array(
        [
            _estimates(
                Labelled(*(values[rows] for values in labelled)), Unlabelled(*(values[new] for values in unlabelled))
            )
            for rows, new in ((rng.integers(n, size=n), rng.integers(m, size=m)) for _ in range(n_resamples))
        ]
    )
    then = [*[float(labelled.out_of_scope.mean())] * 2, *[float(labelled.correct.mean())] * 2]
    rows = []
    for name, value, column in zip(ESTIMATES, now, resampled.T, strict=True):
        column = column[~np.isnan(column)]
        if np.isnan(value) or len(column) < 2:
            low, high = np.nan, np.nan
        elif name == "prevalence_black_box":
            low, high = black_box_interval(labelled, unlabelled.rejected, level=level)
        else:
            size = m - _n_unseen(labelled, unlabelled) if name == "accuracy_atc" else m
            low, high = wilson_of_variance(value, float(column.var(ddof=1)), n_constant=size, level=level)
        rows.append((value, low, high))
    table = pd.DataFrame({"then": then, **dict(zip(("now", "low", "high"), np.array(rows).T, strict=True))})
    table = table.set_index(pd.Index(ESTIMATES, name="estimate"))
    if atc_note(table):
        table.loc["accuracy_atc", ["low", "high"]] = np.nan
    return table


def atc_note(estimates: pd.DataFrame) -> str:
    """Return why `accuracy_atc` of `estimate_shift` has no interval, as a sentence; empty if it has one."""
    known = estimates.loc[["prevalence_em", "prevalence_black_box"]].dropna()
    start = "The accuracy by confidence has no interval: "
    if np.isnan(estimates.loc["accuracy_atc", "now"]):
        return ""
    if not len(known):
        return f"{start}whether the share out of scope has changed is not known."
    if known["low"].iloc[0] <= known["then"].iloc[0] <= known["high"].iloc[0]:
        return ""
    return f"{start}the share out of scope has changed, and confidence can mean something else now."


def black_box_interval(labelled: Labelled, rejected: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the interval of `black_box_prevalence`, by the delta method, cut off at 0 and 1.

    Half a text of each kind is added to the counts of the variances, so that none is 0. Where the interval is cut off,
    it is at least as wide as Wilson's would be if the labels were known.

    Parameters
    ----------
    labelled : Labelled
    rejected : ndarray of bool, shape (m,)
        Of the texts without labels.
    level : float
    """
    out = labelled.out_of_scope
    samples = (rejected, labelled.rejected[out], labelled.rejected[~out])
    rate, recall, false_rate = (float(sample.mean()) for sample in samples)
    if not recall > false_rate:
        return np.nan, np.nan
    value = (rate - false_rate) / (recall - false_rate)
    inside = min(max(value, 0.0), 1.0)
    smoothed = [(sample.sum() + 0.5) / (len(sample) + 1) for sample in samples]
    variances = [p * (1 - p) / len(sample) for p, sample in zip(smoothed, samples, strict=True)]
    variance = float(np.dot([1, inside**2, (1 - inside) ** 2], variances))
    half = norm.ppf((1 + level) / 2) * np.sqrt(variance) / (recall - false_rate)
    if_labelled = wilson(inside * len(rejected), len(rejected), level=level)
    low, high = min(value - half, if_labelled.low), max(value + half, if_labelled.high)
    return max(low, 0.0), min(high, 1.0)


def estimate_notes(labelled: Labelled, unlabelled: Unlabelled) -> list[str]:
    """Return sentences: why `estimate_shift` leaves estimates undefined, and which texts it leaves out.

    Why `accuracy_atc` has no interval is `atc_note`.
    """
    y, n, m = labelled.out_of_scope, len(labelled.correct), len(unlabelled.rejected)
    if min(n, m) < N_LEAST:
        return [
            f"Prevalence and accuracy are not estimated: at least {N_LEAST} labelled texts and {N_LEAST} texts of the "
            f"traffic are needed; there are {n:,} and {m:,}."
        ]
    notes = []
    if not _has_both_kinds(labelled):
        notes.append(
            f"Prevalence is not estimated: at least {N_LEAST_OF_KIND} labelled texts in scope and {N_LEAST_OF_KIND} "
            f"out of scope are needed; there are {n - y.sum():,} and {y.sum():,}."
        )
    elif np.isnan(_estimates(labelled, unlabelled)[0]):
        notes.append("Prevalence is not estimated from the scores: they do not tell texts out of scope from others.")
    n_unseen = _n_unseen(labelled, unlabelled)
    if n_unseen:
        notes.append(
            f"The accuracy by confidence leaves out {n_unseen:,} of {m:,} texts: no labelled text was decided by the "
            "same stage."
        )
    return notes


def fits_prevalence_shift(
    labelled: Labelled, unlabelled: Unlabelled, *, n_resamples: int = 499, seed: int = 0
) -> float:
    """Test whether another prevalence alone can explain the scores of the texts without labels.

    The statistic is the largest distance between the distribution of the score (the log-odds of being out of scope) in
    the unlabelled texts and its nearest mixture of the labelled texts in scope and out of scope. Its distribution is
    simulated: all three samples are drawn again from the labelled texts, mixed at the estimated prevalence.

    Returns
    -------
    float
        The p-value. A small one means: texts in scope, or out of scope, look different now, so the estimates above do
        not hold. NaN where `estimate_shift` gives no `prevalence_em`.
    """
    y = labelled.out_of_scope
    if min(len(y), len(unlabelled.rejected)) < N_LEAST or not _has_both_kinds(labelled):
        return np.nan
    rng = np.random.default_rng(seed)
    weights, bias = _fit(labelled.evidence, y)
    then, now = labelled.evidence @ weights + bias, unlabelled.evidence @ weights + bias
    edges = np.unique(np.quantile(np.concatenate([then, now]), np.linspace(0, 1, N_BINS + 1)[1:-1]))
    n_bins = len(edges) + 1
    inside, out, new = (
        np.bincount(np.searchsorted(edges, values), minlength=n_bins) for values in (then[~y], then[y], now)
    )
    sums = np.bincount(np.searchsorted(edges, then), weights=then, minlength=n_bins)
    sums += np.bincount(np.searchsorted(edges, now), weights=now, minlength=n_bins)
    posterior = expit(sums / np.maximum(inside + out + new, 1))
    prior = float(y.mean())

    def distance(new: np.ndarray, inside: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prevalence = shifted_prevalence(posterior, prior, new)
        parts = [np.cumsum(each, axis=-1) / each.sum(axis=-1, keepdims=True) for each in (new, inside, out)]
        mixture = parts[1] + prevalence[..., None] * (parts[2] - parts[1])
        return np.abs(parts[0] - mixture).max(axis=-1), prevalence

    observed, prevalence = distance(new, inside, out)
    if np.isnan(prevalence):
        return np.nan
    shares = [each / each.sum() for each in (inside, out)]
    mixed = (1 - prevalence) * shares[0] + prevalence * shares[1]
    drawn = [
        rng.multinomial(each.sum(), share, size=n_resamples)
        for each, share in ((new, mixed), (inside, shares[0]), (out, shares[1]))
    ]
    return float((1 + (distance(*drawn)[0] >= observed).sum()) / (n_resamples + 1))


def _estimates(labelled: Labelled, unlabelled: Unlabelled) -> list[float]:
    y, correct = labelled.out_of_scope, labelled.correct
    stages, counts = np.unique(unlabelled.stage[np.isin(unlabelled.stage, labelled.stage)], return_counts=True)
    n_right = 0.0
    for stage, count in zip(stages, counts, strict=True):
        then, now = labelled.stage == stage, unlabelled.stage == stage
        n_right += count * threshold_accuracy(labelled.confidence[then], correct[then], unlabelled.confidence[now])
    atc = n_right / counts.sum() if len(counts) else np.nan
    if not 0 < y.sum() < len(y):
        return [np.nan, np.nan, np.nan, atc]
    weights, bias = _fit(labelled.evidence, y)
    em = float(shifted_prevalence(expit(unlabelled.evidence @ weights + bias), float(y.mean())))
    rates = unlabelled.rejected.mean(), labelled.rejected[y].mean(), labelled.rejected[~y].mean()
    return [em, float(black_box_prevalence(*rates)), float((1 - em) * correct[~y].mean() + em * correct[y].mean()), atc]


def _has_both_kinds(labelled: Labelled) -> bool:
    n_out = int(labelled.out_of_scope.sum())
    return min(n_out, len(labelled.out_of_scope) - n_out) >= N_LEAST_OF_KIND


def _n_unseen(labelled: Labelled, unlabelled: Unlabelled) -> int:
    """Return the number of texts that were decided by a stage that decided no labelled text."""
    return int((~np.isin(unlabelled.stage, labelled.stage)).sum())


def _fit(evidence: np.ndarray, out_of_scope: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights and the bias of a logistic regression, by Newton's method.

    The evidence is standardized, and the penalty is half of the sum of the squared weights: scikit-learn's default.
    """
    mean, scale = evidence.mean(axis=0), evidence.std(axis=0)
    is_constant = scale <= ROUNDING * np.maximum(np.abs(mean), ROUNDING)  # the mean of equal numbers is rounded too
    scale[is_constant] = 1.0
    x = np.column_stack([np.where(is_constant, 0.0, (evidence - mean) / scale), np.ones(len(evidence))])
    penalty = np.append(np.ones(evidence.shape[1]), 1e-9)
    fitted = np.zeros(x.shape[1])
    for _ in range(50):
        p = expit(x @ fitted)
        gradient = x.T @ (p - out_of_scope) + penalty * fitted
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty), gradient)
        fitted -= step * min(1.0, 4.0 / np.abs(step).max(initial=1e-12))
        if np.abs(step).max() < 1e-9:
            break
    weights = fitted[:-1] / scale
    return weights, float(fitted[-1] - weights @ mean)
