"""The weights that the package checked are the ones that every graph gets: the file is not read a second time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import texts, write_checkpoint
from test_checkpoint_reader import rewrite, stage_in

from cascade_lab import Stage
from cascade_lab.bert import reference
from cascade_lab.bert.attributions import attribute
from cascade_lab.bert.checkpoint import read_config
from cascade_lab.bert.finetune import Flags, Init, finetune
from cascade_lab.bert.graph import feed, training_graph
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.bert.saved_model import export_saved_model
from cascade_lab.bert.tokenization import Tokenizer
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import CheckpointError

tf1 = tf.compat.v1
pytestmark = pytest.mark.filterwarnings("ignore::cascade_lab.bert.checkpoint_reader.CheckpointWarning")


def half_precision(folder: Path) -> Path:
    rewrite(folder, lambda v: {name: value.astype(np.float16) if value.ndim else value for name, value in v.items()})
    return folder


def in_another_scope(folder: Path) -> Path:
    rewrite(folder, lambda variables: {f"module/{name}": value for name, value in variables.items()})
    return folder


def with_brackets(folder: Path) -> Path:
    return folder.rename(folder.parent / "a[v2]")


@pytest.mark.parametrize("change", [half_precision, in_another_scope, with_brackets])
def test_every_user_of_a_checkpoint_reads_what_the_fast_engine_reads(change, tmp_path):
    write_checkpoint(tmp_path / "gate", 2, seed=1)
    folder = change(tmp_path / "gate")
    logits = []
    for engine in ("fast", "reference"):
        with Stage(stage_in(folder, engine=engine)) as stage:
            logits.append(stage.logits(stage.encode(texts(5))))
    np.testing.assert_allclose(*logits, atol=1e-4)
    assert (export_saved_model(stage_in(folder), tmp_path / "saved") / "1" / "saved_model.pb").is_file()
    (attribution,) = attribute(stage_in(folder), texts(1), n_steps=2, target="in")
    assert attribution.logit == pytest.approx(float(logits[1][0][1]), abs=1e-4)
    record = finetune(Init.find(folder), small_set(tmp_path), small_set(tmp_path), ["in", "oos"], tmp_path / "b[1]",
                      flags=Flags(num_train_epochs=1, max_seq_length=24))  # fmt: skip
    assert np.isfinite(record["curve"][0]["dev_loss"])


def small_set(folder: Path) -> EvalSet:
    path = folder / "set.tsv"
    rows = [f"{text}\t{label}" for text, label in zip(texts(8), ["in", "oos"] * 4, strict=True)]
    path.write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return EvalSet.read(path)


def test_a_truncated_checkpoint_stops_a_training_before_it_leaves_a_file(tmp_path):
    write_checkpoint(tmp_path / "gate", 2, seed=1)
    data = tmp_path / "gate" / "model.ckpt-7.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:30_000])
    sets, flags = (small_set(tmp_path), small_set(tmp_path)), Flags(max_seq_length=24)
    with pytest.raises(CheckpointError, match=r"cannot be read .*truncated or damaged"):
        finetune(Init.find(tmp_path / "gate"), *sets, ["in", "oos"], tmp_path / "out", flags=flags)
    assert not list(tmp_path.glob("out*"))


def test_a_training_starts_from_an_embedding_with_more_rows_than_tokens(tmp_path):
    write_checkpoint(tmp_path / "gate", 2, seed=1)
    path, name = tmp_path / "gate" / "bert_config.json", "bert/embeddings/word_embeddings"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 7}))
    rewrite(tmp_path / "gate", lambda v: {**v, name: np.vstack([v[name], np.zeros((7, 32), np.float32)])})
    flags = Flags(num_train_epochs=1, max_seq_length=24)
    sets = small_set(tmp_path), small_set(tmp_path)
    assert finetune(Init.find(tmp_path / "gate"), *sets, ["in", "oos"], tmp_path / "out", flags=flags)["steps"] == 1


def test_a_step_of_training_is_that_of_bert_tensorflows_optimizer(tmp_path):
    """Five steps with the fused kernel and five with `AdamWeightDecayOptimizer`, from the same weights."""
    write_checkpoint(tmp_path / "m", 3, seed=1)
    config = read_config(tmp_path / "m" / "bert_config.json")
    network = training_graph(config, 3, seed=0)
    with network.graph.as_default(), tf1.variable_scope("original", use_resource=True):
        optimizer = reference.load("optimization").AdamWeightDecayOptimizer(
            network.learning_rate_t,
            weight_decay_rate=0.01,
            exclude_from_weight_decay=["LayerNorm", "layer_norm", "bias"],
        )
        gradients, _ = tf.clip_by_global_norm(tf.gradients(network.loss_t, network.weights), clip_norm=1.0)
        original = optimizer.apply_gradients(zip(gradients, network.weights, strict=True))
    tokenizer = Tokenizer(tmp_path / "m" / "vocab.txt", do_lower_case=True, max_seq_length=24)
    encodings = tokenizer.encode(texts(6))
    weights = {}
    for name, train_op in (("fused", network.train_op), ("original", original), ("none", [])):
        with network.graph.as_default(), tf1.Session() as session:
            session.run(tf1.global_variables_initializer())
            for step in range(5):
                inputs = {
                    **feed(network.inputs, encodings),
                    network.labels_t: [0, 1, 2, 0, 1, 2],
                    network.learning_rate_t: 1e-3 * (5 - step),
                    network.dropout_seed_t: [0, step],
                }
                session.run(train_op, inputs)
            weights[name] = session.run(network.weights)
    moved = []
    for fused, theirs, initial in zip(*weights.values(), strict=True):
        np.testing.assert_allclose(fused, theirs, atol=2e-6)
        moved.append(np.abs(fused - initial).max() > 1e-3)
    assert np.mean(moved) > 0.9  # a bias of the keys has no gradient: softmax ignores it
