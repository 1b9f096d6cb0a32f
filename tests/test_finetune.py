"""Fine-tuning: it learns, is reproducible, continues after being killed, and refuses settings that cannot work."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from helpers import CONFIG, write_checkpoint
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, EvalSet, Stage
from cascade_lab.bert.finetune import Flags, Init, finetune
from cascade_lab.cli import app
from cascade_lab.exceptions import CheckpointError, TrainingError

KEYS = {"money": ["pay", "bill", "card"], "music": ["sing", "song", "play", "music"], "sky": ["weather"]}
FLAGS = Flags(
    learning_rate=2e-3, num_train_epochs=4, train_batch_size=8, max_seq_length=16, save_checkpoints_steps=4, threads=1
)


def keyword_texts(n: int, seed: int) -> pd.DataFrame:
    """Texts in which one word gives the label, and the other words are random."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        label = rng.choice(list(KEYS))
        words = [
            *rng.choice(["what", "is", "my", "the", "a", "please", "now"], rng.integers(1, 9)),
            rng.choice(KEYS[label]),
        ]
        rows.append((" ".join(rng.permutation(words)), label))
    return pd.DataFrame(rows, columns=["text", "label"])


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with train.tsv, dev.tsv and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("finetune")
    for name, n in (("train", 180), ("dev", 60)):
        keyword_texts(n, seed=n).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
    write_checkpoint(folder / "init", 2, seed=5, scale=0.1)
    (folder / "init" / "labels.txt").write_text("a\nb\n")
    return folder


def train(ground, output, *, flags=FLAGS, init=None, labels=tuple(KEYS), **keys):
    sets = [EvalSet.read(ground / f"{name}.tsv") for name in ("train", "dev")]
    return finetune(init or Init.find(ground / "init"), *sets, labels, output, flags=flags, **keys)


def changed(**keys):
    return dataclasses.replace(FLAGS, **keys)


def weights(folder):
    reader = tf.train.load_checkpoint(str(folder))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module")
def trained(ground):
    return ground / "whole", train(ground, ground / "whole")


def test_it_learns_and_writes_a_directory_that_a_stage_can_load(ground, trained):
    output, record = trained
    names = {path.name.split("-")[0] for path in output.iterdir()}
    assert names == {"bert_config.json", "checkpoint", "labels.txt", "model.ckpt", "training.json", "vocab.txt"}
    curve = record["curve"]
    assert curve[-1]["train_loss"] < curve[0]["train_loss"] / 2
    assert curve[-1]["dev_accuracy"] > 0.9
    assert json.loads((output / "training.json").read_text()) == record
    assert not [name for name in weights(output) if "adam" in name or name == "global_step"]
    stage = {"name": "key", "init_checkpoint": "whole", "bert_config_file": "whole/bert_config.json",
             "vocab_file": "whole/vocab.txt", "labels": "whole/labels.txt", "max_seq_length": 16}  # fmt: skip
    dev = EvalSet.read(ground / "dev.tsv")
    with Stage(CascadeSpec.from_dict({"stage": [stage]}, folder=ground).last) as loaded:
        predicted = loaded.logits(loaded.encode(dev.texts)).argmax(axis=1)
    correct = [loaded.spec.labels[i] for i in predicted] == np.array(dev.column("label"))
    assert correct.mean() == pytest.approx(curve[record["best_epoch"] - 1]["dev_accuracy"])


def test_the_best_epoch_is_kept_and_not_the_last(ground, tmp_path):
    record = train(
        ground, tmp_path / "out", flags=Flags(**{**vars(FLAGS), "num_train_epochs": 6, "learning_rate": 8e-3})
    )
    best = max(record["curve"], key=lambda row: (row["dev_accuracy"], -row["dev_loss"]))
    assert record["best_epoch"] == best["epoch"]
    assert (tmp_path / "out" / f"model.ckpt-{best['step']}.index").is_file()


