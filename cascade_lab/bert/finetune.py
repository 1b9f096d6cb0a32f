"""Fine-tuning a BERT classifier, as bert-tensorflow does it: one graph, one session, resumable.

The model and `AdamWeightDecayOptimizer` are bert-tensorflow's own, used as its `create_optimizer` uses them: weight
decay 0.01 but for LayerNorm and biases, gradients clipped to a global norm of 1.0, linear warm-up and decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from cascade_lab.bert import reference
from cascade_lab.bert.checkpoint import find_checkpoint, open_checkpoint, read_config, read_vocab, variable_shapes
from cascade_lab.bert.graph import classifier_logits, feed, placeholders
from cascade_lab.bert.resume import Work
from cascade_lab.bert.tokenization import Encoding, Tokenizer
from cascade_lab.errors import CheckpointError, TrainingError
from cascade_lab.evalset import EvalSet
from cascade_lab.provenance import environment, sha256

tf1 = tf.compat.v1

POOL = 50  # batches that are sorted by length together: like lengths in a batch, other company every epoch


@dataclass(frozen=True)
class Flags:
    """BERT's own flags for training, and what a reproducible run needs besides.

    `threads` is TensorFlow's thread count for one operation and between operations; 0 leaves it to TensorFlow,
    and 1 makes two trainings with one seed agree bit for bit.
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


@dataclass(frozen=True)
class Init:
    """What a training starts from: a config, a vocabulary, and a checkpoint (None: random weights)."""

    bert_config_file: Path
    vocab_file: Path
    prefix: str | None

    @classmethod
    def find(cls, init: str | Path, *, bert_config_file: Path | None = None, vocab_file: Path | None = None) -> Init:
        """Find the three at `init`: a directory, a checkpoint's prefix, or the word `random`.

        The config and the vocabulary are `bert_config.json` and `vocab.txt` beside the checkpoint, unless given.
        """
        if str(init) == "random":
            if bert_config_file is None or vocab_file is None:
                raise TrainingError("random weights need a bert_config_file and a vocab_file; give both")
            return cls(bert_config_file, vocab_file, None)
        path = Path(init)
        folder = path if path.is_dir() else path.parent
        # Google's own releases have no file named `checkpoint`.
        released = folder / "bert_model.ckpt"
        if path.is_dir() and not (path / "checkpoint").exists() and Path(f"{released}.index").exists():
            path = released
        return cls(
            bert_config_file or folder / "bert_config.json", vocab_file or folder / "vocab.txt", find_checkpoint(path)
        )


class _Graph(NamedTuple):
    graph: tf.Graph
    inputs: list[tf.Tensor]
    labels_t: tf.Tensor
    learning_rate_t: tf.Tensor
    dropout_seed_t: tf.Tensor
    loss_t: tf.Tensor
    train_op: tf.Operation
    logits_t: tf.Tensor  # without dropout
    finite_t: tf.Tensor
    weights: list[Any]


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
    """Fine-tune a classifier and keep its best epoch.

    Parameters
    ----------
    init : Init
        The head is always new; BERT's weights come from `init.prefix`, or are drawn at random.
    train, dev : EvalSet
        `dev` is scored after every epoch; the epoch of the highest accuracy (of equals, the lowest loss) is kept.
    labels : sequence of str
        The classes, in the order of the head's rows.
    output : path
        A directory that a `cascade.toml` can point at: checkpoint without optimizer slots, `bert_config.json`,
        `vocab.txt`, `labels.txt`, `training.json`. Until it is done the training lives in `<output>.unfinished`,
        from which the same call goes on after an interruption.
    label_column : str
        The column of `train` and `dev` that is learned.
    flags : Flags, optional

    Returns
    -------
    dict
        What `training.json` holds.

    Raises
    ------
    CheckpointError
        `init` is not usable.
    TrainingError
        A label without training text, a label of `dev` that is none of `labels`, an output that exists, an
        unfinished training under other flags, or a loss that is no longer a number.
    """
    flags = flags or Flags()
    output = Path(output)
    config, vocab = read_config(init.bert_config_file), read_vocab(init.vocab_file)
    said = {"train": train.column(label_column), "dev": dev.column(label_column)}
    _check_model(config, vocab, init, flags)
    _check_labels(labels, {"train": train, "dev": dev}, said)
    if output.exists() and not (overwrite and (output / "training.json").is_file()):
        raise TrainingError(f"{output} exists already; choose another output, or ask to overwrite a training")
    tokenizer = Tokenizer(init.vocab_file, do_lower_case=flags.do_lower_case, max_seq_length=flags.max_seq_length)
    index = {label: i for i, label in enumerate(labels)}
    encoded = {"train": tokenizer.encode(train.texts, train.texts_b), "dev": tokenizer.encode(dev.texts, dev.texts_b)}
    y = {name: np.array([index[label] for label in column]) for name, column in said.items()}
    n_steps = math.ceil(len(train) / flags.train_batch_size) * flags.num_train_epochs
    ends = _training_graph(config, len(labels), flags.seed)
    identity = {
        "flags": asdict(flags),
        "labels": list(labels),
        "label_column": label_column,
        "train": {key: value for key, value in train.origin.items() if key != "source"},
        "dev": {key: value for key, value in dev.origin.items() if key != "source"},
        "init": _origin(init),
    }
    try:
        work = Work(Path(f"{output}.unfinished"), identity)
        session_config = tf1.ConfigProto(
            intra_op_parallelism_threads=flags.threads, inter_op_parallelism_threads=flags.threads
        )
        session_config.gpu_options.allow_growth = True
        with ends.graph.as_default(), tf1.Session(config=session_config) as session:
            step, state = work.restore(session, ends.weights, init.prefix)
            with tqdm(total=n_steps, initial=step, unit="step", disable=not progress) as bar:
                _train(session, ends, encoded, y, flags, work, step, state, bar)
        record = {
            **identity,
            "sources": {"train": train.source, "dev": dev.source},
            "steps": n_steps,
            "curve": state["curve"],
            "best_epoch": state["best_epoch"],
            **environment(),
        }
        work.finish(output, state["best_step"], config, init.vocab_file, labels, record)
    except OSError as error:
        raise TrainingError(
            f"{output}: cannot be written ({error.strerror or error}); choose another output"
        ) from error
    return record


