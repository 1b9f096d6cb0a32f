"""The files that a scoring job reads: finds them in folders of any file system of pyarrow, and reads rows of them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cascade_lab.evalset_files import check_columns
from cascade_lab.exceptions import EvalSetError
from cascade_lab.json_files import parse
from cascade_lab.text import shorten

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
CHUNK_ROWS = 1024
MARK_ROWS = 8192
"""A text file's shards begin at multiples of this row, since the offset of each such row is kept."""
MAX_LINE = 2**26  # bytes; a longer line is no line of texts
READ_ERRORS = (pa.ArrowException, OSError, ValueError, LookupError, EOFError, csv.Error, RecursionError)
"""What pyarrow and Python raise at a file that cannot be read."""


class InputFile(NamedTuple):
    """A file of the input.

    Attributes
    ----------
    name : str
        As the user gave it, for messages and ids.
    path : str
        Its absolute path, or its URI.
    size : int
        Bytes.
    modified_ns : int
        The time of its last change, in nanoseconds since 1970.
    """

    name: str
    path: str
    size: int
    modified_ns: int


class Columns(NamedTuple):
    """The columns that are read: `ids` is None where the ids are made. `text_b` is read where a file has it."""

    text: str
    ids: str | None


class Piece(NamedTuple):
    """Rows of one file, from `start` to before `stop`, counted from 0.

    `offset` is the byte at which `start` begins in a text file (uncompressed), or 0 if it is not known.
    """

    file: int
    start: int
    stop: int
    offset: int


class Rows(NamedTuple):
    """Some rows as they are in a file: `ids` is None where they are not read, `texts_b` where there are none.

    Attributes
    ----------
    start : int
        The place of the first row in its file.
    errors : list of str or None
        Why a row is not a row: too many fields, not JSON.
    next_offset : int
        Where the next row begins in a text file.
    """

    start: int
    ids: list[Any] | None
    texts: list[Any]
    texts_b: list[Any] | None
    errors: list[str | None]
    next_offset: int


def find_files(inputs: Sequence[str | Path]) -> list[InputFile]:
    """Return the files of the inputs: files as they are given, and all files of known formats in folders, sorted.

    Names that begin with "." or "_" are left out in folders, as by Spark and pyarrow.

    Parameters
    ----------
    inputs : sequence of str or path
        Files or folders, as paths or as URIs of a file system that pyarrow knows ("s3://bucket/texts").

    Raises
    ------
    EvalSetError
        There is no such file or folder, a file of an unknown format, or no file in all.
    """
    found: dict[str, InputFile] = {}
    for given in map(str, inputs):
        files = _find(given)
        if not files:
            raise EvalSetError(f"{given}: has no file that ends in {_endings()}; give another folder")
        found |= {file.path: file for file in files if file.path not in found}
    return list(found.values())


def _find(given: str) -> list[InputFile]:
    system, root, prefix = file_system(given)
    try:
        info = system.get_file_info(root)
        if info.type == fs.FileType.File:
            if file_format(root) is None:
                raise EvalSetError(f"{given}: unknown format of texts; give files that end in {_endings()}")
            infos = [info]
        elif info.type == fs.FileType.Directory:
            infos = system.get_file_info(fs.FileSelector(root, recursive=True))
        else:
            raise EvalSetError(f"{given}: no such file or folder; give texts to score")
    except (OSError, pa.ArrowException) as error:
        raise EvalSetError(f"{given}: cannot be read ({_reason(error)}); give texts to score") from error
    files = []
    for one in infos:
        inside = one.path.removeprefix(root).lstrip("/")
        is_hidden = any(part[0] in "._" for part in inside.split("/") if part)
        if one.type == fs.FileType.File and file_format(one.path) and not is_hidden:
            name = f"{given.rstrip('/')}/{inside}" if inside else given
            files.append(InputFile(name, prefix + one.path, one.size, one.mtime_ns or 0))
    return sorted(files, key=lambda file: file.path)


def file_system(given: str) -> tuple[fs.FileSystem, str, str]:
    """Return the file system, the path in it, and what precedes the path in a URI."""
    if "://" not in given:
        return fs.LocalFileSystem(), os.path.abspath(given), ""
    try:
        system, path = fs.FileSystem.from_uri(given)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise EvalSetError(f"{given}: cannot be opened ({_reason(error)}); give a path or another URI") from error
    return system, path, given[: len(given) - len(path)] if given.endswith(path) else given.partition("://")[0] + "://"


def check_unchanged(file: InputFile) -> None:
    """Raise EvalSetError if a file has another size or time than when the job was planned, or cannot be reached."""
    system, path, _ = file_system(file.path)
    with _errors_of(file):
        info = system.get_file_info(path)
        if (info.size, info.mtime_ns or 0) != (file.size, file.modified_ns):
            raise EvalSetError(f"{file.name}: was changed or removed since the job was planned; put it back")


