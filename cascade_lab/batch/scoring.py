"""Scores one shard: the one function that both engines call. Its files depend on the shard and the cascade alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cascade_lab.batch.inputs import check_unchanged
from cascade_lab.batch.kept_tables import kept_tables
from cascade_lab.batch.plan import is_whole
from cascade_lab.batch.reading import Piece, Rows, read_rows
from cascade_lab.batch.shards import PREDICTIONS, Settings, Shard, write_parts, write_shard_manifest
from cascade_lab.batch.summary import Counts
from cascade_lab.cascade import Cascade
from cascade_lab.chunks import ChunkResult
from cascade_lab.exceptions import CheckpointError, EvalSetError
from cascade_lab.serving.live_cascade import cascade_digest
from cascade_lab.spec import CascadeSpec

BLOCK = 8192
"""The most texts of a block. A stage sorts the texts of a block by length, so that batches need no padding."""
BLOCK_CHARACTERS = 2**24
"""A block of long texts has fewer: it ends where it has this number of characters."""
NO_TEXT, NO_ID, NOT_FINITE = "has no text", "has no id", "gets a logit that is not finite"


class Block(NamedTuple):
    """Consecutive rows of a shard, checked: row i of everything belongs together.

    Attributes
    ----------
    ids : list of int or str, or None
        None where a row has none.
    texts : list of str
        Empty where the row has an error.
    texts_b : list of str or None, or None
        None where no row has a second text.
    errors : list of str or None
        Why a row cannot be scored.
    """

    ids: list[Any]
    texts: list[str]
    texts_b: list[str | None] | None
    errors: list[str | None]


def load_for_scoring(settings: Settings) -> Cascade:
    """Load the cascade of a job so that scores do not depend on the number of cores.

    Raises
    ------
    CascadeLabError
        It cannot be loaded, or is no longer the one of the job.
    """
    spec = CascadeSpec.read(settings.cascade)
    if cascade_digest(spec) != settings.digest:
        raise CheckpointError(f"{settings.cascade}: was changed since the job began; put it back")
    return Cascade.load(spec, keep_features="features" in settings.keep, n_workers=1)


def score_shard(
    cascade: Cascade,
    shard: Shard,
    settings: Settings,
    *,
    threads: int = 1,
    block: int = BLOCK,
    done: Callable[[int, int], object] = lambda n_texts, n_errors: None,
) -> dict[str, Any]:
    """Score a shard and write its files; return its manifest.

    Parameters
    ----------
    cascade : Cascade
        From `load_for_scoring`.
    shard : Shard
    settings : Settings
    threads : int
        The number of threads, each of which scores blocks. The files do not depend on it.
    block : int
        The most texts of a block. The last bits of a score depend on it, so a job has one value.
    done : callable
        Called after each block with the number of its rows, and of those that cannot be scored.

    Raises
    ------
    EvalSetError
        A file of the input cannot be read, or was changed.
    CascadeLabError
        No text of a block can be scored, or the output cannot be written.
    """
    counts = Counts.empty([stage.spec.name for stage in cascade.stages])

    def scored_blocks() -> Iterator[dict[str, pa.Table]]:
        def score(one: Block) -> tuple[dict[str, pa.Table], Counts]:
            return score_block(cascade, one, settings, shard.id_type)

        for tables, of_block in _in_order(score, read_blocks(shard, block), threads):
            counts.add(of_block)
            yield tables
            done(of_block.n_texts, of_block.n_errors)

    folder = Path(settings.folder)
    parts = write_parts(folder, shard.number, scored_blocks())
    manifest = {
        "shard": shard.number,
        "cascade_digest": settings.digest,
        "input": [_described(shard, piece) for piece in shard.pieces],
        "parts": parts,
        "stages": {stage.spec.name: stage.settings for stage in cascade.stages},
        **counts.to_dict(),
    }
    write_shard_manifest(folder, shard.number, manifest)
    return manifest


def _described(shard: Shard, piece: Piece) -> dict[str, Any]:
    file = shard.files[piece.file].name
    return {"file": file, "sha256": shard.sha256[piece.file], "rows": [piece.start, piece.stop]}


def _in_order(function: Callable[[Block], Any], blocks: Iterator[Block], threads: int) -> Iterator[Any]:
    """Apply a function in threads; results come in the order of the blocks, and few blocks are held."""
    if threads == 1:
        yield from map(function, blocks)
        return
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Any]] = deque()
        for block in blocks:
            running.append(pool.submit(function, block))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def read_blocks(shard: Shard, size: int) -> Iterator[Block]:
    """Read a shard in blocks of `size` rows, or of fewer where texts are long.

    Raises
    ------
    EvalSetError
        A file cannot be read, or was changed since the job was planned.
    """
    ids: list[Any] = []
    texts: list[str] = []
    texts_b: list[str | None] = []
    errors: list[str | None] = []
    n_characters = 0
    for piece in shard.pieces:
        file, n_read = shard.files[piece.file], 0
        check_unchanged(file)
        for rows in read_rows(file, piece, shard.columns):
            n_read += len(rows.texts)
            for one, text, second, error in _checked(rows, file.name, shard.id_type):
                ids.append(one)
                texts.append(text)
                texts_b.append(second)
                errors.append(error)
                n_characters += len(text)
                if len(texts) == size or n_characters >= BLOCK_CHARACTERS:
                    yield _block(ids, texts, texts_b, errors)
                    ids, texts, texts_b, errors, n_characters = [], [], [], [], 0
        if n_read != piece.stop - piece.start:
            raise EvalSetError(f"{file.name}: has fewer rows than when the job was planned; put it back")
    if texts:
        yield _block(ids, texts, texts_b, errors)


def _block(ids: list[Any], texts: list[str], texts_b: list[str | None], errors: list[str | None]) -> Block:
    return Block(ids, texts, texts_b if any(text is not None for text in texts_b) else None, errors)


def _checked(rows: Rows, name: str, id_type: str) -> Iterator[tuple[Any, str, str | None, str | None]]:
    """Give the id, the texts and the error of each row. A row without an id says its place in the error."""
    seconds: Sequence[Any] = rows.texts_b or [None] * len(rows.texts)
    made = rows.ids is None
    ids: Sequence[Any] = rows.ids or [None] * len(rows.texts)
    for i, (one, text, second, error) in enumerate(zip(ids, rows.texts, seconds, rows.errors, strict=True)):
        place = f"{name}:{rows.start + i + 1}"
        one = place if made else _id(one, id_type)
        error = error or (NO_ID if one is None else None) or _text_error(text, "text")
        error = error or (None if second is None else _text_error(second, "text_b"))
        if error is None:
            yield one, text, second, None
        else:
            yield one, "", None, error if one is not None else f"{place}: {error}"


def _id(value: Any, id_type: str) -> Any:
    """Return an id of the job's type, or None where there is none."""
    if id_type == "int64":
        return value if is_whole(value) else None
    if isinstance(value, int | str) and not isinstance(value, bool):
        text = str(value)
        return text if _is_utf8(text) else None
    return None


