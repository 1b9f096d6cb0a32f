"""The directory of an unfinished training: one writer, and a process that is killed when the training ends."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
import tensorflow as tf
from test_atomic import kill_everywhere, names_in, script

from cascade_lab import EvalSet
from cascade_lab.atomic import check_directory, locked_output
from cascade_lab.bert.finetune import Flags, Init, finetune
from cascade_lab.bert.resume import TRAINING_DIRECTORY, UnfinishedTraining, remove_finished
from cascade_lab.exceptions import TrainingError

KIND = TRAINING_DIRECTORY
IDENTITY = {"seed": 0}
FILES = [
    "bert_config.json", "checkpoint", "labels.txt", "model.ckpt-3.data-00000-of-00001", "model.ckpt-3.index",
    "training.json", "vocab.txt",
]  # fmt: skip


def prepare(root: Path) -> None:
    """Write the directory of a training that has done all of its steps."""
    (root / "vocab.txt").write_text("[PAD]\n")
    unfinished = UnfinishedTraining(root / "out.unfinished", IDENTITY)
    for folder in ("steps", "best"):
        (unfinished.folder / folder).mkdir()
        for name in FILES[3:5]:
            (unfinished.folder / folder / name).write_text("weights")
            (unfinished.folder / folder / f"{name}.tempstate123").write_text("of a process that was killed in a save")


def finish(root: Path, *, overwrite: bool, record: str = "new") -> None:
    output = root / "out"
    with locked_output(output, overwrite=overwrite, continues=True, **KIND):
        unfinished = UnfinishedTraining(root / "out.unfinished", IDENTITY)
        unfinished.finish(output, 3, {}, root / "vocab.txt", ["a", "b"], {"record": record})


def record_of(output: Path) -> str:
    """Return what a finished training recorded; its directory must be whole."""
    assert names_in(output) == FILES
    assert all((output / name).read_text() == "weights" for name in FILES[3:5])
    return json.loads((output / "training.json").read_text())["record"]


def script_replaces(folder: Path) -> None:
    """A training that replaces an earlier one: the old or the new is there, and the same call ends it."""

    def both(root: Path) -> None:
        prepare(root)
        finish(root, overwrite=False, record="old")
        prepare(root)

    def check(root: Path) -> None:
        assert record_of(root / "out") in ("old", "new")
        if (root / "out.unfinished" / "identity.json").exists():
            finish(root, overwrite=True)
        else:  # the new training is in place, and what is left is not continued
            assert record_of(root / "out") == "new"
            with locked_output(root / "out", overwrite=True, continues=True, **KIND):
                unfinished = UnfinishedTraining(root / "out.unfinished", {"seed": 1})
            assert names_in(unfinished.folder) == ["identity.json"]
            shutil.rmtree(unfinished.folder)
        assert record_of(root / "out") == "new"
        assert names_in(root) == ["out", "vocab.txt"]

    kill_everywhere(folder, both, lambda root: finish(root, overwrite=True), check)


def script_first(folder: Path) -> None:
    """A first training: once it is at its name, the next call removes what is left of its directory."""

    def check(root: Path) -> None:
        check_directory(root / "out", overwrite=True, continues=True, **KIND)
        remove_finished(root / "out")
        if not (root / "out").exists():
            finish(root, overwrite=False)
        assert record_of(root / "out") == "new"
        assert names_in(root) == ["out", "vocab.txt"]

    kill_everywhere(folder, prepare, lambda root: finish(root, overwrite=False), check)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and needs renameat2")
@pytest.mark.parametrize("name", ["replaces", pytest.param("first", marks=pytest.mark.slow)])
def test_a_training_that_is_killed_at_its_end_is_lost_nowhere(name, tmp_path):
    assert int(script(name, tmp_path, file=__file__)) > 30


def test_a_second_training_to_the_same_output_is_refused(tiny, tmp_path):
    texts = EvalSet.from_frame(pd.DataFrame({"text": ["a", "b"], "label": ["0", "1"]}))
    init, flags = Init.find(tiny.parent / "intent"), Flags(max_seq_length=16)
    refusal = rf"out: process {os.getpid()} is writing this training; wait until it has ended, or choose another output"
    with locked_output(tmp_path / "out", **KIND):
        for overwrite in (False, True):
            with pytest.raises(TrainingError, match=refusal):
                finetune(init, texts, texts, ["0", "1"], tmp_path / "out", flags=flags, overwrite=overwrite)
    assert names_in(tmp_path) == []


def test_another_directory_is_not_taken_for_an_unfinished_training(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("years of work")
    with pytest.raises(
        TrainingError, match=r"is not an unfinished training \(thesis.txt is in it\); move or delete it"
    ):
        UnfinishedTraining(tmp_path / "out.unfinished", IDENTITY)
    assert names_in(tmp_path / "out.unfinished") == ["thesis.txt"]


def test_the_best_epoch_before_the_last_saving_is_still_there(tmp_path):
    """A crash after the saving of `best` and before that of `steps` goes back to the step before."""
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        weight = tf1.get_variable("weight", [1])
        unfinished = UnfinishedTraining(tmp_path / "out.unfinished", IDENTITY)
        _, state = unfinished.restore(session, [weight], None)
        for step in (3, 6, 9):
            unfinished.save(session, step, state, best=True)
    best = {path.stem for path in (tmp_path / "out.unfinished" / "best").glob("*.index")}
    assert best == {"model.ckpt-6", "model.ckpt-9"}


if __name__ == "__main__":
    os.fsync = lambda _: None  # type: ignore[assignment]
    globals()[f"script_{sys.argv[1]}"](Path(sys.argv[2]))
