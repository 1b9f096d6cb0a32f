"""Hugging Face directories: PyTorch's logits, bit-identical weights, and every unusable directory is refused.

transformers wrote the directories in `data/huggingface` (see `make.py` there).
"""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import texts
from safetensors.numpy import load_file, save_file

from cascade_lab import CascadeLabError, CascadeSpec, Stage, StageSpec
from cascade_lab.bert.checkpoint import list_variables, open_checkpoint, read_checkpoint, variable_shapes
from cascade_lab.bert.huggingface import export_directory, import_directory
from cascade_lab.bert.tokenization import Encoding
from cascade_lab.bert.writing import save_checkpoint
from cascade_lab.exceptions import CheckpointError

DATA = Path(__file__).parent / "data" / "huggingface"
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]


def spec_of(folder: Path, **change: object) -> StageSpec:
    """Return an imported directory as a stage."""
    spec = StageSpec(
        name="imported",
        init_checkpoint=folder,
        bert_config_file=folder / "bert_config.json",
        vocab_file=folder / "vocab.txt",
        labels=tuple((folder / "labels.txt").read_text().splitlines()),
        do_lower_case=json.loads((folder / "import.json").read_text())["do_lower_case"],
        max_seq_length=32,
    )
    return replace(spec, **change)


def logits_of(spec: StageSpec, batch: dict[str, np.ndarray]) -> np.ndarray:
    columns = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    encodings = [
        Encoding(ids[: mask.sum()].tolist(), int((mask * (1 - segments)).sum()))
        for ids, mask, segments in zip(*columns, strict=True)
    ]
    with Stage(spec) as stage:
        return stage.logits(encodings)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Every directory in `data/huggingface`, imported."""
    root = tmp_path_factory.mktemp("imported")
    return {name: import_directory(DATA / name, root / name) for name in [*ACTIVATIONS, "base"]}


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_the_logits_are_pytorchs(hidden_act, engine, imported, tmp_path):
    expected = np.load(DATA / hidden_act / "expected.npz")
    spec = spec_of(imported[hidden_act], engine=engine)
    assert {row.sum() for row in expected["attention_mask"]} > {2, 3, 25}, (
        "the texts have several lengths, so that there is padding"
    )
    np.testing.assert_allclose(logits_of(spec, expected), expected["logits"], atol=1e-4, rtol=0)

    # With these weights a wrong form of gelu, or a wrong epsilon, gives clearly different logits.
    config = json.loads(spec.bert_config_file.read_text())
    wrong = (
        {"hidden_act": "gelu_new" if config["hidden_act"] == "gelu_erf" else "gelu_erf"},
        {"layer_norm_eps": 1e-5 if config["layer_norm_eps"] == 1e-12 else 1e-12},
    )
    for change in wrong:
        (tmp_path / "wrong.json").write_text(json.dumps({**config, **change}))
        got = logits_of(replace(spec, bert_config_file=tmp_path / "wrong.json"), expected)
        assert np.abs(got - expected["logits"]).max() > 3e-4, change


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_texts_are_tokenized_as_by_transformers(hidden_act, imported):
    expected = np.load(DATA / hidden_act / "expected.npz")
    with Stage(spec_of(imported[hidden_act])) as stage:
        encodings = stage.encode(expected["text"].tolist())
    for encoding, ids, mask in zip(encodings, expected["input_ids"], expected["attention_mask"], strict=False):
        assert encoding.input_ids == ids[: mask.sum()].tolist()


def test_an_import_records_its_source(imported):
    assert sorted(path.name for path in imported["relu"].iterdir()) == [
        "bert_config.json", "checkpoint", "import.json", "labels.txt", "model.ckpt.data-00000-of-00001",
        "model.ckpt.index", "vocab.txt",
    ]  # fmt: skip
    assert (imported["relu"] / "labels.txt").read_text() == "billing\nmusic\nweather\n"
    assert (imported["relu"] / "checkpoint").read_text().startswith('model_checkpoint_path: "model.ckpt"\n')
    origin = {name: json.loads((folder / "import.json").read_text()) for name, folder in imported.items()}
    assert origin["gelu"]["hidden_act"] == "gelu"
    assert json.loads((imported["gelu"] / "bert_config.json").read_text())["hidden_act"] == "gelu_erf"
    assert [origin[name]["do_lower_case"] for name in ACTIVATIONS] == [True, True, False, True]
    assert sorted(origin["relu"]["files"]) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert origin["base"]["architecture"] == "BertModel"


def test_a_bare_model_gives_a_checkpoint_without_a_head(imported):
    config = json.loads((imported["base"] / "bert_config.json").read_text())
    expected = {name for name in variable_shapes(config, 3) if name.startswith("bert/")}
    assert set(list_variables(str(imported["base"] / "model.ckpt"))) == expected
    assert not (imported["base"] / "labels.txt").exists()
    tensors = load_file(DATA / "base" / "model.safetensors")
    reader = open_checkpoint(str(imported["base"] / "model.ckpt"))
    kernel = reader.read("bert/encoder/layer_1/intermediate/dense/kernel")
    np.testing.assert_array_equal(kernel, tensors["encoder.layer.1.intermediate.dense.weight"].T)


def test_an_old_pretrained_model_gives_the_same_checkpoint(imported, tmp_path):
    """As bert-base-uncased is published: names with a prefix, other heads, gamma and beta, no id2label."""
    source = altered(tmp_path, "base", config={"architectures": ["BertForMaskedLM"], "id2label": None})
    tensors = load_file(source / "model.safetensors")
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {name.replace(new, old): weight for name, weight in tensors.items()}
    tensors = {f"bert.{name}": weight for name, weight in tensors.items()}
    tensors["cls.predictions.bias"] = np.zeros(9, np.float32)
    write(source, tensors)
    converted = import_directory(source, tmp_path / "converted")
    files = ("bert_config.json", "vocab.txt", "checkpoint", "model.ckpt.data-00000-of-00001")
    for name in files:
        assert (converted / name).read_bytes() == (imported["base"] / name).read_bytes(), name


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_an_exported_import_has_bit_identical_tensors(hidden_act, imported, tmp_path):
    folder = export_directory(spec_of(imported[hidden_act]), tmp_path / "out")
    before = load_file(DATA / hidden_act / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert (after[name].dtype, after[name].shape) == (np.float32, weight.shape)
        assert after[name].tobytes() == weight.tobytes(), name
    source, exported = (json.loads((path / "config.json").read_text()) for path in (DATA / hidden_act, folder))
    for key in exported.keys() - {"position_embedding_type", "problem_type"}:
        assert exported[key] == source[key], key
    tokenizers = [json.loads((path / "tokenizer_config.json").read_text()) for path in (DATA / hidden_act, folder)]
    assert tokenizers[1] == {key: tokenizers[0][key] for key in tokenizers[1]}
    again = import_directory(folder, tmp_path / "again")
    for name in ("bert_config.json", "vocab.txt", "labels.txt", "model.ckpt.data-00000-of-00001"):
        assert (again / name).read_bytes() == (imported[hidden_act] / name).read_bytes(), name


def test_an_imported_export_has_bit_identical_weights(tiny, tmp_path):
    for spec in CascadeSpec.read(tiny).stages:
        folder = import_directory(export_directory(spec, tmp_path / spec.name), tmp_path / f"{spec.name}-again")
        again = spec_of(folder, max_seq_length=spec.max_seq_length)
        before, after = read_checkpoint(spec), read_checkpoint(again)
        assert before.weights.keys() == after.weights.keys()
        for name, weight in before.weights.items():
            assert weight.tobytes() == after.weights[name].tobytes(), name
        assert (before.vocab, spec.labels) == (after.vocab, again.labels)
        assert (before.config["hidden_act"], after.config["hidden_act"]) == ("gelu", "gelu_pytorch_tanh")
        with Stage(spec) as one, Stage(again) as other:
            batch = one.encode(texts(20))
            np.testing.assert_allclose(one.logits(batch), other.logits(batch), atol=1e-5, rtol=0)


def test_a_head_with_another_name_and_a_vocabulary_without_pad_are_exported(imported, tmp_path):
    """The exported head has Hugging Face's name. Padding is masked, so that it needs no special token."""
    import tensorflow as tf

    spec = spec_of(imported["gelu"], output_weights="cls/w", output_bias="cls/b")
    weights = read_checkpoint(spec_of(imported["gelu"])).weights
    head = {"output_weights": "cls/w", "output_bias": "cls/b"}
    save_checkpoint({head.get(name, name): weight for name, weight in weights.items()}, tmp_path / "other.ckpt")
    (tmp_path / "vocab.txt").write_text(spec.vocab_file.read_text().replace("[PAD]", "pad").replace("[MASK]", "mask"))
    spec = replace(spec, init_checkpoint=tmp_path / "other.ckpt", vocab_file=tmp_path / "vocab.txt")
    folder = export_directory(spec, tmp_path / "out")
    after = load_file(folder / "model.safetensors")
    assert after["classifier.weight"].tobytes() == weights["output_weights"].tobytes()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert (settings["pad_token"], settings["mask_token"], settings["cls_token"]) == ("[UNK]", "[UNK]", "[CLS]")
    # A head that tf.layers.dense saved is [hidden, labels]; it is turned once, not twice.
    kernel = {**weights, "dense/kernel": weights["output_weights"].T, "dense/bias": weights["output_bias"]}
    save_checkpoint(kernel, tmp_path / "dense.ckpt")
    spec = replace(
        spec, init_checkpoint=tmp_path / "dense.ckpt", output_weights="dense/kernel", output_bias="dense/bias"
    )
    after = load_file(export_directory(spec, tmp_path / "dense") / "model.safetensors")
    assert after["classifier.weight"].tobytes() == weights["output_weights"].tobytes()
    assert not tf.compat.v1.get_default_graph().get_operations(), "the default graph does not change"


