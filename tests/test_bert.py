"""Checkpoints, tokens and graphs agree with independent sources; every unusable file is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import random
import string
import warnings

import numpy as np
import pytest
from helpers import CONFIG, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade_lab import CascadeSpec
from cascade_lab.bert import reference
from cascade_lab.bert.checkpoint import find_checkpoint, list_variables, read_checkpoint, read_config, variable_shapes
from cascade_lab.bert.graph import classifier_graph
from cascade_lab.bert.tokenization import Tokenizer, truncated_lengths
from cascade_lab.exceptions import CheckpointError, CheckpointWarning

# Characters on which the two tokenizers differ, and other unusual parts of Unicode.
TRICKY = (
    "ΣσςİıßẞÅÅéあ漢字한글각\u0301\u0323\u200b\u200d\u00ad\ufeff\ufffd\x00\x07\x1c\x85\u2028\u3000\ue000\U000f0000\u0378"
)
TRICKY += "[]MASKSEPUNK#'\"$^`~€½²…—«»😀🇩🇪👩\u200d💻שלוםعالمहिन्दी\U0001d165\u302e\U00020000豈ﬁ"


def full_tokenizer(vocab_file, do_lower_case):
    return reference.load("tokenization").FullTokenizer(str(vocab_file), do_lower_case)


def reference_ids(full, text, max_seq_length):
    tokens = full.tokenize(text)[: max_seq_length - 2]
    return full.convert_tokens_to_ids(["[CLS]", *tokens, "[SEP]"])


def reference_pair(full, text, text_b, max_seq_length):
    """Truncate as run_classifier's _truncate_seq_pair does: remove one token at a time from the longer text."""
    a, b = full.tokenize(text), full.tokenize(text_b)
    while len(a) + len(b) > max_seq_length - 3:
        (a if len(a) > len(b) else b).pop()
    return full.convert_tokens_to_ids(["[CLS]", *a, "[SEP]", *b, "[SEP]"]), len(a) + 2


def test_token_ids_equal_fulltokenizers_on_every_clinc150_text(clinc150):
    vocab = clinc150 / "gate" / "vocab.txt"
    full, tokenizer = full_tokenizer(vocab, True), Tokenizer(vocab, do_lower_case=True, max_seq_length=64)
    texts = {
        row[0]
        for name in ("data_full", "data_oos_plus", "binary_wiki_aug")
        for rows in json.loads((clinc150 / f"{name}.json").read_text(encoding="utf-8")).values()
        for row in rows
    }
    texts = sorted(texts)
    assert len(texts) > 23_000
    for text, encoding in zip(texts, tokenizer.encode(texts), strict=True):
        assert encoding.input_ids == reference_ids(full, text, 64), text


some_text = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=TRICKY, max_size=30),
    st.text(alphabet=string.printable, max_size=40),
    st.lists(st.sampled_from(["playing", "[SEP]", "un##able", "ΑΣ", "naïve", "a" * 201, "b" * 150, "漢x字"])).map(
        " ".join
    ),
)


