"""One stage: one checkpoint in one `tf.Graph` and one `Session`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cascade_lab.bert.checkpoint import checkpoint_files, read_checkpoint
from cascade_lab.bert.graph import classifier_graph, feed
from cascade_lab.bert.tokenization import Encoding, Tokenizer
from cascade_lab.spec import StageSpec


class Stage:
    """A fine-tuned BERT classifier, loaded into a graph and a session of its own.

    Use it as a context manager, or call `close`: the session holds the weights.

    Raises
    ------
    CheckpointError
        Before a session exists, if the stage's files are not usable.
    """

    def __init__(self, spec: StageSpec):
        checkpoint = read_checkpoint(spec)
        self.spec = spec
        self.files = [spec.bert_config_file, spec.vocab_file, *checkpoint_files(checkpoint.prefix)]
        self.tokenizer = Tokenizer(
            spec.vocab_file, do_lower_case=spec.do_lower_case, max_seq_length=spec.max_seq_length
        )
        self._ends = classifier_graph(
            checkpoint.config,
            len(spec.labels),
            output_weights=spec.output_weights,
            output_bias=spec.output_bias,
        )
        config = tf.compat.v1.ConfigProto()
        config.gpu_options.allow_growth = True  # two sessions share one card
        self.session = tf.compat.v1.Session(graph=self._ends.graph, config=config)
        with self.graph.as_default():  # outside a graph, the Saver would take itself for an eager one
            self._ends.saver.restore(self.session, checkpoint.prefix)
        self.logits(self.encode([""]))  # the first run optimizes the graph: not at the first text's cost

    @property
    def settings(self) -> dict[str, Any]:
        """What ran, for a manifest: the graph, its precision, TensorFlow's threads (0: TensorFlow chooses)."""
        return {
            "engine": "reference",
            "precision": "float32",
            "intra_op_parallelism_threads": 0,
            "inter_op_parallelism_threads": 0,
            "devices": [device.name for device in self.session.list_devices()],
        }

    @property
    def graph(self) -> tf.Graph:
        return self._ends.graph

    def encode(self, texts: Sequence[str], texts_b: Sequence[str | None] | None = None) -> list[Encoding]:
        """Return the token ids of each text (or pair), for `logits`."""
        return self.tokenizer.encode(texts, texts_b)

    def logits(self, batch: Sequence[Encoding]) -> np.ndarray:
        """Run one batch, padded to its own longest; float32, shape (len(batch), n_labels)."""
        return self.session.run(self._ends.logits_t, feed(self._ends.inputs, batch))

    def close(self) -> None:
        """Close the session and let its weights go."""
        self.session.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
