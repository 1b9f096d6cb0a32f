"""Sentences about a run, where its thresholds come from, and the public names of `cascade_lab.analysis`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module

import pandas as pd
import pytest
from helpers import GATE, HOSTILE, random_run, run_of_probabilities
from test_errors import five_texts

import cascade_lab.analysis
from cascade_lab.analysis import error_summary, run_summary, tuning_origin
from cascade_lab.analysis.metrics import metric_intervals
from cascade_lab.analysis.sentences import Summary
from cascade_lab.exceptions import RunError


def test_five_texts_in_sentences():
    """The cascade of `test_errors`: two rejects and a false accept of the gate, and a wrong class."""
    assert error_summary(five_texts())[:5] == [
        "4 of 5 texts (80.0%) are answered wrongly.",
        "Stage gate causes 3 of the errors (75%).",
        "Stage intent causes 1 of the errors (25%).",
        "2 texts in scope are rejected. For 1 of them the last stage's most probable label is right, so lower "
        "thresholds give the right answer; for 1 no thresholds do.",
        "If one stage made no mistakes, gate would gain the most: 40.0 percentage points of accuracy (7.1 to 76.9).",
    ]
    assert error_summary(five_texts())[-1].startswith(
        "Advice: start with stage gate. 67% of its errors are false rejects"
    )
    assert "5 texts" in error_summary(five_texts(), thresholds={"gate": 0.9})[0]
    sentences = run_summary(five_texts())
    assert sentences[0].startswith("The cascade answers 20.0% (1.0% to 62.4%) of 5 texts correctly")
    assert "60.0% of the texts reach the last stage, intent." in sentences
    assert sentences[-1].startswith("Advice: 50% of the errors are false rejects")


def test_unrecoverable_rejects_turn_the_advice_to_the_last_stage():
    last = {"name": "intent", "labels": ["a", "b"]}
    p = {"gate": [[0.9, 0.1]] * 5, "intent": [[0.9, 0.1]] * 5}
    sentences = error_summary(run_of_probabilities([GATE, last], ["b"] * 5, p))
    assert sentences[-1].startswith("For most of these rejected texts (5 of 5) no thresholds give the right answer")


def test_what_is_undefined_or_absent_is_not_mentioned():
    last = {"name": "i", "labels": ["a", "b"]}
    run = run_of_probabilities([GATE, last], ["a", None], {"gate": [[0.1, 0.9]] * 2, "i": [[0.9, 0.1]] * 2})
    assert error_summary(run) == ["All 1 texts are answered correctly."]
    sentences = run_summary(run)
    assert sentences[0] == "1 of 2 texts have a label; the metrics are computed on these."
    assert not any("out of scope" in sentence or "Advice" in sentence for sentence in sentences)
    with pytest.raises(RunError, match="no example has a label"):
        run_summary(run.select([1]))


def test_sentences_with_text_of_users_are_harmless():
    summary = Summary([f"Where label == '{text}', 5% are wrong." for text in HOSTILE])
    assert "\x1b" not in str(summary)
    assert len(str(summary).splitlines()) == len(HOSTILE)
    markdown = summary._repr_markdown_()
    assert "\\<script\\>" in markdown
    assert "\\$x\\_1\\$" in markdown


def test_thresholds_that_were_not_tuned_have_no_origin(tmp_path):
    origin = tuning_origin(random_run(tmp_path / "run"))
    assert (origin.tuned_on, origin.metrics, origin.same_texts) == (None, None, False)
    assert origin.frame().empty
    assert origin.summary() == [
        "Stage gate0: threshold 0.5.",
        "Stage last: no threshold.",
        "The thresholds were not tuned.",
    ]


@pytest.mark.parametrize("costs", [{}, {"false accept": 5.0}])
def test_tuned_thresholds_come_with_the_metrics_of_both_sets(tmp_path, costs):
    run = random_run(tmp_path / "run", seed=3)
    tuned_on = {
        "run_id": "another",
        "evalset": {"sha256": "0" * 64, "n_examples": 3100},
        "goal": "maximize accuracy",
        "costs": costs,
        "figures": {"accuracy": 0.9, "risk": 0.05},
        "intervals": {"accuracy": [0.88, 0.92]},
        "optimism": {"accuracy": 0.01},
    }
    origin = tuning_origin(run.with_spec(replace(run.spec, tuned_on=tuned_on)))
    assert not origin.same_texts
    assert origin.metrics.index.tolist() == ["accuracy", "risk"]
    there, here = origin.metrics["on the tuning set"], origin.metrics["on this set"]
    assert there.loc["accuracy"].tolist() == [0.9, 0.88, 0.92, 0.01]
    assert pd.isna(there.loc["risk", "low"])
    intervals = metric_intervals(run)
    assert here["value"].tolist() == pytest.approx(intervals.loc[here.index, "value"].tolist())
    assert origin.summary()[2] == "They were tuned on 3,100 texts (run another), to maximize accuracy."
    same = replace(run.spec, tuned_on={**tuned_on, "evalset": {**run.manifest["evalset"]}})
    origin = tuning_origin(run.with_spec(same))
    assert origin.same_texts
    assert origin.summary()[-1].startswith("Warning: the thresholds were chosen on these same texts")
    assert run_summary(run.with_spec(same))[0].startswith("Warning")


@pytest.mark.parametrize("name", cascade_lab.analysis.__all__)
def test_public_names_are_functions_also_after_all_modules_were_imported(name):
    for module in ("slicing", "label_audit", "calibration", "coverage", "comparison", "tuned_on"):
        import_module(f"cascade_lab.analysis.{module}")
    function = getattr(cascade_lab.analysis, name)
    assert inspect.isfunction(function)
    assert function.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'blames'"):
        cascade_lab.analysis.blames  # noqa: B018
