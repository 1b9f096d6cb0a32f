"""Trust in chosen thresholds: against brute force, other runs, and simulations of what is promised."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from random_runs import random_run
from scipy.stats import binomtest

from cascade_lab.analysis.bootstrap import fraction_interval
from cascade_lab.analysis.goals import Goal
from cascade_lab.analysis.metrics import figures_of
from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.analysis.per_class import per_class
from cascade_lab.analysis.quadrants import points
from cascade_lab.analysis.thresholds import choose, choose_among
from cascade_lab.analysis.tuning import (
    certainty,
    check_apart,
    controlled,
    figures_at,
    folds,
    gate_worth,
    held_out,
    optimism,
    write_tuned,
)
from cascade_lab.errors import GoalError, InfeasibleError, RunError
from cascade_lab.serial import serve
from cascade_lab.spec import CascadeSpec

ACCURACY = Goal(maximize="accuracy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [with_texts(random_run(folder / f"{seed}", n=300, seed=seed), f"set {seed}") for seed in (1, 2)]


def with_texts(run, prefix):
    """Give a random run texts that no other has."""
    run.examples["text"] = [f"{prefix} {i}" for i in range(len(run.examples))]
    return run


def test_figures_come_with_the_interval_that_resampling_rows_gives(runs):
    run, _ = runs
    replayed = run.replay({"gate0": 0.6})
    right = (replayed["label"] == replayed["predicted"]).to_numpy()
    found = figures_at(run, {"gate0": 0.6}, ACCURACY)["accuracy"]
    expected = fraction_interval(right, np.ones_like(right), seed=1)
    assert found == pytest.approx(expected, abs=0.01)
    for name, value in figures_of(run.spec, replayed).items():
        if name != "macro_f1":
            assert figures_at(run, {"gate0": 0.6}, ACCURACY)[name].value == pytest.approx(value)


def test_a_choice_on_resamples_varies_around_the_choice(runs):
    found = certainty(runs[0], ACCURACY, n_resamples=100)
    chosen = choose(runs[0], ACCURACY)
    assert found.infeasible == 0
    assert found.thresholds.shape == (100, 2)
    assert found.thresholds["gate0"].nunique() > 5
    accuracy = found.figures["accuracy"]
    assert accuracy.value == pytest.approx(chosen.figures["accuracy"])
    assert accuracy.low < accuracy.value < accuracy.high


def test_a_goal_that_is_barely_met_is_infeasible_on_some_resamples(runs):
    best = choose(runs[0], Goal(maximize="in_scope_accuracy")).figures["in_scope_accuracy"]
    found = certainty(runs[0], Goal(maximize="accuracy", at_least={"in_scope_accuracy": best}), n_resamples=60)
    assert 0.1 < found.infeasible < 0.9


def test_optimism_is_that_of_choosing_and_replaying_by_hand(runs):
    run, _ = runs
    found = optimism(run, ACCURACY, n_repeats=2, n_folds=3)
    seen = points(run)
    tuned, left_out = [], []
    for train, test in folds(seen, 2, 3, 0):
        thresholds = choose_among(seen, ACCURACY, weights=train).thresholds
        replayed = run.replay(thresholds)
        right = (replayed["label"] == replayed["predicted"]).to_numpy()
        tuned.append(right[train == 1].mean())
        left_out.append(right[test == 1].mean())
    row = found.loc["accuracy"]
    assert (row["tuned"], row["held_out"]) == pytest.approx((np.mean(tuned), np.mean(left_out)))
    differences = np.subtract(tuned, left_out)
    # Nadeau and Bengio's variance: the plain one, and that of test folds half as large as training parts.
    assert row["standard_error"] == pytest.approx(np.sqrt((1 / 6 + 1 / 2) * differences.var(ddof=1)))


def test_chosen_thresholds_look_better_on_the_texts_they_were_chosen_on(tmp_path):
    found = [
        optimism(random_run(tmp_path / f"{seed}", n=80, skill=0.3, seed=seed), ACCURACY, n_repeats=2)
        for seed in range(6)
    ]
    assert np.mean([table.loc["accuracy", "optimism"] for table in found]) > 0.01


def test_what_is_held_out_is_a_replay_of_the_other_run(runs):
    tuned, other = runs
    thresholds = choose(tuned, ACCURACY).thresholds
    table = held_out(tuned, other, thresholds, ACCURACY)
    assert table.loc["accuracy", "held_out"] == pytest.approx(
        figures_of(other.spec, other.replay(thresholds))["accuracy"]
    )
    assert table.loc["accuracy", "low"] < table.loc["accuracy", "held_out"] < table.loc["accuracy", "high"]


def test_choosing_and_reporting_on_one_set_is_refused(runs):
    with pytest.raises(GoalError, match="report on a run of another set"):
        held_out(runs[0], runs[0], {}, ACCURACY)
    with pytest.raises(GoalError, match="report on a run of another set"):
        gate_worth(runs[0], runs[0], ACCURACY)
    check_apart(*runs)


def test_the_guarantee_holds_over_draws_of_the_tuning_set(tmp_path):
    """Of 150 tuning sets, at most a tenth may give thresholds that break the bound on the population."""
    population = random_run(tmp_path / "population", n=20_000, seed=10_000, skill=0.7)
    goal, level, delta = Goal(maximize="reject_recall"), 0.3, 0.1
    broken, given = {"guaranteed": 0, "plain": 0}, {"guaranteed": 0, "plain": 0}
    for seed in range(150):
        run = random_run(tmp_path / f"{seed}", n=150, seed=seed, skill=0.7)
        chosen = {"plain": choose(run, replace(goal, at_least={"in_scope_accuracy": level}))}
        # Where the test does not pass, nothing is promised.
        with suppress(InfeasibleError):
            chosen["guaranteed"] = controlled(run, goal, "in_scope_accuracy", level, delta=delta)
        for name, choice in chosen.items():
            given[name] += 1
            truth = figures_of(population.spec, population.replay(choice.thresholds))["in_scope_accuracy"]
            broken[name] += truth < level
    # 150 draws at 10% have a standard deviation of 3.7.
    assert given["guaranteed"] > 100
    assert broken["guaranteed"] <= 15 + 3 * 3.7
    assert broken["plain"] >= 50


def test_a_guaranteed_reject_recall_is_tested_from_the_high_end(runs):
    found = controlled(runs[0], Goal(maximize="in_scope_accuracy"), "reject_recall", 0.6)
    misses, of = found.counts[[3, 5]].sum(), found.counts[[1, 3, 5]].sum()
    assert binomtest(int(misses), int(of), 0.4, alternative="less").pvalue <= 0.1 / 10
    assert outcome_counts(runs[0].spec, runs[0].replay(found.thresholds)).tolist() == found.counts.tolist()
    with pytest.raises(InfeasibleError, match=r"with probability 0\.9"):
        controlled(runs[0], Goal(maximize="accuracy"), "in_scope_accuracy", 0.99)
    with pytest.raises(GoalError, match="cannot be guaranteed"):
        controlled(runs[0], ACCURACY, "risk", 0.9)


def test_a_gates_worth_is_tested_as_mcnemar_tests_it(runs):
    tuned, other = runs
    table = gate_worth(tuned, other, ACCURACY)
    right = []
    for thresholds in table["thresholds"]:
        replayed = other.replay(thresholds)
        right.append((replayed["label"] == replayed["predicted"]).to_numpy())
    discordant = right[0] != right[1]
    # By hand: twice the tail of fair coins beyond the rarer kind.
    n, k = int(discordant.sum()), int(min((right[0] & discordant).sum(), (right[1] & discordant).sum()))
    tail = sum(float(np.prod([(n - i) / (i + 1) for i in range(m)])) for m in range(k + 1)) / 2.0**n
    assert table["p_value"].tolist() == pytest.approx([min(1.0, 2 * tail)] * 2)
    assert table.loc["last stage alone", "thresholds"]["gate0"] == 0.0
    assert table.loc["cascade", "mean_ms"] > 0


def test_thresholds_by_label_are_the_best_of_all_combinations(tmp_path):
    run = random_run(tmp_path / "r", n=60, n_labels=2, seed=5, skill=1.0)
    found = per_class(run, ACCURACY, {"gate0": 0.3}, n_repeats=1)
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}

    def accuracy(least):
        last = replace(run.spec.last, min_probability=None, min_probabilities=least)
        gate = replace(run.spec.stages[0], threshold=0.3)
        answers = serve(replace(run.spec, stages=(gate, last)), logits)
        return (answers["predicted"] == run.examples["label"]).mean()

    values = [0.0, *points(run, ["last"]).thresholds[0][1:]]
    best = max(accuracy({"label0": a, "label1": b}) for a, b in itertools.product(values[::1], values))
    assert accuracy(found.min_probabilities) == pytest.approx(best)


def test_thresholds_by_label_keep_a_constraint_and_are_kept_only_if_they_pay(runs):
    goal = Goal(maximize="reject_recall", at_least={"in_scope_accuracy": 0.4})
    thresholds = choose(runs[0], goal).thresholds
    found = per_class(runs[0], goal, thresholds, n_repeats=2)
    assert found.min_probabilities
    assert found.gain.low <= found.gain.value <= found.gain.high
    # The labels of a random run are alike, so nothing of their own can pay.
    assert not found.pays
    with pytest.raises(GoalError, match="thresholds by label cannot be chosen for risk"):
        per_class(runs[0], Goal(minimize="risk"), thresholds)


def test_thresholds_by_label_pay_where_labels_differ(tmp_path):
    """One label's texts are all right at any probability, the other's are mostly out of scope."""
    run = random_run(tmp_path / "r", n=600, n_labels=2, seed=1, skill=0.0)
    gold = run.examples["label"].to_numpy(dtype=object).copy()
    predicted = run.scores("last").logits.argmax(axis=1)
    gold[predicted == 0] = "label0"
    gold[predicted == 1] = "oos0"
    run.examples["label"] = gold
    found = per_class(run, ACCURACY, {"gate0": 0.0}, n_repeats=2)
    assert found.pays
    assert found.gain.value > 0.2
    assert set(found.min_probabilities) == {"label1"}


def test_the_tuned_cascade_says_where_its_thresholds_come_from(runs, tmp_path):
    run, _ = runs
    choice = choose(run, ACCURACY)
    write_tuned(run, choice, ACCURACY, tmp_path / "deep" / "tuned.toml", min_probabilities={"label1": 0.25})
    spec = CascadeSpec.read(tmp_path / "deep" / "tuned.toml")
    assert spec.thresholds == choice.thresholds
    assert spec.last.min_probabilities == {"label1": 0.25}
    assert spec.tuned_on["run_id"] == run.manifest["run_id"]
    assert spec.tuned_on["goal"] == "maximize accuracy"
    assert spec.tuned_on["figures"]["accuracy"] == pytest.approx(choice.figures["accuracy"])
    assert spec.stages[0].init_checkpoint.resolve() == run.spec.stages[0].init_checkpoint.resolve()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tuned.toml"]


def test_a_gate_alone_has_no_worth_to_compare(tmp_path):
    runs = [with_texts(random_run(tmp_path / f"{k}", n=30, n_gates=0), f"{k}") for k in range(2)]
    with pytest.raises(RunError, match="takes a gate"):
        gate_worth(*runs, ACCURACY)
