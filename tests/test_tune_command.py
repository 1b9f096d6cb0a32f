"""`cascade-lab tune`, from a run to a cascade.toml, without TensorFlow."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
from helpers import logits_of, memory_run, random_run
from test_tuning import labels_differ
from typer.testing import CliRunner

from cascade_lab import thresholds
from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.cli import app
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import exact
from cascade_lab.thresholds import Goal, choose


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "one", n=200, seed=4)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(thresholds, "tune", partial(thresholds.tune, n_resamples=20, n_repeats=1))


def tune(*arguments):
    return CliRunner().invoke(app, ["tune", *(str(argument) for argument in arguments)])


def tune_and_write(*arguments):
    return tune(*arguments, "--write-anyway")


def test_tune_writes_the_cascade_that_satisfies_the_goal(run, tmp_path):
    goal = ["--maximize", "reject_recall", "--at-least", "in_scope_accuracy=0.4"]
    result = tune_and_write(run.directory, *goal, "--output", tmp_path / "t.toml")
    assert result.exit_code == 0, result.output
    spec = CascadeSpec.read(tmp_path / "t.toml")
    replayed = Run.read(run.directory).replay(spec.thresholds)
    in_scope = replayed["label"].isin(spec.in_scope_labels)
    right = replayed["label"] == replayed["predicted"]
    assert right[in_scope].mean() >= 0.4
    assert spec.tuned_on["figures"]["reject_recall"] == pytest.approx(right[~in_scope].mean())
    low, high = spec.tuned_on["intervals"]["reject_recall"]
    assert low <= right[~in_scope].mean() <= high
    assert "cross-validation" in result.output
    for stage, threshold in spec.thresholds.items():
        assert re.search(rf"^ *{stage} +\S+ +{re.escape(exact(threshold))} *$", result.output, re.MULTILINE)
    assert f"{right[~in_scope].mean():.4f}" in result.output
    lines = result.output.replace(str(tmp_path), "").splitlines()
    assert max(len(line) for line in lines if not line.startswith(("note: ", "result: "))) <= 80


def test_tune_takes_costs_a_guarantee_and_labels(run, tmp_path):
    output = tmp_path / "t.toml"
    costs = ["--minimize", "mean_cost", "--cost", "false accept=5", "--cost", "false reject=1", "--by-label"]
    assert tune_and_write(run.directory, *costs, "--output", output).exit_code == 0
    goal = ["--maximize", "reject_recall", "--guarantee", "in_scope_accuracy=0.3"]
    result = tune_and_write(run.directory, *goal, "--overwrite", "--output", output)
    assert result.exit_code == 0, result.output
    assert CascadeSpec.read(output).tuned_on["guarantee"] == "in_scope_accuracy at least 0.3 with probability 0.9"


def test_the_metrics_printed_with_thresholds_per_label_are_those_of_the_written_cascade(tmp_path):
    run = labels_differ(tmp_path / "r", "run", seed=3).write(tmp_path / "run")
    result = tune_and_write(run.directory, "--maximize", "accuracy", "--by-label", "--output", tmp_path / "t.toml")
    assert result.exit_code == 0, result.output
    spec = CascadeSpec.read(tmp_path / "t.toml")
    assert spec.last.min_probabilities
    printed = {}
    for words in map(str.split, result.output.splitlines()):
        if len(words) > 2:
            printed.setdefault(words[0], words[2])  # the first table of metrics is of this set
    assert printed["last"] == "per"
    for name, value in prediction_metrics(spec, run.with_spec(spec).predictions).items():
        if name != "macro_f1":
            assert printed[name] == f"{value:.4f}"
            assert spec.tuned_on["figures"][name] == pytest.approx(value)


def test_thresholds_without_a_gain_are_not_written_unless_asked(run, tmp_path):
    """The run's own thresholds are the best already; then the gate lets everything through."""
    best = choose(run, Goal("accuracy")).thresholds
    own = run.with_spec(run.spec.with_thresholds(best)).write(tmp_path / "best")
    goal, output = ["--maximize", "accuracy"], tmp_path / "t.toml"
    kept = tune(own.directory, *goal, "--output", output)
    assert kept.exit_code == 0, kept.output
    assert f"result: Keep gate0 {exact(best['gate0'])}, last {exact(best['last'])}: " in kept.output
    assert "nothing is written; --write-anyway writes the chosen thresholds" in kept.output
    assert not output.exists()
    assert f"cascade: {output}" in tune_and_write(own.directory, *goal, "--output", output).output
    assert CascadeSpec.read(output).thresholds == best
    wide = run.with_spec(run.spec.with_thresholds({"gate0": 0.0})).write(tmp_path / "wide")
    better = tune(wide.directory, *goal, "--output", output, "--overwrite")
    assert "result: In cross-validation, the chosen thresholds improve accuracy (+" in better.output
    assert CascadeSpec.read(output).tuned_on["gain"].startswith("In cross-validation")


