"""The serial cascade as arithmetic: a cascade worked by hand, ties, gold labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from cascade_lab import CascadeSpec, StageSpec
from cascade_lab.errors import EvalSetError
from cascade_lab.serial import answer, check_labels, gold, probabilities, serve


def stage(name, labels, **keys):
    return StageSpec(name, Path(), Path(), Path(), tuple(labels), **keys)


SPEC = CascadeSpec(
    "three",
    (
        stage("gate", ["oos", "in"], pass_label="in", threshold=0.5),
        stage("topic", ["chat", "spam", "work"], pass_label="work", threshold=0.6),
        stage("intent", ["pay", "lost"], min_probability=0.7, reject_label="unsure"),
    ),
)


def logits_of(rows):
    """Logits whose softmax are the given probabilities, exactly enough."""
    return np.log(np.array(rows, dtype=np.float64))


def test_five_texts_through_three_stages_worked_by_hand():
    """
    text | p(in) | p(chat, spam, work) | p(pay, lost) | the cascade's answer
    0    | 0.2   | not asked           | not asked    | oos at gate, 0.8
    1    | 0.5   | .1 .3 .6: passes    | .9 .1        | pay at intent, 0.9  (both gates by a tie)
    2    | 0.9   | .5 .4 .1: stops     | not asked    | chat at topic, 0.5
    3    | 0.9   | .2 .3 .5: stops     | not asked    | spam at topic, 0.3 (the best of the others, not the best)
    4    | 1.0   | 0 0 1: passes       | .4 .6        | unsure at intent, 0.6 (below min_probability)
    """
    with np.errstate(divide="ignore"):
        scores = {
            "gate": logits_of([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9], [0.1, 0.9], [0.0, 1.0]]),
            "topic": logits_of([[1, 1, 1], [0.1, 0.3, 0.6], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]),
            "intent": logits_of([[1, 1], [0.9, 0.1], [1, 1], [1, 1], [0.4, 0.6]]),
        }
    scores["topic"][0] = np.nan  # never scored, and never asked
    scores["intent"][[0, 2, 3]] = np.nan
    answers = serve(SPEC, scores)
    assert answers["predicted"].tolist() == ["oos", "pay", "chat", "spam", "unsure"]
    assert answers["decided_by"].tolist() == ["gate", "intent", "topic", "topic", "intent"]
    np.testing.assert_allclose(answers["probability"], [0.8, 0.9, 0.5, 0.3, 0.6], atol=1e-12)


def test_a_tie_at_the_threshold_passes_and_reaches():
    assert answer(SPEC.stages[0], np.zeros((1, 2), dtype=np.float32)).passes.tolist() == [True]
    last = stage("last", ["a", "b"], min_probability=0.5, reject_label="none")
    assert answer(last, np.zeros((1, 2), dtype=np.float32)).predicted.tolist() == ["a"]


def test_an_example_that_reaches_a_stage_that_never_scored_it_has_no_answer():
    nan = np.full((1, 3), np.nan)
    answers = serve(SPEC, {"gate": np.array([[0.0, 5.0]]), "topic": nan, "intent": np.full((1, 2), np.nan)})
    assert answers["predicted"].isna().all()


def test_no_example_at_all():
    empty = {name: np.empty((0, n)) for name, n in (("gate", 2), ("topic", 3), ("intent", 2))}
    assert len(serve(SPEC, empty)) == 0


@given(st.lists(st.lists(st.floats(-500, 500, width=32), min_size=4, max_size=4), min_size=1))
def test_probabilities_are_scipys_softmax(rows):
    logits = np.array(rows, dtype=np.float32)
    np.testing.assert_allclose(
        probabilities(logits), softmax(logits.astype(np.float64), axis=1), rtol=1e-12, atol=1e-300
    )


def test_gold_of_each_stage_is_derived_from_the_final_label():
    examples = pd.DataFrame({"label": ["oos", "chat", "pay", "unsure"]})
    assert gold(SPEC, SPEC.stages[0], examples).tolist() == ["oos", "in", "in", "in"]
    assert gold(SPEC, SPEC.stages[1], examples).tolist() == [None, "chat", "work", "work"]
    assert gold(SPEC, SPEC.stages[2], examples).tolist() == [None, None, "pay", None]


def test_gold_that_is_given_overrides_what_is_derived():
    examples = pd.DataFrame({"label": ["oos", "pay"], "gate_label": ["in", ""]})
    assert gold(SPEC, SPEC.stages[0], examples).tolist() == ["in", "in"]


def test_a_classifier_of_k_plus_one_labels_that_rejects_with_one_of_them():
    one = CascadeSpec("one", (stage("all", ["pay", "lost", "oos"], reject_label="oos"),))
    assert (one.labels, one.in_scope_labels) == (("pay", "lost", "oos"), ("pay", "lost"))
    examples = pd.DataFrame({"label": ["oos", "pay"]})
    assert gold(one, one.last, examples).tolist() == ["oos", "pay"]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"label": ["pay", "spma"]}, "row 1: label 'spma' belongs to no stage .gate: oos, in; topic: chat, spam, work"),
        ({"label": ["in", "pay"]}, "row 0: label 'in' is a gate's pass label"),
        ({"label": ["pay", "oos"], "gate_label": ["in", "out"]}, "row 1: label 'out' in gate_label is no label"),
    ],
)
def test_a_label_of_no_stage_is_refused_with_its_row(examples, message):
    with pytest.raises(EvalSetError, match=message):
        check_labels(SPEC, pd.DataFrame(examples), ["row 0", "row 1"])
