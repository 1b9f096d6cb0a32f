"""Builds the fast inference graph: the network of bert-tensorflow, with the weights of a checkpoint, made for speed.

Why it is fast:

- A dense layer, its bias, its activation and the residual sum are one node.
- Query, key and value are one matrix product. Their factor 1/sqrt(head size) is multiplied into the weights once.
- The last layer is computed for `[CLS]` only, since nothing else of it is read.
- Dense layers never compute padding: the tokens of all texts of a batch are concatenated. Only attention pads the texts
  of a batch to one length, and only where their lengths differ; a mask then hides the padding.
- The time of a batch of few tokens is the time to read the weights from memory. In float32, the graph has a separate
  form for such batches, which reads packed weights: each block of columns is contiguous.

The fused nodes are oneDNN's and exist only for x86 processors under Linux. Elsewhere the same graph is built from
TensorFlow's portable nodes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cascade_lab.bert.fast_inputs import SMALL_MIN_TOKENS
from cascade_lab.bert.quiet_tensorflow import AttrValue, kernels, tf

tf1 = tf.compat.v1

_ACTIVATIONS: dict[str, tuple[str | None, Callable[[tf.Tensor], tf.Tensor]]] = {
    "gelu": ("GeluApproximate", lambda x_t: tf.nn.gelu(x_t, approximate=True)),  # as in bert-tensorflow: the tanh form
    "gelu_new": ("GeluApproximate", lambda x_t: tf.nn.gelu(x_t, approximate=True)),
    "gelu_pytorch_tanh": ("GeluApproximate", lambda x_t: tf.nn.gelu(x_t, approximate=True)),
    "gelu_erf": ("GeluExact", lambda x_t: tf.nn.gelu(x_t, approximate=False)),
    "relu": ("Relu", tf.nn.relu),
    "tanh": ("Tanh", tf.tanh),
    "linear": (None, tf.identity),
}
LOAD_BYTES = 32 * 2**20  # of the weights that one run of the session sets


class Endpoints(NamedTuple):
    """The inputs and the outputs of one form of the graph. `fast_inputs.feed` makes the arrays for the inputs.

    `features_t` is the last layer's output at `[CLS]`: float32, shape (n, hidden).
    """

    inputs: list[tf.Tensor]
    logits_t: tf.Tensor
    features_t: tf.Tensor


class FastGraph(NamedTuple):
    """One graph with two or three forms of the network, which share the weights.

    Attributes
    ----------
    graph : tf.Graph
    uniform : Endpoints
        For a batch whose texts have one length: it needs no padding and no mask.
    ragged : Endpoints
        For any batch.
    small : Endpoints or None
        In float32 with fused nodes: for a batch of few tokens. It makes a second, packed copy of the weights when it
        runs first.
    load : callable
        Takes a session of the graph and sets the weights. Call it once.
    """

    graph: tf.Graph
    uniform: Endpoints
    ragged: Endpoints
    small: Endpoints | None
    load: Callable[[tf.compat.v1.Session], None]


def has_fused_nodes() -> bool:
    """Return whether this TensorFlow has oneDNN's fused nodes and the machine has no GPU, which they would not use."""
    registered = kernels.get_registered_kernels_for_op("_MklNativeFusedMatMul").kernel
    return sys.platform == "linux" and len(registered) > 0 and not tf.config.list_physical_devices("GPU")


