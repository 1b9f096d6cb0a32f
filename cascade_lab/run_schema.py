"""Checks the manifest and the tables of a run when they are read: the one place that says what a run directory holds.

What a manifest or a table contains decides neither which other file is read nor how much memory is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cascade_lab.exceptions import RunError, SpecError
from cascade_lab.json_files import check_keys, read_object
from cascade_lab.parquet_files import (
    BOOL,
    DAMAGE,
    NUMBER,
    STRING,
    WHOLE,
    bounded_batches,
    bounded_table,
    check_size,
    joined,
)
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import shorten

SCHEMA_VERSION = 2
WAY_OUT = "put the file back, or run again"
EVIDENCE = "evidence.parquet"
MAX_SCORES_BYTES = 2**33  # of the logits or the features of a stage

_MANIFEST = {
    "run_id": str,
    "cascade": dict,
    "evalset": dict,
    "inputs": dict,
    "contents": dict,
    "source": str | None,
    "stages": dict | None,
    "packages": dict | None,
    "thresholds": dict | None,
    "tuned_on": dict | None,
    "batch_size": int | None,
    "started": str | None,
    "processor": str | None,
}
_EVALSET = {
    "source": str | None,
    "path": str | None,
    "split": str | None,
    "sha256": str | None,
    "n_examples": int | None,
}
_EXAMPLES = {"example_id": STRING, "text": STRING, "text_b": STRING, "label": STRING}
_PREDICTIONS = {"example_id": STRING, "label": STRING, "predicted": STRING, "decided_by": STRING}
_PREDICTIONS |= {"probability": NUMBER}
TIMINGS = {
    "stage": STRING,
    "batch": WHOLE,
    "n_examples": WHOLE,
    "sequence_length": WHOLE,
    "n_tokens": WHOLE,
    "tokenize_seconds": NUMBER,
    "run_seconds": NUMBER,
}


def read_manifest(directory: Path) -> tuple[dict[str, Any], CascadeSpec]:
    """Read and check the manifest of a run directory.

    Returns
    -------
    manifest : dict
        As schema version 2 has it.
    spec : CascadeSpec
        The cascade in it.

    Raises
    ------
    RunError
        Not a run, a run of an unknown schema version, or a manifest that is damaged.
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise RunError(f"{directory}: not a run directory (it has no {path.name}); give one")
    _check_inside(directory, path)
    manifest = read_object(path, error=RunError, way_out=WAY_OUT)
    version = manifest.get("schema_version")
    if isinstance(version, bool) or version not in (1, SCHEMA_VERSION):
        raise RunError(
            f"{directory}: has schema version {shorten(str(version), 40)}, and this package reads 1 and "
            f"{SCHEMA_VERSION}; run again"
        )
    check_keys(manifest, _MANIFEST, str(path), error=RunError, way_out=WAY_OUT)
    check_keys(manifest["evalset"], _EVALSET, f"{path}: evalset", error=RunError, way_out=WAY_OUT)
    for key, kind in (("inputs", str), ("contents", str), ("packages", str | None), ("stages", dict)):
        values = manifest.get(key) or {}
        check_keys(values, dict.fromkeys(values, kind), f"{path}: {key}", error=RunError, way_out=WAY_OUT)
    for name in manifest["contents"]:
        _check_is_table(directory, name)
    if version == 1:
        manifest = _upgrade(manifest)
    return manifest, _cascade(manifest["cascade"], path)


def read_table(directory: Path, name: str, digest: str | None, spec: CascadeSpec, stage: str | None = None) -> pa.Table:
    """Read a table of a run directory, if it has the digest that the manifest gives, and the right columns.

    The digest costs about a fifth of the reading, and finds every table that was changed or exchanged.

    Parameters
    ----------
    directory : Path
    name : str
        The table's file in the directory.
    digest : str or None
        Its SHA-256; None if the manifest has none.
    spec : CascadeSpec
        Its stages' labels say how many logits a row has.
    stage : str, optional
        Whose scores or features the table has.

    Raises
    ------
    RunError
        The file is missing, is no file of the run, is no parquet, has another digest, lacks a column or has one of
        another type, or takes too much memory.
    """
    path = directory / name
    with _opened(directory, name, digest) as file:
        try:
            if stage is not None:
                is_scores = name.startswith("scores/")
                return _scores(file, path, len(spec.stage(stage).labels)) if is_scores else _features(file, path)
            if name == EVIDENCE:
                columns = {"example_id": STRING, **dict.fromkeys(spec.feature_evidence, NUMBER)}
                return bounded_table(file, path, columns, way_out=WAY_OUT, only=list(columns))
            return bounded_table(file, path, _COLUMNS[name], way_out=WAY_OUT)
        except DAMAGE as error:
            reason = shorten(str(error).partition("\n")[0], 200)
            raise RunError(f"{path}: cannot be read ({reason}); {WAY_OUT}") from error
        finally:
            pa.default_memory_pool().release_unused()  # about 150 MB after a table of a million rows


