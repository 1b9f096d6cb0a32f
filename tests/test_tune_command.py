"""`cascade-lab tune`, from a run to a cascade.toml, without TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_run
from test_tuning import labels_differ
from typer.testing import CliRunner

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.cli import app
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "one", n=200, seed=4)


def tune(*arguments):
    return CliRunner().invoke(app, ["tune", *(str(argument) for argument in arguments)])


def test_tune_writes_the_cascade_that_satisfies_the_goal(run, tmp_path):
    goal = ["--maximize", "reject_recall", "--at-least", "in_scope_accuracy=0.4"]
    result = tune(run.directory, *goal, "--output", tmp_path / "t.toml")
    assert result.exit_code == 0, result.output
    spec = CascadeSpec.read(tmp_path / "t.toml")
    replayed = Run.read(run.directory).replay(spec.thresholds)
    in_scope = replayed["label"].isin(spec.in_scope_labels)
    right = replayed["label"] == replayed["predicted"]
    assert right[in_scope].mean() >= 0.4
    assert spec.tuned_on["figures"]["reject_recall"] == pytest.approx(right[~in_scope].mean())
    low, high = spec.tuned_on["intervals"]["reject_recall"]
    assert low <= right[~in_scope].mean() <= high
    assert "held out (cross-validation)" in result.output
    assert f"{right[~in_scope].mean():.4f}" in result.output
    assert max(map(len, result.output.replace(str(tmp_path), "").splitlines())) <= 80


def test_tune_takes_costs_a_guarantee_and_labels(run, tmp_path):
    output = tmp_path / "t.toml"
    costs = ["--minimize", "mean_cost", "--cost", "false accept=5", "--cost", "false reject=1", "--by-label"]
    assert tune(run.directory, *costs, "--output", output).exit_code == 0
    goal = ["--maximize", "reject_recall", "--guarantee", "in_scope_accuracy=0.3"]
    result = tune(run.directory, *goal, "--overwrite", "--output", output)
    assert result.exit_code == 0, result.output
    assert CascadeSpec.read(output).tuned_on["guarantee"] == "in_scope_accuracy at least 0.3 with probability 0.9"


def test_the_metrics_printed_with_thresholds_per_label_are_those_of_the_written_cascade(tmp_path):
    run = labels_differ(tmp_path / "r", "run", seed=3).write(tmp_path / "run")
    result = tune(run.directory, "--maximize", "accuracy", "--by-label", "--output", tmp_path / "t.toml")
    assert result.exit_code == 0, result.output
    spec = CascadeSpec.read(tmp_path / "t.toml")
    assert spec.last.min_probabilities
    printed = {line.split()[0]: line.split()[1] for line in result.output.splitlines() if len(line.split()) > 1}
    assert printed["last"] == "per"
    for name, value in prediction_metrics(spec, run.with_spec(spec).predictions).items():
        if name != "macro_f1":
            assert printed[name] == f"{value:.4f}"
            assert spec.tuned_on["figures"][name] == pytest.approx(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--maximize", "accuracy", "--guarantee", "in_scope_accuracy=0.3", "--by-label"], "leave out guarantee (--gu"),
        ([], "one metric to maximize or to minimize"),
        (["--maximize", "reject_recal"], "did you mean 'reject_recall'"),
        (["--maximize", "accuracy", "--at-least", "coverage"], "is not NAME=NUMBER"),
        (["--maximize", "accuracy", "--at-least", "in_scope_accuracy=0.999"], "infeasible"),
        (["--maximize", "accuracy", "--stage", "gat0"], "did you mean 'gate0'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_and_nothing_is_written(run, tmp_path, arguments, message):
    result = tune(run.directory, *arguments, "--output", tmp_path / "t.toml")
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_texts_on_which_the_metric_is_undefined_are_refused(run, tmp_path):
    in_scope = run.select(np.flatnonzero(run.examples["label"].str.startswith("label"))).write(tmp_path / "in-scope")
    refused = tune(in_scope.directory, "--maximize", "reject_recall", "--output", tmp_path / "t.toml")
    assert refused.exit_code == 2
    assert "reject_recall is undefined on these texts" in refused.output
    bound = ["--maximize", "accuracy", "--at-least", "in_scope_accuracy=0.999"]
    refused = tune(in_scope.directory, *bound, "--output", tmp_path / "t.toml")
    assert "the nearest, gate0 " in refused.output
    assert refused.output.rstrip().endswith("ask for less")
    assert not (tmp_path / "t.toml").exists()
