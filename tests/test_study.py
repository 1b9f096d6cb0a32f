"""A whole study on small data: trainings, cascades, thresholds chosen on validation, one results file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import write_checkpoint
from test_finetune import keyword_texts
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, Run
from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.study_results import StudyResults
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.study import run_study

STUDY = """
evaluate = "full.json"
out_of_scope = "oos"

[finetune]
max_seq_length = 16
train_batch_size = 16
learning_rate = 2e-3
num_train_epochs = 3
threads = 1

[[model]]
name = "two"
train = "full.json"
leave_out = ["oos"]
seeds = [0, 1]

[[model]]
name = "gate"
train = "binary.json"
labels = ["oos", "in"]
seeds = [0, 1]
num_train_epochs = 2

[[scheme]]
name = "threshold"
stages = ["two"]
maximize = "accuracy"

[[scheme]]
name = "gate and two"
stages = ["gate", "two"]
maximize = "reject_recall"
at_least = { in_scope_accuracy = 0.3 }
paper = { in_scope_accuracy = 0.9, reject_recall = 0.4 }

[[scheme]]
name = "rejector"
stages = ["gate", "two"]
evidence = ["gate", "energy", "mahalanobis"]
in_scope_accuracy = 0.3

[[scheme]]
name = "impossible"
stages = ["gate", "two"]
evidence = ["gate"]
in_scope_accuracy = 1
"""


def test_a_study_trains_scores_and_chooses_thresholds_on_validation_only(tmp_path):
    splits = {"train": 240, "val": 60, "test": 60}
    full, binary = {}, {}
    for split, n in splits.items():
        frame = keyword_texts(n, seed=n + len(split))
        frame["label"] = frame["label"].replace({"sky": "oos"})
        inside = frame["label"] != "oos"
        full[split] = frame[inside].to_numpy().tolist()
        full[f"oos_{split}"] = frame[~inside].to_numpy().tolist()
        binary[split] = [[text, "oos" if label == "oos" else "in"] for text, label in frame.to_numpy().tolist()]
    for name, content in (("full", full), ("binary", binary)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_checkpoint(tmp_path / "init", 2, seed=5, scale=0.1)
    (tmp_path / "study.toml").write_text(STUDY)
    arguments = ["study", tmp_path / "study.toml", "--data", tmp_path, "--init", tmp_path / "init"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "gate and two" in result.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["scheme"], row["seed"]) for row in results["rows"]] == [
        (name, seed) for name in ("threshold", "gate and two", "rejector", "impossible") for seed in (0, 1)
    ]
    for row in results["rows"][:6]:
        assert set(row["thresholds"]) == set(row["stages"])
        assert row["validation"]["accuracy"] > 0.4
        assert row["without_rejection"]["test"] >= row["test"]["in_scope_accuracy"]
    check_rejector(tmp_path / "out", results)
    assert results["rows"][2]["validation"]["in_scope_accuracy"] >= 0.3
    assert len(results["models"]["two-seed1"]["curve"]) == 3
    trained_at = (tmp_path / "out" / "models" / "two-seed0" / "training.json").stat().st_mtime_ns
    again = run_study(tmp_path / "study.toml", data=tmp_path, init=tmp_path / "init", output=tmp_path / "out")
    assert again["rows"][:6] == results["rows"][:6]
    assert (tmp_path / "out" / "models" / "two-seed0" / "training.json").stat().st_mtime_ns == trained_at


def check_rejector(output: Path, results: dict[str, Any]) -> None:
    """The row is what the written cascade does on test; what cannot be reached has no thresholds."""
    row = results["rows"][4]
    assert list(row["rejector"]) == ["gate.log_odds", "two.energy", "two.mahalanobis"]
    spec = CascadeSpec.read(output / "cascades" / "gate-two-seed0-gate-energy-mahalanobis-0.3.toml")
    test = Run.read(output / "runs" / "gate-two-seed0-test")
    assert row["test"] == prediction_metrics(spec, test.with_spec(spec).predictions)
    assert row["thresholds"] == spec.thresholds
    assert spec.rejector.fitted_on["run_id"] == Run.read(output / "runs" / "gate-two-seed0-val").manifest["run_id"]
    training = Run.read(output / "runs" / "two-seed0-train")
    assert set(training.examples["label"]) == {"money", "music"}, "the training texts of the last model"
    impossible = results["rows"][6]
    assert impossible["rejector"] is None
    assert impossible["thresholds"] == {}
    assert "no thresholds give in_scope_accuracy at least 1" in impossible["infeasible"]
    table = StudyResults.read(output / "results.json").table()
    assert table.loc["impossible", "infeasible"] == 2
    shutil.copy(output / "results.json", output / "again.json")
    both = StudyResults.read(output / "results.json", output / "again.json")
    assert both.table()["seeds"].tolist() == (2 * table["seeds"]).tolist()
    assert len(both.curves()) == 2 * len(results["models"])
    reachable = [100 * row["without_rejection"]["test"] for row in results["rows"][:2]]
    assert table.loc["threshold", "test: without rejection"].startswith(f"{sum(reachable) / 2:.1f} (")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("learning_rate = 2e-3", "learning_rate ="), "not TOML"),
        (("leave_out", "leave_uot"), "model 'two': unknown key 'leave_uot'; did you mean 'leave_out'"),
        (('stages = ["gate", "two"]', 'stages = ["gaet", "two"]'), "no model is named 'gaet'; did you mean 'gate'"),
        (('out_of_scope = "oos"', ""), "out_of_scope is missing"),
        (("train_batch_size = 16", "train_batch_sise = 16"), "finetune: unknown key 'train_batch_sise'; did you mean"),
        (("num_train_epochs = 3", "num_train_epochs = 0"), "num_train_epochs is 0; it must be at least 1"),
        (("max_seq_length = 16", 'max_seq_length = "16"'), "max_seq_length is '16'; it must be a whole number"),
        (("max_seq_length = 16", "warmup_proportion = 2"), "warmup_proportion is 2; it must be from 0 to 1"),
        (("seeds = [0, 1]", "seeds = [0, -1]"), "model 'two': seed is -1; it must be from 0 to 2147483647"),
        (('train = "full.json"\n', ""), "model 'two': has no train"),
        (('stages = ["two"]', "stages = []"), "scheme 'threshold': stages is empty"),
        (('maximize = "accuracy"', 'maximize = "accuracy"\nevidence = ["energy"]'), "has both maximize and evidence"),
        (('["gate"]\nin', '["gtae"]\nin'), "no evidence is named 'gtae'; did you mean 'gate'"),
        (('maximize = "accuracy"', 'maximize = "accurcay"'), "no metric is named 'accurcay'; did you mean 'accuracy'"),
        (("seeds = [0, 1]\n\n[[model]]", 'seeds = ["a"]\n\n[[model]]'), "model 'two': seeds must be a whole number"),
        (('name = "gate"', 'name = "the gate"'), "no model is named 'gate'"),
        (('evaluate = "full.json"', 'evaluate = "a.json"'), r"a\.json: cannot be read"),
        (("in_scope_accuracy = 1\n", ""), "scheme 'impossible': evidence and in_scope_accuracy belong together"),
    ],
)
def test_a_bad_study_is_refused(change, message, tmp_path):
    (tmp_path / "study.toml").write_text(STUDY.replace(*change))
    with pytest.raises(CascadeLabError, match=message):
        run_study(tmp_path / "study.toml", data=tmp_path, init="random", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