def check_digest(directory: Path, name: str, digest: str) -> None:
    """Raise RunError where a file of the run is missing, or differs from its SHA-256."""
    with _opened(directory, name, digest):
        pass


@contextmanager
def _opened(directory: Path, name: str, digest: str | None) -> Iterator[BinaryIO]:
    """Open a file of the run that has the given SHA-256; the file stays the same if another one takes its name."""
    path = directory / name
    try:
        if not path.exists():
            raise RunError(f"{path}: cannot be read (no such file); {WAY_OUT}")
        _check_inside(directory, path)
        file = open(path, "rb")  # noqa: SIM115 - closed below; errors of the caller are not those of opening
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}); {WAY_OUT}") from error
    with file:
        if digest is not None and _sha256(file, path) != digest:
            raise RunError(f"{path}: changed since the run (its SHA-256 is not the one in manifest.json); {WAY_OUT}")
        yield file


def _sha256(file: BinaryIO, path: Path) -> str:
    digest = sha256()
    try:
        while block := file.read(2**20):
            digest.update(block)
        file.seek(0)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}); {WAY_OUT}") from error
    return digest.hexdigest()


def frame(table: pa.Table, path: Path) -> pd.DataFrame:
    """Return a table as a DataFrame; raises RunError where a value cannot be one of pandas."""
    try:
        return table.to_pandas()
    except DAMAGE as error:  # dates, time zones
        reason = shorten(str(error).partition("\n")[0], 200)
        raise RunError(f"{path}: has a value that cannot be read ({reason}); {WAY_OUT}") from error


def check_examples(examples: pd.DataFrame, spec: CascadeSpec, path: Path) -> None:
    """Raise RunError where an id is missing or occurs twice, a text is missing, or a label is no answer."""
    if not len(examples):
        raise RunError(f"{path}: has no example; {WAY_OUT}")
    for column in ("example_id", "text"):
        if examples[column].isna().any():
            row = int(np.flatnonzero(examples[column].isna())[0])
            raise RunError(f"{path} row {row + 1}: has no {column}; {WAY_OUT}")
    repeated = examples["example_id"].duplicated()
    if repeated.any():
        raise RunError(f"{path}: example_id {_shown(examples['example_id'], repeated)} occurs twice; {WAY_OUT}")
    _check_values(examples["label"], spec.labels, path, "is no answer of the cascade")
    for stage in spec.stages:
        if f"{stage.name}_label" in examples:
            _check_values(examples[f"{stage.name}_label"], (*stage.labels, ""), path, "is no label of that stage")


def check_ids(ids: pd.Index, examples: pd.DataFrame, path: Path) -> np.ndarray:
    """Return the row of `examples` that each id belongs to; raises RunError where an id is unknown or occurs twice."""
    own = pd.Index(examples["example_id"])
    if len(ids) == len(own) and ids.equals(own):
        return np.arange(len(own))
    rows = own.get_indexer(ids)
    if (rows < 0).any():
        raise RunError(f"{path}: example_id {_shown(ids, rows < 0)} is not in examples.parquet; {WAY_OUT}")
    if not ids.is_unique:
        raise RunError(f"{path}: example_id {_shown(ids, ids.duplicated())} occurs twice; {WAY_OUT}")
    return rows


