"""Intervals against their formulas and independent implementations; what they cover is in `test_interval_coverage`."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, poisson

from cascade_lab.analysis.bootstrap import (
    bootstrap,
    difference_interval,
    effective_n,
    effective_shares,
    fraction_interval,
    interval,
    mean_difference_interval,
    resample_blocks,
    resample_codes,
    resample_counts,
    resamples,
    score_interval,
    wilson,
)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilsons_interval_is_that_of_scipy_but_for_the_near_end_of_few_hits(level):
    for n in (20, 250):
        for n_hits in range(n + 1):
            low, high = binomtest(n_hits, n).proportion_ci(level, method="wilson")
            found = wilson(n_hits, n, level=level)
            if n_hits > 3:
                assert found.low == pytest.approx(low)
            if n - n_hits > 3:
                assert found.high == pytest.approx(high)
    assert np.isnan(wilson(0, 0)).all()
    # Brown, Cai and DasGupta: the low end of 2 hits is the Poisson mean at which 2 or more have probability 0.05.
    assert poisson.sf(1, wilson(2, 1000).low * 1000) == pytest.approx(0.05)
    assert wilson(998, 1000).high == pytest.approx(1 - wilson(2, 1000).low)


def test_repeated_texts_are_counted_once():
    """Each of 40 texts occurs five times: the interval is that of the 40 texts."""
    right = np.random.default_rng(0).random(40) < 0.8
    groups = np.repeat(np.arange(40), 5)
    everything = np.ones(200, dtype=bool)
    assert fraction_interval(right.repeat(5), everything, groups=groups) == pytest.approx(wilson(right.sum(), 40))
    assert effective_n(np.ones(200), groups) == effective_n(right.repeat(5), groups) == pytest.approx(40)
    differences = np.random.default_rng(1).integers(-1, 2, 40)
    single = mean_difference_interval(differences)
    assert mean_difference_interval(differences.repeat(5), groups=groups) == pytest.approx(single)
    shares = effective_shares(np.repeat([0, 1], [100, 100]), 3, groups)
    assert shares.tolist() == pytest.approx([0.2, 0.2, 1])


def test_the_effective_number_follows_how_alike_a_group_is():
    """Groups of two: values that are equal, independent, and opposite to each other."""
    rng = np.random.default_rng(2)
    groups, values = np.repeat(np.arange(5000), 2), rng.random(10_000)
    assert effective_n(values[::2].repeat(2), groups) == pytest.approx(5000)
    assert effective_n(values, groups) == pytest.approx(10_000, rel=0.05)
    assert effective_n(np.tile([0.0, 1.0], 5000), groups) == 10_000


def test_a_score_interval_of_a_fraction_is_wilsons():
    right = np.random.default_rng(3).random(400) < 0.7
    resampled = resample_codes(right.astype(int), 2, n_resamples=20_000)[1:, 1] / 400
    found = score_interval(right.mean(), resampled, n=400)
    assert found == pytest.approx(wilson(right.sum(), 400), abs=0.002)
    # Where nothing varies, the number of texts decides; between other bounds, all is scaled.
    assert score_interval(1.0, np.ones(100), n=20) == pytest.approx(wilson(20, 20))
    wide = score_interval(200 * right.mean() - 100, 200 * resampled - 100, n=400, bounds=(-100, 100))
    assert wide == pytest.approx([200 * end - 100 for end in found])
    for nothing in (score_interval(0.5, np.full(9, np.nan), n=20), score_interval(0.5, np.ones(9), n=0)):
        assert np.isnan(nothing[1:]).all()


def test_differences_have_the_intervals_of_their_formulas():
    """Bonett and Price: 12 wins, 3 losses of 100 texts. Zou and Donner: uncorrelated sides are Newcombe's method 10."""
    found = mean_difference_interval(np.repeat([1, -1, 0], [12, 3, 85]))
    p_win, p_loss = 13 / 102, 4 / 102
    half = 1.959964 * np.sqrt((p_win + p_loss - (p_win - p_loss) ** 2) / 102)
    assert found == pytest.approx((0.09, p_win - p_loss - half, p_win - p_loss + half))
    a, b = wilson(48, 80), wilson(56, 70)
    expected = (0.2, 0.0524, 0.3339)  # Newcombe 1998, 56/70 and 48/80, his table II
    assert difference_interval(a, b, 0.0) == pytest.approx(expected, abs=5e-5)


