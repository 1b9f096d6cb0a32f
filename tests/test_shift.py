"""Comparing two samples: against scipy, enumeration, and simulation of samples that do not differ."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency, entropy, fisher_exact, ks_2samp, ttest_ind

from cascade_lab.analysis.shift import fraction_change, label_change, label_changes, score_change, stability_index


def test_the_stability_index_is_the_symmetric_divergence():
    then, now = np.array([300, 500, 200]), np.array([3000, 4000, 3000])
    p, q = (then + 0.5) / (then + 0.5).sum(), (now + 0.5) / (now + 0.5).sum()
    assert stability_index(then, now) == pytest.approx(entropy(p, q) + entropy(q, p))
    assert stability_index([10, 0], [0, 10]) < np.inf


def test_fractions_are_compared_as_newcombe_published():
    """Newcombe (1998), Table II, example (a): 56/70 and 48/80; method 10 gives 0.0524 to 0.3339."""
    then, now = np.arange(80) < 48, np.arange(70) < 56
    change = fraction_change(then, now)
    assert (round(change.low, 4), round(change.high, 4)) == (0.0524, 0.3339)
    assert change.p_value == pytest.approx(fisher_exact([[48, 32], [56, 14]]).pvalue)


def test_scores_are_compared_like_scipy_does():
    rng = np.random.default_rng(0)
    then, now = rng.normal(size=300), rng.normal(0.2, 2, size=500)
    change = score_change(then, now)
    assert change.p_value == pytest.approx(ks_2samp(then, now, method="asymp").pvalue)
    welch = ttest_ind(now, then, equal_var=False).confidence_interval(0.95)
    assert (change.low, change.high) == pytest.approx((welch.low, welch.high), abs=0.002)


def test_labels_are_compared_by_chi_square():
    rng = np.random.default_rng(1)
    then, now = rng.choice(list("abc"), 400, p=[0.5, 0.3, 0.2]), rng.choice(list("abc"), 300, p=[0.42, 0.3, 0.28])
    change = label_change(then, now)
    counts = pd.crosstab(np.repeat([0, 1], [400, 300]), np.concatenate([then, now])).to_numpy()
    assert change.p_value == pytest.approx(chi2_contingency(counts).pvalue, abs=0.01)
    table = label_changes(then, now)
    assert table["difference"].abs().sum() / 2 == pytest.approx(change.difference)
    assert (table["p_holm"] >= table["p_value"]).all()


def test_rare_labels_raise_no_false_alarm():
    """150 labels and few texts, where the chi-square distribution itself does not hold."""
    rng, n_false = np.random.default_rng(2), 0
    shares = rng.dirichlet(np.full(150, 0.3))
    for seed in range(100):
        then, now = (rng.choice(150, n, p=shares).astype(str) for n in (80, 150))
        n_false += label_change(then, now, n_resamples=199, seed=seed).p_value <= 0.1
    assert 2 <= n_false <= 21  # 10 are expected; P(outside) < 0.001


def test_an_empty_sample_is_undefined():
    assert np.isnan(fraction_change([], [True]).p_value)
    assert np.isnan(score_change([0.1], []).difference)
    assert np.isnan(label_change([], ["a"]).p_value)
