"""Reads and checks the files of a BERT classifier (checkpoint, config, vocabulary) before a graph exists."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cascade_lab.bert.checkpoint_reader import CheckpointReader, checkpoint_in
from cascade_lab.bert.variable_names import bert_scope, check_kind, find_name
from cascade_lab.exceptions import CheckpointError, CheckpointWarning
from cascade_lab.json_files import parse
from cascade_lab.spec import StageSpec

SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
"""The keys of `bert_config.json` that fix the size of the network. Every config must have them."""

# The activations of bert-tensorflow, and those that only Hugging Face has. As in bert-tensorflow, "gelu" is the tanh
# form; "gelu_erf" is the exact form.
ACTIVATIONS = ("gelu", "relu", "tanh", "linear", "gelu_erf", "gelu_new", "gelu_pytorch_tanh")
# Keys of Hugging Face's configs that change the network, and the only value that means BERT's own one.
_UNREAD = {"pruned_heads": {}, "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
_HUGGING_FACE_KEYS = ("model_type", "architectures", "transformers_version")  # which bert-tensorflow never writes
REQUIRED_TOKENS = ("[UNK]", "[CLS]", "[SEP]")


class StageFiles(NamedTuple):
    """The three paths that a stage needs before it can be loaded."""

    init_checkpoint: Path
    bert_config_file: Path
    vocab_file: Path


def stage_files(stage: StageSpec) -> StageFiles:
    """Return the paths of a stage's checkpoint, config and vocabulary.

    Raises
    ------
    CheckpointError
        The stage lacks one of them: its logits were computed elsewhere, so it cannot be loaded.
    """
    for key in StageFiles._fields:
        if getattr(stage, key) is None:
            raise CheckpointError(
                f"stage '{stage.name}': has no {key}: its logits were computed elsewhere; add init_checkpoint, "
                "bert_config_file and vocab_file to run it"
            )
    return StageFiles(*(Path(getattr(stage, key)) for key in StageFiles._fields))


@dataclass(frozen=True)
class Checkpoint:
    """The content of one stage's files, checked against each other and against the spec.

    Attributes
    ----------
    prefix : str
        The checkpoint's path without the ending of its files, as `tf.train.Saver` expects it.
    config : dict
        The content of `bert_config_file`.
    vocab : dict of str to int
        Token to id.
    weights : dict of str to ndarray
        The values of the variables that the graph needs, by name.
    """

    prefix: str
    config: dict[str, Any]
    vocab: dict[str, int]
    weights: dict[str, np.ndarray]


def read_checkpoint(stage: StageSpec) -> Checkpoint:
    """Read the checkpoint, config and vocabulary of `stage`.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, a variable is missing, has a wrong shape or holds NaN, the files do not belong
        together, or the stage has no files at all.
    """
    files = stage_files(stage)
    where = f"stage '{stage.name}'"
    config = read_config(files.bert_config_file)
    vocab = read_vocab(files.vocab_file)
    check_vocab_size(f"{where}: {files.vocab_file}", len(vocab), files.bert_config_file, config["vocab_size"])
    positions = config["max_position_embeddings"]
    if stage.max_seq_length > positions:
        raise CheckpointError(
            f"{where}: max_seq_length is {stage.max_seq_length}, but the model has only {positions} positions; "
            f"set max_seq_length to at most {positions}"
        )
    prefix = find_checkpoint(files.init_checkpoint)
    check_case(where, stage.do_lower_case, {Path(prefix).parent, files.vocab_file.parent})
    return Checkpoint(prefix, config, vocab, _classifier_weights(prefix, config, stage, where))


def find_checkpoint(path: Path) -> str:
    """Return the prefix of the checkpoint at `path`, which is a directory, a prefix, or one of a checkpoint's files.

    In a directory it is the checkpoint that the file `checkpoint` names. Where there is no such file, as in Google's
    releases of BERT, it is the directory's only checkpoint. A checkpoint in the directory itself is preferred to one
    of the same name elsewhere: an absolute path in the file `checkpoint` is outdated when a directory is moved or
    copied. Letters such as `[` and `*` in a path have no special meaning.

    Raises
    ------
    CheckpointError
        There is no checkpoint at `path`, or several and no file says which one is meant.
    """
    try:
        if path.is_dir():
            return checkpoint_in(path)
        # Users also give the name of one of the checkpoint's files; they mean the prefix.
        prefix = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(path))
        is_file = Path(f"{prefix}.index").is_file()
    except (OSError, ValueError) as error:  # for example a name that is too long
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({reason}); give a directory or a prefix") from error
    if not is_file:
        raise CheckpointError(f"{path}: no such checkpoint ({prefix}.index is missing); give a directory or a prefix")
    return prefix


def checkpoint_files(prefix: str) -> list[Path]:
    """Return the files of the checkpoint at `prefix`: `.data-…` and `.index` (`.meta` is not needed).

    A `.data-….tempstate…` that a killed process left is not one of them.
    """
    patterns = (f"{escape(prefix)}.data-?????-of-?????", f"{escape(prefix)}.index")
    return [Path(path) for pattern in patterns for path in sorted(glob(pattern))]


def open_checkpoint(prefix: str) -> CheckpointReader:
    """Return a reader of the checkpoint at `prefix`.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be read, or it contains no BERT with a pooler.
    """
    reader = CheckpointReader(prefix)
    check_kind(prefix, list(reader.variables))
    return reader


def list_variables(prefix: str) -> dict[str, tuple[list[int], str]]:
    """Return the shape and type of every variable in the checkpoint at `prefix`, by name."""
    variables = CheckpointReader(prefix).variables
    return {name: (list(variables[name].shape), variables[name].dtype.name) for name in sorted(variables)}


def read_config(path: Path) -> dict[str, Any]:
    """Read a `bert_config.json`, or a `config.json` of Hugging Face.

    In Hugging Face's configs, `gelu` is the exact form, which is `gelu_erf` here; a `CheckpointWarning` says so.

    Raises
    ------
    CheckpointError
        The file cannot be read, or a key is missing or has an unusable value.
    """
    config = read_json(path, way_out="give a bert_config_file")
    check_config(path, config)
    if config["hidden_act"] == "gelu" and any(key in config for key in _HUGGING_FACE_KEYS):
        warnings.warn(
            f"{path}: is a config of Hugging Face, where gelu means the exact form, which is computed; if the model "
            'was trained with bert-tensorflow, write "hidden_act": "gelu_new" in it',
            CheckpointWarning,
            stacklevel=2,
        )
        config["hidden_act"] = "gelu_erf"
    return config


def read_json(path: Path, *, way_out: str = "copy it again") -> dict[str, Any]:
    """Read a JSON object, with a byte-order mark or without; raise CheckpointError if the file has none."""
    try:
        content = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {way_out}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); {way_out}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; {way_out}")
    return content


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a key of a config is missing or has an unusable value."""
    for key in SIZE_KEYS:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {key} is {value!r}; it must be a whole number above 0")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise CheckpointError(
            f"{path}: hidden_size {config['hidden_size']} is not a multiple of num_attention_heads "
            f"{config['num_attention_heads']}; fix the config"
        )
    if config.get("hidden_act") not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{path}: hidden_act is {config.get('hidden_act')!r}; it must be one of {known}")
    for key, usual in _UNREAD.items():
        if config.get(key) not in (usual, None):
            raise CheckpointError(
                f"{path}: {key} is {config[key]!r}, which bert-tensorflow's network does not have; give another model"
            )
    epsilon = config.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float) or not epsilon > 0:
        raise CheckpointError(f"{path}: layer_norm_eps is {epsilon!r}; it must be a number above 0, such as 1e-12")