def test_the_same_seed_gives_identical_weights_with_one_thread_and_another_seed_others(ground, trained, tmp_path):
    train(ground, tmp_path / "again")
    assert_equal_weights(weights(tmp_path / "again"), weights(trained[0]))
    train(ground, tmp_path / "other", flags=changed(seed=1))
    assert not np.array_equal(weights(tmp_path / "other")["output_bias"], weights(trained[0])["output_bias"])


def command(ground, output):
    return [
        "finetune", "--init", str(ground / "init"), "--train", str(ground / "train.tsv"), "--eval",
        str(ground / "dev.tsv"), "--labels", ",".join(KEYS), "--output", str(output), "--learning-rate", "2e-3",
        "--num-train-epochs", "4", "--train-batch-size", "8", "--max-seq-length", "16",
        "--save-checkpoints-steps", "4", "--threads", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("step", [23, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 80))])
def test_a_killed_and_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(ground, trained, tmp_path, step):
    """SIGKILL in the first epoch, at its end, and in the last epoch. An epoch has 23 steps."""
    output = tmp_path / "out"
    code = "from cascade_lab.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *command(ground, output)], stderr=subprocess.DEVNULL)
    newest = Path(f"{output}.unfinished") / "steps" / "checkpoint"
    deadline = time.monotonic() + 120
    while not (newest.exists() and int(newest.read_text().split("\n")[0].rsplit("-", 1)[1].strip('"') or 0) >= step):
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    result = CliRunner().invoke(app, command(ground, output))
    assert result.exit_code == 0, result.output
    assert_equal_weights(weights(output), weights(trained[0]))
    record = json.loads((output / "training.json").read_text())
    for row, whole in zip(record["curve"], trained[1]["curve"], strict=True):
        assert {**row, "seconds": 0} == {**whole, "seconds": 0}
    assert not Path(f"{output}.unfinished").exists()


