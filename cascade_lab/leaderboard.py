"""Lists the runs in a folder with their metrics and where their thresholds come from, the best first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.tuned_on import is_tuning_set
from cascade_lab.atomic import UNFINISHED
from cascade_lab.exceptions import CascadeLabError, RunError, did_you_mean
from cascade_lab.run import Run
from cascade_lab.text import printable

METRICS = ("accuracy", "in_scope_accuracy", "reject_recall", "reject_precision", "macro_f1")
_COLUMNS = ("run", "cascade", "evalset", "date", "n_examples", "n_labelled", *METRICS, "tuned_on", "same_texts")
_FILES = ("manifest.json", "predictions.parquet")  # a damaged run may lack one of them


def leaderboard(folder: str | Path, *, sort: str = "accuracy") -> pd.DataFrame:
    """Return the runs in a folder and the folders in it, one row per run, those that cannot be read last.

    Parameters
    ----------
    folder : path
        Runs that are still written are left out.
    sort : str
        One of `METRICS`, highest first; or "date", newest first.

    Returns
    -------
    DataFrame
        Columns `run` (its path), `cascade`, `evalset` (file and split), `date`, `n_examples`, `n_labelled`, the
        `METRICS` (NaN where undefined), `tuned_on` (the file and split that the thresholds were tuned on; None if they
        were not), `same_texts` (the thresholds were tuned on these same texts, so the metrics are too high), and
        `problem` (why the run cannot be read, else None).

    Raises
    ------
    RunError
        There is no such folder, it has no run, or `sort` is unknown.
    """
    if sort not in (*METRICS, "date"):
        raise RunError(f"runs cannot be sorted by '{sort}'{did_you_mean(sort, [*METRICS, 'date'])}")
    if not Path(folder).is_dir():
        raise RunError(f"{folder}: no such folder; give one with runs, or make a run with `cascade-lab run`")
    rows = [_row(path) for path in _run_directories(Path(folder))]
    if not rows:
        raise RunError(f"{folder}: has no run; give another folder, or make a run with `cascade-lab run`")
    table = pd.DataFrame(rows, columns=[*_COLUMNS, "problem"], dtype=object)
    table = table.where(table.notna(), None).astype(dict.fromkeys(METRICS, float))
    return table.sort_values(sort, ascending=False, na_position="last", kind="stable", ignore_index=True)


def _run_directories(folder: Path) -> Iterator[Path]:
    for name, inner, files in os.walk(folder):
        if any(file in files for file in _FILES):
            inner.clear()
            yield Path(name)
        inner[:] = sorted(one for one in inner if not one.startswith(".") and not one.endswith(UNFINISHED))


def _row(path: Path) -> dict[str, Any]:
    try:
        run = Run.read(path)
        is_labelled = run.examples["label"].notna()
        metrics = prediction_metrics(run.spec, run.predictions[is_labelled.to_numpy()]) if is_labelled.any() else {}
        counts = {"n_examples": len(run.examples), "n_labelled": int(is_labelled.sum())}
        return {"run": str(path), **run_facts(run), **counts, **metrics}
    except CascadeLabError as error:
        return {"run": str(path), "problem": printable(str(error))}


def run_facts(run: Run) -> dict[str, Any]:
    """Return what tells runs apart: `cascade`, `evalset`, `date`, `tuned_on` and `same_texts`, as in `leaderboard`."""
    tuned_on = run.spec.tuned_on
    return {
        "cascade": run.spec.name,
        "evalset": _set_name(run.manifest["evalset"]),
        "date": str(run.manifest.get("started") or "")[:16].replace("T", " "),
        "tuned_on": _set_name(tuned_on["evalset"]) if tuned_on else None,
        "same_texts": is_tuning_set(run),
    }


def _set_name(evalset: Mapping[str, Any]) -> str:
    """Return the name of an eval set's file, and its split; a table in memory has no name."""
    source = evalset.get("source") or evalset.get("path")
    name = Path(str(source)).name if source else "a table"
    return f"{name} {evalset['split']}" if evalset.get("split") else name
