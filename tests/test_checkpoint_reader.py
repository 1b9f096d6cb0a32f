"""Checkpoints as users have them: in any folder, scope and precision they are read, and other models are named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
from helpers import texts, write_checkpoint
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, EvalSet, Stage
from cascade_lab.bert.checkpoint import find_checkpoint, list_variables, open_checkpoint, read_checkpoint
from cascade_lab.bert.checkpoint_reader import CheckpointReader, CheckpointWarning
from cascade_lab.bert.finetune import Flags, Init, finetune
from cascade_lab.cli import app
from cascade_lab.exceptions import CheckpointError

DATA = ".data-00000-of-00001"


def stage_in(folder: Path, **keys: object):
    """Return the checkpoint in `folder` as a stage."""
    spec = {
        "name": "gate",
        "init_checkpoint": str(folder),
        "bert_config_file": str(folder / "bert_config.json"),
        "vocab_file": str(folder / "vocab.txt"),
        "labels": ["oos", "in"],
        "max_seq_length": 24,
        **keys,
    }
    return CascadeSpec.from_dict({"stage": [spec]}, folder=folder.parent).last


def rewrite(folder: Path, change: Callable[[dict], dict], name: str = "model.ckpt-7") -> None:
    """Read every variable of a checkpoint, change the dict of them, and write it again under the same name."""
    import tensorflow as tf

    tf1 = tf.compat.v1
    reader = CheckpointReader(str(folder / "model.ckpt-7"))
    variables = change({key: reader.read(key) for key in reader.variables})
    with tf.Graph().as_default(), tf1.Session() as session:
        for key, value in variables.items():
            tf1.get_variable(key, initializer=value)
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(folder / name))


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "gate", 2, seed=1)
    return tmp_path / "gate"


def refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def equal(weights: dict, others: dict) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype == np.float32
        np.testing.assert_array_equal(weight, others[name], err_msg=name)


@pytest.mark.filterwarnings("ignore::cascade_lab.bert.checkpoint_reader.CheckpointWarning")
@pytest.mark.parametrize("name", ["a[v2]", "a[1-3]b", "st*r", "what?", "[a]", "back\\slash", "ünï [漢字]"])
def test_letters_of_a_path_are_no_pattern(folder, name):
    expected = read_checkpoint(stage_in(folder)).weights
    # A directory that the name would match as a pattern contains another checkpoint.
    write_checkpoint(folder.parent / "a2", 2, seed=9)
    for other in ("av", "a2b", "star", "whaty", "a", "backslash"):
        shutil.copytree(folder.parent / "a2", folder.parent / other)
    renamed = folder.rename(folder.parent / name)
    stage = stage_in(renamed)
    assert find_checkpoint(renamed) == str(renamed / "model.ckpt-7")
    equal(read_checkpoint(stage).weights, expected)
    assert list_variables(str(renamed / "model.ckpt-7"))["global_step"] == ([], "int64")


def test_letters_of_a_checkpoints_own_name_are_no_pattern(folder):
    expected = read_checkpoint(stage_in(folder)).weights
    for ending in (".index", DATA):
        (folder / f"model.ckpt-7{ending}").rename(folder / f"best[1]*{ending}")
    equal(read_checkpoint(stage_in(folder, init_checkpoint=str(folder / "best[1]*"))).weights, expected)


@pytest.mark.filterwarnings("ignore::cascade_lab.bert.checkpoint_reader.CheckpointWarning")
def test_no_temporary_directory_is_left(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    read_checkpoint(stage_in(folder.rename(folder.parent / "a[v2]")))
    assert not list((tmp_path / "temporary").iterdir())


def names_elsewhere(folder: Path, other: Path) -> None:
    prefix = other / "model.ckpt-7"
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{prefix}"\nall_model_checkpoint_paths: "{prefix}"\n')


def test_the_checkpoint_in_the_named_folder_is_read(folder):
    """A copied folder's file `checkpoint` may still name the original, with an absolute path."""
    other = folder.parent / "other"
    write_checkpoint(other, 2, seed=9)
    expected = read_checkpoint(stage_in(folder)).weights
    names_elsewhere(folder, other)
    with pytest.warns(CheckpointWarning, match="names a checkpoint in another directory .*other.*; read was .*gate"):
        equal(read_checkpoint(stage_in(folder)).weights, expected)
    shutil.rmtree(other)
    with pytest.warns(CheckpointWarning):
        equal(read_checkpoint(stage_in(folder)).weights, expected)


