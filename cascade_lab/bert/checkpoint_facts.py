"""Finds out what a checkpoint's directory tells about its classifier: its files, its labels, its lower-casing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cascade_lab.bert.checkpoint import find_checkpoint, open_checkpoint, read_config, read_vocab, recorded_case
from cascade_lab.bert.variable_names import bert_scope, find_name
from cascade_lab.exceptions import CheckpointError

_CONFIGS = ("bert_config.json", "config.json")
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers writes where nobody named the labels


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known about a fine-tuned BERT classifier.

    Attributes
    ----------
    init_checkpoint, bert_config_file, vocab_file : Path
    n_labels : int
        The number of rows of the head.
    labels : tuple of str or None
        In the order of the rows; None where they have no names.
    labels_file : Path or None
        The file with the labels, one per line.
    do_lower_case : bool
    case_file : Path or None
        The file that says so; None where it is guessed from the vocabulary.
    max_position_embeddings : int
        The most tokens of a text.
    """

    init_checkpoint: Path
    bert_config_file: Path
    vocab_file: Path
    n_labels: int
    labels: tuple[str, ...] | None
    labels_file: Path | None
    do_lower_case: bool
    case_file: Path | None
    max_position_embeddings: int


def is_huggingface(path: Path) -> bool:
    """Return whether a path is a Hugging Face directory without a TensorFlow checkpoint in it."""
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    return not (path / "checkpoint").exists() and not any(path.glob("*.index"))


def checkpoint_facts(path: Path) -> CheckpointFacts:
    """Return what the files of a TensorFlow 1 checkpoint, and those beside it, tell.

    Parameters
    ----------
    path : Path
        A directory or a prefix. Beside the checkpoint are `bert_config.json`, `vocab.txt`, and maybe `labels.txt`.

    Raises
    ------
    CheckpointError
        A file is missing or damaged, or the checkpoint has no head.
    """
    prefix = find_checkpoint(path)
    folder = Path(prefix).parent
    config_file = next((folder / name for name in _CONFIGS if (folder / name).is_file()), folder / _CONFIGS[0])
    vocab_file = folder / "vocab.txt"
    config, vocab = read_config(config_file), read_vocab(vocab_file)
    n_labels = _n_labels(prefix, config["hidden_size"])
    labels_file = folder / "labels.txt"
    labels = _read_labels(labels_file, n_labels) if labels_file.is_file() else None
    case_file, do_lower_case = next(recorded_case({folder}), (None, not _has_capitals(vocab)))
    return CheckpointFacts(
        init_checkpoint=path,
        bert_config_file=config_file,
        vocab_file=vocab_file,
        n_labels=n_labels,
        labels=labels,
        labels_file=None if labels is None else labels_file,
        do_lower_case=do_lower_case,
        case_file=case_file,
        max_position_embeddings=config["max_position_embeddings"],
    )


def _n_labels(prefix: str, hidden: int) -> int:
    variables = open_checkpoint(prefix).variables
    name = find_name("output_weights", variables, bert_scope(prefix, variables), "/")
    if name not in variables:
        raise CheckpointError(
            f"{prefix}: has no classification head (output_weights); give a fine-tuned classifier, or write "
            "cascade.toml yourself, with the head's names as output_weights and output_bias"
        )
    shape = variables[name].shape
    return int(next((n for n in shape if n != hidden), hidden))


def _read_labels(path: Path, n_labels: int) -> tuple[str, ...] | None:
    """Read labels, one per line; None where all of them are `LABEL_0`, `LABEL_1` and so on."""
    try:
        labels = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); write one label per line, in UTF-8") from error
    if len(labels) != n_labels:
        raise CheckpointError(
            f"{path}: has {len(labels)} labels, but the checkpoint has {n_labels}; write one label per row of its head"
        )
    return None if all(_PLACEHOLDER.fullmatch(label) for label in labels) else labels


def _has_capitals(vocab: dict[str, int]) -> bool:
    return any(token != token.lower() for token in vocab if not token.startswith("["))
