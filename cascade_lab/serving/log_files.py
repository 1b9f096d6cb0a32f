"""The files of a traffic log: parts in Arrow's stream format, readable up to the last whole record batch."""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cascade_lab.atomic import UNFINISHED
from cascade_lab.exceptions import RunError
from cascade_lab.locks import MAY_LOCK, try_lock
from cascade_lab.rejector import score_of
from cascade_lab.serving.answered import Answered, SeenRows, ServedCascade
from cascade_lab.text import shorten

ENDING = ".arrows"
LOGITS, RESCORED, EVIDENCE = "logits.", "rescored.", "evidence."
_HEADER, _LOST = b"cascade_lab.traffic", b"cascade_lab.lost"
_VERSION = 2
_WAY_OUT = "move the file out of the folder"


class ShadowScores(NamedTuple):
    """The texts of the sample whose turn came, and what later stages scored, when idle, of those that ended early.

    Attributes
    ----------
    cascade : ServedCascade
    ids : list of str
        Those of texts that every stage has scored already too.
    times : ndarray of float64, shape (n,)
        When each text arrived, as in `Answered`: an id may be given twice.
    scores : mapping of str to SeenRows
        Stage name to what it scored; rows count in `ids`.
    evidence : mapping of str to ndarray of float64, shape (n,)
        The rejector's scores of features, one per text; NaN where they are known already. Empty unless a rejector
        needs them.
    """

    cascade: ServedCascade
    ids: list[str]
    times: np.ndarray
    scores: Mapping[str, SeenRows]
    evidence: Mapping[str, np.ndarray]


@dataclass
class PartContent:
    """What a part holds.

    Attributes
    ----------
    path : Path
    cascade : ServedCascade or None
        None where not even the header is whole.
    shadow : float
        The share of the texts that was chosen for shadow scoring.
    batches : list of RecordBatch
        One row per answered text; a row without `predicted` is of `ShadowScores`. See `part_schema`.
    n_lost : int
        How many answered texts the service could not log meanwhile.
    n_whole_bytes : int
        Where the last whole record batch ends.
    is_finished, is_damaged : bool
        Whether the service closed the part; finished, but a record batch cannot be read.
    """

    path: Path
    cascade: ServedCascade | None = None
    shadow: float = 0.0
    batches: list[pa.RecordBatch] = field(default_factory=list)
    n_lost: int = 0
    n_whole_bytes: int = 0
    is_finished: bool = True
    is_damaged: bool = False


def part_schema(cascade: ServedCascade, *, shadow: float) -> pa.Schema:
    """Return the columns of a part, with the cascade and the shadow share as metadata.

    `example_id`; `time` (arrival, UTC); `text` and `text_b` (null unless texts are logged); `predicted` and
    `decided_by` (null in a row of `ShadowScores`); `probability` and `confidence`; `logits.<stage>` (null where the
    stage did not score the text); with mixed precision `rescored.<stage>`; `evidence.<stage>.<score>`.
    """
    columns = {"example_id": pa.string(), "time": pa.timestamp("us", "UTC")}
    columns |= dict.fromkeys(("text", "text_b", "predicted", "decided_by"), pa.string())
    columns |= dict.fromkeys(("probability", "confidence"), pa.float64())
    stages = cascade.manifest["cascade"]["stage"]
    columns |= {f"{LOGITS}{stage['name']}": pa.list_(pa.float32()) for stage in stages}
    columns |= {f"{RESCORED}{stage['name']}": pa.bool_() for stage in stages if stage.get("precision") == "mixed"}
    columns |= {f"{EVIDENCE}{name}": pa.float64() for name in _feature_evidence(stages)}
    header = {"version": _VERSION, "digest": cascade.digest, "shadow": shadow, "manifest": cascade.manifest}
    return pa.schema(list(columns.items()), metadata={_HEADER: json.dumps(header)})


def answered_batch(schema: pa.Schema, answered: Sequence[Answered], *, keep_texts: bool) -> pa.RecordBatch:
    """Return answered batches of texts as one record batch."""
    ids = [one for batch in answered for one in batch.ids]
    n = len(ids)
    starts = np.cumsum([0, *(len(batch.ids) for batch in answered)])
    times = np.concatenate([batch.times for batch in answered])
    columns: dict[str, Any] = {"example_id": _strings(ids), "time": _microseconds(times)}
    if keep_texts:
        columns["text"] = _strings([text for batch in answered for text in batch.texts])
        columns["text_b"] = _strings([t for batch in answered for t in batch.texts_b or [None] * len(batch.ids)])
    for name in ("predicted", "decided_by"):
        columns[name] = _strings([value for batch in answered for value in batch.predictions[name].tolist()])
    for name in ("probability", "confidence"):
        columns[name] = pa.array(np.concatenate([batch.predictions[name] for batch in answered]))
    stages = [name.removeprefix(LOGITS) for name in schema.names if name.startswith(LOGITS)]
    for stage in stages:
        seen = [(start, batch.scores[stage]) for start, batch in zip(starts, answered, strict=False)]
        columns[f"{LOGITS}{stage}"] = _lists([(one.rows + start, one.logits) for start, one in seen], n)
        if f"{RESCORED}{stage}" in schema.names:
            columns[f"{RESCORED}{stage}"] = _flags([(one.rows + start, one.rescored) for start, one in seen], n)
    for name in schema.names:
        if name.startswith(EVIDENCE):
            values, key = np.full(n, np.nan), name.removeprefix(EVIDENCE)
            for start, batch in zip(starts, answered, strict=False):
                if key in batch.evidence:
                    values[start : start + len(batch.ids)] = batch.evidence[key]
            columns[name] = pa.array(values, from_pandas=True)
    return _batch(schema, columns, n)


