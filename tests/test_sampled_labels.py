"""Metrics from labels that were drawn with unequal probabilities: simulations, and parity where weights are equal."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers import run_of_probabilities
from scipy.stats import t as student_t

from cascade_lab.analysis.bootstrap import wilson
from cascade_lab.analysis.sampled_labels import sampled_metrics, weighted_fraction_interval
from cascade_lab.label_files import has_unequal_weights

N = 20_000


def population(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidence of each text, and whether its answer is right."""
    rng = np.random.default_rng(3)
    confidence = rng.beta(4, 1, N)
    right = {"like confidence": 0.5 + 0.5 * confidence, "overconfident": 1 - 0.25 * confidence, "rare errors": 0.97}
    return confidence, rng.random(N) < right[kind]


DESIGNS = {
    "equal": lambda confidence: np.ones(N),
    "low confidences ten times as often": lambda confidence: np.where(confidence < 0.6, 10.0, 1.0),
    "high confidences ten times as often": lambda confidence: np.where(confidence > 0.9, 10.0, 1.0),
    "by doubt": lambda confidence: 1.05 - confidence,
    "at random": lambda confidence: np.exp(np.random.default_rng(1).normal(0, 1, N)),
}


KINDS = ("like confidence", "overconfident", "rare errors")
QUICK = (("low confidences ten times as often", "like confidence"), ("at random", "rare errors"))


@pytest.mark.parametrize(
    ("design", "kind"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in product(DESIGNS, KINDS)],
)
def test_intervals_cover_the_truth_and_the_estimate_is_unbiased(design, kind):
    """Poisson samples of 60 and of 300 of 20,000 texts, 400 times: of 95% intervals at least 93% must cover."""
    confidence, right = population(kind)
    size, rng = DESIGNS[design](confidence), np.random.default_rng(5)
    for n in (60, 300):
        chance = np.minimum(1, n * size / size.sum())
        covered, values = [], []
        for _ in range(400):
            drawn = rng.random(N) < chance
            found = weighted_fraction_interval(right[drawn], np.ones(drawn.sum(), dtype=bool), 1 / chance[drawn])
            covered.append(found.low <= right.mean() <= found.high)
            values.append(found.value)
        assert np.mean(covered) > 0.93 - 2 * np.sqrt(0.93 * 0.07 / 400)
        assert abs(np.mean(values) - right.mean()) < 4 * np.std(values) / np.sqrt(400) + 2 / n


def test_unweighted_metrics_of_such_a_sample_are_biased():
    """What the weights are for: texts of low confidence are drawn ten times as often, and are wrong more often."""
    confidence, right = population("like confidence")
    size = DESIGNS["low confidences ten times as often"](confidence)
    drawn = np.random.default_rng(0).random(N) < np.minimum(1, 2000 * size / size.sum())
    weighted = weighted_fraction_interval(right[drawn], np.ones(drawn.sum(), dtype=bool), 1 / size[drawn])
    plain = wilson(right[drawn].sum(), drawn.sum())
    assert weighted.low < right.mean() < weighted.high
    assert plain.high < right.mean()


@pytest.mark.parametrize("n_hits", [0, 3, 30, 40])
def test_equal_weights_give_wilsons_interval_with_students_t(n_hits):
    hits = np.arange(40) < n_hits
    found = weighted_fraction_interval(hits, np.ones(40, dtype=bool), np.full(40, 7.0))
    n = 40 * (1.959963984540054 / student_t.ppf(0.975, 39)) ** 2
    assert found == pytest.approx(wilson(n * n_hits / 40, n))
    assert found.low <= wilson(n_hits, 40).low


def test_equal_texts_count_once():
    hits, weights = np.tile([True, True, False], 20), np.tile([1.0, 2.0, 3.0], 20)
    once = weighted_fraction_interval(hits, np.ones(60, dtype=bool), weights)
    groups, twice = np.tile(np.arange(60), 2), (np.tile(x, 2) for x in (hits, np.ones(60, dtype=bool), weights))
    assert weighted_fraction_interval(*twice, groups=groups) == pytest.approx(once)


def by_hand(weights: list[float | None]):
    """Four texts in scope, of which the second is wrong and the third rejected; two out of scope, one rejected."""
    stages = [
        {"name": "gate", "labels": ["oos", "in"], "pass_label": "in", "threshold": 0.5},
        {"name": "last", "labels": ["a", "b"]},
    ]
    gate = [[0.1, 0.9], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]
    last = [[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]]
    run = run_of_probabilities(stages, ["a", "b", "a", "b", "oos", "oos", None], {"gate": gate, "last": last})
    run.examples["label_weight"] = weights
    return run


def test_metrics_by_hand():
    run = by_hand([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, np.nan])
    found = sampled_metrics(run)
    expected = {
        "accuracy": (1 + 4 + 5) / 21,
        "in_scope_accuracy": (1 + 4) / 10,
        "reject_recall": 5 / 11,
        "reject_precision": 5 / 8,
        "out_of_scope": 11 / 21,
    }
    assert found["value"].to_dict() == pytest.approx(expected)
    assert found["n_labelled"].tolist() == [6, 4, 2, 2, 6]
    assert (found["low"] < found["value"]).all()
    assert has_unequal_weights(run.examples)
    equal = by_hand([2.0] * 6 + [np.nan])
    assert sampled_metrics(equal)["value"].to_dict()["accuracy"] == pytest.approx(0.5)
    assert not has_unequal_weights(equal.examples)


def test_a_metric_of_no_text_is_undefined():
    nothing = weighted_fraction_interval(np.array([True]), np.array([False]), np.array([1.0]))
    assert np.isnan(nothing).all()
