"""Hugging Face's layout of a BERT classifier to TensorFlow 1's and back, without PyTorch.

The weights stay as they are, bit for bit; only their names and, of dense layers, their orientation change. Two
things stay different in how texts are cut: transformers makes a word of more than 100 characters `[UNK]` and takes
`[SEP]` in a text for the token; bert-tensorflow has 200, and no such tokens in texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from cascade_lab.bert.checkpoint import SPECIAL_TOKENS, read_checkpoint, read_config, read_vocab, variable_shapes
from cascade_lab.bert.writing import save_checkpoint, write_json, write_lines
from cascade_lab.errors import CheckpointError
from cascade_lab.provenance import sha256
from cascade_lab.spec import StageSpec
from cascade_lab.wholly import whole_directory

WITH_HEAD = "BertForSequenceClassification"
# The last two hold a BertModel beside heads that are not ours; bert-base-uncased is published as one of them.
ARCHITECTURES = (WITH_HEAD, "BertModel", "BertForMaskedLM", "BertForPreTraining")

# The same word means two things: Hugging Face's "gelu" is the exact form, bert-tensorflow's the tanh form.
TO_OURS = {"gelu": "gelu_erf", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "relu": "relu"}
TO_THEIRS = {"gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu"}

_HEAD = {"output_weights": "classifier.weight", "output_bias": "classifier.bias"}
_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# What both libraries take where a config says nothing.
_RATES = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02}
_EPSILON = 1e-12


def import_directory(source: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Turn a Hugging Face directory into a TensorFlow 1 one: `model.ckpt.*`, `bert_config.json`, `vocab.txt`.

    Parameters
    ----------
    source : path
        A directory with `config.json`, `model.safetensors` (or its shards) and `vocab.txt` or `tokenizer.json`,
        of a `BertForSequenceClassification`, or of a `BertModel` with its pooler.
    output : path
        The directory to make; it appears whole or not at all. Where there is a classification head it has
        `labels.txt` too. `import.json` says what it was made of, and whether texts are to be lower-cased.
    overwrite : bool
        Replace what an earlier import left there.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        A file that is missing or broken, or a model that our graph would not compute alike.
    CascadeLabError
        `output` exists already, or cannot be written.
    """
    source, output = Path(source), Path(output)
    theirs = _read_config(source)
    labels = _labels(theirs, source / "config.json")
    config = {key: theirs[key] for key in _SIZES} | {key: theirs.get(key, value) for key, value in _RATES.items()}
    config["hidden_act"] = TO_OURS[theirs["hidden_act"]]
    config["layer_norm_eps"] = theirs.get("layer_norm_eps", _EPSILON)
    tokens, do_lower_case = _read_tokenizer(source, config["vocab_size"])
    files = _weight_files(source)
    shapes = variable_shapes(config, len(labels))
    weights = _read_weights(files, {name: shapes[name] for name in shapes if labels or name not in _HEAD})
    names = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")
    files += [source / name for name in names if (source / name).is_file()]
    origin = {
        "source": str(source),
        "architecture": theirs["architectures"][0],
        "hidden_act": theirs["hidden_act"],
        "do_lower_case": do_lower_case,
        "files": {path.name: sha256(path) for path in sorted(files)},
    }
    with whole_directory(output, overwrite=overwrite, sign="import.json", what="converted checkpoint") as made:
        save_checkpoint(weights, made / "model.ckpt")
        write_json(made / "bert_config.json", config)
        write_lines(made / "vocab.txt", tokens)
        if labels:
            write_lines(made / "labels.txt", labels)
        write_json(made / "import.json", origin)
    return output