def has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions and TensorFlow has nodes that use them."""
    if not has_fused_nodes():
        return False
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def fast_graph(
    config: Mapping[str, Any],
    weights: dict[str, np.ndarray],
    *,
    precision: str = "float32",
    fused: bool = True,
    output_weights: str = "output_weights",
    output_bias: str = "output_bias",
) -> FastGraph:
    """Build the graph of a BERT classifier.

    Parameters
    ----------
    config : mapping
        The content of `bert_config.json`.
    weights : dict of str to ndarray
        The checkpoint's variables by name. The dict is emptied, so that no weight is in memory twice.
    precision : {"float32", "bfloat16"}
        The type of the dense layers and of the activations between them. Always float32: the embeddings and their
        normalisation, the head, and the arithmetic inside LayerNorm and softmax.
    fused : bool
        Use oneDNN's fused nodes instead of portable ones.
    output_weights, output_bias : str
        The names of the head's variables.
    """
    dtype = tf.as_dtype(precision)
    graph = tf.Graph()
    with graph.as_default():
        network = _Network(config, weights, dtype, fused, output_weights, output_bias)
        uniform_inputs = [_integers("input_ids"), _integers("position_rows"), _integers("grid", 2)]
        ragged_inputs = [*uniform_inputs, _integers("slots"), tf1.placeholder(tf.float32, [None, None], name="mask")]
        uniform = Endpoints(uniform_inputs, *network.outputs(*uniform_inputs))
        ragged = Endpoints(ragged_inputs, *network.outputs(*ragged_inputs))
        has_small = fused and dtype == tf.float32
        small = Endpoints(ragged_inputs, *network.outputs(*ragged_inputs, small=True)) if has_small else None
    return FastGraph(graph, uniform, ragged, small, network.load)


class _Network:
    """The variables of the network in the current graph, and the computation of the logits."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, np.ndarray],
        dtype: tf.DType,
        fused: bool,
        output_weights: str,
        output_bias: str,
    ):
        self._dtype, self._fused, self._small = dtype, fused, False
        self._epsilon = config.get("layer_norm_eps", 1e-12)
        self._activation = config["hidden_act"]
        self._hidden, self._heads = config["hidden_size"], config["num_attention_heads"]
        self._unassigned: list[tuple[tf.Tensor, tf.Operation, np.ndarray]] = []
        float32 = tf.float32
        embeddings = "bert/embeddings"
        self._word_embeddings_t = self._variable(weights.pop(f"{embeddings}/word_embeddings"), float32)
        positions = weights.pop(f"{embeddings}/position_embeddings")
        segments = weights.pop(f"{embeddings}/token_type_embeddings")
        # A token's position and segment embeddings are added once here: one look-up per token instead of two.
        position_table = (positions[:, None] + segments).reshape(-1, self._hidden)
        self._position_table_t = self._variable(position_table, float32)
        self._norm_t = self._norm_variables(weights, embeddings, float32)
        self._layers = [self._layer_variables(weights, number) for number in range(config["num_hidden_layers"])]
        self._pooler_t = self._dense_variables(weights, "bert/pooler/dense", float32)
        head = weights.pop(output_weights).T, weights.pop(output_bias)
        self._head_t = tuple(self._variable(value, float32) for value in head)
        # One row per head: 1 in that head's columns, 0 elsewhere.
        head_columns = np.kron(np.eye(self._heads), np.ones((1, self._hidden // self._heads)))
        self._head_columns_t = tf.constant(head_columns.astype(dtype.as_numpy_dtype))

    def load(self, session: tf.compat.v1.Session) -> None:
        """Set the variables in `session`, some at a time. Each weight is freed here as soon as the session has it.

        TensorFlow prepares each new set of operations that it runs, which takes 8 ms for one weight or for many.
        """
        while self._unassigned:
            assigns, values, n_bytes = [], {}, 0
            while self._unassigned and n_bytes < LOAD_BYTES:
                value_t, assign, value = self._unassigned.pop()
                assigns.append(assign)
                values[value_t] = value
                n_bytes += value.nbytes
            session.run(assigns, values)

    def outputs(
        self,
        input_ids_t: tf.Tensor,
        position_rows_t: tf.Tensor,
        grid_t: tf.Tensor,
        slots_t: tf.Tensor | None = None,
        mask_t: tf.Tensor | None = None,
        *,
        small: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the logits, shape (n, n_labels), and the features of a batch in the form that `feed` returns."""
        self._small = small
        x_t = tf.gather(self._word_embeddings_t, input_ids_t) + tf.gather(self._position_table_t, position_rows_t)
        x_t = tf.cast(self._norm(x_t, *self._norm_t), self._dtype)
        if mask_t is not None:
            mask_t = tf.cast(mask_t, self._dtype)[:, None, None, :]
        for layer in self._layers[:-1]:
            x_t = self._feed_forward(layer, self._attention(layer, x_t, grid_t, slots_t, mask_t), x_t)
        context_t, first_t = self._attention_of_first(self._layers[-1], x_t, grid_t, mask_t)
        if small:  # rows of 0 after those of the texts: packed weights need `SMALL_MIN_TOKENS` rows
            empty_t = tf.zeros([SMALL_MIN_TOKENS, self._hidden])
            context_t, first_t = (tf.concat([rows_t, empty_t], axis=0) for rows_t in (context_t, first_t))
        x_t = tf.cast(self._feed_forward(self._layers[-1], context_t, first_t), tf.float32)
        pooled_t = self._dense(x_t, *self._pooler_t, activation="tanh")
        return self._dense(pooled_t, *self._head_t), x_t

    def _attention(
        self,
        layer: dict[str, Any],
        x_t: tf.Tensor,
        grid_t: tf.Tensor,
        slots_t: tf.Tensor | None,
        mask_t: tf.Tensor | None,
    ) -> tf.Tensor:
        """Return the output of self-attention (before its dense layer) for every token, shape (n_tokens, hidden)."""
        n_t, length_t = tf.unstack(tf.shape(grid_t))
        qkv_t = self._dense(x_t, *layer["query_key_value"])
        if slots_t is not None:
            qkv_t = tf.gather(qkv_t, grid_t)
        qkv_t = tf.reshape(qkv_t, [n_t, length_t, 3, self._heads, self._hidden // self._heads])
        query_t, key_t, value_t = tf.unstack(tf.transpose(qkv_t, [2, 0, 3, 1, 4]))
        context_t = _attend(query_t, key_t, value_t, mask_t)
        context_t = tf.reshape(tf.transpose(context_t, [0, 2, 1, 3]), [-1, self._hidden])
        return context_t if slots_t is None else tf.gather(context_t, slots_t)

    def _attention_of_first(
        self, layer: dict[str, Any], x_t: tf.Tensor, grid_t: tf.Tensor, mask_t: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the output of self-attention for each text's `[CLS]`, and the input there: both of shape (n, hidden).

        The queries of all heads are the rows of one matrix, which is 0 outside each head's own columns. So one product
        with a text's keys, and one with its values, replace one small product per head.
        """
        n_t, length_t = tf.unstack(tf.shape(grid_t))
        first_t = tf.gather(x_t, grid_t[:, 0])
        key_t, value_t = (self._dense(x_t, *layer[name]) for name in ("key", "value"))
        if mask_t is None:
            key_t, value_t = (tf.reshape(side_t, [n_t, length_t, self._hidden]) for side_t in (key_t, value_t))
        else:
            key_t, value_t = (tf.gather(side_t, grid_t) for side_t in (key_t, value_t))
            mask_t = mask_t[:, 0]
        query_t = self._dense(first_t, *layer["query"], packed=False)[:, None, :] * self._head_columns_t
        context_t = _attend(query_t, key_t, value_t, mask_t) * self._head_columns_t
        return tf.reduce_sum(context_t, axis=1), first_t

    def _feed_forward(self, layer: dict[str, Any], context_t: tf.Tensor, x_t: tf.Tensor) -> tf.Tensor:
        """Return the layer's output, from the output of its self-attention and its input."""
        x_t = self._norm(self._dense(context_t, *layer["attention"], residual_t=x_t), *layer["attention_norm"])
        inner_t = self._dense(x_t, *layer["intermediate"], activation=self._activation)
        return self._norm(self._dense(inner_t, *layer["output"], residual_t=x_t), *layer["output_norm"])

    def _dense(
        self,
        x_t: tf.Tensor,
        kernel_t: tf.Tensor,
        bias_t: tf.Tensor,
        *,
        activation: str = "linear",
        residual_t: tf.Tensor | None = None,
        packed: bool = True,
    ) -> tf.Tensor:
        """Return activation(x · kernel + bias), or x · kernel + bias + residual; one node if nodes are fused.

        `packed` allows packed weights in the form for few tokens: `x` then has at least `SMALL_MIN_TOKENS` rows.
        """
        name, function = _ACTIVATIONS[activation]
        if not self._fused:
            y_t = tf.nn.bias_add(tf.matmul(x_t, kernel_t), bias_t)
            return function(y_t) if residual_t is None else y_t + residual_t
        fused = ["BiasAdd", *([name] if name else []), *([] if residual_t is None else ["Add"])]
        addends = [bias_t] if residual_t is None else [bias_t, residual_t]
        node = tf1.get_default_graph().create_op(
            "_MklNativeFusedMatMul",
            [x_t, kernel_t, *addends],
            [x_t.dtype],
            attrs={
                "T": AttrValue(type=x_t.dtype.as_datatype_enum),
                "num_args": AttrValue(i=len(addends)),
                "fused_ops": AttrValue(list=AttrValue.ListValue(s=[op.encode() for op in fused])),
                # TensorFlow packs the weights once, for the number of rows that comes first. bfloat16 has one layout.
                # float32 has several: with other rows, every call would pack the weights again.
                "is_filter_const": AttrValue(b=x_t.dtype == tf.bfloat16 or (self._small and packed)),
                "_kernel": AttrValue(s=b"MklNameChangeOp"),
            },
            name="dense",
        )
        (y_t,) = node.outputs
        y_t.set_shape([None, kernel_t.shape[1]])
        return y_t

    def _norm(self, x_t: tf.Tensor, gamma_t: tf.Tensor, beta_t: tf.Tensor) -> tf.Tensor:
        """Return LayerNorm over the last axis of a matrix."""
        if not self._fused:
            mean_t, variance_t = tf.nn.moments(x_t, axes=[-1], keepdims=True)
            return tf.nn.batch_normalization(x_t, mean_t, variance_t, beta_t, gamma_t, self._epsilon)
        node = tf1.get_default_graph().create_op(
            "_MklLayerNorm",
            [x_t, gamma_t, beta_t],
            [x_t.dtype],
            attrs={"T": AttrValue(type=x_t.dtype.as_datatype_enum), "epsilon": AttrValue(f=self._epsilon)},
            name="layer_norm",
        )
        (y_t,) = node.outputs
        y_t.set_shape(x_t.shape)
        return y_t

    def _variable(self, value: np.ndarray, dtype: tf.DType | None = None) -> tf.Tensor:
        """Return a variable for a weight. A constant would be in memory twice: in the graph and in the session."""
        dtype = dtype or self._dtype
        value = np.ascontiguousarray(value, dtype=dtype.as_numpy_dtype)
        variable_t = tf.raw_ops.VariableV2(shape=value.shape, dtype=dtype)
        value_t = tf1.placeholder(dtype, value.shape)
        self._unassigned.append((value_t, tf.raw_ops.Assign(ref=variable_t, value=value_t).op, value))
        return variable_t

    def _dense_variables(
        self, weights: dict[str, np.ndarray], scope: str, dtype: tf.DType | None = None
    ) -> tuple[tf.Tensor, ...]:
        return tuple(self._variable(weights.pop(f"{scope}/{part}"), dtype) for part in ("kernel", "bias"))

    def _norm_variables(
        self, weights: dict[str, np.ndarray], scope: str, dtype: tf.DType | None = None
    ) -> tuple[tf.Tensor, ...]:
        return tuple(self._variable(weights.pop(f"{scope}/LayerNorm/{part}"), dtype) for part in ("gamma", "beta"))

    def _layer_variables(self, weights: dict[str, np.ndarray], number: int) -> dict[str, tuple[tf.Tensor, ...]]:
        scope = f"bert/encoder/layer_{number}"
        projections = {}
        for name in ("query", "key", "value"):
            kernel, bias = (weights.pop(f"{scope}/attention/self/{name}/{part}") for part in ("kernel", "bias"))
            scale = 1 / math.sqrt(self._hidden // self._heads) if name == "query" else 1.0
            projections[name] = kernel * np.float32(scale), bias * np.float32(scale)
        layer = {
            "attention": self._dense_variables(weights, f"{scope}/attention/output/dense"),
            "attention_norm": self._norm_variables(weights, f"{scope}/attention/output"),
            "intermediate": self._dense_variables(weights, f"{scope}/intermediate/dense"),
            "output": self._dense_variables(weights, f"{scope}/output/dense"),
            "output_norm": self._norm_variables(weights, f"{scope}/output"),
        }
        is_last = f"bert/encoder/layer_{number + 1}/output/dense/bias" not in weights
        if is_last:
            return layer | {name: tuple(map(self._variable, pair)) for name, pair in projections.items()}
        kernels, biases = zip(*projections.values(), strict=True)
        joined = np.concatenate(kernels, axis=1), np.concatenate(biases)
        return layer | {"query_key_value": tuple(map(self._variable, joined))}


def _attend(query_t: tf.Tensor, key_t: tf.Tensor, value_t: tf.Tensor, mask_t: tf.Tensor | None) -> tf.Tensor:
    """Return softmax(query · keyᵀ + mask) · value. The query's weights already contain the scale."""
    scores_t = tf.matmul(query_t, key_t, transpose_b=True)
    if mask_t is not None:
        scores_t += mask_t
    return tf.matmul(tf.nn.softmax(scores_t), value_t)


def _integers(name: str, rank: int = 1) -> tf.Tensor:
    return tf1.placeholder(tf.int32, [None] * rank, name=name)
