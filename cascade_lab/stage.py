"""Loads one stage of a cascade: one checkpoint in its own `tf.Graph` and its own `Session`."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from cascade_lab.bert import fast, graph
from cascade_lab.bert.batching import make_batches, tokens_per_batch
from cascade_lab.bert.checkpoint import (
    Checkpoint,
    checkpoint_files,
    n_multiplications_per_token,
    read_checkpoint,
    stage_files,
)
from cascade_lab.bert.fast_inputs import feed
from cascade_lab.bert.quiet_tensorflow import CallableOptions, tf
from cascade_lab.bert.tokenization import Encoding, Tokenizer
from cascade_lab.by_block import n_cores
from cascade_lab.exceptions import CheckpointError
from cascade_lab.spec import StageSpec
from cascade_lab.stage_output import StageOutput
from cascade_lab.text import shorten

tf1 = tf.compat.v1


class Batch(NamedTuple):
    """What one run of a session scored, and how long it took.

    Attributes
    ----------
    n_examples : int
        The number of texts. Equal texts are scored once, but all of them are counted.
    sequence_length : int
        The number of tokens of the longest text.
    n_tokens : int
        The number of tokens that were computed.
    run_seconds : float
    """

    n_examples: int
    sequence_length: int
    n_tokens: int
    run_seconds: float


class Stage:
    """A fine-tuned BERT classifier, loaded into its own graph and its own session.

    The session holds the weights: use the stage as a context manager, or call `close`. A stage with mixed precision has
    a second session, in float32, and scores with the first one, in bfloat16; `mixed_scoring` decides what to score
    again.

    Parameters
    ----------
    spec : StageSpec
    features : bool
        Also return each text's features: see `StageOutput`.
    n_workers : int, optional
        By default one per core; one on a GPU. With 1, the logits do not depend on the number of cores: how texts are
        divided into batches depends on the number of workers, and the last bits of a logit on the batch.

    Attributes
    ----------
    n_workers : int
        The number of threads that score batches in parallel.
    work : int
        The number of multiplications for one token, attention not counted: the cost of this stage relative to others.
    files : list of Path
        The files that were loaded.
    exact : Stage or None
        The same stage in float32, of a stage with mixed precision.

    Raises
    ------
    CheckpointError
        The stage's files are missing or not usable, or this machine lacks its precision. No session exists then.
    """

    def __init__(self, spec: StageSpec, *, features: bool = False, n_workers: int | None = None):
        paths = stage_files(spec)
        fused = fast.has_fused_nodes()
        if spec.precision != "float32" and not fast.has_bfloat16():
            raise CheckpointError(
                f"stage '{spec.name}': precision {spec.precision} needs a processor with bfloat16 instructions "
                '(avx512_bf16 or amx_bf16, under Linux); set precision = "float32"'
            )
        checkpoint = read_checkpoint(spec)
        self.spec = spec
        self._precision = "bfloat16" if spec.precision == "mixed" else spec.precision  # of the first session
        self._features = features
        self._hidden = checkpoint.config["hidden_size"]
        self.files = [paths.bert_config_file, paths.vocab_file, *checkpoint_files(checkpoint.prefix)]
        self.tokenizer = Tokenizer(
            paths.vocab_file, do_lower_case=spec.do_lower_case, max_seq_length=spec.max_seq_length
        )
        self.work = n_multiplications_per_token(checkpoint.config)
        self._is_fast = spec.engine == "fast"
        self._nodes = ("oneDNN" if fused else "portable") if self._is_fast else "bert-tensorflow"
        # One thread per core; each scores its own batches, since the small matrix products of one batch are hard to
        # divide among threads. On a GPU one thread is enough.
        on_processor = self._is_fast and not tf.config.list_physical_devices("GPU")
        self.n_workers = (n_workers or n_cores()) if on_processor else 1
        self._threads = {
            "intra_op_parallelism_threads": 1 if on_processor else 0,
            "inter_op_parallelism_threads": -1 if on_processor else 0,  # -1: run in the thread that calls
        }
        self._load(checkpoint, fused)
        self.exact: Stage | None = None
        try:
            self.logits(self.encode([""]))  # the first run is slow, since TensorFlow then optimizes the graph
            if spec.precision == "mixed":
                self.exact = Stage(replace(spec, precision="float32"), features=features, n_workers=n_workers)
        except BaseException:
            self.close()
            raise

    def _load(self, checkpoint: Checkpoint, fused: bool) -> None:
        names = {"output_weights": self.spec.output_weights, "output_bias": self.spec.output_bias}
        config = checkpoint.config
        if self._is_fast:
            network = fast.fast_graph(config, checkpoint.weights, precision=self._precision, fused=fused, **names)
            self.graph = network.graph
            self.session = self._new_session()
            network.load(self.session)
            self._n_segments = config["type_vocab_size"]
            forms = {"uniform": network.uniform, "ragged": network.ragged, "small": network.small}
            self._forms = {
                name: _callable(self.session, form, self._features) for name, form in forms.items() if form is not None
            }
        else:
            self._classifier = graph.classifier_graph(config, len(self.spec.labels), **names)
            self.graph = self._classifier.graph
            self.session = self._new_session()
            graph.set_weights(self.session, checkpoint.weights)

    def _new_session(self) -> tf.compat.v1.Session:
        config = tf1.ConfigProto(**self._threads)
        config.gpu_options.allow_growth = True  # several sessions share one GPU
        with _private_thread_pool():
            return tf1.Session(graph=self.graph, config=config)

    @property
    def settings(self) -> dict[str, Any]:
        """The engine's settings, for a manifest. For TensorFlow's threads, 0 means that TensorFlow chooses."""
        return {
            "engine": self.spec.engine,
            "nodes": self._nodes,
            "precision": self.spec.precision,
            "n_workers": self.n_workers,
            **self._threads,
            "devices": [device.name for device in self.session.list_devices()],
        }

    def encode(self, texts: Sequence[str], texts_b: Sequence[str | None] | None = None) -> list[Encoding]:
        """Return the token ids of each text (or pair), for `logits` and `score`."""
        return self.tokenizer.encode(texts, texts_b)

    def logits(self, batch: Sequence[Encoding]) -> np.ndarray:
        """Score one batch in one run of the session: float32, shape (len(batch), n_labels)."""
        return self.outputs(batch).logits

    def outputs(self, batch: Sequence[Encoding]) -> StageOutput:
        """Score one batch in one run of the session; return logits and features."""
        if self._is_fast:
            form, arrays = feed(batch, self._n_segments, small="small" in self._forms)
            logits, *features = self._forms[form](*arrays)
        else:
            fetches = [self._classifier.logits_t, *([self._classifier.features_t] if self._features else [])]
            logits, *features = self.session.run(fetches, graph.feed(self._classifier.inputs, batch))
        n = len(batch)
        return StageOutput(
            logits[:n],
            features[0][:n].astype(np.float16) if features else None,
            None if self.exact is None else np.zeros(n, dtype=bool),
        )

    def speculate(self, batch: Sequence[Encoding]) -> Future[StageOutput]:
        """Start `outputs` of one batch in another thread, before it is known whether the result is needed."""
        return _pool().submit(self.outputs, batch)

    def score(
        self,
        encodings: Sequence[Encoding],
        *,
        batch_size: int | None = None,
        done: Callable[[int], object] = lambda n: None,
    ) -> tuple[StageOutput, list[Batch]]:
        """Score any number of texts, in batches of similar length. Equal texts are scored once.

        Parameters
        ----------
        encodings : sequence of Encoding
        batch_size : int, optional
            The most texts in a batch. Without it, only the number of tokens of a batch is limited.
        done : callable
            Called after each batch with the number of texts that it scored.

        Returns
        -------
        output : StageOutput
            One row per text.
        batches : list of Batch

        Raises
        ------
        CheckpointError
            A logit is NaN or infinite, naming the first text.
        """
        index: dict[tuple[Any, ...], int] = {}
        row_of_text = np.array([index.setdefault((tuple(ids), n), len(index)) for ids, n in encodings], dtype=int)
        distinct = [Encoding(list(ids), n) for ids, n in index]
        lengths = np.array([len(encoding.input_ids) for encoding in distinct], dtype=int)
        n_equal = np.bincount(row_of_text, minlength=len(distinct))
        logits = np.empty((len(distinct), len(self.spec.labels)), dtype=np.float32)
        features = np.empty((len(distinct), self._hidden), dtype=np.float16) if self._features else None

        def run(rows: np.ndarray) -> Batch:
            start = perf_counter()
            output = self.outputs([distinct[row] for row in rows])
            logits[rows] = output.logits
            if features is not None:
                features[rows] = output.features
            seconds = perf_counter() - start
            n_examples = int(n_equal[np.unique(rows)].sum())
            return Batch(n_examples, int(lengths[rows].max()), int(lengths[rows].sum()), seconds)

        max_tokens = tokens_per_batch(int(lengths.sum()), self.n_workers)
        plan = make_batches(lengths, max_texts=batch_size, max_tokens=max_tokens)
        batches = []
        with closing(self._run_all(run, plan)) as running:
            for batch in running:
                batches.append(batch)
                done(batch.n_examples)
        self.check_finite(logits, distinct)
        rescored = None if self.exact is None else np.zeros(len(distinct), dtype=bool)
        return StageOutput(logits, features, rescored).take(row_of_text), batches

    def check_finite(self, logits: np.ndarray, encodings: Sequence[Encoding]) -> None:
        """Raise CheckpointError if the logits of a text hold NaN or infinity, naming the first such text.

        Finite weights can do this where their products are too large for the type. The answer would be meaningless.
        """
        if np.isfinite(logits).all():
            return
        row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
        label = int(np.flatnonzero(~np.isfinite(logits[row]))[0])
        raise CheckpointError(
            f"stage '{self.spec.name}': the text '{shorten(self.tokenizer.text(encodings[row]), 60)}' (as wordpieces) "
            f"gets the logit {logits[row, label]} for label '{shorten(self.spec.labels[label], 40)}': the weights are "
            f"finite, but their products overflow {self._precision}; take an earlier checkpoint"
        )

    def _run_all(self, run: Callable[[np.ndarray], Batch], plan: list[np.ndarray]) -> Generator[Batch, None, None]:
        """Run all batches, in parallel if there are several workers: TensorFlow releases Python's lock."""
        if self.n_workers == 1 or len(plan) < 2:
            yield from map(run, plan)
            return
        futures = [_pool().submit(run, rows) for rows in plan]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # no batch may still run when the session is closed

    def close(self) -> None:
        """Close the session, which frees the weights."""
        self.session.close()
        if self.exact is not None:
            self.exact.close()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def _pool() -> ThreadPoolExecutor:
    """Return the threads that score. All stages share them, since each thread keeps a program per shape that it ran."""
    return ThreadPoolExecutor(n_cores(), thread_name_prefix="cascade_lab")


def _callable(
    session: tf.compat.v1.Session, endpoints: fast.Endpoints, features: bool
) -> Callable[..., list[np.ndarray]]:
    """Return a function that runs one form of the graph, with or without its features.

    It saves 0.4 ms per call over `Session.run`, which looks its feeds up in Python every time.
    """
    outputs = [endpoints.logits_t, *([endpoints.features_t] if features else [])]
    options = CallableOptions(
        feed=[input_t.name for input_t in endpoints.inputs], fetch=[output_t.name for output_t in outputs]
    )
    function: Callable[..., list[np.ndarray]] = session._make_callable_from_options(options)
    return function


@contextmanager
def _private_thread_pool() -> Iterator[None]:
    """Give a session its own threads. Otherwise its limit of one thread would apply to all sessions of the process.

    TensorFlow reads this setting once, when the first session of a process is created. If other code created that
    session, all sessions share its threads.
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
