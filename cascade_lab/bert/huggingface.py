"""Converts BERT classifiers between Hugging Face's format and TensorFlow 1 checkpoints, without PyTorch.

The weights do not change by a single bit. Only their names change and, for dense layers, which axis comes first.
Two differences in tokenization remain: transformers replaces a word of more than 100 characters by `[UNK]`, while
bert-tensorflow allows 200; and transformers reads `[SEP]` inside a text as the special token, while bert-tensorflow
splits it like any other text.
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

from cascade_lab.atomic import to_json, whole_directory
from cascade_lab.bert.checkpoint import SIZE_KEYS, read_checkpoint, read_config, variable_shapes
from cascade_lab.bert.huggingface_tokenizer import read_json, read_tokenizer
from cascade_lab.bert.writing import save_checkpoint, write_lines
from cascade_lab.exceptions import CheckpointError
from cascade_lab.provenance import sha256
from cascade_lab.spec import StageSpec

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
}
ACTIVATIONS_TO_HF = {"gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu"}

_HEAD = {"output_weights": "classifier.weight", "output_bias": "classifier.bias"}
# What both libraries assume if a config lacks the key.
_DEFAULTS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02}
_EPSILON = 1e-12


def import_directory(source: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Convert a Hugging Face directory to a TensorFlow 1 one: `model.ckpt.*`, `bert_config.json`, `vocab.txt`.

    Parameters
    ----------
    source : path
        The directory of a `BertForSequenceClassification`, or of a `BertModel` with its pooler. It contains
        `config.json`, `model.safetensors` (or its shards), and `vocab.txt` or `tokenizer.json`.
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
    labels = _labels(hf_config, source / "config.json")
    config = {key: hf_config[key] for key in SIZE_KEYS}
    config |= {key: hf_config.get(key, value) for key, value in _DEFAULTS.items()}
    config["hidden_act"] = ACTIVATIONS_FROM_HF[hf_config["hidden_act"]]
    config["layer_norm_eps"] = hf_config.get("layer_norm_eps", _EPSILON)
    tokens, do_lower_case = read_tokenizer(source, config["vocab_size"])
    files = _weight_files(source)
    shapes = variable_shapes(config, len(labels))
    weights = _read_weights(files, {name: shapes[name] for name in shapes if labels or name not in _HEAD})
    names = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")
    files += [source / name for name in names if (source / name).is_file()]
    origin = {
        "source": str(source),
        "architecture": hf_config["architectures"][0],
        "hidden_act": hf_config["hidden_act"],
        "do_lower_case": do_lower_case,
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
    tensors = {
        _torch_name(head.get(name, name)): np.ascontiguousarray(_transposed(name, weight))
        for name, weight in checkpoint.weights.items()
    }
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
    """Read `config.json`; raise CheckpointError if this package's graph would not compute the same network."""
    path = source / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{source}: has no config.json; give a Hugging Face model directory")
    config = read_config(path)
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and len(architectures) == 1 and architectures[0] in ARCHITECTURES):
        raise CheckpointError(
            f"{path}: architectures is {architectures!r}; it must be one of {', '.join(ARCHITECTURES)}"
        )
    supported = {
        "model_type": ("bert",),
        "hidden_act": tuple(ACTIVATIONS_FROM_HF),
        "position_embedding_type": ("absolute", None),
        "problem_type": ("single_label_classification", None),
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
    }
    for key, values in supported.items():
        if config.get(key) not in values:
            listed = " or ".join(json.dumps(value) for value in values if value is not None)
            raise CheckpointError(f"{path}: {key} is {json.dumps(config.get(key))}; it can be imported with {listed}")
    return config


def _labels(config: Mapping[str, Any], path: Path) -> list[str]:
    """Return the labels in the order of the head's rows; an empty list if the model has no head."""
    if config["architectures"] != [WITH_HEAD]:
        return []
    names = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers does not write its default
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))} or len(names) < 2:
        raise CheckpointError(f"{path}: id2label must name the labels 0, 1 and so on, at least two; fix this file")
    labels = [names[str(number)] for number in range(len(names))]
    for number, label in enumerate(labels):
        if not isinstance(label, str) or label.strip() != label or len(label.splitlines()) != 1:
            raise CheckpointError(
                f"{path}: label {number} is {label!r}, but labels.txt has one label per line, without spaces around "
                "it; rename the label"
            )
        if label in labels[:number]:
            raise CheckpointError(f"{path}: id2label has '{label}' twice; give every class its own name")
    return labels


def _weight_files(source: Path) -> list[Path]:
    """Return `model.safetensors`, or the shards that are listed in its index."""
    single, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise CheckpointError(f"{index}: its weight_map must name files of the same directory; copy it again")
        return [source / name for name in sorted(set(names.values()))]
    hint = "give a Hugging Face model directory"
    if any(source.glob("pytorch_model*.bin")):
        hint = (
            "pytorch_model.bin is not read, since it can execute code; save the model again with save_pretrained of a "
            "current transformers"
        )
    raise CheckpointError(f"{source}: has no model.safetensors; {hint}")


def _read_weights(files: list[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the tensors that the graph needs, by their TensorFlow names; others are ignored."""
    tensors: dict[str, tuple[Path, np.ndarray]] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, but the index names it; copy it too")
        try:
            tensors |= {_modern_name(name): (path, tensor) for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError, TypeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}): it is truncated or damaged; copy it again"
            ) from error
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    weights = {}
    for variable, shape in shapes.items():
        name = _torch_name(variable)
        if variable not in _HEAD:
            name = prefix + name.removeprefix("bert.")
        if name not in tensors:
            where = files[0] if len(files) == 1 else files[0].parent
            pooler = " (the model was saved without its pooler, which a classifier needs)" if "pooler" in name else ""
            raise CheckpointError(f"{where}: has no tensor {name}{pooler}; save the whole model again")
        path, tensor = tensors[name]
        torch_shape = shape[::-1] if variable.endswith("/kernel") else shape
        if tensor.shape != torch_shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, but by config.json it has {list(torch_shape)}; give "
                "the config that the model was trained with"
            )
        if tensor.dtype.kind != "f" and tensor.dtype != tf.bfloat16.as_numpy_dtype:
            raise CheckpointError(f"{path}: {name} has type {tensor.dtype.name}, not float; save it as float32")
        weights[variable] = _transposed(variable, tensor.astype(np.float32))
        n_bad = int((~np.isfinite(weights[variable])).sum())
        if n_bad:
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity in {n_bad} of {tensor.size} places: the training diverged; "
                "take an earlier checkpoint"
            )
    return weights


def _torch_name(name: str) -> str:
    """Return the name of a variable in Hugging Face's models.

    >>> _torch_name("bert/encoder/layer_3/attention/self/query/kernel")
    'bert.encoder.layer.3.attention.self.query.weight'
    """
    if name in _HEAD:
        return _HEAD[name]
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name)
    name = re.sub(r"/(kernel|gamma)$", "/weight", name)
    name = re.sub(r"/beta$", "/bias", name)
    return re.sub(r"_embeddings$", "_embeddings/weight", name).replace("/", ".")


def _modern_name(name: str) -> str:
    """Return a tensor's present name: in the oldest models a LayerNorm has `gamma` and `beta`."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _transposed(name: str, weight: np.ndarray) -> np.ndarray:
    """Swap the axes of a dense layer's weights: the outputs come first in PyTorch, the inputs in TensorFlow."""
    return weight.T if name.endswith("/kernel") else weight
