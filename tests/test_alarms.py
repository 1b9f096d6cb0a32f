"""Alarms: the martingale by enumeration, false alarms and power by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta, binom, binomtest

from cascade_lab.analysis.alarms import log_evidence, upper_bound, watch

N_A_DAY = 1000


def rejects(out_of_scope: float) -> float:
    """Return the reject rate of a cascade that rejects 80% of the texts out of scope, and 3% of the others."""
    return 0.8 * out_of_scope + 0.03 * (1 - out_of_scope)


def test_the_upper_bound_is_that_of_scipy():
    for hits, n in ((0, 20), (3, 50), (49, 50), (50, 50)):
        test = binomtest(hits, n, alternative="less").proportion_ci(0.99, method="exact")
        assert upper_bound(hits, n, 0.01) == pytest.approx(test.high)


@pytest.mark.parametrize("bound", [0.02, 0.3, 0.9])
def test_the_evidence_is_a_mean_of_likelihood_ratios(bound):
    def ratio(q, hits, misses):
        return (q / bound) ** hits * ((1 - q) / (1 - bound)) ** misses * beta.pdf(q, 1, 1 / bound)

    for hits, misses in ((1, 0), (0, 5), (4, 7)):
        mean = quad(ratio, bound, 1, args=(hits, misses))[0] / beta.sf(bound, 1, 1 / bound)
        assert np.exp(log_evidence(hits, misses, bound)) == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("bound", [0.02, 0.3, 0.9])
def test_the_evidence_is_expected_to_be_one_at_the_bound_and_less_below(bound):
    hits = np.arange(41)
    evidence = np.exp(log_evidence(hits, 40 - hits, bound))
    assert evidence @ binom.pmf(hits, 40, bound) == pytest.approx(1)
    assert evidence @ binom.pmf(hits, 40, 0.7 * bound) < 1


@pytest.mark.parametrize("fewer", [False, True])
def test_the_limit_is_the_first_number_of_hits_that_raises_the_alarm(fewer):
    hits, counts = [6, 5, 7, 0], [60, 50, 70, 0]
    table = watch(300, 3000, hits, counts, delta=0.05, fewer=fewer)
    assert not table["alarm"].any()
    for day, limit in enumerate(table["limit"][:3]):
        at = round(limit * counts[day]) if np.isfinite(limit) else None
        for n in range(counts[day] + 1):
            tried = watch(300, 3000, [*hits[:day], n], counts[: day + 1], delta=0.05, fewer=fewer)
            assert tried["alarm"].iloc[-1] == (at is not None and (n <= at if fewer else n >= at))
    assert np.isnan(table["rate"].iloc[3])
    assert np.isnan(table["limit"].iloc[3])


@pytest.mark.parametrize("n_weeks", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_quiet_weeks_raise_no_more_false_alarms_than_stated(n_weeks):
    """Weeks of 1,000 texts a day, each with a reference of its own; all three alarms together."""
    rng, n_false = np.random.default_rng(0), {0.01: 0, 0.3: 0}
    p = rejects(0.05)
    for _ in range(n_weeks):
        then, low = rng.binomial(500, p), rng.beta(50, 451)
        hits, below = rng.binomial(N_A_DAY, p, 7), rng.binomial(N_A_DAY, low, 7)
        for alpha in n_false:
            tables = [watch(then, 500, hits, [N_A_DAY] * 7, delta=alpha / 3, fewer=fewer) for fewer in (False, True)]
            tables.append(watch(49, 500, below, [N_A_DAY] * 7, delta=alpha / 3))
            n_false[alpha] += any(table["alarm"].iloc[-1] for table in tables)
    assert n_false[0.01] <= 0.01 * n_weeks
    assert 0.01 * n_weeks <= n_false[0.3] <= 0.3 * n_weeks  # the bound is not empty either


@pytest.mark.parametrize("quiet_days", [0, 30])
def test_a_shift_from_5_to_15_percent_out_of_scope_is_found_within_days(quiet_days):
    """With a reference of 3,000 texts; the alarm also says when the change began."""
    rng, days = np.random.default_rng(quiet_days), []
    for _ in range(50):
        rates = np.repeat([rejects(0.05), rejects(0.15)], [quiet_days, 5])
        table = watch(rng.binomial(3000, rates[0] if quiet_days else rejects(0.05)), 3000,
                      rng.binomial(N_A_DAY, rates), [N_A_DAY] * len(rates), delta=0.01 / 3)  # fmt: skip
        assert table["alarm"].iloc[-1]
        days.append(int(table["alarm"].argmax()) + 1 - quiet_days)
        assert abs(table["since"].iloc[-1] - quiet_days) <= 1
    assert np.median(days) <= 2
    assert min(days) >= 1
    assert max(days) <= 4


def test_without_days_or_evidence_there_is_no_alarm():
    assert watch(5, 100, [], [], delta=0.01).empty
    assert not watch(100, 100, [10], [10], delta=0.01)["alarm"].any()
    assert not watch(0, 100, [0], [10_000], delta=0.01, fewer=True)["alarm"].any()
