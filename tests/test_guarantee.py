"""Thresholds with a guarantee, by simulation and against the binomial test."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from helpers import random_run
from scipy.stats import binomtest

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.exceptions import GoalError, InfeasibleError
from cascade_lab.thresholds import Goal, choose, choose_with_guarantee


def test_the_guarantee_holds_over_draws_of_the_tuning_set(tmp_path):
    """Of 150 tuning sets, at most a tenth may give thresholds that break the bound on the population."""
    population = random_run(tmp_path / "population", n=20_000, seed=10_000, skill=0.7)
    goal, level, delta = Goal(maximize="reject_recall"), 0.3, 0.1
    n_broken, n_chosen = {"guaranteed": 0, "plain": 0}, {"guaranteed": 0, "plain": 0}
    for seed in range(150):
        run = random_run(tmp_path / f"{seed}", n=150, seed=seed, skill=0.7)
        chosen = {"plain": choose(run, replace(goal, at_least={"in_scope_accuracy": level}))}
        # Where the test does not pass, nothing is promised.
        with suppress(InfeasibleError):
            chosen["guaranteed"] = choose_with_guarantee(run, goal, "in_scope_accuracy", level, delta=delta)
        for name, choice in chosen.items():
            n_chosen[name] += 1
            truth = prediction_metrics(population.spec, population.replay(choice.thresholds))["in_scope_accuracy"]
            n_broken[name] += truth < level
    # 150 draws at 10% have a standard deviation of 3.7.
    assert n_chosen["guaranteed"] > 100
    assert n_broken["guaranteed"] <= 15 + 3 * 3.7
    assert n_broken["plain"] >= 50


@pytest.mark.parametrize(("n_gates", "least"), [(1, 0.5), (2, 0.25)])
def test_a_guaranteed_reject_recall_passes_the_binomial_test(tmp_path, n_gates, least):
    """The error is shared among the ten thresholds of each later stage."""
    run = random_run(tmp_path / "r", n=400, n_gates=n_gates, seed=1)
    choice = choose_with_guarantee(run, Goal(maximize="in_scope_accuracy"), "reject_recall", least)
    n_missed, n = choice.counts[[3, 5]].sum(), choice.counts[[1, 3, 5]].sum()
    assert binomtest(int(n_missed), int(n), 1 - least, alternative="less").pvalue <= 0.1 / 10**n_gates
    assert outcome_counts(run.spec, run.replay(choice.thresholds)).tolist() == choice.counts.tolist()


def test_a_guarantee_is_of_the_cascade_with_its_minimums_by_label(tmp_path):
    """Labels with a minimum of 1 are nearly never answered, so no threshold keeps the bound for them."""
    run = random_run(tmp_path / "r", n=400, seed=1)
    goal = Goal(maximize="reject_recall")
    choose_with_guarantee(run, goal, "in_scope_accuracy", 0.4)
    strict = replace(run.spec.last, min_probabilities={"label0": 1.0, "label1": 1.0})
    run = run.with_spec(replace(run.spec, stages=(*run.spec.stages[:-1], strict)))
    with pytest.raises(InfeasibleError, match="ask for less"):
        choose_with_guarantee(run, goal, "in_scope_accuracy", 0.4)
    choice = choose_with_guarantee(run, goal, "in_scope_accuracy", 0.2)
    assert outcome_counts(run.spec, run.replay(choice.thresholds)).tolist() == choice.counts.tolist()


def test_guarantees_that_are_refused(tmp_path):
    run = random_run(tmp_path / "r", n=100, seed=1)
    with pytest.raises(InfeasibleError, match=r"with probability 0\.9"):
        choose_with_guarantee(run, Goal(maximize="accuracy"), "in_scope_accuracy", 0.99)
    with pytest.raises(GoalError, match="cannot be guaranteed"):
        choose_with_guarantee(run, Goal(maximize="accuracy"), "risk", 0.9)
    with pytest.raises(GoalError, match="bound on a latency"):
        choose_with_guarantee(run, Goal("accuracy", at_most={"p95_ms": 20}), "in_scope_accuracy", 0.5)
