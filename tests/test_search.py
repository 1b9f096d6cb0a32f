"""Chosen thresholds, against exhaustive search and replays."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from helpers import memory_run, random_run

from cascade_lab.analysis.latency import predicted_latency, reach_within
from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.exceptions import InfeasibleError, RunError
from cascade_lab.run import Run
from cascade_lab.thresholds import Goal, ThresholdGrid, choose, surface
from cascade_lab.thresholds.search import choose_on_grid

COSTS = {"false reject": 1.0, "false accept": 5.0, "wrong class": 2.0, "right": -0.5}
GOALS = [
    Goal(maximize="accuracy"),
    Goal(maximize="reject_recall", at_least={"in_scope_accuracy": 0.4}),
    Goal(maximize="in_scope_accuracy", at_least={"reject_precision": 0.55}, at_most={"risk": 0.4}),
    Goal(maximize="coverage", at_most={"risk": 0.25}),
    Goal(minimize="mean_cost", costs=COSTS),
    Goal(maximize="accuracy", at_most={"mean_cost": 0.7}, costs=COSTS, prevalence=0.1),
    Goal(minimize="risk", at_least={"coverage": 0.3}, prevalence=0.5),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "two", n=150, seed=3)


def values_where_allowed(goal, counts):
    """Return the goal's metric times its sign, -inf where a bound is broken or the metric undefined."""
    values = goal.sign * goal.value(goal.metric, counts)
    allowed = ~np.isnan(values)
    for name, least in goal.at_least.items():
        allowed &= goal.value(name, counts) >= least
    for name, most in goal.at_most.items():
        allowed &= goal.value(name, counts) <= most
    return np.where(allowed, values, -np.inf)


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_two_thresholds_are_the_best_of_all_pairs(tmp_path, goal, seed, monkeypatch):
    run = random_run(tmp_path / "r", n=120, seed=seed)
    table = surface(run, max_lines=10_000)
    assert table.exact
    values = values_where_allowed(goal, table.counts)
    # Few lines make the search look between them.
    monkeypatch.setattr("cascade_lab.thresholds.search._LINES", 9)
    if seed:  # and divide the blocks between them again
        monkeypatch.setattr("cascade_lab.thresholds.search._MAX_BLOCK", 4)
    if values.max() == -np.inf:
        with pytest.raises(InfeasibleError):
            choose(run, goal)
        return
    choice = choose(run, goal)
    assert goal.sign * choice.metrics[goal.metric] == pytest.approx(values.max())
    ties = np.isclose(values, values.max(), atol=1e-12)
    best_tie = table.metric("in_scope_accuracy", goal)[ties].max()
    assert choice.metrics["in_scope_accuracy"] == pytest.approx(best_tie)
    assert outcome_counts(run.spec, run.replay(choice.thresholds)).tolist() == choice.counts.tolist()


@pytest.mark.parametrize(("n_gates", "n", "n_seeds"), [(2, 30, 6), (3, 14, 3)])
def test_three_and_four_thresholds_are_nearly_always_the_best_of_all(tmp_path, n_gates, n, n_seeds):
    """Against every combination of thresholds; what is chosen does in a replay what the choice says."""
    n_cases, n_best = 0, 0
    for seed, goal in itertools.product(range(n_seeds), GOALS):
        folder = tmp_path / f"{seed}"
        run = Run.read(folder) if folder.exists() else random_run(folder, n=n, n_gates=n_gates, seed=seed)
        grid = ThresholdGrid.from_run(run)
        *outer, _, _ = (range(len(values)) for values in grid.thresholds)
        pairs = [np.arange(len(values)) for values in grid.thresholds[-2:]]
        best = max(
            values_where_allowed(goal, grid.fix(dict(zip(grid.stages, at, strict=False))).count(pairs).counts).max()
            for at in itertools.product(*outer)
        )
        n_cases += 1
        if best == -np.inf:
            with pytest.raises(InfeasibleError):
                choose(run, goal, grid=grid)
            n_best += 1
            continue
        choice = choose(run, goal, grid=grid)
        value = goal.sign * choice.metrics[goal.metric]
        assert value <= best + 1e-12
        n_best += value == pytest.approx(best)
        assert outcome_counts(run.spec, run.replay(choice.thresholds)).tolist() == choice.counts.tolist()
        again = choose(run, goal)
        assert again.thresholds == choice.thresholds
    assert n_best >= 0.95 * n_cases


def test_a_third_threshold_that_cannot_help_changes_nothing(tmp_path):
    """A second gate that is certain of every text: the optimum is that of the other two stages."""
    run = random_run(tmp_path / "r", n=200, n_gates=2, seed=4)
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    logits["gate1"] = np.tile(np.float32([-20.0, 20.0]), (200, 1))
    run = memory_run(run.spec, run.examples, logits)
    for goal in GOALS[:2]:
        two = choose(run, goal, ["gate0", "last"])
        assert choose(run, goal).metrics[goal.metric] == pytest.approx(two.metrics[goal.metric])


def test_weights_count_as_repeated_texts(run):
    grid = ThresholdGrid.from_run(run)
    weights = np.zeros(len(run.examples), dtype=int)
    weights[:40] = 3
    weighted = choose_on_grid(grid, GOALS[0], weights=weights)
    alone = choose_on_grid(grid.select(np.arange(40)), GOALS[0])
    assert (weighted.counts == 3 * alone.counts).all()


