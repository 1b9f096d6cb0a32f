"""A damaged file of an interrupted training is refused in one line with the way out; it never starts over silently."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from cascade_lab.bert.resume import UnfinishedTraining
from cascade_lab.exceptions import CheckpointWarning, TrainingError

tf1 = tf.compat.v1
pytestmark = pytest.mark.filterwarnings("ignore:.*names a checkpoint in another directory")  # copies of a directory
IDENTITY = {"flags": {"seed": 0}, "labels": ["a", "b"]}
ROW = {"train_loss": 0.5, "dev_loss": 0.5, "dev_accuracy": 0.5, "seconds": 1.0}
STATE = {"curve": [{"epoch": 1, "step": 3, **ROW}], "losses": [0.5, 0.25], "best_epoch": 1, "best_step": 3}
FIRST = {"curve": [{"epoch": 1, "step": 3, **ROW}], "losses": [], "best_epoch": 1, "best_step": 3}


def opened(folder: Path) -> tuple[int, dict, np.ndarray]:
    """Continue the training in `folder`; return its step, its state and the weight."""
    with tf.Graph().as_default(), tf1.Session() as session:
        weight = tf1.get_variable("weight", [4], initializer=tf1.zeros_initializer())
        step, state = UnfinishedTraining(folder, IDENTITY).restore(session, [weight], None)
        return step, state, session.run(weight)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A training that was saved at the end of its first epoch, step 3, and at step 5."""
    folder = tmp_path_factory.mktemp("training") / "out.unfinished"
    with tf.Graph().as_default(), tf1.Session() as session:
        weight = tf1.get_variable("weight", [4])
        unfinished = UnfinishedTraining(folder, IDENTITY)
        unfinished.restore(session, [weight], None)
        session.run(weight.assign([3.0] * 4))
        unfinished.save(session, 3, FIRST, best=True)
        session.run(weight.assign([5.0] * 4))
        unfinished.save(session, 5, STATE)
    return folder


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def state(**changed: object) -> Callable[[Path], object]:
    content = {key: value for key, value in {**STATE, **changed}.items() if value != "missing"}
    return text("steps/model.ckpt-5.state.json", json.dumps(content))


def row(**changed: object) -> Callable[[Path], object]:
    return state(curve=[{**STATE["curve"][0], **changed}])


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def flipped(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(bytes(255 - byte for byte in (folder / name).read_bytes()))


DATA = "model.ckpt-{}.data-00000-of-00001"
DAMAGES = {
    "identity empty": (text("identity.json", ""), "identity.json: is not JSON"),
    "identity cut": (cut("identity.json"), "identity.json: is not JSON"),
    "identity a list": (text("identity.json", "[]"), "identity.json: is not a JSON object"),
    "identity of bytes": (text("identity.json", b"\xff\xfe{}"), "identity.json: byte 0 is not UTF-8"),
    "identity without flags": (text("identity.json", "{}"), "is an interrupted training with other flags"),
    "identity twice": (text("identity.json", '{"flags": 1, "flags": 2}'), "the key 'flags' is there twice"),
    "identity missing": (gone("identity.json"), "cannot be continued, because its identity.json is missing"),
    "state missing": (gone("steps/model.ckpt-5.state.json"), r"ckpt-5.state.json: cannot be read \(no such file\)"),
    "state empty": (text("steps/model.ckpt-5.state.json", ""), "ckpt-5.state.json: is not JSON"),
    "state null": (text("steps/model.ckpt-5.state.json", "null"), "state.json: is not a JSON object"),
    "state of another step": (text("steps/model.ckpt-5.state.json", json.dumps(FIRST)), "does not belong to step 5"),
    "no losses": (state(losses="missing"), "state.json: has no losses"),
    "losses of words": (state(losses=["a", "b"]), r"losses\[0\] must be a number"),
    "losses NaN": (state(losses=[0.5, float("nan")]), "NaN is no number of JSON"),
    "losses too many": (state(losses=[0.5] * 9), "does not belong to step 5"),
    "best step of no epoch": (state(best_step=4), "does not belong to step 5"),
    "best epoch of none": (state(best_epoch=2), "does not belong to step 5"),
    "no best": (state(best_epoch=None, best_step=None), "does not belong to step 5"),
    "curve null": (state(curve=None), "curve must be a list"),
    "curve of numbers": (state(curve=[1]), "curve, epoch 1: row must be an object"),
    "curve empty": (state(curve=[]), "does not belong to step 5"),
    "epoch a word": (row(epoch="1"), "epoch must be a whole number"),
    "epoch 2": (row(epoch=2), "does not belong to step 5"),
    "accuracy null": (row(dev_accuracy=None), "dev_accuracy must be a number"),
    "no checkpoint file": (lambda folder: [gone("steps/checkpoint")(folder)], "steps/checkpoint: is missing or dam"),
    "checkpoint file empty": (text("steps/checkpoint", ""), "steps/checkpoint: is missing or damaged"),
    "checkpoint file of another": (
        lambda folder: (
            shutil.copy(folder / "steps" / "model.ckpt-5.index", folder / "steps" / "other.index"),
            text("steps/checkpoint", 'model_checkpoint_path: "other"')(folder),
        ),
        "steps/checkpoint: names no checkpoint of this training",
    ),
    "all weights missing": (gone("steps/[cm]*[txl0-9]"), "steps/checkpoint: is missing or damaged"),
    "index cut": (cut("steps/model.ckpt-5.index"), "model.ckpt-5.index: cannot be read"),
    "data missing": (gone("steps/" + DATA.format(5)), "model.ckpt-5.*cannot be read"),
    "data flipped": (flipped("steps/" + DATA.format(5)), "model.ckpt-5: weight cannot be read"),
    "best missing": (gone("best/*"), r"best/model.ckpt-3.index: cannot be read"),
    "best flipped": (flipped("best/" + DATA.format(3)), "best/model.ckpt-3: weight cannot be read"),
}  # fmt: skip


def test_an_interrupted_training_continues(interrupted, tmp_path):
    step, saved, weight = opened(shutil.copytree(interrupted, tmp_path / "out.unfinished"))
    assert (step, saved, weight.tolist()) == (5, STATE, [5.0] * 4)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_training_is_refused_and_stays(name, interrupted, tmp_path):
    damage, message = DAMAGES[name]
    folder = shutil.copytree(interrupted, tmp_path / "out.unfinished")
    damage(folder)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match=message) as raised:
        opened(folder)
    assert "\n" not in str(raised.value)
    assert f"delete {folder}" in str(raised.value) or "or delete it" in str(raised.value)
    assert before == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_moved_training_and_one_whose_newest_checkpoint_is_not_named_yet_continue(interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "moved.unfinished")
    gone("steps/model.ckpt-3.*")(folder)
    gone("steps/checkpoint")(folder)
    assert opened(folder)[0] == 5


def test_a_training_that_had_saved_nothing_says_that_it_starts_again(interrupted, tmp_path):
    folder = tmp_path / "out.unfinished"
    (folder / "steps").mkdir(parents=True)
    shutil.copy(interrupted / "identity.json", folder)
    with pytest.warns(CheckpointWarning, match="had saved no checkpoint; it starts again"):
        assert opened(folder)[0] == 0
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        assert opened(folder)[0] == 0
