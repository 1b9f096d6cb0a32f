"""Thresholds with a guarantee, by simulation and against the binomial test."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from helpers import logits_of, memory_run, random_run
from scipy.stats import binom, binomtest

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.exceptions import GoalError, InfeasibleError
from cascade_lab.thresholds import Goal, ThresholdGrid, choose, choose_with_guarantee
from cascade_lab.thresholds.guarantee import Guarantee, _binomial_cdf, choose_with_guarantee_on_grid
from cascade_lab.thresholds.search import choose_on_grid


def with_texts(run, texts):
    """Return a run with other texts, and the labels and logits of the rows `texts`."""
    logits = {name: values[texts] for name, values in logits_of(run).items()}
    examples = run.examples.iloc[texts].reset_index(drop=True)
    return memory_run(run.spec, examples.assign(text=[f"text {i}" for i in texts]), logits)


@pytest.mark.slow
@pytest.mark.parametrize("copies", ["none", "five", "unequal"])
def test_the_guarantee_holds_over_draws_of_the_tuning_set(tmp_path, copies):
    """Of 150 tuning sets, at most a tenth may give thresholds that break the bound on the population.

    With each text five times, and texts counted as if they were different, a quarter of them did.
    """
    population = random_run(tmp_path / "population", n=20_000, seed=10_000, skill=0.7)
    goal, level, delta = Goal(maximize="reject_recall"), 0.3, 0.1
    n_broken, n_chosen = {"guaranteed": 0, "plain": 0}, {"guaranteed": 0, "plain": 0}
    for seed in range(150):
        n_copies = {"none": 1, "five": 5, "unequal": np.random.default_rng(seed).geometric(0.4, 150)}[copies]
        run = with_texts(
            random_run(tmp_path / f"{seed}", n=150, seed=seed, skill=0.7), np.repeat(np.arange(150), n_copies)
        )
        chosen = {"plain": choose(run, replace(goal, at_least={"in_scope_accuracy": level}))}
        # Where the test does not pass, nothing is promised.
        with suppress(InfeasibleError):
            chosen["guaranteed"] = choose_with_guarantee(run, goal, {"in_scope_accuracy": level}, delta=delta)
        for name, choice in chosen.items():
            n_chosen[name] += 1
            truth = prediction_metrics(population.spec, population.replay(choice.thresholds))["in_scope_accuracy"]
            n_broken[name] += truth < level
    # 150 draws at 10% have a standard deviation of 3.7.
    assert n_chosen["guaranteed"] > (100 if copies != "unequal" else 50)
    assert n_broken["guaranteed"] <= 15 + 3 * 3.7
    assert n_broken["plain"] >= 50


@pytest.mark.parametrize(("n_gates", "least"), [(1, 0.5), (2, 0.25)])
def test_a_guaranteed_reject_recall_passes_the_binomial_test(tmp_path, n_gates, least):
    """The error is shared among the ten thresholds of each later stage."""
    run = with_texts(random_run(tmp_path / "r", n=400, n_gates=n_gates, seed=1), np.arange(400))
    choice = choose_with_guarantee(run, Goal(maximize="in_scope_accuracy"), {"reject_recall": least})
    n_missed, n = choice.counts[[3, 5]].sum(), choice.counts[[1, 3, 5]].sum()
    assert binomtest(int(n_missed), int(n), 1 - least, alternative="less").pvalue <= 0.1 / 10**n_gates
    assert outcome_counts(run.spec, run.replay(choice.thresholds)).tolist() == choice.counts.tolist()


@pytest.mark.parametrize("p", [0.1, 0.35])
def test_the_effective_number_of_texts_need_not_be_whole(p):
    """At whole numbers it is the binomial distribution; between them it lies between."""
    k, n = np.arange(30), 29.0
    assert _binomial_cdf(k, n, p) == pytest.approx(binom.cdf(k, n, p))
    between = _binomial_cdf(k[:-1] + 0.5, n, p)
    assert ((between >= binom.cdf(k[:-1], n, p)) & (between <= binom.cdf(k[1:], n, p))).all()


def test_a_guarantee_is_of_the_cascade_with_its_minimums_by_label(tmp_path):
    """Labels with a minimum of 1 are nearly never answered, so no threshold keeps the bound for them."""
    run = random_run(tmp_path / "r", n=400, seed=1)
    goal = Goal(maximize="reject_recall")
    choose_with_guarantee(run, goal, {"in_scope_accuracy": 0.4})
    strict = replace(run.spec.last, min_probabilities={"label0": 1.0, "label1": 1.0})
    run = run.with_spec(replace(run.spec, stages=(*run.spec.stages[:-1], strict)))
    with pytest.raises(InfeasibleError, match="ask for less"):
        choose_with_guarantee(run, goal, {"in_scope_accuracy": 0.4})
    choice = choose_with_guarantee(run, goal, {"in_scope_accuracy": 0.2})
    assert outcome_counts(run.spec, run.replay(choice.thresholds)).tolist() == choice.counts.tolist()


def test_guarantees_that_are_refused(tmp_path):
    run = random_run(tmp_path / "r", n=100, seed=1)
    in_scope = run.select(np.flatnonzero(run.examples["label"].str.startswith("label")))
    with pytest.raises(InfeasibleError, match=r"reject_recall is undefined.*take an eval set with texts in scope and"):
        choose_with_guarantee(in_scope, Goal(maximize="accuracy"), {"reject_recall": 0.1})
    with pytest.raises(InfeasibleError, match=r"with probability 0\.9"):
        choose_with_guarantee(run, Goal(maximize="accuracy"), {"in_scope_accuracy": 0.99})
    with pytest.raises(GoalError, match="cannot be guaranteed"):
        choose_with_guarantee(run, Goal(maximize="accuracy"), {"mean_cost": 0.9})
    with pytest.raises(GoalError, match="bound on a latency"):
        choose_with_guarantee(run, Goal("accuracy", at_most={"p95_ms": 20}), {"in_scope_accuracy": 0.5})


BOUNDS = {
    "accuracy": ("reject_recall", {"in_scope_accuracy": 0.3}, {}),
    "accuracy and coverage": ("reject_recall", {"in_scope_accuracy": 0.3, "coverage": 0.3}, {}),
    "accuracy and recall": ("reject_precision", {"in_scope_accuracy": 0.3, "reject_recall": 0.3}, {}),
    "risk": ("coverage", {}, {"risk": 0.62}),
    "precision": ("reject_recall", {"reject_precision": 0.5}, {}),
    "accuracy, coverage and risk": ("reject_recall", {"in_scope_accuracy": 0.3, "coverage": 0.3}, {"risk": 0.64}),
}
"""What is maximized, which pushes the bounds, and the lower and upper bounds."""


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("population") / "run", n=20_000, seed=10_000, skill=0.9)


def broken_bounds(population, case, *, n_sets, stages=None, n=300, delta=0.1):
    """Return how often a bound is broken on the population, and of how many tuning sets, with a guarantee and without.

    The sets are drawn from the population, so its metrics are the true ones. The bounds are those of the goal too, as
    `tune --confidence` has them. Where the tests do not pass, nothing is promised.
    """
    maximize, at_least, at_most = BOUNDS[case]
    goal, guarantee = Goal(maximize, at_least=at_least, at_most=at_most), Guarantee(at_least, at_most, delta)
    grid = ThresholdGrid.from_run(population, stages)
    found = {"guaranteed": [], "plain": []}
    for seed in range(n_sets):
        rows = np.random.default_rng(seed).integers(0, len(grid.in_scope), n)
        drawn = replace(grid.select(rows), groups=np.arange(n))
        for name in found:
            with suppress(InfeasibleError):
                if name == "plain":
                    choice = choose_on_grid(drawn, goal, max_lines=60)
                else:
                    choice = choose_with_guarantee_on_grid(drawn, goal, guarantee)
                counts = np.bincount(grid.outcomes_at(grid.indices(choice.thresholds)), minlength=len(OUTCOMES))
                kept = [bound.holds(float(goal.value(bound.metric, counts))) for bound in guarantee.bounds]
                found[name].append(not all(kept))
    return {name: (int(np.sum(broken)), len(broken)) for name, broken in found.items()}


def test_guarantees_hold_together(population):
    found = broken_bounds(population, "accuracy and coverage", n_sets=40, stages=["gate0"])
    n_broken, n_given = found["guaranteed"]
    assert n_given > 30
    # 40 draws at 10% have a standard deviation of 1.9.
    assert n_broken <= 4 + 3 * 1.9
    assert found["plain"][0] > 8


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.2, 0.1, 0.05])
@pytest.mark.parametrize("stages", [("gate0",), None])
@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_hold_with_their_confidence_in_simulation(population, case, stages, delta):
    """`tune --confidence C` is the guarantee with delta 1 - C; 400 sets of 300 texts."""
    found = broken_bounds(population, case, n_sets=400, stages=stages, delta=delta)
    print(f"\n{case}, {stages or 'both stages'}, delta {delta:g}: broken, given: {found}")
    n_broken, n_given = found["guaranteed"]
    assert n_broken <= 400 * delta + 3 * np.sqrt(400 * delta * (1 - delta))
    assert found["plain"][0] > found["guaranteed"][0]
    if case == "accuracy" and stages:
        # One bound and one threshold: the error is used. It is below delta because counts and candidates are discrete.
        assert n_given == 400
        assert n_broken >= 400 * delta / 10


def test_one_bound_of_several_in_the_same_order_has_the_whole_error(population):
    """Accuracy and coverage are tested together: a second bound that is easy to keep changes nothing."""
    grid = ThresholdGrid.from_run(population)
    goal = Goal("reject_recall")
    for seed in range(5):
        drawn = grid.select(np.random.default_rng(seed).integers(0, 20_000, 300))
        alone, both, others = (
            choose_with_guarantee_on_grid(drawn, goal, Guarantee(bounds))
            for bounds in (
                {"in_scope_accuracy": 0.3},
                {"in_scope_accuracy": 0.3, "coverage": 0.1},
                {"in_scope_accuracy": 0.3, "reject_recall": 0.1},
            )
        )
        assert both.thresholds == alone.thresholds
        assert others.metrics["reject_recall"] <= alone.metrics["reject_recall"]


@pytest.mark.parametrize("n_gates", [1, 2])
def test_guaranteed_bounds_pass_binomial_tests_that_share_the_error(tmp_path, n_gates):
    """Half of the error for each bound; of each, 10 shares for every later stage, and 49 where the order is unknown."""
    run = with_texts(random_run(tmp_path / "r", n=600, n_gates=n_gates, seed=1, skill=2.5), np.arange(600))
    choice = choose_with_guarantee(run, Goal("accuracy"), {"in_scope_accuracy": 0.3}, at_most={"risk": 0.6})
    right, _, false_reject, false_accept, wrong_class, _ = choice.counts.tolist()
    n_in = right + false_reject + wrong_class
    n_answered = right + wrong_class + false_accept
    share = 0.1 / 2 / 10**n_gates
    assert binomtest(right, n_in, 0.3, alternative="greater").pvalue <= share
    assert binomtest(wrong_class + false_accept, n_answered, 0.6, alternative="less").pvalue <= share / 49
    assert outcome_counts(run.spec, run.replay(choice.thresholds)).tolist() == choice.counts.tolist()


def test_guarantees_of_metrics_that_a_prevalence_changes_are_refused(tmp_path):
    run = random_run(tmp_path / "r", n=100, seed=1)
    with pytest.raises(GoalError, match="another fraction of out-of-scope texts"):
        choose_with_guarantee(run, Goal("accuracy", prevalence=0.1), {"accuracy": 0.2})
    with pytest.raises(GoalError, match="must lie between 0 and 1"):
        choose_with_guarantee(run, Goal("accuracy"), {"accuracy": 0.2}, delta=1.0)
    with pytest.raises(GoalError, match="--confidence"):
        choose_with_guarantee(run, Goal("accuracy"), {})