def _text_error(text: Any, column: str) -> str | None:
    if isinstance(text, str):
        return None if _is_utf8(text) else f"{column} is not UTF-8"
    return NO_TEXT if text is None else f"{column} is no string"


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def score_block(cascade: Cascade, block: Block, settings: Settings, id_type: str) -> tuple[dict[str, pa.Table], Counts]:
    """Score a block; return the tables of its rows, and what is counted.

    Raises
    ------
    CheckpointError
        No logits of the block are finite.
    """
    n, errors = len(block.ids), np.array([*block.errors, None], dtype=object)[:-1]
    rows = np.flatnonzero([error is None for error in block.errors])
    results = list(_answers(cascade, block, rows))
    scored = np.concatenate([np.arange(0), *(own for own, _ in results)])
    if len(rows) and not len(scored):
        # One text again, for the message that names the stage and the label.
        texts = [block.texts[rows[0]]]
        cascade.answer(cascade.stages[0].encode(texts, None), texts, None)
    errors[np.setdiff1d(rows, scored)] = NOT_FINITE
    counts = Counts.empty([stage.spec.name for stage in cascade.stages])
    counts.add_errors(n, [error for error in errors if error is not None])
    columns: dict[str, Any] = {name: np.full(n, None, dtype=object) for name in ("predicted", "decided_by")}
    columns |= {name: np.full(n, np.nan) for name in ("probability", "confidence")}
    for own, result in results:
        counts.add_result(result)
        for name, values in columns.items():
            values[own] = getattr(result.routed, name)
    tables = {
        PREDICTIONS: pa.table(
            {
                "example_id": pa.array(block.ids, pa.int64() if id_type == "int64" else pa.string()),
                "predicted": pa.array(columns["predicted"], pa.string()),
                "decided_by": pa.array(columns["decided_by"], pa.string()),
                "probability": pa.array(columns["probability"], pa.float64(), from_pandas=True),
                "confidence": pa.array(columns["confidence"], pa.float64(), from_pandas=True),
                "error": pa.array(errors, pa.string()),
            }
        )
    }
    if settings.keep:
        kept = [kept_tables(cascade, block, own, result, settings) for own, result in results]
        kept = kept or [kept_tables(cascade, block, np.arange(0), None, settings)]
        tables |= {name: pa.concat_tables([one[name] for one in kept]) for name in kept[0]}
    return tables, counts


def _answers(cascade: Cascade, block: Block, rows: np.ndarray) -> Iterator[tuple[np.ndarray, ChunkResult]]:
    """Score rows. Where logits are not finite, halve the rows until the texts that cause it are alone: left out."""
    if not len(rows):
        return
    texts = [block.texts[row] for row in rows]
    second = None if block.texts_b is None else [block.texts_b[row] for row in rows]
    try:
        result = cascade.answer(cascade.stages[0].encode(texts, second), texts, second)
    except CheckpointError:
        for half in np.array_split(rows, 2) if len(rows) > 1 else ():
            yield from _answers(cascade, block, half)
    else:
        yield rows, result
