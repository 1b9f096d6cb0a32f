"""The decision core: a cascade worked by hand, ties, forced stages, targets of stages."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax as scipy_softmax

from cascade_lab import CascadeSpec, StageSpec
from cascade_lab.decisions import check_labels, decide, require_scored, route, softmax, stage_targets
from cascade_lab.exceptions import EvalSetError, RunError


def stage(name, labels, **keys):
    return StageSpec(name, tuple(labels), **keys)


SPEC = CascadeSpec(
    "three",
    (
        stage("gate", ["oos", "in"], pass_label="in", threshold=0.5),
        stage("topic", ["chat", "spam", "work"], pass_label="work", threshold=0.6),
        stage("intent", ["pay", "lost"], min_probability=0.7, reject_label="unsure"),
    ),
)


def logits_of(rows):
    """Logits whose softmax is the given probabilities, up to rounding."""
    return np.log(np.array(rows, dtype=np.float64))


def routed(spec, logits, **options):
    return route(spec, {s.name: decide(s, logits[s.name]) for s in spec.stages}, **options)


def test_five_texts_through_three_stages_worked_by_hand():
    """
    text | p(in) | p(chat, spam, work) | p(pay, lost) | answer, its probability, its confidence
    0    | 0.2   | not reached         | not reached  | oos at gate, 0.8, 0.2
    1    | 0.5   | .1 .3 .6: passes    | .9 .1        | pay at intent, 0.9, 0.9 (both gates by a tie)
    2    | 0.9   | .5 .4 .1: stops     | not reached  | chat at topic, 0.5, 0.1
    3    | 0.9   | .2 .3 .5: stops     | not reached  | spam at topic, 0.3, 0.5 (the best other label)
    4    | 1.0   | 0 0 1: passes       | .4 .6        | unsure at intent, 0.6, 0.6 (below min_probability)
    """
    with np.errstate(divide="ignore"):
        scores = {
            "gate": logits_of([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9], [0.1, 0.9], [0.0, 1.0]]),
            "topic": logits_of([[1, 1, 1], [0.1, 0.3, 0.6], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]),
            "intent": logits_of([[1, 1], [0.9, 0.1], [1, 1], [1, 1], [0.4, 0.6]]),
        }
    scores["topic"][0] = np.nan  # never scored, and never reached
    scores["intent"][[0, 2, 3]] = np.nan
    result = routed(SPEC, scores)
    assert result.predicted.tolist() == ["oos", "pay", "chat", "spam", "unsure"]
    assert result.decided_by.tolist() == ["gate", "intent", "topic", "topic", "intent"]
    assert result.stage_index.tolist() == [0, 2, 1, 1, 2]
    np.testing.assert_allclose(result.probability, [0.8, 0.9, 0.5, 0.3, 0.6], atol=1e-12)
    np.testing.assert_allclose(result.confidence, [0.2, 0.9, 0.1, 0.5, 0.6], atol=1e-12)
    assert result.reached["intent"].tolist() == [False, True, False, False, True]
    assert require_scored(result, "these texts") is result


def test_a_function_is_asked_for_the_rows_that_reach_a_stage_and_no_others():
    asked = {}

    def score(spec, rows):
        asked[spec.name] = rows.tolist()
        logits = {"gate": [[5, 0], [0, 5], [0, 5]], "topic": [[9, 9, 9], [0, 0, 5], [5, 0, 0]], "intent": [[0, 9]] * 3}
        return decide(spec, np.array(logits[spec.name], dtype=float)[rows])

    assert route(SPEC, score, n_examples=3).predicted.tolist() == ["oos", "lost", "chat"]
    assert asked == {"gate": [0, 1, 2], "topic": [1, 2], "intent": [1]}


def test_a_forced_stage_does_not_look_at_its_threshold():
    logits = {"gate": [[5.0, 0]], "topic": [[5.0, 0, 0]], "intent": [[5.0, 0]]}
    logits = {name: np.array(rows) for name, rows in logits.items()}
    assert routed(SPEC, logits).predicted.tolist() == ["oos"]
    assert routed(SPEC, logits, force={"gate": True}).predicted.tolist() == ["chat"]
    assert routed(SPEC, logits, force={"gate": True, "topic": np.array([True])}).predicted.tolist() == ["pay"]
    assert routed(SPEC, logits, force=dict.fromkeys(logits, False) | {"gate": True}).predicted.tolist() == ["chat"]
    forced = {"gate": True, "topic": True, "intent": False}
    assert routed(SPEC, logits, force=forced).predicted.tolist() == ["unsure"]


def test_a_label_with_a_minimum_of_its_own():
    """pay needs 0.9, other labels 0.5: .8 for pay is rejected, .8 for lost is not."""
    last = stage("last", ["pay", "lost"], min_probability=0.5, min_probabilities={"pay": 0.9}, reject_label="unsure")
    decision = decide(last, logits_of([[0.8, 0.2], [0.2, 0.8]]))
    assert decision.threshold.tolist() == [0.9, 0.5]
    assert decision.label.tolist() == ["unsure", "lost"]
    assert decision.with_threshold(stage("last", ["pay", "lost"])).label.tolist() == ["pay", "lost"]


def test_a_tie_at_the_threshold_passes_and_reaches():
    assert decide(SPEC.stages[0], np.zeros((1, 2), dtype=np.float32)).above.tolist() == [True]
    last = stage("last", ["a", "b"], min_probability=0.5, reject_label="none")
    assert decide(last, np.zeros((1, 2), dtype=np.float32)).label.tolist() == ["a"]


def test_an_example_that_reaches_a_stage_that_never_scored_it_has_no_answer():
    nan = np.full((1, 3), np.nan)
    result = routed(SPEC, {"gate": np.array([[0.0, 5.0]]), "topic": nan, "intent": np.full((1, 2), np.nan)})
    assert (result.predicted.tolist(), result.stage_index.tolist()) == ([None], [-1])
    with pytest.raises(RunError, match=r"here: stage 'topic' never scored 1 of the examples.*with shadow scores"):
        require_scored(result, "here")


def test_no_example_at_all():
    empty = {name: np.empty((0, n)) for name, n in (("gate", 2), ("topic", 3), ("intent", 2))}
    assert len(routed(SPEC, empty).predicted) == 0


@given(st.lists(st.lists(st.floats(-500, 500, width=32), min_size=4, max_size=4), min_size=1))
def test_probabilities_are_scipys_softmax(rows):
    logits = np.array(rows, dtype=np.float32)
    np.testing.assert_allclose(
        softmax(logits), scipy_softmax(logits.astype(np.float64), axis=1), rtol=1e-12, atol=1e-300
    )


def test_targets_of_each_stage_follow_from_the_final_label():
    labels = ["oos", "chat", "pay", "unsure", None]
    assert stage_targets(SPEC, "gate", labels).tolist() == ["oos", "in", "in", "in", None]
    assert stage_targets(SPEC, "topic", labels).tolist() == [None, "chat", "work", "work", None]
    assert stage_targets(SPEC, "intent", labels).tolist() == [None, None, "pay", None, None]


def test_targets_of_texts_that_have_arrived_lead_to_the_label_wherever_that_is_possible():
    labels = ["oos", "chat", "pay", "unsure", None]
    assert stage_targets(SPEC, "topic", labels, assume_reached=True).tolist() == [None, "chat", "work", "work", None]
    assert stage_targets(SPEC, "intent", labels, assume_reached=True).tolist() == [None, None, "pay", "unsure", None]


def test_targets_that_are_stated_replace_those_that_are_derived():
    assert stage_targets(SPEC, "gate", ["oos", "pay"], explicit=["in", ""]).tolist() == ["in", "in"]


def test_a_classifier_of_k_plus_one_labels_that_rejects_with_one_of_them():
    one = CascadeSpec("one", (stage("all", ["pay", "lost", "oos"], reject_label="oos"),))
    assert (one.labels, one.in_scope_labels) == (("pay", "lost", "oos"), ("pay", "lost"))
    assert stage_targets(one, "all", ["oos", "pay"]).tolist() == ["oos", "pay"]


def test_a_stage_that_can_still_give_the_label_of_an_earlier_gate_has_it_as_its_target():
    gates = [stage(f"gate{i}", ["oos", "in"], pass_label="in", threshold=0.5) for i in (0, 1)]
    between = stage("between", ["abuse", "in"], pass_label="in", threshold=0.5)
    spec = CascadeSpec("x", (*gates, between, stage("last", ["pay", "oos"], reject_label="oos")))
    targets = {s.name: stage_targets(spec, s.name, ["oos", "pay"]).tolist() for s in spec.stages}
    assert targets == {"gate0": ["oos", "in"], "gate1": ["oos", "in"], "between": [None, "in"], "last": ["oos", "pay"]}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"label": ["pay", "spma"]}, "row 1: label 'spma' belongs to no stage .gate: oos, in; topic: chat, spam, work"),
        ({"label": ["in", "pay"]}, "row 0: label 'in' is a gate's pass label"),
        ({"label": ["pay", "oos"], "gate_label": ["in", "out"]}, "row 1: label 'out' in gate_label is not a label"),
    ],
)
def test_a_label_of_no_stage_is_refused_with_its_row(examples, message):
    with pytest.raises(EvalSetError, match=message):
        check_labels(SPEC, pd.DataFrame(examples), ["row 0", "row 1"])


def test_a_text_without_a_label_is_not_refused():
    check_labels(SPEC, pd.DataFrame({"label": ["pay", None]}), ["row 0", "row 1"])