def check_predictions(predictions: pd.DataFrame, examples: pd.DataFrame, spec: CascadeSpec, path: Path) -> pd.DataFrame:
    """Return the predictions in the order of the examples.

    Raises
    ------
    RunError
        They are not of these examples, or a predicted label or a stage is not one of the cascade.
    """
    rows = check_ids(pd.Index(predictions["example_id"]), examples, path)
    if len(rows) != len(examples):
        raise RunError(f"{path}: has {len(rows):,} rows, but there are {len(examples):,} examples; {WAY_OUT}")
    if not np.array_equal(rows, np.arange(len(rows))):
        predictions = predictions.iloc[np.argsort(rows)].reset_index(drop=True)
    given, own = (
        table["label"].astype(object).where(table["label"].notna(), None) for table in (predictions, examples)
    )
    if not given.equals(own):
        raise RunError(f"{path}: its labels are not those of examples.parquet; {WAY_OUT}")
    names = [stage.name for stage in spec.stages]
    for column, known, why in (
        ("predicted", spec.labels, "is no answer of the cascade"),
        ("decided_by", names, "is no stage of the cascade"),
    ):
        if predictions[column].isna().any():
            raise RunError(f"{path}: a row has no {column}; {WAY_OUT}")
        _check_values(predictions[column], known, path, why)
    for column in ("probability", "confidence"):
        if column in predictions:
            values = predictions[column]
            if not pd.api.types.is_numeric_dtype(values) or not values.between(0, 1).all():
                raise RunError(f"{path}: a {column} is not a number from 0 to 1; {WAY_OUT}")
    return predictions


def check_timings(timings: pd.DataFrame, spec: CascadeSpec, n_examples: int, path: Path) -> None:
    """Raise RunError where a stage is unknown or scored too many texts, or a time or a count is missing or wrong."""
    if timings["stage"].isna().any():
        raise RunError(f"{path}: a row has no stage; {WAY_OUT}")
    _check_values(timings["stage"], [stage.name for stage in spec.stages], path, "is no stage of the cascade")
    for column in list(TIMINGS)[1:]:
        values = timings[column].to_numpy(np.float64, na_value=np.nan)
        least = 1 if column == "n_examples" else 0
        if not (np.isfinite(values) & (values >= least)).all():
            raise RunError(f"{path}: {column} has a value that is below {least} or not a number; {WAY_OUT}")
    scored = timings["n_examples"].astype(np.float64).groupby(timings["stage"]).sum()
    if (scored > n_examples).any():
        name = scored.idxmax()
        raise RunError(f"{path}: stage '{name}' has more than the run's {n_examples:,} examples; {WAY_OUT}")


def check_scored(values: np.ndarray, name: str, scored: np.ndarray, path: Path) -> None:
    """Raise RunError where a value is missing for an example that the stage scored, or is infinite."""
    if not np.isfinite(values[scored]).all() or np.isinf(values).any():
        raise RunError(f"{path}: {name} does not have a number for each example that the stage scored; {WAY_OUT}")


def _scores(file: BinaryIO, path: Path, n_labels: int) -> pa.Table:
    """Read the scores of a stage: `example_id`, `logits` and `shadow`, all present, and the logits finite."""
    kind = _list_type(file, "logits")
    if kind is None or not pa.types.is_floating(kind.value_type):
        raise RunError(f"{path}: has no column 'logits' of lists of numbers; {WAY_OUT}")
    columns = {"example_id": STRING, "shadow": BOOL}
    if "rescored" in pq.ParquetFile(file).schema_arrow.names:  # of a stage with mixed precision
        columns["rescored"] = BOOL
    n, names = pq.ParquetFile(file).metadata.num_rows, [*columns, "logits"]
    check_size(4 * n * n_labels, path, WAY_OUT, MAX_SCORES_BYTES)
    values, others, start = np.empty((n, n_labels), dtype=np.float32), [], 0
    for batch in bounded_batches(file, path, columns, way_out=WAY_OUT, only=names, limit=MAX_SCORES_BYTES):
        logits = batch["logits"]
        flat, lengths = logits.flatten(), pc.list_value_length(logits)
        if any(column.null_count for column in (*batch.columns, flat)):
            raise RunError(f"{path}: has a value that is missing; {WAY_OUT}")
        if len(batch) and (pc.min(lengths).as_py(), pc.max(lengths).as_py()) != (n_labels, n_labels):
            raise RunError(f"{path}: does not have {n_labels} logits per example; {WAY_OUT}")
        part = values[start : start + len(batch)]
        part[:] = flat.cast(pa.float32(), safe=False).to_numpy().reshape(len(batch), n_labels)
        if not np.isfinite(part).all():
            raise RunError(f"{path}: a logit is infinite or NaN; {WAY_OUT}")
        others.append(batch.select(list(columns)))
        start += len(batch)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values[:start].ravel()), n_labels)
    return joined(others, file, list(columns)).append_column("logits", lists)


