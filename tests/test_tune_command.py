"""`cascade-lab tune`, from a run to a cascade.toml, without TensorFlow."""

from __future__ import annotations

import pytest
from random_runs import random_run
from typer.testing import CliRunner

from cascade_lab.cli import app
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "one", n=200, seed=4)


def tune(*arguments):
    return CliRunner().invoke(app, ["tune", *(str(argument) for argument in arguments)])


def test_tune_writes_the_cascade_that_serves_the_goal(run, tmp_path):
    said = tune(
        run.directory,
        "--maximize",
        "reject_recall",
        "--at-least",
        "in_scope_accuracy=0.4",
        "--output",
        tmp_path / "t.toml",
    )
    assert said.exit_code == 0, said.output
    spec = CascadeSpec.read(tmp_path / "t.toml")
    replayed = Run.read(run.directory).replay(spec.thresholds)
    in_scope = replayed["label"].isin(spec.in_scope_labels)
    right = replayed["label"] == replayed["predicted"]
    assert right[in_scope].mean() >= 0.4
    assert spec.tuned_on["figures"]["reject_recall"] == pytest.approx(right[~in_scope].mean())
    low, high = spec.tuned_on["intervals"]["reject_recall"]
    assert low <= right[~in_scope].mean() <= high
    assert "by cross-validation" in said.output


def test_tune_takes_costs_a_guarantee_and_labels(run, tmp_path):
    output = tmp_path / "t.toml"
    costs = ["--minimize", "mean_cost", "--cost", "false accept=5", "--cost", "false reject=1", "--by-label"]
    assert tune(run.directory, *costs, "--output", output).exit_code == 0
    said = tune(
        run.directory,
        "--maximize",
        "reject_recall",
        "--guarantee",
        "in_scope_accuracy=0.3",
        "--overwrite",
        "--output",
        output,
    )
    assert said.exit_code == 0, said.output
    assert CascadeSpec.read(output).tuned_on["guarantee"] == "in_scope_accuracy at least 0.3 with probability 0.9"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one figure to maximize or to minimize"),
        (["--maximize", "reject_recal"], "did you mean 'reject_recall'"),
        (["--maximize", "accuracy", "--at-least", "coverage"], "is not NAME=NUMBER"),
        (["--maximize", "accuracy", "--at-least", "in_scope_accuracy=0.999"], "infeasible"),
        (["--maximize", "accuracy", "--stage", "gat0"], "did you mean 'gate0'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_and_nothing_is_written(run, tmp_path, arguments, says):
    said = tune(run.directory, *arguments, "--output", tmp_path / "t.toml")
    assert said.exit_code == 2
    assert says in said.output
    assert not list(tmp_path.iterdir())


def test_a_set_without_the_texts_that_a_figure_counts_is_refused(tmp_path):
    from cascade_lab.analysis.goals import Goal
    from cascade_lab.analysis.thresholds import choose
    from cascade_lab.errors import InfeasibleError

    run = random_run(tmp_path / "run", n=40)
    run.examples["label"] = "label1"
    with pytest.raises(InfeasibleError, match="reject_recall is undefined on them"):
        choose(run, Goal("reject_recall"))
    with pytest.raises(InfeasibleError, match=r"nearest, gate0 .*, give in_scope_accuracy 0\.[0-9]+; ask for less"):
        choose(run, Goal("accuracy", at_least={"in_scope_accuracy": 0.999}))
