"""How often 95% intervals contain the true value, by simulation: `make test-slow` runs the long form of each.

Every case draws sets of texts from a population whose true value is known: by a formula, or from a million texts.
Fractions are exact instead: the binomial distribution says how often each interval is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
from helpers import random_run
from scipy.stats import binom, norm

from cascade_lab.analysis.bootstrap import Interval, fraction_interval, resample_codes, wilson
from cascade_lab.analysis.calibration import calibration_error
from cascade_lab.analysis.classification import confusion_metrics
from cascade_lab.analysis.coverage import risk_coverage_areas, risk_coverage_curve
from cascade_lab.analysis.intervals import outcome_intervals, prediction_intervals
from cascade_lab.analysis.metrics import metric_intervals
from cascade_lab.analysis.outcomes import metric_from_counts
from cascade_lab.analysis.paired import paired_metrics
from cascade_lab.analysis.ranking import (
    auroc_interval,
    average_precision_interval,
    ranking_intervals,
    ranking_metrics,
)

Cases = dict[str, tuple[float, Interval]]
Simulation = Callable[[np.random.Generator, int], Cases]

SHORT, LONG = 40, 1000
BY_CASE: dict[str, Simulation] = {}
"""The name of each case to a function that draws one set and returns the true value and the interval of each metric."""


def case(function: Simulation) -> Simulation:
    BY_CASE[function.__name__] = function
    return function


def exact_coverage(n, fractions):
    """Return how often Wilson's interval of `n` texts contains each true fraction."""
    hits = np.arange(n + 1)[:, None]
    low, high = np.array([wilson(k, n)[1:] for k in range(n + 1)]).T[:, :, None]
    return (binom.pmf(hits, n, fractions) * ((low <= fractions) & (fractions <= high))).sum(axis=0)


@pytest.mark.parametrize(("n", "mean"), [(20, 0.957), (60, 0.953), (100, 0.952), (300, 0.951)])
def test_fractions_are_covered_as_far_as_their_few_values_allow(n, mean):
    """By enumeration, for true fractions from 0.001 to 0.999.

    Near 0 and 1 nearly all sets have the same count, and its interval must not be short: up to 0.998 are covered.
    """
    fractions = np.arange(1, 1000) / 1000
    covered, expected = exact_coverage(n, fractions), n * np.minimum(fractions, 1 - fractions)
    assert covered.min() > 0.925
    assert covered.mean() == pytest.approx(mean, abs=0.001)
    for least, low, high in ((5, 0.925, 0.98), (10, 0.93, 0.97)):
        frequent = covered[expected >= least]
        assert low < frequent.min() <= frequent.max() < high, least
        assert 0.945 < frequent.mean() < 0.96
    assert wilson(20, 20).low == pytest.approx(0.839, abs=0.001)


def _label_population(n_labels: int, accuracy: float) -> np.ndarray:
    """Return probabilities of (true label, predicted label), with labels of different difficulty."""
    rng = np.random.default_rng(0)
    skill = np.clip(rng.beta(8 * accuracy, 8 * (1 - accuracy), n_labels), 0.02, 0.999)
    wrong = rng.dirichlet(np.full(n_labels, 3 / n_labels), n_labels) * (1 - np.eye(n_labels))
    joint = wrong / wrong.sum(axis=1, keepdims=True) * (1 - skill)[:, None] + np.diag(skill)
    return joint / n_labels


