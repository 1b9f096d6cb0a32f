"""The files of one shard in the output: parquet parts that appear whole, and a manifest that appears last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.atomic import write_file, write_json
from cascade_lab.batch.inputs import InputFile
from cascade_lab.batch.reading import Columns, Piece
from cascade_lab.exceptions import RunError
from cascade_lab.json_files import read_object
from cascade_lab.provenance import sha256

PREDICTIONS = "predictions"
ROW_GROUP = 65_536
"""About this number of rows are a row group of a part."""


class Shard(NamedTuple):
    """Everything that a worker must know of a shard: it needs no other file than the input's and the cascade's.

    Attributes
    ----------
    number : int
    pieces : tuple of Piece
        Their `file` counts in `files`.
    files : tuple of InputFile
    sha256 : tuple of str
        That of each file when the job was planned.
    columns : Columns
    id_type : str
        "int64" or "string".
    """

    number: int
    pieces: tuple[Piece, ...]
    files: tuple[InputFile, ...]
    sha256: tuple[str, ...]
    columns: Columns
    id_type: str

    @property
    def n_rows(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


class Settings(NamedTuple):
    """What is kept of each text, and by which cascade: the same for all shards.

    Attributes
    ----------
    cascade : str
        The absolute path of the `cascade.toml`.
    digest : str
        That of the cascade: see `ServedCascade`.
    keep : tuple of str
        Some of "scores" and "features", or nothing.
    sample : float
        The share of the texts of which these are kept.
    shadow : bool
        Let every stage score these texts, also those that ended before it.
    folder : str
        The absolute path of the output.
    """

    cascade: str
    digest: str
    keep: tuple[str, ...]
    sample: float
    shadow: bool
    folder: str


def part_path(folder: Path, table: str, number: int) -> Path:
    """Return the path of a shard's part of a table: "predictions", "examples", "scores/<stage>", ….

    >>> part_path(Path("scored"), "scores/gate", 7).as_posix()
    'scored/scores/gate/part-00007.parquet'
    """
    return folder / table / f"part-{number:05}.parquet"


def manifest_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's manifest."""
    return folder / "shards" / f"{number:05}.json"


def read_shard_manifest(folder: Path, number: int, digest: str) -> dict[str, Any] | None:
    """Return the manifest of a shard that is done, or None.

    Raises
    ------
    RunError
        The manifest is damaged or of another cascade, or a part is missing or has another size.
    """
    path = manifest_path(folder, number)
    if not path.exists():
        return None
    way_out = f"delete {path}, and the same command scores the shard again"
    manifest = read_object(path, error=RunError, way_out=way_out)
    if manifest.get("cascade_digest") != digest:
        raise RunError(f"{path}: is of another cascade; {way_out}")
    for name, facts in manifest.get("parts", {}).items():
        part = folder / name
        if not part.is_file() or part.stat().st_size != facts["n_bytes"]:
            raise RunError(f"{part}: is missing or was changed; {way_out}")
    return manifest


class PartWriter:
    """Writes the tables of a shard block by block, in row groups of `ROW_GROUP` rows or a little more."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", version="2.6", write_statistics=True)
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        """Add rows."""
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        table = pa.concat_tables(self._waiting).combine_chunks()
        if len(table):
            self._writer.write_table(table, row_group_size=len(table))
        self._waiting = []

    def close(self) -> None:
        """Write the rest and the end of the file."""
        if self._waiting:
            self._flush()
        self._writer.close()


def write_parts(folder: Path, number: int, blocks: Iterator[dict[str, pa.Table]]) -> dict[str, dict[str, Any]]:
    """Write the parts of a shard; none of them is there before all are whole, and the predictions come last.

    Returns
    -------
    dict
        Path of a part, relative to `folder`, to its `sha256` and `n_bytes`.
    """
    first = next(blocks)
    names = sorted(first, key=lambda name: name == PREDICTIONS)

    def write(remaining: Sequence[str], partials: dict[str, Path]) -> None:
        """Let `write_file` give a temporary path per part, write all, and let it rename them in turn."""
        if remaining:
            # The last to be opened is the first to be renamed.
            path = part_path(folder, remaining[0], number)
            write_file(path, lambda partial: write(remaining[1:], {**partials, remaining[0]: partial}), error=RunError)
            return
        with _writers(partials, first) as writers:
            for tables in _chain(first, blocks):
                for name, table in tables.items():
                    writers[name].add(table)

    write(names[::-1], {})
    paths = [part_path(folder, name, number) for name in names]
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "n_bytes": path.stat().st_size} for path in paths
    }


@contextmanager
def _writers(partials: dict[str, Path], tables: dict[str, pa.Table]) -> Iterator[dict[str, PartWriter]]:
    with ExitStack() as closing:
        writers = {}
        for name, path in partials.items():
            writers[name] = PartWriter(path, tables[name].schema)
            closing.callback(writers[name].close)
        yield writers


def _chain(first: dict[str, pa.Table], rest: Iterator[dict[str, pa.Table]]) -> Iterator[dict[str, pa.Table]]:
    yield first
    yield from rest


def write_shard_manifest(folder: Path, number: int, content: dict[str, Any]) -> None:
    """Write the manifest of a shard, which says that its parts are whole."""
    write_json(manifest_path(folder, number), content, error=RunError)
