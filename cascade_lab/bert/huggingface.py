"""Converts BERT classifiers between Hugging Face's format and TensorFlow 1 checkpoints, without PyTorch.

The weights do not change by a single bit. Only their names change and, for dense layers, which axis comes first.
Two differences in tokenization remain: transformers replaces a word of more than 100 characters by `[UNK]`, while
bert-tensorflow allows 200; and transformers reads `[SEP]` inside a text as the special token, while bert-tensorflow
splits it like any other text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from cascade_lab.atomic import to_json, whole_directory
from cascade_lab.bert.checkpoint import SIZE_KEYS, check_config, read_checkpoint, read_json, variable_shapes
from cascade_lab.bert.huggingface_tokenizer import TOKENIZER_FILES, read_tokenizer
from cascade_lab.bert.huggingface_weights import HEAD, INDEXES, Tensors, convert, read_tensors, torch_name, transposed
from cascade_lab.bert.writing import save_checkpoint, write_lines
from cascade_lab.exceptions import CheckpointError
from cascade_lab.provenance import sha256
from cascade_lab.spec import StageSpec
from cascade_lab.text import shorten

WITH_HEAD = "BertForSequenceClassification"
# The last two contain a BertModel and heads that are not used here; bert-base-uncased is published as one of them.
ARCHITECTURES = (WITH_HEAD, "BertModel", "BertForMaskedLM", "BertForPreTraining")

# The two libraries name activations differently: "gelu" is the exact form in Hugging Face's configs, and the tanh form
# in bert-tensorflow's.
ACTIVATIONS_FROM_HF = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    # The same functions, written in other ways.
    "gelu_python": "gelu_erf",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
}
ACTIVATIONS_TO_HF = {"gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu"}

MAX_LABELS = 100_000  # more than any head has; a larger num_labels is a fault of the file
# What both libraries assume if a config lacks the key.
_DEFAULTS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02}
_EPSILON = 1e-12


def import_directory(source: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Convert a Hugging Face directory to a TensorFlow 1 one: `model.ckpt.*`, `bert_config.json`, `vocab.txt`.

    Parameters
    ----------
    source : path
        The directory of a `BertForSequenceClassification`, or of a `BertModel` with its pooler. It contains
        `config.json`, the weights, and `vocab.txt` or `tokenizer.json`. The weights are `model.safetensors`, else
        `pytorch_model.bin` (each may be in shards), else `tf_model.h5`.
    output : path
        The new directory, which appears whole or not at all. If the model has a classification head, it contains
        `labels.txt` too. `import.json` records the source, and whether texts are converted to lower case.
    overwrite : bool
        Replace an earlier import at `output`.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or this package's graph would compute other logits than Hugging Face's.
    CascadeLabError
        `output` exists already, or cannot be written.
    """
    source, output = Path(source), Path(output)
    hf_config = _read_config(source)
    config = {key: hf_config[key] for key in SIZE_KEYS}
    config |= {key: hf_config.get(key, value) for key, value in _DEFAULTS.items()}
    config["hidden_act"] = ACTIVATIONS_FROM_HF[hf_config["hidden_act"]]
    config["layer_norm_eps"] = hf_config.get("layer_norm_eps", _EPSILON)
    tokens, do_lower_case = read_tokenizer(source, config["vocab_size"])
    tensors = read_tensors(source)
    architecture = _architecture(hf_config, tensors)
    labels = []
    if architecture == WITH_HEAD:
        labels = _labels(hf_config, source / "config.json", tensors.head_shape)
    shapes = variable_shapes(config, len(labels))
    weights = convert(tensors, {name: shapes[name] for name in shapes if labels or name not in HEAD})
    names = ("config.json", *TOKENIZER_FILES, *INDEXES)
    files = tensors.files + [source / name for name in names if (source / name).is_file()]
    origin = {
        "source": str(source),
        "architecture": architecture,
        "hidden_act": hf_config["hidden_act"],
        "do_lower_case": do_lower_case,
        "n_rows_without_token": config["vocab_size"] - len(tokens),
        "files": {path.name: sha256(path) for path in sorted(files)},
    }
    with whole_directory(output, overwrite=overwrite, marker="import.json", what="converted checkpoint") as directory:
        save_checkpoint(weights, directory / "model.ckpt")
        (directory / "bert_config.json").write_text(to_json(config), encoding="utf-8")
        write_lines(directory / "vocab.txt", tokens)
        if labels:
            write_lines(directory / "labels.txt", labels)
        (directory / "import.json").write_text(to_json(origin), encoding="utf-8")
    return output