def file_format(path: str) -> str | None:
    """Return "parquet", "csv", "tsv" or "jsonl", or None for another ending.

    >>> file_format("a/texts.csv.gz"), file_format("b.parquet"), file_format("c.doc")
    ('csv', 'parquet', None)
    """
    stem, ending = os.path.splitext(path.lower())
    if ending in COMPRESSIONS:
        format = FORMATS.get(os.path.splitext(stem)[1])
        return None if format == "parquet" else format  # a compressed parquet file has no end to seek
    return FORMATS.get(ending)


def _endings() -> str:
    return f"{', '.join(FORMATS)} (text files also with {', '.join(COMPRESSIONS)})"


def _reason(error: BaseException) -> str:
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)


def digest(file: InputFile) -> str:
    """Return the SHA-256 of a file; raises EvalSetError where it cannot be read."""
    system, path, _ = file_system(file.path)
    total = sha256()
    try:
        with system.open_input_stream(path, compression=None) as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    except READ_ERRORS as error:
        raise EvalSetError(f"{file.name}: cannot be read ({_reason(error)})") from error
    return total.hexdigest()


def column_names(file: InputFile) -> list[str]:
    """Return the names of a file's columns; of JSON lines, the keys of the first line."""
    with _errors_of(file):
        if file_format(file.path) == "parquet":
            system, path, _ = file_system(file.path)
            with system.open_input_file(path) as source:
                return list(pq.ParquetFile(source).schema_arrow.names)
        with closing(_open(file, 0)) as stream:
            return _Layout.read(file, stream).names
    raise AssertionError


def row_groups(file: InputFile) -> list[int]:
    """Return the number of rows of each row group of a parquet file."""
    system, path, _ = file_system(file.path)
    with _errors_of(file), system.open_input_file(path) as source:
        metadata = pq.ParquetFile(source).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    raise AssertionError


class _errors_of:
    """Raise what a damaged file raises as EvalSetError with the file's name."""

    def __init__(self, file: InputFile):
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, READ_ERRORS) and not isinstance(error, EvalSetError):
            raise EvalSetError(f"{self._file.name}: cannot be read ({_reason(error)}); write it again") from error


def read_rows(file: InputFile, piece: Piece | None, columns: Columns) -> Iterator[Rows]:
    """Read some rows of a file, or all, in small parts: memory does not depend on the size of the file.

    A text that is not UTF-8 has surrogates in place of the wrong bytes.

    Raises
    ------
    EvalSetError
        The file cannot be read, or lacks a column.
    """
    with _errors_of(file):
        if file_format(file.path) == "parquet":
            yield from _parquet_rows(file, piece, columns)
        else:
            yield from _text_rows(file, piece, columns)


# Parquet.


def _parquet_rows(file: InputFile, piece: Piece | None, columns: Columns) -> Iterator[Rows]:
    system, path, _ = file_system(file.path)
    with system.open_input_file(path) as source:
        # With a buffer, pages are read one by one, and a large row group is not held in memory.
        table = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
        schema, metadata = table.schema_arrow, table.metadata
        _check_columns(schema.names, columns, file)
        for name, is_kind, kind in ((columns.text, _is_text, "strings"), (columns.ids, _is_id, "integers or strings")):
            if name is not None and not is_kind(schema.field(name).type):
                raise EvalSetError(
                    f"{file.name}: column '{name}' must hold {kind}, not {shorten(str(schema.field(name).type), 80)}"
                )
        second = "text_b" if "text_b" in schema.names and _is_text(schema.field("text_b").type) else None
        start, stop = (piece.start, piece.stop) if piece else (0, metadata.num_rows)
        groups: list[int] = []
        first = position = 0
        for i in range(metadata.num_row_groups):
            n = metadata.row_group(i).num_rows
            if position < stop and position + n > start:
                first = position if not groups else first
                groups.append(i)
            position += n
        names = list(dict.fromkeys(name for name in (columns.text, columns.ids, second) if name))
        batches = table.iter_batches(batch_size=CHUNK_ROWS, row_groups=groups, columns=names, use_threads=False)
        position = first
        for batch in batches:
            low, high = max(start - position, 0), min(stop - position, len(batch))
            if low < high:
                part = batch.slice(low, high - low)
                yield Rows(
                    position + low,
                    _values(part.column(columns.ids)) if columns.ids else None,
                    _values(part.column(columns.text)),
                    _values(part.column(second)) if second else None,
                    [None] * (high - low),
                    0,
                )
            position += len(batch)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    views = getattr(pa.types, "is_string_view", lambda _: False)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or views(kind) or pa.types.is_null(kind)


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or (pa.types.is_integer(kind) and kind != pa.uint64())


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in binary]


# Text files.


class _Layout(NamedTuple):
    """What the first line of a text file says; of JSON lines, the line's keys."""

    format: str
    delimiter: str
    names: list[str]
    first_offset: int  # where the first row begins

    @classmethod
    def read(cls, file: InputFile, stream: io.BufferedReader) -> _Layout:
        format = file_format(file.path) or ""
        line = _read_line(stream, file)
        size = len(line)
        text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        mark = size - len(line.removeprefix(b"\xef\xbb\xbf"))
        if format == "jsonl":
            row = parse(text) if text.strip() else {}
            return cls(format, "", list(row) if isinstance(row, dict) else [], mark)
        delimiter = "\t" if format == "tsv" else max(",;\t", key=text.count)
        fields = (
            text.rstrip("\r\n").split("\t") if format == "tsv" else next(csv.reader([text], delimiter=delimiter), [])
        )
        return cls(format, delimiter, [field.strip() for field in fields], size)