def _features(file: BinaryIO, path: Path) -> pa.Table:
    """Read the features of a stage: `example_id` and `cls`, all present, and the numbers finite."""
    kind = _list_type(file, "cls")
    if kind is None or not pa.types.is_fixed_size_list(kind) or not pa.types.is_float16(kind.value_type):
        raise RunError(f"{path}: has no column 'cls' of lists of 16-bit numbers; {WAY_OUT}")
    columns = {"example_id": STRING}
    table = bounded_table(file, path, columns, way_out=WAY_OUT, only=[*columns, "cls"], limit=MAX_SCORES_BYTES)
    table = table.combine_chunks()
    flat = table["cls"].combine_chunks().flatten()
    if any(column.null_count for column in (*table.columns, flat)) or not np.isfinite(flat.to_numpy()).all():
        raise RunError(f"{path}: has a value that is missing or not finite; {WAY_OUT}")
    return table


def _list_type(file: BinaryIO, name: str) -> pa.DataType | None:
    """Return the type of a column of lists; None if there is no such column."""
    schema = pq.ParquetFile(file).schema_arrow
    kind = schema.field(name).type if schema.names.count(name) == 1 else None
    is_list = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return kind if kind is not None and any(check(kind) for check in is_list) else None


_COLUMNS = {
    "examples.parquet": _EXAMPLES,
    "predictions.parquet": _PREDICTIONS,
    "timings.parquet": TIMINGS,
    EVIDENCE: {"example_id": STRING},
}


def _check_values(values: pd.Series, known: Any, path: Path, why: str) -> None:
    """Raise RunError at the first value, where there is one, that is not known."""
    given = values.dropna()
    unknown = ~given.isin(list(known))
    if unknown.any():
        raise RunError(f"{path}: {values.name} {_shown(given, unknown)} {why}; {WAY_OUT}")


def _shown(values: pd.Series | pd.Index, wrong: Any) -> str:
    return f"'{shorten(str(values[np.asarray(wrong, dtype=bool)].tolist()[0]), 80)}'"


def _check_is_table(directory: Path, name: str) -> None:
    """Raise RunError where the manifest names a table that is no file of the run's directory: it is not read."""
    pure = PurePath(name)
    is_inside = not pure.is_absolute() and ".." not in pure.parts and "\0" not in name and len(name) < 256
    is_known = name in _COLUMNS or name.startswith("scores/")  # `read_table` reads it, and says what is wrong
    if not is_inside or (not is_known and (directory / name).exists() and not (directory / name).is_file()):
        raise RunError(
            f"{directory / 'manifest.json'}: contents names '{shorten(name, 80)}', which is not a file of the run; "
            "put the manifest back, or run again"
        )


def _check_inside(directory: Path, path: Path) -> None:
    """Raise RunError where a file of the run is a link out of its directory, or no file (a pipe, a device)."""
    if not path.is_file():
        raise RunError(f"{path}: is not a file; {WAY_OUT}")
    if not path.resolve().is_relative_to(directory.resolve()):
        raise RunError(f"{path}: is a link to a file outside the run; copy the file into the run")


def _cascade(content: dict[str, Any], path: Path) -> CascadeSpec:
    stages = content.get("stage")
    for stage in stages if isinstance(stages, list) else ():
        if isinstance(stage, dict) and not isinstance(stage.get("labels"), list):  # not the name of a file to read
            raise RunError(f"{path}: cascade: a stage has no list of labels; {WAY_OUT}")
    try:
        spec = CascadeSpec.from_dict(content, where=f"{path}: cascade")
    except SpecError as error:
        raise RunError(f"{shorten(str(error), 500)}; {WAY_OUT}") from error
    return spec


def _upgrade(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest of schema version 1 as one of version 2."""
    stages = {
        name: {("n_workers" if key == "callers" else key): value for key, value in settings.items()}
        for name, settings in (manifest.get("stages") or {}).items()
    }
    return {**manifest, "schema_version": SCHEMA_VERSION, "source": "evaluation", "stages": stages}