def altered(tmp_path, name, *, config=None, settings=None, tokenizer=None) -> Path:
    """Copy a directory of `data/huggingface` and change its files; the value None removes a key."""
    source = tmp_path / "source"
    shutil.copytree(DATA / name, source)
    for file, change in (("config", config), ("tokenizer_config", settings)):
        path = source / f"{file}.json"
        content = json.loads(path.read_text()) | (change or {})
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    if tokenizer is not None:
        content = json.loads((source / "tokenizer.json").read_text())
        tokenizer(content)
        (source / "tokenizer.json").write_text(json.dumps(content))
    return source


def write(source: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace a directory's weights. Not in place, since the arrays may be views of the file."""
    save_file(tensors, source / "new")
    (source / "new").replace(source / "model.safetensors")


def refused(source: Path, tmp_path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        import_directory(source, tmp_path / "converted")
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(source), *parts):
        assert part in message
    assert not list(tmp_path.glob("converted*")), "nothing is left behind"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, 'config.json: model_type is "roberta"; it can be imported with "bert"'),
        (
            {"architectures": ["BertForTokenClassification"]},
            'architectures is ["BertForTokenClassification"]; it can be imported with ["BertForSequenceCl',
        ),
        ({"hidden_act": "silu"}, 'hidden_act is "silu"; it can be imported with "gelu" or "gelu_new"'),
        ({"hidden_act": "tanh"}, 'hidden_act is "tanh"; it can be imported with "gelu" or "gelu_new"'),
        ({"hidden_act": "gelu_erf"}, 'hidden_act is "gelu_erf"'),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type is "relative_key"; it can be imported'),
        ({"is_decoder": True}, "is_decoder is true; it can be imported with false"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"problem_type": "multi_label_classification"}, 'problem_type is "multi_label_classification"; it can be'),
        ({"hidden_size": None}, "hidden_size is None; it must be a whole number above 0"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0; it must be a number above 0"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the labels 0, 1 and so on, at least two"),
        ({"id2label": {"0": "a"}}, "the model's head has one output, as for regression or re-ranking"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label has 'a' twice; give every class its own name"),
        ({"id2label": {"0": "a", "1": "b\nc", "2": "d"}}, "label 1 is 'b\\nc', but labels.txt has one label per line"),
        (
            {"id2label": {"0": "a", "1": "b"}},
            "model.safetensors: classifier.weight has shape [3, 16], but by config.json it has [2, 16]",
        ),
        (
            {"intermediate_size": 64},
            "bert.encoder.layer.0.intermediate.dense.weight has shape [32, 16], but by config.json it has [64, 16]",
        ),
        ({"num_hidden_layers": 3}, "has no tensor bert.encoder.layer.2.attention.self.query.weight"),
        ({"vocab_size": 50}, "tokenizer.json: has 60 tokens, but vocab_size in config.json is 50; give the vocabulary"),
    ],
)
def test_a_config_that_the_graph_cannot_compute_is_refused(change, message, tmp_path):
    refused(altered(tmp_path, "gelu", config=change), tmp_path, message)


