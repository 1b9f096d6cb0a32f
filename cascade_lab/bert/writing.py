"""Writes the files of a model: TensorFlow 1 checkpoints, and text files such as `vocab.txt`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cascade_lab.bert.quiet_tensorflow import tf

tf1 = tf.compat.v1


def save_checkpoint(weights: Mapping[str, np.ndarray], prefix: Path) -> None:
    """Write float32 variables as a TensorFlow 1 checkpoint, and the file `checkpoint` that names it."""
    with tf.Graph().as_default(), tf1.Session() as session:
        for name, weight in weights.items():
            variable = tf1.get_variable(
                name, weight.shape, tf.float32, initializer=tf1.zeros_initializer(), use_resource=False
            )
            # The value is fed: a constant would be stored in the graph, which must be smaller than 2 GB.
            session.run(variable.initializer, {variable.initializer.inputs[1]: weight})
        # Relative paths, since the directory is renamed when it is complete.
        saver = tf1.train.Saver(save_relative_paths=True)
        with disk_errors():
            saver.save(session, str(prefix), write_meta_graph=False)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn TensorFlow's error about the disk into an OSError with a message of one line."""
    try:
        yield
    except tf.errors.OpError as error:
        # One of the many lines of TensorFlow's message is "path; No space left on device".
        reason = re.search(r"^\S+; (.+)$", str(error), re.MULTILINE)
        raise OSError(reason[1] if reason else str(error).splitlines()[0]) from error


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write one line per item, as in `vocab.txt` and `labels.txt`; lines end with "\\n" on every system."""
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
