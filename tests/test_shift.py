"""Comparing two samples: against scipy, enumeration, and simulation of samples that do not differ."""

from __future__ import annotations

from itertools import combinations

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


@pytest.mark.parametrize(("n", "m", "smallest"), [(1, 1, 1), (1, 3, 1 / 2), (2, 2, 1 / 3), (3, 3, 1 / 10)])
def test_small_samples_that_do_not_overlap_have_the_exact_p_value(n, m, smallest):
    """All n ranks are the lowest or the highest: 2 of the choices of n out of n + m, which is 1 and not 2 for 1 v 1."""
    then, now = np.arange(n) / 10, 1 + np.arange(m) / 10
    assert score_change(then, now).p_value == pytest.approx(smallest)
    assert score_change(now, then).p_value == pytest.approx(smallest)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 30), (2, 2), (3, 3), (5, 8)])
def test_small_samples_that_do_not_differ_are_rarely_significant(n, m):
    """Each choice of n out of n + m ranks is equally likely; 300 of them where there are more."""
    rng, ranks = np.random.default_rng(3), np.arange(n + m) / (n + m)
    choices = [list(chosen) for chosen in combinations(range(n + m), n)]
    shown = rng.permutation(len(choices))[:300]
    p_values = [score_change(ranks[choices[i]], np.delete(ranks, choices[i])).p_value for i in shown]
    assert np.mean(np.array(p_values) <= 0.05) <= (0.05 if len(choices) <= 300 else 0.09)


def test_ties_make_the_exact_p_value_too_large():
    rng = np.random.default_rng(4)
    p_values = [score_change(rng.integers(0, 3, 6), rng.integers(0, 3, 9)).p_value for _ in range(200)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05


def test_a_large_sample_with_a_small_one_is_compared_exactly_and_two_large_ones_without_a_warning():
    rng = np.random.default_rng(5)
    then, now = rng.normal(size=400), rng.normal(size=2)
    assert score_change(then, now).p_value == pytest.approx(ks_2samp(then, now, method="exact").pvalue)
    then, now = np.linspace(0, 1, 60), np.linspace(2, 3, 70)
    assert score_change(then, now).p_value < 1e-9


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
