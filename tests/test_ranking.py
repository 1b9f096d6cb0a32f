"""AUROC and average precision: against scikit-learn, and their intervals against published ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import average_precision_score, roc_auc_score

from cascade_lab.analysis.bootstrap import resample_counts, wilson_of_variance
from cascade_lab.analysis.ranking import (
    auroc_interval,
    average_precision_interval,
    ranking_intervals,
    ranking_metrics,
)


def test_ranking_metrics_of_resamples_are_those_of_scikit_learn_on_the_drawn_texts():
    rng = np.random.default_rng(0)
    positive, score = rng.random(60) < 0.5, rng.integers(0, 9, 60) / 8  # with ties
    drawn = rng.integers(0, 60, (40, 60))
    weights = np.array([np.bincount(texts, minlength=60) for texts in drawn])
    auroc, average_precision = ranking_metrics(positive, score, weights=weights)
    for i, texts in enumerate(drawn):
        assert auroc[i] == pytest.approx(roc_auc_score(positive[texts], score[texts]))
        assert average_precision[i] == pytest.approx(average_precision_score(positive[texts], score[texts]))
    for all_of_a_kind in (np.ones(3, dtype=bool), np.zeros(3, dtype=bool), np.ones(0, dtype=bool)):
        n = len(all_of_a_kind)
        assert np.isnan(ranking_metrics(all_of_a_kind, np.arange(n) / 3, weights=np.ones((1, n)))).all()


def normal_variance(area, m, n, spread):
    """Of the area of `m` and `n` normal scores, by scipy's bivariate normal distribution; the first vary more."""
    shared = spread**2 / (1 + spread**2)
    two_of_second, two_of_first = (
        multivariate_normal.cdf([norm.ppf(area)] * 2, cov=[[1, part], [part, 1]]) - area**2
        for part in (shared, 1 - shared)
    )
    return (area * (1 - area) + (n - 1) * two_of_second + (m - 1) * two_of_first) / (m * n)


def likely_spread(area, first, second):
    """Return the spread of `first` that is the most likely one if the area is `area`, by their places in `second`."""
    places = np.searchsorted(np.sort(second), first)
    low, high = (norm.ppf((places + step) / (len(second) + 1)) for step in (0, 1))

    def cost(log_spread):
        spread = np.exp(log_spread)
        at = {"loc": norm.ppf(area) * np.sqrt(1 + spread**2), "scale": spread}
        return -np.log(norm.cdf(high, **at) - norm.cdf(low, **at)).sum()

    return np.exp(minimize_scalar(cost, bounds=(-np.log(6), np.log(6)), method="bounded").x)


@pytest.mark.parametrize(("m", "n", "spread"), [(10, 30, 2.0), (10, 30, 0.5), (25, 8, 1.0)])
def test_the_interval_of_auroc_contains_the_areas_that_its_equation_allows(m, n, spread):
    """DeLong's variance is from the matrix of all pairs. It counts less if one kind has few texts."""
    rng = np.random.default_rng(m + n)
    positive, score = np.arange(m + n) < m, rng.normal(size=m + n)
    score[positive] = 1.5 + spread * score[positive]
    found = auroc_interval(positive, score)
    pairs = (score[positive][:, None] > score[~positive]).astype(float)
    area, least = pairs.mean(), min(m, n)
    assert found.value == pytest.approx(area)
    sides = (score[positive], score[~positive]) if m <= n else (-score[~positive], -score[positive])

    def variance(theta):
        return normal_variance(theta, least, max(m, n), likely_spread(theta, *sides))

    observed = (pairs.mean(axis=1).var() / m + pairs.mean(axis=0).var() / n) * least / (least - 1)
    ratio = 1 + (observed / variance(area) - 1) * (least - 1) / (least - 1 + 20)
    for end in (found.low, found.high):
        assert (end - area) ** 2 == pytest.approx(3.8415 * ratio * variance(end), rel=0.02)
    exchanged = auroc_interval(~positive, -score)
    assert exchanged == pytest.approx(found)


def test_the_interval_of_a_perfect_area_allows_for_the_widest_spread():
    found = auroc_interval(np.arange(20) >= 10, np.arange(20.0))
    assert found.value == found.high == 1
    assert (1 - found.low) ** 2 == pytest.approx(3.8415 * normal_variance(found.low, 10, 10, 6.0), rel=0.02)


@pytest.mark.parametrize("n_values", [6, 1000])
def test_the_interval_of_average_precision_has_the_variance_of_redrawn_texts(n_values):
    rng = np.random.default_rng(3)
    positive = np.arange(300) < 40
    score = np.floor((rng.normal(size=300) + 1.5 * positive) * n_values / 6)
    found = average_precision_interval(positive, score)
    assert found.value == pytest.approx(average_precision_score(positive, score))
    _, redrawn = ranking_metrics(positive, score, weights=resample_counts(300, n_resamples=4000))
    above = [[(score >= at).sum(), (positive & (score >= at)).sum()] for at in score[positive]]
    middle = np.mean([(n_positive - 0.5) / (n_all - 0.5) for n_all, n_positive in above])
    ends = wilson_of_variance(middle, redrawn.var(), n_constant=40, n_most=120, degrees=39)
    assert (found.low, found.high) == pytest.approx(ends, abs=0.01)


def test_repeated_texts_do_not_narrow_an_interval():
    rng = np.random.default_rng(5)
    positive, score, groups = np.arange(60) < 15, rng.normal(size=60) + (np.arange(60) < 15), np.arange(60)
    single = ranking_intervals(positive, score)
    five = ranking_intervals(positive.repeat(5), score.repeat(5), groups=groups.repeat(5))
    assert five["auroc"] == pytest.approx(single["auroc"], abs=0.01)
    assert five["average_precision"] == pytest.approx(single["average_precision"], abs=1e-9)


def test_many_texts_are_fast_and_do_not_change_the_interval():
    """Beyond 1,000 places, neighbouring ones are taken together."""
    rng = np.random.default_rng(6)
    positive = np.arange(20_000) < 1_000
    found = auroc_interval(positive, rng.normal(size=20_000) + 2 * positive)
    half = 1.96 * np.sqrt(normal_variance(found.value, 1_000, 19_000, 1.0))
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.1)


def test_one_kind_has_no_area_and_one_text_no_interval():
    score = np.arange(10) / 10
    assert np.isnan(auroc_interval(np.ones(10, dtype=bool), score)).all()
    found = ranking_intervals(np.arange(10) == 9, score)
    assert found["auroc"].value == found["average_precision"].value == 1
    assert np.isnan([end for metric in found.values() for end in metric[1:]]).all()