def test_directories_that_lack_a_file_are_refused(tmp_path):
    refused(tmp_path / "none", tmp_path, "has no config.json; give a Hugging Face model directory")
    source = altered(tmp_path, "gelu")
    (source / "model.safetensors").rename(tmp_path / "kept")
    refused(source, tmp_path, "has no model.safetensors; give a Hugging Face model directory")
    (source / "pytorch_model.bin").write_bytes(b"")
    refused(source, tmp_path, "pytorch_model.bin: is not a file of torch.save")
    (tmp_path / "kept").rename(source / "model.safetensors")
    (source / "tokenizer.json").rename(source / "tokens.json")
    refused(source, tmp_path, "has no vocabulary; add its vocab.txt or tokenizer.json")
    (source / "config.json").write_text("{")
    refused(source, tmp_path, "config.json: not JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("bert.pooler.dense.weight"),
            "bert.pooler.dense.weight (the model was saved without its",
        ),
        (lambda w: w.pop("classifier.bias"), "has no tensor classifier.bias; save the whole model again"),
        (lambda w: w.pop("bert.embeddings.word_embeddings.weight"), "has no tensor bert.embeddings.word_embeddings"),
        (
            lambda w: w.update({"bert.pooler.dense.bias": np.full(16, np.nan, np.float32)}),
            "bert.pooler.dense.bias holds NaN or infinity in 16 of 16 places: the training diverged",
        ),
        (
            lambda w: w.update({"bert.pooler.dense.weight": np.ones((8, 16), np.float32)}),
            "bert.pooler.dense.weight has shape [8, 16], but by config.json it has [16, 16]",
        ),
    ],
)
def test_weights_that_are_missing_misshapen_or_not_finite_are_refused(change, message, tmp_path):
    source = altered(tmp_path, "gelu")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    write(source, tensors)
    refused(source, tmp_path, "model.safetensors: ", message)