def export_directory(stage: StageSpec, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a stage as a Hugging Face directory, for `AutoModelForSequenceClassification` and `AutoTokenizer`.

    Parameters
    ----------
    stage : StageSpec
    output : path
        The directory to make, with `config.json`, `model.safetensors` (float32), `vocab.txt` and
        `tokenizer_config.json`; it appears whole or not at all.
    overwrite : bool
        Replace the Hugging Face directory that is there.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        The stage's files are not usable.
    CascadeLabError
        `output` exists already, or cannot be written.
    """
    output = Path(output)
    checkpoint = read_checkpoint(stage)
    config, vocab = checkpoint.config, checkpoint.vocab
    head = {stage.output_weights: "output_weights", stage.output_bias: "output_bias"}
    tensors = {
        _torch_name(head.get(name, name)): np.ascontiguousarray(_turned(name, weight))
        for name, weight in checkpoint.weights.items()
    }
    theirs = {
        "architectures": [WITH_HEAD],
        "model_type": "bert",
        **{key: config[key] for key in _SIZES},
        **{key: config.get(key, value) for key, value in _RATES.items()},
        "hidden_act": TO_THEIRS.get(config["hidden_act"], config["hidden_act"]),
        "layer_norm_eps": config.get("layer_norm_eps", _EPSILON),
        "position_embedding_type": "absolute",
        "problem_type": "single_label_classification",
        "pad_token_id": vocab.get("[PAD]", vocab["[UNK]"]),
        "id2label": {str(number): label for number, label in enumerate(stage.labels)},
        "label2id": {label: number for number, label in enumerate(stage.labels)},
    }
    # transformers would add a token that the vocabulary has not, with an id that the model has not.
    special = {word: f"[{word}]" if f"[{word}]" in vocab else "[UNK]" for word in ("UNK", "CLS", "SEP", "PAD", "MASK")}
    tokenizer = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": stage.do_lower_case,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": stage.max_seq_length,
        **{f"{word.lower()}_token": token for word, token in special.items()},
    }
    with whole_directory(output, overwrite=overwrite, sign="config.json", what="Hugging Face directory") as made:
        (made / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))  # PyTorch's names and layouts
        write_json(made / "config.json", theirs)
        write_json(made / "tokenizer_config.json", tokenizer)
        write_lines(made / "vocab.txt", vocab)
    return output


def _read_config(source: Path) -> dict[str, Any]:
    """Read `config.json`; refuse by name what our graph would compute otherwise, or not at all."""
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{source}: has no config.json; give a Hugging Face model directory")
    config = read_config(path)
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in ARCHITECTURES):
        raise CheckpointError(f"{path}: architectures is {architectures!r}; known: one of {', '.join(ARCHITECTURES)}")
    wanted = {
        "model_type": ("bert",),
        "hidden_act": tuple(TO_OURS),
        "position_embedding_type": ("absolute", None),
        "problem_type": ("single_label_classification", None),
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
    }
    for key, values in wanted.items():
        if config.get(key) not in values:
            known = " or ".join(json.dumps(value) for value in values if value is not None)
            raise CheckpointError(f"{path}: {key} is {json.dumps(config.get(key))}; it can be imported with {known}")
    return config


def _labels(config: Mapping[str, Any], path: Path) -> list[str]:
    """Return the labels in the order of the head's rows; none where there is no head."""
    if config["architectures"] != [WITH_HEAD]:
        return []
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers leaves its default out
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))} or len(names) < 2:
        raise CheckpointError(f"{path}: id2label must name the labels 0, 1 and so on, at least two; mend it there")
    labels = [names[str(number)] for number in range(len(names))]
    for number, label in enumerate(labels):
        if not isinstance(label, str) or label.strip() != label or len(label.splitlines()) != 1:
            raise CheckpointError(
                f"{path}: label {number} is {label!r}, and labels.txt holds one a line, without spaces around it; "
                "rename it there"
            )
        if label in labels[:number]:
            raise CheckpointError(f"{path}: id2label has '{label}' twice; every class needs a name of its own")
    return labels