def _macro(n_labels: int, n: int, accuracy: float, *, balanced: bool = False, times: int = 1) -> Simulation:
    joint = _label_population(n_labels, accuracy)
    hits, support, predicted = np.diag(joint), joint.sum(axis=1), joint.sum(axis=0)
    truth = {
        "macro_f1": (2 * hits / (support + predicted)).mean(),
        "macro_recall": (hits / support).mean(),
        "macro_precision": (hits / predicted).mean(),
        "accuracy": hits.sum(),
    }

    def simulate(rng: np.random.Generator, seed: int) -> Cases:
        if balanced:
            y_true = np.repeat(np.arange(n_labels), n // n_labels)
            within = joint.cumsum(axis=1)[y_true] * n_labels
            y_pred = (rng.random(len(y_true))[:, None] > within[:, :-1]).sum(axis=1)
        else:
            y_true, y_pred = np.divmod(rng.choice(n_labels**2, n, p=joint.ravel()), n_labels)
        groups = np.arange(len(y_true)).repeat(times)
        found = prediction_intervals(
            y_true.repeat(times), y_pred.repeat(times), groups=groups, n_resamples=200, seed=seed
        )
        return {name: (value, found[name]) for name, value in truth.items()}

    return simulate


BY_CASE["150 labels x 20 texts"] = _macro(150, 3000, 0.9)
BY_CASE["150 labels x 20 texts, balanced"] = _macro(150, 3000, 0.9, balanced=True)
BY_CASE["150 labels x 10 texts"] = _macro(150, 1500, 0.9)
BY_CASE["10 labels x 20 texts, balanced"] = _macro(10, 200, 0.8, balanced=True)
BY_CASE["10 labels x 20 texts"] = _macro(10, 200, 0.8)
BY_CASE["10 labels x 20 texts, each 5 times"] = _macro(10, 200, 0.8, times=5)


@cache
def _ranking_truth(prevalence: float, distance: float) -> dict[str, float]:
    rng, n = np.random.default_rng(1), 1_000_000
    positive = np.arange(n) < prevalence * n
    score = rng.normal(size=n) + distance * positive
    _, average_precision = ranking_metrics(positive, score, weights=np.ones((1, n), dtype=np.int32))
    return {"auroc": norm.cdf(distance / np.sqrt(2)), "average_precision": float(average_precision[0])}


def _ranking(n: int, n_positive: int, distance: float, *, times: int = 1) -> Simulation:
    def simulate(rng: np.random.Generator, seed: int) -> Cases:
        positive = np.arange(n) < n_positive
        score = rng.normal(size=n) + distance * positive
        groups = np.arange(n).repeat(times)
        found = ranking_intervals(positive.repeat(times), score.repeat(times), groups=groups)
        return {name: (value, found[name]) for name, value in _ranking_truth(n_positive / n, distance).items()}

    return simulate


BY_CASE["10 of 100 out of scope"] = _ranking(100, 10, 2.0)
BY_CASE["10 of 1000 out of scope"] = _ranking(1000, 10, 2.0)
BY_CASE["60 of 300 out of scope"] = _ranking(300, 60, 2.0)
BY_CASE["20 of 100 out of scope, each 5 times"] = _ranking(100, 20, 2.0, times=5)


def _confidences(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences of a good classifier: most are near 1, and 15% of the texts are out of scope."""
    out_of_scope = rng.random(n) < 0.15
    log_odds = np.where(out_of_scope, rng.normal(-1.5, 1.3, n), rng.normal(3, 1.5, n))
    confidence = 1 / (1 + np.exp(-log_odds))
    return ~out_of_scope & (rng.random(n) < 0.6 + 0.4 * confidence), confidence


COVERAGES = (0.1, 0.3, 0.6, 0.8, 1.0)


@cache
def _risk_truth() -> dict[str, float]:
    n = 1_000_000
    correct, confidence = _confidences(np.random.default_rng(2), n)
    errors = np.cumsum(~correct[np.argsort(-confidence)])
    perfect = np.cumsum(np.arange(n) >= correct.sum())
    ranks = np.arange(1, n + 1)
    aurc = float((errors / ranks).mean())
    truth = {"aurc": aurc, "excess_aurc": aurc - float((perfect / ranks).mean()), "augrc": float(errors.sum() / n**2)}
    return truth | {f"risk at {c:g}": float(errors[int(c * n) - 1] / (c * n)) for c in COVERAGES}


def _risk(n: int, *, times: int = 1) -> Simulation:
    def simulate(rng: np.random.Generator, seed: int) -> Cases:
        correct, confidence = (values.repeat(times) for values in _confidences(rng, n))
        groups = np.arange(n).repeat(times)
        areas = risk_coverage_areas(correct, confidence, groups=groups)
        curve = risk_coverage_curve(correct, confidence, groups=groups, n_resamples=150, seed=seed)
        found = {name: Interval(*row) for name, row in zip(areas.index, areas.to_numpy(), strict=True)}
        for coverage in COVERAGES:
            row = curve.iloc[(curve["coverage"] - coverage).abs().argmin()]
            found[f"risk at {coverage:g}"] = Interval(*row[["value", "low", "high"]])
        return {name: (value, found[name]) for name, value in _risk_truth().items()}

    return simulate


BY_CASE["confidences of 200 texts"] = _risk(200)
BY_CASE["confidences of 1000 texts"] = _risk(1000)
BY_CASE["confidences of 200 texts, each 5 times"] = _risk(200, times=5)


@case
def calibration_of_400_texts(rng, seed) -> Cases:
    """True probabilities are 0.5 + c / 2, c is given as the confidence."""
    confidence = rng.random(400)
    table = calibration_error(rng.random(400) < 0.5 + confidence / 2, confidence, n_resamples=200, seed=seed)
    truth = {"ece": 0.25, "overconfidence": -0.25, "brier": 1 / 4}
    return {name: (value, Interval(*table.loc[name])) for name, value in truth.items()}


OUTCOME_PROBABILITIES = np.array([0.72, 0.1, 0.05, 0.04, 0.07, 0.02])


def _outcomes(n: int, *, times: int = 1) -> Simulation:
    costs = {"false accept": 5.0, "wrong class": 2.0, "false reject": 1.0}

    def simulate(rng: np.random.Generator, seed: int) -> Cases:
        outcome = rng.choice(6, n, p=OUTCOME_PROBABILITIES).repeat(times)
        options = {"groups": np.arange(n).repeat(times), "n_resamples": 300, "seed": seed}
        cases: Cases = {}
        names = ("accuracy", "in_scope_accuracy", "reject_recall", "reject_precision", "coverage", "risk", "mean_cost")
        for prevalence in (None, 0.5):
            found = outcome_intervals(outcome, names, costs=costs, prevalence=prevalence, **options)
            for name, between in found.items():
                chances = OUTCOME_PROBABILITIES if prevalence is None else _reweighted(prevalence)
                truth = float(metric_from_counts(name, chances, costs=costs))
                cases[name if prevalence is None else f"{name} at {prevalence:.0%} out of scope"] = truth, between
        return cases

    return simulate


def _reweighted(prevalence: float) -> np.ndarray:
    out_of_scope = np.array([False, True, False, True, False, True])
    p = OUTCOME_PROBABILITIES
    return np.where(out_of_scope, prevalence * p / p[out_of_scope].sum(), (1 - prevalence) * p / p[~out_of_scope].sum())


BY_CASE["outcomes of 300 texts"] = _outcomes(300)
BY_CASE["outcomes of 100 texts, each 5 times"] = _outcomes(100, times=5)


def _paired(n: int, *, times: int = 1) -> Simulation:
    """Two cascades that are right together more often than by chance, with labels x, y and oos."""
    population = np.random.default_rng(3)
    labels = np.array(["x", "y", "oos"], dtype=object)
    chances = population.dirichlet(np.full(27, 0.3))
    true, a, b = np.unravel_index(np.arange(27), (3, 3, 3))
    chances = chances / 2 + ((true == a) & (true == b)) * np.array([0.25, 0.15, 0.1])[true]
    # The differences of a million texts are those of the population.
    many = np.repeat(np.arange(27), np.round(chances * 1_000_000).astype(int))
    whole = paired_metrics(labels[true[many]], labels[a[many]], labels[b[many]], {"oos"}, n_resamples=2)["difference"]

    def simulate(rng: np.random.Generator, seed: int) -> Cases:
        drawn = rng.choice(27, n, p=chances / chances.sum()).repeat(times)
        groups = np.arange(n).repeat(times)
        sides = labels[true[drawn]], labels[a[drawn]], labels[b[drawn]]
        table = paired_metrics(*sides, {"oos"}, groups=groups, n_resamples=200, seed=seed)
        between = {name: Interval(row["difference"], row["low"], row["high"]) for name, row in table.iterrows()}
        return {f"difference of {name}": (whole[name], found) for name, found in between.items()}

    return simulate


BY_CASE["two cascades on 200 texts"] = _paired(200)
BY_CASE["two cascades on 100 texts, each 5 times"] = _paired(100, times=5)


def coverage(name: str, n_sets: int) -> Iterator[tuple[str, float, int]]:
    """Yield each metric of a case, the fraction of the intervals that contain its true value, and their number."""
    rng, hits = np.random.default_rng(4), {}
    for seed in range(n_sets):
        for metric, (truth, found) in BY_CASE[name](rng, seed).items():
            if not np.isnan(found.low):
                hits.setdefault(metric, []).append(found.low - 1e-12 <= truth <= found.high + 1e-12)
    yield from ((metric, float(np.mean(covered)), len(covered)) for metric, covered in hits.items())


@pytest.mark.parametrize(
    "name",
    [
        "150 labels x 20 texts",
        "10 labels x 20 texts, each 5 times",
        "10 of 100 out of scope",
        "20 of 100 out of scope, each 5 times",
        "confidences of 200 texts",
        "calibration_of_400_texts",
        "outcomes of 300 texts",
        "outcomes of 100 texts, each 5 times",
        "two cascades on 100 texts, each 5 times",
    ],
)
def test_few_sets_are_covered(name):
    """A rough form of the test below: of 40 intervals, a method that covers 0.95 misses more than 7 once in 3,000."""
    for metric, rate, n in coverage(name, SHORT):
        assert n >= SHORT / 2, metric
        assert rate >= 1 - 7.5 / n, metric


def test_a_resample_of_a_balanced_set_is_balanced_and_shows_the_bias_of_macro_precision():
    """With as many texts of each label, precision is a ratio with a fixed part: on average it is above the truth.

    Over 2,000 such sets it is by 0.0066; a resample that draws each label's texts for themselves shows about that.
    """
    joint = _label_population(10, 0.8)
    rng, biases = np.random.default_rng(0), {True: [], False: []}
    for seed in range(20):
        y_true = np.repeat(np.arange(10), 20)
        y_pred = (rng.random(200)[:, None] > joint.cumsum(axis=1)[y_true, :-1] * 10).sum(axis=1)
        pairs, cell = np.unique(y_true * 10 + y_pred, return_inverse=True)
        for is_stratified, of in biases.items():
            strata = pairs // 10 if is_stratified else None
            drawn = resample_codes(cell, len(pairs), strata=strata, n_resamples=500, seed=seed)
            precision = confusion_metrics(pairs // 10, pairs % 10, 10, drawn)["macro_precision"]
            of.append(precision[1:].mean() - precision[0])
    assert np.mean(biases[True]) == pytest.approx(0.0066, abs=0.003)
    assert np.mean(biases[False]) == pytest.approx(0, abs=0.002)


def band(n):
    """Return 0.93 and 0.97, each with three standard errors of a simulation of `n` sets."""
    return 0.93 - 3 * np.sqrt(0.93 * 0.07 / n), 0.97 + 3 * np.sqrt(0.97 * 0.03 / n)


def auroc_coverage(m, n, distance, spread, n_sets):
    """Return how often AUROC's interval contains the area of normal scores; those of `m` texts vary `spread` times."""
    rng, n_covered = np.random.default_rng(m + n), 0
    truth = norm.cdf(distance / np.sqrt(1 + spread**2))
    for _ in range(n_sets):
        score = np.append(distance + spread * rng.normal(size=m), rng.normal(size=n))
        found = auroc_interval(np.arange(m + n) < m, score)
        n_covered += found.low <= truth <= found.high
    return n_covered / n_sets


@pytest.mark.parametrize(("distance", "spread"), [(2.0, 1.0), (3.0, 2.0)])
def test_areas_of_ten_texts_are_covered(distance, spread):
    low, high = band(300)
    assert low <= auroc_coverage(10, 90, distance, spread, 300) <= high


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(10, 90), (10, 990), (20, 80), (60, 240), (30, 30)])
@pytest.mark.parametrize("distance", [1.0, 2.0, 3.0, 4.0])
def test_areas_from_0_76_to_0_998_are_covered(m, n, distance):
    low, high = band(2000)
    assert low <= auroc_coverage(m, n, distance, 1.0, 2000) <= high


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(10, 90), (10, 990), (20, 80), (60, 240), (240, 60)])
@pytest.mark.parametrize(("distance", "spread"), [(0.8, 0.3), (1.5, 0.5), (3.0, 2.0), (2.0, 2.0)])
def test_areas_are_covered_however_much_scores_vary(m, n, distance, spread):
    low, high = band(2000)
    assert low <= auroc_coverage(m, n, distance, spread, 2000) <= high


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "distance"), [(10, 90, 2.0), (10, 990, 2.0), (20, 80, 2.0), (60, 240, 2.0)])
@pytest.mark.parametrize("is_random", [False, True])
def test_average_precision_is_covered_if_the_number_of_texts_is_fixed_or_random(m, n, distance, is_random):
    rng, n_covered = np.random.default_rng(m + n), 0
    truth = _ranking_truth(m / (m + n), distance)["average_precision"]
    for _ in range(2000):
        n_positive = int(np.clip(rng.binomial(m + n, m / (m + n)), 2, None)) if is_random else m
        positive = np.arange(m + n) < n_positive
        found = average_precision_interval(positive, rng.normal(size=m + n) + distance * positive)
        n_covered += found.low <= truth <= found.high
    low, high = band(2000)
    assert low <= n_covered / 2000 <= high


