"""Pictures of thresholds: what they keep is what a replay gives, and what they draw can be drawn."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import random_run
from sklearn.metrics import accuracy_score

from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.displays import ThresholdDisplay, ThresholdSurfaceDisplay
from cascade_lab.exceptions import InfeasibleError, RunError
from cascade_lab.explorer import explore
from cascade_lab.thresholds import Goal, ThresholdGrid, choose_by_prevalence, tune


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "run", n=150, seed=2)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def tuned(run, goal, *, n_resamples=20, **options):
    return tune(run, goal, n_resamples=n_resamples, n_repeats=1, **options)


def replayed(run, name, thresholds, goal):
    return float(goal.value(name, outcome_counts(run.spec, run.replay(thresholds)).to_numpy()))


def test_a_surface_is_the_replay_at_each_of_its_pairs(run):
    goal = Goal("reject_recall", at_least={"in_scope_accuracy": 0.3}, at_most={"risk": 0.6}, prevalence=0.2)
    display = ThresholdSurfaceDisplay.from_run(run, goal, n_resamples=20)
    rng = np.random.default_rng(0)
    for _ in range(50):
        i, j = (int(rng.integers(n)) for n in display.values.shape)
        thresholds = dict(
            zip(display.surface.stages, (display.surface.first[i], display.surface.second[j]), strict=True)
        )
        names = ("reject_recall", "in_scope_accuracy", "risk")
        expected = {name: replayed(run, name, thresholds, goal) for name in names}
        assert display.values[i, j] == pytest.approx(expected["reject_recall"], nan_ok=True)
        assert display.feasible[i, j] == (expected["in_scope_accuracy"] >= 0.3 and expected["risk"] <= 0.6)
    assert display.plot() is display
    assert display.values[display.feasible].max() == pytest.approx(display.choice.metrics["reject_recall"])
    assert len(display.resampled) <= 20
    frame = display.frame()
    assert list(frame) == ["threshold of gate0", "threshold of last", "reject_recall", "feasible"]
    assert len(frame) == display.values.size


def test_a_sweep_has_the_other_stage_where_the_goal_puts_it(run):
    goal = Goal("accuracy", at_least={"reject_recall": 0.5})
    tuning = tuned(run, goal)
    display = ThresholdDisplay.from_tuning(tuning, stage="last")
    assert (display.resampled == tuning.bootstrap.thresholds["last"]).all()
    assert display.metrics[:2] == ("accuracy", "reject_recall")
    assert display.bounds == {"reject_recall": 0.5}
    assert display.chosen == tuning.choice.thresholds["last"]
    row = display.frame().iloc[np.searchsorted(display.table["threshold"], display.chosen)]
    assert row["accuracy"] == pytest.approx(tuning.choice.metrics["accuracy"])
    legend = [text.get_text() for text in display.plot().ax_.get_legend().get_texts()]
    assert f"chosen: {display.chosen:.4g}" in legend
    drawn = {line.get_label(): line.get_ydata() for line in display.ax_.lines}
    assert drawn["accuracy"][1:] == pytest.approx(display.table["accuracy"])


def test_a_tuning_and_a_run_give_one_picture(run):
    goal = Goal("accuracy")
    of_tuning = ThresholdDisplay.from_tuning(tuned(run, goal))
    of_run = ThresholdDisplay.from_run(run, goal=goal, n_resamples=20)
    assert of_tuning.stage == of_run.stage == "gate0"
    assert of_tuning.frame().equals(of_run.frame())
    assert (of_tuning.resampled == of_run.resampled).all()
    surfaces = ThresholdSurfaceDisplay.from_tuning(tuned(run, goal)), ThresholdSurfaceDisplay.from_run(run, goal)
    assert surfaces[0].frame().equals(surfaces[1].frame())
    guaranteed = tuned(run, goal, guarantee={"reject_recall": 0.3})
    for display in (ThresholdDisplay.from_tuning(guaranteed), ThresholdSurfaceDisplay.from_tuning(guaranteed)):
        assert len(display.plot().resampled) == len(guaranteed.bootstrap.thresholds)


@pytest.mark.parametrize(("n", "n_labels"), [(2, 2), (60, 40), (160, 150)])
def test_any_size_is_drawn_and_no_dollar_is_a_formula(tmp_path, n, n_labels):
    run = random_run(tmp_path / "run", n=n, n_labels=n_labels)
    run = run.with_spec(replace(run.spec, name="costs $x_1$ and $\\frac$"))
    goal = Goal("accuracy")
    for display in (
        ThresholdDisplay.from_run(run),
        ThresholdDisplay.from_run(run, goal=goal, n_resamples=10),
        ThresholdSurfaceDisplay.from_run(run, goal, n_resamples=10),
    ):
        display.plot().figure_.canvas.draw()
        _, axes = plt.subplots()
        assert display.plot(axes, alpha=0.5).ax_ is axes
        assert 0.5 in [artist.get_alpha() for artist in (*axes.lines, *axes.collections)]


def test_of_three_stages_that_reject_a_surface_has_two(tmp_path):
    run, goal = random_run(tmp_path / "run", n=80, n_gates=2), Goal("accuracy")
    tuning = tuned(run, goal, n_resamples=5)
    assert ThresholdDisplay.from_tuning(tuning, stage="gate1").chosen == tuning.choice.thresholds["gate1"]
    with pytest.raises(RunError, match="name two of gate0, gate1, last"):
        ThresholdSurfaceDisplay.from_tuning(tuning)
    display = ThresholdSurfaceDisplay.from_tuning(tuning, stages=["gate0", "last"])
    i, j = 3, 5
    thresholds = {"gate0": display.surface.first[i], "last": display.surface.second[j]}
    thresholds["gate1"] = tuning.choice.thresholds["gate1"]
    assert display.values[i, j] == pytest.approx(replayed(run, "accuracy", thresholds, goal))
    assert list(display.resampled) == ["gate0", "last"]
    assert display.plot().surface.stages == ("gate0", "last")


def test_a_surface_takes_two_stages_and_a_goal_that_can_be_met(run, tmp_path):
    with pytest.raises(RunError, match="a surface needs two stages that can reject, but got 1"):
        ThresholdSurfaceDisplay.from_run(run, Goal("accuracy"), stages=["last"])
    with pytest.raises(InfeasibleError, match="infeasible"):
        ThresholdDisplay.from_run(run, goal=Goal("accuracy", at_least={"in_scope_accuracy": 0.999}))
    gateless = random_run(tmp_path / "run", n=20, n_gates=0)
    last = replace(gateless.spec.last, reject_label=None)
    gateless = gateless.with_spec(replace(gateless.spec, stages=(last,)))
    with pytest.raises(RunError, match="has no reject_label"):
        ThresholdDisplay.from_run(gateless)
    assert explore(gateless).sliders == {}


def test_thresholds_between_probabilities_and_a_subsample_serve_both_kinds_of_text(run):
    """Thresholds between probabilities count as a replay does; half of a subsample lies among each kind of text."""
    grid = ThresholdGrid.from_run(run)
    counts = grid.counts_at(np.array([0.0, 0.31, 0.311, 1.0]), np.array([0.2, 0.5]))
    expected = outcome_counts(run.spec, run.replay({"gate0": 0.311, "last": 0.5})).to_numpy()
    assert (counts[2, 1] == expected).all()
    for indices, values in zip(grid.subsample_by_scope(40), grid.thresholds, strict=True):
        assert (np.diff(indices) > 0).all()
        assert indices[0] == 0
        assert indices[-1] == len(values) - 1
        assert len(indices) <= 42
    reached = np.isin(grid.ranks[0], grid.subsample_by_scope(40)[0])
    assert min(reached[grid.in_scope].sum(), reached[~grid.in_scope].sum()) >= 20


def test_another_prevalence_gives_what_weighted_texts_give(run):
    """The best of 120 replays on texts weighted by hand is no better, and the metric there is scikit-learn's."""
    table = choose_by_prevalence(run, Goal("accuracy"), [0.01, 0.5], ["gate0"])
    out = run.examples["label"].str.startswith("oos").to_numpy()
    for prevalence, row in table.iterrows():
        weight = np.where(out, prevalence / out.sum(), (1 - prevalence) / (~out).sum())

        def accuracy(threshold, weight=weight):
            predictions = run.replay({"gate0": threshold})
            return accuracy_score(predictions["label"], predictions["predicted"], sample_weight=weight)

        assert accuracy(row["gate0"]) == pytest.approx(row["accuracy"])
        assert row["accuracy"] >= max(map(accuracy, np.linspace(0, 1, 120))) - 1e-9
    assert table.loc[0.01, "gate0"] < table.loc[0.5, "gate0"]
    bounded = choose_by_prevalence(run, Goal("accuracy", at_least={"in_scope_accuracy": 0.999}), [0.5, 0.9], ["gate0"])
    assert bounded.isna().all(axis=1).tolist() == [True, True]
