"""The latency benchmark, and the command latency, on the tiny cascade."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import texts
from typer.testing import CliRunner

from cascade_lab import Cascade, CascadeSpec, EvalSet
from cascade_lab.analysis.same_cascade import check_same_cascade
from cascade_lab.analysis.serving_latency import LatencyStudy, checked_cost, serving_metrics
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError, RunError
from cascade_lab.latency_benchmark import measure, measure_run, serve_batch


@pytest.fixture(scope="module")
def cascade(tiny):
    with Cascade.load(tiny) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def study(cascade, tiny_evalset):
    evalset = EvalSet.read(tiny_evalset)
    return measure(cascade, evalset, batch_sizes=(1, 8, 32), repeats=2, limit=None, batches=25, seed=5)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_batches_are_answered_as_predict_does(cascade, batch_size, pairs):
    first = texts(60, seed=8)
    second = [text if i % 3 else None for i, text in enumerate(texts(60, seed=9))] if pairs else None
    expected = cascade.predict(first, second)
    reached = dict.fromkeys(("gate", "intent"), 0)
    for start in range(0, 60, batch_size):
        part = slice(start, start + batch_size)
        predictions, timings = serve_batch(cascade, first[part], second and second[part], spec=cascade.spec)
        part_expected = expected[part].reset_index(drop=True)
        assert predictions["predicted"].tolist() == part_expected["predicted"].tolist()
        assert predictions["decided_by"].tolist() == part_expected["decided_by"].tolist()
        assert predictions["probability"].to_numpy() == pytest.approx(part_expected["probability"], abs=1e-5)
        for row in timings:
            reached[row["stage"]] += row["n_examples"]
            assert row["sequence_length"] <= row["n_tokens"] <= row["n_examples"] * row["sequence_length"]
            assert min(row["tokenize_seconds"], row["run_seconds"], row["answer_seconds"]) >= 0
    assert reached == {"gate": 60, "intent": int(expected["intent_probability"].notna().sum())}


def test_no_later_stage_is_asked_where_nothing_goes_on(cascade):
    closed = cascade.spec.with_thresholds({"gate": 1.0})
    predictions, timings = serve_batch(cascade, texts(5), spec=closed)
    assert set(predictions["decided_by"]) == {"gate"}
    assert [row["stage"] for row in timings] == ["gate"]


def test_every_text_is_counted_once_a_repeat_and_what_goes_on_is_what_passes(cascade, study, tiny_evalset):
    predictions = cascade.predict(EvalSet.read(tiny_evalset).texts)
    assert study.texts["gate_probability"].to_numpy() == pytest.approx(predictions["gate_probability"], abs=1e-5)
    reached = predictions["intent_probability"].notna().to_numpy()
    assert study.texts["intent_probability"][reached].to_numpy() == pytest.approx(
        predictions["intent_probability"][reached], abs=1e-5
    )
    own = study.own
    n_texts = own.groupby(["batch_size", "stage", "repeat"])["n_examples"].sum()
    for repeat in range(2):
        assert n_texts[1, "gate", repeat] == 25  # as many as the batches allow
        assert n_texts[8, "gate", repeat] == n_texts[32, "gate", repeat] == 200
        assert n_texts[32, "intent", repeat] == reached.sum()
    assert not own.duplicated(["repeat", "batch_size", "batch", "stage"]).any()
    assert set(own["threshold"]) == {0.5}


def test_thresholds_are_checked_over_all_repeats_at_quantiles_of_the_gates_probability(study):
    checks = study.checks
    probabilities = study.texts["gate_probability"]
    assert sorted(set(checks["threshold"])) == study.settings["checked"]
    fractions = [(probabilities >= threshold).mean() for threshold in study.settings["checked"]]
    assert fractions == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1], abs=0.006)
    for _, own in checks[checks["stage"] == "gate"].groupby(["threshold", "batch_size"]):
        assert sorted(own["batch"]) == list(range(len(own))), "over the repeats, each batch number once"
        assert own["repeat"].nunique() == 2
    compared = checked_cost(study)
    assert len(compared) == 5 * 3
    for row in compared.itertuples():
        own = checks[(checks["threshold"] == row.threshold) & (checks["batch_size"] == row.batch_size)]
        n = own.groupby("stage")["n_examples"].sum()
        assert row.reach == pytest.approx(n.get("intent", 0) / n["gate"]), "what was predicted to go on went on"
    assert np.isfinite(compared[["predicted_ms", "measured_ms"]]).all(axis=None)


def test_a_cascade_of_one_stage_has_no_threshold_to_check(tiny, tiny_evalset):
    tables = CascadeSpec.read(tiny).to_dict()
    spec = CascadeSpec.from_dict({"name": "alone", "stage": tables["stage"][1:]})
    with Cascade.load(spec) as cascade:
        study = measure(cascade, EvalSet.read(tiny_evalset), batch_sizes=[4], repeats=1, limit=20)
    assert study.settings["checked"] == []
    assert checked_cost(study).empty
    assert study.timings["n_examples"].sum() == 20
    assert serving_metrics(study.timings).loc[(4, "intent", "share"), "value"] == 1


def test_the_cascade_of_a_run_is_measured_on_its_own_texts(tiny_run):
    study = measure_run(tiny_run, batch_sizes=(1, 8, 500), repeats=1, limit=24)
    assert study.settings["batch_sizes"] == [1, 8], "there are fewer than 500 texts"
    check_same_cascade(study, tiny_run)
    assert study.spec.stages == tiny_run.spec.stages
    assert len(study.texts) == 24
    assert set(study.texts["example_id"]) <= set(tiny_run.examples["example_id"])
    assert study.settings["evalset"] == {**tiny_run.manifest["evalset"], "n_examples": 24}
    confidence = pd.Series(tiny_run.decision("gate").confidence, index=tiny_run.examples["example_id"])
    assert study.texts["gate_probability"].to_numpy() == pytest.approx(confidence[study.texts["example_id"]], abs=1e-5)


def test_a_cascade_whose_files_changed_since_the_run_is_not_measured(tiny, tiny_evalset, tmp_path):
    shutil.copytree(tiny.parent, tmp_path / "cascade", ignore=shutil.ignore_patterns("checkpoint"))
    texts = EvalSet.read(tiny_evalset).limit(8)
    with Cascade.load(tmp_path / "cascade" / "cascade.toml") as cascade:
        run = cascade.run(texts, output=tmp_path / "run")
    gate, intent = tmp_path / "cascade" / "gate", tmp_path / "cascade" / "intent"
    for path in (gate / "bert_config.json", intent / "vocab.txt", *gate.glob("*.data*"), *intent.glob("*.index")):
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        with pytest.raises(RunError, match=f"changed since: {path} has another SHA-256") as raised:
            measure_run(run, batch_sizes=[1], repeats=1)
        assert "\n" not in str(raised.value)
        path.unlink()
        with pytest.raises(CascadeLabError, match=r"missing|no such"):
            measure_run(run, batch_sizes=[1], repeats=1)
        path.write_bytes(content)
    moved = {intent: gate, gate: intent}  # the stages' checkpoints exchanged, which have the same digests together
    stages = [
        replace(stage, init_checkpoint=moved[stage.init_checkpoint], labels=("a", "b"), pass_label=None)
        for stage in run.spec.stages
    ]
    run.spec = replace(run.spec, stages=tuple(stages))
    with pytest.raises(RunError, match="the stages' files are exchanged"):
        measure_run(run, batch_sizes=[1], repeats=1)


def latency(*arguments):
    return CliRunner().invoke(app, ["latency", *(str(argument) for argument in arguments)])


def test_the_command_measures_keeps_and_shows(tiny, tiny_evalset, tmp_path):
    output = tmp_path / "study"
    few = ["--limit", 24, "--repeats", 1, "--batch-sizes", "1,8"]
    result = latency(tiny, tiny_evalset, "--output", output, *few)
    assert result.exit_code == 0, result.output
    study = LatencyStudy.read(output)
    assert sorted(path.name for path in output.iterdir()) == ["latency.json", "texts.parquet", "timings.parquet"]
    assert len(study.texts) == 24
    assert json.loads((output / "latency.json").read_text())["evalset"]["n_examples"] == 24
    first = study.timings[study.timings["stage"] == "gate"]
    assert first.groupby("check")["n_examples"].sum().to_dict() == {False: 2 * 24, True: 5 * 2 * 24}
    lines = result.stdout.splitlines()
    assert sum("end to end" in row for row in lines) == 4
    assert sum(row.rstrip().endswith("%") and "(" in row for row in lines) >= 8  # batches of 1; of 8 texts are too few
    assert max(len(row) for row in lines if str(tmp_path) not in row) <= 80
    again = latency(tiny, tiny_evalset, "--output", output, *few)
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--batch-sizes", "1,many"], "not whole numbers"),
        (["--batch-sizes", "0,8"], "different whole numbers"),
        (["--batch-sizes", "8,8"], "different whole numbers"),
        (["--batch-sizes", "8,500"], "batch size 500"),
        (["--split", "train"], "split"),
    ],
)
def test_bad_input_is_said_in_one_line(tiny, tiny_evalset, tmp_path, arguments, why):
    result = latency(tiny, tiny_evalset, "--output", tmp_path / "study", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert why in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_failure_midway_leaves_nothing(tiny, tiny_evalset, tmp_path, monkeypatch):
    monkeypatch.setattr(pd.DataFrame, "to_parquet", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "disk full")))
    result = latency(tiny, tiny_evalset, "--output", tmp_path / "study", "--limit", 8, "--batch-sizes", "4")
    assert result.exit_code == 2
    assert "disk full" in result.stderr
    assert not list(tmp_path.iterdir())