def test_undefined_resamples_are_left_out():
    assert interval(0.5, np.array([0.1, np.nan, 0.9]), level=1.0) == (0.5, 0.1, 0.9)
    assert np.isnan(interval(np.nan, np.array([0.1]))).all()
    assert np.isnan(interval(0.5, np.array([np.nan]))[1:]).all()


def test_resamples_have_the_size_of_the_set_and_depend_on_the_seed_alone():
    counts = resample_counts(20, n_resamples=5, seed=3)
    assert (counts.sum(axis=1) == 20).all()
    np.testing.assert_array_equal(counts, resample_counts(20, n_resamples=5, seed=3))
    codes = np.repeat([0, 2], [7, 13])
    drawn = resample_codes(codes, 3, n_resamples=50, seed=3)
    assert drawn[0].tolist() == [7, 0, 13]
    assert (drawn.sum(axis=1) == 20).all()
    assert (drawn[:, 1] == 0).all()


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 3, 4, 5, 5, 5, 9, 1, 2])])
def test_resamples_one_by_one_are_those_of_the_table(groups):
    table = resample_counts(10, groups=groups, n_resamples=8, seed=2)
    kinds = np.array([0, 1, 1, 0, 2, 2, 0, 0, 3, 3])
    options = {"groups": groups, "n_resamples": 8, "seed": 2}
    np.testing.assert_array_equal(list(resamples(10, **options)), table)
    np.testing.assert_array_equal(np.concatenate(list(resample_blocks(10, **options))), table)
    np.testing.assert_array_equal(list(resamples(10, kinds=kinds, **options)), table @ np.eye(4, dtype=int)[kinds])


def test_groups_are_drawn_as_a_whole():
    """Codes that are drawn by group have the distribution of the texts that are."""
    rng = np.random.default_rng(4)
    groups, codes = rng.integers(0, 60, 200), rng.integers(0, 4, 200)
    counts = resample_counts(200, groups=groups, n_resamples=4000)
    for group in (0, 30):
        assert (counts[:, groups == group][:, 0] == counts[:, groups == group].T).all()
    of_codes = resample_codes(codes, 4, groups=groups, n_resamples=4000)
    assert of_codes[0].tolist() == np.bincount(codes).tolist()
    expected = counts @ np.eye(4)[codes]
    np.testing.assert_allclose(of_codes[1:].mean(axis=0), expected.mean(axis=0), atol=0.5)
    np.testing.assert_allclose(np.cov(of_codes[1:].T), np.cov(expected.T), rtol=0.15, atol=4)
    assert bootstrap(lambda w: w.sum(), 200, groups=groups, n_resamples=50).value == 200


def test_strata_keep_their_sizes():
    """Codes 0 and 1 are one stratum, 2 and 3 another; of texts that belong together, the groups are counted."""
    codes, strata = np.array([0] * 5 + [1] * 7 + [2] * 4 + [3] * 4), np.array([0, 0, 1, 1])
    once = resample_codes(codes, 4, strata=strata, n_resamples=200)
    assert (once[:, :2].sum(axis=1) == 12).all()
    assert (once[:, 2:].sum(axis=1) == 8).all()
    assert once[:, 0].std() == pytest.approx(np.sqrt(12 * 5 / 12 * 7 / 12), rel=0.2)
    three = resample_codes(codes.repeat(3), 4, strata=strata, groups=np.arange(20).repeat(3), n_resamples=200)
    assert (three[:, :2].sum(axis=1) == 36).all()
    assert (three[1:] % 3 == 0).all()