def test_a_checkpoint_elsewhere_is_read_with_a_notice_where_the_folder_has_none(folder):
    empty = folder.parent / "empty"
    empty.mkdir()
    names_elsewhere(empty, folder)
    with pytest.warns(CheckpointWarning, match="read was .*gate"):
        assert find_checkpoint(empty) == str(folder / "model.ckpt-7")
    shown = CliRunner().invoke(app, ["inspect", str(empty)])
    assert shown.exit_code == 0
    assert "note: " in shown.output
    assert "names a checkpoint in another directory" in shown.output


def test_absolute_paths_and_links_to_the_same_folder_need_no_notice(folder):
    names_elsewhere(folder, folder)
    link = folder.parent / "link"
    link.symlink_to(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(folder) == str(folder / "model.ckpt-7")
        assert Path(f"{find_checkpoint(link)}.index").samefile(folder / "model.ckpt-7.index")


def test_a_releases_directory_has_no_file_checkpoint(folder):
    """As Google publishes BERT: `bert_model.ckpt.*`, without a head."""
    for ending in (".index", DATA):
        (folder / f"model.ckpt-7{ending}").rename(folder / f"bert_model.ckpt{ending}")
    (folder / "checkpoint").unlink()
    (folder / "model.ckpt-7.meta").unlink()
    assert find_checkpoint(folder) == str(folder / "bert_model.ckpt")
    assert read_checkpoint(stage_in(folder)).prefix == str(folder / "bert_model.ckpt")
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0
    assert "bert_model.ckpt: 42 variables" in shown.output
    shutil.copy(folder / "bert_model.ckpt.index", folder / "another.ckpt.index")
    refused(lambda: find_checkpoint(folder), "its file 'checkpoint' is missing; give the prefix that you mean, such as")


def test_a_file_checkpoint_that_names_nothing_is_no_reason_to_read_another(folder):
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-9"\n')
    refused(lambda: find_checkpoint(folder), "names ", "model.ckpt-9, which does not exist; give the prefix", "ckpt-7")


@pytest.mark.parametrize("ending", [".index", ".meta", DATA])
def test_each_file_of_a_checkpoint_stands_for_its_prefix(folder, ending):
    assert find_checkpoint(folder / f"model.ckpt-7{ending}") == str(folder / "model.ckpt-7")


@pytest.mark.parametrize(
    ("bert", "head"),
    [
        ("module/bert", "module/"),
        ("module/bert", ""),
        ("model/tower/bert", "model/"),
        ("encoder", ""),
        ("x.y/b-1", ""),
    ],
)
def test_berts_variables_may_have_any_scope(folder, bert, head):
    expected = read_checkpoint(stage_in(folder)).weights

    def in_scope(name: str) -> str:
        return f"{bert}/{name.removeprefix('bert/')}" if name.startswith("bert/") else f"{head}{name}"

    rewrite(folder, lambda variables: {in_scope(name): value for name, value in variables.items()})
    equal(read_checkpoint(stage_in(folder)).weights, expected)


def test_two_models_in_one_checkpoint_are_refused_unless_one_has_the_usual_scope(folder):
    def twice(variables: dict) -> dict:
        return {f"{tower}/{name}": value for tower in ("left", "right") for name, value in variables.items()}

    expected = read_checkpoint(stage_in(folder)).weights
    rewrite(folder, lambda variables: variables | twice(variables))
    equal(read_checkpoint(stage_in(folder)).weights, expected)
    rewrite(folder, lambda variables: {name: v for name, v in variables.items() if name.startswith(("left", "right"))})
    refused(lambda: read_checkpoint(stage_in(folder)), "contains several models (left/bert/, right/bert/)")


def test_a_head_of_tf_layers_dense_is_turned(folder):
    expected = read_checkpoint(stage_in(folder)).weights

    def dense(variables: dict) -> dict:
        kernel, bias = variables.pop("output_weights"), variables.pop("output_bias")
        return variables | {"loss/dense/kernel": np.ascontiguousarray(kernel.T), "loss/dense/bias": bias}

    rewrite(folder, dense)
    names = {"output_weights": "loss/dense/kernel", "output_bias": "loss/dense/bias"}
    weights = read_checkpoint(stage_in(folder, **names)).weights
    np.testing.assert_array_equal(weights["loss/dense/kernel"], expected["output_weights"])
    np.testing.assert_array_equal(weights["loss/dense/bias"], expected["output_bias"])
    three = stage_in(folder, **names, labels=["a", "b", "c"])
    refused(lambda: read_checkpoint(three), "has shape [32, 2], but the graph needs [3, 32] (3 labels)", "its 2 labels")


@pytest.mark.parametrize(("name", "is_turned"), [("dense/kernel", True), ("cls/w", False)])
def test_the_name_of_a_square_head_says_which_axis_comes_first(folder, name, is_turned):
    square = np.arange(32 * 32, dtype=np.float32).reshape(32, 32)
    rewrite(folder, lambda v: {**v, name: square, "b": np.zeros(32, np.float32)})
    stage = stage_in(folder, output_weights=name, output_bias="b", labels=[f"label{i}" for i in range(32)])
    np.testing.assert_array_equal(read_checkpoint(stage).weights[name], square.T if is_turned else square)


def test_a_head_with_one_output_is_no_classifier(folder):
    rewrite(folder, lambda v: {**v, "output_weights": np.ones((1, 32), np.float32)})
    refused(lambda: read_checkpoint(stage_in(folder)), "has shape [1, 32]", "this is not the head of a classifier")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_become_float32(folder, dtype):
    expected = read_checkpoint(stage_in(folder)).weights
    rewrite(folder, lambda v: {name: value.astype(dtype) if value.ndim else value for name, value in v.items()})
    weights = read_checkpoint(stage_in(folder)).weights
    equal(weights, {name: weight.astype(dtype).astype(np.float32) for name, weight in expected.items()})


def test_numbers_that_are_no_floats_or_too_large_are_refused(folder):
    rewrite(folder, lambda v: {**v, "output_bias": np.array([1, 2])})
    refused(lambda: read_checkpoint(stage_in(folder)), "output_bias has type int64, not float; save it as float32")
    rewrite(folder, lambda v: {**v, "output_bias": np.array([1e300, 0])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: read_checkpoint(stage_in(folder)), "output_bias holds NaN or infinity in 1 of 2 places")


def albert(variables: dict) -> dict:
    shared = {name.replace("layer_0", "layer_shared"): v for name, v in variables.items() if "layer_1" not in name}
    return {**shared, "bert/embeddings/word_embeddings_2": np.ones((8, 32), np.float32)}


def without_pooler(variables: dict) -> dict:
    return {name: value for name, value in variables.items() if "/pooler/" not in name}


def electra(variables: dict) -> dict:
    return {name.replace("bert/", "electra/"): value for name, value in variables.items()}


KINDS = [
    (albert, "is a checkpoint of ALBERT; this package reads BERT only"),
    (electra, "is a checkpoint of ELECTRA"),
    (without_pooler, "has no pooler (bert/pooler/dense/kernel), which a classifier needs"),
    (lambda variables: {"w": variables["output_weights"]}, "has no variable bert/embeddings/word_embeddings in any"),
]


@pytest.mark.parametrize(("change", "message"), KINDS)
def test_the_kind_of_model_is_named_before_any_size(folder, change, message):
    rewrite(folder, change)
    config = json.loads((folder / "bert_config.json").read_text())
    (folder / "bert_config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    refused(lambda: read_checkpoint(stage_in(folder)), message)
    refused(lambda: open_checkpoint(str(folder / "model.ckpt-7")), message)
    assert list_variables(str(folder / "model.ckpt-7")), "inspect still shows what is in it"


@pytest.mark.parametrize(
    ("key", "value"),
    [("pruned_heads", {"0": [1]}), ("position_embedding_type", "relative_key"), ("is_decoder", True)],
)
def test_settings_of_another_network_are_refused(folder, key, value):
    config = json.loads((folder / "bert_config.json").read_text())
    usual = {"pruned_heads": {}, "position_embedding_type": "absolute", "is_decoder": False}
    (folder / "bert_config.json").write_text(json.dumps({**config, **usual}))
    read_checkpoint(stage_in(folder))
    (folder / "bert_config.json").write_text(json.dumps({**config, **usual, key: value}))
    refused(lambda: read_checkpoint(stage_in(folder)), f"bert_config.json: {key} is {value!r}, which bert-tensorflow's")


def test_an_object_based_checkpoint_is_named(folder):
    import tensorflow as tf

    tf.train.Checkpoint(embeddings=tf.Variable(np.ones((8, 32), np.float32))).write(str(folder / "model.ckpt-7"))
    message = "is a TensorFlow 2 object-based checkpoint (it has _CHECKPOINTABLE_OBJECT_GRAPH)"
    refused(lambda: read_checkpoint(stage_in(folder)), message, "save it there with tf.compat.v1.train.Saver")


def test_an_embedding_may_have_more_rows_than_the_vocabulary_has_tokens(folder):
    config = json.loads((folder / "bert_config.json").read_text())
    n_tokens = config["vocab_size"]
    (folder / "bert_config.json").write_text(json.dumps({**config, "vocab_size": n_tokens + 7}))
    name = "bert/embeddings/word_embeddings"
    with Stage(stage_in_unpadded(folder)) as stage:
        expected = stage.logits(stage.encode(texts(5)))
    rewrite(folder, lambda v: {**v, name: np.vstack([v[name], np.full((7, 32), 1e3, np.float32)])})
    with Stage(stage_in(folder)) as stage:
        np.testing.assert_array_equal(stage.logits(stage.encode(texts(5))), expected)
    cascade = folder.parent / "cascade.toml"
    cascade.write_text(
        'name = "x"\nmax_seq_length = 24\n[[stage]]\nname = "gate"\ninit_checkpoint = "gate"\n'
        'bert_config_file = "gate/bert_config.json"\nvocab_file = "gate/vocab.txt"\nlabels = ["oos", "in"]\n'
    )
    assert f"{n_tokens} of {n_tokens + 7}" in CliRunner().invoke(app, ["inspect", str(cascade)]).output


def stage_in_unpadded(folder: Path):
    """Return the stage with a config that has the vocabulary's size."""
    config = json.loads((folder / "bert_config.json").read_text())
    path = folder / "unpadded.json"
    path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 7}))
    return dataclasses.replace(stage_in(folder), bert_config_file=path)


