"""The serial run: against its own replay, against one text at a time, and with faults."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import texts, without_texts

from cascade_lab import Cascade, CascadeSpec, EvalSet, Run, Stage
from cascade_lab import cascade as cascade_module
from cascade_lab.decisions import softmax
from cascade_lab.exceptions import CheckpointError, EvalSetError


@pytest.fixture(scope="module")
def loaded(tiny):
    with Cascade.load(tiny) as cascade:
        yield cascade


@pytest.fixture(scope="module")
def balanced(tiny):
    """The tiny cascade at the threshold that lets half of the texts through."""
    with Cascade.load(tiny) as cascade:
        median = float(cascade.predict(texts(200))["gate_probability"].median())
    with Cascade.load(CascadeSpec.read(tiny).with_thresholds({"gate": median})) as cascade:
        yield cascade


def test_predict_equals_scoring_each_text_alone_by_hand(balanced):
    batch = texts(60)
    table = balanced.predict(batch, batch_size=8)
    gate, intent = balanced.stages
    assert set(table["decided_by"]) == {"gate", "intent"}
    for text, row in zip(batch, table.itertuples(), strict=True):
        p_in = softmax(gate.logits(gate.encode([text])))[0, 1]
        assert row.gate_probability == pytest.approx(p_in, abs=1e-5)
        if abs(p_in - gate.spec.threshold) < 1e-5:
            continue
        if p_in < gate.spec.threshold:
            assert (row.predicted, row.decided_by) == ("oos", "gate")
            assert row.probability == pytest.approx(1 - p_in, abs=1e-5)
            assert np.isnan(row.intent_probability)
        else:
            p = softmax(intent.logits(intent.encode([text])))[0]
            assert (row.predicted, row.decided_by) == (str(p.argmax()), "intent")
            assert row.probability == row.intent_probability == pytest.approx(p.max(), abs=1e-5)


def test_predict_takes_no_text_one_text_pairs_and_any_text(loaded):
    assert len(loaded.predict([])) == 0
    assert list(loaded.predict(["pay"]).columns) == [
        "text", "predicted", "decided_by", "probability", "confidence", "gate_probability", "intent_probability",
    ]  # fmt: skip
    odd = ["", "x" * 100_000, "\x00\x07\x1b[31m", "שלום عالم", "🙂", "half \ud83d"]
    answers = loaded.predict(odd)
    assert answers["predicted"].notna().all()
    assert answers["text"].tolist() == odd
    alone, paired = (loaded.predict(["pay my bill"], other) for other in (None, ["now please"]))
    assert alone["gate_probability"][0] != paired["gate_probability"][0]
    assert list(paired)[:3] == ["text", "text_b", "predicted"]
    assert loaded.predict(["pay", "sing"], [None, "now"])["text_b"].tolist() == [None, "now"]
    with pytest.raises(TypeError, match="not one str"):
        loaded.predict("pay")


def test_predict_gives_the_same_answers_in_chunks(loaded, monkeypatch):
    whole = loaded.predict(texts(50))
    monkeypatch.setattr(cascade_module, "CHUNK", 7)
    parts = loaded.predict(texts(50))
    pd.testing.assert_frame_equal(whole, parts, atol=1e-5)


def test_few_texts_run_all_stages_at_once_with_the_same_answers(balanced, monkeypatch):
    speculated = []
    speculate = Stage.speculate
    monkeypatch.setattr(
        Stage, "speculate", lambda stage, batch: speculated.append(stage.spec.name) or speculate(stage, batch)
    )
    many = balanced.predict(texts(60))
    assert speculated == []  # there are enough texts for every processor
    one_by_one = pd.concat([balanced.predict([text]) for text in texts(60)], ignore_index=True)
    assert speculated == (["intent"] * 60 if balanced.stages[0].n_workers > 1 else [])
    pd.testing.assert_frame_equal(one_by_one, many, atol=1e-5)
    assert set(many["decided_by"]) == {"gate", "intent"}
    by_three = pd.concat([balanced.predict(texts(60)[n : n + 3]) for n in range(0, 60, 3)], ignore_index=True)
    assert len(speculated) > 60 or balanced.stages[0].n_workers == 1
    pd.testing.assert_frame_equal(by_three, many, atol=1e-5)


def test_a_stage_waits_for_the_gate_if_it_is_larger_or_the_batch_size_is_smaller(balanced, monkeypatch):
    few = balanced.stages[0].encode(["pay my bill", "sing"])
    expected = {"intent"} if balanced.stages[0].n_workers > 1 else set()
    assert set(balanced._speculate(few, None)) == set(balanced._speculate(few, 2)) == expected
    assert balanced._speculate(few, 1) == balanced._speculate([], None) == {}
    monkeypatch.setattr(balanced.stages[1], "work", balanced.stages[0].work + 1)
    assert balanced._speculate(few, None) == {}


def test_a_runs_replay_at_its_own_thresholds_is_the_live_run_row_for_row(balanced, tiny_evalset, tmp_path):
    run = balanced.run(EvalSet.read(tiny_evalset), output=tmp_path / "run", batch_size=16)
    assert 0 < (run.predictions["decided_by"] == "gate").sum() < 200
    pd.testing.assert_frame_equal(without_texts(run.replay()), run.predictions, check_exact=True)
    pd.testing.assert_series_equal(run.replay()["text"], run.examples["text"])


def test_a_replay_at_another_threshold_is_a_live_run_at_it(balanced, tiny, tiny_evalset, tmp_path):
    run = balanced.run(EvalSet.read(tiny_evalset), output=tmp_path / "run")
    for threshold in (0.0, 0.3, 0.7, 1.0):
        with Cascade.load(CascadeSpec.read(tiny).with_thresholds({"gate": threshold})) as other:
            live = other.run(EvalSet.read(tiny_evalset), output=tmp_path / f"at-{threshold}", shadow=False)
        pd.testing.assert_frame_equal(without_texts(run.replay({"gate": threshold})), live.predictions, atol=1e-5)


def test_survivors_are_gathered_into_full_batches_and_shadow_is_off_the_timed_path(balanced, tiny_evalset, tmp_path):
    run = balanced.run(EvalSet.read(tiny_evalset), output=tmp_path / "run", batch_size=16)
    passed = int((run.predictions["decided_by"] == "intent").sum())
    sizes = run.timings.groupby("stage")["n_examples"]
    assert sizes.sum().to_dict() == {"gate": 200, "intent": passed}
    assert sizes.get_group("intent").gt(8).sum() >= passed // 16 - 1, "batches are full, but for the last"
    scores = run.scores("intent")
    assert scores.shadow.sum() == 200 - passed
    assert (run.predictions["decided_by"].to_numpy()[scores.shadow] == "gate").all()
    gate = run.timings.query("stage == 'gate'")
    assert gate["n_tokens"].is_monotonic_decreasing
    assert gate["sequence_length"].nunique() > 3, "texts of like length are scored together"


def test_an_empty_pass_set_and_a_full_one(tiny, tiny_evalset, tmp_path):
    for threshold, decided in ((1.0, "gate"), (0.0, "intent")):
        with Cascade.load(CascadeSpec.read(tiny).with_thresholds({"gate": threshold})) as cascade:
            run = cascade.run(EvalSet.read(tiny_evalset), output=tmp_path / decided)
        assert set(run.predictions["decided_by"]) == {decided}
        pd.testing.assert_frame_equal(without_texts(run.replay()), run.predictions)
    assert np.isnan(Run.read(tmp_path / "gate").metrics["stages"]["intent"]["accuracy"])
    written = json.loads((tmp_path / "gate" / "metrics.json").read_text())
    assert written["stages"]["intent"]["accuracy"] is None


def test_three_stages_and_one(tiny, tmp_path):
    spec = CascadeSpec.read(tiny)
    content = spec.to_dict()
    second = {**content["stage"][0], "name": "gate2"}
    frame = pd.DataFrame({"text": texts(30), "label": ["oos", "1", "2"] * 10})
    for stages in ([content["stage"][0], second, content["stage"][1]], [content["stage"][1]]):
        these = frame if len(stages) == 3 else frame[frame["label"] != "oos"]
        with Cascade.load(CascadeSpec.from_dict({"stage": stages})) as cascade:
            run = cascade.run(EvalSet.from_frame(these), output=tmp_path / str(len(stages)))
        pd.testing.assert_frame_equal(without_texts(run.replay()), run.predictions)
        assert list(run.metrics["stages"]) == [stage["name"] for stage in stages]


def test_a_label_of_no_stage_is_refused_before_anything_is_written(loaded, tmp_path):
    evalset = EvalSet.from_frame(pd.DataFrame({"text": ["a", "b"], "label": ["1", "7"]}))
    with pytest.raises(EvalSetError, match="row 1: label '7' belongs to no stage"):
        loaded.run(evalset, output=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_stage_that_cannot_be_loaded_closes_those_that_were(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.parent, tmp_path / "broken")
    for name in ("checkpoint", "model.ckpt-7.index"):
        (tmp_path / "broken" / "intent" / name).unlink()
    closed = []
    monkeypatch.setattr(cascade_module.Stage, "close", lambda self: closed.append(self.spec.name))
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        Cascade.load(tmp_path / "broken" / "cascade.toml")
    assert closed == ["gate"]
