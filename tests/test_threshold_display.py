"""Pictures of thresholds: what they keep is what a replay gives, and what they draw can be drawn."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from random_runs import random_run
from sklearn.metrics import accuracy_score

from cascade_lab.analysis.goals import Goal, figure_of
from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.analysis.quadrants import counts_at, points, spread
from cascade_lab.analysis.thresholds import choose
from cascade_lab.analysis.tuning import certainty, other_worlds
from cascade_lab.displays.thresholds import ThresholdDisplay, ThresholdSurfaceDisplay
from cascade_lab.errors import InfeasibleError, RunError
from cascade_lab.explorer import explore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "one", n=150, seed=2)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def replayed(run, name, thresholds, goal):
    return float(figure_of(name, outcome_counts(run.spec, run.replay(thresholds)).to_numpy(), goal))


def test_a_surface_is_the_replay_at_each_of_its_pairs(run):
    goal = Goal("reject_recall", at_least={"in_scope_accuracy": 0.3}, at_most={"risk": 0.6}, prevalence=0.2)
    display = ThresholdSurfaceDisplay.from_run(run, goal, sure=certainty(run, goal, n_resamples=20))
    rng = np.random.default_rng(0)
    for _ in range(50):
        i, j = (int(rng.integers(n)) for n in display.values.shape)
        thresholds = dict(
            zip(display.surface.stages, (display.surface.first[i], display.surface.second[j]), strict=True)
        )
        found = {name: replayed(run, name, thresholds, goal) for name in ("reject_recall", "in_scope_accuracy", "risk")}
        assert display.values[i, j] == pytest.approx(found["reject_recall"], nan_ok=True)
        assert display.feasible[i, j] == (found["in_scope_accuracy"] >= 0.3 and found["risk"] <= 0.6)
    assert display.plot() is display
    assert display.values[display.feasible].max() == pytest.approx(display.choice.figures["reject_recall"])
    assert len(display.resampled) <= 20


def test_a_sweep_has_the_other_stage_where_the_goal_puts_it(run):
    goal = Goal("accuracy", at_least={"reject_recall": 0.5})
    sure = certainty(run, goal, n_resamples=20)
    display = ThresholdDisplay.from_run(run, "last", goal=goal, sure=sure)
    assert (display.resampled == sure.thresholds["last"]).all()
    assert display.figures[:2] == ("accuracy", "reject_recall")
    assert display.bounds == {"reject_recall": 0.5}
    chosen = ThresholdSurfaceDisplay.from_run(run, goal, sure=sure).choice
    assert display.chosen == chosen.thresholds["last"]
    row = display.table.iloc[np.searchsorted(display.table["threshold"], display.chosen)]
    assert row["accuracy"] == pytest.approx(chosen.figures["accuracy"])
    legend = [text.get_text() for text in display.plot().ax_.get_legend().get_texts()]
    assert f"chosen: {display.chosen:.4g}" in legend
    drawn = {line.get_label(): line.get_ydata() for line in display.ax_.lines}
    assert drawn["accuracy"][1:] == pytest.approx(display.table["accuracy"])


@pytest.mark.parametrize(("n", "n_labels"), [(2, 2), (60, 40), (160, 150)])
def test_any_size_is_drawn_and_no_dollar_is_a_formula(tmp_path, n, n_labels):
    run = random_run(tmp_path / "run", n=n, n_labels=n_labels)
    run.manifest["cascade"]["name"] = "costs $x_1$ and $\\frac$"
    sure = certainty(run, Goal("accuracy"), n_resamples=10)
    for display in (
        ThresholdDisplay.from_run(run),
        ThresholdDisplay.from_run(run, goal=Goal("accuracy"), sure=sure),
        ThresholdSurfaceDisplay.from_run(run, Goal("accuracy"), sure=sure),
    ):
        display.plot().figure_.canvas.draw()
        _, axes = plt.subplots()
        assert display.plot(axes).ax_ is axes


def test_of_three_stages_that_reject_two_are_chosen_together(tmp_path):
    run, goal = random_run(tmp_path / "run", n=80, n_gates=2), Goal("accuracy")
    sure = certainty(run, goal, ["gate0", "last"], n_resamples=5)
    display = ThresholdDisplay.from_run(run, "gate0", goal=goal, sure=sure)
    assert display.chosen == choose(run, goal, ["gate0", "last"]).thresholds["gate0"]
    alone = ThresholdDisplay.from_run(run, "gate1", goal=goal)
    assert alone.chosen == choose(run, goal, ["gate1"]).thresholds["gate1"]


def test_a_surface_takes_two_stages_and_a_goal_that_can_be_met(run, tmp_path):
    with pytest.raises(RunError, match="takes two stages that can reject"):
        ThresholdSurfaceDisplay.from_run(run, Goal("accuracy"), ["last"])
    with pytest.raises(InfeasibleError, match="infeasible"):
        ThresholdDisplay.from_run(run, goal=Goal("accuracy", at_least={"in_scope_accuracy": 0.999}))
    gateless = random_run(tmp_path / "run", n=20, n_gates=0)
    del gateless.manifest["cascade"]["stage"][-1]["reject_label"]
    with pytest.raises(RunError, match="has no reject_label"):
        ThresholdDisplay.from_run(gateless)
    assert explore(gateless).sliders == {}


def test_spread_places_serve_both_kinds_of_text(run):
    """Thresholds between probabilities count as a replay does, and half of the places lie among each kind."""
    found = points(run)
    at = counts_at(found, np.array([0.0, 0.31, 0.311, 1.0]), np.array([0.2, 0.5]))
    expected = outcome_counts(run.spec, run.replay({"gate0": 0.311, "last": 0.5})).to_numpy()
    assert (at[2, 1] == expected).all()
    for places, values in zip(spread(found, 40), found.thresholds, strict=True):
        assert (np.diff(places) > 0).all()
        assert places[0] == 0
        assert places[-1] == len(values) - 1
        assert len(places) <= 42
    reached = np.isin(found.ranks[0], spread(found, 40)[0])
    assert min(reached[found.in_scope].sum(), reached[~found.in_scope].sum()) >= 20


def test_other_worlds_are_what_weighted_texts_give(run):
    """The best of 120 replays on texts weighted by hand is no better, and the figure there is scikit-learn's."""
    worlds = other_worlds(run, Goal("accuracy"), [0.01, 0.5], ["gate0"])
    out = run.examples["label"].str.startswith("oos").to_numpy()
    for prevalence, row in worlds.iterrows():
        weight = np.where(out, prevalence / out.sum(), (1 - prevalence) / (~out).sum())

        def accuracy(threshold, weight=weight):
            answers = run.replay({"gate0": threshold})
            return accuracy_score(answers["label"], answers["predicted"], sample_weight=weight)

        assert accuracy(row["gate0"]) == pytest.approx(row["accuracy"])
        assert row["accuracy"] >= max(map(accuracy, np.linspace(0, 1, 120))) - 1e-9
    assert worlds.loc[0.01, "gate0"] < worlds.loc[0.5, "gate0"]
    bounded = other_worlds(run, Goal("accuracy", at_least={"in_scope_accuracy": 0.999}), [0.5, 0.9], ["gate0"])
    assert bounded.isna().all(axis=1).tolist() == [True, True]
