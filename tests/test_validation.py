"""Thresholds on other texts, at other prevalences and without gates: replays, and scikit-learn's weighted metrics."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import memory_run, random_run
from sklearn.metrics import accuracy_score

from cascade_lab.analysis.bootstrap import fraction_interval
from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.exceptions import GoalError, RunError
from cascade_lab.run import Run
from cascade_lab.thresholds import (
    Goal,
    choose,
    choose_by_prevalence,
    compare_without_gate,
    held_out,
    metrics_at,
)
from cascade_lab.thresholds.validation import check_separate

ACCURACY = Goal(maximize="accuracy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [with_texts(random_run(folder / f"{seed}", n=300, seed=seed), f"set {seed}") for seed in (1, 2)]


def with_texts(run, prefix):
    """Return a random run with texts that no other has."""
    texts = [f"{prefix} {i}" for i in range(len(run.examples))]
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    return memory_run(run.spec, run.examples.assign(text=texts), logits)


def is_correct(run, thresholds):
    predictions = run.replay(thresholds)
    return (predictions["label"] == predictions["predicted"]).to_numpy()


def test_metrics_have_the_interval_of_a_fraction(runs):
    run, _ = runs
    correct = is_correct(run, {"gate0": 0.6})
    metrics = metrics_at(run, {"gate0": 0.6}, ACCURACY)
    assert metrics["accuracy"] == pytest.approx(fraction_interval(correct, np.ones_like(correct)))
    for name, value in prediction_metrics(run.spec, run.replay({"gate0": 0.6})).items():
        if name != "macro_f1":
            assert metrics[name].value == pytest.approx(value)


def test_held_out_is_a_replay_of_the_other_run(runs):
    tuned, test = runs
    thresholds = choose(tuned, ACCURACY).thresholds
    row = held_out(tuned, test, thresholds, ACCURACY).loc["accuracy"]
    assert row["held_out"] == pytest.approx(is_correct(test, thresholds).mean())
    assert row["tuned"] == pytest.approx(is_correct(tuned, thresholds).mean())
    assert row["low"] < row["held_out"] < row["high"]


def test_reporting_on_the_tuning_set_is_refused(runs):
    run, _ = runs
    for compare in (lambda: held_out(run, run, {}, ACCURACY), lambda: compare_without_gate(run, run, ACCURACY)):
        with pytest.raises(GoalError, match="report on a run of another set"):
            compare()
    check_separate(*runs)


def test_the_comparison_without_gates_has_mcnemars_p_value(runs):
    tuned, test = runs
    table = compare_without_gate(tuned, test, ACCURACY)
    first, second = (is_correct(test, thresholds) for thresholds in table["thresholds"])
    # By hand: twice the tail of fair coins beyond the rarer kind.
    n, k = int((first != second).sum()), int(min((first & ~second).sum(), (second & ~first).sum()))
    tail = sum(float(np.prod([(n - i) / (i + 1) for i in range(m)])) for m in range(k + 1)) / 2.0**n
    assert table["p_value"].tolist() == pytest.approx([min(1.0, 2 * tail)] * 2)
    assert table.loc["last stage alone", "thresholds"]["gate0"] == 0.0
    assert table.loc["cascade", "mean_ms"] > 0


def test_the_comparison_without_gates_has_no_times_where_the_run_has_none(runs):
    tuned, test = runs
    logits = {stage.name: test.scores(stage.name).logits for stage in test.spec.stages}
    untimed = Run.from_logits(test.spec, test.examples[["text", "label"]], logits)
    table = compare_without_gate(tuned, untimed, ACCURACY)
    assert table["mean_ms"].isna().all()
    assert table["accuracy"].tolist() == compare_without_gate(tuned, test, ACCURACY)["accuracy"].tolist()


def test_a_cascade_without_gates_cannot_be_compared_without_them(tmp_path):
    runs = [with_texts(random_run(tmp_path / f"{k}", n=30, n_gates=0), f"{k}") for k in range(2)]
    with pytest.raises(RunError, match="needs a gate"):
        compare_without_gate(*runs, ACCURACY)


def test_thresholds_by_prevalence_are_the_best_for_weighted_texts(tmp_path):
    """No replay at 120 thresholds is better on texts weighted by hand, and the accuracy is scikit-learn's."""
    run = random_run(tmp_path / "r", n=150, seed=2)
    table = choose_by_prevalence(run, ACCURACY, [0.01, 0.5], ["gate0"])
    out_of_scope = run.examples["label"].str.startswith("oos").to_numpy()
    for prevalence, row in table.iterrows():
        weight = np.where(out_of_scope, prevalence / out_of_scope.sum(), (1 - prevalence) / (~out_of_scope).sum())

        def accuracy(threshold, weight=weight):
            predictions = run.replay({"gate0": threshold})
            return accuracy_score(predictions["label"], predictions["predicted"], sample_weight=weight)

        assert accuracy(row["gate0"]) == pytest.approx(row["accuracy"])
        assert row["accuracy"] >= max(map(accuracy, np.linspace(0, 1, 120))) - 1e-9
    assert table.loc[0.01, "gate0"] < table.loc[0.5, "gate0"]
    bounded = Goal("accuracy", at_least={"in_scope_accuracy": 0.999})
    assert choose_by_prevalence(run, bounded, [0.5, 0.9], ["gate0"]).isna().all(axis=None)
