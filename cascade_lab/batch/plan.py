"""The plan of a scoring job: which rows of which files are one shard. It depends on the input alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from cascade_lab.batch.duplicate_ids import IdHashes
from cascade_lab.batch.inputs import InputFile, digest, file_format
from cascade_lab.batch.reading import CHUNK_ROWS, Columns, Piece, column_names, read_rows, row_groups
from cascade_lab.exceptions import EvalSetError

ID_COLUMNS = ("example_id", "id")
"""The columns that are ids if the first file that can be read has them."""
MARK_ROWS = 8192
"""A text file's shards begin at multiples of this row, since the offset of each such row is kept."""
SHARD_ROWS = 1_000_000
N_SHARDS = 64
"""A smaller input is divided into this number of shards, so that many workers finish at about the same time."""
FEW_BYTES = 2**28
"""Input of fewer bytes is read in one process."""


class Unreadable(NamedTuple):
    """A file that cannot be read, and why."""

    name: str
    path: str
    reason: str


class ScannedFile(NamedTuple):
    """What one reading of a whole file tells.

    Attributes
    ----------
    file : InputFile
    sha256 : str
    n_rows : int
    units : list of (start, stop, offset)
        Rows that stay together: a row group, or `MARK_ROWS` rows of a text file.
    has_whole_ids : bool
        Every id is a whole number of 64 bits.
    """

    file: InputFile
    sha256: str
    n_rows: int
    units: list[tuple[int, int, int]]
    has_whole_ids: bool


@dataclass(frozen=True)
class Plan:
    """Which rows of which files each shard has.

    Attributes
    ----------
    files : tuple of ScannedFile
    unreadable : tuple of Unreadable
        They are left out.
    columns : Columns
    id_type : str
        "int64" or "string".
    shards : tuple of tuple of Piece
        The pieces of each shard, in the order of the input.
    """

    files: tuple[ScannedFile, ...]
    unreadable: tuple[Unreadable, ...]
    columns: Columns
    id_type: str
    shards: tuple[tuple[Piece, ...], ...]

    @property
    def n_rows(self) -> int:
        return sum(file.n_rows for file in self.files)