def _check_model(config: dict[str, Any], vocab: Mapping[str, int], init: Init, flags: Flags) -> None:
    if len(vocab) != config["vocab_size"]:
        raise CheckpointError(
            f"{init.vocab_file} has {len(vocab)} tokens and {init.bert_config_file} says vocab_size "
            f"{config['vocab_size']}; give files that belong together"
        )
    if flags.max_seq_length > config["max_position_embeddings"]:
        raise TrainingError(
            f"max_seq_length is {flags.max_seq_length}, and the model has {config['max_position_embeddings']} "
            "positions; lower it"
        )
    if init.prefix is None:
        return
    found = open_checkpoint(init.prefix).get_variable_to_shape_map()
    for name, shape in variable_shapes(config, 2).items():
        if name.startswith("bert/") and tuple(found.get(name, ())) != shape:
            has = f"of shape {found[name]}" if name in found else "missing"
            raise CheckpointError(
                f"{init.prefix}: {name} is {has}, and the config asks for {list(shape)}; give its own config"
            )


def _check_labels(labels: Sequence[str], sets: Mapping[str, EvalSet], said: Mapping[str, Sequence[str]]) -> None:
    if len(set(labels)) < max(len(labels), 2):
        raise TrainingError("the labels must be two or more, all different; mend the list")
    for name, evalset in sets.items():
        for location, label in zip(evalset.locations, said[name], strict=True):
            if label not in labels:
                raise TrainingError(
                    f"{location}: label '{label}' is none of the {len(labels)} labels that are trained; drop the "
                    "row, leave the label out, or add it to the labels"
                )
    empty = sorted(set(labels) - set(said["train"]))
    if empty:
        raise TrainingError(f"label '{empty[0]}' has no training text ({len(empty)} such); add some or drop the label")


def _training_graph(config: dict[str, Any], n_labels: int, seed: int) -> _Graph:
    """Build one graph with two views of one set of weights: with dropout to train, without to evaluate."""
    optimization = reference.load("optimization")
    graph = tf.Graph()
    with graph.as_default():
        tf1.set_random_seed(seed)
        inputs = placeholders()
        labels_t = tf1.placeholder(tf.int32, [None], name="labels")
        # Rate and masks are fed, not read off a step counter in the graph: reading it would race with its update,
        # and a resumed training is to draw the masks that the interrupted one would have drawn.
        learning_rate_t = tf1.placeholder(tf.float32, [], name="learning_rate")
        dropout_seed_t = tf1.placeholder(tf.int32, [2], name="dropout_seed")
        graph.add_to_collection(reference.DROPOUT_SEED, dropout_seed_t)
        with tf1.variable_scope(tf1.get_variable_scope(), use_resource=True):
            dropped_t = classifier_logits(config, n_labels, *inputs, is_training=True)
        with tf1.variable_scope(tf1.get_variable_scope(), reuse=True, use_resource=True):
            logits_t = classifier_logits(config, n_labels, *inputs)
        loss_t = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels_t, logits=dropped_t))
        weights = tf1.trainable_variables()
        optimizer = optimization.AdamWeightDecayOptimizer(
            learning_rate_t, weight_decay_rate=0.01, exclude_from_weight_decay=["LayerNorm", "layer_norm", "bias"]
        )
        gradients, _ = tf.clip_by_global_norm(tf.gradients(loss_t, weights), clip_norm=1.0)
        train_op = optimizer.apply_gradients(zip(gradients, weights, strict=True))
        finite_t = tf.reduce_all([tf.reduce_all(tf.math.is_finite(weight)) for weight in weights])
    return _Graph(
        graph, inputs, labels_t, learning_rate_t, dropout_seed_t, loss_t, train_op, logits_t, finite_t, weights
    )