def test_an_interrupted_training_is_not_continued_with_other_flags(ground, tmp_path):
    diverging = changed(learning_rate=1e30)
    with pytest.raises(TrainingError):
        train(ground, tmp_path / "out", flags=diverging)
    with pytest.raises(TrainingError, match=r"out.unfinished is an interrupted training with other flags; give"):
        train(ground, tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_the_training_and_names_the_last_good_checkpoint(ground, tmp_path):
    flags = Flags(**{**vars(FLAGS), "learning_rate": 1e12, "warmup_proportion": 1.0, "save_checkpoints_steps": 1})
    with pytest.raises(
        TrainingError, match=r"NaN or infinite at step \d+.*the last good checkpoint is .*-\d+"
    ) as caught:
        train(ground, tmp_path / "out", flags=flags)
    prefix = str(caught.value).split("last good checkpoint is ")[1].split(";")[0]
    for name, value in weights(prefix).items():
        assert np.isfinite(value).all(), name
    assert not (tmp_path / "out").exists()


def test_a_training_starts_from_random_weights_with_a_new_config_and_vocabulary(ground, tmp_path):
    result = CliRunner().invoke(
        app,
        ["vocabulary", "--train", str(ground / "train.tsv"), "--output", str(tmp_path / "vocab.txt"), "--size", "100"],
    )
    assert result.exit_code == 0, result.output
    tokens = (tmp_path / "vocab.txt").read_text().splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {"weather", "sing"} <= set(tokens)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": len(tokens)}))
    init = Init.find("random", bert_config_file=tmp_path / "config.json", vocab_file=tmp_path / "vocab.txt")
    record = train(ground, tmp_path / "out", init=init)
    assert record["init"]["weights"] is None
    assert record["curve"][-1]["train_loss"] < math.log(len(KEYS))
    with pytest.raises(TrainingError, match="random weights need a bert_config_file and a vocab_file"):
        Init.find("random")


def test_a_column_is_learned_and_a_label_left_out(ground, tmp_path):
    frame = pd.read_csv(ground / "train.tsv", sep="\t")
    frame["scope"] = np.where(frame["label"] == "sky", "oos", "in")
    frame.to_csv(tmp_path / "set.tsv", sep="\t", index=False)
    arguments = command(ground, tmp_path / "gate")
    for option, value in (("--train", tmp_path / "set.tsv"), ("--eval", tmp_path / "set.tsv"), ("--labels", "oos,in"),
                          ("--num-train-epochs", "1")):  # fmt: skip
        arguments[arguments.index(option) + 1] = str(value)
    assert CliRunner().invoke(app, [*arguments, "--label-column", "scope"]).exit_code == 0
    assert (tmp_path / "gate" / "labels.txt").read_text() == "oos\nin\n"
    evalset = EvalSet.read(tmp_path / "set.tsv").without(["sky"])
    assert set(evalset.column("label")) == {"money", "music"}


def test_settings_that_cannot_be_trained_are_refused(ground, tmp_path):
    def refused(message, error=TrainingError, **keys):
        with pytest.raises(error, match=message):
            train(ground, tmp_path / "out", **keys)
        assert not list(tmp_path.glob("out*"))

    refused(r"train.tsv line \d+: label 'sky' is not one of the 2 labels that are trained", labels=("money", "music"))
    refused(r"label 'empty' has no training text \(1 such labels\)", labels=(*KEYS, "empty"))
    refused("the labels must be at least two and all different", labels=("money", "money", "music", "sky"))
    refused("max_seq_length is 49, but the model has only 48 positions", flags=Flags(max_seq_length=49))
    for seed in (-1, 2**31):
        with pytest.raises(TrainingError, match="it must be from 0 to 2147483647"):
            Flags(seed=seed)
    (tmp_path / "dev.tsv").write_text("text\tlabel\nhello\tnever seen\n")
    sets = [EvalSet.read(ground / "train.tsv"), EvalSet.read(tmp_path / "dev.tsv")]
    with pytest.raises(TrainingError, match=r"dev.tsv line 2: label 'never seen' is not one of the 3 labels"):
        finetune(Init.find(ground / "init"), *sets, list(KEYS), tmp_path / "out", flags=FLAGS)
    other = json.loads((ground / "init" / "bert_config.json").read_text()) | {"intermediate_size": 80}
    (tmp_path / "other.json").write_text(json.dumps(other))
    refused("has shape .*, but the graph needs .*; give the config that it was trained with", CheckpointError,
            init=Init.find(ground / "init", bert_config_file=tmp_path / "other.json"))  # fmt: skip
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        Init.find(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainingError, match="out exists and is not a training"):
        train(ground, tmp_path / "out", overwrite=True)


def test_a_full_disk_is_an_error_of_one_line(ground, small_disk):
    with pytest.raises(TrainingError, match=r"cannot be written \(.*No space left on device"):
        train(ground, small_disk / "out")


def test_a_google_release_without_a_checkpoint_file_is_found(ground, tmp_path):
    for path in (ground / "init").iterdir():
        if path.name.startswith("model.ckpt-7."):
            (tmp_path / path.name.replace("model.ckpt-7", "bert_model.ckpt")).write_bytes(path.read_bytes())
    init = Init.find(tmp_path)
    assert init.prefix == str(tmp_path / "bert_model.ckpt")
    assert init.vocab_file == tmp_path / "vocab.txt"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_shows_the_epochs_and_nothing_of_tensorflow(ground, tmp_path):
    """TensorFlow warns of its own deprecated functions when a training deletes a checkpoint."""
    import pty

    screen, terminal = pty.openpty()
    code = "from cascade_lab.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command(ground, tmp_path / "out")],
        stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(screen, 4096)
        except OSError:  # Linux: the other end was closed
            break
        if not part:
            break
        shown += part
    os.close(screen)
    text = shown.decode(errors="replace")
    assert process.wait() == 0, text
    assert "loading TensorFlow" in text
    assert "epoch 4: train loss" in text
    assert not re.findall(r"Traceback|Logging error|deprecated|WARNING|W0000|Instructions for updating", text)
