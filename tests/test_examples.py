"""The texts to read first: by hand, and against sorting all texts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import GATE, mixed_run, random_run, run_of_probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from test_errors import end_of, five_texts, stage_answer

from cascade_lab.analysis.errors import blame
from cascade_lab.analysis.examples import confident_errors, confused_texts, near_threshold, surest_first
from cascade_lab.exceptions import RunError, SpecError


def test_five_texts_by_hand():
    """The cascade of `test_errors`: t2, t3 are rejected with 0.6, 0.8; t4 and t5 wrong classes with 0.5, 0.6."""
    run = five_texts()
    assert confident_errors(run)["example_id"].tolist() == ["t3", "t2", "t5", "t4"]
    assert confident_errors(run, 2)["example_id"].tolist() == ["t3", "t2"]
    pairs = confused_texts(run, 1, 5)
    assert pairs[["label", "predicted", "n_examples", "example_id"]].to_numpy().tolist() == [
        ["b", "oos", 2, "t3"],
        ["b", "oos", 2, "t2"],
    ]
    assert pairs["of_label"].tolist() == pytest.approx([2 / 3] * 2)
    near = near_threshold(run, "gate", 1)
    assert near["example_id"].tolist() == ["t2", "t4"]
    assert near["distance"].tolist() == pytest.approx([-0.1, 0.2])
    assert near["logit_distance"].tolist() == pytest.approx([np.log(4 / 6), np.log(7 / 3)], abs=1e-6)
    assert near["correct"].tolist() == [False, False]
    # A text whose confidence equals the threshold stays above it.
    tie = near_threshold(run, "gate", 1, thresholds={"gate": float(near["confidence"][1])})
    assert tie["example_id"].tolist() == ["t2", "t4"]
    assert tie["distance"][1] == 0


def test_no_shadow_scores_are_needed():
    run = five_texts(shadow=False)
    assert confident_errors(run)["example_id"].tolist() == ["t3", "t2", "t5", "t4"]
    assert len(confused_texts(run)) == 4
    assert near_threshold(run, "gate", 1)["example_id"].tolist() == ["t2", "t4"]


def test_unlabelled_texts_are_no_errors_but_can_be_near_a_threshold():
    run = five_texts(labels=("a", None, "b", "oos", "b"))
    assert confident_errors(run)["example_id"].tolist() == ["t3", "t5", "t4"]
    near = near_threshold(run, "gate", 1)
    assert near["example_id"].tolist() == ["t2", "t4"]
    assert pd.isna(near["correct"][0])
    assert not near["correct"][1]


def test_the_minimum_of_the_last_stage_is_its_threshold():
    last = {"name": "intent", "labels": ["a", "b"], "min_probability": 0.7, "reject_label": "unsure"}
    p = {"gate": [[0.1, 0.9]] * 3 + [[0.9, 0.1]], "intent": [[0.6, 0.4], [0.6, 0.4], [0.8, 0.2], [0.8, 0.2]]}
    run = run_of_probabilities([GATE, last], ["a", "b", "unsure", "unsure"], p)
    assert near_threshold(run, "intent", 5)["distance"].tolist() == pytest.approx([-0.1, -0.1, 0.1], abs=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 100_000), n=st.integers(0, 12))
def test_near_threshold_is_that_of_sorting_all_texts(tmp_path_factory, seed, n):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = random_run(folder, n=50, n_gates=1 + seed % 3, seed=seed) if seed % 2 else mixed_run(seed)
    thresholds = {"gate0": (seed % 89) / 89} | ({"last": 0.4} if seed % 2 else {})
    spec = run.spec.with_thresholds(thresholds)
    for place, stage in enumerate(spec.stages):
        if not (stage.is_gate or stage.min_probability):
            with pytest.raises(RunError, match="has no min_probability"):
                near_threshold(run, stage.name, thresholds=thresholds)
            continue
        distances = []
        for row in range(len(run.examples)):
            answers = [stage_answer(s, run.scores(s.name).logits[row]) for s in spec.stages]
            if end_of(answers)[0] >= place:
                e = np.exp(run.scores(stage.name).logits[row].astype(np.float64) / stage.temperature)
                p = e / e.sum()
                column = stage.labels.index(stage.pass_label) if stage.is_gate else int(p.argmax())
                minimum = stage.min_probabilities.get(stage.labels[column], stage.min_probability)
                distances.append(p[column] - (stage.threshold if stage.is_gate else minimum))
        below, above = sorted(d for d in distances if d < 0), sorted(d for d in distances if d >= 0)
        near = near_threshold(run, stage.name, n, thresholds=thresholds)
        assert near["distance"].tolist() == pytest.approx(below[len(below) - min(n, len(below)) :] + above[:n])
        with np.errstate(divide="ignore"):
            p, t = near["confidence"], near["threshold"]
            expected = np.log(p) - np.log1p(-p) - np.log(t) + np.log1p(-t)
        assert near["logit_distance"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert (near["correct"] == (near["label"] == near["predicted"])).all()


def test_an_unknown_stage_is_refused():
    with pytest.raises(SpecError, match="did you mean 'gate'"):
        near_threshold(five_texts(), "gaet")


def test_a_run_without_errors_has_empty_tables():
    last = {"name": "i", "labels": ["a", "b"]}
    run = run_of_probabilities([GATE, last], ["a"], {"gate": [[0.1, 0.9]], "i": [[0.9, 0.1]]})
    assert len(confident_errors(run)) == len(confused_texts(run)) == 0


def test_a_rejection_by_a_minimum_is_as_sure_as_its_highest_probability_is_low():
    """The last stage rejects below 0.8 (and c below 0.9): the surest rejection has the lowest highest probability.

    ====  =====  =======  ================  =========  ====================================
    text  label  P(in)    intent            predicted  how sure
    ====  =====  =======  ================  =========  ====================================
    t1    a      0.9      0.70, 0.20, 0.10  unsure     1 - 0.70
    t2    a      0.9      0.40, 0.35, 0.25  unsure     1 - 0.40, the surest of the minimum's
    t3    a      0.9      0.10, 0.05, 0.85  unsure     1 - 0.85, by the minimum of c
    t4    b      0.9      0.95, 0.03, 0.02  a          0.95, a wrong class
    t5    b      0.45     0.95, 0.03, 0.02  oos        0.55, stopped by the gate
    ====  =====  =======  ================  =========  ====================================
    """
    last = {
        "name": "intent",
        "labels": ["a", "b", "c"],
        "min_probability": 0.8,
        "min_probabilities": {"c": 0.9},
        "reject_label": "unsure",
    }
    intent = [[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.05, 0.85], [0.95, 0.03, 0.02], [0.95, 0.03, 0.02]]
    p = {"gate": [[0.1, 0.9]] * 4 + [[0.55, 0.45]], "intent": intent}
    run = run_of_probabilities([GATE, last], ["a", "a", "a", "b", "b"], p)
    expected = ["t4", "t2", "t5", "t1", "t3"]
    assert confident_errors(run)["example_id"].tolist() == expected
    assert confident_errors(run, 2)["example_id"].tolist() == expected[:2]
    assert surest_first(run, blame(run))["example_id"].tolist() == expected
    assert confused_texts(run, 1, 2)["example_id"].tolist() == ["t2", "t1"]
    # At a minimum of 0 for all but c, t1 and t2 are right, and t3 is still rejected.
    lower = {"intent": 0.0}
    assert surest_first(run, run.replay(lower), thresholds=lower)["example_id"].tolist() == [
        "t4", "t1", "t5", "t2", "t3"
    ]  # fmt: skip


def test_a_reject_label_that_is_a_class_is_as_sure_as_its_probability():
    """The last stage has the reject label as a class too: a prediction of it is no rejection by the minimum."""
    last = {"name": "intent", "labels": ["a", "b", "oos"], "min_probability": 0.7, "reject_label": "oos"}
    p = {"gate": [[0.1, 0.9]] * 3, "intent": [[0.05, 0.05, 0.9], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]}
    run = run_of_probabilities([GATE, last], ["a", "a", "a"], p)
    assert confident_errors(run)["example_id"].tolist() == ["t1", "t3", "t2"]
