"""The reference graph: bert-tensorflow's `BertModel` with `run_classifier`'s head, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from cascade_lab.bert import reference
from cascade_lab.bert.tokenization import Encoding

tf1 = tf.compat.v1


class ClassifierGraph(NamedTuple):
    """A graph and its ends.

    `inputs` are `input_ids`, `input_mask` and `segment_ids`, int32, shape (n, length); `logits_t` is float32,
    shape (n, num_labels).
    """

    graph: tf.Graph
    inputs: list[tf.Tensor]
    logits_t: tf.Tensor
    saver: Any


def classifier_graph(
    config: dict[str, Any], num_labels: int, *, output_weights: str, output_bias: str
) -> ClassifierGraph:
    """Build a BERT classifier in a `tf.Graph` of its own; its variables are named as in a checkpoint."""
    graph = tf.Graph()
    with graph.as_default():
        inputs = placeholders()
        logits_t = classifier_logits(
            config, num_labels, *inputs, output_weights=output_weights, output_bias=output_bias
        )
        saver = tf1.train.Saver(tf1.global_variables())
    return ClassifierGraph(graph, inputs, logits_t, saver)


def placeholders() -> list[tf.Tensor]:
    """Return `input_ids`, `input_mask` and `segment_ids` in the current graph: int32, shape (n, length)."""
    return [tf1.placeholder(tf.int32, [None, None], name=name) for name in ("input_ids", "input_mask", "segment_ids")]


def feed(inputs: Sequence[tf.Tensor], batch: Sequence[Encoding]) -> dict[tf.Tensor, np.ndarray]:
    """Return what `session.run` is fed for a batch: ids, mask and segments, padded to its own longest."""
    length = max(len(encoding.input_ids) for encoding in batch)
    input_ids, input_mask, segment_ids = np.zeros((3, len(batch), length), dtype=np.int32)
    for row, (ids, n_first) in enumerate(batch):
        input_ids[row, : len(ids)] = ids
        input_mask[row, : len(ids)] = 1
        segment_ids[row, n_first : len(ids)] = 1
    return dict(zip(inputs, (input_ids, input_mask, segment_ids), strict=True))


def classifier_logits(
    config: dict[str, Any],
    num_labels: int,
    input_ids_t: tf.Tensor,
    input_mask_t: tf.Tensor,
    segment_ids_t: tf.Tensor,
    *,
    output_weights: str = "output_weights",
    output_bias: str = "output_bias",
    is_training: bool = False,
) -> tf.Tensor:
    """Return the logits, float32, shape (n, num_labels), of a classifier in the current graph.

    With `is_training` there is dropout, in BERT and before the head as in `run_classifier`.
    """
    modeling = reference.load("modeling", layer_norm_eps=config.get("layer_norm_eps", 1e-12))
    bert_config = modeling.BertConfig.from_dict(config)
    bert_config.hidden_act = _ACTIVATIONS.get(config["hidden_act"], config["hidden_act"])
    model = modeling.BertModel(
        config=bert_config,
        is_training=is_training,
        input_ids=input_ids_t,
        input_mask=input_mask_t,
        token_type_ids=segment_ids_t,
        scope="bert",
    )
    pooled_t = model.get_pooled_output()
    if is_training:
        pooled_t = modeling.dropout(pooled_t, 0.1)
    initializer = modeling.create_initializer(0.02)
    weights_t = tf1.get_variable(output_weights, [num_labels, config["hidden_size"]], initializer=initializer)
    bias_t = tf1.get_variable(output_bias, [num_labels], initializer=tf1.zeros_initializer())
    return tf.nn.bias_add(tf.matmul(pooled_t, weights_t, transpose_b=True), bias_t, name="logits")


# bert-tensorflow computes "gelu" itself, in the tanh form.
_ACTIVATIONS = {
    "gelu_erf": lambda x_t: tf.nn.gelu(x_t, approximate=False),
    "gelu_new": lambda x_t: tf.nn.gelu(x_t, approximate=True),
    "gelu_pytorch_tanh": lambda x_t: tf.nn.gelu(x_t, approximate=True),
}