def n_multiplications_per_token(config: Mapping[str, Any]) -> int:
    """Return how many multiplications the dense layers of the network do for one token (attention not counted)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return int(config["num_hidden_layers"] * hidden * (4 * hidden + 2 * inner))


def read_vocab(path: Path) -> dict[str, int]:
    """Read a `vocab.txt`, which has one token per line; return the id of each token.

    Blank lines after the last token are no tokens. A byte-order mark is no part of the first token.

    Raises
    ------
    CheckpointError
        The file cannot be read, a token occurs twice, or one that BERT needs is missing.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a vocab_file") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: byte {error.start} is not UTF-8; give a vocab_file") from error
    while lines and not lines[-1].strip(" \t\r"):
        lines.pop()
    vocab: dict[str, int] = {}
    for number, line in enumerate(lines):
        token = line.strip()
        if token in vocab:
            raise CheckpointError(
                f"{path} line {number + 1}: token '{token}' is on line {vocab[token] + 1} too, which would shift the "
                "ids of all later tokens; fix the vocabulary"
            )
        vocab[token] = number
    for token in REQUIRED_TOKENS:
        if token not in vocab:
            raise CheckpointError(f"{path}: has no token {token}; give a BERT vocabulary")
    return vocab


def check_vocab_size(where: str, n_tokens: int, config_file: str | Path, vocab_size: int) -> None:
    """Raise CheckpointError if a vocabulary has tokens for which the embedding has no row.

    The embedding may have more rows than the vocabulary has tokens. Many models have such rows, so that their number
    is a multiple of 8 or 64; no text looks them up.
    """
    if n_tokens > vocab_size:
        raise CheckpointError(
            f"{where} has {n_tokens} tokens, but vocab_size in {config_file} is {vocab_size}; give the vocabulary that "
            "the checkpoint was trained with"
        )