def make_plan(
    files: Sequence[InputFile],
    folder: Path,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    make_ids: bool = False,
    shard_rows: int | None = None,
    workers: int = 1,
    done: Callable[[int], object] = lambda n_bytes: None,
) -> Plan:
    """Read all files once, and divide their rows into shards.

    Each file is read as it will be read when it is scored, so that a damaged one is found before. The ids are checked
    in bounded memory: their hashes go to files in `folder`, which are read one after the other.

    Parameters
    ----------
    files : sequence of InputFile
    folder : Path
        An empty folder for the hashes.
    text_column : str
    id_column : str, optional
        By default the first of `ID_COLUMNS` that the first readable file has; without any, ids are made.
    make_ids : bool
        Make all ids, of file and row.
    shard_rows : int, optional
        The number of rows of a shard. By default a 64th of the rows, at least `MARK_ROWS` and at most a million.
    workers : int
        The number of processes that read a large input.
    done : callable
        Called after each file with its size.

    Raises
    ------
    EvalSetError
        Two rows have the same id, no file can be read, or no file has rows.
    """
    columns = Columns(text_column, None if make_ids else id_column or _id_column(files))
    scanned: list[ScannedFile] = []
    unreadable: list[Unreadable] = []
    for file, result in zip(files, _scan_all(files, columns, folder, workers), strict=True):
        if isinstance(result, str):
            unreadable.append(Unreadable(file.name, file.path, result))
        else:
            scanned.append(result)
        done(file.size)
    if not any(file.n_rows for file in scanned):
        reason = f"; {unreadable[0].reason}" if unreadable else ""
        raise EvalSetError(f"the {len(files):,} files of the input have no row that can be read{reason}")
    if columns.ids is not None:
        IdHashes(folder).check([file.file for file in scanned], columns)
    has_whole_ids = columns.ids is not None and all(file.has_whole_ids for file in scanned if file.n_rows)
    n_rows = sum(file.n_rows for file in scanned)
    size = shard_rows or min(SHARD_ROWS, max(MARK_ROWS, -(-n_rows // N_SHARDS)))
    shards = tuple(divide([file.units for file in scanned], size))
    return Plan(tuple(scanned), tuple(unreadable), columns, "int64" if has_whole_ids else "string", shards)


def divide(units: Sequence[Sequence[tuple[int, int, int]]], size: int) -> Iterator[tuple[Piece, ...]]:
    """Divide the rows of files into shards of about `size` rows.

    A unit that is much larger than a shard is divided; its offset then belongs to its first row only.

    Parameters
    ----------
    units : sequence of sequences of (start, stop, offset)
        Those of each file.
    size : int

    Examples
    --------
    >>> shards = divide([[(0, 4, 0), (4, 8, 90)], [(0, 2, 0)]], 5)
    >>> [[tuple(piece) for piece in shard] for shard in shards]
    [[(0, 0, 4, 0)], [(0, 4, 8, 90), (1, 0, 2, 0)]]
    """
    shard: list[Piece] = []
    n = 0
    for number, of_file in enumerate(units):
        for start, stop, offset in of_file:
            for low, high in _parts(start, stop, size):
                if shard and n + (high - low) > 1.25 * size:
                    yield tuple(shard)
                    shard, n = [], 0
                last = shard[-1] if shard else None
                if last is not None and last.file == number and last.stop == low:
                    shard[-1] = last._replace(stop=high)
                else:
                    shard.append(Piece(number, low, high, offset if low == start else 0))
                n += high - low
                if n >= size:
                    yield tuple(shard)
                    shard, n = [], 0
    if shard:
        yield tuple(shard)


def _parts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    n_parts = max(1, round((stop - start) / size))
    cuts = [start + (stop - start) * i // n_parts for i in range(n_parts + 1)]
    return list(pairwise(cuts))


def _id_column(files: Sequence[InputFile]) -> str | None:
    for file in files:
        try:
            names = column_names(file)
        except EvalSetError:
            continue
        return next((name for name in ID_COLUMNS if name in names), None)
    return None


def _scan_all(files: Sequence[InputFile], columns: Columns, folder: Path, workers: int) -> Iterator[ScannedFile | str]:
    scan = partial(_scan_or_reason, columns=columns, folder=folder)
    if workers < 2 or len(files) < 2 or sum(file.size for file in files) < FEW_BYTES:
        yield from map(scan, files)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(scan, files, chunksize=max(1, min(100, len(files) // (8 * workers))))


def _scan_or_reason(file: InputFile, columns: Columns, folder: Path) -> ScannedFile | str:
    """Read a file; return the reason where it cannot be read."""
    try:
        return scan(file, columns, folder)
    except EvalSetError as error:
        return str(error)


def scan(file: InputFile, columns: Columns, folder: Path) -> ScannedFile:
    """Read a whole file; keep the hashes of its ids in `folder`.

    Raises
    ------
    EvalSetError
        It cannot be read to its end, lacks a column, or no row has a text.
    """
    marks = [0]
    n_rows = n_texts = 0
    has_whole_ids = True
    with IdHashes(folder).writing() as hashes:
        for rows in read_rows(file, None, columns):
            n_rows += len(rows.texts)
            n_texts += sum(text is not None for text in rows.texts)
            if rows.ids is not None:
                has_whole_ids = has_whole_ids and all(map(is_whole, rows.ids))
                hashes.add(rows.ids)
            if n_rows % MARK_ROWS == 0 and len(rows.texts) == CHUNK_ROWS:
                marks.append(rows.next_offset)
        if n_rows and not n_texts:
            raise EvalSetError(
                f"{file.name}: no row has a text in '{columns.text}'; name the column with --text-column"
            )
        if file_format(file.path) == "parquet":
            units, start = [], 0
            for n in row_groups(file):
                units += [(start, start + n, 0)] if n else []
                start += n
        else:
            starts = range(0, n_rows, MARK_ROWS)
            units = [(start, min(start + MARK_ROWS, n_rows), marks[i]) for i, start in enumerate(starts)]
        return ScannedFile(file, digest(file), n_rows, units, has_whole_ids)


def is_whole(value: Any) -> bool:
    """Return whether an id fits among whole numbers of 64 bits; a missing one does."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63)
