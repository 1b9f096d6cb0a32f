"""AUROC and average precision: against scikit-learn, and their intervals against published ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import average_precision_score, roc_auc_score

from cascade_lab.analysis.ranking import auroc_interval, ranking_intervals, ranking_metrics


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


def normal_variance(area, m, n):
    """Of the area of two normal distributions, with the probability of two right pairs from scipy's bivariate one."""
    both = multivariate_normal.cdf([norm.ppf(area)] * 2, cov=[[1, 0.5], [0.5, 1]])
    return (area * (1 - area) + (m + n - 2) * (both - area**2)) / (m * n)


@pytest.mark.parametrize(("m", "n", "spread"), [(10, 30, 2.0), (10, 30, 0.5), (25, 8, 1.0)])
def test_the_interval_of_auroc_contains_the_areas_that_its_equation_allows(m, n, spread):
    """DeLong's variance is from the matrix of all pairs; it is above the normal one, or partly believed below it."""
    rng = np.random.default_rng(m + n)
    positive, score = np.arange(m + n) < m, rng.normal(size=m + n)
    score[positive] = 1.5 + spread * score[positive]
    found = auroc_interval(positive, score)
    pairs = (score[positive][:, None] > score[~positive]).astype(float)
    area = pairs.mean()
    assert found.value == pytest.approx(area)
    least = min(m, n)
    observed = pairs.mean(axis=1).var() / m + pairs.mean(axis=0).var() / n
    ratio = observed * least / (least - 1) / normal_variance(area, m, n)
    ratio = ratio if ratio > 1 else 1 - (1 - ratio) * (least - 1) / (least - 1 + 40)
    for end in (found.low, found.high):
        assert (end - area) ** 2 == pytest.approx(3.8415 * ratio * normal_variance(end, m, n), rel=1e-3)


def test_the_interval_of_a_perfect_area_is_that_of_normal_scores():
    found = auroc_interval(np.arange(20) >= 10, np.arange(20.0))
    assert found.value == found.high == 1
    assert (1 - found.low) ** 2 == pytest.approx(3.8415 * normal_variance(found.low, 10, 10), rel=1e-3)


def test_repeated_texts_do_not_narrow_an_interval():
    rng = np.random.default_rng(5)
    positive, score, groups = np.arange(60) < 15, rng.normal(size=60) + (np.arange(60) < 15), np.arange(60)
    single = ranking_intervals(positive, score, n_resamples=500)
    five = ranking_intervals(positive.repeat(5), score.repeat(5), groups=groups.repeat(5), n_resamples=500)
    assert five["auroc"] == pytest.approx(single["auroc"], abs=0.01)
    assert five["average_precision"] == pytest.approx(single["average_precision"], abs=0.03)


def test_one_kind_has_no_area_and_one_text_no_interval():
    score = np.arange(10) / 10
    assert np.isnan(auroc_interval(np.ones(10, dtype=bool), score)).all()
    found = ranking_intervals(np.arange(10) == 9, score, n_resamples=20)
    assert found["auroc"].value == found["average_precision"].value == 1
    assert np.isnan([end for metric in found.values() for end in metric[1:]]).all()
