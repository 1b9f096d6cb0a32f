"""Fine-tunes a BERT classifier as bert-tensorflow does; an interrupted training continues where it stopped.

The model is bert-tensorflow's. A step computes what its `AdamWeightDecayOptimizer` and `create_optimizer` do: weight
decay 0.01 except for LayerNorm and biases, gradients clipped to a global norm of 1.0, linear warm-up and linear decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from cascade_lab.atomic import check_directory, locked_output, refuse_existing, unfinished_path
from cascade_lab.bert.checkpoint import (
    check_case,
    check_vocab_size,
    find_checkpoint,
    read_bert_weights,
    read_config,
    read_vocab,
)
from cascade_lab.bert.graph import TrainingGraph, feed, training_graph
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.bert.resume import TRAINING_DIRECTORY, UnfinishedTraining, remove_finished
from cascade_lab.bert.tokenization import Encoding, Tokenizer
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import TrainingError
from cascade_lab.provenance import environment, sha256
from cascade_lab.text import printable, shorten

tf1 = tf.compat.v1

POOL = 50
"""The texts of this many batches, drawn at random, are sorted by length together. So the texts of a batch have similar
lengths, and yet every epoch has other batches."""


@dataclass(frozen=True)
class Flags:
    """BERT's own flags for training, and what makes a training reproducible.

    Attributes
    ----------
    learning_rate, num_train_epochs, train_batch_size, warmup_proportion, max_seq_length, do_lower_case
        As in BERT's `run_classifier`.
    save_checkpoints_steps : int
        The number of steps after which the training is saved.
    seed : int
        From 0 to 2,147,483,647.
    threads : int
        The number of threads inside one operation of TensorFlow, and of operations in parallel. 0 lets TensorFlow
        choose. With 1, two trainings with the same seed have bit-identical weights.
    """

    learning_rate: float = 5e-5
    num_train_epochs: int = 3
    train_batch_size: int = 32
    warmup_proportion: float = 0.1
    max_seq_length: int = 128
    do_lower_case: bool = True
    save_checkpoints_steps: int = 200
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise TrainingError(f"seed is {self.seed}; it must be from 0 to {2**31 - 1}")


@dataclass(frozen=True)
class Init:
    """The model that a training starts from.

    Attributes
    ----------
    bert_config_file, vocab_file : Path
    prefix : str or None
        The checkpoint with BERT's weights; None for random weights.
    """

    bert_config_file: Path
    vocab_file: Path
    prefix: str | None

    @classmethod
    def find(cls, init: str | Path, *, bert_config_file: Path | None = None, vocab_file: Path | None = None) -> Init:
        """Find checkpoint, config and vocabulary at `init`: a directory, a checkpoint's prefix, or the word `random`.

        Without `bert_config_file` and `vocab_file`, they are `bert_config.json` and `vocab.txt` in the same directory.

        Raises
        ------
        CheckpointError
            There is no checkpoint at `init`.
        TrainingError
            `init` is `random`, and the config or the vocabulary is not given.
        """
        if str(init) == "random":
            if bert_config_file is None or vocab_file is None:
                raise TrainingError("random weights need a bert_config_file and a vocab_file; give both")
            return cls(bert_config_file, vocab_file, None)
        path = Path(init)
        folder = path if path.is_dir() else path.parent
        return cls(
            bert_config_file or folder / "bert_config.json", vocab_file or folder / "vocab.txt", find_checkpoint(path)
        )


def finetune(
    init: Init,
    train: EvalSet,
    dev: EvalSet,
    labels: Sequence[str],
    output: str | Path,
    *,
    label_column: str = "label",
    flags: Flags | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Fine-tune a classifier and keep the weights of its best epoch.

    Parameters
    ----------
    init : Init
        BERT's weights come from `init.prefix`, or are random. The head always starts with random weights.
    train, dev : EvalSet
        `dev` is scored after every epoch. The epoch with the highest accuracy is kept; among equals, the one with the
        lowest loss.
    labels : sequence of str
        The classes, in the order of the head's rows.
    output : path
        The new directory, which a `cascade.toml` can name: a checkpoint without optimizer slots, `bert_config.json`,
        `vocab.txt`, `labels.txt`, `training.json`. Until the training is finished it is saved in `<output>.unfinished`;
        after an interruption the same call continues it. Another process cannot train to the same output meanwhile.
    label_column : str
        The column of `train` and `dev` that is learned.
    flags : Flags, optional
    overwrite : bool
        Replace an earlier training at `output`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict
        The content of `training.json`.

    Raises
    ------
    CheckpointError
        `init` is not usable.
    TrainingError
        A label has no training text, `dev` has a label that is not in `labels`, `output` exists, another process
        is writing it, `<output>.unfinished` was trained with other flags, or the loss is NaN.
    """
    flags = flags or Flags()
    output = Path(output)
    config, vocab = read_config(init.bert_config_file), read_vocab(init.vocab_file)
    targets = {"train": train.column(label_column), "dev": dev.column(label_column)}
    initial_weights = _check_model(config, vocab, init, flags)
    _check_labels(labels, {"train": train, "dev": dev}, targets)
    check_directory(output, overwrite=True, continues=True, **TRAINING_DIRECTORY)
    if not overwrite:
        remove_finished(output)
    refuse_existing(output, overwrite=overwrite, error=TrainingError)
    tokenizer = Tokenizer(init.vocab_file, do_lower_case=flags.do_lower_case, max_seq_length=flags.max_seq_length)
    index = {label: i for i, label in enumerate(labels)}
    encoded = {"train": tokenizer.encode(train.texts, train.texts_b), "dev": tokenizer.encode(dev.texts, dev.texts_b)}
    y = {name: np.array([index[label] for label in column]) for name, column in targets.items()}
    n_steps = math.ceil(len(train) / flags.train_batch_size) * flags.num_train_epochs
    network = training_graph(config, len(labels), flags.seed)
    identity = {
        "flags": asdict(flags),
        "labels": list(labels),
        "label_column": label_column,
        "train": {key: value for key, value in train.origin.items() if key != "source"},
        "dev": {key: value for key, value in dev.origin.items() if key != "source"},
        "init": init_origin(init),
    }
    try:
        with locked_output(output, overwrite=overwrite, continues=True, **TRAINING_DIRECTORY):
            unfinished = UnfinishedTraining(unfinished_path(output), identity)
            session_config = tf1.ConfigProto(
                intra_op_parallelism_threads=flags.threads, inter_op_parallelism_threads=flags.threads
            )
            session_config.gpu_options.allow_growth = True
            with network.graph.as_default(), tf1.Session(config=session_config) as session:
                step, state = unfinished.restore(session, network.weights, initial_weights)
                with tqdm(total=n_steps, initial=step, unit="step", disable=not progress) as bar:
                    _train(session, network, encoded, y, flags, unfinished, step, state, bar, dev.texts)
            record = {
                **identity,
                "sources": {"train": train.source, "dev": dev.source},
                "steps": n_steps,
                "curve": state["curve"],
                "best_epoch": state["best_epoch"],
                **environment(),
            }
            unfinished.finish(output, state["best_step"], config, init.vocab_file, labels, record)
    except OSError as error:
        raise TrainingError(
            f"{output}: cannot be written ({error.strerror or error}); choose another output"
        ) from error
    return record


