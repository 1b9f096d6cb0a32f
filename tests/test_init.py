"""`cascade-lab init`: from two checkpoints and a csv to a report, what it assumes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import texts, write_checkpoint
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, Run
from cascade_lab.cli import app
from cascade_lab.draft_labels import draft_labels
from cascade_lab.exceptions import SpecError

DATA = Path(__file__).parent / "data" / "huggingface"


def cascade_lab(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(message, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def named(folder: Path, labels: list[str]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(number): label for number, label in enumerate(labels)}
    config["label2id"] = {label: number for number, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two Hugging Face directories, and a csv whose labels out of scope are those texts that row 1 of the gate likes.

    The labels of the gate have no names.
    """
    from cascade_lab.bert.huggingface import import_directory
    from cascade_lab.draft import _logits
    from cascade_lab.evalset import EvalSet

    folder = tmp_path_factory.mktemp("init")
    shutil.copytree(DATA / "relu", folder / "intent")
    shutil.copytree(DATA / "relu", folder / "gate")
    tensors = load_file(folder / "gate" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][:2].copy()
    save_file(tensors, folder / "gate" / "model.safetensors", {"format": "pt"})
    named(folder / "gate", ["LABEL_0", "LABEL_1"])
    converted = [import_directory(folder / name, folder / "made" / name) for name in ("gate", "intent")]
    stages = [
        {
            "name": path.name,
            "labels": (path / "labels.txt").read_text().splitlines(),
            "init_checkpoint": str(path),
            "bert_config_file": str(path / "bert_config.json"),
            "vocab_file": str(path / "vocab.txt"),
            "max_seq_length": 32,
        }
        for path in converted
    ]
    spec = CascadeSpec.from_dict(
        {"name": "x", "stage": [{**stages[0], "pass_label": "LABEL_1", "threshold": 0.5}, stages[1]]}
    )
    sentences = texts(60, seed=4)
    evalset = EvalSet.from_frame(pd.DataFrame({"text": sentences}), unlabelled=True)
    likes_row_1 = _logits(spec, "gate", evalset) @ [-1, 1]
    logits = _logits(spec, "intent", evalset)
    tensors = load_file(folder / "intent" / "model.safetensors")
    tensors["classifier.bias"] -= logits.mean(axis=0)  # so that it predicts all labels
    save_file(tensors, folder / "intent" / "model.safetensors", {"format": "pt"})
    best = (logits - logits.mean(axis=0)).argmax(axis=1)
    labels = np.where(likes_row_1 > np.quantile(likes_row_1, 0.7), "oos", np.array(stages[1]["labels"])[best])
    pd.DataFrame({"sentence": sentences, "intent": labels}).to_csv(folder / "data.csv", index=False)
    shutil.rmtree(folder / "made")
    return folder


def test_two_huggingface_directories_and_a_csv_become_a_report_in_three_commands(folder, tmp_path):
    cascade, run = tmp_path / "new" / "cascade.toml", tmp_path / "run"
    columns = ("--text-column", "sentence", "--label-column", "intent")
    shown = cascade_lab("init", folder / "gate", folder / "intent", folder / "data.csv", "--output", cascade)
    cascade_lab("run", cascade, folder / "data.csv", *columns, "--output", run, "--no-report")
    cascade_lab("report", run)

    assert "are answered correctly" in (run / "report.html").read_text(encoding="utf-8")
    assert shown.splitlines() == [
        f"converted: {tmp_path / 'new' / 'cascade-gate'}",
        f"converted: {tmp_path / 'new' / 'cascade-intent'}",
        "assumed: the texts are in column 'sentence'",
        "assumed: the labels are in column 'intent'",
        "assumed: stage gate: its labels have no names; they are called 'oos' and 'in'",
        "assumed: stage gate: max_seq_length = 32 (the longest text has 31 tokens)",
        "assumed: stage intent: max_seq_length = 32 (the longest text has 31 tokens)",
        "assumed: stage gate: pass_label 'in' is row 0 of its head, which fits the true labels better than the other "
        "row",
        "checked: gate: AUROC 1.0000 on 60 texts",
        "checked: intent: accuracy 1.0000 on 42 texts in scope",
        f"cascade: {cascade}",
    ]
    spec = CascadeSpec.read(cascade)
    assert (spec.name, spec.reject_labels, spec.last.reject_label) == ("new", ("oos",), "oos")
    assert [stage.labels for stage in spec.stages] == [("in", "oos"), ("billing", "music", "weather")]
    assert [(stage.threshold, stage.do_lower_case, stage.max_seq_length) for stage in spec.stages] == [
        (0.5, True, 32),
        (None, True, 32),
    ]
    written = cascade.read_text(encoding="utf-8")
    assert "# as recorded in import.json\ndo_lower_case = true\n" in written
    assert 'labels = "cascade-intent/labels.txt"' in written
    assert Run.read(run).metrics["stages"]["gate"]["auroc"] == 1

    # The same conversions are used again; nothing is replaced without --overwrite.
    command = ("init", folder / "gate", folder / "intent", folder / "data.csv", "--output", cascade)
    refused("exists already; choose another output, or pass --overwrite", *command)
    before = (cascade.parent / "cascade-gate" / "model.ckpt.index").stat().st_mtime_ns
    assert cascade_lab(*command, "--overwrite") == shown
    assert (cascade.parent / "cascade-gate" / "model.ckpt.index").stat().st_mtime_ns == before
    refused("was converted from other files than", command[0], folder / "intent", *command[2:], "--overwrite")
    assert cascade.read_text(encoding="utf-8") == written