def shadow_batch(schema: pa.Schema, shadow: ShadowScores) -> pa.RecordBatch:
    """Return shadow scores as a record batch."""
    n = len(shadow.ids)
    columns: dict[str, Any] = {"example_id": _strings(shadow.ids), "time": _microseconds(shadow.times)}
    columns |= {f"{LOGITS}{stage}": _lists([(seen.rows, seen.logits)], n) for stage, seen in shadow.scores.items()}
    columns |= {f"{RESCORED}{stage}": _flags([(seen.rows, seen.rescored)], n) for stage, seen in shadow.scores.items()}
    columns |= {f"{EVIDENCE}{name}": pa.array(values) for name, values in shadow.evidence.items()}
    return _batch(schema, columns, n)


class PartWriter:
    """A part that is being written: `<name>.arrows.unfinished`, which becomes `<name>.arrows`.

    A record batch is in the file wholly, or the file is as it was before. The system keeps what was written if the
    process is killed. The file is locked while its process lives.
    """

    def __init__(self, folder: Path, cascade: ServedCascade, *, shadow: float):
        self.cascade, self.started = cascade, time.monotonic()
        self.schema = part_schema(cascade, shadow=shadow)
        self._header = self.schema.serialize()
        self.n_bytes = 0
        self.path, self._descriptor = _new_part(folder)
        try:
            self._append(self._header)
        except BaseException:
            os.close(self._descriptor)
            with suppress(OSError):
                self.path.unlink()
            raise

    def write(self, batch: pa.RecordBatch, *, n_lost: int) -> None:
        """Append a record batch; raises OSError, with the file as it was."""
        sink = pa.BufferOutputStream()
        writer = pa.ipc.new_stream(sink, self.schema)
        writer.write_batch(batch, custom_metadata={_LOST: str(n_lost)})
        # Without the schema, which is in the file already, and the end of the stream, which `close` would write.
        self._append(sink.getvalue()[self._header.size :])

    def is_in_place(self) -> bool:
        """Return whether the part is still where it was begun; False where somebody deleted or moved it."""
        return _is_at(self.path, self._descriptor)

    def is_deleted(self) -> bool:
        """Return whether the file has no name any longer: what was written to it is lost."""
        return os.fstat(self._descriptor).st_nlink == 0

    def finish(self) -> None:
        """Close the part and give it the name of a whole one; without a record batch, delete it."""
        try:
            os.fsync(self._descriptor)
            if MAY_LOCK:  # while it is locked, no starting service takes it for the part of a killed one
                self._rename()
        finally:
            os.close(self._descriptor)
        if not MAY_LOCK:  # Windows renames no open file
            self._rename()

    def _rename(self) -> None:
        if self.n_bytes > self._header.size:
            os.rename(self.path, _finished(self.path))
        else:
            os.unlink(self.path)

    def _append(self, content: pa.Buffer) -> None:
        rest = memoryview(content)
        try:
            while len(rest):
                rest = rest[os.write(self._descriptor, rest) :]
        except BaseException:
            os.ftruncate(self._descriptor, self.n_bytes)
            os.lseek(self._descriptor, self.n_bytes, os.SEEK_SET)
            raise
        self.n_bytes += len(content)


