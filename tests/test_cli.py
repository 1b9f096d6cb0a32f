"""The command line: what it prints, and one line with exit code 2 on bad input."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
from helpers import random_run
from typer.testing import CliRunner

from cascade_lab import Cascade, EvalSet, Run
from cascade_lab.cli import COMMANDS, app
from cascade_lab.cli.printing import next_step
from cascade_lab.exceptions import EvalSetError
from cascade_lab.leaderboard import leaderboard


def cascade_lab(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def refused(result, message):
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_run_makes_a_directory_and_prints_a_table(tiny, tiny_evalset, tmp_path):
    result = cascade_lab(
        "run", tiny, tiny_evalset, "--output", tmp_path / "run", "--limit", 50, "--no-shadow", "--no-report",
        "--batch-size", 8,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    run = Run.read(tmp_path / "run")
    assert len(run.examples) == 50
    assert not run.scores("intent").shadow.any()
    assert run.manifest["batch_size"] == 8
    assert f"{run.metrics['end_to_end']['accuracy']:.4f}" in result.stdout
    assert f"run: {tmp_path / 'run'}" in result.stdout


def test_inspect_shows_a_cascade_a_checkpoint_and_a_run(tiny, tiny_run):
    shown = cascade_lab("inspect", tiny).stdout
    assert "p(in) ≥ 0.5" in shown
    assert "2 × 32" in shown
    shown = cascade_lab("inspect", tiny.parent / "gate").stdout
    assert "bert/pooler/dense/kernel" in shown
    assert "adam_m" not in shown
    assert "global_step" in shown
    assert "82 Adam slots not shown" in shown
    assert f"{tiny_run.metrics['end_to_end']['accuracy']:.4f}" in cascade_lab("inspect", tiny_run.directory).stdout


def test_predict_takes_arguments_and_standard_input(tiny):
    shown = cascade_lab("predict", tiny, "pay my bill", "[bold]sing[/bold]\x1b[31m")
    assert shown.exit_code == 0
    assert "[bold]sing[/bold]" in shown.stdout
    assert "\x1b" not in shown.stdout
    lines = cascade_lab("predict", tiny, "-", "--json", stdin="pay my bill\n\nשלום 🙂\n").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == ["pay my bill", "", "שלום 🙂"]
    stages = ("gate_probability", "intent_probability")
    assert set(rows[0]) == {"text", "predicted", "decided_by", "probability", "confidence", *stages}
    assert {row["intent_probability"] is None for row in rows if row["decided_by"] == "gate"} <= {True}


def test_predict_refuses_bytes_that_are_not_utf8(tiny):
    refused(cascade_lab("predict", tiny, "-", stdin=b"pay\n\xff\n"), "standard input line 2: byte 0 is not UTF-8")


def test_predict_takes_the_texts_of_a_table_and_refuses_missing_ones_by_their_place(tiny):
    frame = pd.DataFrame({"text": ["pay my bill", "sing"], "text_b": [None, "now"]})
    with Cascade.load(tiny) as cascade:
        assert cascade.predict(frame).equals(cascade.predict(["pay my bill", "sing"], [None, "now"]))
        assert cascade.predict(frame[["text"]]).equals(cascade.predict(frame["text"]))
        for bad in (
            ["pay", None],
            pd.Series(["pay", float("nan")]),
            ["pay", 5],
            pd.DataFrame({"text": ["pay", pd.NA]}),
        ):
            with pytest.raises(EvalSetError, match=r"texts\[1\] is .*; it must be a string"):
                cascade.predict(bad)
        with pytest.raises(EvalSetError, match=r"texts_b\[0\] is nan"):
            cascade.predict(["pay"], [float("nan")])
        with pytest.raises(EvalSetError, match="1 texts, but 2 second texts"):
            cascade.predict(["pay"], [None, None])
        with pytest.raises(EvalSetError, match=r"no column 'text'; it has Text; did you mean 'Text'\?"):
            cascade.predict(pd.DataFrame({"Text": ["pay"]}))
        for bad in (b"pay", {"pay": 1}):
            with pytest.raises(TypeError, match="put it in a list"):
                cascade.predict(bad)


def test_standard_input_may_have_a_byte_order_mark(tiny):
    result = cascade_lab("predict", tiny, "-", "--json", stdin="\ufeffpay\n".encode())
    assert json.loads(result.stdout)["text"] == "pay"


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_a_console_that_lacks_a_character_prints_a_replacement(encoding, tiny):
    code = "from cascade_lab.cli import main; main()"
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}

    def printed(*arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode(encoding)

    assert json.loads(printed("predict", tiny, "--json", "pay öl 开灯 🙂"))["text"] == "pay öl 开灯 🙂"
    assert "pay ??" in printed("predict", tiny, "pay 开灯")
    assert "p(in) ? 0.5" in printed("inspect", tiny)
    assert "Usage" in printed("run", "--help")


def test_bad_input_is_one_line_and_exit_code_2(tiny, tiny_evalset, tiny_run, tmp_path):
    refused(cascade_lab("run", tmp_path / "no.toml", tiny_evalset), "no.toml: cannot be read")
    refused(cascade_lab("run", tiny, tmp_path / "no.tsv"), "no.tsv: cannot be read")
    refused(cascade_lab("run", tiny, tiny_evalset, "--output", tiny_run.directory), "exists already")
    (tmp_path / "bad.tsv").write_text("text\tlabel\npay\t1\nlost\tspam\n")
    refused(
        cascade_lab("run", tiny, tmp_path / "bad.tsv", "--output", tmp_path / "run"),
        "bad.tsv line 3: label 'spam' belongs to no stage (gate: oos, in; intent: 0, 1, 2, 3); fix the row or the",
    )
    assert not (tmp_path / "run").exists()
    refused(cascade_lab("inspect", tmp_path), "contains no checkpoint")
    refused(cascade_lab("report", tmp_path), "not a run directory")


def test_a_broken_checkpoint_leaves_no_run(tiny, tiny_evalset, tmp_path):
    shutil.copytree(tiny.parent, tmp_path / "broken")
    for file in (tmp_path / "broken").glob("*/checkpoint"):
        file.unlink()  # it names the directory that was copied, which gives a notice
    (tmp_path / "broken" / "intent" / "vocab.txt").write_text("[UNK]\n[CLS]\n")
    result = cascade_lab("run", tmp_path / "broken" / "cascade.toml", tiny_evalset, "--output", tmp_path / "run")
    refused(result, "vocab.txt: has no token [SEP]")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_debug_shows_the_traceback_of_an_error(tmp_path):
    result = cascade_lab("--debug", "run", tmp_path / "no.toml", "x.tsv")
    assert type(result.exception).__name__ == "SpecError"


@pytest.mark.parametrize("command", ["", *(command.__name__.replace("_", "-") for command in COMMANDS)])
def test_help_shows_an_example(command):
    result = cascade_lab(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"cascade-lab {command}" in result.stdout


def test_every_command_ends_with_the_next_one_to_try(monkeypatch, tmp_path):
    for command in COMMANDS:
        assert "next_step(" in inspect.getsource(sys.modules[command.__module__]), command.__name__
    shown = []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("cascade_lab.cli.printing.line", shown.append)
    next_step("run", tmp_path / "my cascade.toml", "EVALSET")
    assert shown == [f"next: cascade-lab run '{tmp_path / 'my cascade.toml'}' EVALSET"]


def test_flags_have_no_type_and_the_package_runs_as_a_module():
    for command in ("--help", "run --help", "finetune --help"):
        assert "<bool>" not in cascade_lab(*command.split()).stdout
    assert "--install-completion" in cascade_lab("--help").stdout
    expected = f"cascade-lab {version('cascade-lab')}\n"
    assert cascade_lab("--version").stdout == expected
    command = [sys.executable, "-m", "cascade_lab"]
    assert subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout == expected
    asked = {
        **os.environ,
        "_CASCADE_LAB_COMPLETE": "complete_bash",
        "COMP_WORDS": "cascade-lab run --over",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=asked, check=False)
    assert done.stdout.split() == ["--overwrite"]


def test_runs_are_listed_the_best_first_and_a_damaged_one_is_one_line(tmp_path):
    folder = tmp_path / "runs"
    for name, skill in (("a", 1), ("inner/b", 4), ("damaged", 1)):
        random_run(folder / name, n=60, seed=1, skill=skill)
    shutil.copytree(folder / "a", folder / "c.unfinished")
    rewritten = json.loads((folder / "a" / "manifest.json").read_text(encoding="utf-8"))
    tuned = {"run_id": "x", "goal": "maximize accuracy", "evalset": rewritten["evalset"]}
    rewritten["cascade"]["tuned_on"] = tuned
    (folder / "a" / "manifest.json").write_text(json.dumps(rewritten), encoding="utf-8")
    (folder / "damaged" / "predictions.parquet").write_bytes(b"PAR1")
    result = cascade_lab("runs", folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "][1:3] == ["inner/b", "a"]
    assert f"cannot be read: {folder / 'damaged'}/predictions.parquet: changed since the run" in result.stdout
    assert "unfinished" not in result.stdout
    assert "same texts: the thresholds were tuned on the texts of the run" in result.stdout
    rows = [json.loads(line) for line in cascade_lab("runs", folder, "--json").stdout.splitlines()]
    assert [row["run"] for row in rows] == [str(folder / name) for name in ("inner/b", "a", "damaged")]
    metrics = Run.read(folder / "a").metrics["end_to_end"]
    assert {key: rows[1][key] for key in metrics} == metrics
    assert (rows[0]["tuned_on"], rows[1]["tuned_on"], rows[1]["same_texts"]) == (None, "random.tsv", True)
    assert (rows[0]["n_labelled"], rows[2]["n_labelled"], rows[2]["accuracy"]) == (60, None, None)
    lowest = leaderboard(folder, sort="reject_recall")["reject_recall"]
    assert lowest.dropna().is_monotonic_decreasing
    refused(cascade_lab("runs", folder, "--sort", "acuracy"), "did you mean 'accuracy'")
    refused(cascade_lab("runs", tmp_path / "none"), "no such folder")
    (tmp_path / "empty").mkdir()
    refused(cascade_lab("runs", tmp_path / "empty"), "has no run")


def test_the_installed_command_hides_what_tensorflow_prints(tiny):
    """In another process, because TensorFlow prints to file descriptor 2, not to Python's sys.stderr."""
    command = [sys.executable, "-c", "from cascade_lab.cli import main; main()", "predict", str(tiny), "pay my bill"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "pay my bill" in done.stdout
    assert done.stderr == ""


def test_commands_take_a_run_of_which_some_texts_have_no_label(tmp_path):
    labelled = random_run(tmp_path / "labelled", n=120, seed=1)
    examples = labelled.examples.assign(text=[f"{text} {i}" for i, text in enumerate(labelled.examples["text"])])
    examples["label"] = examples["label"].mask(np.arange(120) % 4 == 0)
    logits = {stage.name: labelled.scores(stage.name).logits for stage in labelled.spec.stages}
    run = Run.from_logits(labelled.spec, examples, logits).write(tmp_path / "run").directory
    other = Run.read(run).with_thresholds({"gate0": 0.4}).write(tmp_path / "other").directory
    audit, corrected = tmp_path / "audit.csv", tmp_path / "corrected.jsonl"
    for command, *arguments in (
        ["inspect", run],
        ["tune", run, "--maximize", "accuracy", "--output", tmp_path / "t.toml"],
        ["calibrate", run, "--output", tmp_path / "c.toml"],
        ["compare", run, other],
        ["audit", run, "--output", audit],
        ["correct", run, audit, "--output", corrected],
    ):
        result = cascade_lab(command, *arguments)
        assert result.exit_code == 0, result.output
        assert "90" in result.stdout, f"{command} shows how many texts have a label"
    assert EvalSet.read(corrected, unlabelled=True).examples["label"].isna().sum() == 30
