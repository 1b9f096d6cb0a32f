"""Requests that wait for answers: their texts, the parts of them that a batch holds, and how answers reach a caller."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cascade_lab.serving.answered import ServedCascade
from cascade_lab.serving.live_cascade import LiveCascade


class Answers(NamedTuple):
    """The answers to one request.

    Attributes
    ----------
    ids : list of str
    columns : dict of str to list
        The columns of the table that `Cascade.predict` returns, but for the texts: one value per text.
    served : ServedCascade
        The cascade that answered all texts of the request.
    """

    ids: list[str]
    columns: dict[str, list[Any]]
    served: ServedCascade


@dataclass(eq=False)
class PendingRequest:
    """One request: its texts, and what has been answered so far."""

    texts: list[str]
    texts_b: list[str | None] | None
    ids: list[str]
    arrived: float  # seconds since 1970
    future: Any  # a Future of concurrent.futures or of asyncio; done if the caller no longer waits
    loop: asyncio.AbstractEventLoop | None  # the loop of the future; None for concurrent.futures
    live: LiveCascade | None = None  # that of its first text; the whole request has one
    n_taken: int = 0
    n_finished: int = 0
    has_failed: bool = False
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def n_left(self) -> int:
        return len(self.texts) - self.n_taken


class Part(NamedTuple):
    """The texts from `start` to `stop` of one request, as a part of a batch."""

    request: PendingRequest
    start: int
    stop: int

    @property
    def texts(self) -> list[str]:
        return self.request.texts[self.start : self.stop]

    @property
    def texts_b(self) -> list[str | None]:
        texts_b = self.request.texts_b
        return [None] * (self.stop - self.start) if texts_b is None else texts_b[self.start : self.stop]


def deliver(results: Sequence[tuple[PendingRequest, Answers | Exception]]) -> None:
    """Set the futures of requests; those of an asyncio loop all at once, in its thread."""
    by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[Any, Answers | Exception]]] = {}
    for request, result in results:
        by_loop.setdefault(request.loop, []).append((request.future, result))
    for loop, futures in by_loop.items():
        if loop is None:
            _set_results(futures)
        else:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_set_results, futures)


def _set_results(futures: Sequence[tuple[Any, Answers | Exception]]) -> None:
    for future, result in futures:
        with suppress(asyncio.InvalidStateError, InvalidStateError):  # cancelled: the caller no longer waits
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