def _check_model(
    config: dict[str, Any], vocab: Mapping[str, int], init: Init, flags: Flags
) -> dict[str, np.ndarray] | None:
    """Check that the files belong together; return BERT's weights, or None where they are random."""
    check_vocab_size(str(init.vocab_file), len(vocab), init.bert_config_file, config["vocab_size"])
    if flags.max_seq_length > config["max_position_embeddings"]:
        raise TrainingError(
            f"max_seq_length is {flags.max_seq_length}, but the model has only {config['max_position_embeddings']} "
            "positions; lower max_seq_length"
        )
    folders = {init.vocab_file.parent} | ({Path(init.prefix).parent} if init.prefix else set())
    check_case("the initial model", flags.do_lower_case, folders)
    return None if init.prefix is None else read_bert_weights(init.prefix, config)


def _check_labels(labels: Sequence[str], sets: Mapping[str, EvalSet], targets: Mapping[str, Sequence[str]]) -> None:
    if len(set(labels)) < max(len(labels), 2):
        raise TrainingError("the labels must be at least two and all different; fix the list of labels")
    for name, evalset in sets.items():
        for location, label in zip(evalset.locations, targets[name], strict=True):
            if label not in labels:
                raise TrainingError(
                    f"{location}: label '{label}' is not one of the {len(labels)} labels that are trained; drop the "
                    "row, leave the label out, or add it to the labels"
                )
    without_text = sorted(set(labels) - set(targets["train"]))
    if without_text:
        raise TrainingError(
            f"label '{without_text[0]}' has no training text ({len(without_text)} such labels); add texts or drop the "
            "label"
        )