def export_directory(stage: StageSpec, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a stage as a Hugging Face directory, for `AutoModelForSequenceClassification` and `AutoTokenizer`.

    Parameters
    ----------
    stage : StageSpec
    output : path
        The new directory, with `config.json`, `model.safetensors` (float32), `vocab.txt` and `tokenizer_config.json`.
        It appears whole or not at all.
    overwrite : bool
        Replace an existing Hugging Face directory at `output`.

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
    weights = {head.get(name, name): weight for name, weight in checkpoint.weights.items()}
    tensors = {torch_name(name): np.ascontiguousarray(transposed(name, weight)) for name, weight in weights.items()}
    hf_config = {
        "architectures": [WITH_HEAD],
        "model_type": "bert",
        **{key: config[key] for key in SIZE_KEYS},
        **{key: config.get(key, value) for key, value in _DEFAULTS.items()},
        "hidden_act": ACTIVATIONS_TO_HF.get(config["hidden_act"], config["hidden_act"]),
        "layer_norm_eps": config.get("layer_norm_eps", _EPSILON),
        "position_embedding_type": "absolute",
        "problem_type": "single_label_classification",
        "pad_token_id": vocab.get("[PAD]", vocab["[UNK]"]),
        "id2label": {str(number): label for number, label in enumerate(stage.labels)},
        "label2id": {label: number for number, label in enumerate(stage.labels)},
    }
    # transformers would add a missing special token, with an id for which the model has no embedding.
    special = {word: f"[{word}]" if f"[{word}]" in vocab else "[UNK]" for word in ("UNK", "CLS", "SEP", "PAD", "MASK")}
    tokenizer = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": stage.do_lower_case,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": stage.max_seq_length,
        **{f"{word.lower()}_token": token for word, token in special.items()},
    }
    what = "Hugging Face directory"
    with whole_directory(output, overwrite=overwrite, marker="config.json", what=what) as directory:
        # "pt": the tensors have PyTorch's names and axes.
        (directory / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (directory / "config.json").write_text(to_json(hf_config), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(to_json(tokenizer), encoding="utf-8")
        write_lines(directory / "vocab.txt", vocab)
    return output


def _read_config(source: Path) -> dict[str, Any]:
    """Read `config.json`; raise CheckpointError if this package's graph would not compute the same network.

    What kind of model it is comes first: another model's config has other keys for its sizes.
    """
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{source}: has no config.json; give a Hugging Face model directory")
    config = read_json(path, way_out="copy config.json again")
    supported: dict[str, tuple[Any, ...]] = {
        "model_type": ("bert", None),
        "architectures": ([], None, *([name] for name in ARCHITECTURES)),
        "hidden_act": tuple(ACTIVATIONS_FROM_HF),
        "position_embedding_type": ("absolute", None),
        "problem_type": ("single_label_classification", None),
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
        "pruned_heads": ({}, None),
    }
    for key, values in supported.items():
        if config.get(key) not in values:
            listed = " or ".join(json.dumps(value) for value in values if value not in (None, [], {}))
            way_out = f"it can be imported with {listed}" if listed else "it can be imported only without this key"
            raise CheckpointError(f"{path}: {key} is {shorten(json.dumps(config.get(key)), 100)}; {way_out}")
    check_config(path, {**config, "hidden_act": ACTIVATIONS_FROM_HF[config["hidden_act"]]})
    return config


def _architecture(config: Mapping[str, Any], tensors: Tensors) -> str:
    """Return the name in `architectures`; where old versions of transformers wrote none, the tensors say what it is."""
    names = config.get("architectures")
    if names:
        return str(names[0])
    return "BertModel" if tensors.head_shape is None else WITH_HEAD


def _labels(config: Mapping[str, Any], path: Path, head_shape: tuple[int, ...] | None) -> list[str]:
    """Return the labels in the order of the head's rows.

    They come from `id2label`, else from `label2id`. Without both they are LABEL_0 and so on, as transformers names
    them; `num_labels` says how many, else the head.
    """
    names = config.get("id2label")
    if names is None and isinstance(config.get("label2id"), dict):
        names = {str(number): label for label, number in config["label2id"].items()}
    if names is None:
        n_labels = config.get("num_labels", head_shape[0] if head_shape else 2)
        if type(n_labels) is not int or not 0 < n_labels <= MAX_LABELS:
            raise CheckpointError(f"{path}: num_labels is {n_labels!r}; it must be a whole number above 0")
        names = {str(number): f"LABEL_{number}" for number in range(n_labels)}
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))} or not names:
        raise CheckpointError(f"{path}: id2label must name the labels 0, 1 and so on, at least two; fix this file")
    if len(names) == 1 or (head_shape and head_shape[0] == 1):
        raise CheckpointError(
            f"{path}: the model's head has one output, as for regression or re-ranking; give a classifier with at "
            "least two labels"
        )
    labels: list[str] = []
    for number in range(len(names)):
        label = names[str(number)]
        label = str(label) if type(label) is int else label
        if not isinstance(label, str) or label.strip() != label or len(label.splitlines()) != 1:
            raise CheckpointError(
                f"{path}: label {number} is {label!r}, but labels.txt has one label per line, without spaces around "
                "it; rename the label"
            )
        if label in labels:
            raise CheckpointError(f"{path}: id2label has '{label}' twice; give every class its own name")
        labels.append(label)
    return labels
