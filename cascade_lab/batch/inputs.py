"""The files that a scoring job reads: finds them in folders of any file system of pyarrow, and reads rows of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from cascade_lab.exceptions import EvalSetError
from cascade_lab.text import shorten

FORMATS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
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
        raise EvalSetError(f"{given}: cannot be read ({reason_of(error)}); give texts to score") from error
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
        raise EvalSetError(f"{given}: cannot be opened ({reason_of(error)}); give a path or another URI") from error
    return system, path, given[: len(given) - len(path)] if given.endswith(path) else given.partition("://")[0] + "://"


def check_unchanged(file: InputFile) -> None:
    """Raise EvalSetError if a file has another size or time than when the job was planned, or cannot be reached."""
    system, path, _ = file_system(file.path)
    with errors_of(file):
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


def reason_of(error: BaseException) -> str:
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
        raise EvalSetError(f"{file.name}: cannot be read ({reason_of(error)})") from error
    return total.hexdigest()


class errors_of:
    """Raise what a damaged file raises as EvalSetError with the file's name."""

    def __init__(self, file: InputFile):
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, READ_ERRORS) and not isinstance(error, EvalSetError):
            raise EvalSetError(f"{self._file.name}: cannot be read ({reason_of(error)}); write it again") from error