@pytest.mark.parametrize("n_examples", [60, pytest.param(2_600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("do_lower_case", [True, False])
def test_token_ids_equal_fulltokenizers_on_random_texts(do_lower_case, n_examples, request):
    """20 texts per example: with `make test-slow` 50,000 lower-cased and 50,000 not, with CLINC150's vocabulary."""
    try:
        vocab = request.getfixturevalue("clinc150") / "gate" / "vocab.txt"
    except pytest.skip.Exception:
        vocab = request.getfixturevalue("tiny").parent / "gate" / "vocab.txt"
    full, tokenizer = (
        full_tokenizer(vocab, do_lower_case),
        Tokenizer(vocab, do_lower_case=do_lower_case, max_seq_length=16),
    )
    count = 0

    @settings(max_examples=n_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(some_text, min_size=20, max_size=20))
    def check(texts):
        nonlocal count
        count += len(texts)
        for text, ids in zip(texts, tokenizer.ids(texts), strict=True):
            assert ids == full.convert_tokens_to_ids(full.tokenize(text)), ascii(text)

    check()
    assert count >= 20 * n_examples * 0.95


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.tuples(some_text, st.none() | some_text), min_size=1, max_size=5), length=st.integers(3, 20))
def test_pairs_are_truncated_and_joined_as_run_classifier_does(texts, length, tiny):
    vocab = tiny.parent / "gate" / "vocab.txt"
    full, tokenizer = full_tokenizer(vocab, True), Tokenizer(vocab, do_lower_case=True, max_seq_length=length)
    for (text, text_b), encoding in zip(texts, tokenizer.encode(*zip(*texts, strict=True)), strict=True):
        if text_b is None:
            assert encoding.input_ids == reference_ids(full, text, length)
            assert encoding.n_first == len(encoding.input_ids)
        else:
            assert tuple(encoding) == reference_pair(full, text, text_b, length)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_truncated_lengths_equal_those_of_removing_one_token_at_a_time(n_first, n_second, max_length):
    a, b = n_first, n_second
    while a + b > max_length:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert truncated_lengths(n_first, n_second, max_length) == (a, b)


def test_half_a_surrogate_pair_and_100_000_characters_are_tokenized_too(tiny):
    vocab = tiny.parent / "gate" / "vocab.txt"
    full, tokenizer = full_tokenizer(vocab, True), Tokenizer(vocab, do_lower_case=True, max_seq_length=24)
    for text in ("pay \ud83d bill", "pay my bill " * 8_400, "x" * 100_000, ""):
        assert tokenizer.encode([text])[0].input_ids == reference_ids(full, text, 24)


def test_the_graphs_variables_have_the_names_and_shapes_of_variable_shapes():
    import tensorflow as tf

    config = {**CONFIG, "vocab_size": 30}
    classifier = classifier_graph(config, 3, output_weights="cls/w", output_bias="cls/b")
    with classifier.graph.as_default():
        shapes = {v.op.name: tuple(v.shape) for v in tf.compat.v1.global_variables()}
    assert shapes == variable_shapes(config, 3, "cls/w", "cls/b")


def test_a_directory_a_prefix_and_an_index_file_name_the_same_checkpoint(tiny):
    folder = tiny.parent / "gate"
    prefix = str(folder / "model.ckpt-7")
    assert find_checkpoint(folder) == find_checkpoint(folder / "model.ckpt-7") == prefix
    assert find_checkpoint(folder / "model.ckpt-7.index") == prefix
    assert list_variables(prefix)["global_step"] == ([], "int64")


def test_adam_slots_and_global_step_are_not_read(tiny):
    weights = read_checkpoint(CascadeSpec.read(tiny).stages[0]).weights
    assert not [name for name in weights if "adam" in name or name == "global_step"]


@pytest.fixture
def stage(tmp_path):
    """A checkpoint that only this test uses, so that it can damage it."""
    write_checkpoint(tmp_path / "gate", 2, seed=1)
    spec = {
        "name": "gate",
        "init_checkpoint": "gate",
        "bert_config_file": "gate/bert_config.json",
        "vocab_file": "gate/vocab.txt",
        "labels": ["oos", "in"],
        "max_seq_length": 24,
    }
    return CascadeSpec.from_dict({"stage": [spec]}, folder=tmp_path).last


def refused(stage, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(stage)
    assert "\n" not in str(caught.value)


def rewrite(stage, **keys):
    config = json.loads(stage.bert_config_file.read_text())
    stage.bert_config_file.write_text(json.dumps({**config, **keys}))


def test_a_directory_without_a_checkpoint(stage):
    for name in ("checkpoint", "model.ckpt-7.index"):
        (stage.init_checkpoint / name).unlink()
    refused(stage, "gate: contains no checkpoint: its file 'checkpoint' is missing; give a directory with a checkpoint")


def test_a_hugging_face_directory_names_the_command_that_converts_it(stage):
    for name in ("checkpoint", "model.ckpt-7.index"):
        (stage.init_checkpoint / name).unlink()
    (stage.init_checkpoint / "model.safetensors").touch()
    refused(stage, "is a Hugging Face directory; convert it with cascade-lab import-hf")


def test_a_prefix_that_does_not_exist(stage):
    refused(dataclasses.replace(stage, init_checkpoint=stage.init_checkpoint / "model.ckpt-8"), "no such checkpoint")


def test_a_missing_variable(stage):
    write_checkpoint(stage.init_checkpoint, 2, seed=1, leave_out="bert/pooler/dense/bias")
    refused(stage, "stage 'gate': .*model.ckpt-7 has no variable bert/pooler/dense/bias, which the graph needs")


def test_a_missing_head_names_the_keys_for_its_name(stage):
    renamed = dataclasses.replace(stage, output_bias="cls/bias")
    refused(renamed, "no variable cls/bias.* name the variables of the head with output_weights and output_bias")


def test_a_misshapen_variable(stage):
    rewrite(stage, intermediate_size=65)
    refused(
        stage, r"layer_0/intermediate/dense/kernel has shape \[32, 64\], but the graph needs \[32, 65\]; give the c"
    )


def test_a_wrong_number_of_labels(stage):
    refused(
        dataclasses.replace(stage, labels=("a", "b", "c")), r"has shape \[2, 32\], .* \(3 labels\); give its 2 labels"
    )


def test_a_truncated_checkpoint(stage):
    data = stage.init_checkpoint / "model.ckpt-7.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:30_000])
    refused(stage, "cannot be read .*truncated or damaged")


def test_a_truncated_index(stage):
    index = stage.init_checkpoint / "model.ckpt-7.index"
    index.write_bytes(index.read_bytes()[:100])
    refused(stage, r"model.ckpt-7.index: cannot be read .*; copy it again")


def test_a_flipped_bit(stage):
    data = stage.init_checkpoint / "model.ckpt-7.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[random.Random(0).randrange(len(content) // 3)] ^= 1
    data.write_bytes(content)
    refused(stage, "cannot be read .*truncated or damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite(stage, value):
    write_checkpoint(stage.init_checkpoint, 2, seed=1, output_bias=np.array([0, value]))
    refused(stage, "output_bias holds NaN or infinity in 1 of 2 places")


def test_a_vocabulary_of_another_size(stage):
    stage.vocab_file.write_text(stage.vocab_file.read_text() + "more\n")
    refused(stage, r"vocab.txt has \d+ tokens, but vocab_size in .* is \d+; give the vocabulary")


def test_a_doubled_line_in_the_vocabulary(stage):
    stage.vocab_file.write_text(stage.vocab_file.read_text() + "pay\n")
    refused(stage, r"vocab.txt line \d+: token 'pay' is on line 6 too")


def test_a_vocabulary_that_is_missing_or_not_utf8_or_not_of_bert(stage):
    stage.vocab_file.write_bytes(b"[UNK]\n\xff\n")
    refused(stage, "byte 6 is not UTF-8")
    stage.vocab_file.write_text("pay\nbill\n")
    refused(stage, r"has no token \[UNK\]")
    stage.vocab_file.unlink()
    refused(stage, "vocab.txt: cannot be read")


def test_more_tokens_than_positions(stage):
    refused(dataclasses.replace(stage, max_seq_length=49), "max_seq_length is 49, but the model has only 48 positions")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a whole number"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        (
            {"hidden_act": "swish"},
            "hidden_act is 'swish'; it must be one of gelu, relu, tanh, linear, gelu_erf, gelu_n",
        ),
    ],
)
def test_a_config_with_an_unusable_value(stage, keys, message):
    rewrite(stage, **keys)
    refused(stage, message)