def test_the_test_run_a_confidence_and_several_guarantees(run, tmp_path):
    other = random_run(tmp_path / "other", n=150, seed=9)
    examples = other.examples.assign(text=[f"other {i}" for i in range(150)])
    memory_run(other.spec, examples, logits_of(other)).write(tmp_path / "test")
    bound = ["--maximize", "reject_recall", "--at-least", "in_scope_accuracy=0.3"]
    plain = tune_and_write(run.directory, *bound, "--test", tmp_path / "test", "--output", tmp_path / "plain.toml")
    assert plain.exit_code == 0, plain.output
    chosen = CascadeSpec.read(tmp_path / "plain.toml").thresholds
    replayed = Run.read(tmp_path / "test").replay(chosen)
    is_out = replayed["label"].str.startswith("oos")
    recall = (replayed["label"] == replayed["predicted"])[is_out].mean()
    table = plain.output[plain.output.index("test run") :]
    assert re.search(rf"^ *reject_recall +\S+ +{recall:.4f} +[+-]", table, re.MULTILINE)
    assert "note: Nothing promises in_scope_accuracy at least 0.3 on new texts" in plain.output
    sure = tune_and_write(run.directory, *bound, "--confidence", "0.9", "--output", tmp_path / "sure.toml")
    assert "guarantee: in_scope_accuracy at least 0.3 with probability 0.9" in sure.output
    assert "Nothing promises" not in sure.output
    figures = [CascadeSpec.read(tmp_path / f"{name}.toml").tuned_on["figures"] for name in ("plain", "sure")]
    assert figures[1]["in_scope_accuracy"] > figures[0]["in_scope_accuracy"]
    both = ["--guarantee", "in_scope_accuracy=0.2", "--guarantee", "reject_recall=0.1", "--delta", "0.2"]
    result = tune_and_write(run.directory, "--maximize", "accuracy", *both, "--output", tmp_path / "both.toml")
    sentence = "in_scope_accuracy at least 0.2 and reject_recall at least 0.1, together with probability 0.8"
    assert f"guarantee: {sentence}" in result.output
    assert CascadeSpec.read(tmp_path / "both.toml").tuned_on["guarantee"] == sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--maximize", "accuracy", "--confidence", "0.9"], "a guarantee needs a bound"),
        (
            ["--maximize", "accuracy", "--at-least", "coverage=0.1", "--confidence", "0.9", "--guarantee", "risk=0.9"],
            "leave out confidence (--confidence) or guarantee",
        ),
        (["--maximize", "accuracy", "--guarantee", "in_scope_accuracy=0.3", "--by-label"], "leave out guarantee (--gu"),
        ([], "maximizes or minimizes one metric"),
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


SMALL = {
    "one text": 1,
    "two texts": 2,
    "fewer texts than folds": 4,
    "few of a kind": 9,
    "no text out of scope": "label",
    "only out of scope": "oos",
    "one label": "label1",
}
"""A number of texts, or what their labels start with."""
GOALS = {
    "accuracy": ["--maximize", "accuracy"],
    "recall": ["--maximize", "reject_recall"],
    "by label": ["--maximize", "accuracy", "--by-label"],
    "guarantee": ["--maximize", "accuracy", "--guarantee", "in_scope_accuracy=0.05"],
    "prevalence": ["--maximize", "accuracy", "--prevalence", "0.2"],
    "cost": ["--minimize", "mean_cost", "--cost", "false accept=5", "--cost", "false reject=1"],
    "bounds": ["--maximize", "reject_recall", "--at-least", "in_scope_accuracy=0.5", "--at-most", "risk=0.9"],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", SMALL)
def test_too_few_texts_of_a_kind_are_a_line_and_never_a_warning(run, tmp_path, size):
    """The goal is refused in one line, or what is written is what the cascade does, and a note says what lacks."""
    chosen = SMALL[size]
    labels = run.examples["label"].str
    rows = np.arange(chosen) if isinstance(chosen, int) else np.flatnonzero(labels.startswith(chosen))
    small = run.select(rows).write(tmp_path / "small")
    n_written = 0
    for name, goal in GOALS.items():
        output = tmp_path / f"{name}.toml"
        result = tune_and_write(small.directory, *goal, "--output", output)
        if result.exit_code:
            assert (result.exit_code, len(result.output.strip().splitlines())) == (2, 1), result.output
            assert not output.exists()
            continue
        n_written += 1
        assert "note: " in result.output
        spec = CascadeSpec.read(output)
        figures, metrics = spec.tuned_on["figures"], prediction_metrics(spec, small.with_spec(spec).predictions)
        if name != "prevalence":
            assert figures["accuracy"] == pytest.approx(metrics["accuracy"])
        assert spec.tuned_on["notes"]
        for metric, (low, high) in spec.tuned_on["intervals"].items():
            assert low <= figures[metric] <= high
            assert high - low > 0.001
    assert n_written
