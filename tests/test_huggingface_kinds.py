"""Hugging Face directories as people publish them: read where only names differ, else refused by their kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_huggingface import DATA, altered, refused, spec_of, vocab_of, write
from typer.testing import CliRunner

from cascade_lab.bert.checkpoint import read_checkpoint
from cascade_lab.bert.huggingface import import_directory
from cascade_lab.bert.tokenization import Tokenizer
from cascade_lab.cli import app


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    """The data file of the import of `data/huggingface/gelu` as it is."""
    return data_of(import_directory(DATA / "gelu", tmp_path_factory.mktemp("expected") / "gelu"))


def data_of(folder: Path) -> bytes:
    return (folder / "model.ckpt.data-00000-of-00001").read_bytes()


def labels_of(folder: Path) -> list[str]:
    return (folder / "labels.txt").read_text().splitlines()


def renamed(source: Path, change) -> Path:
    write(source, {change(name): weight for name, weight in load_file(source / "model.safetensors").items()})
    return source


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module._orig_mod.model.{name}",
        lambda name: name.replace("encoder.layer.1.", "encoder.layer.1._orig_mod."),
        lambda name: f"net.encoder.{name}" if name.startswith("bert.") else f"net.{name}",
        lambda name: f"module.{name}" if name.startswith("bert.") else name,
    ],
)
def test_wrappers_before_the_names_are_taken_off(change, tmp_path, expected):
    source = renamed(altered(tmp_path, "gelu"), change)
    assert data_of(import_directory(source, tmp_path / "converted")) == expected


def test_two_models_in_one_file_are_refused(tmp_path):
    source = altered(tmp_path, "gelu")
    tensors = load_file(source / "model.safetensors")
    write(source, {f"{tower}.{name}": weight for name, weight in tensors.items() for tower in ("left", "right")})
    refused(source, tmp_path, "contains several models (left.bert., right.bert.)")


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("distilbert", "DistilBertForSequenceClassification"),
        ("deberta-v2", "DebertaV2ForSequenceClassification"),
        ("modernbert", "ModernBertForSequenceClassification"),
        ("mpnet", "MPNetForSequenceClassification"),
    ],
)
def test_another_model_is_named_before_any_size(model_type, architecture, tmp_path):
    sizes = dict.fromkeys(("hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act"))
    change = {"model_type": model_type, "architectures": [architecture], "type_vocab_size": 0, **sizes}
    refused(
        altered(tmp_path, "gelu", config=change), tmp_path, f'model_type is "{model_type}"; it can be imported with'
    )


def test_another_model_is_known_by_its_tensors(tmp_path):
    source = altered(tmp_path, "gelu", config={"model_type": None, "architectures": None})
    renamed(source, lambda name: name.replace("bert.", "roberta."))
    refused(source, tmp_path, "contains a RoBERTa; only BERT can be imported")


def test_what_config_does_not_say_the_tensors_say(tmp_path, expected):
    source = altered(tmp_path, "gelu", config={"model_type": None, "architectures": None})
    folder = import_directory(source, tmp_path / "converted")
    assert data_of(folder) == expected
    assert json.loads((folder / "import.json").read_text())["architecture"] == "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({"id2label": {"0": 0, "1": 1, "2": 2}}, ["0", "1", "2"]),
        ({"id2label": None, "label2id": {"billing": 0, "weather": 2, "music": 1}}, ["billing", "music", "weather"]),
        ({"id2label": None, "label2id": None, "num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": None, "label2id": None}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ],
)
def test_labels_are_found_as_transformers_finds_them(change, labels, tmp_path):
    assert labels_of(import_directory(altered(tmp_path, "gelu", config=change), tmp_path / "converted")) == labels


@pytest.mark.parametrize("value", [0, True, "3", 10**12])
def test_an_unusable_num_labels_is_refused(value, tmp_path):
    change = {"id2label": None, "label2id": None, "num_labels": value}
    refused(altered(tmp_path, "gelu", config=change), tmp_path, f"num_labels is {value!r}; it must be a whole number")


def test_a_head_with_one_output_is_refused(tmp_path):
    source = altered(tmp_path, "gelu", config={"id2label": None, "label2id": None})
    tensors = load_file(source / "model.safetensors")
    one = {"classifier.weight": np.ones((1, 16), np.float32), "classifier.bias": np.zeros(1, np.float32)}
    write(source, tensors | one)
    refused(source, tmp_path, "config.json: the model's head has one output, as for regression or re-ranking; give a")


@pytest.mark.parametrize("hidden_act", ["gelu_python", "gelu"])
def test_gelu_python_is_gelu(hidden_act, tmp_path):
    folder = import_directory(altered(tmp_path, "gelu", config={"hidden_act": hidden_act}), tmp_path / "converted")
    assert json.loads((folder / "bert_config.json").read_text())["hidden_act"] == "gelu_erf"


def test_pruned_heads_are_refused(tmp_path):
    source = altered(tmp_path, "gelu", config={"pruned_heads": {"0": [1]}})
    refused(source, tmp_path, 'pruned_heads is {"0": [1]}; it can be imported only without this key')


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("flax_model.msgpack", "load it with from_pretrained(…, from_flax=True) of transformers 4 and save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "give model.safetensors or pytorch_model.bin"),
        ("training_args.bin", "give model.safetensors or pytorch_model.bin"),
    ],
)
def test_weights_in_another_format_are_named(name, way_out, tmp_path):
    source = altered(tmp_path, "gelu")
    (source / "model.safetensors").rename(source / name)
    refused(source, tmp_path, f"has no model.safetensors, and {name} is not read; {way_out}")


def test_byte_order_marks_and_blank_last_lines_are_no_fault(tmp_path):
    source = altered(tmp_path, "relu")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        path = source / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n\n")
    folder = import_directory(source, tmp_path / "converted")
    plain = import_directory(DATA / "relu", tmp_path / "plain")
    for name in ("vocab.txt", "bert_config.json", "labels.txt"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()


def test_a_line_separator_may_be_a_token(tmp_path):
    """U+2028 is a token of the standard Chinese vocabulary, and `##` followed by it another."""
    source = altered(tmp_path, "relu")
    (source / "vocab.txt").unlink()
    content = json.loads((source / "tokenizer.json").read_text())
    vocab = vocab_of(content)
    vocab["\u2028"], vocab["##\u2028"] = vocab.pop("sing"), vocab.pop("now")
    (source / "tokenizer.json").write_text(json.dumps(content))
    folder = import_directory(source, tmp_path / "converted")
    tokenizer = Tokenizer(folder / "vocab.txt", do_lower_case=True, max_seq_length=32)
    assert tokenizer.ids(["pay my bill"]) == [[vocab["pay"], vocab["my"], vocab["bill"]]]
    assert len(read_checkpoint(spec_of(folder)).vocab) == 60
    # The same vocabulary as a file.
    (source / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    assert (import_directory(source, tmp_path / "both") / "labels.txt").is_file()


def test_a_token_that_vocab_txt_cannot_hold_is_refused(tmp_path):
    source = altered(tmp_path, "gelu", tokenizer=lambda t: vocab_of(t).update({" pay": vocab_of(t).pop("now")}))
    refused(source, tmp_path, "token ' pay' cannot be written to vocab.txt beside 'pay'")


def test_an_old_tokenizer_json_has_no_type(tmp_path, expected):
    source = altered(tmp_path, "gelu", tokenizer=lambda t: t["model"].pop("type"))
    assert data_of(import_directory(source, tmp_path / "converted")) == expected


def test_an_embedding_may_have_more_rows_than_there_are_tokens(tmp_path):
    source = altered(tmp_path, "gelu", config={"vocab_size": 64})
    tensors = load_file(source / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    write(source, {**tensors, name: np.vstack([tensors[name], np.ones((4, 16), np.float32)])})
    shown = CliRunner().invoke(app, ["import-hf", str(source), "--output", str(tmp_path / "converted")])
    assert shown.exit_code == 0
    assert "4 rows of the embedding have no token" in shown.output
    weights = read_checkpoint(spec_of(tmp_path / "converted")).weights
    assert weights["bert/embeddings/word_embeddings"].shape == (64, 16)


ADDED = [{"id": 60, "content": "[user]", "special": False}, {"id": 0, "content": "[PAD]", "special": True}]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", {"added_tokens": ADDED}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(token["id"]): token for token in ADDED}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["[user]"]}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "[user]"}], "unk_token": "[UNK]"}),
        ("added_tokens.json", {"[user]": 60}),
    ],
)
def test_added_tokens_are_refused_by_name(file, content, tmp_path):
    source = altered(tmp_path, "gelu")
    path = source / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **content}))
    refused(source, tmp_path, f"{file}: has 1 added tokens ('[user]'), which bert-tensorflow's tokenizer would split")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"never_split": ["covid-19"]}, "never_split is ['covid-19'], but bert-tensorflow's tokenizer splits every"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize is False, but bert-tensorflow always splits"),
    ],
)
def test_settings_of_the_tokenizer_that_cannot_be_kept_are_refused(settings, message, tmp_path):
    refused(altered(tmp_path, "gelu", settings=settings), tmp_path, message)