def variable_shapes(
    config: dict[str, Any],
    num_labels: int,
    output_weights: str = "output_weights",
    output_bias: str = "output_bias",
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable of a BERT classifier, by the variable's name in a TensorFlow 1 checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]

    def dense(scope: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {f"{scope}/kernel": (n_in, n_out), f"{scope}/bias": (n_out,)}

    def norm(scope: str) -> dict[str, tuple[int, ...]]:
        return {f"{scope}/LayerNorm/gamma": (hidden,), f"{scope}/LayerNorm/beta": (hidden,)}

    shapes: dict[str, tuple[int, ...]] = {
        "bert/embeddings/word_embeddings": (config["vocab_size"], hidden),
        "bert/embeddings/token_type_embeddings": (config["type_vocab_size"], hidden),
        "bert/embeddings/position_embeddings": (config["max_position_embeddings"], hidden),
        **norm("bert/embeddings"),
    }
    for number in range(config["num_hidden_layers"]):
        layer = f"bert/encoder/layer_{number}"
        for part in ("query", "key", "value"):
            shapes |= dense(f"{layer}/attention/self/{part}", hidden, hidden)
        shapes |= dense(f"{layer}/attention/output/dense", hidden, hidden) | norm(f"{layer}/attention/output")
        shapes |= dense(f"{layer}/intermediate/dense", hidden, inner)
        shapes |= dense(f"{layer}/output/dense", inner, hidden) | norm(f"{layer}/output")
    shapes |= dense("bert/pooler/dense", hidden, hidden)
    return shapes | {output_weights: (num_labels, hidden), output_bias: (num_labels,)}


def _classifier_weights(prefix: str, config: dict[str, Any], stage: StageSpec, where: str) -> dict[str, np.ndarray]:
    """Read the variables of a classifier's graph; others (Adam slots, `global_step`) are ignored."""
    reader = open_checkpoint(prefix)
    saved_shapes = {name: variable.shape for name, variable in reader.variables.items()}
    head = (stage.output_weights, stage.output_bias)
    n_labels, hidden = len(stage.labels), config["hidden_size"]
    shapes = variable_shapes(config, n_labels, *head)
    weights = read_bert_weights(prefix, config, where=f"{where}: ", reader=reader)
    for name in head:
        saved_name = find_name(name, saved_shapes, bert_scope(prefix, saved_shapes), "/")
        if saved_name not in saved_shapes:
            raise CheckpointError(
                f"{where}: {prefix} has no variable {name}, which the graph needs; name the variables of the head with "
                "output_weights and output_bias"
            )
        saved_shape = saved_shapes[saved_name]
        # tf.layers.dense saves its kernel as [hidden, labels]. Where both are equal, only the name shows it.
        is_turned = saved_shape == (hidden, n_labels) and (n_labels != hidden or saved_name.endswith("kernel"))
        if saved_shape != shapes[name] and not is_turned:
            n_saved = saved_shape[-1] if saved_shape[:1] == (hidden,) else (*saved_shape, 0)[0]
            way_out = f"give its {n_saved} labels"
            if n_saved < 2:
                way_out = "this is not the head of a classifier; name its variables with output_weights and output_bias"
            raise CheckpointError(
                f"{where}: {prefix}: {saved_name} has shape {list(saved_shape)}, but the graph needs "
                f"{list(shapes[name])} ({n_labels} labels); {way_out}"
            )
        weight = reader.read_float32(saved_name, where=f"{where}: ")
        weights[name] = np.ascontiguousarray(weight.T) if is_turned else weight
    return weights


def read_bert_weights(
    prefix: str, config: dict[str, Any], *, where: str = "", reader: CheckpointReader | None = None
) -> dict[str, np.ndarray]:
    """Read the variables of BERT without a head, float32, by their names in the graph (`bert/…`).

    In the checkpoint they may have another scope than `bert/`, and another type of float.

    Raises
    ------
    CheckpointError
        The checkpoint is damaged, contains no BERT, or does not belong to the config.
    """
    reader = reader or open_checkpoint(prefix)
    saved_shapes = {name: variable.shape for name, variable in reader.variables.items()}
    scope = bert_scope(prefix, saved_shapes)
    weights = {}
    for name, shape in variable_shapes(config, 2).items():
        if not name.startswith("bert/"):
            continue
        saved_name = scope + name.removeprefix("bert/")
        if saved_name not in saved_shapes:
            raise CheckpointError(
                f"{where}{prefix} has no variable {saved_name}, which the graph needs; give the checkpoint of a BERT "
                "classifier"
            )
        if saved_shapes[saved_name] != shape:
            raise CheckpointError(
                f"{where}{prefix}: {saved_name} has shape {list(saved_shapes[saved_name])}, but the graph needs "
                f"{list(shape)}; give the config that it was trained with"
            )
        weights[name] = reader.read_float32(saved_name, where=where)
    return weights


def check_case(where: str, do_lower_case: bool, folders: set[Path]) -> None:
    """Raise CheckpointError if a file beside the weights says that the model was trained with the other case."""
    for path, saved in recorded_case(folders):
        if saved != do_lower_case:
            raise CheckpointError(
                f"{where}: do_lower_case is {json.dumps(do_lower_case)}, but {path} says that the model was "
                f"trained with {json.dumps(saved)}; set do_lower_case = {json.dumps(saved)}"
            )


def recorded_case(folders: set[Path]) -> Iterator[tuple[Path, bool]]:
    """Return the files beside the weights that say whether texts are converted to lower case, and what each says."""
    for path in sorted(folder / name for folder in folders for name in _CASE_FILES):
        if not path.is_file():
            continue
        content = read_json(path)
        if path.name == "training.json":
            content = content["flags"] if isinstance(content.get("flags"), dict) else {}
        saved = content.get("do_lower_case")
        if isinstance(saved, bool):
            yield path, saved


# Files that record whether texts are converted to lower case: of import-hf, of finetune, of transformers.
_CASE_FILES = ("import.json", "training.json", "tokenizer_config.json")
