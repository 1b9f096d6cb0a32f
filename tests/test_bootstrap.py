"""Intervals: against their formulas, scikit-learn on drawn texts, and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from cascade_lab.analysis.bootstrap import (
    bootstrap,
    fraction_interval,
    interval,
    ranking_metrics,
    resample_counts,
    wilson,
    with_resamples,
)


def test_wilsons_interval_is_its_formula_and_undefined_of_nothing():
    z = norm.ppf(0.95)
    p, n = 7 / 20, 20
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(7, 20, level=0.9) == pytest.approx((p, middle - half, middle + half))
    assert np.isnan(wilson(0, 0)).all()


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


def test_a_fraction_has_the_interval_of_the_bootstrap_over_texts():
    rng = np.random.default_rng(1)
    hits, of = rng.random(300) < 0.4, rng.random(300) < 0.6

    def fraction(weights):
        return weights[hits & of].sum() / weights[of].sum()

    short, long = fraction_interval(hits, of, n_resamples=4000), bootstrap(fraction, 300, n_resamples=4000)
    assert short == pytest.approx(long, abs=0.01)
    assert np.isnan(fraction_interval(hits, np.zeros(300, dtype=bool))).all()


def test_undefined_resamples_are_left_out():
    assert interval(0.5, np.array([0.1, np.nan, 0.9]), level=1.0) == (0.5, 0.1, 0.9)
    assert np.isnan(interval(np.nan, np.array([0.1]))).all()
    assert np.isnan(interval(0.5, np.array([np.nan]))[1:]).all()


def test_resamples_have_the_size_of_the_set_and_depend_on_the_seed_alone():
    counts = resample_counts(20, n_resamples=5, seed=3)
    assert (counts.sum(axis=1) == 20).all()
    np.testing.assert_array_equal(counts, resample_counts(20, n_resamples=5, seed=3))
    groups = with_resamples(np.array([7, 0, 13]), n_resamples=50, seed=3)
    assert groups[0].tolist() == [7, 0, 13]
    assert (groups.sum(axis=1) == 20).all()
    assert (groups[:, 1] == 0).all()
