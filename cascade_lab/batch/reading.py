"""Reads rows of one input file in small parts: parquet, csv, tsv and JSON lines, from any row on."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.batch.inputs import COMPRESSIONS, InputFile, errors_of, file_format, file_system
from cascade_lab.evalset_files import check_columns
from cascade_lab.exceptions import EvalSetError
from cascade_lab.json_files import parse
from cascade_lab.text import shorten

CHUNK_ROWS = 1024
MAX_LINE = 2**26  # bytes; a longer line is no line of texts


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


def column_names(file: InputFile) -> list[str]:
    """Return the names of a file's columns; of JSON lines, the keys of the first line."""
    with errors_of(file):
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
    with errors_of(file), system.open_input_file(path) as source:
        metadata = pq.ParquetFile(source).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    raise AssertionError


def read_rows(file: InputFile, piece: Piece | None, columns: Columns) -> Iterator[Rows]:
    """Read some rows of a file, or all, in small parts: memory does not depend on the size of the file.

    A text that is not UTF-8 has surrogates in place of the wrong bytes.

    Raises
    ------
    EvalSetError
        The file cannot be read, or lacks a column.
    """
    with errors_of(file):
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
