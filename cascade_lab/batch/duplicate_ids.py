"""Finds ids that occur twice in inputs of any size: hashes in files, by parts that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.batch.inputs import InputFile
from cascade_lab.batch.reading import Columns, read_rows
from cascade_lab.exceptions import EvalSetError
from cascade_lab.text import shorten

N_PARTS = 64
"""The part of a hash is its remainder. A billion ids are 8 GB in files, of which 125 MB are in memory at a time."""
BUFFERED = 2**17
"""Hashes that are held until they are written."""
MAX_SUSPECTS = 1000
"""The most hashes whose ids are compared. More than a few mean that ids do occur twice."""


class IdHashes:
    """The hashes of all ids, in the files of a folder. Several processes may write."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._buffer: list[np.ndarray] = []
        self._n = 0

    @contextmanager
    def writing(self) -> Iterator[IdHashes]:
        """Write what was added at the end; nothing of the last part where an error comes."""
        yield self
        self._flush()

    def add(self, ids: Sequence[Any]) -> None:
        """Add ids; None is none."""
        hashes = id_hashes([one for one in ids if one is not None])
        self._buffer.append(hashes)
        self._n += len(hashes)
        if self._n >= BUFFERED:
            self._flush()

    def _flush(self) -> None:
        if not self._n:
            return
        hashes = np.concatenate(self._buffer)
        parts = hashes % N_PARTS
        order = np.argsort(parts, kind="stable")
        ends = np.searchsorted(parts[order], np.arange(N_PARTS + 1))
        for part in range(N_PARTS):
            own = hashes[order[ends[part] : ends[part + 1]]]
            if len(own):
                with open(self._folder / f"{part:02}.u64", "ab", buffering=0) as file:  # one write: others append too
                    file.write(own.tobytes())
        self._buffer, self._n = [], 0

    def check(self, files: Sequence[InputFile], columns: Columns) -> None:
        """Raise EvalSetError with the two places where an id occurs twice; the hashes are deleted.

        Ids with equal hashes are compared in a second reading of the input: among a billion ids, two different ones
        have the same hash of 64 bits in 3 of 100 cases.
        """
        suspects: list[np.ndarray] = []
        for path in sorted(self._folder.glob("*.u64")):
            hashes = np.sort(np.fromfile(path, dtype=np.uint64))
            suspects.append(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))
            path.unlink()
        found = np.concatenate(suspects)[:MAX_SUSPECTS] if suspects else np.empty(0, dtype=np.uint64)
        if not len(found):
            return
        seen: dict[str, str] = {}
        for file in files:
            for rows in read_rows(file, None, columns):
                places = [i for i, one in enumerate(rows.ids or ()) if one is not None]
                hashes = id_hashes([(rows.ids or [])[i] for i in places])
                for i in np.array(places, dtype=int)[np.isin(hashes, found)]:
                    one, place = str((rows.ids or [])[i]), f"{file.name} row {rows.start + i + 1}"
                    if one in seen:
                        raise EvalSetError(
                            f"{place}: id '{shorten(one, 80)}' is at {seen[one]} too; make the ids unique, or pass "
                            "--make-ids (ids of file and row)"
                        )
                    seen[one] = place


def id_hashes(ids: Sequence[Any]) -> np.ndarray:
    """Return a hash of 64 bits of each id; a number and the same number as a text are equal."""
    texts = np.array([str(one).encode("utf-8", "surrogateescape") for one in ids] + [None], dtype=object)[:-1]
    return pd.util.hash_array(texts, categorize=False) if len(texts) else np.empty(0, dtype=np.uint64)