def test_a_bound_on_latency_holds_texts_back_at_the_first_stage(run):
    # Each stage takes 11 ms per batch, which its texts share.
    first, later = (11.0 / n for n in run.timings["n_examples"])
    for reach in (0.0, 0.3, 1.0):
        predicted = predicted_latency(run, reach)
        assert predicted["mean_ms"] == pytest.approx(first + reach * later)
        assert predicted["p95_ms"] == pytest.approx(first + later if reach > 0.05 else first)
    choice = choose(run, Goal(maximize="accuracy", at_most={"mean_ms": first + 0.2 * later}))
    assert (run.replay(choice.thresholds)["decided_by"] == "last").mean() <= 0.2
    assert reach_within(run, "p95_ms", first + later / 2) == pytest.approx(0.05)
    with pytest.raises(InfeasibleError, match="even the first stage alone takes longer"):
        choose(run, Goal(maximize="accuracy", at_most={"p50_ms": first / 2}))


def test_a_bound_on_latency_holds_with_three_stages(tmp_path):
    """Of the texts beyond the first stage, the third gets the fraction that it got in the run."""
    run = random_run(tmp_path / "r", n=150, n_gates=2, seed=3)
    n_reached = run.timings["n_examples"].to_numpy()
    first, second, third = 11.0 / n_reached
    later = second + third * n_reached[2] / n_reached[1]
    choice = choose(run, Goal(maximize="accuracy", at_most={"mean_ms": first + 0.3 * later}))
    assert 0.2 < (run.replay(choice.thresholds)["decided_by"] != "gate0").mean() <= 0.3


def test_a_bound_on_latency_counts_texts_held_at_the_first_stage_of_the_cascade(tmp_path):
    """Texts that the last stage rejects have gone beyond the gate: rejecting more makes nothing faster."""
    run = random_run(tmp_path / "r", n=150, seed=3)
    first, later = 11.0 / run.timings["n_examples"].to_numpy()
    beyond = (run.predictions["decided_by"] == "last").mean()
    goal = Goal(maximize="accuracy", at_most={"mean_ms": first + (beyond + 0.01) * later})
    unbounded = choose(run, Goal(maximize="accuracy"), ["last"])
    assert choose(run, goal, ["last"]).thresholds == unbounded.thresholds
    tight = Goal(maximize="accuracy", at_most={"mean_ms": first + (beyond - 0.01) * later})
    with pytest.raises(InfeasibleError, match=r"beyond the first stage, at most .* may, .* not only last \(--stage\)"):
        choose(run, tight, ["last"])
    choose(run, tight)
    three = random_run(tmp_path / "three", n=150, n_gates=2, seed=3)
    with pytest.raises(InfeasibleError, match="not only gate1, last"):
        choose(three, Goal("accuracy", at_most={"mean_ms": 11.0 / 150 + 0.001}), ["gate1", "last"])


def test_a_bound_on_the_latency_of_one_stage_holds_or_is_infeasible(tmp_path):
    run = random_run(tmp_path / "r", n=100, n_gates=0, seed=1)
    unbounded = choose(run, Goal(maximize="accuracy"))
    assert choose(run, Goal(maximize="accuracy", at_most={"mean_ms": 0.12, "p95_ms": 0.12})).thresholds == (
        unbounded.thresholds
    )
    for name in ("mean_ms", "p50_ms", "p99_ms"):
        with pytest.raises(InfeasibleError, match="even the first stage alone takes longer"):
            choose(run, Goal(maximize="accuracy", at_most={name: 0.1}))


def test_a_bound_on_latency_needs_timings(run):
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    untimed = Run.from_logits(run.spec, run.examples[["text", "label"]], logits)
    with pytest.raises(RunError, match="has no timings"):
        choose(untimed, Goal(maximize="accuracy", at_most={"mean_ms": 1.0}))


def test_an_infeasible_goal_names_the_nearest_thresholds(run):
    """No replay comes nearer to both bounds than the pair in the message."""
    goal = Goal(maximize="accuracy", at_least={"in_scope_accuracy": 0.999, "reject_recall": 0.9})
    with pytest.raises(InfeasibleError, match=r"no thresholds give in_scope_accuracy at least 0\.999, ") as error:
        choose(run, goal)
    best = -1.0
    for first, second in list(itertools.product(*ThresholdGrid.from_run(run).thresholds))[::97]:
        metrics = prediction_metrics(run.spec, run.replay({"gate0": first, "last": second}))
        best = max(best, min(metrics["in_scope_accuracy"] - 0.999, metrics["reject_recall"] - 0.9))
    reached = re.search(r"give in_scope_accuracy ([0-9.]+), reject_recall ([0-9.]+); ask for less", str(error.value))
    assert min(float(reached[1]) - 0.999, float(reached[2]) - 0.9) >= best - 1e-4


def test_an_infeasible_goal_with_three_stages_names_the_nearest_thresholds(tmp_path):
    run = random_run(tmp_path / "r", n=60, n_gates=2, seed=1)
    with pytest.raises(InfeasibleError, match=r"nearest, gate0 .*, gate1 .*, last .*, give in_scope_accuracy 0\."):
        choose(run, Goal("accuracy", at_least={"in_scope_accuracy": 0.999}))


def test_a_metric_that_is_undefined_on_the_texts_is_refused(run):
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    in_scope_only = memory_run(run.spec, run.examples.assign(label="label1"), logits)
    with pytest.raises(InfeasibleError, match="reject_recall is undefined on these texts"):
        choose(in_scope_only, Goal("reject_recall"))


def test_a_gate_can_be_fixed_while_the_last_stage_moves(run):
    choice = choose(run, Goal(maximize="accuracy"), ["last"], thresholds={"gate0": 0.0})
    assert list(choice.thresholds) == ["last"]
    predictions = run.replay({"gate0": 0.0, **choice.thresholds})
    assert choice.metrics["accuracy"] == pytest.approx((predictions["label"] == predictions["predicted"]).mean())
    assert set(predictions["decided_by"]) == {"last"}
