"""The reference graph: bert-tensorflow's `BertModel` with `run_classifier`'s head, for inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from cascade_lab.bert import reference

tf1 = tf.compat.v1


class ClassifierGraph(NamedTuple):
    """A graph and its ends.

    `input_ids_t`, `input_mask_t` and `segment_ids_t` are int32, shape (n, length); `logits_t` is float32,
    shape (n, num_labels).
    """

    graph: tf.Graph
    input_ids_t: tf.Tensor
    input_mask_t: tf.Tensor
    segment_ids_t: tf.Tensor
    logits_t: tf.Tensor
    saver: Any


def classifier_graph(
    config: dict[str, Any], num_labels: int, *, output_weights: str, output_bias: str
) -> ClassifierGraph:
    """Build a BERT classifier in a `tf.Graph` of its own; its variables are named as in a checkpoint."""
    modeling = reference.load("modeling")
    graph = tf.Graph()
    with graph.as_default():
        inputs = [
            tf1.placeholder(tf.int32, [None, None], name=name) for name in ("input_ids", "input_mask", "segment_ids")
        ]
        model = modeling.BertModel(
            config=modeling.BertConfig.from_dict(config),
            is_training=False,
            input_ids=inputs[0],
            input_mask=inputs[1],
            token_type_ids=inputs[2],
        )
        pooled_t = model.get_pooled_output()
        weights_t = tf1.get_variable(output_weights, [num_labels, config["hidden_size"]])
        bias_t = tf1.get_variable(output_bias, [num_labels])
        logits_t = tf.nn.bias_add(tf.matmul(pooled_t, weights_t, transpose_b=True), bias_t, name="logits")
        saver = tf1.train.Saver(tf1.global_variables())
    return ClassifierGraph(graph, *inputs, logits_t, saver)
