"""Makes a run of a service's traffic log, whose replay equals what was answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cascade_lab.exceptions import RunError, SpecError
from cascade_lab.label_files import LabelFile, join_labels
from cascade_lab.run import Run, StageScores
from cascade_lab.run_directory import new_run_id
from cascade_lab.run_schema import SCHEMA_VERSION
from cascade_lab.run_tables import TIMING_COLUMNS, examples_frame, predictions_frame
from cascade_lab.serving.answered import ServedCascade
from cascade_lab.serving.log_files import EVIDENCE, LOGITS, RESCORED, list_parts, part_schema, read_part
from cascade_lab.serving.shadow import is_chosen
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import shorten


@dataclass(frozen=True)
class Collected:
    """A run of a traffic log, and what a person should know about it.

    Attributes
    ----------
    run : Run
        In memory. Where the service logged no texts, each text is the id.
    n_lost : int
        Texts that the service answered and could not log, in the parts of this cascade, of any time.
    n_repeated : int
        Answered texts that were left out, because an earlier one has the same id.
    n_differing : int
        Texts for which a replay gives another answer than the service gave. 0 unless logits were changed, or another
        processor rounds differently.
    n_unscored : int
        Texts that were chosen for the sample and are left out: the service did not get to them.
    notes : tuple of str
        Sentences about these numbers and about parts that are not whole; none where there is nothing to say.
    """

    run: Run
    n_lost: int
    n_repeated: int
    n_differing: int
    n_unscored: int
    notes: tuple[str, ...] = ()


def collect(
    folder: str | Path,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    digest: str = "",
    sample: bool = False,
    labels: LabelFile | None = None,
) -> Collected:
    """Make a run of what a service logged; its replay equals what was answered.

    The rows are in the order of arrival. A part that the service still writes, or was killed while writing, is read up
    to its last whole record. The examples have a further column `time`, the arrival in UTC.

    Parameters
    ----------
    folder : path
        The folder of `cascade-lab serve --log`.
    since, until : datetime, optional
        Take only the texts that arrived at or after `since`, and before `until`; UTC where there is no time zone.
    digest : str
        The beginning of the digest of the cascade; needed where several ones answered.
    sample : bool
        Take only the texts that the service chose (`shadow.is_chosen`) and that every stage has scored: a random
        sample of all texts, on which other thresholds can be replayed and tuned. Chosen texts that the service did
        not get to are left out, whichever stage answered them (`ShadowQueue`): so the sample has fewer texts of busy
        times, and otherwise the texts that are left out are like the others.
    labels : LabelFile, optional
        Labels to join by id. Without them the run is unlabelled.

    Raises
    ------
    RunError
        No such folder, a file in it that is no part of a log, no text in it, or several cascades.
    EvalSetError
        A label is no answer of the cascade, or none is of a text in the log.
    """
    folder = Path(folder)
    parts = _of_one_cascade(folder, [_Part.read(path, since, until) for path in list_parts(folder)], digest)
    cascade = parts[0].cascade
    spec = _spec(cascade.manifest, parts[0].path)
    answered = _joined([part.answered for part in parts], folder)
    is_repeated = pd.Index(answered["example_id"].to_pylist()).duplicated()
    scores, evidence, had_turn = _scores(answered, _joined([part.shadow for part in parts], folder), spec, folder)
    rows, n_unscored = np.flatnonzero(~is_repeated), 0
    if sample:
        chosen = rows[is_chosen(answered["example_id"].take(pa.array(rows)).to_pylist(), _common_share(folder, parts))]
        is_whole = np.all([had_turn, *(one.scored for one in scores.values())], axis=0)
        is_whole &= ~np.any([~is_whole, *map(np.isnan, evidence.values())], axis=0)
        rows = chosen[is_whole[chosen]]
        n_unscored = len(chosen) - len(rows)
        if not len(rows):
            raise RunError(f"{folder}: the service did not get to any text of the sample; collect without --sample")
    answered = answered.take(pa.array(rows))
    examples = _examples(answered)
    if labels is not None:
        examples = join_labels(examples, labels, spec)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "run_id": new_run_id(datetime.now(timezone.utc)),
        "source": "service",
        **cascade.manifest,
        "digest": cascade.digest,
        "evalset": {
            "source": str(folder),
            "split": None,
            "sha256": sha256("\n".join(examples["example_id"]).encode()).hexdigest(),
            "n_examples": len(examples),
        },
        "contents": {},
        "batch_size": None,
        "shadow": sample,
        "started": answered["time"][0].as_py().isoformat(timespec="seconds"),
    }
    run = Run(
        manifest,
        examples_frame(examples),
        {name: one.take(rows) for name, one in scores.items()},
        predictions_frame(examples, answered.select(_ANSWER).to_pandas()),
        pd.DataFrame(columns=list(TIMING_COLUMNS)).astype(TIMING_COLUMNS),
        evidence={name: values[rows] for name, values in evidence.items()},
        name=str(folder),
    )
    n_lost, n_repeated = sum(part.n_lost for part in parts), int(is_repeated.sum())
    found = Collected(run, n_lost, n_repeated, _count_differing(run, folder), n_unscored)
    return replace(found, notes=tuple(_notes(found, parts)))


_ANSWER = ["predicted", "decided_by", "probability", "confidence"]
_DAMAGED = "it was changed or is damaged; move that part away"


@dataclass(frozen=True)
class _Part:
    """A part whose header is whole, with the rows that arrived in the time that is collected."""

    path: Path
    cascade: ServedCascade
    share: float
    answered: pa.Table
    shadow: pa.Table
    has_rows: bool  # of any time
    n_lost: int
    is_finished: bool
    is_damaged: bool

    @classmethod
    def read(cls, path: Path, since: datetime | None, until: datetime | None) -> _Part | None:
        """Read a part; return None where a service was killed before it had written the header."""
        part = read_part(path)
        if part.cascade is None:
            return None
        schema = part_schema(part.cascade, shadow=part.shadow)
        table = pa.Table.from_batches(part.batches, schema).replace_schema_metadata(None)
        for end, compare in ((since, pc.greater_equal), (until, pc.less)):
            if end is not None:
                end = end if end.tzinfo else end.replace(tzinfo=timezone.utc)
                table = table.filter(compare(table["time"], pa.scalar(end, schema.field("time").type)))
        is_shadow = pc.is_null(table["predicted"])
        answered, shadow = table.filter(pc.invert(is_shadow)), table.filter(is_shadow)
        state = bool(part.batches), part.n_lost, part.is_finished, part.is_damaged
        return cls(part.path, part.cascade, part.shadow, answered, shadow, *state)


def _of_one_cascade(folder: Path, parts: Sequence[_Part | None], digest: str) -> list[_Part]:
    """Return the parts of the one cascade that answered, or whose digest begins with `digest`."""
    whole = [part for part in parts if part is not None]
    found: dict[str, list[_Part]] = {}
    for part in whole:
        if len(part.answered):
            found.setdefault(part.cascade.digest, []).append(part)
    if not found:
        why = "none of its texts arrived in that time" if any(part.has_rows for part in whole) else "it has no text"
        raise RunError(f"{folder}: {why}; give the folder of `cascade-lab serve --log`, or another time")
    known = "; ".join(f"{key[:12]} ({_described(of_one)})" for key, of_one in found.items())
    chosen = [key for key in found if key.startswith(digest.lower())]
    if not chosen:
        raise RunError(f"{folder}: no cascade's digest begins with '{digest}'; those that answered: {known}")
    if len(chosen) > 1:
        raise RunError(
            f"{folder}: {len(chosen)} cascades answered: {known}; add --digest {chosen[0][:12]}, or another of them"
        )
    return [part for part in whole if part.cascade.digest == chosen[0]]


def _described(parts: Sequence[_Part]) -> str:
    times = [time for part in parts for time in pc.min_max(part.answered["time"]).as_py().values() if time]
    n, name = sum(len(part.answered) for part in parts), shorten(parts[0].cascade.manifest["cascade"]["name"], 40)
    period = f", {min(times):%Y-%m-%d %H:%M} to {max(times):%Y-%m-%d %H:%M}" if times else ""
    return f"{name}, {n:,} texts{period}"


def _spec(manifest: Mapping[str, Any], path: Path) -> CascadeSpec:
    try:
        return CascadeSpec.from_dict(manifest["cascade"], where=f"{path}: cascade")
    except SpecError as error:
        raise RunError(f"{shorten(str(error), 500)}; {_DAMAGED}") from error


def _joined(tables: Sequence[pa.Table], folder: Path) -> pa.Table:
    """Return the rows of all parts in the order of arrival."""
    try:
        table = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise RunError(f"{folder}: parts of one cascade have different columns; {_DAMAGED}") from error
    for name in ("example_id", "time"):
        if table[name].null_count:
            raise RunError(f"{folder}: a text has no {name}; {_DAMAGED}")
    return table.sort_by("time")


def _keys(table: pa.Table) -> pd.MultiIndex:
    """Return what tells answered texts apart: the id, which may occur twice, and the time."""
    return pd.MultiIndex.from_arrays([table["example_id"].to_pylist(), table["time"].cast(pa.int64()).to_numpy()])


def _scores(
    answered: pa.Table, shadow: pa.Table, spec: CascadeSpec, folder: Path
) -> tuple[dict[str, StageScores], dict[str, np.ndarray], np.ndarray]:
    """Return each stage's scores of the answered texts, shadow scores included, and the rejector's evidence.

    And which texts had their turn in the sample: bool.
    """
    keys, of_shadow = _keys(answered), _keys(shadow)
    first = np.flatnonzero(~keys.duplicated())
    rows = keys[first].get_indexer(of_shadow)
    rows = np.where(rows >= 0, first[rows], -1)
    # Where one request gave an id twice, it is not known whose shadow scores these are.
    is_used = (rows >= 0) & ~keys.duplicated(keep=False)[rows] & ~of_shadow.duplicated()
    had_turn = np.zeros(len(answered), dtype=bool)
    had_turn[rows[is_used]] = True
    scores = {}
    for stage in spec.stages:
        name, where = f"{LOGITS}{stage.name}", f"{folder}: stage '{stage.name}'"
        logits, added = (_logits(table[name], len(stage.labels), where) for table in (answered, shadow))
        is_new = is_used & ~np.isnan(added[:, 0]) & np.isnan(logits[rows, 0])
        logits[rows[is_new]] = added[is_new]
        is_shadow = np.zeros(len(logits), dtype=bool)
        is_shadow[rows[is_new]] = True
        rescored = None
        if f"{RESCORED}{stage.name}" in answered.column_names:
            flags = (table[f"{RESCORED}{stage.name}"].fill_null(False) for table in (answered, shadow))
            rescored, of_shadow_rows = (np.array(column.to_pylist(), dtype=bool) for column in flags)
            rescored[rows[is_new]] = of_shadow_rows[is_new]
        scores[stage.name] = StageScores(logits, ~np.isnan(logits[:, 0]), is_shadow, rescored)
    evidence = {}
    for name in (name for name in answered.column_names if name.startswith(EVIDENCE)):
        values, added = (table[name].to_numpy().astype(np.float64) for table in (answered, shadow))
        is_new = is_used & ~np.isnan(added) & np.isnan(values[rows])
        values[rows[is_new]] = added[is_new]
        evidence[name.removeprefix(EVIDENCE)] = values
    return scores, evidence, had_turn


def _logits(column: pa.ChunkedArray, n_labels: int, where: str) -> np.ndarray:
    """Return lists of logits as rows: float32, shape (n, n_labels); NaN where there is no list."""
    logits = np.full((len(column), n_labels), np.nan, dtype=np.float32)
    start = 0
    for chunk in column.chunks:
        is_scored = chunk.is_valid().to_numpy(zero_copy_only=False)
        lengths = pc.list_value_length(chunk).drop_null().to_numpy()
        values = chunk.drop_null().flatten().to_numpy(zero_copy_only=False)
        if not ((lengths == n_labels).all() and np.isfinite(values).all()):
            raise RunError(f"{where}: a text does not have {n_labels} finite logits; {_DAMAGED}")
        logits[start : start + len(chunk)][is_scored] = values.reshape(-1, n_labels)
        start += len(chunk)
    return logits


def _examples(answered: pa.Table) -> pd.DataFrame:
    examples = answered.select(["example_id", "text", "text_b", "time"]).to_pandas()
    examples["text"] = examples["text"].astype(object).where(examples["text"].notna(), examples["example_id"])
    examples.insert(3, "label", pd.Series([None] * len(examples), dtype=object))
    return examples


def _common_share(folder: Path, parts: Sequence[_Part]) -> float:
    """Return the share of the texts that is chosen for shadow scoring in every part."""
    share = min(part.share for part in parts if len(part.answered))
    if not share:
        raise RunError(
            f"{folder}: the service had no --shadow, at least in some parts; collect without --sample, or choose the "
            "time with --since and --until"
        )
    return share


def _count_differing(run: Run, folder: Path) -> int:
    """Return for how many texts a replay gives another answer than the service gave."""
    try:
        replayed = run.replay()
    except RunError as error:
        raise RunError(f"{folder}: a text has no logits of a stage that it reached; {_DAMAGED}") from error
    differs = np.zeros(len(replayed), dtype=bool)
    for name in _ANSWER:
        served, own = run.predictions[name].to_numpy(), replayed[name].to_numpy()
        differs |= served != own if name in _ANSWER[:2] else ~(np.abs(served - own) < 1e-6)
    return int(differs.sum())


def _notes(found: Collected, parts: Sequence[_Part]) -> Iterator[str]:
    if found.n_lost:
        yield (
            f"{found.n_lost:,} answered texts are not in the log: the disk was full, too many texts waited, or a part "
            "was deleted while it was written"
        )
    if found.n_repeated:
        yield (
            f"{found.n_repeated:,} texts have the id of an earlier one and are left out; give each request an id of "
            "its own (KServe: `id`), or none"
        )
    if found.n_unscored:
        n_chosen = found.n_unscored + len(found.run.examples)
        yield (
            f"{found.n_unscored:,} of {n_chosen:,} texts of the sample are left out, whichever stage answered them: "
            "too many waited to be scored when they came, or the service ended or was reloaded first. So the sample "
            "has fewer texts of busy times; a larger machine or a smaller --shadow leaves out fewer"
        )
    if found.n_differing:
        yield (
            f"for {found.n_differing:,} texts a replay gives another answer than the service gave: their logits were "
            "changed, or another processor rounds differently"
        )
    n_unfinished = sum(not part.is_finished for part in parts)
    if n_unfinished:
        yield (
            f"{n_unfinished} of {len(parts)} parts are unfinished and were read up to the last whole record: their "
            "service still runs, or was killed"
        )
    for part in parts:
        if part.is_damaged:
            yield f"{part.path}: is damaged; what comes after its first {len(part.answered):,} texts is left out"
