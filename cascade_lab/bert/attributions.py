"""Computes which words of a text speak for a label: gradients of a logit with respect to the embeddings.

It uses its own graph and session, with the reference engine: the fast engine's nodes may have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from cascade_lab.bert.checkpoint import Checkpoint, read_checkpoint, stage_files
from cascade_lab.bert.graph import classifier_graph, feed, set_weights
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.bert.tokenization import Encoding, Tokenizer, full_tokenizer
from cascade_lab.exceptions import CheckpointError, SpecError, did_you_mean
from cascade_lab.spec import StageSpec
from cascade_lab.text import printable, shorten

tf1 = tf.compat.v1

Method = Literal["integrated_gradients", "gradient_x_input"]
METHODS: tuple[Method, ...] = ("integrated_gradients", "gradient_x_input")

_BATCH = 32  # points of the path in one run of the session


@dataclass(frozen=True)
class Attribution:
    """What each word of a text adds to one logit of a stage, compared with a baseline text.

    Attributes
    ----------
    words : list of str
        `[CLS]`, the words of the text as the tokenizer splits it, `[SEP]`; then those of the second text and `[SEP]`.
    scores : ndarray, shape (n_words,)
        In units of the logit. A score above 0 speaks for the target. It is the sum of the word's wordpiece scores.
    wordpieces : list of str
    wordpiece_scores : ndarray, shape (n_wordpieces,)
    target : str
        The label whose logit is explained.
    predicted : str
        The label with the highest logit.
    logit, baseline_logit : float
        The target's logit for the text and for the baseline.
    completeness_error : float
        The sum of the scores minus `logit - baseline_logit`. It is 0 if the scores explain the whole difference.
    method : str
    n_steps : int
        The number of points of the path at which a gradient was taken.
    n_unread : int
        The number of words after the stage's `max_seq_length`, which the stage does not read.
    """

    words: list[str]
    scores: np.ndarray
    wordpieces: list[str]
    wordpiece_scores: np.ndarray
    target: str
    predicted: str
    logit: float
    baseline_logit: float
    completeness_error: float
    method: str
    n_steps: int
    n_unread: int


def attribute(
    stage: StageSpec,
    texts: Sequence[str],
    texts_b: Sequence[str | None] | None = None,
    *,
    method: Method = "integrated_gradients",
    target: str | None = None,
    n_steps: int = 64,
) -> list[Attribution]:
    """Attribute a logit of `stage` to the words of each text.

    *Integrated gradients* (Sundararajan et al. 2017, equation 1) average the gradient along a straight line from a
    baseline to the text's embeddings, by Gauss-Legendre quadrature. The baseline replaces the embedding of every
    wordpiece, except `[CLS]` and `[SEP]`, by that of `[PAD]`; so `[CLS]` and `[SEP]` have the score 0. Positions and
    segments do not change. *Gradient × input* takes one gradient, at the text; its baseline is 0 for every wordpiece.

    Parameters
    ----------
    stage : StageSpec
    texts : sequence of str
    texts_b : sequence of str or None, optional
        The second texts, if the stage classifies pairs.
    method : {"integrated_gradients", "gradient_x_input"}
    target : str, optional
        The label whose logit is explained. By default a gate's pass label, and for the last stage its predicted label.
    n_steps : int
        The number of points of the quadrature. With more points the completeness error is smaller, down to the
        precision of float32.

    Returns
    -------
    list of Attribution

    Raises
    ------
    SpecError
        The method or the target is unknown, or `n_steps` is below 1.
    CheckpointError
        The stage's files are missing or not usable.
    """
    if method not in METHODS:
        raise SpecError(f"unknown attribution method '{method}'{did_you_mean(method, METHODS)}")
    target = target or stage.pass_label
    if target is not None and target not in stage.labels:
        raise SpecError(f"stage '{stage.name}' has no label '{target}'{did_you_mean(target, list(stage.labels))}")
    if n_steps < 1:
        raise SpecError(f"n_steps is {n_steps}; it must be at least 1")
    checkpoint = read_checkpoint(stage)
    vocab_file = stage_files(stage).vocab_file
    tokenizer = Tokenizer(vocab_file, do_lower_case=stage.do_lower_case, max_seq_length=stage.max_seq_length)
    word_tokenizer = full_tokenizer(vocab_file, do_lower_case=stage.do_lower_case)
    pad = checkpoint.weights["bert/embeddings/word_embeddings"][checkpoint.vocab.get("[PAD]", 0)]
    steps = n_steps if method == "integrated_gradients" else 0
    attributions = []
    with _differentiable(checkpoint, stage) as network:
        for text, text_b, encoding in zip(
            texts, texts_b or [None] * len(texts), tokenizer.encode(texts, texts_b), strict=True
        ):
            wordpieces, spans, n_unread = _split(word_tokenizer, text, text_b, encoding)
            inputs = feed(network.inputs, [encoding])
            embedded, logits = network.session.run([network.embedded_t, network.logits_t], inputs)
            if not np.isfinite(logits).all():
                shown = printable(shorten(text, 60))
                raise CheckpointError(
                    f"stage '{stage.name}': a logit of the text '{shown}' is NaN or infinite: the weights are finite, "
                    "but their products overflow; take an earlier checkpoint"
                )
            predicted = int(logits[0].argmax())
            column = predicted if target is None else stage.labels.index(target)
            x = embedded.reshape(len(wordpieces), -1)
            baseline = np.zeros_like(x)
            if steps:
                baseline = np.where(np.isin(wordpieces, ["[CLS]", "[SEP]"])[:, None], x, pad)
            function = partial(_logit_and_gradient, network, inputs, embedded.shape[1:], column)
            scores, logit, baseline_logit = attribute_path(function, x, baseline, n_steps=steps)
            attributions.append(
                Attribution(
                    words=[word for word, _ in spans],
                    scores=np.array([scores[span].sum() for _, span in spans]),
                    wordpieces=wordpieces,
                    wordpiece_scores=scores,
                    target=stage.labels[column],
                    predicted=stage.labels[predicted],
                    logit=logit,
                    baseline_logit=baseline_logit,
                    completeness_error=float(scores.sum() - (logit - baseline_logit)),
                    method=method,
                    n_steps=max(steps, 1),
                    n_unread=n_unread,
                )
            )
    return attributions


def _logit_and_gradient(
    network: _DifferentiableNetwork,
    inputs: Mapping[tf.Tensor, np.ndarray],
    shape: tuple[int, ...],
    column: int,
    points: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a logit and its gradient at the embeddings `points`, shape (n, length, hidden_size), of one text."""
    repeated: dict[tf.Tensor, Any] = {t: np.repeat(value, len(points), axis=0) for t, value in inputs.items()}
    repeated |= {network.embedded_t: points.reshape(-1, *shape), network.column_t: column}
    logits, gradient = network.session.run([network.logits_t, network.gradient_t], repeated)
    return logits[:, column].astype(np.float64), gradient.reshape(points.shape).astype(np.float64)


