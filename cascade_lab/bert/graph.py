"""Builds the reference graph, for inference and training: bert-tensorflow's `BertModel` with a classifier's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cascade_lab.bert import reference
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.bert.tokenization import Encoding

tf1 = tf.compat.v1


class ClassifierGraph(NamedTuple):
    """A graph with its inputs and its output.

    Attributes
    ----------
    graph : tf.Graph
    inputs : list of tf.Tensor
        The placeholders `input_ids`, `input_mask` and `segment_ids`: int32, shape (n, length).
    logits_t : tf.Tensor
        float32, shape (n, num_labels).
    features_t : tf.Tensor
        The last layer's output at `[CLS]`: float32, shape (n, hidden).
    saver : tf.train.Saver
        Restores all variables of the graph from a checkpoint.
    """

    graph: tf.Graph
    inputs: list[tf.Tensor]
    logits_t: tf.Tensor
    features_t: tf.Tensor
    saver: Any


def classifier_graph(
    config: dict[str, Any], num_labels: int, *, output_weights: str, output_bias: str
) -> ClassifierGraph:
    """Build a BERT classifier in a new `tf.Graph`. Its variables have the names that they have in a checkpoint."""
    graph = tf.Graph()
    with graph.as_default():
        inputs = placeholders()
        logits_t = classifier_logits(
            config, num_labels, *inputs, output_weights=output_weights, output_bias=output_bias
        )
        saver = tf1.train.Saver(tf1.global_variables())
    features_t = graph.get_tensor_by_name("bert/pooler/Squeeze:0")  # what bert-tensorflow's pooler reads
    return ClassifierGraph(graph, inputs, logits_t, features_t, saver)


def set_weights(session: Any, weights: Mapping[str, np.ndarray]) -> None:
    """Set variables of the session's graph to values that are checked already; the graph does not change.

    A Saver would read the file again: not under other names, with other types, or where a path contains `[`.
    """
    with session.graph.as_default():
        variables = {variable.op.name: variable for variable in tf1.global_variables()}
    initializers = [variables[name].initializer for name in weights]
    values = (initializer.inputs[1] for initializer in initializers)
    session.run(initializers, dict(zip(values, weights.values(), strict=True)))


def placeholders() -> list[tf.Tensor]:
    """Return `input_ids`, `input_mask` and `segment_ids` in the current graph: int32, shape (n, length)."""
    return [tf1.placeholder(tf.int32, [None, None], name=name) for name in ("input_ids", "input_mask", "segment_ids")]


def feed(inputs: Sequence[tf.Tensor], batch: Sequence[Encoding]) -> dict[tf.Tensor, np.ndarray]:
    """Return the feed of `session.run` for a batch: ids, mask and segments, padded to the batch's longest text."""
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
    """Build a classifier in the current graph and return its logits, float32, shape (n, num_labels).

    With `is_training` there is dropout inside BERT and before the head, as in `run_classifier`.
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


# The activations that bert-tensorflow lacks. Its own "gelu" is the tanh form.
_ACTIVATIONS = {
    "gelu_erf": lambda x_t: tf.nn.gelu(x_t, approximate=False),
    "gelu_new": lambda x_t: tf.nn.gelu(x_t, approximate=True),
    "gelu_pytorch_tanh": lambda x_t: tf.nn.gelu(x_t, approximate=True),
}


class TrainingGraph(NamedTuple):
    """A graph that trains a classifier, with its inputs and outputs.

    Attributes
    ----------
    graph : tf.Graph
    inputs : list of tf.Tensor
        As in `ClassifierGraph`.
    labels_t, learning_rate_t, dropout_seed_t : tf.Tensor
        Further inputs: int32 of shape (n,), float32 of shape (), int32 of shape (2,).
    loss_t : tf.Tensor
        The mean cross entropy of a batch, with dropout.
    train_op : tf.Operation
        Does one step.
    logits_t : tf.Tensor
        The logits without dropout.
    finite_t : tf.Tensor
        Whether every weight is finite.
    weights : list
        The trainable variables.
    """

    graph: tf.Graph
    inputs: list[tf.Tensor]
    labels_t: tf.Tensor
    learning_rate_t: tf.Tensor
    dropout_seed_t: tf.Tensor
    loss_t: tf.Tensor
    train_op: tf.Operation
    logits_t: tf.Tensor
    finite_t: tf.Tensor
    weights: list[Any]


def training_graph(config: dict[str, Any], n_labels: int, seed: int) -> TrainingGraph:
    """Build a graph that computes the logits twice from the same weights: with dropout to train, without to score."""
    graph = tf.Graph()
    with graph.as_default():
        tf1.set_random_seed(seed)
        inputs = placeholders()
        labels_t = tf1.placeholder(tf.int32, [None], name="labels")
        # The learning rate and the seed of the dropout masks are fed. A step counter in the graph would be read and
        # updated at the same time, and a resumed training would get other masks than an uninterrupted one.
        learning_rate_t = tf1.placeholder(tf.float32, [], name="learning_rate")
        dropout_seed_t = tf1.placeholder(tf.int32, [2], name="dropout_seed")
        graph.add_to_collection(reference.DROPOUT_SEED, dropout_seed_t)
        with tf1.variable_scope(tf1.get_variable_scope(), use_resource=True):
            dropped_t = classifier_logits(config, n_labels, *inputs, is_training=True)
        with tf1.variable_scope(tf1.get_variable_scope(), reuse=True, use_resource=True):
            logits_t = classifier_logits(config, n_labels, *inputs)
        loss_t = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels_t, logits=dropped_t))
        weights = tf1.trainable_variables()
        gradients, _ = tf.clip_by_global_norm(tf.gradients(loss_t, weights), clip_norm=1.0)
        train_op = tf.group(*map(partial(_adam_step, learning_rate_t), weights, gradients))
        finite_t = tf.reduce_all([tf.reduce_all(tf.math.is_finite(weight)) for weight in weights])
    return TrainingGraph(
        graph, inputs, labels_t, learning_rate_t, dropout_seed_t, loss_t, train_op, logits_t, finite_t, weights
    )


def _adam_step(learning_rate_t: tf.Tensor, weight: Any, gradient: Any) -> tf.Operation:
    """Change a weight as bert-tensorflow's `AdamWeightDecayOptimizer` does, with TensorFlow's fused kernel for Adam.

    Adam without bias correction, epsilon 1e-6, weight decay 0.01 except for LayerNorm and biases. The kernel reads and
    writes each weight once; bert-tensorflow's own operations do so about twelve times, half of the time of a step.
    """
    name = weight.name.partition(":")[0]
    slots = {"shape": weight.shape, "dtype": tf.float32, "trainable": False, "use_resource": True}
    m, v = (
        tf1.get_variable(f"{name}/adam_{slot}", initializer=tf1.zeros_initializer(), **slots) for slot in ("m", "v")
    )
    is_decayed = not any(part in name for part in ("LayerNorm", "layer_norm", "bias"))
    gradient_t = tf.convert_to_tensor(gradient)
    with tf.control_dependencies([gradient_t]):  # all gradients are computed before a weight changes
        decay = [weight.assign(weight * (1 - 0.01 * learning_rate_t))] if is_decayed else []
    with tf.control_dependencies(decay):
        return tf.raw_ops.ResourceApplyAdam(
            var=weight.handle,
            m=m.handle,
            v=v.handle,
            beta1_power=0.0,
            beta2_power=0.0,
            lr=learning_rate_t,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-6,
            grad=gradient_t,
        )