def _train(
    session: Any,
    network: TrainingGraph,
    encoded: Mapping[str, list[Encoding]],
    y: Mapping[str, np.ndarray],
    flags: Flags,
    unfinished: UnfinishedTraining,
    step: int,
    state: dict[str, Any],
    bar: tqdm,
    dev_texts: Sequence[str],
) -> None:
    """Train from `step` to the end. `state` is saved with every checkpoint, so that the training can continue there."""
    steps_per_epoch = math.ceil(len(y["train"]) / flags.train_batch_size)
    for epoch in range(step // steps_per_epoch, flags.num_train_epochs):
        start = perf_counter()
        batches = list(_batches(encoded["train"], flags, epoch))
        for batch in batches[step - epoch * steps_per_epoch :]:
            inputs = {
                **feed(network.inputs, [encoded["train"][i] for i in batch]),
                network.labels_t: y["train"][batch],
                network.learning_rate_t: _learning_rate(flags, step, steps_per_epoch * flags.num_train_epochs),
                network.dropout_seed_t: [flags.seed, step],
            }
            loss, _ = session.run([network.loss_t, network.train_op], inputs)
            step += 1
            if not np.isfinite(loss):
                raise _diverged(f"the loss is NaN or infinite at step {step}", flags, unfinished)
            state["losses"].append(float(loss))
            bar.set_postfix(epoch=epoch + 1, loss=f"{np.mean(state['losses'][-50:]):.3f}", refresh=False)
            bar.update()
            if step % flags.save_checkpoints_steps == 0 and step % steps_per_epoch:
                _save(session, network, flags, unfinished, step, state)
        seconds = perf_counter() - start
        logits = _dev_logits(session, network, encoded["dev"])
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            text = printable(shorten(dev_texts[bad[0]], 60))
            raise _diverged(f"a logit of the text '{text}' is NaN or infinite after step {step}", flags, unfinished)
        _end_epoch(logits, y["dev"], epoch, step, state, seconds)
        bar.write(_line(state["curve"][-1])) if not bar.disable else None
        _save(session, network, flags, unfinished, step, state, best=state["best_epoch"] == epoch + 1)


def _learning_rate(flags: Flags, step: int, n_steps: int) -> float:
    """Return BERT's learning rate at a step: it rises linearly during the warm-up, then falls linearly to 0."""
    n_warmup = int(n_steps * flags.warmup_proportion)
    return flags.learning_rate * (step / n_warmup if step < n_warmup else 1 - step / n_steps)


def _dev_logits(session: Any, network: TrainingGraph, dev: list[Encoding]) -> np.ndarray:
    """Score `dev` without dropout: shape (len(dev), n_labels)."""
    logits = np.empty((len(dev), int(network.logits_t.shape[1])))
    order = np.argsort([-len(encoding.input_ids) for encoding in dev], kind="stable")
    for first in range(0, len(order), 64):
        batch = order[first : first + 64]
        logits[batch] = session.run(network.logits_t, feed(network.inputs, [dev[i] for i in batch]))
    return logits


def _end_epoch(
    logits: np.ndarray, y_dev: np.ndarray, epoch: int, step: int, state: dict[str, Any], seconds: float
) -> None:
    """Add a row to the curve, and record the epoch if it is the best so far."""
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    row = {
        "epoch": epoch + 1,
        "step": step,
        "train_loss": float(np.mean(state["losses"])),
        "dev_loss": float(-log_p[np.arange(len(y_dev)), y_dev].mean()),
        "dev_accuracy": float((logits.argmax(axis=1) == y_dev).mean()),
        "seconds": round(seconds, 1),
    }
    best = max(state["curve"], key=_rank, default=None)
    if best is None or _rank(row) > _rank(best):
        state["best_epoch"], state["best_step"] = epoch + 1, step
    state["curve"].append(row)
    state["losses"] = []


def _rank(row: Mapping[str, float]) -> tuple[float, float]:
    return row["dev_accuracy"], -row["dev_loss"]


def _line(row: Mapping[str, float]) -> str:
    return (
        f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, dev loss {row['dev_loss']:.4f}, "
        f"dev accuracy {row['dev_accuracy']:.4f}"
    )


def _batches(encodings: Sequence[Encoding], flags: Flags, epoch: int) -> Iterator[np.ndarray]:
    """Yield the batches of one epoch, each of texts of similar length; seed and epoch fix their order."""
    rng = np.random.default_rng([flags.seed, epoch])
    lengths = np.array([len(encoding.input_ids) for encoding in encodings])
    order = rng.permutation(len(encodings))
    size = flags.train_batch_size
    batches = []
    for first in range(0, len(order), POOL * size):
        pool = order[first : first + POOL * size]
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def _save(
    session: Any,
    network: TrainingGraph,
    flags: Flags,
    unfinished: UnfinishedTraining,
    step: int,
    state: dict[str, Any],
    *,
    best: bool = False,
) -> None:
    if not session.run(network.finite_t):
        raise _diverged(f"a weight is NaN or infinite after step {step}", flags, unfinished)
    unfinished.save(session, step, state, best=best)


def _diverged(problem: str, flags: Flags, unfinished: UnfinishedTraining) -> TrainingError:
    prefix = unfinished.last_checkpoint()
    saved = f"the last good checkpoint is {prefix}" if prefix else "no checkpoint had been saved yet"
    return TrainingError(
        f"{problem}: the training diverged; {saved}; lower learning_rate "
        f"(it is {flags.learning_rate:g}) and train to another output, or delete {unfinished.folder}"
    )


def init_origin(init: Init) -> dict[str, Any]:
    """Return what `training.json` records about the model that a training starts from."""
    files = [init.bert_config_file, init.vocab_file]
    files += [] if init.prefix is None else [Path(f"{init.prefix}.index")]
    return {"weights": init.prefix and Path(init.prefix).name, "sha256": {path.name: sha256(path) for path in files}}
