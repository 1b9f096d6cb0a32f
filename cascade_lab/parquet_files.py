"""Reads parquet tables that may be damaged or come from somebody else: columns checked, within bounds of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cascade_lab.exceptions import RunError
from cascade_lab.text import shorten

MAX_BYTES = 2**30  # of the texts and numbers of a table: a small file can repeat a text a million times
_BUFFER = 2**20  # bytes of a column that pyarrow reads at once; otherwise it reads the whole column
DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError)
"""What pyarrow and pandas raise at a damaged file, or at a value that they cannot hold."""

STRING, NUMBER, WHOLE, BOOL = "strings", "numbers", "whole numbers", "true or false"
_IS_KIND = {
    STRING: lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind),
    NUMBER: lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    WHOLE: pa.types.is_integer,
    BOOL: pa.types.is_boolean,
}


def bounded_table(
    file: BinaryIO,
    path: Path,
    columns: Mapping[str, str],
    *,
    way_out: str,
    only: list[str] | None = None,
    limit: int | None = None,
) -> pa.Table:
    """Read a table whose values take at most `limit` bytes; a small file can declare more than fits into memory.

    Parameters
    ----------
    file : binary file
        Open for reading.
    path : Path
        Its name, for messages.
    columns : mapping of str to str
        The columns that it must have, and what they hold: `STRING`, `NUMBER`, `WHOLE` or `BOOL`.
    way_out : str
        The end of each message: what the user can do.
    only : list of str, optional
        Read these columns only.
    limit : int, optional
        By default `MAX_BYTES`.

    Raises
    ------
    RunError
        A column is missing, is there twice, or holds something else; the values take too much memory. What pyarrow
        raises at a damaged file (see `DAMAGE`) is not caught.
    """
    return joined(list(bounded_batches(file, path, columns, way_out=way_out, only=only, limit=limit)), file, only)


def bounded_batches(
    file: BinaryIO,
    path: Path,
    columns: Mapping[str, str],
    *,
    way_out: str,
    only: list[str] | None = None,
    limit: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield a table part by part, so that a large one need not be in memory twice; arguments as for `bounded_table`.

    Texts are encoded as dictionaries (see `joined`).

    Raises
    ------
    RunError
        As `bounded_table`.
    """
    schema = pq.ParquetFile(file).schema_arrow
    check_columns(schema, columns, path, way_out=way_out)
    names = schema.names if only is None else only
    kinds = {name: schema.field(name).type for name in names}
    # As a dictionary, a text that is repeated a million times takes the memory of one.
    texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    parquet = pq.ParquetFile(file, read_dictionary=texts, buffer_size=_BUFFER, pre_buffer=False)
    check_size(8 * parquet.metadata.num_rows * len(names), path, way_out, limit)
    # The metadata of column chunks is not asked for sizes: pyarrow ends the process if they are damaged.
    is_nested = any(map(pa.types.is_nested, kinds.values()))
    size = 1024 if is_nested and limit is None else 16384
    n_bytes = 0
    for batch in parquet.iter_batches(batch_size=size, columns=only):
        n_bytes += sum(_n_bytes(column) for column in batch.columns)
        check_size(n_bytes, path, way_out, limit)
        yield pa.RecordBatch.from_arrays([_with_own_dictionary(column) for column in batch.columns], batch.schema.names)


def joined(batches: list[pa.RecordBatch], file: BinaryIO, only: list[str] | None) -> pa.Table:
    """Return the parts that `bounded_batches` yields as one table, its columns in the types that the file declares.

    What pyarrow raises at texts that are not UTF-8 is not caught.
    """
    schema = pq.ParquetFile(file).schema_arrow
    names = schema.names if only is None else only
    wanted = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
    if not batches:
        return wanted.empty_table()
    table = pa.Table.from_batches(batches).select(names)
    table.validate(full=True)  # texts that are not UTF-8
    return table if table.schema.equals(wanted) else table.cast(wanted)


def _with_own_dictionary(column: pa.Array) -> pa.Array:
    """Return a column whose dictionary has no more texts than the column; pyarrow's has those of all parts so far."""
    if not pa.types.is_dictionary(column.type) or len(column.dictionary) <= len(column):
        return column
    return column.dictionary_decode().dictionary_encode()


def _n_bytes(column: pa.Array) -> int:
    """Return the bytes that a column takes once each text is written out."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).take(column.indices)
    return int(pc.sum(lengths).as_py() or 0) + 8 * len(column)


def check_columns(schema: pa.Schema, columns: Mapping[str, str], path: Path, *, way_out: str) -> None:
    """Raise RunError where a column is missing, is there twice, or holds something else."""
    for name, kind in columns.items():
        if schema.names.count(name) != 1:
            n_columns = "two columns are" if name in schema.names else "no column is"
            raise RunError(f"{path}: {n_columns} named '{name}'; {way_out}")
        found = schema.field(name).type
        if not _IS_KIND[kind](found):
            raise RunError(f"{path}: column '{name}' must hold {kind}, not {shorten(str(found), 80)}; {way_out}")
    if len(set(schema.names)) < len(schema.names):
        raise RunError(f"{path}: two columns have the same name; {way_out}")


def check_size(n_bytes: int, path: Path, way_out: str, limit: int | None) -> None:
    """Raise RunError where the values of a table take more than `limit` bytes."""
    limit = MAX_BYTES if limit is None else limit
    if n_bytes > limit:
        raise RunError(f"{path}: its values take more than {limit / 2**30:.3g} GiB of memory; {way_out}")
