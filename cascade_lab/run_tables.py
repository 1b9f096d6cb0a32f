"""The tables of a run directory as parquet files: written with their digests, read with one-line errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab import run_schema
from cascade_lab.provenance import sha256
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage_files import stage_table

TIMING_COLUMNS = {
    "stage": "object",
    "batch": "int64",
    "n_examples": "int64",
    "sequence_length": "int64",
    "n_tokens": "int64",
    "tokenize_seconds": "float64",
    "run_seconds": "float64",
}
Scores: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
"""What a stage computed: logits, scored, shadow and rescored, as `run.StageScores`."""

_EXAMPLE_STRINGS = ("example_id", "text", "text_b", "label")
_PREDICTION_STRINGS = ("example_id", "label", "predicted", "decided_by")
_PREDICTION_NUMBERS = ("probability", "confidence")


def write_tables(
    directory: Path,
    examples: pd.DataFrame,
    scores: Mapping[str, Scores],
    predictions: pd.DataFrame,
    timings: pd.DataFrame,
    *,
    features: Mapping[str, np.ndarray],
    evidence: Mapping[str, np.ndarray],
) -> dict[str, str]:
    """Write the tables of a run into `directory`.

    Parameters
    ----------
    directory : path
    examples, predictions, timings : DataFrame
        As `Run` has them.
    scores : mapping of str to (logits, scored, shadow, rescored)
        Stage name to its scores, as `Run.scores` returns them.
    features, evidence : mapping of str to ndarray
        As `Run` has them; empty where there are none.

    Returns
    -------
    dict of str to str
        File name in the directory to SHA-256.
    """
    tables = {
        "examples.parquet": _examples_table(examples),
        "predictions.parquet": _predictions_table(predictions),
        "timings.parquet": pa.Table.from_pandas(timings, preserve_index=False),
    }
    ids = pa.array(examples["example_id"], pa.string())
    for name, (logits, scored, shadow, rescored) in scores.items():
        rows = np.flatnonzero(scored)
        flat = pa.array(np.ascontiguousarray(logits[rows], dtype=np.float32).ravel())
        columns = {
            "example_id": ids.take(pa.array(rows)),
            "logits": pa.FixedSizeListArray.from_arrays(flat, logits.shape[1]),
            "shadow": shadow[rows],
        }
        if rescored is not None:
            columns["rescored"] = rescored[rows]
        tables[stage_table("scores", name, ())] = pa.table(columns)
    for name, values in features.items():
        rows = np.flatnonzero(~np.isnan(values[:, 0]))
        flat = pa.array(np.ascontiguousarray(values[rows], dtype=np.float16).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        tables[stage_table("features", name, ())] = pa.table({"example_id": ids.take(pa.array(rows)), "cls": vectors})
    if evidence:
        columns = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in evidence.items()}
        tables["evidence.parquet"] = pa.table({"example_id": ids, **columns})
    for folder in {Path(name).parent for name in tables}:
        (directory / folder).mkdir(exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, directory / name)
    return {name: sha256(directory / name) for name in sorted(tables)}


def predictions_frame(examples: pd.DataFrame, routed: pd.DataFrame) -> pd.DataFrame:
    """Return the predictions of a run as they are read back from its file, from what `RoutingResult.frame` returns."""
    columns = {"example_id": examples["example_id"], "label": examples["label"], **dict(routed.items())}
    return _predictions_table(columns).to_pandas()


def examples_frame(examples: pd.DataFrame) -> pd.DataFrame:
    """Return examples as they are read back from their file: the same columns and types."""
    return _examples_table(examples).to_pandas()


def read_examples(directory: Path, digests: Mapping[str, str], spec: CascadeSpec) -> pd.DataFrame:
    """Read the examples of a run directory; raises RunError.

    Parameters
    ----------
    directory : Path
    digests : mapping of str to str
        Name of a table to its SHA-256: `contents` of the manifest.
    spec : CascadeSpec
    """
    examples = _read_frame(directory, "examples.parquet", digests, spec)
    run_schema.check_examples(examples, spec, directory / "examples.parquet")
    return examples


def read_predictions(
    directory: Path, digests: Mapping[str, str], spec: CascadeSpec, examples: pd.DataFrame
) -> pd.DataFrame:
    """Read the predictions of a run directory, rows as in `examples`; raises RunError."""
    predictions = _read_frame(directory, "predictions.parquet", digests, spec)
    return run_schema.check_predictions(predictions, examples, spec, directory / "predictions.parquet")


def read_timings(directory: Path, digests: Mapping[str, str], spec: CascadeSpec, n_examples: int) -> pd.DataFrame:
    """Read the timings of a run directory with `n_examples` examples; raises RunError."""
    timings = _read_frame(directory, "timings.parquet", digests, spec)
    run_schema.check_timings(timings, spec, n_examples, directory / "timings.parquet")
    return timings


def read_scores(
    directory: Path, stage: str, digests: Mapping[str, str], spec: CascadeSpec, examples: pd.DataFrame
) -> Scores:
    """Read the scores of a stage: logits, scored, shadow and rescored, rows as in `examples`; raises RunError."""
    name = stage_table("scores", stage, digests)
    table = run_schema.read_table(directory, name, digests.get(name), spec, stage)
    rows = run_schema.check_ids(pd.Index(table["example_id"].to_pandas()), examples, directory / name)
    n, n_labels = len(examples), len(spec.stage(stage).labels)
    values = table["logits"].chunk(0).flatten().to_numpy().reshape(len(table), n_labels)  # not a copy
    shadow_values = table["shadow"].to_numpy()
    rescored_values = table["rescored"].to_numpy() if "rescored" in table.column_names else None
    if len(rows) == n and np.array_equal(rows, np.arange(n)):
        return values, np.ones(n, dtype=bool), shadow_values, rescored_values
    logits = np.full((n, n_labels), np.nan, dtype=np.float32)
    scored, shadow = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    logits[rows], scored[rows], shadow[rows] = values, True, shadow_values
    if rescored_values is None:
        return logits, scored, shadow, None
    rescored = np.zeros(n, dtype=bool)
    rescored[rows] = rescored_values
    return logits, scored, shadow, rescored


def read_features(
    directory: Path,
    stage: str,
    digests: Mapping[str, str],
    spec: CascadeSpec,
    examples: pd.DataFrame,
    scored: np.ndarray,
) -> np.ndarray:
    """Read the features of a stage: float16, shape (n_examples, hidden), rows as in `examples`; raises RunError.

    The examples that the stage scored, where `scored` is true, have them.
    """
    name = stage_table("features", stage, digests)
    table = run_schema.read_table(directory, name, digests.get(name), spec, stage)
    rows = run_schema.check_ids(pd.Index(table["example_id"].to_pandas()), examples, directory / name)
    vectors = table["cls"].combine_chunks()
    features = np.full((len(examples), vectors.type.list_size), np.nan, dtype=np.float16)
    features[rows] = vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size)
    run_schema.check_scored(features, "cls", scored, directory / name)
    return features


def read_evidence(
    directory: Path,
    digests: Mapping[str, str],
    spec: CascadeSpec,
    examples: pd.DataFrame,
    scored: np.ndarray,
) -> dict[str, np.ndarray]:
    """Read the rejector's scores of features: `<stage>.<score>` to its values, shape (n_examples,); raises RunError.

    The examples that the last stage scored, where `scored` is true, have all of them.
    """
    name = "evidence.parquet"
    if name not in digests:
        return {}
    table = _read_frame(directory, name, digests, spec)
    rows = run_schema.check_ids(pd.Index(table.pop("example_id")), examples, directory / name)
    evidence = {}
    for column in table:
        evidence[column] = np.full(len(examples), np.nan)
        evidence[column][rows] = table[column].to_numpy(np.float64, na_value=np.nan)
        run_schema.check_scored(evidence[column], column, scored, directory / name)
    return evidence


def _read_frame(directory: Path, name: str, digests: Mapping[str, str], spec: CascadeSpec) -> pd.DataFrame:
    return run_schema.frame(run_schema.read_table(directory, name, digests.get(name), spec), directory / name)


def _examples_table(examples: pd.DataFrame) -> pa.Table:
    strings = {key: pa.array(examples[key], pa.string(), from_pandas=True) for key in _EXAMPLE_STRINGS}
    others = {key: pa.array(examples[key], from_pandas=True) for key in examples.columns if key not in strings}
    return pa.table(strings | others)


def _predictions_table(predictions: Mapping[str, pd.Series] | pd.DataFrame) -> pa.Table:
    strings = {key: pa.array(predictions[key], pa.string(), from_pandas=True) for key in _PREDICTION_STRINGS}
    numbers = {key: pa.array(predictions[key].to_numpy(np.float64)) for key in _PREDICTION_NUMBERS}
    return pa.table(strings | numbers)