def test_swapped_labels_give_a_warning_and_the_way_out(folder, tmp_path):
    gate = named(Path(shutil.copytree(folder / "gate", tmp_path / "gate")), ["no", "yes"])
    command = ("init", gate, folder / "intent", folder / "data.csv", "--output", tmp_path / "cascade.toml")
    shown = cascade_lab(*command)
    assert "assumed: stage gate: pass_label = 'yes' (its name says so)" in shown
    assert "assumed: stage gate: its label 'no' is called 'oos', as in data.csv" in shown
    assert "warning: the labels of the gate look swapped: its AUROC on 60 texts is 0.0000, below 0.5; if they " in shown
    assert "pass --gate-labels yes,oos" in shown
    shown = cascade_lab(*command, "--gate-labels", "yes,oos", "--intent-labels", "music,weather,billing", "--overwrite")
    assert "checked: gate: AUROC 1.0000" in shown
    assert "warning: the intent stage is right on 0.0% of the texts in scope" in shown
    assert CascadeSpec.read(tmp_path / "cascade.toml").stages[0].labels == ("yes", "oos")


def test_bad_input_of_init_is_one_line_and_leaves_nothing(folder, tmp_path):
    for name, content in (
        ("spam.csv", "text,label\npay,billing\nwin,spam\nhi,oos\n"),
        ("names.csv", "pay my bill,billing\n"),
    ):
        (tmp_path / name).write_text(content)
    (tmp_path / "gate").mkdir()
    for checkpoint in (folder / "gate").glob("*.json"):
        shutil.copy(checkpoint, tmp_path / "gate")
    gate, intent, data = folder / "gate", folder / "intent", folder / "data.csv"
    output = ("--output", tmp_path / "out" / "cascade.toml")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for message, *arguments in (
        ("none.csv: cannot be read", gate, intent, tmp_path / "none.csv", *output),
        ("no column 'text'; it has pay my bill, billing; name", gate, intent, tmp_path / "names.csv", *output),
        ("no stage has the labels 'oos', 'spam', and one at most", gate, intent, tmp_path / "spam.csv", *output),
        ("no such checkpoint", folder / "none", intent, data, *output),
        ("contains no checkpoint", folder, intent, data, *output),
        ("model.safetensors", tmp_path / "gate", intent, data, *output),
        ("model.safetensors", gate, tmp_path / "gate", data, *output),
        ("a cascade is a .toml file", gate, intent, data, "--output", tmp_path / "out"),
        ("--gate-labels names 3 labels, but", gate, intent, data, *output, "--gate-labels", "a,b,c"),
        ("--gate-labels: a label is empty or occurs twice", gate, intent, data, *output, "--gate-labels", "a,a"),
        ("--columns 'text,': a name is empty", gate, intent, data, *output, "--columns", "text,"),
        ("'c' is no label of the gate", gate, intent, data, *output, "--gate-labels", "a,b", "--pass-label", "c"),
        ("no column 'utterance'; it has sentence, intent", gate, intent, data, *output, "--text-column", "utterance"),
    ):  # fmt: skip
        refused(message, "init", *arguments)
        assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_tensorflow_checkpoints_are_drafted_where_they_are(tiny, tmp_path):
    rows = pd.DataFrame({"text": texts(30), "label": [str(i % 4) for i in range(30)]})
    rows.to_csv(tmp_path / "texts.tsv", sep="\t", index=False)
    folder = tiny.parent
    shown = cascade_lab(
        "init", folder / "gate", folder / "intent", tmp_path / "texts.tsv", "--output", tmp_path / "mine.toml"
    )
    assert "assumed: stage gate: do_lower_case = true (vocab.txt has no capital letters)" in shown
    assert "assumed: stage intent: its labels have no names; those of texts.tsv are taken in sorted order" in shown
    assert "checked: gate: not checked, none of 30 texts are out of scope" in shown
    assert "converted" not in shown
    spec = CascadeSpec.read(tmp_path / "mine.toml")
    assert spec.last.labels == ("0", "1", "2", "3")
    assert spec.stages[0].labels == ("oos", "in")
    assert spec.stages[0].init_checkpoint.resolve() == (folder / "gate").resolve()
    cascade_lab("inspect", tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("gate", "seen", "labels", "pass_label", "reject_label", "is_known"),
    [
        (["in", "oos"], ["a", "b", "oos"], ("in", "oos"), "in", "oos", True),
        (["in", "oos"], ["a"], ("in", "oos"), "in", "oos", True),
        (["no", "yes"], ["a", "oos"], ("oos", "yes"), "yes", "oos", True),
        (["x", "y"], ["a", "y"], ("x", "y"), "x", "y", True),
        (["x", "y"], ["a", "none"], ("none", "y"), "y", "none", False),
        (["x", "y"], ["a"], ("x", "y"), "y", "x", False),
        (["in", "abuse", "oos"], ["a", "oos"], ("in", "abuse", "oos"), "in", "abuse", True),
        (None, ["a", "none"], ("none", "in"), "in", "none", False),
    ],
)
def test_the_labels_of_a_gate(gate, seen, labels, pass_label, reject_label, is_known):
    drafted = draft_labels((gate, len(labels)), (["a", "b"], 2), seen=seen, where="set.csv")
    assert (drafted.gate, drafted.pass_label, drafted.reject_label) == (labels, pass_label, reject_label)
    assert (drafted.other is None) == is_known
    if drafted.other is not None:
        assert drafted.other.gate.index(drafted.other.pass_label) == 1 - labels.index(pass_label)
        assert drafted.other.reject_label in {reject_label, "y"}


