"""The outcomes that a grid counts, against replays at the same thresholds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import memory_run, mixed_run, random_run
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.exceptions import RunError
from cascade_lab.thresholds import ThresholdGrid


def replayed(run, thresholds):
    return outcome_counts(run.spec, run.replay(thresholds)).tolist()


def with_minimums(run, seed):
    """Return the run with a random minimum for all labels, and others for some of them."""
    rng, last = np.random.default_rng(seed), run.spec.last
    minimums = {label: float(rng.choice([0, rng.random(), 1])) for label in last.labels if rng.random() < 0.5}
    last = replace(last, min_probability=float(rng.random()), min_probabilities=minimums)
    return run.with_spec(replace(run.spec, stages=(*run.spec.stages[:-1], last)))


def logits_of(run):
    return {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(0, 3))
def test_outcomes_at_all_thresholds_equal_a_replay(tmp_path_factory, seed, n_gates):
    """At indices, and at any number between two confidences, with any of the stages moving."""
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=50, n_gates=n_gates, seed=seed)
    rng = np.random.default_rng(seed)
    names = [stage.name for stage in run.spec.stages]
    stages = [name for name in names if rng.random() < 0.7] or names[-1:]
    fixed = {name: float(rng.random()) for name in names if name not in stages}
    grid = ThresholdGrid.from_run(run, stages, fixed)
    for _ in range(4):
        thresholds = {name: float(rng.random()) for name in stages}
        indices = grid.indices(thresholds)
        counts = np.bincount(grid.outcomes_at(indices), minlength=len(OUTCOMES)).tolist()
        assert counts == replayed(run, {**fixed, **thresholds})
        assert counts == replayed(run, {**fixed, **grid.thresholds_at(indices)})


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(0, 3))
def test_minimums_by_label_do_not_move_with_the_threshold(tmp_path_factory, seed, n_gates):
    """At every threshold of the last stage, the grid counts what a replay does, whatever else moves."""
    rng = np.random.default_rng(seed)
    if n_gates and rng.random() < 0.5:
        run = mixed_run(seed)
    else:
        folder = tmp_path_factory.mktemp("runs") / "r"
        run = with_minimums(random_run(folder, n=50, n_gates=n_gates, seed=seed), seed)
    if not run.spec.last.reject_labels:
        return
    gates = [stage.name for stage in run.spec.stages[:-1]]
    stages = [*(name for name in gates if rng.random() < 0.5), "last"]
    grid = ThresholdGrid.from_run(run, stages)
    fixed = {name: float(rng.choice([0, rng.random(), 1])) for name in stages[:-1]}
    last = grid.fix({name: grid.indices({**fixed, "last": 0})[k] for k, name in enumerate(stages[:-1])})
    values = np.unique([0.0, 1.0, *last.thresholds[0], *run.spec.last.min_probabilities.values(), *rng.random(5)])
    counts = last.counts_at(values)
    for value, counted in zip(values, counts, strict=True):
        assert counted.tolist() == replayed(run, {**fixed, "last": value})
        indices = grid.indices({**fixed, "last": value})
        assert np.bincount(grid.outcomes_at(indices), minlength=len(OUTCOMES)).tolist() == counted.tolist()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(1, 3))
def test_counts_equal_replays_with_other_stages_fixed(tmp_path_factory, seed, n_gates):
    """Two stages move; the others are fixed on the grid."""
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=50, n_gates=n_gates, seed=seed)
    rng = np.random.default_rng(seed)
    grid = ThresholdGrid.from_run(run)
    moving = sorted(rng.choice(len(grid.stages), 2, replace=False))
    at = grid.indices({stage: float(rng.random()) for stage in grid.stages})
    fixed = {stage: at[k] for k, stage in enumerate(grid.stages) if k not in moving}
    pair = grid.fix(fixed)
    counted = pair.count(pair.subsample(6))
    is_below = grid.ranks[0] <= at[0]
    n_held = [is_below[mask].sum() for mask in (grid.in_scope, ~grid.in_scope)]
    for i, first in enumerate(pair.subsample(6)[0]):
        for j, second in enumerate(pair.subsample(6)[1]):
            indices = list(at)
            indices[moving[0]], indices[moving[1]] = first, second
            assert counted.counts[i, j].tolist() == replayed(run, grid.thresholds_at(indices))
    if 0 not in moving:  # a fixed first stage holds back the same texts at every pair
        assert (counted.n_held == n_held).all()


def test_thresholds_between_confidences_count_as_the_next_higher_one(tmp_path):
    run = random_run(tmp_path / "r", n=150, seed=2)
    grid = ThresholdGrid.from_run(run)
    first, second = np.array([0.0, 0.31, 0.311, 1.0]), np.array([0.2, 0.5])
    counts = grid.counts_at(first, second)
    for i, gate in enumerate(first):
        for j, last in enumerate(second):
            assert counts[i, j].tolist() == replayed(run, {"gate0": gate, "last": last})
    alone = ThresholdGrid.from_run(run, ["last"], {"gate0": 0.31})
    assert alone.counts_at(second).tolist() == counts[1].tolist()


def test_weights_count_as_repeated_texts(tmp_path):
    grid = ThresholdGrid.from_run(random_run(tmp_path / "r", n=80, seed=2))
    times = np.random.default_rng(0).integers(0, 4, 80)
    repeated = grid.select(np.repeat(np.arange(80), times))
    for weighted, plain in zip(
        grid.count(grid.subsample(9), weights=times), repeated.count(grid.subsample(9)), strict=True
    ):
        assert (weighted == plain).all()


def test_a_subsample_by_scope_serves_both_kinds_of_text(tmp_path):
    """Half of the thresholds are among the confidences of texts out of scope, although these are few."""
    run = random_run(tmp_path / "r", n=400, n_labels=20, seed=2)
    grid = ThresholdGrid.from_run(run)
    assert (~grid.in_scope).sum() < 60
    for indices, values, ranks in zip(grid.subsample_by_scope(40), grid.thresholds, grid.ranks, strict=True):
        assert (np.diff(indices) > 0).all()
        assert (indices[0], indices[-1]) == (0, len(values) - 1)
        assert len(indices) <= 42
        is_chosen = np.isin(ranks, indices)
        assert min(is_chosen[grid.in_scope].sum(), is_chosen[~grid.in_scope].sum()) >= 18


def test_unlabelled_texts_are_left_out(tmp_path):
    run = random_run(tmp_path / "r", n=60, seed=1)
    labels = run.examples["label"].where(np.arange(60) % 3 > 0, None)
    partly = memory_run(run.spec, run.examples.assign(label=labels), logits_of(run))
    labelled = run.select(np.flatnonzero(np.arange(60) % 3))
    grid = ThresholdGrid.from_run(partly)
    assert len(grid.in_scope) == 40
    expected = ThresholdGrid.from_run(labelled).counts_at(np.array([0.4]), np.array([0.5]))
    assert (grid.counts_at(np.array([0.4]), np.array([0.5])) == expected).all()


def test_stages_that_are_refused(tmp_path):
    run = random_run(tmp_path / "two", n=30)
    with pytest.raises(RunError, match="in order: gate0, last"):
        ThresholdGrid.from_run(run, ["last", "gate0"])
    with pytest.raises(RunError, match="name each once"):
        ThresholdGrid.from_run(run, ["last", "last"])
    with pytest.raises(RunError, match="no stage can reject"):
        ThresholdGrid.from_run(run, [])
    three = ThresholdGrid.from_run(random_run(tmp_path / "three", n=30, n_gates=2))
    with pytest.raises(RunError, match="one or two stages, not of 3"):
        three.count(three.subsample(5))


def test_a_run_without_shadow_scores_is_refused(tmp_path):
    run = random_run(tmp_path / "r", n=60)
    served = memory_run(run.spec, run.examples, logits_of(run), shadow=False)
    with pytest.raises(RunError, match=r"stage 'last' never scored .* shadow scores"):
        ThresholdGrid.from_run(served)