@pytest.mark.slow
def test_the_metrics_of_runs_are_covered(tmp_path):
    """500 runs of 400 texts from one of 40,000: every metric of the cascade and of its stages."""
    population = random_run(tmp_path / "all", n=40_000, n_labels=10, seed=6, skill=4.0)
    stages = (None, "gate0", "last")
    truth = {stage: metric_intervals(population, stage, n_resamples=2)["value"] for stage in stages}
    rng, hits = np.random.default_rng(7), {}
    for seed in range(500):
        run = population.select(np.sort(rng.choice(40_000, 400, replace=False)))
        for stage in stages:
            for name, row in metric_intervals(run, stage, n_resamples=200, seed=seed).iterrows():
                hits.setdefault((stage, name), []).append(row["low"] <= truth[stage][name] <= row["high"])
    rates = {name: float(np.mean(covered)) for name, covered in hits.items()}
    for (stage, name), rate in rates.items():
        print(f"{stage or 'cascade':45s} {name:40s} {rate:.3f} of 500")
    low, _ = band(500)
    assert min(rates.values()) >= low, rates
    # Single metrics near 1 are covered more often (see `wilson`); in the mean they are not.
    assert np.mean(list(rates.values())) <= 0.975, rates


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BY_CASE))
def test_intervals_cover(name):
    """0.93 to 0.97, each with three standard errors of the simulation."""
    rates = list(coverage(name, LONG))
    for metric, rate, n in rates:
        print(f"{name:45s} {metric:40s} {rate:.3f} of {n}")
    for metric, rate, n in rates:
        low, high = band(n)
        assert low <= rate <= high, (metric, rate)


def test_the_bootstrap_of_one_outcome_is_not_empty():
    found = outcome_intervals(np.zeros(50, dtype=int), ("accuracy", "mean_cost", "reject_recall"), costs={"right": 1.0})
    assert found["accuracy"].low == fraction_interval(np.ones(50, bool), np.ones(50, bool)).low < 0.94
    assert found["mean_cost"].low < 1
    assert np.isnan(found["reject_recall"]).all()
