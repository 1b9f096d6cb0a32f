"""Which words a stage's answer rests on: gradients of a logit with regard to the wordpieces' embeddings.

A graph and a session of its own, the reference one: what runs in a cascade may have no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow as tf

from cascade_lab.bert import reference
from cascade_lab.bert.checkpoint import Checkpoint, read_checkpoint
from cascade_lab.bert.graph import classifier_graph, feed
from cascade_lab.bert.tokenization import Encoding, Tokenizer
from cascade_lab.errors import SpecError, did_you_mean
from cascade_lab.spec import StageSpec

tf1 = tf.compat.v1

Method = Literal["integrated_gradients", "gradient_x_input"]
METHODS: tuple[Method, ...] = ("integrated_gradients", "gradient_x_input")

_BATCH = 32  # points of a path in one run of the session


@dataclass(frozen=True)
class Attribution:
    """What each part of a text adds to one logit of a stage, over what a baseline gives.

    Attributes
    ----------
    words : list of str
        `[CLS]`, the text's words as the tokenizer makes them, `[SEP]`, and those of the second text and `[SEP]`.
    scores : ndarray, shape (n_words,)
        In units of the logit; above 0 speaks for the target.
    wordpieces : list of str
    wordpiece_scores : ndarray, shape (n_wordpieces,)
        A word's score is the sum of its wordpieces'.
    target : str
        The label whose logit it is.
    answer : str
        The label with the highest logit.
    logit, baseline_logit : float
        The target's, for the text and for the baseline.
    completeness_error : float
        The sum of the scores less `logit - baseline_logit`: 0 where nothing is left unexplained.
    method : str
    n_steps : int
        Points of the path at which gradients were taken.
    n_unread : int
        Words beyond the stage's `max_seq_length`, which it does not see.
    """

    words: list[str]
    scores: np.ndarray
    wordpieces: list[str]
    wordpiece_scores: np.ndarray
    target: str
    answer: str
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

    *Integrated gradients* (Sundararajan et al. 2017) go from a baseline to the text in a straight line of embeddings,
    by Gauss-Legendre quadrature. The baseline has `[PAD]`'s embedding for every wordpiece but `[CLS]` and `[SEP]`,
    whose scores are 0 for that; positions and segments stay. *Gradient × input* takes one gradient, at the text; its
    baseline is an embedding of zeros for every wordpiece.

    Parameters
    ----------
    stage : StageSpec
    texts : sequence of str
    texts_b : sequence of str or None, optional
        Second texts, where the stage takes pairs.
    method : {"integrated_gradients", "gradient_x_input"}
    target : str, optional
        The label whose logit is attributed; by default a gate's pass label, and the last stage's answer.
    n_steps : int
        Points of the quadrature; more make the completeness error smaller, until float32 sets the limit.

    Returns
    -------
    list of Attribution

    Raises
    ------
    SpecError
        An unknown method or target, or no steps.
    CheckpointError
        The stage's files are not usable.
    """
    if method not in METHODS:
        raise SpecError(f"no method is named '{method}'{did_you_mean(method, list(METHODS))}")
    target = target or stage.pass_label
    if target is not None and target not in stage.labels:
        raise SpecError(f"stage '{stage.name}' has no label '{target}'{did_you_mean(target, list(stage.labels))}")
    if n_steps < 1:
        raise SpecError(f"n_steps is {n_steps}; a gradient is taken at one point at least")
    checkpoint = read_checkpoint(stage)
    tokenizer = Tokenizer(stage.vocab_file, do_lower_case=stage.do_lower_case, max_seq_length=stage.max_seq_length)
    words = reference.load("tokenization").FullTokenizer(str(stage.vocab_file), stage.do_lower_case)
    pad = checkpoint.weights["bert/embeddings/word_embeddings"][checkpoint.vocab.get("[PAD]", 0)]
    steps = n_steps if method == "integrated_gradients" else 0
    made = []
    with _differentiable(checkpoint, stage) as ends:
        for text, text_b, encoding in zip(
            texts, texts_b or [None] * len(texts), tokenizer.encode(texts, texts_b), strict=True
        ):
            pieces, spans, n_unread = _cut(words, text, text_b, encoding)
            inputs = feed(ends.inputs, [encoding])
            embedded, logits = ends.session.run([ends.embedded_t, ends.logits_t], inputs)
            answer = int(logits[0].argmax())
            column = answer if target is None else stage.labels.index(target)
            x = embedded.reshape(len(pieces), -1)
            baseline = np.where(np.isin(pieces, ["[CLS]", "[SEP]"])[:, None], x, pad) if steps else np.zeros_like(x)
            function = partial(_logit_and_gradient, ends, inputs, embedded.shape[1:], column)
            scores, logit, baseline_logit = attribute_path(function, x, baseline, n_steps=steps)
            made.append(
                Attribution(
                    words=[word for word, _ in spans],
                    scores=np.array([scores[span].sum() for _, span in spans]),
                    wordpieces=pieces,
                    wordpiece_scores=scores,
                    target=stage.labels[column],
                    answer=stage.labels[answer],
                    logit=logit,
                    baseline_logit=baseline_logit,
                    completeness_error=float(scores.sum() - (logit - baseline_logit)),
                    method=method,
                    n_steps=max(steps, 1),
                    n_unread=n_unread,
                )
            )
    return made


