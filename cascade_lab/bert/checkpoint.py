"""Reads and checks the files of a BERT classifier (checkpoint, config, vocabulary) before a graph exists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from cascade_lab.exceptions import CheckpointError
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
    if len(vocab) != config["vocab_size"]:
        raise CheckpointError(
            f"{where}: {files.vocab_file} has {len(vocab)} tokens, but vocab_size in {files.bert_config_file} is "
            f"{config['vocab_size']}; give the vocabulary that the checkpoint was trained with"
        )
    positions = config["max_position_embeddings"]
    if stage.max_seq_length > positions:
        raise CheckpointError(
            f"{where}: max_seq_length is {stage.max_seq_length}, but the model has only {positions} positions; "
            f"set max_seq_length to at most {positions}"
        )
    prefix = find_checkpoint(files.init_checkpoint)
    shapes = variable_shapes(config, len(stage.labels), stage.output_weights, stage.output_bias)
    return Checkpoint(prefix, config, vocab, _read_weights(prefix, shapes, where, stage))


def find_checkpoint(path: Path) -> str:
    """Return the prefix of the checkpoint at `path`, which is a directory, a prefix, or a checkpoint's index file.

    In a directory the newest checkpoint is taken, as by `tf.train.latest_checkpoint`.

    Raises
    ------
    CheckpointError
        There is no checkpoint at `path`.
    """
    if path.is_dir():
        latest: str | None = tf.train.latest_checkpoint(str(path))
        if latest is None and (path / "model.safetensors").exists():
            raise CheckpointError(f"{path}: is a Hugging Face directory; convert it with cascade-lab import-hf")
        if latest is None:
            raise CheckpointError(
                f"{path}: contains no checkpoint: its file 'checkpoint' is missing or names a checkpoint that does not "
                "exist; give a directory with a checkpoint, or a prefix such as model.ckpt-1000"
            )
        return latest
    # Users also give the name of one of the checkpoint's files; they mean the prefix.
    prefix = path.with_suffix("") if path.suffix in (".index", ".meta") else path
    if not Path(f"{prefix}.index").is_file():
        raise CheckpointError(f"{path}: no such checkpoint ({prefix}.index is missing); give a directory or a prefix")
    return str(prefix)


def checkpoint_files(prefix: str) -> list[Path]:
    """Return the files of the checkpoint at `prefix`: `.index` and `.data-…` (`.meta` is not needed)."""
    return [Path(path) for path in sorted(glob(f"{escape(prefix)}.[di]*"))]


def open_checkpoint(prefix: str) -> Any:
    """Return TensorFlow's reader of the checkpoint at `prefix`."""
    try:
        return tf.train.load_checkpoint(prefix)
    except (tf.errors.OpError, ValueError, IndexError) as error:
        raise CheckpointError(f"{prefix}.index: cannot be read ({_first_line(error)}); copy it again") from error


def list_variables(prefix: str) -> dict[str, tuple[list[int], str]]:
    """Return the shape and type of every variable in the checkpoint at `prefix`, by name."""
    reader = open_checkpoint(prefix)
    types = reader.get_variable_to_dtype_map()
    shapes = reader.get_variable_to_shape_map()
    return {name: (shapes[name], types[name].name) for name in sorted(shapes)}


def read_config(path: Path) -> dict[str, Any]:
    """Read a `bert_config.json`.

    Raises
    ------
    CheckpointError
        The file cannot be read, or a key is missing or has an unusable value.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a bert_config_file") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); give a bert_config_file") from error
    for key in SIZE_KEYS:
        value = config.get(key) if isinstance(config, dict) else None
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
    epsilon = config.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float) or not epsilon > 0:
        raise CheckpointError(f"{path}: layer_norm_eps is {epsilon!r}; it must be a number above 0, such as 1e-12")
    return dict(config)


def n_multiplications_per_token(config: Mapping[str, Any]) -> int:
    """Return how many multiplications the dense layers of the network do for one token (attention not counted)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return int(config["num_hidden_layers"] * hidden * (4 * hidden + 2 * inner))


def read_vocab(path: Path) -> dict[str, int]:
    """Read a `vocab.txt`, which has one token per line; return the id of each token.

    Raises
    ------
    CheckpointError
        The file cannot be read, a token occurs twice, or one that BERT needs is missing.
    """
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a vocab_file") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: byte {error.start} is not UTF-8; give a vocab_file") from error
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


def _read_weights(
    prefix: str, shapes: dict[str, tuple[int, ...]], where: str, stage: StageSpec
) -> dict[str, np.ndarray]:
    """Read the variables in `shapes`; others (Adam slots, `global_step`) are ignored."""
    reader = open_checkpoint(prefix)
    saved_shapes = reader.get_variable_to_shape_map()
    weights = {}
    for name, shape in shapes.items():
        if name not in saved_shapes:
            way_out = "give the checkpoint of a BERT classifier"
            if not name.startswith("bert/"):
                way_out = "name the variables of the head with output_weights and output_bias"
            raise CheckpointError(f"{where}: {prefix} has no variable {name}, which the graph needs; {way_out}")
        saved_shape = list(saved_shapes[name])
        if tuple(saved_shape) != shape:
            is_head = name in (stage.output_weights, stage.output_bias)
            way_out = "give the config that it was trained with"
            if is_head:
                way_out = f"give its {saved_shape[0]} labels"
            count = f" ({len(stage.labels)} labels)" if is_head else ""
            raise CheckpointError(
                f"{where}: {prefix}: {name} has shape {saved_shape}, but the graph needs {list(shape)}{count}; "
                f"{way_out}"
            )
        try:
            weights[name] = reader.get_tensor(name)
        except (tf.errors.OpError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{where}: {prefix}: {name} cannot be read ({_first_line(error)}): the file is truncated or "
                "damaged; copy it again"
            ) from error
        if not np.isfinite(weights[name]).all():
            n_bad = int((~np.isfinite(weights[name])).sum())
            raise CheckpointError(
                f"{where}: {prefix}: {name} holds NaN or infinity in {n_bad} of {weights[name].size} places: "
                "the training diverged; take an earlier checkpoint"
            )
    return weights


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