def _open(file: InputFile, offset: int) -> io.BufferedReader:
    """Open a text file at a byte; a compressed one is decompressed up to there."""
    system, path, _ = file_system(file.path)
    compression = COMPRESSIONS.get(os.path.splitext(path.lower())[1])
    if compression is None:
        source = system.open_input_file(path)
        source.seek(offset)
        return io.BufferedReader(source, 1 << 20)
    reader = io.BufferedReader(system.open_input_stream(path, compression=compression), 1 << 20)
    while offset:
        skipped = len(reader.read(min(offset, 1 << 20)))
        if not skipped:
            raise EOFError("it has become shorter")
        offset -= skipped
    return reader


def _read_line(stream: io.BufferedReader, file: InputFile) -> bytes:
    line = stream.readline(MAX_LINE + 1)
    if len(line) > MAX_LINE:
        raise EvalSetError(f"{file.name}: a line is longer than {MAX_LINE // 2**20} MiB; write one row per line")
    return line


Record = tuple[dict[str, Any], str | None, int]
"""The columns of a row, why it is none, and where the next one begins."""


def _text_rows(file: InputFile, piece: Piece | None, columns: Columns) -> Iterator[Rows]:
    with closing(_open(file, 0)) as stream:
        layout = _Layout.read(file, stream)
    if layout.format != "jsonl":
        _check_columns(layout.names, columns, file)
    start, stop = (piece.start, piece.stop) if piece else (0, None)
    offset = piece.offset if piece and piece.offset else layout.first_offset
    position = start if piece and piece.offset else 0
    has_second = "text_b" in layout.names or layout.format == "jsonl"
    with closing(_open(file, offset)) as stream:
        records = _RECORDS[layout.format](stream, file, layout, offset)
        while stop is None or position < stop:
            size = CHUNK_ROWS if stop is None else min(CHUNK_ROWS, stop - position)
            taken: list[Record] = []
            limit = csv.field_size_limit(MAX_LINE)  # of the whole process: set back at once
            try:
                for record in records:
                    taken.append(record)
                    if len(taken) == size:
                        break
            finally:
                csv.field_size_limit(limit)
            if not taken:
                break
            rows = [record[0] for record in taken]
            first = max(start - position, 0)
            if first < len(rows):
                second = [row.get("text_b") for row in rows[first:]] if has_second else None
                yield Rows(
                    position + first,
                    None if columns.ids is None else [row.get(columns.ids) for row in rows[first:]],
                    [row.get(columns.text) for row in rows[first:]],
                    second,
                    [record[1] for record in taken[first:]],
                    taken[-1][2],
                )
            position += len(rows)


def _json_records(stream: io.BufferedReader, file: InputFile, _: _Layout, offset: int) -> Iterator[Record]:
    while line := _read_line(stream, file):
        offset += len(line)
        if not line.strip():
            continue
        try:
            row = parse(line.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            yield {}, "is not JSON", offset
        else:
            is_row = isinstance(row, dict)
            yield row if is_row else {}, None if is_row else "is not a JSON object", offset


def _tsv_records(stream: io.BufferedReader, file: InputFile, layout: _Layout, offset: int) -> Iterator[Record]:
    while line := _read_line(stream, file):
        offset += len(line)
        fields = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape").split("\t")
        if any(fields):
            yield *_record(fields, layout), offset


def _csv_records(stream: io.BufferedReader, file: InputFile, layout: _Layout, offset: int) -> Iterator[Record]:
    def lines() -> Iterator[str]:
        nonlocal offset
        while line := _read_line(stream, file):
            offset += len(line)
            yield line.decode("utf-8", "surrogateescape")

    for fields in csv.reader(lines(), delimiter=layout.delimiter, strict=True):  # reads the lines of one row only
        if any(fields):
            yield *_record(fields, layout), offset


_RECORDS = {"jsonl": _json_records, "tsv": _tsv_records, "csv": _csv_records}


def _record(fields: list[str], layout: _Layout) -> tuple[dict[str, Any], str | None]:
    n = len(layout.names)
    if len(fields) > n and any(fields[n:]):
        return {}, f"has {len(fields)} fields, but the header has {n}"
    row: dict[str, Any] = dict(zip(layout.names, fields, strict=False))
    if not row.get("text_b"):
        row.pop("text_b", None)  # an empty field: a single text
    return row, None


def _check_columns(names: Sequence[str], columns: Columns, file: InputFile) -> None:
    required = {columns.text: "--text-column"} | ({columns.ids: "--id-column"} if columns.ids else {})
    check_columns(list(names), required, file.name)