def _read_tokenizer(source: Path, vocab_size: int) -> tuple[list[str], bool | None]:
    """Return the tokens in the order of their ids, and whether texts are lower-cased (None: no file says so)."""
    listed, fast, settings = (source / name for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"))
    vocabs, lowers = {}, {}
    if listed.is_file():
        vocabs[listed] = list(read_vocab(listed))
    if fast.is_file():
        vocabs[fast], lowers[fast] = _read_fast_tokenizer(fast)
    if settings.is_file():
        content = _read_json(settings)
        kind = content.get("tokenizer_class")
        if kind not in (*_TOKENIZERS, None):
            raise CheckpointError(f"{settings}: tokenizer_class is {kind!r}; known: {', '.join(_TOKENIZERS)}")
        lower = content.get("do_lower_case")
        _check_cutting(settings, lower, content.get("strip_accents"), content.get("tokenize_chinese_chars", True))
        if lower is not None:
            lowers[settings] = lower
    if not vocabs:
        raise CheckpointError(f"{source}: has no vocabulary; add its vocab.txt or tokenizer.json")
    if len(set(lowers.values())) > 1:
        raise CheckpointError(f"{source}: {fast.name} and {settings.name} disagree on lower-casing; mend one of them")
    if len(vocabs) == 2 and vocabs[listed] != vocabs[fast]:
        raise CheckpointError(f"{source}: {listed.name} and {fast.name} hold different tokens; delete the wrong one")
    path, tokens = next(iter(vocabs.items()))
    if len(tokens) != vocab_size:
        raise CheckpointError(
            f"{path}: has {len(tokens)} tokens and config.json says vocab_size {vocab_size}; give the vocabulary that "
            "the model was trained with"
        )
    return tokens, next(iter(lowers.values()), None)


def _read_fast_tokenizer(path: Path) -> tuple[list[str], bool]:
    content = _read_json(path)
    model, normalizer, cutter = (content.get(key) or {} for key in ("model", "normalizer", "pre_tokenizer"))
    wanted = (
        ("model", model.get("type"), "WordPiece"),
        ("model's continuing_subword_prefix", model.get("continuing_subword_prefix"), "##"),
        ("model's unk_token", model.get("unk_token"), "[UNK]"),
        ("normalizer", normalizer.get("type"), "BertNormalizer"),
        ("normalizer's clean_text", normalizer.get("clean_text"), True),
        ("pre_tokenizer", cutter.get("type"), "BertPreTokenizer"),
    )
    for what, found, needed in wanted:
        if found != needed:
            raise CheckpointError(f"{path}: its {what} is {found!r}, and BERT's is {needed!r}; give BERT's tokenizer")
    lower = normalizer.get("lowercase")
    _check_cutting(path, lower, normalizer.get("strip_accents"), normalizer.get("handle_chinese_chars"))
    vocab = model.get("vocab", {})
    by_id: dict[int, str] = {}
    for token, number in vocab.items():
        if number in by_id:
            raise CheckpointError(
                f"{path}: tokens {by_id[number]!r} and {token!r} both have id {number}; mend it there"
            )
        if token.strip() != token or "\n" in token:
            raise CheckpointError(f"{path}: token {token!r} cannot stand in a vocab.txt, one a line; give another")
        by_id[number] = token
    missing = next((number for number in range(len(by_id)) if number not in by_id), None)
    if missing is not None:
        raise CheckpointError(f"{path}: no token has id {missing}, or one token stands twice; mend the vocabulary")
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise CheckpointError(f"{path}: has no token {token}; give a BERT vocabulary")
    return [by_id[number] for number in range(len(by_id))], lower


def _check_cutting(path: Path, lower: Any, strip_accents: Any, chinese: Any) -> None:
    """Refuse a way of cutting texts that bert-tensorflow's tokenizer has not."""
    if strip_accents is not None and strip_accents != lower:
        raise CheckpointError(
            f"{path}: accents are {'stripped' if strip_accents else 'kept'} while lower-casing is {lower!r}, which "
            "bert-tensorflow's tokenizer cannot do; take a model with strip_accents null"
        )
    if chinese is not True:
        raise CheckpointError(
            f"{path}: Chinese characters are not cut apart, as bert-tensorflow's tokenizer always does; take another "
            "model"
        )


def _weight_files(source: Path) -> list[Path]:
    """Return `model.safetensors`, or the shards that its index names."""
    single, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise CheckpointError(f"{index}: its weight_map names no files beside it; copy it again")
        return [source / name for name in sorted(set(names.values()))]
    hint = "give a Hugging Face model directory"
    if any(source.glob("pytorch_model*.bin")):
        hint = "pytorch_model.bin can run code when read, so it is not; save the model with save_pretrained again"
    raise CheckpointError(f"{source}: has no model.safetensors; {hint}")


def _read_weights(files: list[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read the tensors that the graph needs, by their TensorFlow names; others are left alone."""
    tensors: dict[str, tuple[Path, np.ndarray]] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, and the index names it; copy it too")
        try:
            tensors |= {_modern(name): (path, tensor) for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError, TypeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); it is cut short or damaged, copy it again"
            ) from error
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    weights = {}
    for ours, shape in shapes.items():
        name = _torch_name(ours)
        if ours not in _HEAD:
            name = prefix + name.removeprefix("bert.")
        if name not in tensors:
            where = files[0] if len(files) == 1 else files[0].parent
            pooler = " (it was saved without its pooler, which a classifier needs)" if "pooler" in name else ""
            raise CheckpointError(f"{where}: has no tensor {name}{pooler}; take the model as it was trained")
        path, tensor = tensors[name]
        turned = shape[::-1] if ours.endswith("/kernel") else shape
        if tensor.shape != turned:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, and config.json asks for {list(turned)}; give the "
                "config that it was trained with"
            )
        if tensor.dtype.kind != "f" and tensor.dtype != tf.bfloat16.as_numpy_dtype:
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype.name}, not floats; save it as float32")
        weights[ours] = _turned(ours, tensor.astype(np.float32))
        n_bad = int((~np.isfinite(weights[ours])).sum())
        if n_bad:
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity in {n_bad} of {tensor.size} places; the training diverged, "
                "take an earlier checkpoint"
            )
    return weights


def _torch_name(name: str) -> str:
    """Return Hugging Face's name of a variable.

    >>> _torch_name("bert/encoder/layer_3/attention/self/query/kernel")
    'bert.encoder.layer.3.attention.self.query.weight'
    """
    if name in _HEAD:
        return _HEAD[name]
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name)
    name = re.sub(r"/(kernel|gamma)$", "/weight", name)
    name = re.sub(r"/beta$", "/bias", name)
    return re.sub(r"_embeddings$", "_embeddings/weight", name).replace("/", ".")


def _modern(name: str) -> str:
    """Return a tensor's name as written today: the first models' LayerNorms have `gamma` and `beta`."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _turned(name: str, weight: np.ndarray) -> np.ndarray:
    """PyTorch keeps a dense layer's outputs first, TensorFlow its inputs."""
    return weight.T if name.endswith("/kernel") else weight


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is no JSON object; copy it again")
    return content
