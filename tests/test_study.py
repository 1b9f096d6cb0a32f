"""A whole study on small data: trainings, cascades, thresholds chosen on validation, one results file."""

from __future__ import annotations

import json

import pytest
from helpers import write_checkpoint
from test_finetune import keyword_texts
from typer.testing import CliRunner

from cascade_lab.cli import app
from cascade_lab.exceptions import SpecError
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
        ("threshold", 0), ("threshold", 1), ("gate and two", 0), ("gate and two", 1),
    ]  # fmt: skip
    for row in results["rows"]:
        assert set(row["thresholds"]) == set(row["stages"])
        assert row["validation"]["accuracy"] > 0.4
    assert results["rows"][2]["validation"]["in_scope_accuracy"] >= 0.3
    assert len(results["models"]["two-seed1"]["curve"]) == 3
    trained_at = (tmp_path / "out" / "models" / "two-seed0" / "training.json").stat().st_mtime_ns
    again = run_study(tmp_path / "study.toml", data=tmp_path, init=tmp_path / "init", output=tmp_path / "out")
    assert again["rows"] == results["rows"]
    assert (tmp_path / "out" / "models" / "two-seed0" / "training.json").stat().st_mtime_ns == trained_at


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("learning_rate = 2e-3", "learning_rate ="), "not TOML"),
        (("leave_out", "leave_uot"), "model 'two': unknown key 'leave_uot'; did you mean 'leave_out'"),
        (('stages = ["gate", "two"]', 'stages = ["gaet", "two"]'), "no model is named 'gaet'; did you mean 'gate'"),
        (('out_of_scope = "oos"', ""), "out_of_scope is missing"),
    ],
)
def test_a_bad_study_is_refused(change, message, tmp_path):
    (tmp_path / "study.toml").write_text(STUDY.replace(*change))
    with pytest.raises(SpecError, match=message):
        run_study(tmp_path / "study.toml", data=tmp_path, init="random", output=tmp_path / "out")