def test_blank_last_lines_and_byte_order_marks_are_read(folder):
    expected = read_checkpoint(stage_in(folder))
    for name in ("vocab.txt", "bert_config.json"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n \r\n\n")
    checkpoint = read_checkpoint(stage_in(folder))
    assert (checkpoint.vocab, checkpoint.config) == (expected.vocab, expected.config)
    with Stage(stage_in(folder)) as stage:
        assert np.isfinite(stage.logits(stage.encode(texts(3)))).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("import.json", {"do_lower_case": False}),
        ("training.json", {"flags": {"do_lower_case": False}}),
        ("tokenizer_config.json", {"do_lower_case": False}),
    ],
)
def test_a_file_beside_the_weights_contradicts_the_case(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    refused(
        lambda: read_checkpoint(stage_in(folder)),
        f"stage 'gate': do_lower_case is true, but {folder / name} says that the model was trained with false; set",
    )
    read_checkpoint(stage_in(folder, do_lower_case=False))
    flags = Flags(max_seq_length=24)
    table = EvalSet.from_frame(pd.DataFrame({"text": ["pay", "sing"], "label": ["oos", "in"]}))
    refused(
        lambda: finetune(Init.find(folder), table, table, ["oos", "in"], folder.parent / "out", flags=flags),
        f"the initial model: do_lower_case is true, but {folder / name} says that the model was trained with false",
    )
    (folder / name).write_text(json.dumps({"do_lower_case": None, "flags": None}))
    read_checkpoint(stage_in(folder))
