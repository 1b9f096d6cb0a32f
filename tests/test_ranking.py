"""AUROC and average precision: against scikit-learn, and their intervals against published ones."""

from __future__ import annotations

import numpy as np
import pytest
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


def test_the_interval_of_auroc_is_newcombes_method_5():
    """Few texts of each kind, in the order that gives these areas; ends from solving his equation to four digits."""
    for area, m, n in ((0.9, 10, 10), (1.0, 10, 10), (0.75, 20, 10)):
        positive = np.repeat([True, False], [m, n])
        # One positive text is ranked below as many negative texts as the area needs, from the ideal order.
        score = np.append(np.arange(m) + n + 1.0, np.arange(1.0, n + 1))
        n_wrong, row = round((1 - area) * m * n), 0
        while n_wrong > 0:
            score[row] = n - min(n_wrong, n) + 0.5
            n_wrong, row = n_wrong - min(n_wrong, n), row + 1
        found = auroc_interval(positive, score)
        assert found.value == pytest.approx(area) == roc_auc_score(positive, score)
        for theta in (found.low, found.high):
            spread = (1 - theta) / (2 - theta) + theta / (1 + theta)
            variance = theta * (1 - theta) * (1 + ((m + n) / 2 - 1) * spread) / (m * n)
            assert theta == 1 or (theta - area) ** 2 >= 3.8415 * variance * 0.99  # wider where the texts say so


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