def test_a_config_that_is_missing_or_not_json(stage):
    stage.bert_config_file.write_text("{")
    refused(stage, "bert_config.json: not JSON")
    stage.bert_config_file.unlink()
    refused(stage, "bert_config.json: cannot be read")


@pytest.mark.parametrize("key", ["init_checkpoint", "bert_config_file", "vocab_file"])
def test_a_stage_that_was_scored_elsewhere_cannot_be_loaded(stage, key):
    refused(
        dataclasses.replace(stage, **{key: None}),
        f"^stage 'gate': has no {key}: its logits were computed elsewhere; add init_checkpoint, bert_config_file and "
        "vocab_file to run it$",
    )


@pytest.mark.parametrize("key", [{"model_type": "bert"}, {"architectures": ["BertModel"]}])
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "relu"])
def test_gelu_in_a_config_of_hugging_face_is_the_exact_one_and_a_note_says_so(key, hidden_act, tmp_path):
    """bert-tensorflow's own config never has such a key, and its gelu is the tanh form."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "vocab_size": 9, "hidden_act": hidden_act}))
    assert read_config(path)["hidden_act"] == hidden_act
    path.write_text(json.dumps({**CONFIG, "vocab_size": 9, "hidden_act": hidden_act, **key}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = read_config(path)
    notes = [str(warning.message) for warning in caught if warning.category is CheckpointWarning]
    assert config["hidden_act"] == ("gelu_erf" if hidden_act == "gelu" else hidden_act)
    assert len(notes) == (hidden_act == "gelu")
    for note in notes:
        assert note.startswith(f"{path}: is a config of Hugging Face")
        assert note.endswith('write "hidden_act": "gelu_new" in it')
