"""The traffic log of a service: what was answered and every stage's logits, written by a thread of its own."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.serving.answered import Answered, ServedCascade
from cascade_lab.serving.log_files import PartWriter, ShadowScores, answered_batch, finish_left_parts, shadow_batch
from cascade_lab.serving.shadow import ShadowQueue

if TYPE_CHECKING:
    from cascade_lab.cascade import Cascade

_LOG = logging.getLogger(__name__)
_FLUSH_SECONDS = 0.25  # at most one second of records may be lost to SIGKILL, also where all processors are busy
_RETRY_SECONDS = 2.0  # on a full disk
_BATCH = 16384  # texts in one record batch


class TrafficLog:
    """Writes what a service answers into a folder, as parts that `cascade-lab collect` makes a run of.

    `add` only puts into a queue; a thread writes four times a second. So SIGKILL loses less than a second of records,
    and `close` none. On a full disk the records wait in the queue until there is room again; those for which the queue
    has no room are counted as lost. Several services may write into one folder: each has parts of its own.

    Parameters
    ----------
    folder : path
        Made if it is missing.
    keep_texts : bool
        Log the texts too. They are personal data.
    shadow : float
        The share of the texts, from 0 to 1, that is chosen for the sample: later stages score them too where they
        ended earlier; see `score_shadow`.
    max_bytes, max_seconds : float
        A part is finished, and another one begun, when it is larger or older.
    max_waiting, max_waiting_characters : int
        The most texts in the queue, and the most characters of their ids and texts. The queue keeps the texts only if
        they are logged or may be scored later.

    Attributes
    ----------
    n_written, n_lost : int
        Answered texts that are in the files; not written and not to be written, or deleted with their part while it
        was open.
    n_shadow : int
        Texts of the sample: their turn came, and every stage's scores are in the files.
    problem : str or None
        Why nothing can be written at present; None where all is well.

    Raises
    ------
    CascadeLabError
        The folder cannot be made or written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_texts: bool = False,
        shadow: float = 0.0,
        max_bytes: float = 64 * 2**20,
        max_seconds: float = 3600.0,
        max_waiting: int = 50_000,
        max_waiting_characters: int = 50_000_000,
    ):
        if not 0 <= shadow <= 1:
            raise CascadeLabError(f"--shadow is {shadow}; it is a share of the texts, from 0 to 1")
        self.folder, self.keep_texts = Path(folder), keep_texts
        self.max_bytes, self.max_seconds = max_bytes, max_seconds
        self.max_waiting, self.max_waiting_characters = max_waiting, max_waiting_characters
        self.n_written = self.n_lost = self.n_shadow = 0
        self.problem: str | None = None
        self._shadow = ShadowQueue(shadow)
        self._prepare_folder()
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._waiting: list[Answered | ShadowScores] = []
        self._n_waiting = self._n_characters = 0  # in the queue, also while they are written
        self._n_unreported = 0  # lost texts that no part counts yet
        self._part: PartWriter | None = None
        self._n_in_part = self._n_shadow_in_part = 0
        self._closing = False
        self._thread = threading.Thread(target=self._write_until_closed, name="traffic-log", daemon=True)
        self._thread.start()

    def __enter__(self) -> TrafficLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_waiting(self) -> int:
        """Texts that are in the queue."""
        return self._n_waiting

    @property
    def n_shadow_waiting(self) -> int:
        """Chosen texts that wait for their turn."""
        return len(self._shadow)

    @property
    def n_shadow_dropped(self) -> int:
        """Chosen texts that got no turn."""
        return self._shadow.n_dropped

    def add(self, answered: Answered) -> None:
        """Log an answered batch. It never waits; without room in the queue the batch is counted as lost."""
        if not self.keep_texts and not self._shadow.share:
            answered = replace(answered, texts=[], texts_b=None)
        self._put(answered)

    def score_shadow(self, cascade: Cascade, served: ServedCascade, *, n_texts: int = 8) -> bool:
        """Score some of the chosen texts that wait, in the calling thread; return False where none waits.

        The service calls it when it is idle.

        Parameters
        ----------
        cascade : Cascade
        served : ServedCascade
            What `cascade` is; texts that another one answered are dropped.
        n_texts : int
            The most texts.
        """
        if not len(self._shadow):
            return False
        scores = self._shadow.score(cascade, served, n_texts=n_texts)
        if scores is not None:
            self.add_shadow(scores)
        return True

    def add_shadow(self, scores: ShadowScores) -> None:
        """Log shadow scores; `score_shadow` does it. Without room in the queue they are left out."""
        self._put(scores)

    def close(self) -> None:
        """Write what waits, and finish the part. Whatever is added afterwards is counted as lost."""
        with self._lock:
            self._closing = True
        self._wake.set()
        self._thread.join()

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise CascadeLabError(
                f"{self.folder}: the traffic log cannot be written ({error.strerror or error}); give another folder"
            ) from error
        finish_left_parts(self.folder)

    def _put(self, records: Answered | ShadowScores) -> None:
        n, n_characters = len(records.ids), _count_characters(records)
        with self._lock:
            has_room = (
                self._n_waiting + n <= self.max_waiting
                and self._n_characters + n_characters <= self.max_waiting_characters
            )
            if has_room and not self._closing:
                self._waiting.append(records)
                self._n_waiting += n
                self._n_characters += n_characters
                return
        if isinstance(records, Answered):
            self._lose(n)

    def _lose(self, n: int) -> None:
        with self._lock:
            self.n_lost += n
            self._n_unreported += n

    def _write_until_closed(self) -> None:
        """Write what waits, until `close`: what the thread does."""
        pending: list[Answered | ShadowScores] = []
        retry_at, closing = 0.0, False
        while not closing:
            self._wake.wait(_FLUSH_SECONDS)
            with self._lock:
                closing = self._closing
                pending, self._waiting = pending + self._waiting, []
            if closing or time.monotonic() >= retry_at:
                try:
                    self._leave_deleted_part()
                    self._write(pending)
                    if closing or self._is_part_full():
                        self._finish_part()
                    self._note(None)
                except OSError as error:
                    self._note(error)
                    retry_at = time.monotonic() + _RETRY_SECONDS
        self._lose(sum(len(records.ids) for records in pending if isinstance(records, Answered)))
        if self.n_lost:
            _LOG.warning("%s: %d answered texts are not in the traffic log", self.folder, self.n_lost)

    def _write(self, pending: list[Answered | ShadowScores]) -> None:
        """Write records and take them out of `pending`; raises OSError, with the rest still in it."""
        alone = False
        while pending:
            kind, cascade, n_texts, n = type(pending[0]), pending[0].cascade, 0, 0
            for records in pending:
                is_alike = type(records) is kind and records.cascade.digest == cascade.digest
                if not is_alike or (n and (alone or kind is ShadowScores)) or n_texts > _BATCH:
                    break
                n, n_texts = n + 1, n_texts + len(records.ids)
            if self._part is not None and self._part.cascade.digest != cascade.digest:
                self._finish_part()
            try:
                self._write_batch(pending[:n])
            except OSError:
                # The next try begins another part: this one may be too large for the system, or deleted.
                with suppress(OSError):
                    self._finish_part()
                raise
            except Exception:  # the service goes on, whatever is wrong with these records
                if n > 1:
                    alone = True
                    continue
                _LOG.exception("%s: %d records cannot be logged", self.folder, n_texts)
                self._lose(n_texts if kind is Answered else 0)
            else:
                self._choose(pending[:n])
            n_characters = sum(map(_count_characters, pending[:n]))
            del pending[:n]
            with self._lock:
                self._n_waiting -= n_texts
                self._n_characters -= n_characters

    def _write_batch(self, records: Sequence[Answered | ShadowScores]) -> None:
        """Write records of one kind and one cascade; raises OSError, with nothing written."""
        if self._part is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._part = PartWriter(self.folder, records[0].cascade, shadow=self._shadow.share)
            self._n_in_part = self._n_shadow_in_part = self._n_lost_in_part = 0
        answered = [one for one in records if isinstance(one, Answered)]
        shadow = [one for one in records if isinstance(one, ShadowScores)]
        n_lost = self._n_unreported
        for scores in shadow:
            self._part.write(shadow_batch(self._part.schema, scores), n_lost=0)
            self.n_shadow += len(scores.ids)
            self._n_shadow_in_part += len(scores.ids)
        if answered:
            batch = answered_batch(self._part.schema, answered, keep_texts=self.keep_texts)
            self._part.write(batch, n_lost=n_lost)
            self.n_written += batch.num_rows
            self._n_in_part += batch.num_rows
            self._n_lost_in_part += n_lost
            with self._lock:
                self._n_unreported -= n_lost

    def _choose(self, records: Sequence[Answered | ShadowScores]) -> None:
        """Let the chosen ones of texts that were written wait for shadow scoring."""
        try:
            for one in records:
                if isinstance(one, Answered):
                    self._shadow.add(one)
        except Exception:  # the service goes on; nothing is written again
            _LOG.exception("%s: texts cannot be chosen for shadow scoring", self.folder)

    def _leave_deleted_part(self) -> None:
        """Forget a part that somebody deleted or moved, so that another one is begun. Deleted texts count as lost."""
        if self._part is not None and not self._part.is_in_place():
            _LOG.warning("%s: was deleted or moved; the traffic log begins another part", self._part.path)
            if self._part.is_deleted():
                self.n_written -= self._n_in_part
                self.n_shadow -= self._n_shadow_in_part
                self._lose(self._n_in_part)
                with self._lock:
                    self._n_unreported += self._n_lost_in_part  # the part had reported them
            with suppress(OSError):
                self._finish_part()

    def _is_part_full(self) -> bool:
        part = self._part
        if part is None:
            return False
        return part.n_bytes >= self.max_bytes or time.monotonic() - part.started >= self.max_seconds

    def _finish_part(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.finish()

    def _note(self, error: OSError | None) -> None:
        """Remember what is wrong, and say when that begins and ends."""
        if error is not None:
            what = error.strerror or str(error)
            if self.problem is None:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                advice = "free some space" if is_full else "see that the folder can be written"
                _LOG.warning("%s: the traffic log has stopped (%s); %s", self.folder, what, advice)
            self.problem = what
        elif self.problem is not None:
            _LOG.warning("%s: the traffic log goes on; %d texts are lost so far", self.folder, self.n_lost)
            self.problem = None


def _count_characters(records: Answered | ShadowScores) -> int:
    """Return the characters of the ids and texts."""
    n = sum(map(len, records.ids))
    if isinstance(records, Answered):
        n += sum(map(len, records.texts)) + sum(len(text) for text in records.texts_b or () if text is not None)
    return n
