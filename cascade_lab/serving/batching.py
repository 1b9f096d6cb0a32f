"""Answers requests of many threads in batches: one thread owns the cascade, and a batch is what is waiting."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from traceback import format_tb
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.bert.tokenization import Encoding
from cascade_lab.cascade import Cascade
from cascade_lab.chunks import ChunkResult, prediction_table
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.serving.answered import Answered, SeenRows, ServedCascade
from cascade_lab.serving.live_cascade import LiveCascade
from cascade_lab.serving.pending import Answers, Part, PendingRequest, deliver

MAX_BATCH_TOKENS = 4096
"""A batch takes no further texts once it has this many tokens. It is then large enough to be scored at full speed."""
TURN = 32
"""The most texts that one request adds to a batch while others wait, so that a large request does not block them."""
MAX_WAITING_TEXTS = 4096
IDLE_SECONDS = 0.25  # how soon the worker looks for idle work again

logger = logging.getLogger(__name__)


class QueueFullError(CascadeLabError):
    """Too many texts are waiting. `retry_after` says in how many seconds there should be room."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(CascadeLabError):
    """The service is closing and accepts no further texts."""


class ScoredBatch(NamedTuple):
    """What the worker computed for one batch, for `Batcher`'s `observe`.

    Attributes
    ----------
    live : LiveCascade
        The cascade that scored it.
    result : ChunkResult
    n_tokens : int
        Of the first stage.
    seconds : float
    """

    live: LiveCascade
    result: ChunkResult
    n_tokens: int
    seconds: float