def _train(
    session: Any,
    ends: _Graph,
    encoded: Mapping[str, list[Encoding]],
    y: Mapping[str, np.ndarray],
    flags: Flags,
    work: Work,
    step: int,
    state: dict[str, Any],
    bar: tqdm,
) -> None:
    """Train from `step` to the end; `state` is kept beside every checkpoint, so that it goes on from there."""
    steps_an_epoch = math.ceil(len(y["train"]) / flags.train_batch_size)
    for epoch in range(step // steps_an_epoch, flags.num_train_epochs):
        start = perf_counter()
        batches = list(_batches(encoded["train"], flags, epoch))
        for batch in batches[step - epoch * steps_an_epoch :]:
            given = {
                **feed(ends.inputs, [encoded["train"][i] for i in batch]),
                ends.labels_t: y["train"][batch],
                ends.learning_rate_t: _learning_rate(flags, step, steps_an_epoch * flags.num_train_epochs),
                ends.dropout_seed_t: [flags.seed, step],
            }
            loss, _ = session.run([ends.loss_t, ends.train_op], given)
            step += 1
            if not np.isfinite(loss):
                raise _diverged(step, flags, work)
            state["losses"].append(float(loss))
            bar.set_postfix(epoch=epoch + 1, loss=f"{np.mean(state['losses'][-50:]):.3f}", refresh=False)
            bar.update()
            if step % flags.save_checkpoints_steps == 0 and step % steps_an_epoch:
                _save(session, ends, flags, work, step, state)
        _end_epoch(session, ends, encoded["dev"], y["dev"], epoch, step, state, perf_counter() - start)
        bar.write(_line(state["curve"][-1])) if not bar.disable else None
        _save(session, ends, flags, work, step, state, best=state["best_epoch"] == epoch + 1)


def _learning_rate(flags: Flags, step: int, n_steps: int) -> float:
    """Return BERT's rate: up in a straight line over the warm-up, then down in one to 0 at the end."""
    n_warmup = int(n_steps * flags.warmup_proportion)
    return flags.learning_rate * (step / n_warmup if step < n_warmup else 1 - step / n_steps)


def _end_epoch(
    session: Any,
    ends: _Graph,
    dev: list[Encoding],
    y_dev: np.ndarray,
    epoch: int,
    step: int,
    state: dict[str, Any],
    seconds: float,
) -> None:
    """Evaluate, add a row to the curve, and mark the epoch if it is the best so far."""
    logits = np.empty((len(dev), int(ends.logits_t.shape[1])))
    order = np.argsort([-len(encoding.input_ids) for encoding in dev], kind="stable")
    for first in range(0, len(order), 64):
        batch = order[first : first + 64]
        logits[batch] = session.run(ends.logits_t, feed(ends.inputs, [dev[i] for i in batch]))
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    row = {
        "epoch": epoch + 1,
        "step": step,
        "train_loss": float(np.mean(state["losses"])),
        "dev_loss": float(-log_p[np.arange(len(dev)), y_dev].mean()),
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
    """Yield an epoch's batches of like length, in an order that the seed and the epoch decide."""
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
    session: Any, ends: _Graph, flags: Flags, work: Work, step: int, state: dict[str, Any], *, best: bool = False
) -> None:
    if not session.run(ends.finite_t):
        raise _diverged(step, flags, work)
    work.save(session, step, state, best=best)


def _diverged(step: int, flags: Flags, work: Work) -> TrainingError:
    good = work.last_good()
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint had been saved yet"
    return TrainingError(
        f"the loss is not a number any more at step {step}: the training diverged; {kept}; lower learning_rate "
        f"(it is {flags.learning_rate:g}) and start again in another output, or delete {work.folder}"
    )


def _origin(init: Init) -> dict[str, Any]:
    files = [init.bert_config_file, init.vocab_file]
    files += [] if init.prefix is None else [Path(f"{init.prefix}.index")]
    return {"weights": init.prefix and Path(init.prefix).name, "sha256": {path.name: sha256(path) for path in files}}
