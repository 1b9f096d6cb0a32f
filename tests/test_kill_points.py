"""Whoever writes when, nothing is lost: every command is disturbed at each of its changes of the file system.

The old output or the new one is there afterwards, whole, and the identical command then works. See `kill_points.py`.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_points
import pytest
from helpers import texts

from cascade_lab.cli import COMMANDS

NAMES = sorted(set.union(*kill_points.COMMANDS.values()))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and needs renameat2")


def disturb(folder: Path, *tasks: str) -> None:
    command = [sys.executable, kill_points.__file__, str(folder), *tasks]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.rsplit(": ", 1)[0] for line in lines] == list(tasks)
    for line in lines:
        n_tried, n_changes = map(int, line.rsplit(": ", 1)[1].split(" of "))
        assert n_tried >= max(1, n_changes // int(line.split(":")[2]) - 1), line


def test_every_command_with_an_output_is_disturbed():
    names = [command.__name__ for command in COMMANDS if "output" in inspect.signature(command).parameters]
    names.remove("score")  # a killed job goes on where it was: see test_batch.py
    assert {name.replace("_", "-") for name in names} == {
        next((command for command in ("export", "fit-rejector") if name.startswith(command)), name) for name in NAMES
    }


def test_a_disturbed_command_loses_nothing(tmp_path):
    disturb(
        tmp_path,
        "kill:first:5:import-logits",
        "kill:replaces:7:report",
        "fail:replaces:2:correct",
        "stop:first:2:vocabulary",
        "full:replaces:3:compare",
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "fail", "stop", "full"])
@pytest.mark.parametrize("state", ["first", "replaces"])
@pytest.mark.parametrize("name", NAMES)
def test_no_command_loses_anything(mode, state, name, tmp_path):
    stride = 5 if mode in ("fail", "stop") and name in ("finetune", "study") else 1
    disturb(tmp_path, f"{mode}:{state}:{stride}:{name}")


@pytest.mark.parametrize("pipe", [False, True])
def test_standard_output_on_a_full_disk_is_one_line_and_a_closed_pipe_is_none(pipe, tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_text("text\tlabel\npay my bill\tin\n")
    command = [sys.executable, "-c", "from cascade_lab.cli import main; main()", "vocabulary", "--train", str(path)]
    command += ["--output", str(tmp_path / "vocab.txt")]
    if pipe:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (tmp_path / "vocab.txt").is_file()
    assert (result.returncode, result.stderr) == (
        (1, "")
        if pipe
        else (2, "error: standard output: cannot be written (No space left on device); free some space\n")
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 3.0])
def test_a_signal_during_a_run_leaves_nothing(number, seconds, tiny, tmp_path):
    """The signal comes some time after the directory of the run was made."""
    sentences = "".join(f"{text}\t{i % 4}\n" for i, text in enumerate(texts(60_000)))
    (tmp_path / "texts.tsv").write_text(f"text\tlabel\n{sentences}")
    command = [sys.executable, "-c", "from cascade_lab.cli import main; main()", "run", str(tiny)]
    command += [str(tmp_path / "texts.tsv"), "--output", str(tmp_path / "run"), "--no-report"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run.unfinished").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + number, f"error: stopped by {number.name}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.tsv"]
