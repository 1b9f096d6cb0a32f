"""Files of a model, written: a checkpoint by TensorFlow, its small companions by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1


def save_checkpoint(weights: Mapping[str, np.ndarray], prefix: Path) -> None:
    """Write float32 variables as a TensorFlow 1 checkpoint, and the file `checkpoint` that names it."""
    with tf.Graph().as_default(), tf1.Session() as session:
        for name, weight in weights.items():
            variable = tf1.get_variable(
                name, weight.shape, tf.float32, initializer=tf1.zeros_initializer(), use_resource=False
            )
            # Fed, not held by the graph, which must stay below 2 GB.
            session.run(variable.initializer, {variable.initializer.inputs[1]: weight})
        # Relative, since a directory has another name until it is whole.
        saver = tf1.train.Saver(save_relative_paths=True)
        with disk_errors():
            saver.save(session, str(prefix), write_meta_graph=False)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what TensorFlow says of the disk as the OSError that it is, in one line."""
    try:
        yield
    except tf.errors.OpError as error:
        # Somewhere in its many lines stands "path; No space left on device".
        reason = re.search(r"^\S+; (.+)$", str(error), re.MULTILINE)
        raise OSError(reason[1] if reason else str(error).splitlines()[0]) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON for people and programs."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write one a line, as `vocab.txt` and `labels.txt` are; a line ends in a bare newline on every system."""
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
