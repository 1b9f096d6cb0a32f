"""A run's verdict: what it says, what it suggests and when it does not, and the two pictures beside it."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from helpers import (
    GATE,
    hostile_pair,
    logits_of,
    memory_run,
    one_stage_run,
    random_run,
    run_of_probabilities,
    write_run,
)
from typer.testing import CliRunner

from cascade_lab.analysis import blame, run_verdict
from cascade_lab.analysis.advice import STAGE_ADVICE, rejector_suggestion
from cascade_lab.cli import app
from cascade_lab.displays.overview import overview
from cascade_lab.exceptions import RunError
from cascade_lab.reporting.report import NOTEBOOKS

LAST = {"name": "intent", "labels": ["a", "b"]}


def gate_run(p_oos: list[float], p_in: list[float], *, wrong: int = 0, name: str = "by hand", **options):
    """A run of texts out of scope and in scope, with these probabilities of passing the gate; then the last stage is
    wrong about the first `wrong` texts in scope, and right about the others."""
    gate = [[1 - p, p] for p in [*p_oos, *p_in]]
    intent = [[0.5, 0.5]] * len(p_oos) + [[0.1, 0.9]] * wrong + [[0.9, 0.1]] * (len(p_in) - wrong)
    labels = ["oos"] * len(p_oos) + ["a"] * len(p_in)
    return run_of_probabilities([GATE, LAST], labels, {"gate": gate, "intent": intent}, name=name, **options)


def test_a_gate_that_passes_everything_causes_all_errors():
    """20 of 40 texts are out of scope, and no threshold separates them."""
    verdict = run_verdict(gate_run([0.9] * 20, [0.9] * 20))
    assert verdict.sentences[0] == "50.0% (35.2% to 64.8%) of the 40 texts are answered correctly (95% interval)."
    assert verdict.sentences[2:] == (
        "Stage gate causes 100% of the 20 errors (84% to 100%). Without its mistakes, the accuracy would be 50.0 "
        "points higher (35.2 to 64.8).",
        "All of its errors are texts out of scope that are answered with a class.",
    )
    (suggestion,) = verdict.suggestions
    assert suggestion.text.startswith("Read the texts out of scope that stage gate lets through")
    assert suggestion.plain.startswith("Read the texts that step 1 (gate) should have turned away")
    assert verdict.faults["n_errors"].to_dict() == {"gate": 20, "intent": 0}


def test_another_threshold_is_suggested_where_cross_validation_shows_a_gain():
    run = gate_run(list(np.linspace(0.55, 0.75, 40)), list(np.linspace(0.8, 0.99, 60)))
    verdict = run_verdict(run)
    assert verdict.suggestions[0].command == (
        "cascade-lab tune RUN --maximize accuracy --stage gate --output tuned.toml"
    )
    assert 30 < verdict.suggestions[0].points_low < 40
    chosen = float(verdict.suggestions[0].text.partition(", with ")[2].partition(". ")[0])
    assert run.with_thresholds({"gate": chosen}).metrics["end_to_end"]["accuracy"] == 1


def test_a_rejector_is_suggested_where_it_rejects_more_than_thresholds(tmp_path):
    """The random gate and the random last stage err independently, so together they know more."""
    run = random_run(tmp_path / "run", n=600)
    found = rejector_suggestion(run)
    assert found.command.startswith("cascade-lab fit-rejector RUN --evidence gate0,")
    assert found.points_low > 0
    assert rejector_suggestion(gate_run([0.9] * 30, [0.9] * 30)) is None  # nothing separates them


@pytest.mark.parametrize(
    ("p_oos", "wrong", "expected"),
    [
        ([0.9] * 6, 5, "Which stage to improve first is not clear from these errors: gate 6, intent 5."),
        ([0.9] * 3, 0, "Which stage to improve first is not clear from these errors: gate 3, intent 0."),
    ],
)
def test_no_stage_is_suggested_where_the_interval_does_not_support_it(p_oos, wrong, expected):
    verdict = run_verdict(gate_run(p_oos, [0.9] * 60, wrong=wrong))
    assert expected in verdict.sentences
    assert not verdict.suggestions


def test_a_stage_that_would_gain_next_to_nothing_is_not_suggested():
    """8 errors of one gate in 4,000 texts: the gate leads, but a perfect one gains 0.2 points."""
    verdict = run_verdict(gate_run([0.9] * 8, [0.9] * 3992))
    assert any(sentence.startswith("Stage gate causes 100% of the 8 errors") for sentence in verdict.sentences)
    assert not verdict.suggestions


def test_the_most_confused_pair_is_named():
    verdict = run_verdict(gate_run([0.1] * 5, [0.9] * 60, wrong=30))
    assert verdict.suggestions[0].command == "cascade-lab audit RUN --output audit.csv"
    assert "“a” is taken for “b” most often (30 times)" in verdict.suggestions[0].text


def test_a_deferral_stage_that_answers_too_early():
    stages = [{"name": "small", "role": "deferral", "labels": ["a", "b"], "threshold": 0.6}, LAST]
    p = {"small": [[0.3, 0.7]] * 20 + [[0.9, 0.1]] * 20, "intent": [[0.9, 0.1]] * 40}
    verdict = run_verdict(run_of_probabilities(stages, ["a"] * 40, p))
    assert "All of its errors are answers that the later stages would have corrected." in verdict.sentences
    assert "so costs time" in verdict.suggestions[0].text
    assert verdict.suggestions[1].command.endswith("04_tune_thresholds -p test_dir=null")


def runs(folder):
    """One run of each kind: name to run, and the pictures that it should have."""
    run = random_run(folder / "run", n=150, skill=2)
    unlabelled = memory_run(run.spec, run.examples.assign(label=None), logits_of(run))
    some = run.examples["label"].where(np.arange(150) % 2 == 0, None)
    flow, ladder, matrix = "OutcomeFlowDisplay", "OracleLadderDisplay", "CascadeConfusionDisplay"
    return {
        "two stages": (run, {flow, ladder if blame(run)["fault"].value_counts().idxmax() == "gate0" else matrix}),
        "three stages": (random_run(folder / "three", n=150, n_gates=2), {flow, ladder}),
        "one stage": (one_stage_run(run, folder / "one"), {flow, matrix}),
        "no errors": (random_run(folder / "right", n=60, skill=40), {flow}),
        "no labels": (unlabelled, {"StageLatencyDisplay"}),
        "some labels": (memory_run(run.spec, run.examples.assign(label=some), logits_of(run)), {flow, matrix}),
        "no shadow": (write_run(folder / "x", run.spec, run.examples, logits_of(run), shadow=False), {flow, matrix}),
        "two texts": (
            memory_run(run.spec, run.examples.head(2), {k: v[:2] for k, v in logits_of(run).items()}),
            {flow},
        ),
    }


@pytest.fixture(scope="module")
def every_run(tmp_path_factory):
    """Kind to run, pictures and verdict."""
    made = runs(tmp_path_factory.mktemp("runs"))
    return {kind: (run, pictures, run_verdict(run)) for kind, (run, pictures) in made.items()}


KINDS = ["two stages", "three stages", "one stage", "no errors", "no labels", "some labels", "no shadow", "two texts"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_verdict_and_pictures(every_run, kind):
    run, pictures, verdict = every_run[kind]
    assert verdict.sentences
    assert len(verdict.suggestions) <= 2
    assert verdict.n_labelled == run.examples["label"].notna().sum()
    assert verdict.outcomes.sum() == verdict.n_labelled
    assert not verdict.metrics["value"].isna().any()
    html = verdict._repr_html_()
    assert html.count("<p>") >= len(verdict.sentences) + len(verdict.suggestions)
    assert "nan" not in (html + str(verdict)).lower()
    found = overview(run, verdict)
    names = {type(display).__name__ for display in found}
    assert names == pictures
    if kind == "no shadow":
        shadowed = overview(every_run["two stages"][0], verdict)[0].frame()
        counts = found[0].frame().groupby("stage")["n_examples"].sum()
        assert counts.to_dict() == shadowed.groupby("stage")["n_examples"].sum().to_dict()


def test_what_is_missing_is_said_with_the_way_out(every_run):
    verdict = every_run["no labels"][2]
    assert verdict.sentences[0] == "No text has a label, so it is not known how many answers are correct."
    assert verdict.metrics.index.tolist() == ["rejected", "reach"]
    assert verdict.suggestions[0].command == "cascade-lab run CASCADE LABELLED_TEXTS --output NEW_RUN"
    assert "75 of 150 texts have a label" in every_run["some labels"][2].sentences[0]
    with pytest.raises(RunError, match="has no example, so there is nothing to say of it; run the cascade on some"):
        run_verdict(every_run["two stages"][0].select(np.arange(0)))
    verdict = every_run["no shadow"][2]
    assert verdict.faults.empty
    assert verdict.suggestions[0].command == "cascade-lab run CASCADE EVALSET --output NEW_RUN"


def test_names_of_users_do_no_harm(tmp_path):
    run = hostile_pair(tmp_path)[0]
    verdict = run_verdict(run)
    assert "<script" not in verdict._repr_html_()
    assert "\x1b" not in verdict._repr_html_() + str(verdict) + repr(verdict)
    run = gate_run([0.9] * 20, [0.9] * 20, name="<b>x</b>")
    assert "<b>x" not in run_verdict(run)._repr_html_()


def test_every_suggested_command_exists(every_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = random_run(tmp_path / "run", n=80, skill=1)
    written = {suggestion.command for *_, verdict in every_run.values() for suggestion in verdict.suggestions}
    written |= {advice.command for advice in STAGE_ADVICE.values()}
    written |= {
        "cascade-lab tune RUN --maximize accuracy --stage gate0 --output tuned.toml --write-anyway",
        "cascade-lab fit-rejector RUN --evidence gate0,gen --output rejector.toml",
    }
    for command in sorted(written):
        name, *arguments = shlex.split(command)
        assert name == "cascade-lab"
        assert CliRunner().invoke(app, [arguments[0], "--help"]).exit_code == 0
        if arguments[0] == "report":
            assert arguments[arguments.index("--notebook") + 1] in NOTEBOOKS
        elif "RUN" in arguments:
            arguments = [str(run.directory) if each == "RUN" else each for each in arguments]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (command, result.output)
