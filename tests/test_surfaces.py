"""Sweeps and surfaces, against replays at each of their thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grid import with_minimums

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.exceptions import RunError
from cascade_lab.thresholds import Goal, ThresholdGrid, surface, sweep

COSTS = {"false reject": 1.0, "false accept": 5.0, "wrong class": 2.0, "right": -0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "two", n=150, seed=3)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(1, 3))
def test_a_sweep_equals_replays(tmp_path_factory, seed, n_gates):
    """Every metric, macro F1 included, at thresholds of the table and just above the one before."""
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=60, n_gates=n_gates, seed=seed)
    run = with_minimums(run, seed) if seed % 2 else run
    rng = np.random.default_rng(seed)
    goal = Goal(minimize="mean_cost", costs=COSTS)
    for stage in [f"gate{rng.integers(n_gates)}", "last"]:
        table = sweep(run, stage, goal=goal)
        for row in rng.choice(table.to_dict("records"), 5):
            reached = run.with_thresholds({stage: row["threshold"]}).decision(stage).above
            arrived = ~run.with_thresholds({stage: row["threshold"]}).scores(stage).shadow
            assert row["reach"] == pytest.approx((arrived & reached).mean())
            before = table["threshold"][table["threshold"] < row["threshold"]].max()
            for threshold in [row["threshold"], *([] if np.isnan(before) else [np.nextafter(before, 1)])]:
                predictions = run.replay({stage: threshold})
                counts = outcome_counts(run.spec, predictions)
                assert counts.to_dict() == {name: row[name] for name in OUTCOMES}
                assert row["mean_cost"] == pytest.approx(float(goal.value("mean_cost", counts.to_numpy())))
                for name, value in prediction_metrics(run.spec, predictions).items():
                    assert row[name] == pytest.approx(value, nan_ok=True), name


def test_reach_is_the_fraction_that_arrives_at_the_next_stage(run):
    table = sweep(run, "gate0")
    for row in table.iloc[np.random.default_rng(0).integers(0, len(table), 50)].to_dict("records"):
        predictions = run.replay({"gate0": row["threshold"]})
        assert row["accuracy"] == (predictions["label"] == predictions["predicted"]).mean()
        assert row["reach"] == pytest.approx((predictions["decided_by"] == "last").mean())


def test_a_sweep_fixes_the_other_stages_where_it_is_told(run):
    table = sweep(run, "last", thresholds={"gate0": 0.8})
    row = table.iloc[len(table) // 2]
    predictions = run.replay({"gate0": 0.8, "last": row["threshold"]})
    assert row["accuracy"] == (predictions["label"] == predictions["predicted"]).mean()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(1, 3))
def test_a_surface_equals_replays(tmp_path_factory, seed, n_gates):
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=60, n_gates=n_gates, seed=seed)
    run = with_minimums(run, seed) if seed % 2 else run
    rng = np.random.default_rng(seed)
    stages = [f"gate{rng.integers(n_gates)}", "last"]
    table = surface(run, stages)
    assert table.exact
    for _ in range(10):
        i, j = rng.integers(len(table.first)), rng.integers(len(table.second))
        predictions = run.replay({stages[0]: table.first[i], stages[1]: table.second[j]})
        assert outcome_counts(run.spec, predictions).tolist() == table.counts[i, j].tolist()


def test_a_coarse_surface_is_exact_at_its_thresholds(run):
    table = surface(run, max_lines=7)
    assert not table.exact
    assert table.counts.shape == (7, 7, 6)
    predictions = run.replay({"gate0": table.first[3], "last": table.second[5]})
    assert outcome_counts(run.spec, predictions).tolist() == table.counts[3, 5].tolist()
    assert table.metric("accuracy")[3, 5] == (predictions["label"] == predictions["predicted"]).mean()
    of_grid = surface(run, grid=ThresholdGrid.from_run(run), max_lines=7)
    assert (of_grid.counts == table.counts).all()


def test_a_surface_of_one_stage_is_its_sweep(run):
    table = surface(run, ["gate0"])
    assert table.second.tolist() == [0.0]
    assert (table.counts[:, 0] == sweep(run, "gate0")[list(OUTCOMES)].to_numpy()).all()


def test_a_surface_of_three_stages_is_refused(tmp_path):
    with pytest.raises(RunError, match="name two of gate0, gate1, last"):
        surface(random_run(tmp_path / "three", n=30, n_gates=2))
