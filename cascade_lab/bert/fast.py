"""The fast inference graph: bert-tensorflow's network from a checkpoint's weights, built for speed.

What makes it fast: every dense layer is one node with its bias, its activation and the residual sum; query, key and
value are one product, with 1/sqrt(head size) folded into its weights; the last layer is computed for `[CLS]` alone; and
no token of padding passes a dense layer, since the tokens of a batch stand one behind the other. Only attention, where
a batch has texts of several lengths, lays them out in rows and masks what is empty.

The fused nodes (oneDNN's) exist for x86 processors under Linux; elsewhere the same graph is made of portable nodes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue
from tensorflow.python.framework import kernels

from cascade_lab.bert.batching import rounded_up
from cascade_lab.bert.tokenization import Encoding

tf1 = tf.compat.v1

_ACTIVATIONS: dict[str, tuple[str | None, Callable[[tf.Tensor], tf.Tensor]]] = {
    "gelu": ("GeluApproximate", lambda x_t: tf.nn.gelu(x_t, approximate=True)),  # bert-tensorflow's is the tanh form
    "gelu_new": ("GeluApproximate", lambda x_t: tf.nn.gelu(x_t, approximate=True)),
    "gelu_pytorch_tanh": ("GeluApproximate", lambda x_t: tf.nn.gelu(x_t, approximate=True)),
    "gelu_erf": ("GeluExact", lambda x_t: tf.nn.gelu(x_t, approximate=False)),
    "relu": ("Relu", tf.nn.relu),
    "tanh": ("Tanh", tf.tanh),
    "linear": (None, tf.identity),
}
_MASKED = -1e9  # what bert-tensorflow's -10000 is for: no weight at all for what is not there


class Ends(NamedTuple):
    """Where one form of the graph is fed and read; see `feed`."""

    inputs: list[tf.Tensor]
    logits_t: tf.Tensor


class FastGraph(NamedTuple):
    """The graph in its two forms, which share the weights.

    Attributes
    ----------
    graph : tf.Graph
    even : Ends
        For a batch whose texts are of one length: no mask, no moving about.
    uneven : Ends
        For any batch.
    load : callable
        Takes a session of the graph and gives it the weights, once.
    """

    graph: tf.Graph
    even: Ends
    uneven: Ends
    load: Callable[[tf1.Session], None]


def has_fused_nodes() -> bool:
    """Whether this TensorFlow, on this machine, has oneDNN's fused nodes, and no GPU that would be left idle."""
    registered = kernels.get_registered_kernels_for_op("_MklNativeFusedMatMul").kernel
    return sys.platform == "linux" and len(registered) > 0 and not tf.config.list_physical_devices("GPU")


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself, and TensorFlow has the nodes for it."""
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
        `bert_config.json`.
    weights : dict of str to ndarray
        The checkpoint's variables by name. They are taken out of it one by one, so that they are not held twice.
    precision : {"float32", "bfloat16"}
        Of the dense layers and of what passes between them; embeddings, their normalisation and the head are float32,
        and so is the arithmetic inside LayerNorm and softmax.
    fused : bool
        Of oneDNN's fused nodes; otherwise of portable ones.
    """
    dtype = tf.as_dtype(precision)
    graph = tf.Graph()
    with graph.as_default():
        network = _Network(config, weights, dtype, fused, output_weights, output_bias)
        layout = [_integers("input_ids"), _integers("places"), _integers("grid", 2)]
        moves = [_integers("slots"), tf1.placeholder(tf.float32, [None, None], name="mask")]
        even = Ends(layout, network.logits(*layout))
        uneven = Ends(layout + moves, network.logits(*layout, *moves))
    return FastGraph(graph, even, uneven, network.load)


def feed(batch: Sequence[Encoding], n_segments: int) -> tuple[bool, list[np.ndarray]]:
    """Return whether the texts of a batch are of one length, and what that form of the graph is fed.

    Returns
    -------
    even : bool
    arrays : list of ndarray
        `input_ids` and `places`, shape (n_tokens,): every text's tokens, one text behind the other, and their rows in
        the table of positions and segments. `grid`, shape (n, length): the tokens of each text, as places in the
        former. For the uneven form also `slots`, shape (n_tokens,): the places of the tokens in the grid, and `mask`,
        shape (n, length): 0 for a token, very low for none; there, n_tokens and n are rounded up, and the logits have
        as many rows too many.
    """
    lengths = np.array([len(encoding.input_ids) for encoding in batch])
    longest, n_tokens = int(lengths.max()), int(lengths.sum())
    even = bool((lengths == longest).all())
    size = n_tokens if even else rounded_up(n_tokens)
    # A token too many is [PAD] at place 0 and belongs to no text.
    input_ids, places = np.zeros((2, size), dtype=np.int32)
    input_ids[:n_tokens] = np.concatenate([encoding.input_ids for encoding in batch])
    starts = np.cumsum(lengths) - lengths
    position = np.arange(n_tokens) - np.repeat(starts, lengths)
    second = position >= np.repeat([encoding.n_first for encoding in batch], lengths)
    places[:n_tokens] = position * n_segments + second
    if even:
        return True, [input_ids, places, np.arange(n_tokens, dtype=np.int32).reshape(len(batch), longest)]
    there = np.zeros((rounded_up(len(batch)), longest), dtype=bool)
    there[: len(batch)] = np.arange(longest) < lengths[:, None]
    grid = np.zeros(there.shape, dtype=np.int32)
    grid[there] = np.arange(n_tokens)
    slots = np.zeros(size, dtype=np.int32)
    slots[:n_tokens] = np.flatnonzero(there)
    return False, [input_ids, places, grid, slots, np.where(there, 0, _MASKED).astype(np.float32)]


