"""`tune`: that its parts are those of the functions behind it, and what it writes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import memory_run, random_run

from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.exceptions import CascadeLabError, GoalError
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec
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
    tune,
)
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
    assert tuning.intervals == metrics_at(run, choice.thresholds, ACCURACY)
    bootstrap = bootstrap_thresholds(run, ACCURACY, n_resamples=30)
    assert tuning.bootstrap.thresholds.equals(bootstrap.thresholds)
    assert tuning.cross_validation.equals(cross_validate(run, ACCURACY, n_repeats=1))
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
    expected = tuning.bootstrap.thresholds["gate0"].quantile([0.025, 0.5, 0.975]).tolist()
    assert thresholds.loc["gate0", ["low", "median", "high"]].tolist() == pytest.approx(expected)
    assert metrics["value"].to_dict() == pytest.approx(tuning.choice.metrics)
    assert metrics["cross_validated"].equals(tuning.cross_validation["held_out"].rename("cross_validated"))
    assert metrics["test"].equals(tuning.held_out["held_out"].rename("test"))
    assert metrics.loc["accuracy", "chosen_again_low"] == tuning.bootstrap.metrics["accuracy"].low


def test_the_written_cascade_has_the_thresholds_and_where_they_come_from(runs, tuning, tmp_path):
    path = tmp_path / "deep" / "tuned.toml"
    tuning.write(path)
    spec = CascadeSpec.read(path)
    assert spec.thresholds == tuning.choice.thresholds
    tuned_on = spec.tuned_on
    assert set(tuned_on) == {"run_id", "evalset", "goal", "figures", "intervals", "optimism"}
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
    tuning = tune(runs[0], goal, guarantee=("in_scope_accuracy", 0.3), n_repeats=1)
    assert tuning.choice.thresholds == choose_with_guarantee(runs[0], goal, "in_scope_accuracy", 0.3).thresholds
    assert tuning.bootstrap is None
    assert tuning.thresholds[["low", "median", "high"]].isna().all(axis=None)
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
    assert "of the resamples no thresholds satisfy the goal" in text
    # Reject recall and in-scope accuracy do not depend on the prevalence, so accuracy is maximized there.
    assert tuning.prevalence_goal == ACCURACY
    assert "the thresholds to maximize accuracy are: " in text
    assert f"{tuning.by_prevalence.loc[0.5, 'gate0']:.4f}" in text


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
