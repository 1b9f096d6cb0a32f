"""Reads eval sets from parquet, within bounds of memory, with the class names of Hugging Face's datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.evalset_files import Required, Row, check_columns, of_split
from cascade_lab.exceptions import EvalSetError
from cascade_lab.json_files import parse
from cascade_lab.text import shorten

MAX_BYTES = 2**30  # of decoded values: a small parquet file can repeat a text a million times


def read_parquet(content: bytes, path: str, *, split: str | None = None, required: Required = ()) -> Iterator[Row]:
    """Read the rows of a parquet file; the parameters are those of `evalset_files.read_rows`.

    Where Hugging Face's datasets wrote numbers of classes (a ClassLabel), the rows have the names of the classes.

    Raises
    ------
    EvalSetError
        The file cannot be read, or its values take more than `MAX_BYTES`. The message names the file.
    """
    return of_split(_rows(content, path, required), split, path)


def _rows(content: bytes, path: str, required: Required) -> Iterator[Row]:
    try:
        schema = pq.ParquetFile(pa.BufferReader(content)).schema_arrow
        names = [name.strip() for name in schema.names]
        check_columns(names, required, path)
        # As a dictionary, a text that is repeated a million times takes the memory of one.
        types = {field.name: field.type for field in schema}
        texts = [name for name, one in types.items() if pa.types.is_string(one) or pa.types.is_large_string(one)]
        file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts)
        groups = (file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        n_bytes = max(sum(groups), 16 * file.metadata.num_rows * len(names))
        _check_size(n_bytes, path)
        class_labels = _class_labels(schema)
        size = 64 if any(map(pa.types.is_nested, types.values())) else 1024
        number, n_bytes = 0, 0
        for batch in file.iter_batches(batch_size=size):
            columns = {}
            for name, values in zip(names, batch.columns, strict=True):
                columns[name], n = _cells(values, f"{path}: column '{name}'")
                n_bytes += n
                if name in class_labels and pa.types.is_integer(values.type):
                    columns[name] = _class_names(columns[name], class_labels[name], name, number, path)
            _check_size(n_bytes, path)
            for cells in zip(*columns.values(), strict=True):
                number += 1
                yield f"row {number}", dict(zip(names, cells, strict=True))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise EvalSetError(f"{path}: not a readable parquet file ({reason}); write it again") from error


def _check_size(n_bytes: int, path: str) -> None:
    if n_bytes > MAX_BYTES:
        limit = f"{MAX_BYTES / 2**30:.3g} GiB"
        raise EvalSetError(f"{path}: its values take more than {limit} of memory; split the file, or drop columns")


def _cells(values: pa.Array, where: str) -> tuple[list[Any], int]:
    """Return the values of a column, equal texts as one object, and their size in bytes."""
    try:
        if not pa.types.is_dictionary(values.type):
            return values.to_pylist(), values.nbytes
        indices, dictionary = values.indices.to_pylist(), values.dictionary
        known = {i: None if i is None else dictionary[i].as_py() for i in set(indices)}
        sizes = {i: len(value) if isinstance(value, str) else 8 for i, value in known.items()}
        return [known[i] for i in indices], sum(sizes[i] for i in indices)
    except (ValueError, OverflowError, LookupError, TypeError) as error:  # dates, time zones, and bytes of no meaning
        reason = shorten(str(error), 100)
        raise EvalSetError(
            f"{where} has a value that cannot be read ({reason}); drop it or write it as text"
        ) from error


def _class_labels(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes that Hugging Face's datasets keep beside a column of their numbers."""
    try:
        content = parse((schema.metadata or {})[b"huggingface"])
        features = content["info"]["features"].items()
        named = {name: feature["names"] for name, feature in features if feature.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        name: names
        for name, names in named.items()
        if isinstance(names, list) and all(isinstance(one, str) for one in names)
    }


def _class_names(
    numbers: list[int | None], names: Sequence[str], column: str, n_before: int, path: str
) -> list[str | None]:
    """Return the names of numbered classes; -1 stands for a text without a label."""
    for row, number in enumerate(numbers, n_before + 1):
        if number is not None and not -1 <= number < len(names):
            raise EvalSetError(
                f"{path} row {row}: {column} is {number}, but the file names the classes 0 to {len(names) - 1}; fix it"
            )
    return [None if number is None or number < 0 else names[number] for number in numbers]