class _Network:
    """The weights, in the current graph, and what is computed with them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, np.ndarray],
        dtype: tf.DType,
        fused: bool,
        output_weights: str,
        output_bias: str,
    ):
        self._dtype, self._fused = dtype, fused
        self._epsilon = config.get("layer_norm_eps", 1e-12)
        self._activation = config["hidden_act"]
        self._hidden, self._heads = config["hidden_size"], config["num_attention_heads"]
        self._given: list[tuple[tf.Tensor, tf.Operation, np.ndarray]] = []
        float32 = tf.float32
        embeddings = "bert/embeddings"
        self._words_t = self._hold(weights.pop(f"{embeddings}/word_embeddings"), float32)
        positions = weights.pop(f"{embeddings}/position_embeddings")
        segments = weights.pop(f"{embeddings}/token_type_embeddings")
        places = (positions[:, None] + segments).reshape(-1, self._hidden)
        self._places_t = self._hold(places, float32)
        self._norm_t = self._hold_norm(weights, embeddings, float32)
        self._layers = [self._hold_layer(weights, number) for number in range(config["num_hidden_layers"])]
        self._pooler_t = self._hold_dense(weights, "bert/pooler/dense", float32)
        head = weights.pop(output_weights).T, weights.pop(output_bias)
        self._head_t = tuple(self._hold(value, float32) for value in head)
        # Each head's own columns: 1 there, 0 elsewhere.
        own = np.kron(np.eye(self._heads), np.ones((1, self._hidden // self._heads)))
        self._own_t = tf.constant(own.astype(dtype.as_numpy_dtype))

    def load(self, session: tf1.Session) -> None:
        """Give `session` the weights, and let each go as soon as it is there."""
        while self._given:
            value_t, assign, value = self._given.pop()
            session.run(assign, {value_t: value})

    def logits(
        self,
        input_ids_t: tf.Tensor,
        places_t: tf.Tensor,
        grid_t: tf.Tensor,
        slots_t: tf.Tensor | None = None,
        mask_t: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Return the logits, float32, shape (n, num_labels), of a batch as `feed` lays it out."""
        x_t = tf.gather(self._words_t, input_ids_t) + tf.gather(self._places_t, places_t)
        x_t = tf.cast(self._norm(x_t, *self._norm_t), self._dtype)
        if mask_t is not None:
            mask_t = tf.cast(mask_t, self._dtype)[:, None, None, :]
        for layer in self._layers[:-1]:
            x_t = self._feed_forward(layer, self._attention(layer, x_t, grid_t, slots_t, mask_t), x_t)
        context_t, first_t = self._attention_of_first(self._layers[-1], x_t, grid_t, mask_t)
        x_t = tf.cast(self._feed_forward(self._layers[-1], context_t, first_t), tf.float32)
        pooled_t = self._dense(x_t, *self._pooler_t, activation="tanh")
        return self._dense(pooled_t, *self._head_t)

    def _attention(
        self,
        layer: dict[str, Any],
        x_t: tf.Tensor,
        grid_t: tf.Tensor,
        slots_t: tf.Tensor | None,
        mask_t: tf.Tensor | None,
    ) -> tf.Tensor:
        """Return what the heads gather for every token, shape (n_tokens, hidden)."""
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
        """Return what the heads gather for each text's `[CLS]`, and its own vector: shape (n, hidden) both.

        The heads stand in rows of a matrix that is 0 outside each head's columns: one product with all of a text's
        keys, and one with its values, instead of as many small ones as there are heads.
        """
        n_t, length_t = tf.unstack(tf.shape(grid_t))
        first_t = tf.gather(x_t, grid_t[:, 0])
        key_t, value_t = (self._dense(x_t, *layer[name]) for name in ("key", "value"))
        if mask_t is None:
            key_t, value_t = (tf.reshape(side_t, [n_t, length_t, self._hidden]) for side_t in (key_t, value_t))
        else:
            key_t, value_t = (tf.gather(side_t, grid_t) for side_t in (key_t, value_t))
            mask_t = mask_t[:, 0]
        query_t = self._dense(first_t, *layer["query"])[:, None, :] * self._own_t
        context_t = _attend(query_t, key_t, value_t, mask_t) * self._own_t
        return tf.reduce_sum(context_t, axis=1), first_t

    def _feed_forward(self, layer: dict[str, Any], context_t: tf.Tensor, x_t: tf.Tensor) -> tf.Tensor:
        """Return the layer's output, from what its heads gathered and its input."""
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
    ) -> tf.Tensor:
        """Return activation(x · kernel + bias), or x · kernel + bias + residual, in one node where nodes fuse."""
        name, function = _ACTIVATIONS[activation]
        if not self._fused:
            y_t = tf.nn.bias_add(tf.matmul(x_t, kernel_t), bias_t)
            return function(y_t) if residual_t is None else y_t + residual_t
        fused = ["BiasAdd", *([name] if name else []), *([] if residual_t is None else ["Add"])]
        more = [bias_t] if residual_t is None else [bias_t, residual_t]
        node = tf1.get_default_graph().create_op(
            "_MklNativeFusedMatMul",
            [x_t, kernel_t, *more],
            [x_t.dtype],
            attrs={
                "T": AttrValue(type=x_t.dtype.as_datatype_enum),
                "num_args": AttrValue(i=len(more)),
                "fused_ops": AttrValue(list=AttrValue.ListValue(s=[op.encode() for op in fused])),
                # Packed once for the tiles of bfloat16, which need it; float32 multiplies weights as they lie, so that
                # they are in memory once and no number of rows asks for another packing.
                "is_filter_const": AttrValue(b=x_t.dtype == tf.bfloat16),
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

    def _hold(self, value: np.ndarray, dtype: tf.DType | None = None) -> tf.Tensor:
        """Return a variable for a weight; a constant would be held twice, in the graph and by the session."""
        dtype = dtype or self._dtype
        value = np.ascontiguousarray(value, dtype=dtype.as_numpy_dtype)
        variable_t = tf.raw_ops.VariableV2(shape=value.shape, dtype=dtype)
        value_t = tf1.placeholder(dtype, value.shape)
        self._given.append((value_t, tf.raw_ops.Assign(ref=variable_t, value=value_t).op, value))
        return variable_t

    def _hold_dense(
        self, weights: dict[str, np.ndarray], scope: str, dtype: tf.DType | None = None
    ) -> tuple[tf.Tensor, ...]:
        return tuple(self._hold(weights.pop(f"{scope}/{part}"), dtype) for part in ("kernel", "bias"))

    def _hold_norm(
        self, weights: dict[str, np.ndarray], scope: str, dtype: tf.DType | None = None
    ) -> tuple[tf.Tensor, ...]:
        return tuple(self._hold(weights.pop(f"{scope}/LayerNorm/{part}"), dtype) for part in ("gamma", "beta"))

    def _hold_layer(self, weights: dict[str, np.ndarray], number: int) -> dict[str, tuple[tf.Tensor, ...]]:
        scope = f"bert/encoder/layer_{number}"
        projections = {}
        for name in ("query", "key", "value"):
            kernel, bias = (weights.pop(f"{scope}/attention/self/{name}/{part}") for part in ("kernel", "bias"))
            scale = 1 / math.sqrt(self._hidden // self._heads) if name == "query" else 1.0
            projections[name] = kernel * np.float32(scale), bias * np.float32(scale)
        held = {
            "attention": self._hold_dense(weights, f"{scope}/attention/output/dense"),
            "attention_norm": self._hold_norm(weights, f"{scope}/attention/output"),
            "intermediate": self._hold_dense(weights, f"{scope}/intermediate/dense"),
            "output": self._hold_dense(weights, f"{scope}/output/dense"),
            "output_norm": self._hold_norm(weights, f"{scope}/output"),
        }
        is_last = f"bert/encoder/layer_{number + 1}/output/dense/bias" not in weights
        if is_last:
            return held | {name: tuple(map(self._hold, both)) for name, both in projections.items()}
        kernels, biases = zip(*projections.values(), strict=True)
        joined = np.concatenate(kernels, axis=1), np.concatenate(biases)
        return held | {"query_key_value": tuple(map(self._hold, joined))}


def _attend(query_t: tf.Tensor, key_t: tf.Tensor, value_t: tf.Tensor, mask_t: tf.Tensor | None) -> tf.Tensor:
    """Return softmax(query · keyᵀ + mask) · value; the scale is in the query's weights."""
    scores_t = tf.matmul(query_t, key_t, transpose_b=True)
    if mask_t is not None:
        scores_t += mask_t
    return tf.matmul(tf.nn.softmax(scores_t), value_t)


def _integers(name: str, rank: int = 1) -> tf.Tensor:
    return tf1.placeholder(tf.int32, [None] * rank, name=name)
