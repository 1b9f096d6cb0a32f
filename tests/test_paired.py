"""Paired metrics and tests: by hand, by enumeration, and by simulation."""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from cascade_lab.analysis.paired import holm, mcnemar, paired_metrics, paired_tests


def test_groups_may_be_a_series():
    y_true, a, b = (np.array(list(labels)) for labels in ("abab", "abaa", "abbb"))
    groups = pd.Series([0, 0, 1, 1])
    found = paired_metrics(y_true, a, b, set(), groups=groups)
    assert repr(found) == repr(paired_metrics(y_true, a, b, set(), groups=groups.to_numpy()))


def test_four_texts_by_hand():
    """Three labels, of which oos rejects.

    =====  ===  ===  ======================
    label  A    B    what changes
    =====  ===  ===  ======================
    x      x    x    nothing, both right
    x      y    x    a win
    y      y    oos  a loss
    oos    x    y    both wrong, differently
    =====  ===  ===  ======================

    Accuracy is 2/4 in both, p = 1; in scope 2/3 in both. A rejects no text: its reject precision is undefined. B
    rejects one, wrongly.
    """
    y_true, a, b = ["x", "x", "y", "oos"], ["x", "y", "y", "x"], ["x", "x", "oos", "y"]
    metrics = paired_metrics(y_true, a, b, {"oos"})
    assert metrics.loc["accuracy", ["a", "b", "difference", "p_value"]].tolist() == [0.5, 0.5, 0, 1]
    assert metrics.loc["in_scope_accuracy", ["a", "b", "p_value"]].tolist() == pytest.approx([2 / 3, 2 / 3, 1])
    assert metrics.loc["coverage", ["a", "b", "p_value"]].tolist() == [1, 0.75, 1]
    assert metrics.loc["risk", ["a", "b"]].tolist() == pytest.approx([1 / 2, 1 / 3])
    assert np.isnan(metrics.loc["reject_precision", ["a", "difference"]].tolist()).all()
    assert metrics.loc["reject_precision", "b"] == 0
    assert metrics.loc["macro_f1", "b"] == pytest.approx(f1_score(y_true, b, average="macro"))


def test_mcnemar_is_exact():
    """Against every way in which the texts could fall on which A and B differ."""
    for n in range(11):
        for wins in range(n + 1):
            outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
            as_extreme = [k for k in outcomes if abs(2 * k - n) >= abs(2 * wins - n)]
            assert mcnemar(wins, n - wins) == pytest.approx(len(as_extreme) / len(outcomes))
    assert mcnemar(40, 20) == pytest.approx(2 * sum(comb(60, k) for k in range(21)) / 2**60)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    p = np.array(p_values)
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for step, i in enumerate(np.argsort(p, kind="stable")):
            if p[i] * (len(p) - step) > alpha:
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(adjusted <= alpha)) == rejected


def test_groups_are_sorted_by_p_value_then_difference():
    groups = ["few"] * 2 + ["many"] * 12
    right_a, right_b = np.array([True, False] + [False] * 12), np.array([True, True] + [True] * 8 + [False] * 4)
    table = paired_tests(groups, right_a, right_b, name="size")
    assert table.index.tolist() == [("size", "many"), ("size", "few")]
    assert table[["n_examples", "wins", "losses"]].to_numpy().tolist() == [[12, 8, 0], [2, 1, 0]]
    assert table["p_value"].tolist() == pytest.approx([2 / 2**8, 1])
    assert table["p_holm"].tolist() == pytest.approx([4 / 2**8, 1])
    assert table["difference"].tolist() == pytest.approx([8 / 12, 1 / 2])


def test_the_intervals_cover_at_their_nominal_rate():
    """250 eval sets of 400 texts from one known population; the true differences are those of the population."""
    rng = np.random.default_rng(0)
    labels = np.array(["x", "y", "z", "oos"], dtype=object)
    truth = rng.choice(4, 40, p=[0.25, 0.25, 0.2, 0.3])
    predicted = [np.where(rng.random(40) < skill, truth, rng.integers(0, 4, 40)) for skill in (0.6, 0.75)]
    weights = rng.dirichlet(np.ones(40))
    differences = {}
    for name, statistic in {
        "accuracy": lambda y: weights @ (y == truth),
        "reject_recall": lambda y: weights @ ((y == truth) & (truth == 3)) / (weights @ (truth == 3)),
        "reject_precision": lambda y: weights @ ((y == truth) & (y == 3)) / (weights @ (y == 3)),
        "coverage": lambda y: weights @ (y != 3),
        "risk": lambda y: weights @ ((y != truth) & (y != 3)) / (weights @ (y != 3)),
        "macro_f1": lambda y: f1_score(truth, y, average="macro", sample_weight=weights),
    }.items():
        differences[name] = statistic(predicted[1]) - statistic(predicted[0])
    n_covered = dict.fromkeys(differences, 0)
    for seed in range(250):
        rows = rng.choice(40, 400, p=weights)
        y_true, a, b = (labels[codes[rows]] for codes in (truth, *predicted))
        metrics = paired_metrics(y_true, a, b, {"oos"}, n_resamples=300, seed=seed)
        for name, value in differences.items():
            n_covered[name] += metrics.loc[name, "low"] <= value <= metrics.loc[name, "high"]
    for name, n in n_covered.items():
        assert 0.9 <= n / 250 <= 0.99, name