class Batcher:
    """Answers requests from any number of threads, or from an asyncio loop, in common batches.

    One thread scores. It takes what is waiting, up to `MAX_BATCH_TOKENS`, and does not wait for more: a lone text is
    scored at once, and the next batch is what arrives meanwhile. Every waiting request has its turn in each batch.

    The texts that a gate lets through do not wait for those of the next batch. Together they would take at most 4% less
    of the processor's time (measured for two models of 22 million parameters, 64 texts in a batch of which the gate
    stops 90% or more), but wait for another batch.

    Parameters
    ----------
    cascade : Cascade or LiveCascade
        The batcher does not close a `Cascade`. It closes a `LiveCascade`, and those that replace it.
    max_waiting_texts : int
        A request that would make more texts wait is refused, unless nothing waits.
    log : callable, optional
        Called in the scoring thread with each batch, as `Answered`. It must not block. The texts of a caller that no
        longer waits are among them if they were scored.
    observe : callable, optional
        Called in the scoring thread with each batch, as `ScoredBatch`.
    idle : callable, optional
        Called in the scoring thread with the current cascade and its description while nothing waits. It scores at
        most one small batch, and returns whether it did.

    Examples
    --------
    >>> with Cascade.load("cascade.toml") as cascade, Batcher(cascade) as batcher:    # doctest: +SKIP
    ...     batcher.predict(["what is my balance"])
                     text predicted decided_by  probability  confidence  gate_probability  intent_probability
    0  what is my balance   balance     intent        0.991       0.991             0.998               0.991
    """

    def __init__(
        self,
        cascade: Cascade | LiveCascade,
        *,
        max_waiting_texts: int = MAX_WAITING_TEXTS,
        log: Callable[[Answered], object] | None = None,
        observe: Callable[[ScoredBatch], object] | None = None,
        idle: Callable[[Cascade, ServedCascade], bool] | None = None,
    ):
        self._current = LiveCascade.of(cascade) if isinstance(cascade, Cascade) else cascade
        self._latest = self._current  # it may still be in the queue of arrivals
        self._of_caller = self._current if isinstance(cascade, Cascade) else None  # the caller closes it
        self._max_waiting_texts = max_waiting_texts
        self._log, self._observe, self._idle = log, observe, idle
        self._lock = threading.Lock()
        self._is_closed = self._has_failed = False
        self._n_accepted = self._n_finished = 0  # texts; each is written by one side only
        self._rate = 100.0  # texts per second, of recent batches
        self._arrivals: SimpleQueue[PendingRequest | LiveCascade | None] = SimpleQueue()
        self._waiting: deque[PendingRequest] = deque()  # of the scoring thread
        self._replaced: list[LiveCascade] = []  # of the scoring thread
        self._thread = threading.Thread(target=self._work, name="cascade_lab_scoring", daemon=True)
        self._thread.start()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def current(self) -> LiveCascade:
        """The cascade that answers new requests."""
        return self._latest

    @property
    def n_waiting_texts(self) -> int:
        """The number of texts that were accepted and are not yet answered."""
        return self._n_accepted - self._n_finished

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted and scored."""
        return not self._is_closed and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether scoring has ended by an error that it cannot survive; the process should be started anew."""
        return self._has_failed

    def predict(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None = None,
        *,
        ids: Sequence[str] | None = None,
        timeout: float | None = None,
    ) -> pd.DataFrame:
        """Answer texts, in batches shared with other threads; return the table that `Cascade.predict` returns.

        Raises
        ------
        QueueFullError, ClosedError
        CascadeLabError
            There is no text, or another number of second texts or of ids.
        TimeoutError
            After `timeout` seconds. Texts that were not scored by then are dropped.
        """
        future: Future[Answers] = Future()
        texts, texts_b = list(texts), None if texts_b is None else list(texts_b)
        self._put(texts, texts_b, ids, future, None)
        try:
            return prediction_table(texts, texts_b, future.result(timeout).columns)
        finally:
            future.cancel()

    def submit(
        self, texts: list[str], texts_b: list[str | None] | None = None, *, ids: Sequence[str] | None = None
    ) -> asyncio.Future[Answers]:
        """Ask for answers from the running asyncio loop. Cancel the future to drop the texts.

        Raises
        ------
        QueueFullError, ClosedError
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answers] = loop.create_future()
        self._put(texts, texts_b, ids, future, loop)
        return future

    def replace(self, cascade: LiveCascade) -> None:
        """Let another cascade answer from the next batch on.

        A request of which some texts are answered is completed by the cascade that began it. The replaced cascade is
        closed after that.
        """
        with self._lock:
            if self._is_closed:
                raise ClosedError("the service is closing: the cascade was not replaced")
            self._latest = cascade
            self._arrivals.put(cascade)

    def close(self) -> None:
        """Answer what was accepted, then stop the thread. Nothing is accepted meanwhile."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._arrivals.put(None)
        self._thread.join()

    def _put(
        self,
        texts: list[str],
        texts_b: list[str | None] | None,
        ids: Sequence[str] | None,
        future: Any,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        if ids is None:
            prefix = secrets.token_hex(8)
            ids = [f"{prefix}-{number}" for number in range(len(texts))]
        if not texts or len(texts if texts_b is None else texts_b) != len(texts) or len(ids) != len(texts):
            raise CascadeLabError("a request needs at least one text, and as many second texts and ids as texts")
        request = PendingRequest(texts, texts_b, list(ids), time.time(), future, loop)
        with self._lock:
            if not self.is_ready:
                raise ClosedError("the service is closing; send the request to another one")
            n_waiting = self.n_waiting_texts
            if n_waiting and n_waiting + len(texts) > self._max_waiting_texts:
                seconds = n_waiting / self._rate
                raise QueueFullError(f"{n_waiting} texts are waiting; try again in {seconds:.1f} seconds", seconds)
            self._n_accepted += len(texts)
            self._arrivals.put(request)

    # The rest runs in the scoring thread.

    def _work(self) -> None:
        try:
            self._answer_all()
        except BaseException as error:  # such as MemoryError; without this thread nothing is answered
            logger.critical("scoring has ended: %s\n%s", type(error).__name__, "".join(format_tb(error.__traceback__)))
            with self._lock:
                self._is_closed = self._has_failed = True
            while not self._arrivals.empty():
                arrival = self._arrivals.get_nowait()
                if isinstance(arrival, PendingRequest):
                    self._waiting.append(arrival)
            for request in [*self._waiting]:
                self._fail(request, error if isinstance(error, Exception) else RuntimeError("scoring has ended"))

    def _answer_all(self) -> None:
        is_open = True
        while is_open or self._waiting:
            is_open = self._receive(is_open) and is_open
            parts, encodings = self._next_batch()
            if parts:
                self._answer(parts, encodings)
                self._close_replaced()
        if self._of_caller is None or self._current.cascade.stages != self._of_caller.cascade.stages:
            self._current.cascade.close()

    def _receive(self, is_open: bool) -> bool:
        """Take all arrivals, and wait for the first one if nothing waits; return whether there may be more."""
        while True:
            try:
                arrival = self._next_arrival(is_open)
            except Empty:
                return is_open
            if arrival is None:
                return False
            if isinstance(arrival, LiveCascade):
                self._replaced.append(self._current)
                self._current = arrival
                self._close_replaced()
            else:
                self._waiting.append(arrival)

    def _next_arrival(self, is_open: bool) -> PendingRequest | LiveCascade | None:
        if self._waiting or not is_open:
            return self._arrivals.get_nowait()
        if self._idle is None:
            return self._arrivals.get()
        while True:
            try:
                return self._arrivals.get_nowait()
            except Empty:
                try:
                    did_work = self._idle(self._current.cascade, self._current.served)
                except Exception:
                    logger.exception("the work for idle times failed")
                    did_work = False
            if not did_work:
                try:
                    return self._arrivals.get(timeout=IDLE_SECONDS)
                except Empty:
                    continue

    def _next_batch(self) -> tuple[list[Part], list[Encoding]]:
        """Return the next batch: the waiting requests take turns, in the order of arrival, up to `MAX_BATCH_TOKENS`."""
        parts: list[Part] = []
        encodings: list[Encoding] = []
        of_others: list[PendingRequest] = []  # requests that another cascade began
        n_tokens, live = 0, None
        while self._waiting and n_tokens < MAX_BATCH_TOKENS:
            request = self._waiting.popleft()
            if request.future.done():  # the caller no longer waits
                self._finish(request)
                continue
            request.live = request.live or self._current
            live = live or request.live
            if request.live is not live:
                of_others.append(request)
                continue
            start, stop = request.n_taken, min(request.n_taken + TURN, len(request.texts))
            texts_b = request.texts_b and request.texts_b[start:stop]
            try:
                encoded = live.cascade.stages[0].encode(request.texts[start:stop], texts_b)
            except Exception as error:
                self._fail(request, error)
                continue
            encodings += encoded
            n_tokens += sum(len(encoding.input_ids) for encoding in encoded)
            parts.append(Part(request, start, stop))
            request.n_taken = stop
            if request.n_left:
                self._waiting.append(request)
        self._waiting.extendleft(reversed(of_others))
        return parts, encodings

    def _answer(self, parts: list[Part], encodings: list[Encoding]) -> None:
        """Score one batch and deliver the requests that it completes. If that fails, score each part alone."""
        live, started = parts[0].request.live, time.perf_counter()
        assert live is not None
        texts = [text for part in parts for text in part.texts]
        texts_b = [text for part in parts for text in part.texts_b]
        try:
            result = live.cascade.answer(encodings, texts, texts_b if any(t is not None for t in texts_b) else None)
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0].request, error)
                return
            start = 0
            for part in parts:
                stop = start + len(part.texts)
                if not part.request.has_failed:
                    self._answer([part], encodings[start:stop])
                start = stop
            return
        seconds = time.perf_counter() - started
        self._rate += 0.2 * (len(texts) / seconds - self._rate)
        columns = {name: values.tolist() for name, values in result.columns().items()}
        complete = []
        start = 0
        for request, first, last in parts:
            stop = start + last - first
            if not request.columns:
                request.columns = {name: values[start:stop] for name, values in columns.items()}
            else:
                for name, values in columns.items():
                    request.columns[name] += values[start:stop]
            start = stop
            if last == len(request.texts):
                complete.append(request)
        for request, first, last in parts:
            self._finish(request, last - first)
        deliver([(request, Answers(request.ids, request.columns, live.served)) for request in complete])
        self._tell(self._observe, lambda: ScoredBatch(live, result, sum(len(e.input_ids) for e in encodings), seconds))
        self._tell(self._log, lambda: _answered(live.served, parts, texts, texts_b, result))

    def _fail(self, request: PendingRequest, error: Exception) -> None:
        """Deliver an error, and drop what is left of the request."""
        if request.has_failed:
            return
        # Without the error's message, which may quote a text.
        logger.error("a request failed: %s\n%s", type(error).__name__, "".join(format_tb(error.__traceback__)))
        self._finish(request)
        request.has_failed = True
        if request in self._waiting:
            self._waiting.remove(request)
        deliver([(request, error)])

    def _finish(self, request: PendingRequest, n: int | None = None) -> None:
        """Count `n` more texts of a request as finished, by default all that are left; each text once."""
        n_left = len(request.texts) - request.n_finished
        n = n_left if n is None else min(n, n_left)
        request.n_finished += n
        self._n_finished += n

    def _tell(self, listener: Callable[[Any], object] | None, make: Callable[[], Any]) -> None:
        """Call a listener; its failure does not stop the service."""
        if listener is None:
            return
        try:
            listener(make())
        except Exception:
            logger.exception("a listener of the batches failed")

    def _close_replaced(self) -> None:
        """Close replaced cascades whose sessions no request needs any longer, and forget those that share sessions."""
        others = [self._current, *([self._of_caller] if self._of_caller else [])]  # they are closed at the end
        seen = [live.cascade.stages for live in others]
        waited_for = [request.live.cascade.stages for request in self._waiting if request.live]
        kept = []
        for live in self._replaced:
            stages = live.cascade.stages
            if stages in seen:
                continue
            seen.append(stages)
            if stages in waited_for:
                kept.append(live)
            else:
                live.cascade.close()
        self._replaced = kept


def _answered(
    served: ServedCascade, parts: list[Part], texts: list[str], texts_b: list[str | None], result: ChunkResult
) -> Answered:
    return Answered(
        served,
        [name for part in parts for name in part.request.ids[part.start : part.stop]],
        np.concatenate([np.full(part.stop - part.start, part.request.arrived) for part in parts]),
        texts,
        texts_b if any(text is not None for text in texts_b) else None,
        result.columns(),
        {
            name: SeenRows(scored.rows, scored.output.logits, scored.output.rescored)
            for name, scored in result.scored.items()
        },
        result.evidence,
    )
