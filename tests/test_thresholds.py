"""Thresholds swept and chosen on kept logits, against replays at each of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import random_run

from cascade_lab.analysis.goals import FIGURES, Goal, figure_of
from cascade_lab.analysis.latency import predicted_latency, reach_within
from cascade_lab.analysis.metrics import figures_of
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.analysis.quadrants import points
from cascade_lab.analysis.thresholds import choose, choose_among, surface, sweep
from cascade_lab.errors import GoalError, InfeasibleError, RunError

COSTS = {"false reject": 1.0, "false accept": 5.0, "wrong class": 2.0, "right": -0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "two", n=150, seed=3)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(1, 3))
def test_a_sweep_equals_replays_at_random_thresholds(tmp_path_factory, seed, n_gates):
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=60, n_gates=n_gates, seed=seed)
    rng = np.random.default_rng(seed)
    for stage in [f"gate{rng.integers(n_gates)}", "last"]:
        table = sweep(run, stage, goal=Goal(minimize="mean_cost", costs=COSTS))
        for row in rng.choice(table.to_dict("records"), 5):
            # Any threshold down to the one before divides the texts in the same way.
            below = table["threshold"][table["threshold"] < row["threshold"]].max()
            for threshold in [row["threshold"], *([] if np.isnan(below) else [np.nextafter(below, 1)])]:
                replayed = run.replay({stage: threshold})
                assert outcome_counts(run.spec, replayed).to_dict() == {name: row[name] for name in OUTCOMES}
                for name, value in figures_of(run.spec, replayed).items():
                    assert row[name] == pytest.approx(value, nan_ok=True), name


def test_a_sweep_agrees_with_fifty_replays_and_its_reach_with_who_arrives(run):
    table = sweep(run, "gate0")
    for row in table.iloc[np.random.default_rng(0).integers(0, len(table), 50)].to_dict("records"):
        replayed = run.replay({"gate0": row["threshold"]})
        assert row["accuracy"] == (replayed["label"] == replayed["predicted"]).mean()
        assert row["reach"] == pytest.approx((replayed["decided_by"] == "last").mean())


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(1, 3))
def test_a_surface_equals_replays_at_random_pairs(tmp_path_factory, seed, n_gates):
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=60, n_gates=n_gates, seed=seed)
    rng = np.random.default_rng(seed)
    stages = [f"gate{rng.integers(n_gates)}", "last"]
    found = surface(run, stages)
    assert found.exact
    for _ in range(10):
        i, j = rng.integers(len(found.first)), rng.integers(len(found.second))
        replayed = run.replay({stages[0]: found.first[i], stages[1]: found.second[j]})
        assert outcome_counts(run.spec, replayed).tolist() == found.counts[i, j].tolist()


def test_a_coarse_surface_is_exact_where_it_looks(run):
    found = surface(run, max_lines=7)
    assert not found.exact
    assert found.counts.shape == (7, 7, 6)
    replayed = run.replay({"gate0": found.first[3], "last": found.second[5]})
    assert outcome_counts(run.spec, replayed).tolist() == found.counts[3, 5].tolist()


@pytest.mark.parametrize(
    "goal",
    [
        Goal(maximize="accuracy"),
        Goal(maximize="reject_recall", at_least={"in_scope_accuracy": 0.4}),
        Goal(maximize="in_scope_accuracy", at_least={"reject_precision": 0.55}, at_most={"risk": 0.4}),
        Goal(maximize="coverage", at_most={"risk": 0.25}),
        Goal(minimize="mean_cost", costs=COSTS),
        Goal(maximize="accuracy", at_most={"mean_cost": 0.7}, costs=COSTS, prevalence=0.1),
        Goal(minimize="risk", at_least={"coverage": 0.3}, prevalence=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_the_chosen_pair_is_the_best_of_all_by_trying_every_one(tmp_path, goal, seed, monkeypatch):
    run = random_run(tmp_path / "r", n=120, seed=seed)
    every = surface(run, max_lines=10_000)
    assert every.exact
    values = goal.sign * every.figure(goal.figure, goal)
    allowed = ~np.isnan(values)
    for name, least in goal.at_least.items():
        allowed &= every.figure(name, goal) >= least
    for name, most in goal.at_most.items():
        allowed &= every.figure(name, goal) <= most
    # Few lines make the search go between them.
    monkeypatch.setattr("cascade_lab.analysis.thresholds.MAX_LINES", 9)
    if not allowed.any():
        with pytest.raises(InfeasibleError):
            choose(run, goal)
        return
    found = choose(run, goal)
    assert goal.sign * found.figures[goal.figure] == pytest.approx(values[allowed].max())
    ties = allowed & np.isclose(values, values[allowed].max(), atol=1e-12)
    assert found.figures["in_scope_accuracy"] == pytest.approx(every.figure("in_scope_accuracy")[ties].max())
    assert outcome_counts(run.spec, run.replay(found.thresholds)).tolist() == found.counts.tolist()


def test_figures_of_counts_are_those_of_the_answers(run):
    counts = outcome_counts(run.spec, run.predictions).to_numpy()
    for name, value in figures_of(run.spec, run.predictions).items():
        if name in FIGURES:
            assert figure_of(name, counts) == pytest.approx(value), name


def test_a_prevalence_reweighs_as_a_set_with_that_prevalence_would_count(run):
    # Ten times each text out of scope: the same figures as the weights for that prevalence give.
    counts = outcome_counts(run.spec, run.predictions).to_numpy()
    in_scope = np.isin(OUTCOMES, ["right", "false reject", "wrong class"])
    repeated = np.where(in_scope, counts, 10 * counts)
    goal = Goal(minimize="mean_cost", costs=COSTS, prevalence=repeated[~in_scope].sum() / repeated.sum())
    plain = Goal(minimize="mean_cost", costs=COSTS)
    for name in FIGURES:
        assert figure_of(name, counts, goal) == pytest.approx(figure_of(name, repeated, plain)), name


def test_weights_count_as_repeated_texts_do(run):
    found = points(run)
    weights = np.zeros(len(run.examples), dtype=int)
    weights[:40] = 3
    twice = choose_among(found, Goal(maximize="accuracy"), weights=weights)
    kept = found._replace(
        ranks=found.ranks[:, :40],
        becomes=found.becomes[:, :40],
        answers=found.answers[:, :40],
        in_scope=found.in_scope[:40],
    )
    once = choose_among(kept, Goal(maximize="accuracy"))
    assert (twice.counts == 3 * once.counts).all()


def test_a_latency_bound_holds_back_as_many_texts_as_it_takes(run):
    # Each stage takes 11 ms a batch, shared by its texts.
    first, later = (11.0 / n for n in run.timings["n_examples"])
    for reach in (0.0, 0.3, 1.0):
        predicted = predicted_latency(run, reach)
        assert predicted["mean_ms"] == pytest.approx(first + reach * later)
        assert predicted["p95_ms"] == pytest.approx(first + later if reach > 0.05 else first)
    found = choose(run, Goal(maximize="accuracy", at_most={"mean_ms": first + 0.2 * later}))
    replayed = run.replay(found.thresholds)
    assert (replayed["decided_by"] == "last").mean() <= 0.2
    assert reach_within(run, "p95_ms", first + later / 2) == pytest.approx(0.05)
    with pytest.raises(InfeasibleError, match="beyond the first stage"):
        choose(run, Goal(maximize="accuracy", at_most={"p50_ms": first / 2}))


def test_what_no_thresholds_can_do_is_said_with_the_nearest(run):
    goal = Goal(maximize="accuracy", at_least={"in_scope_accuracy": 0.999, "reject_recall": 0.9})
    with pytest.raises(
        InfeasibleError, match=r"infeasible: no thresholds give in_scope_accuracy at least 0\.999, "
    ) as e:
        choose(run, goal)
    pairs = itertools.product(*(sorted({*p}) for p in points(run).thresholds))
    best = -1.0
    for first, second in list(pairs)[::97]:
        figures = figures_of(run.spec, run.replay({"gate0": first, "last": second}))
        best = max(best, min(figures["in_scope_accuracy"] - 0.999, figures["reject_recall"] - 0.9))
    said = str(e.value).split("give in_scope_accuracy ")[2].split(", ")
    nearest = min(
        float(said[0]) - 0.999, float(said[1].removeprefix("reject_recall ").removesuffix("; ask for less")) - 0.9
    )
    assert nearest >= best - 1e-4


def test_a_gate_can_stand_still_while_the_last_stage_moves(run):
    alone = choose(run, Goal(maximize="accuracy"), ["last"], thresholds={"gate0": 0.0})
    assert list(alone.thresholds) == ["last"]
    replayed = run.replay({"gate0": 0.0, **alone.thresholds})
    assert alone.figures["accuracy"] == pytest.approx((replayed["label"] == replayed["predicted"]).mean())
    assert set(replayed["decided_by"]) == {"last"}


@pytest.mark.parametrize(
    ("goal", "says"),
    [
        ({}, "one figure"),
        ({"maximize": "accuracy", "minimize": "risk"}, "one figure"),
        ({"maximize": "acuracy"}, "did you mean 'accuracy'"),
        ({"maximize": "p95_ms"}, "no figure"),
        ({"minimize": "mean_cost"}, "needs the cost"),
        ({"minimize": "mean_cost", "costs": {"false acept": 1}}, "did you mean 'false accept'"),
        ({"maximize": "accuracy", "prevalence": 1.0}, "between 0 and 1"),
    ],
)
def test_a_goal_that_makes_no_sense_is_refused(goal, says):
    with pytest.raises(GoalError, match=says):
        Goal(**goal)


def test_stages_that_cannot_move_are_refused(run, tmp_path):
    with pytest.raises(RunError, match="in order"):
        surface(run, ["last", "gate0"])
    three = random_run(tmp_path / "three", n=30, n_gates=2)
    with pytest.raises(RunError, match="one stage or two"):
        surface(three)
