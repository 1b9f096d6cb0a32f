"""The six outcomes: by hand, and that they add up to the metrics."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import random_run

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.outcomes import (
    ERRORS,
    FRACTIONS,
    OUTCOMES,
    RIGHT,
    RIGHT_REJECT,
    LabelScope,
    metric_from_counts,
    outcome_counts,
    outcomes,
)

SCOPE = LabelScope(("a", "b", "c"), ("oos", "abuse"))
PREDICTIONS = pd.DataFrame(
    {"label": ["a", "abuse", "b", "oos", "c", "abuse"], "predicted": ["a", "abuse", "abuse", "b", "a", "oos"]}
)


def test_six_texts_have_the_six_outcomes():
    assert outcomes(SCOPE, PREDICTIONS["label"], PREDICTIONS["predicted"]).tolist() == list(OUTCOMES)


def test_the_metrics_of_six_texts_by_hand():
    """One text of each outcome."""
    counts = outcome_counts(SCOPE, PREDICTIONS).to_numpy()
    expected = {
        "accuracy": 2 / 6,
        "in_scope_accuracy": 1 / 3,
        "reject_recall": 1 / 3,
        "reject_precision": 1 / 3,
        "coverage": 3 / 6,
        "risk": 2 / 3,
    }
    assert {name: float(metric_from_counts(name, counts)) for name in FRACTIONS} == pytest.approx(expected)
    costs = {"false accept": 6.0, "wrong class": 3.0}
    assert metric_from_counts("mean_cost", counts, costs=costs) == pytest.approx(9 / 6)
    # With nine texts in ten out of scope: 0.1 · 1/3 + 0.9 · 1/3, and costs of 0.1 · 3/3 + 0.9 · 6/3.
    assert metric_from_counts("accuracy", counts, prevalence=0.9) == pytest.approx(1 / 3)
    assert metric_from_counts("mean_cost", counts, costs=costs, prevalence=0.9) == pytest.approx(1.9)


def test_metrics_of_no_texts_are_nan():
    nothing = pd.DataFrame({"label": [], "predicted": []}, dtype=object)
    counts = outcome_counts(SCOPE, nothing).to_numpy()
    assert counts.sum() == 0
    assert np.isnan([metric_from_counts(name, counts) for name in FRACTIONS]).all()


@pytest.mark.parametrize("n_gates", [0, 1, 3])
def test_outcomes_add_up_to_the_metrics_of_a_run(tmp_path, n_gates):
    run = random_run(tmp_path / "run", n_gates=n_gates)
    counts = outcome_counts(run.spec, run.predictions)
    metrics = prediction_metrics(run.spec, run.predictions)
    assert counts.sum() == len(run.examples)
    assert (counts[RIGHT] + counts[RIGHT_REJECT]) / counts.sum() == pytest.approx(metrics["accuracy"])
    for name in set(metrics) & set(FRACTIONS):
        assert metric_from_counts(name, counts.to_numpy()) == pytest.approx(metrics[name], nan_ok=True)
    wrong = run.predictions["label"] != run.predictions["predicted"]
    assert counts[list(ERRORS)].sum() == wrong.sum()