def test_a_bare_model_without_its_pooler_is_refused(tmp_path):
    source = altered(tmp_path, "base")
    tensors = load_file(source / "model.safetensors")
    write(source, {name: weight for name, weight in tensors.items() if not name.startswith("pooler")})
    refused(
        source,
        tmp_path,
        "has no tensor pooler.dense.weight (the model was saved without its pooler, which",
    )


def test_a_truncated_or_damaged_safetensors_file_is_refused(tmp_path):
    source = altered(tmp_path, "gelu")
    path = source / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]

    def with_header(old: bytes, new: bytes) -> bytes:
        changed = header.replace(old, new, 1)
        assert changed != header
        return len(changed).to_bytes(8, "little") + changed + whole[8 + length :]

    damage = ": it is truncated or damaged; copy it again"
    for content, message in (
        (b"", damage),
        (whole[:5], damage),
        (whole[:1000], damage),
        (whole[:-1], "file not fully covered)" + damage),
        (whole + b"\0", damage),
        (b"PK\x03\x04" + whole, damage),
        (with_header(b'{"', b"{!"), "invalid JSON in header"),
        (with_header(b'"shape":[16]', b'"shape":[17]'), damage),
        (with_header(b'"dtype":"F32"', b'"dtype":"I32"'), "has type int32, not float; save it as float32"),
    ):
        path.write_bytes(content)
        refused(source, tmp_path, "model.safetensors", message)


