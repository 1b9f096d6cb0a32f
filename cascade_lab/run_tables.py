"""The tables of a run directory as parquet files: written with their digests, read with one-line errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.exceptions import RunError
from cascade_lab.provenance import sha256
from cascade_lab.spec import CascadeSpec

TIMING_COLUMNS = {
    "stage": "object",
    "batch": "int64",
    "n_examples": "int64",
    "sequence_length": "int64",
    "n_tokens": "int64",
    "tokenize_seconds": "float64",
    "run_seconds": "float64",
}
_EXAMPLE_STRINGS = ("example_id", "text", "text_b", "label")
_PREDICTION_STRINGS = ("example_id", "label", "predicted", "decided_by")
_PREDICTION_NUMBERS = ("probability", "confidence")


def write_tables(
    directory: Path,
    examples: pd.DataFrame,
    scores: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    predictions: pd.DataFrame,
    timings: pd.DataFrame,
) -> dict[str, str]:
    """Write the tables of a run into `directory`.

    Parameters
    ----------
    directory : path
    examples, predictions, timings : DataFrame
        As `Run` has them.
    scores : mapping of str to (logits, scored, shadow)
        Stage name to its scores, as `Run.scores` returns them.

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
    ids = pa.array(examples["example_id"].tolist(), pa.string())
    for name, (logits, scored, shadow) in scores.items():
        rows = np.flatnonzero(scored)
        flat = pa.array(np.ascontiguousarray(logits[rows], dtype=np.float32).ravel())
        tables[f"scores/{name}.parquet"] = pa.table(
            {
                "example_id": ids.take(pa.array(rows)),
                "logits": pa.FixedSizeListArray.from_arrays(flat, logits.shape[1]),
                "shadow": shadow[rows],
            }
        )
    (directory / "scores").mkdir()
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


def read_frame(path: Path) -> pd.DataFrame:
    """Read a table; raises RunError."""
    return _read_table(path).to_pandas()


def read_examples(directory: Path) -> pd.DataFrame:
    """Read the examples of a run directory; raises RunError."""
    return read_frame(directory / "examples.parquet")


def read_scores(
    directory: Path, stage: str, examples: pd.DataFrame, spec: CascadeSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the scores of a stage: logits, scored and shadow, rows as in `examples`; raises RunError."""
    table = _read_table(directory / f"scores/{stage}.parquet")
    rows = pd.Index(examples["example_id"]).get_indexer(table["example_id"].to_pylist())
    if (rows < 0).any():
        raise RunError(f"{directory}: scores for an example that is not in examples.parquet; run again")
    n, n_labels = len(examples), len(spec.stage(stage).labels)
    flat = table["logits"].combine_chunks().flatten().to_numpy()
    if len(flat) != len(table) * n_labels:
        raise RunError(f"{directory}: scores/{stage}.parquet does not have {n_labels} logits per example; run again")
    values = flat.reshape(len(table), n_labels)
    shadow_values = table["shadow"].to_numpy()
    if len(rows) == n and np.array_equal(rows, np.arange(n)):
        return values, np.ones(n, dtype=bool), shadow_values
    logits = np.full((n, n_labels), np.nan, dtype=np.float32)
    scored, shadow = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    logits[rows], scored[rows], shadow[rows] = values, True, shadow_values
    return logits, scored, shadow


def upgrade_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest of schema version 1 as one of version 2."""
    stages = {
        name: {("n_workers" if key == "callers" else key): value for key, value in settings.items()}
        for name, settings in manifest.get("stages", {}).items()
    }
    return {**manifest, "schema_version": 2, "source": "evaluation", "stages": stages}


def _examples_table(examples: pd.DataFrame) -> pa.Table:
    strings = {key: pa.array(examples[key].tolist(), pa.string(), from_pandas=True) for key in _EXAMPLE_STRINGS}
    others = {key: pa.array(examples[key], from_pandas=True) for key in examples.columns if key not in strings}
    return pa.table(strings | others)


def _predictions_table(predictions: Mapping[str, pd.Series] | pd.DataFrame) -> pa.Table:
    strings = {key: pa.array(predictions[key].tolist(), pa.string(), from_pandas=True) for key in _PREDICTION_STRINGS}
    numbers = {key: pa.array(predictions[key].to_numpy(np.float64)) for key in _PREDICTION_NUMBERS}
    return pa.table(strings | numbers)


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path}: cannot be read ({reason}); run again") from error