def attribute_path(
    value_and_gradient: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    baseline: np.ndarray,
    *,
    n_steps: int,
) -> tuple[np.ndarray, float, float]:
    """Integrate a gradient along the straight line from `baseline` to `x`.

    Parameters
    ----------
    value_and_gradient : callable
        Takes points, shape (n, length, size). Returns the values, shape (n,), and the gradients, with the shape of the
        points.
    x, baseline : ndarray, shape (length, size)
    n_steps : int
        The number of points of the quadrature; 0 takes one gradient, at `x`.

    Returns
    -------
    scores : ndarray, shape (length,)
        What each row of `x` adds to the value.
    value, baseline_value : float
        The function's values at `x` and at the baseline.

    Examples
    --------
    The scores of a linear function are its terms.

    >>> weights = np.array([[1.0, 2.0], [3.0, 4.0]])
    >>> def linear(points): return (points * weights).sum(axis=(1, 2)), np.broadcast_to(weights, points.shape)
    >>> attribute_path(linear, np.ones((2, 2)), np.zeros((2, 2)), n_steps=1)
    (array([3., 7.]), 10.0, 0.0)
    """
    at, weights = np.polynomial.legendre.leggauss(n_steps) if n_steps else (np.ones(1), np.full(1, 2.0))
    at, weights = (at + 1) / 2, weights / 2
    gradient = np.zeros(x.shape)
    for start in range(0, len(at), _BATCH):
        here = slice(start, start + _BATCH)
        points = baseline + at[here, None, None] * (x - baseline)
        gradient += np.tensordot(weights[here], value_and_gradient(points)[1], axes=1)
    values, _ = value_and_gradient(np.stack([x, baseline]))
    return ((x - baseline) * gradient).sum(axis=1), float(values[0]), float(values[1])


class _DifferentiableNetwork(NamedTuple):
    """A session, with the inputs and outputs of its graph.

    `embedded_t` are the word embeddings, shape (n, length, 1, hidden_size). `gradient_t` is the gradient of the logit
    of label `column_t` with respect to them.
    """

    session: tf.compat.v1.Session
    inputs: list[tf.Tensor]
    embedded_t: tf.Tensor
    column_t: tf.Tensor
    logits_t: tf.Tensor
    gradient_t: tf.Tensor


@contextmanager
def _differentiable(checkpoint: Checkpoint, stage: StageSpec) -> Iterator[_DifferentiableNetwork]:
    """Load a checkpoint into a session whose graph has gradients."""
    classifier = classifier_graph(
        checkpoint.config, len(stage.labels), output_weights=stage.output_weights, output_bias=stage.output_bias
    )
    with classifier.graph.as_default():
        # The word embeddings are the graph's only look-up: the segments are a matrix product, the positions a slice.
        (embedded_t,) = [op.outputs[0] for op in classifier.graph.get_operations() if op.type == "ResourceGather"]
        column_t = tf1.placeholder(tf.int32, [], name="column")
        # The logits of a text depend on no other text of the batch: the gradient of their sum is that of each logit.
        (gradient_t,) = tf.gradients(tf.reduce_sum(tf.gather(classifier.logits_t, column_t, axis=1)), [embedded_t])
        config = tf1.ConfigProto()
        config.gpu_options.allow_growth = True
        with tf1.Session(graph=classifier.graph, config=config) as session:
            set_weights(session, checkpoint.weights)
            yield _DifferentiableNetwork(
                session, classifier.inputs, embedded_t, column_t, classifier.logits_t, gradient_t
            )


def _split(
    tokenizer: Any, text: str, text_b: str | None, encoding: Encoding
) -> tuple[list[str], list[tuple[str, slice]], int]:
    """Return the wordpieces, each word with the slice of its wordpieces, and the number of words that are not read."""
    wordpieces: list[str] = tokenizer.convert_ids_to_tokens(encoding.input_ids)
    spans, n_unread = [("[CLS]", slice(0, 1))], 0
    stops = [encoding.n_first - 1] if text_b is None else [encoding.n_first - 1, len(wordpieces) - 1]
    start = 1
    for segment, end in zip((text, text_b), stops, strict=False):
        for word in tokenizer.basic_tokenizer.tokenize(segment):
            if start >= end:
                n_unread += 1
                continue
            stop = min(start + len(tokenizer.wordpiece_tokenizer.tokenize(word)), end)
            spans.append((word, slice(start, stop)))
            start = stop
        spans.append(("[SEP]", slice(end, end + 1)))
        start = end + 1
    return wordpieces, spans, n_unread