def _logit_and_gradient(
    ends: _Ends, inputs: Mapping[tf.Tensor, np.ndarray], shape: tuple[int, ...], column: int, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return a logit and its gradient at embeddings `points`, shape (n, length, hidden_size), of one text."""
    many = {t: np.repeat(value, len(points), axis=0) for t, value in inputs.items()}
    many |= {ends.embedded_t: points.reshape(-1, *shape), ends.column_t: column}
    logits, gradient = ends.session.run([ends.logits_t, ends.gradient_t], many)
    return logits[:, column].astype(np.float64), gradient.reshape(points.shape).astype(np.float64)


def attribute_path(
    value_and_gradient: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    x: np.ndarray,
    baseline: np.ndarray,
    *,
    n_steps: int,
) -> tuple[np.ndarray, float, float]:
    """Return the scores of the rows of `x`, and the function's value there and at the baseline.

    Parameters
    ----------
    value_and_gradient : callable
        Takes points, shape (n, length, size); returns values, shape (n,), and gradients, shaped as the points.
    x, baseline : ndarray, shape (length, size)
    n_steps : int
        Points of the quadrature; 0 takes the gradient at `x` alone.

    Examples
    --------
    Of a linear function every path gives its terms.

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


class _Ends(NamedTuple):
    """A session, and the ends of its graph; `embedded_t` looks embeddings up, shape (n, length, 1, hidden_size)."""

    session: tf1.Session
    inputs: list[tf.Tensor]
    embedded_t: tf.Tensor
    column_t: tf.Tensor
    logits_t: tf.Tensor
    gradient_t: tf.Tensor


@contextmanager
def _differentiable(checkpoint: Checkpoint, stage: StageSpec) -> Iterator[_Ends]:
    """Load a checkpoint into a graph that has gradients, and a session."""
    built = classifier_graph(
        checkpoint.config, len(stage.labels), output_weights=stage.output_weights, output_bias=stage.output_bias
    )
    with built.graph.as_default():
        # The one look-up of the graph: segments are a product, positions a slice.
        (embedded_t,) = [op.outputs[0] for op in built.graph.get_operations() if op.type == "ResourceGather"]
        column_t = tf1.placeholder(tf.int32, [], name="column")
        # Texts of a batch do not touch each other, so the sum's gradient has each one's own.
        (gradient_t,) = tf.gradients(tf.reduce_sum(tf.gather(built.logits_t, column_t, axis=1)), [embedded_t])
        config = tf1.ConfigProto()
        config.gpu_options.allow_growth = True
        with tf1.Session(graph=built.graph, config=config) as session:
            built.saver.restore(session, checkpoint.prefix)
            yield _Ends(session, built.inputs, embedded_t, column_t, built.logits_t, gradient_t)


def _cut(
    tokenizer: Any, text: str, text_b: str | None, encoding: Encoding
) -> tuple[list[str], list[tuple[str, slice]], int]:
    """Return the wordpieces, each word with the slice of them that it is, and how many words are not read."""
    pieces = tokenizer.convert_ids_to_tokens(encoding.input_ids)
    spans, n_unread = [("[CLS]", slice(0, 1))], 0
    ends = [encoding.n_first - 1] if text_b is None else [encoding.n_first - 1, len(pieces) - 1]
    start = 1
    for segment, end in zip((text, text_b), ends, strict=False):
        for word in tokenizer.basic_tokenizer.tokenize(segment):
            if start >= end:
                n_unread += 1
                continue
            stop = min(start + len(tokenizer.wordpiece_tokenizer.tokenize(word)), end)
            spans.append((word, slice(start, stop)))
            start = stop
        spans.append(("[SEP]", slice(end, end + 1)))
        start = end + 1
    return pieces, spans, n_unread