def test_half_precision_becomes_float32(tmp_path, imported):
    """The conversion of bfloat16 is exact: it is the upper half of a float32."""
    source = altered(tmp_path, "gelu")
    tensors = {name: weight.copy() for name, weight in load_file(source / "model.safetensors").items()}
    for kind, to_bits in (
        ("F16", lambda weight: weight.astype("<f2")),
        ("BF16", lambda weight: (weight.view(np.uint32) >> 16).astype("<u2")),
    ):
        header, data = {}, b""
        for name, weight in tensors.items():
            part = to_bits(weight).tobytes()
            header[name] = {"dtype": kind, "shape": weight.shape, "data_offsets": [len(data), len(data) + len(part)]}
            data += part
        text = json.dumps(header).encode()
        (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        weights = read_checkpoint(spec_of(import_directory(source, tmp_path / kind))).weights
        for name, weight in read_checkpoint(spec_of(imported["gelu"])).weights.items():
            assert weights[name].dtype == np.float32
            if kind == "F16":
                expected = weight.astype(np.float16).astype(np.float32)
            else:
                expected = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)
            np.testing.assert_array_equal(weights[name], expected)


def test_shards_give_the_same_as_one_file(tmp_path, imported):
    source = altered(tmp_path, "gelu")
    tensors = {name: weight.copy() for name, weight in load_file(source / "model.safetensors").items()}
    (source / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: w for name, w in tensors.items() if weight_map[name] == file}, source / file)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    converted = import_directory(source, tmp_path / "sharded")
    name = "model.ckpt.data-00000-of-00001"
    assert (converted / name).read_bytes() == (imported["gelu"] / name).read_bytes()
    assert len(json.loads((converted / "import.json").read_text())["files"]) == 6
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, tmp_path, "model-00002-of-00002.safetensors: is missing, but the index names it; copy it too")
    index.write_text(json.dumps({"weight_map": {name: "../model.safetensors" for name in tensors}}))
    refused(source, tmp_path, "its weight_map must name files of the same directory")


def vocab_of(content: dict) -> dict:
    return content["model"]["vocab"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["model"].update(type="BPE"),
            "its model is 'BPE', but BERT's is 'WordPiece'; give a",
        ),
        (lambda t: t["model"].update(continuing_subword_prefix="@@"), "continuing_subword_prefix is '@@'"),
        (lambda t: t["model"].update(unk_token="<unk>"), "its model's unk_token is '<unk>', but BERT's is '[UNK]'"),
        (lambda t: t.update(normalizer={"type": "NFKC"}), "its normalizer is 'NFKC', but BERT's is 'BertNormalizer'"),
        (lambda t: t.update(pre_tokenizer=None), "its pre_tokenizer is None, but BERT's is 'BertPreTokenizer'"),
        (lambda t: t["normalizer"].update(strip_accents=False), "accents are kept while lower-casing is True"),
        (lambda t: t["normalizer"].update(handle_chinese_chars=False), "Chinese characters are not split"),
        (lambda t: t["normalizer"].update(lowercase=False), "tokenizer.json and tokenizer_config.json disagree on low"),
        (lambda t: vocab_of(t).update(pay=6), "tokens 'pay' and 'bill' both have id 6; fix this file"),
        (lambda t: vocab_of(t).pop("pay"), "no token has id 5, or a token occurs twice; fix the vocabulary"),
        (
            lambda t: vocab_of(t).update({"a b\n": 60}),
            "token 'a b\\n' cannot be written to vocab.txt",
        ),
        (lambda t: vocab_of(t).update({"<s>": vocab_of(t).pop("[CLS]")}), "has no token [CLS]; give a BERT vocab"),
        (lambda t: vocab_of(t).update(new=60), "has 61 tokens, but vocab_size in config.json is 60"),
    ],
)
def test_a_tokenizer_unlike_berts_is_refused(change, message, tmp_path):
    refused(altered(tmp_path, "gelu", tokenizer=change), tmp_path, message)


def test_a_vocabulary_with_a_token_twice_or_unlike_the_tokenizers_is_refused(tmp_path):
    source = altered(tmp_path, "relu")
    lines = (source / "vocab.txt").read_text().splitlines()
    (source / "vocab.txt").write_text("\n".join([*lines[:-1], "pay"]) + "\n")
    refused(source, tmp_path, "vocab.txt line 60: token 'pay' is on line 6 too")
    (source / "vocab.txt").write_text("\n".join([*lines[:-1], "other"]) + "\n")
    refused(source, tmp_path, "vocab.txt and tokenizer.json have different tokens; delete the wrong file")
    (source / "tokenizer.json").write_text("[]")
    refused(source, tmp_path, "tokenizer.json: is not a JSON object; copy it again")


