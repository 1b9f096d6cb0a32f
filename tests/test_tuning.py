"""`tune`: that its parts are those of the functions behind it, and what it writes."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from helpers import logits_of, memory_run, random_run

from cascade_lab.analysis.latency import predicted_latency
from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.exceptions import CascadeLabError, GoalError, InfeasibleError
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import exact
from cascade_lab.thresholds import (
    Choice,
    Goal,
    ThresholdGrid,
    bootstrap_thresholds,
    choose,
    choose_by_prevalence,
    choose_with_guarantee,
    compare_without_gate,
    cross_validate,
    held_out,
    metrics_at,
    per_label_thresholds,
    tune,
)
from cascade_lab.thresholds.resampling import folds
from cascade_lab.thresholds.tuning import write_tuned

ACCURACY = Goal(maximize="accuracy")


def run_with_texts(folder, prefix, **options):
    """Return a random run with texts that no other has."""
    run = random_run(folder, **options)
    texts = [f"{prefix} {i}" for i in range(len(run.examples))]
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    return memory_run(run.spec, run.examples.assign(text=texts), logits)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [run_with_texts(folder / f"{seed}", f"set {seed}", n=200, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def tuning(runs):
    return tune(runs[0], ACCURACY, test=runs[1], n_resamples=30, n_repeats=1)


def test_a_tuning_holds_what_the_single_functions_return(runs, tuning):
    run, test = runs
    choice = choose(run, ACCURACY)
    assert tuning.choice.thresholds == choice.thresholds
    assert tuning.stages == ("gate0", "last")
    at_choice = metrics_at(run, choice.thresholds, ACCURACY)
    assert {name: found.value for name, found in tuning.intervals.items()} == pytest.approx(
        {name: found.value for name, found in at_choice.items()}
    )
    bootstrap = bootstrap_thresholds(run, ACCURACY, n_resamples=30)
    assert tuning.bootstrap.thresholds.equals(bootstrap.thresholds)
    assert tuning.intervals == bootstrap.metrics
    assert tuning.cross_validation.equals(cross_validate(run, ACCURACY, own=tuning.own, n_repeats=1))
    assert tuning.held_out.equals(held_out(run, test, choice.thresholds, ACCURACY))
    assert tuning.by_prevalence.equals(choose_by_prevalence(run, ACCURACY, [0.01, 0.1, 0.5]))
    assert tuning.without_gate.equals(compare_without_gate(run, test, ACCURACY))
    assert tuning.guarantee is None
    assert tuning.per_label is None


def test_the_tables_of_a_tuning_join_its_parts(tuning):
    thresholds, metrics = tuning.thresholds, tuning.metrics
    assert thresholds["chosen"].to_dict() == tuning.choice.thresholds
    assert thresholds.loc["gate0", "own"] == 0.5
    assert np.isnan(thresholds.loc["last", "own"])
    assert metrics["value"].to_dict() == pytest.approx(tuning.choice.metrics)
    assert metrics["cross_validated"].equals(tuning.cross_validation["held_out"].rename("cross_validated"))
    assert metrics["test"].equals(tuning.held_out["held_out"].rename("test"))
    assert metrics.loc["accuracy", ["value", "low", "high"]].tolist() == [*tuning.bootstrap.metrics["accuracy"]]


def test_the_written_cascade_has_the_thresholds_and_where_they_come_from(runs, tuning, tmp_path):
    path = tmp_path / "deep" / "tuned.toml"
    tuning.write(path)
    spec = CascadeSpec.read(path)
    assert spec.thresholds == tuning.choice.thresholds
    tuned_on = spec.tuned_on
    assert set(tuned_on) == {"run_id", "evalset", "goal", "figures", "intervals", "gain", "optimism"}
    assert tuned_on["run_id"] == runs[0].manifest["run_id"]
    assert tuned_on["evalset"] == {"path": "random.tsv", "sha256": f"{0:064x}", "n_examples": 200}
    assert tuned_on["goal"] == "maximize accuracy"
    assert tuned_on["figures"] == tuning.choice.metrics
    assert tuned_on["intervals"]["accuracy"] == [tuning.intervals["accuracy"].low, tuning.intervals["accuracy"].high]
    assert tuned_on["optimism"] == tuning.cross_validation["optimism"].to_dict()
    predictions = runs[0].with_spec(spec).predictions
    assert outcome_counts(spec, predictions).tolist() == tuning.choice.counts.tolist()
    assert [file.name for file in path.parent.iterdir()] == ["tuned.toml"]
    with pytest.raises(CascadeLabError, match="exists already"):
        tuning.write(path)
    tuning.write(path, overwrite=True)


def test_a_guarantee_and_costs_are_written(runs, tmp_path):
    goal = Goal(minimize="mean_cost", costs={"false accept": 5.0, "false reject": 1.0}, prevalence=0.2)
    tuning = tune(runs[0], goal, guarantee={"in_scope_accuracy": 0.3}, n_repeats=1)
    assert tuning.choice.thresholds == choose_with_guarantee(runs[0], goal, {"in_scope_accuracy": 0.3}).thresholds
    assert tuning.bootstrap.infeasible < 1
    tuned_on = tuning.spec.tuned_on
    assert tuned_on["guarantee"] == "in_scope_accuracy at least 0.3 with probability 0.9"
    assert (tuned_on["costs"], tuned_on["prevalence"]) == ({"false accept": 5.0, "false reject": 1.0}, 0.2)
    assert "Guarantee: in_scope_accuracy at least 0.3 with probability 0.9." in tuning.summary()


def test_thresholds_per_label_are_written_if_they_improve(tmp_path):
    """Texts with one predicted label are all right, those with the other all out of scope."""
    run = random_run(tmp_path / "r", n=200, n_labels=2, seed=1, skill=0.0)
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    options = {"by_label": True, "n_resamples": 5, "n_repeats": 1, "stages": ["last"]}
    assert not tune(run, ACCURACY, **options).spec.last.min_probabilities
    labels = np.where(logits["last"].argmax(axis=1) == 0, "label0", "oos0")
    tuning = tune(memory_run(run.spec, run.examples.assign(label=labels), logits), ACCURACY, **options)
    assert tuning.per_label.improves
    assert tuning.spec.last.min_probabilities == tuning.per_label.min_probabilities
    assert tuning.spec.tuned_on["by_label"].startswith(f"a gain of {tuning.per_label.gain.value:.4f} (")
    assert any("A threshold per label is used" in sentence for sentence in tuning.summary())


def labels_differ(folder, prefix, *, n_gates=1, seed=1, n=200):
    """Return a run of texts with one predicted label that are nearly all right, others nearly all out of scope.

    For half of the seeds the cascade has a minimum for all labels and others for some of them.
    """
    run, rng = random_run(folder, n=n, n_gates=n_gates, n_labels=3, seed=seed), np.random.default_rng(seed)
    answers = run.scores("last").logits.argmax(axis=1)
    labels = np.where(answers == 0, "label0", np.where(answers == 1, "oos0", run.examples["label"]))
    labels = np.where(rng.random(n) < 0.1, run.examples["label"], labels)
    spec = run.spec
    if seed % 2:
        minimums = {"label0": float(rng.uniform(0.5, 0.9)), "label2": float(rng.choice([0.0, 0.6, 1.0]))}
        last = replace(spec.last, min_probability=0.3, min_probabilities=minimums)
        spec = replace(spec, stages=(*spec.stages[:-1], last))
    texts = [f"{prefix} {i}" for i in range(n)]
    return memory_run(spec, run.examples.assign(label=labels, text=texts), logits_of(run))


BY_LABEL, GUARANTEE = [False, True], [None, {"in_scope_accuracy": 0.2}, {"reject_recall": 0.1}]
STAGES = [(1, None), (1, ["gate0"]), (1, ["last"]), (0, None), (2, None), (2, ["gate1", "last"])]
SETTINGS = [{}, {"prevalence": 0.2}, {"costs": {"false accept": 5.0, "false reject": 1.0}}]
SETTINGS.append({**SETTINGS[1], **SETTINGS[2]})
BOUNDS = ["none", "at least", "at most", "latency"]


def goal_of(run, settings, bounds, *, seed):
    """Return a goal with these settings and bounds, which are met at some thresholds."""
    metric = {"minimize": "mean_cost"} if "costs" in settings else {"maximize": ["accuracy", "reject_recall"][seed % 2]}
    at_least = {"in_scope_accuracy": 0.25} if bounds == "at least" else {}
    at_most = {"mean_cost": 4.0} if bounds == "at most" and "costs" in settings else {}
    if bounds == "latency":
        at_most["mean_ms"] = float(predicted_latency(run, 0.95)["mean_ms"][0])
    return Goal(**metric, at_least=at_least, at_most=at_most, **settings)


def fraction_beyond(run, spec, goal):
    """Return the fraction of texts beyond the first stage of the written cascade, at the goal's prevalence."""
    beyond = (run.with_spec(spec).predictions["decided_by"] != spec.stages[0].name).to_numpy()
    out_of_scope = ~run.examples["label"].isin(spec.in_scope_labels).to_numpy()
    prevalence = out_of_scope.mean() if goal.prevalence is None else goal.prevalence
    return (1 - prevalence) * beyond[~out_of_scope].mean() + prevalence * beyond[out_of_scope].mean()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return a tuning run and a test run of a cascade, for each number of gates and four seeds."""
    folder, made = tmp_path_factory.mktemp("pairs"), {}
    for n_gates, seed in itertools.product(range(3), range(4)):
        run, test = (
            labels_differ(folder / f"{n_gates}-{seed}-{name}", name, n_gates=n_gates, seed=seed + 100 * k, n=80)
            for k, name in enumerate(("run", "test"))
        )
        # The test run was made with another temperature, which is not that of the tuned cascade.
        last = replace(run.spec.last, temperature=2.0)
        made[n_gates, seed] = run, test.with_spec(replace(run.spec, stages=(*run.spec.stages[:-1], last)))
    return made


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(("n_gates", "stages"), STAGES, ids=str)
def test_what_is_written_is_what_the_written_cascade_does(tmp_path, pairs, n_gates, stages, bounds):
    """Every number of a tuning is found again in a replay of the file, whatever the options.

    Of three stages, which take the longest, every third combination is tried.
    """
    n_tuned, n_per_label = 0, 0
    combinations = list(itertools.product(BY_LABEL, GUARANTEE, SETTINGS))
    chosen_ones = range(BOUNDS.index(bounds) % 3, 24, 3) if n_gates == 2 else range(24)
    for seed, (by_label, guarantee, settings) in [(seed, combinations[seed]) for seed in chosen_ones]:
        run, test = pairs[n_gates, (seed + seed // 4) % 4]
        goal = goal_of(run, settings, bounds, seed=seed)
        options = {"stages": stages, "guarantee": guarantee, "by_label": by_label, "n_resamples": 2, "n_repeats": 1}
        options["prevalences"] = (0.5,) if seed == 0 else ()
        if by_label and guarantee and bounds != "latency":
            with pytest.raises(GoalError, match=r"leave out guarantee \(--guarantee\) or by_label \(--by-label\)"):
                tune(run, goal, **options)
            continue
        if bounds == "latency" and (by_label or guarantee):
            with pytest.raises(GoalError, match=r"bound on a latency|cannot be chosen for mean_ms"):
                tune(run, goal, **options)
            continue
        tuning = None
        with suppress(InfeasibleError):
            tuning = tune(run, goal, test=test, **options)
        if tuning is None:
            continue
        n_tuned, n_per_label = n_tuned + 1, n_per_label + tuning.uses_per_label
        path = tmp_path / f"{seed}.toml"
        tuning.write(path)
        spec = CascadeSpec.read(path)
        counts, on_test = (outcome_counts(spec, r.with_spec(spec).predictions).to_numpy() for r in (run, test))
        assert spec.tuned_on.get("notes", []) == tuning.notes
        assert spec.tuned_on["optimism"] == pytest.approx(tuning.cross_validation["optimism"].dropna().to_dict())
        assert set(spec.tuned_on["figures"]) == {m for m in goal.metrics if not np.isnan(goal.value(m, counts))}
        for name in goal.metrics:
            value = float(goal.value(name, counts))
            assert spec.tuned_on["figures"].get(name, np.nan) == pytest.approx(value, abs=1e-12, nan_ok=True)
            row = tuning.metrics.loc[name]
            assert row["value"] == pytest.approx(value, nan_ok=True)
            assert row["test"] == pytest.approx(float(goal.value(name, on_test)), nan_ok=True)
            assert tuning.held_out.loc[name, "tuned"] == pytest.approx(value, nan_ok=True)
            if name in spec.tuned_on["intervals"]:
                low, high = spec.tuned_on["intervals"][name]
                assert low - 1e-12 <= value <= high + 1e-12
        for name, least in [*goal.at_least.items(), *(guarantee or {}).items()]:
            assert spec.tuned_on["figures"][name] >= least
        if "mean_cost" in goal.at_most:
            assert spec.tuned_on["figures"]["mean_cost"] <= goal.at_most["mean_cost"]
        if bounds == "latency":
            reach = fraction_beyond(run, spec, goal)
            assert float(predicted_latency(run, reach)["mean_ms"][0]) <= goal.at_most["mean_ms"] + 1e-9
        chosen = tuning.thresholds["chosen"].dropna().to_dict()
        assert {name: value for name, value in spec.thresholds.items() if name in chosen} == chosen
        if tuning.uses_per_label:
            assert spec.last.min_probability is None
        if tuning.without_gate is not None:
            assert tuning.without_gate.loc["cascade", goal.metric] == pytest.approx(
                float(goal.value(goal.metric, on_test)), nan_ok=True
            )
        value = tuning.metrics.loc[goal.metric, "value"]
        assert f"{value:.4f} on the 80 tuning texts" in "\n".join(tuning.summary())
        assert f"{value:.4f}" in repr(tuning)
    assert n_tuned >= (1 if n_gates == 2 or bounds == "latency" else 6)
    # With the last stage at the run's own threshold, one per label is seldom better on so few texts.
    assert n_per_label or n_gates == 2 or bounds == "latency" or stages == ["gate0"]


def test_with_a_guarantee_cross_validation_is_of_the_guaranteed_choice(runs):
    """On each fold it is a choice with the guarantee on the other texts alone, and a replay."""
    run, guarantee = runs[0], {"in_scope_accuracy": 0.3}
    goal = Goal(maximize="reject_recall")
    tuning = tune(run, goal, guarantee=guarantee, n_repeats=2)
    rows = []
    for train, test in folds(tuning.grid, 2, 5, 0):
        try:
            thresholds = choose_with_guarantee(run.select(np.flatnonzero(train)), goal, guarantee).thresholds
        except InfeasibleError:
            continue
        parts = [run.select(np.flatnonzero(weights)).replay(thresholds) for weights in (train, test)]
        counts = [outcome_counts(run.spec, part).to_numpy() for part in parts]
        rows.append(counts)
    assert len(rows) > 5
    expected = np.array([goal.value(name, np.sum(rows, axis=0)) for name in goal.metrics])
    table = tuning.cross_validation
    assert table.attrs == {"n_folds": 10, "n_infeasible": 10 - len(rows)}
    assert table[["tuned", "held_out"]].to_numpy() == pytest.approx(expected)
    assert tuning.spec.tuned_on["optimism"] == pytest.approx(
        dict(zip(goal.metrics, -np.diff(expected)[:, 0], strict=True))
    )
    plain = cross_validate(run, goal, n_repeats=2)
    assert table.loc["in_scope_accuracy", "held_out"] > plain.loc["in_scope_accuracy", "held_out"] + 0.05


def test_with_thresholds_per_label_cross_validation_is_of_them(tmp_path):
    """On each fold, thresholds are chosen on the other texts, then one per label, and replayed."""
    run = labels_differ(tmp_path / "r", "run", seed=3)
    tuning = tune(run, ACCURACY, by_label=True, n_resamples=2, n_repeats=1)
    assert tuning.uses_per_label
    assert np.isnan(tuning.thresholds.loc["last", "chosen"])
    assert tuning.bootstrap.thresholds["last"].isna().all()
    assert tuning.bootstrap.thresholds["gate0"].notna().all()
    assert "last per label" in repr(tuning)
    accuracy = {"tuned": [], "held_out": []}
    for train, test in folds(tuning.grid, 1, 5, 0):
        on = run.select(np.flatnonzero(train))
        thresholds = choose(on, ACCURACY).thresholds
        spec = per_label_thresholds(on, ACCURACY, thresholds, n_repeats=1).apply(run.spec.with_thresholds(thresholds))
        for part, weights in (("tuned", train), ("held_out", test)):
            predictions = run.select(np.flatnonzero(weights)).with_spec(spec).predictions
            accuracy[part].append((predictions["label"] == predictions["predicted"]).mean())
    row = tuning.cross_validation.loc["accuracy"]
    # The best accuracy per label at the chosen gate is unique; which of equally good gates is chosen is not.
    assert row["tuned"] == pytest.approx(np.mean(accuracy["tuned"]), abs=0.005)
    assert row["held_out"] == pytest.approx(np.mean(accuracy["held_out"]), abs=0.02)
    plain = cross_validate(run, ACCURACY, n_repeats=1)
    assert row["held_out"] > plain.loc["accuracy", "held_out"] + 0.05


def test_a_last_stage_that_alone_cannot_satisfy_the_goal_is_not_compared(tmp_path):
    """The last stage is sure of every text; only the gate rejects."""
    runs = [run_with_texts(tmp_path / f"{k}", f"set {k}", n=200, seed=k) for k in range(2)]
    sure = []
    for run in runs:
        logits = logits_of(run)
        logits["last"] = np.where(logits["last"] == logits["last"].max(axis=1, keepdims=True), 900, -900)
        sure.append(memory_run(run.spec, run.examples, {name: np.float32(x) for name, x in logits.items()}))
    goal = Goal("in_scope_accuracy", at_least={"reject_recall": 0.2})
    for options in ({}, {"guarantee": {"reject_recall": 0.1}}):
        tuning = tune(sure[0], goal, test=sure[1], n_resamples=2, n_repeats=1, **options)
        assert tuning.without_gate is None
        assert tuning.not_compared.endswith("stage last alone satisfies the goal at no threshold.")
        assert "with the gates" not in "".join(tuning.summary())


def test_a_last_stage_that_cannot_reject_is_not_compared_and_the_key_to_add_is_named(tmp_path):
    runs = [run_with_texts(tmp_path / f"{k}", f"set {k}", n=60, seed=k) for k in range(2)]
    spec = runs[0].spec
    spec = replace(spec, stages=(*spec.stages[:-1], replace(spec.last, reject_label=None)))
    tuned, test = (memory_run(spec, run.examples, logits_of(run)) for run in runs)
    tuning = tune(tuned, ACCURACY, test=test, n_resamples=2, n_repeats=1)
    assert tuning.without_gate is None
    assert 'Add reject_label = "oos0" to its table in cascade.toml' in tuning.not_compared
    assert tuning.not_compared in tuning.summary()
    assert tuning.not_compared not in tune(tuned, ACCURACY, n_resamples=2, n_repeats=1).summary()


def test_a_test_run_of_other_stages_is_refused(runs, tmp_path):
    other = run_with_texts(tmp_path / "r", "other", n=50, n_gates=2, seed=3)
    with pytest.raises(CascadeLabError, match="give a run of the same cascade on other texts"):
        tune(runs[0], ACCURACY, test=other, n_resamples=2, n_repeats=1)


def test_three_stages_are_tuned(tmp_path):
    runs = [run_with_texts(tmp_path / f"{k}", f"set {k}", n=80, n_gates=2, seed=k) for k in range(2)]
    tuning = tune(runs[0], ACCURACY, test=runs[1], n_resamples=5, n_repeats=1)
    assert list(tuning.choice.thresholds) == ["gate0", "gate1", "last"]
    assert len(tuning.thresholds) == 3
    assert tuning.by_prevalence.columns[:3].tolist() == ["gate0", "gate1", "last"]
    assert len(tuning.without_gate) == 2


def test_the_summary_tells_of_broken_bounds_and_of_prevalences(runs):
    """The bound is the best that the tuning set allows, so other texts and resamples break it."""
    best = [choose(run, Goal("in_scope_accuracy")).metrics["in_scope_accuracy"] for run in runs]
    tuned, test = runs if best[0] > best[1] else reversed(runs)
    goal = Goal("reject_recall", at_least={"in_scope_accuracy": max(best)})
    tuning = tune(tuned, goal, test=test, n_resamples=40, n_repeats=1)
    text = "\n".join(tuning.summary())
    assert "In scope accuracy breaks its bound of at least" in text
    assert "A guarantee makes a bound hold on new texts too" in text
    assert f"{tuning.held_out.loc['reject_recall', 'held_out']:.4f}" in text
    assert "of the resamples no thresholds satisfy the goal, so the metrics have no interval." in text
    n_infeasible = tuning.cross_validation.attrs["n_infeasible"]
    assert 0 < n_infeasible < 5
    assert f"On {n_infeasible} of 5 folds of the cross-validation none of the tried thresholds satisfies" in text
    assert tuning.spec.tuned_on["notes"] == tuning.notes
    assert set(tuning.notes) < set(tuning.summary())
    # Reject recall and in-scope accuracy do not depend on the prevalence, so accuracy is maximized there.
    assert tuning.prevalence_goal == ACCURACY
    assert "the thresholds to maximize accuracy are: " in text
    assert f"gate0 {exact(tuning.by_prevalence.loc[0.5, 'gate0'])}" in text


def test_without_a_test_run_the_parts_that_need_one_are_absent(runs):
    tuning = tune(runs[0], ACCURACY, n_resamples=5, n_repeats=1)
    assert tuning.test is tuning.held_out is tuning.without_gate is None
    assert "test" not in tuning.metrics
    assert not any("test texts" in sentence for sentence in tuning.summary())


def test_a_tuning_shows_itself(tuning):
    assert repr(tuning).count("\n") == 0
    assert "maximize accuracy" in repr(tuning)
    html = tuning._repr_html_()
    assert html.count("<table") == 2
    assert f"{tuning.choice.metrics['accuracy']:.4f}" in html


def test_the_tuning_set_is_refused_as_test_set(runs):
    with pytest.raises(GoalError, match="report on a run of another set"):
        tune(runs[0], ACCURACY, test=runs[0])


def test_logits_from_elsewhere_are_tuned(runs):
    run, _ = runs
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    imported = Run.from_logits(run.spec, run.examples[["text", "label"]], logits)
    tuning = tune(imported, ACCURACY, n_resamples=5, n_repeats=1)
    assert tuning.choice.thresholds == choose(run, ACCURACY).thresholds
    assert tuning.spec.tuned_on["run_id"] == imported.manifest["run_id"]


def test_thresholds_chosen_by_hand_are_written(runs, tmp_path):
    run, _ = runs
    counts = ThresholdGrid.from_run(run).counts_at(np.array([0.3]), np.array([0.2]))[0, 0]
    choice = Choice({"gate0": 0.3, "last": 0.2}, counts, {"accuracy": 0.5, "risk": np.nan})
    write_tuned(run, choice, "chosen by hand", tmp_path / "tuned.toml")
    spec = CascadeSpec.read(tmp_path / "tuned.toml")
    assert spec.thresholds == choice.thresholds
    assert spec.tuned_on["goal"] == "chosen by hand"
    assert spec.tuned_on["figures"] == {"accuracy": 0.5}
