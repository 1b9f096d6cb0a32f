"""What a BERT classifier's files hold, checked before a graph or a session exists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from cascade_lab.errors import CheckpointError
from cascade_lab.spec import StageSpec

# bert-tensorflow's own, and those that Hugging Face tells apart; "gelu" is the tanh form, as bert-tensorflow has it.
ACTIVATIONS = ("gelu", "relu", "tanh", "linear", "gelu_erf", "gelu_new", "gelu_pytorch_tanh")
SPECIAL_TOKENS = ("[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Checkpoint:
    """One stage's files, read and found to agree with each other and with the spec.

    Attributes
    ----------
    prefix : str
        The checkpoint as `tf.train.Saver` names it.
    config : dict
        `bert_config_file` as it stands.
    vocab : dict of str to int
        Token to id.
    weights : dict of str to ndarray
        The variables that the graph needs, by name.
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
        A file that is missing or broken, a variable that is missing, misshapen or not finite, or files that
        do not fit each other.
    """
    where = f"stage '{stage.name}'"
    config = read_config(stage.bert_config_file)
    vocab = read_vocab(stage.vocab_file)
    if len(vocab) != config["vocab_size"]:
        raise CheckpointError(
            f"{where}: {stage.vocab_file} has {len(vocab)} tokens and {stage.bert_config_file} says vocab_size "
            f"{config['vocab_size']}; give the vocabulary that the checkpoint was trained with"
        )
    positions = config["max_position_embeddings"]
    if stage.max_seq_length > positions:
        raise CheckpointError(
            f"{where}: max_seq_length is {stage.max_seq_length}, and the model has {positions} positions; "
            f"set max_seq_length to at most {positions}"
        )
    prefix = find_checkpoint(stage.init_checkpoint)
    shapes = variable_shapes(config, len(stage.labels), stage.output_weights, stage.output_bias)
    return Checkpoint(prefix, config, vocab, _read_weights(prefix, shapes, where, stage))


def find_checkpoint(path: Path) -> str:
    """Return the prefix of the checkpoint at `path`, a directory or a prefix, by `latest_checkpoint`'s rules."""
    if path.is_dir():
        prefix = tf.train.latest_checkpoint(str(path))
        if prefix is None and (path / "model.safetensors").exists():
            raise CheckpointError(
                f"{path}: a Hugging Face directory; make a checkpoint of it with cascade-lab import-hf"
            )
        if prefix is None:
            raise CheckpointError(
                f"{path}: no checkpoint there: its file 'checkpoint' is missing or names one that is gone; "
                "give a directory that has one, or a prefix such as model.ckpt-1000"
            )
        return prefix
    # People paste any of the three files' names; the prefix is what they mean.
    prefix = path.with_suffix("") if path.suffix in (".index", ".meta") else path
    if not Path(f"{prefix}.index").is_file():
        raise CheckpointError(f"{path}: no such checkpoint ({prefix}.index is missing); give a directory or prefix")
    return str(prefix)


def checkpoint_files(prefix: str) -> list[Path]:
    """Return the files that hold the checkpoint at `prefix`: `.index` and `.data-…` (`.meta` is not read)."""
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
    """Read a `bert_config.json`; raises CheckpointError where a key is missing or has an unusable value."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a bert_config_file") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); give a bert_config_file") from error
    sizes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
    )
    for key in sizes:
        value = config.get(key) if isinstance(config, dict) else None
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{path}: {key} is {value!r}; it must be a whole number above 0")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise CheckpointError(
            f"{path}: hidden_size {config['hidden_size']} is no multiple of num_attention_heads "
            f"{config['num_attention_heads']}; mend the config"
        )
    if config.get("hidden_act") not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{path}: hidden_act is {config.get('hidden_act')!r}; known: {known}")
    epsilon = config.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float) or not epsilon > 0:
        raise CheckpointError(f"{path}: layer_norm_eps is {epsilon!r}; it must be a number above 0, such as 1e-12")
    return config


def read_vocab(path: Path) -> dict[str, int]:
    """Read a `vocab.txt`, one token a line; raises CheckpointError where a line stands twice."""
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
                f"{path} line {number + 1}: token '{token}' stands at line {vocab[token] + 1} too, which would "
                "shift the ids of all that follow; mend the vocabulary"
            )
        vocab[token] = number
    for token in SPECIAL_TOKENS:
        if token not in vocab:
            raise CheckpointError(f"{path}: has no token {token}; give a BERT vocabulary")
    return vocab


def variable_shapes(
    config: dict[str, Any],
    num_labels: int,
    output_weights: str = "output_weights",
    output_bias: str = "output_bias",
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable of a BERT classifier, by its name in a TensorFlow 1 checkpoint."""
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
    """Read the named variables; others (Adam slots, `global_step`) are left alone."""
    reader = open_checkpoint(prefix)
    found = reader.get_variable_to_shape_map()
    weights = {}
    for name, shape in shapes.items():
        if name not in found:
            hint = "; name the head with output_weights and output_bias" if not name.startswith("bert/") else ""
            raise CheckpointError(f"{where}: {prefix} has no variable {name}, which the graph needs{hint}")
        if tuple(found[name]) != shape:
            head = name in (stage.output_weights, stage.output_bias)
            way_out = f"give its {found[name][0]} labels" if head else "give the config it was trained with"
            count = f" ({len(stage.labels)} labels)" if head else ""
            raise CheckpointError(
                f"{where}: {prefix}: {name} has shape {list(found[name])}, and the graph needs {list(shape)}"
                f"{count}; {way_out}"
            )
        try:
            weights[name] = reader.get_tensor(name)
        except (tf.errors.OpError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{where}: {prefix}: {name} cannot be read ({_first_line(error)}); the file is cut short or "
                "damaged, copy it again"
            ) from error
        if not np.isfinite(weights[name]).all():
            n = int((~np.isfinite(weights[name])).sum())
            raise CheckpointError(
                f"{where}: {prefix}: {name} holds NaN or infinity in {n} of {weights[name].size} places; "
                "the training diverged, take an earlier checkpoint"
            )
    return weights


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