def test_the_tokenizers_settings_are_checked_and_may_be_missing(tmp_path):
    refused(
        altered(tmp_path, "gelu_new", settings={"tokenizer_class": "BertJapaneseTokenizer"}),
        tmp_path,
        "tokenizer_config.json: tokenizer_class is 'BertJapaneseTokenizer'; it must be one of BertTokenizer,",
    )
    source = tmp_path / "source"
    (source / "tokenizer_config.json").unlink()
    converted = import_directory(source, tmp_path / "vocabulary-alone")
    assert json.loads((converted / "import.json").read_text())["do_lower_case"] is None


def test_an_import_overwrites_only_an_earlier_import(tmp_path):
    converted = import_directory(DATA / "gelu", tmp_path / "converted")
    before = {path: path.read_bytes() for path in converted.iterdir()}
    with pytest.raises(CascadeLabError, match="converted exists already; choose another output, or pass --overwrite"):
        import_directory(DATA / "relu", converted)
    assert before == {path: path.read_bytes() for path in converted.iterdir()}
    import_directory(DATA / "relu", converted, overwrite=True)
    assert spec_of(converted).labels == ("billing", "music", "weather")
    assert json.loads((converted / "bert_config.json").read_text())["hidden_act"] == "relu"
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "bert_config.json").write_text("{}")
    with pytest.raises(CascadeLabError, match="trained exists and is not a converted checkpoint, so it is not over"):
        import_directory(DATA / "gelu", tmp_path / "trained", overwrite=True)
    with pytest.raises(CascadeLabError, match="converted exists and is not a Hugging Face directory"):
        export_directory(spec_of(converted), converted, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "trained"]


@pytest.fixture(scope="module")
def transformers():
    """PyTorch's side, where it is installed."""
    pytest.importorskip("torch", reason="the live comparison needs PyTorch")
    return pytest.importorskip("transformers", reason="the live comparison needs transformers")


@pytest.fixture(scope="module")
def live(transformers, tmp_path_factory):
    """The directories of `data/huggingface`, written again by the installed transformers."""
    root = tmp_path_factory.mktemp("live")
    runpy.run_path(str(DATA / "make.py"))["main"](root)
    return root


def pytorch_logits(transformers, folder: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    import torch

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    keys = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        return model(**{key: torch.tensor(batch[key], dtype=torch.long) for key in keys}).logits.numpy()


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_live_import_and_export_keep_pytorchs_logits(hidden_act, live, transformers, tmp_path):
    batch = np.load(live / hidden_act / "expected.npz")
    expected = pytorch_logits(transformers, live / hidden_act, batch)
    spec = spec_of(import_directory(live / hidden_act, tmp_path / "in"))
    np.testing.assert_allclose(logits_of(spec, batch), expected, atol=1e-5, rtol=0)
    folder = export_directory(spec, tmp_path / "out")
    np.testing.assert_allclose(pytorch_logits(transformers, folder, batch), expected, atol=1e-5, rtol=0)


def test_live_an_exported_stage_gives_the_same_logits_in_pytorch(tiny, transformers, tmp_path):
    """From text to logits: AutoTokenizer and AutoModel on the export, against `Stage`."""
    for spec in CascadeSpec.read(tiny).stages:
        folder = export_directory(spec, tmp_path / spec.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        batch = [*texts(20), "Pay MY naïve bill, now!?", "", "漢字 unknowable"]
        encoded = tokenizer(batch, padding=True, truncation=True, return_tensors="np")
        assert encoded["input_ids"].shape[1] == spec.max_seq_length
        with Stage(spec) as stage:
            encodings = stage.encode(batch)
            expected = stage.logits(encodings)
        for encoding, ids, mask in zip(encodings, encoded["input_ids"], encoded["attention_mask"], strict=True):
            assert ids[: mask.sum()].tolist() == encoding.input_ids
        got = pytorch_logits(transformers, folder, encoded)
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        assert tuple(config.id2label[number] for number in range(len(spec.labels))) == spec.labels
