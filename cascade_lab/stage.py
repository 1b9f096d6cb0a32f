"""One stage: one checkpoint in one `tf.Graph` and one `Session`."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.config_pb2 import CallableOptions

from cascade_lab.bert import fast, graph
from cascade_lab.bert.batching import batches, even_share
from cascade_lab.bert.checkpoint import Checkpoint, checkpoint_files, read_checkpoint
from cascade_lab.bert.tokenization import Encoding, Tokenizer
from cascade_lab.errors import CheckpointError
from cascade_lab.spec import StageSpec

tf1 = tf.compat.v1


class Batch(NamedTuple):
    """What was scored in one run of a session: `n_examples` texts, equal ones scored once, and how long it took.

    `n_tokens` are those that were computed, `sequence_length` is that of the longest text.
    """

    n_examples: int
    sequence_length: int
    n_tokens: int
    run_seconds: float


class Stage:
    """A fine-tuned BERT classifier, loaded into a graph and a session of its own.

    Use it as a context manager, or call `close`: the session holds the weights.

    Raises
    ------
    CheckpointError
        Before a session exists, if the stage's files are not usable, or its precision is not to be had here.
    """

    def __init__(self, spec: StageSpec):
        fused = fast.has_fused_nodes()
        if spec.precision == "bfloat16" and not fast.has_bfloat16():
            raise CheckpointError(
                f"stage '{spec.name}': precision bfloat16 needs a processor that multiplies it (avx512_bf16 or "
                'amx_bf16, under Linux); set precision = "float32"'
            )
        checkpoint = read_checkpoint(spec)
        self.spec = spec
        self.files = [spec.bert_config_file, spec.vocab_file, *checkpoint_files(checkpoint.prefix)]
        self.tokenizer = Tokenizer(
            spec.vocab_file, do_lower_case=spec.do_lower_case, max_seq_length=spec.max_seq_length
        )
        sizes = ("num_hidden_layers", "hidden_size", "intermediate_size")
        layers, hidden, inner = (checkpoint.config[key] for key in sizes)
        self.work = layers * hidden * (4 * hidden + 2 * inner)  # multiplications a token, attention aside
        self._is_fast = spec.engine == "fast"
        self._nodes = ("oneDNN" if fused else "portable") if self._is_fast else "bert-tensorflow"
        # A thread a processor, each with batches of its own: small products do not divide well. A GPU wants one caller.
        on_processor = self._is_fast and not tf.config.list_physical_devices("GPU")
        self.callers = _n_processors() if on_processor else 1
        self._threads = {
            "intra_op_parallelism_threads": 1 if on_processor else 0,
            "inter_op_parallelism_threads": -1 if on_processor else 0,  # -1: in the caller's own thread
        }
        self._load(checkpoint, fused)
        self.logits(self.encode([""]))  # the first run optimizes the graph: not at the first text's cost

    def _load(self, checkpoint: Checkpoint, fused: bool) -> None:
        names = {"output_weights": self.spec.output_weights, "output_bias": self.spec.output_bias}
        if self._is_fast:
            made = fast.fast_graph(
                checkpoint.config, checkpoint.weights, precision=self.spec.precision, fused=fused, **names
            )
            self._n_segments = checkpoint.config["type_vocab_size"]
        else:
            made = graph.classifier_graph(checkpoint.config, len(self.spec.labels), **names)
        self.graph = made.graph
        config = tf1.ConfigProto(**self._threads)
        config.gpu_options.allow_growth = True  # two sessions share one card
        with _own_threads():
            self.session = tf1.Session(graph=self.graph, config=config)
        if self._is_fast:
            made.load(self.session)
            self._even, self._uneven = (_callable(self.session, ends) for ends in (made.even, made.uneven))
        else:
            with self.graph.as_default():  # outside a graph, the Saver would take itself for an eager one
                made.saver.restore(self.session, checkpoint.prefix)
            self._ends = made

    @property
    def settings(self) -> dict[str, Any]:
        """What ran, for a manifest: the graph, its precision, its callers, TensorFlow's threads (0: its own choice)."""
        return {
            "engine": self.spec.engine,
            "nodes": self._nodes,
            "precision": self.spec.precision,
            "callers": self.callers,
            **self._threads,
            "devices": [device.name for device in self.session.list_devices()],
        }

    def encode(self, texts: Sequence[str], texts_b: Sequence[str | None] | None = None) -> list[Encoding]:
        """Return the token ids of each text (or pair), for `logits` and `score`."""
        return self.tokenizer.encode(texts, texts_b)

    def logits(self, batch: Sequence[Encoding]) -> np.ndarray:
        """Run one batch; float32, shape (len(batch), n_labels)."""
        if not self._is_fast:
            return self.session.run(self._ends.logits_t, graph.feed(self._ends.inputs, batch))
        even, arrays = fast.feed(batch, self._n_segments)
        (logits,) = (self._even if even else self._uneven)(*arrays)
        return logits[: len(batch)]

    def ahead(self, batch: Sequence[Encoding]) -> Future[np.ndarray]:
        """Begin `logits` of one batch in a thread of its own."""
        return _pool().submit(self.logits, batch)

    def score(
        self,
        encodings: Sequence[Encoding],
        *,
        batch_size: int | None = None,
        done: Callable[[int], object] = lambda n: None,
    ) -> tuple[np.ndarray, list[Batch]]:
        """Score any number of texts, in batches of like length, equal ones once.

        Parameters
        ----------
        encodings : sequence of Encoding
        batch_size : int, optional
            The most texts in a batch; otherwise only its tokens are bounded.
        done : callable
            Is told, batch by batch, how many texts more are scored.

        Returns
        -------
        logits : ndarray of float32, shape (len(encodings), n_labels)
        batches : list of Batch
        """
        place: dict[tuple[Any, ...], int] = {}
        which = np.array([place.setdefault((tuple(ids), n), len(place)) for ids, n in encodings], dtype=int)
        distinct = [Encoding(list(ids), n) for ids, n in place]
        lengths = np.array([len(encoding.input_ids) for encoding in distinct], dtype=int)
        times = np.bincount(which, minlength=len(distinct))
        logits = np.empty((len(distinct), len(self.spec.labels)), dtype=np.float32)

        def run(rows: np.ndarray) -> Batch:
            start = perf_counter()
            logits[rows] = self.logits([distinct[row] for row in rows])
            seconds = perf_counter() - start
            n_examples = int(times[np.unique(rows)].sum())
            return Batch(n_examples, int(lengths[rows].max()), int(lengths[rows].sum()), seconds)

        plan = batches(lengths, max_texts=batch_size, max_tokens=even_share(int(lengths.sum()), self.callers))
        ran = []
        with closing(self._each(run, plan)) as each:
            for batch in each:
                ran.append(batch)
                done(batch.n_examples)
        return logits[which], ran

    def _each(self, run: Callable[[np.ndarray], Batch], plan: list[np.ndarray]) -> Generator[Batch, None, None]:
        """Run every batch, as many side by side as there are callers; TensorFlow lets go of Python's lock."""
        if self.callers == 1 or len(plan) < 2:
            yield from map(run, plan)
            return
        futures = [_pool().submit(run, rows) for rows in plan]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # the session may be closed next

    def close(self) -> None:
        """Close the session and let its weights go."""
        self.session.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _n_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    """Return the threads that call, the same for all stages: each holds programs of its own for all shapes it ran."""
    return ThreadPoolExecutor(_n_processors(), thread_name_prefix="cascade_lab")


def _callable(session: tf1.Session, ends: fast.Ends) -> Callable[..., list[np.ndarray]]:
    """Return what runs the graph; `Session.run` itself takes 0.4 ms a call to look up what it is fed, in Python."""
    options = CallableOptions(feed=[t.name for t in ends.inputs], fetch=[ends.logits_t.name])
    return session._make_callable_from_options(options)


@contextmanager
def _own_threads() -> Iterator[None]:
    """Give a session threads of its own, so that its one thread is not all that others in this process get.

    TensorFlow reads this once, at the first session of a process; where that was somebody else's, all share its pool.
    """
    name = "TF_OVERRIDE_GLOBAL_THREADPOOL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