@pytest.mark.parametrize(
    ("gate", "intent", "seen", "message"),
    [
        ((["in", "oos"], 2), (["a", "b"], 2), ["a", "c", "oos"], "no stage has the labels 'c', and one"),
        ((["x", "y", "z"], 3), (["a", "b"], 2), ["a", "c"], "label 'c' belongs to no stage .gate: 'x', 'y', 'z'"),
        ((None, 3), (["a", "b"], 2), ["a", "c"], "the gate has 3 labels without names; .*--gate-labels"),
        ((None, 2), (["in", "b"], 2), ["in", "c"], "'in' is a label already"),
        ((["in", "oos"], 2), (None, 3), ["a", "b", "oos"], "2 labels in scope, but the intent checkpoint has 3"),
        ((["a", "b"], 2), (["a", "b"], 2), ["a", "b"], "every label of the gate .* is an answer too"),
    ],
)
def test_labels_that_do_not_fit_together_are_refused(gate, intent, seen, message):
    with pytest.raises(SpecError, match=message):
        draft_labels(gate, intent, seen=seen, where="set.csv")


def test_what_a_checkpoint_tells(tmp_path):
    from cascade_lab.bert.checkpoint_facts import checkpoint_facts
    from cascade_lab.exceptions import CheckpointError

    write_checkpoint(tmp_path / "c", 3, seed=1)
    facts = checkpoint_facts(tmp_path / "c" / "model.ckpt-7")
    assert (facts.n_labels, facts.labels, facts.do_lower_case, facts.case_file) == (3, None, True, None)
    vocab = (tmp_path / "c" / "vocab.txt").read_text()
    (tmp_path / "c" / "vocab.txt").write_text(vocab.replace("\npay\n", "\nPay\n"))
    (tmp_path / "c" / "labels.txt").write_text("付款\nb\nc\n", encoding="utf-8")
    facts = checkpoint_facts(tmp_path / "c")
    assert (facts.labels, facts.do_lower_case) == (("付款", "b", "c"), False)
    (tmp_path / "c" / "training.json").write_text('{"flags": {"do_lower_case": true}}')
    assert checkpoint_facts(tmp_path / "c").do_lower_case
    (tmp_path / "c" / "labels.txt").write_text("b\nc\n")
    with pytest.raises(CheckpointError, match=r"labels.txt: has 2 labels, but the checkpoint has 3"):
        checkpoint_facts(tmp_path / "c")
    write_checkpoint(tmp_path / "d", 3, seed=1, leave_out="output_weights")
    with pytest.raises(CheckpointError, match="has no classification head"):
        checkpoint_facts(tmp_path / "d")
