"""Intervals of measured times: against the binomial distribution, by hand, and by simulation."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.stats import norm

from cascade_lab.analysis.latency_intervals import n_for_quantile, quantile_interval, ratio_interval


def probability_between(n, low, high, fraction):
    """Of at least `low` and at most `high` - 1 of `n` values below a quantile, counted out."""
    return sum(comb(n, k) * fraction**k * (1 - fraction) ** (n - k) for k in range(low, high))


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [1, 5, 6, 58, 59, 60, 75, 298, 299, 640])
def test_the_interval_of_a_quantile_is_the_one_that_the_binomial_distribution_gives(n, fraction):
    value, low, high = quantile_interval(np.random.default_rng(n).permutation(np.arange(1, n + 1)), fraction)
    assert value == np.quantile(np.arange(1, n + 1), fraction, method="inverted_cdf")
    if np.isnan(low):
        assert np.isnan(high)
        assert probability_between(n, 1, n, fraction) < 0.95, "not even the extremes enclose it often enough"
        return
    assert low <= value <= high
    assert probability_between(n, int(low), int(high), fraction) >= 0.95
    assert probability_between(n, int(low) + 1, int(high), fraction) < 0.95, "the lower limit could be higher"
    assert probability_between(n, int(high), n + 1, fraction) <= 0.025 or high == n


def test_the_number_of_values_that_an_interval_needs():
    for fraction in (0.5, 0.8, 0.95, 0.99):
        n = n_for_quantile(fraction)
        for size, exists in ((n - 1, False), (n, True)):
            assert np.isfinite(quantile_interval(np.arange(size), fraction).low) == exists
    assert np.isnan(quantile_interval([], 0.5)).all()


def test_a_ratio_by_hand():
    """12 ms for 6 texts and 18 ms for 6 texts, ten times each: 2.5 ms per text.

    Without one batch of 12 ms the ratio is 288 / 114, without one of 18 ms 282 / 114.
    """
    part, whole = [12, 18] * 10, [6] * 20
    interval = ratio_interval(part, whole)
    assert interval.value == 2.5
    without = np.log([288 / 114, 282 / 114] * 10)
    jackknife = np.sqrt(19 / 20 * ((without - without.mean()) ** 2).sum())
    factor = np.exp(2.0930 * jackknife)
    assert interval.low == pytest.approx(2.5 / factor, rel=1e-4)
    assert interval.high == pytest.approx(2.5 * factor, rel=1e-4)
    inverse = ratio_interval(whole, part)
    assert [inverse.low, inverse.high] == pytest.approx([1 / interval.high, 1 / interval.low])
    assert np.isnan(ratio_interval(part[:14], whole[:14])).tolist() == [False, True, True]
    assert not np.isnan(ratio_interval(part[:15], whole[:15])).any()
    assert np.isnan(ratio_interval([0] * 20, whole)).tolist() == [False, True, True]
    assert np.isnan(ratio_interval([5] + [0] * 19, whole)).tolist() == [False, True, True]
    assert np.isnan(ratio_interval([], [])).all()


SHORT_AND_LONG = [pytest.param(400, 0.025, id="short"), pytest.param(8000, 0.01, id="long", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("n_studies", "within"), SHORT_AND_LONG)
@pytest.mark.parametrize("n", [6, 21, 75, 320])
def test_intervals_of_quantiles_cover_at_their_level(n, n_studies, within):
    """Studies of `n` batches with log-normal times."""
    rng, hits = np.random.default_rng(n), {0.5: [], 0.95: [], 0.99: []}
    for seconds in rng.lognormal(0, 0.6, (n_studies, n)):
        for fraction, of_fraction in hits.items():
            _, low, high = quantile_interval(seconds, fraction)
            of_fraction.append(np.nan if np.isnan(low) else low <= np.exp(0.6 * norm.ppf(fraction)) <= high)
    for fraction, of_fraction in hits.items():
        if n < n_for_quantile(fraction):
            assert np.isnan(of_fraction).all()
        else:
            # Exact intervals are conservative: a limit can only be one of the values.
            assert 0.95 - within <= np.mean(of_fraction) <= 0.98 + within, fraction


def ratio_coverage(n, deviation, n_studies, *, slow_fraction=0.0):
    """Return how often the interval contains 5.5 / 4.5: batches of 1 to 8 texts, times that grow with them.

    The times vary by a log-normal factor; a fraction of the batches takes ten times as long.
    """
    rng, n_covered = np.random.default_rng(n), 0
    for _ in range(n_studies):
        texts = rng.integers(1, 9, n)
        noise = rng.lognormal(-(deviation**2) / 2, deviation, n)
        noise *= np.where(rng.random(n) < slow_fraction, 10, 1) / (1 + 9 * slow_fraction)
        interval = ratio_interval((1 + texts) * noise, texts)
        n_covered += interval.low <= 5.5 / 4.5 <= interval.high
    return n_covered / n_studies


@pytest.mark.parametrize(("n_studies", "within"), SHORT_AND_LONG)
@pytest.mark.parametrize("n", [15, 21, 75])
def test_intervals_of_a_ratio_cover_at_their_level(n, n_studies, within):
    assert 0.945 - within <= ratio_coverage(n, 0.3, n_studies) <= 0.955 + within


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "deviation", "slow_fraction", "measured"),
    [
        *((15, 0.6, 0, 0.93), (30, 0.6, 0, 0.935), (75, 0.6, 0, 0.94), (15, 1.0, 0, 0.90), (75, 1.0, 0, 0.92)),
        *((15, 0.1, 0.05, 0.53), (30, 0.1, 0.05, 0.75), (200, 0.1, 0.05, 0.93)),
    ],
)
def test_too_few_batches_do_not_show_the_slowest_ones(n, deviation, slow_fraction, measured):
    """What the docstring says of times that vary a lot: no method covers 0.95 here; 8,000 studies."""
    assert ratio_coverage(n, deviation, 8000, slow_fraction=slow_fraction) == pytest.approx(measured, abs=0.015)