def _new_part(folder: Path) -> tuple[Path, int]:
    """Make the file of a part and lock it; return its path and descriptor."""
    for _ in range(10):
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}{ENDING}"
        path = folder / f"{name}{UNFINISHED}"
        # The log tells what people wrote: nobody but the service's user reads it.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            # A starting service may take the file, while it is empty, for the part of a killed one, and delete it.
            if try_lock(descriptor) is not False and _is_at(path, descriptor):
                return path, descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def list_parts(folder: Path) -> list[Path]:
    """Return the parts in a folder by name, finished or not; raises RunError where there is no such folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror or error}); give the folder of a log") from error
    # A part may get its finished name while the folder is listed.
    unfinished = [name for name in names if name.endswith(f"{ENDING}{UNFINISHED}")]
    left = [name for name in unfinished if name.removesuffix(UNFINISHED) not in names]
    return [folder / name for name in sorted([*left, *(name for name in names if name.endswith(ENDING))])]


def read_part(path: Path) -> PartContent:
    """Read the whole record batches of a part, also where its service still writes it or was killed.

    Raises
    ------
    RunError
        The file cannot be read, is no part of a traffic log, or is one of another version of the package.
    """
    try:
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # finished meanwhile, or removed because it was empty
            path = _finished(path)
            if not path.exists():
                return PartContent(path)
            content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}); {_WAY_OUT}") from error
    part = PartContent(path, is_finished=path.name.endswith(ENDING))
    source = pa.BufferReader(content)
    try:
        reader = pa.ipc.open_stream(source)
    except (pa.ArrowException, OSError, ValueError) as error:
        if part.is_finished or not _is_cut(content):
            raise RunError(f"{path}: is no part of a traffic log ({_reason(error)}); {_WAY_OUT}") from error
        return part
    header = _read_header(reader.schema, path)
    part.cascade = ServedCascade(header["digest"], header["manifest"])
    part.shadow = float(header["shadow"])
    if not reader.schema.equals(part_schema(part.cascade, shadow=part.shadow)):
        raise RunError(f"{path}: its columns are not those of its cascade; {_WAY_OUT}")
    part.n_whole_bytes = source.tell()
    while part.n_whole_bytes < len(content):
        try:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
            n_lost = int((metadata or {}).get(_LOST, 0))
        except (pa.ArrowException, OSError, ValueError, StopIteration):
            part.is_damaged = part.is_finished
            break
        part.batches.append(batch)
        part.n_lost += n_lost
        part.n_whole_bytes = source.tell()
    return part


def finish_left_parts(folder: Path) -> None:
    """Finish the parts of services that were killed: cut them after the last whole record batch, and rename them."""
    for path in list_parts(folder):
        if path.name.endswith(UNFINISHED):
            with suppress(OSError, RunError):
                _finish_left_part(path)


def _finish_left_part(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if not try_lock(descriptor):  # its service lives, or the system has no locks
            return
        part = read_part(path)
        if part.batches:
            os.ftruncate(descriptor, part.n_whole_bytes)
            os.fsync(descriptor)
            os.rename(path, _finished(path))
        elif part.path == path:
            os.unlink(path)
    finally:
        os.close(descriptor)


def _finished(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(UNFINISHED))


def _read_header(schema: pa.Schema, path: Path) -> dict[str, Any]:
    try:
        header = json.loads((schema.metadata or {})[_HEADER])
        version, manifest = header["version"], header["manifest"]
        is_usable = (
            isinstance(header["digest"], str)
            and isinstance(manifest["cascade"]["name"], str)
            and 0 <= header["shadow"] <= 1
            and all(
                isinstance(stage["name"], str) and isinstance(stage["labels"], list)
                for stage in manifest["cascade"]["stage"]
            )
            and manifest["cascade"]["stage"]
        )
    except (LookupError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{path}: is no part of a traffic log (it names no cascade); {_WAY_OUT}") from error
    if version != _VERSION:
        raise RunError(
            f"{path}: has version {shorten(str(version), 40)}, and this package reads {_VERSION}; collect it with the "
            "version of the package that wrote it"
        )
    if not is_usable:
        raise RunError(f"{path}: is no part of a traffic log (its header is damaged); {_WAY_OUT}")
    return dict(header)


def _is_cut(content: bytes) -> bool:
    """Return whether a file ends before its header does; a stream begins with FFFFFFFF and the header's length."""
    return len(content) < 8 or (
        content[:4] == b"\xff" * 4 and len(content) < 8 + int.from_bytes(content[4:8], "little", signed=True)
    )


def _feature_evidence(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for stage in stages for name in (stage.get("rejector") or {}).get("evidence", ())]
    return list(dict.fromkeys(name for name in names if score_of(name).of_features))


def _batch(schema: pa.Schema, columns: Mapping[str, Any], n: int) -> pa.RecordBatch:
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(n, field.type) for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _lists(parts: Sequence[tuple[np.ndarray, np.ndarray]], n: int) -> pa.ListArray:
    """Return the logits of some of `n` rows as lists, null in the other rows. Rows increase over all parts."""
    rows = np.concatenate([np.arange(0), *(rows for rows, _ in parts)]).astype(np.int64)
    flat = [np.ascontiguousarray(logits, dtype=np.float32).ravel() for rows, logits in parts if len(rows)]
    values = np.concatenate([np.empty(0, dtype=np.float32), *flat])
    is_scored = np.zeros(n, dtype=bool)
    is_scored[rows] = True
    size = len(values) // max(len(rows), 1)
    offsets = np.concatenate([[0], np.cumsum(is_scored) * size]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(~is_scored))


def _flags(parts: Sequence[tuple[np.ndarray, np.ndarray | None]], n: int) -> pa.BooleanArray:
    """Return what is true of some of `n` rows, null in the other rows."""
    values = np.full(n, None, dtype=object)
    for rows, flags in parts:
        values[rows] = flags
    return pa.array(values, pa.bool_())


def _microseconds(times: np.ndarray) -> pa.Array:
    return pa.array((np.asarray(times, dtype=np.float64) * 1e6).round().astype(np.int64))


def _strings(values: Sequence[str | None]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # half a surrogate pair
        return pa.array([v if v is None else v.encode("utf-8", "replace").decode() for v in values], pa.string())


def _reason(error: Exception) -> str:
    return shorten(str(error).partition("\n")[0], 100)
