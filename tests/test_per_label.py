"""Minimum probabilities per label, against exhaustive search."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers import memory_run, random_run

from cascade_lab.exceptions import GoalError
from cascade_lab.thresholds import Goal, ThresholdGrid, choose, per_label_thresholds

ACCURACY = Goal(maximize="accuracy")


def test_thresholds_per_label_are_the_best_of_all_combinations(tmp_path):
    run = random_run(tmp_path / "r", n=60, n_labels=2, seed=5, skill=1.0)
    result = per_label_thresholds(run, ACCURACY, {"gate0": 0.3}, n_repeats=1)
    gate = replace(run.spec.stages[0], threshold=0.3)

    def accuracy(minimums):
        last = replace(run.spec.last, min_probability=None, min_probabilities=minimums)
        predictions = run.with_spec(replace(run.spec, stages=(gate, last))).predictions
        return (predictions["predicted"] == predictions["label"]).mean()

    values = [0.0, *ThresholdGrid.from_run(run, ["last"], {"gate0": 0.3}).thresholds[0][1:]]
    best = max(accuracy({"label0": a, "label1": b}) for a, b in itertools.product(values, values))
    assert accuracy(result.min_probabilities) == pytest.approx(best)


def test_thresholds_per_label_keep_a_bound_and_do_not_improve_where_labels_are_alike(tmp_path):
    run = random_run(tmp_path / "r", n=300, seed=1)
    goal = Goal(maximize="reject_recall", at_least={"in_scope_accuracy": 0.4})
    thresholds = choose(run, goal).thresholds
    result = per_label_thresholds(run, goal, thresholds, n_repeats=2)
    assert result.min_probabilities
    assert result.gain.low <= result.gain.value <= result.gain.high
    assert not result.improves
    gate = replace(run.spec.stages[0], threshold=thresholds["gate0"])
    last = replace(run.spec.last, min_probability=None, min_probabilities=result.min_probabilities)
    predictions = run.with_spec(replace(run.spec, stages=(gate, last))).predictions
    in_scope = predictions["label"].isin(run.spec.in_scope_labels)
    assert (predictions["predicted"] == predictions["label"])[in_scope].mean() >= 0.4


def test_thresholds_per_label_improve_where_labels_differ(tmp_path):
    """Texts with one predicted label are all right, those with the other all out of scope."""
    run = random_run(tmp_path / "r", n=600, n_labels=2, seed=1, skill=0.0)
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    labels = np.where(logits["last"].argmax(axis=1) == 0, "label0", "oos0")
    relabelled = memory_run(run.spec, run.examples.assign(label=labels), logits)
    result = per_label_thresholds(relabelled, ACCURACY, {"gate0": 0.0}, n_repeats=2)
    assert result.improves
    assert result.gain.value > 0.2
    assert set(result.min_probabilities) == {"label1"}


def test_minimums_that_the_run_has_are_not_kept(tmp_path):
    """They are chosen anew, so the best of all labels does not depend on those of the run."""
    run = random_run(tmp_path / "r", n=120, seed=3)
    expected = per_label_thresholds(run, ACCURACY, {"gate0": 0.3}, n_repeats=1)
    strict = replace(run.spec.last, min_probabilities={"label0": 1.0, "label1": 0.0})
    run = run.with_spec(replace(run.spec, stages=(*run.spec.stages[:-1], strict)))
    result = per_label_thresholds(run, ACCURACY, {"gate0": 0.3}, n_repeats=1)
    assert result.min_probabilities == expected.min_probabilities
    assert result.gain.value > expected.gain.value  # compared with the worse minimums of the run


def test_a_probability_of_1_is_not_rejected(tmp_path):
    """All texts answered label1 are out of scope, and some have a probability of exactly 1."""
    run = random_run(tmp_path / "r", n=100, n_labels=2, seed=1)
    logits = {stage.name: run.scores(stage.name).logits.copy() for stage in run.spec.stages}
    logits["last"][::5] = [-200, 200]
    labels = np.where(logits["last"].argmax(axis=1) == 0, "label0", "oos0")
    result = per_label_thresholds(
        memory_run(run.spec, run.examples.assign(label=labels), logits), ACCURACY, {"gate0": 0.0}, n_repeats=1
    )
    assert result.min_probabilities == {"label1": 1.0}


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (Goal(minimize="risk"), "cannot be chosen for risk"),
        (Goal("accuracy", at_most={"p95_ms": 20}), "cannot be chosen for p95_ms"),
        (Goal("accuracy", at_least={"in_scope_accuracy": 0.1, "reject_recall": 0.1}), "at most one bound"),
    ],
)
def test_goals_that_are_refused(tmp_path, goal, message):
    with pytest.raises(GoalError, match=message):
        per_label_thresholds(random_run(tmp_path / "r", n=30), goal, {"gate0": 0.5})
