"""Checks the settings and the tables of a latency study when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.exceptions import RunError, SpecError
from cascade_lab.json_files import check_keys, read_object
from cascade_lab.parquet_files import BOOL, DAMAGE, NUMBER, STRING, WHOLE, bounded_table
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import shorten

WAY_OUT = "put the file back, or measure again with `cascade-lab latency`"
_MOST_TOKENS = 10**6  # of one text; more than any model takes
_SETTINGS = {
    "cascade": dict,
    "evalset": dict,
    "batch_sizes": list,
    "repeats": int,
    "batches": int,
    "seed": int,
    "checked": list,
    "inputs": dict | None,
    "packages": dict | None,
    "processor": str | None,
}
_TIMINGS = {
    "check": BOOL,
    "threshold": NUMBER,
    "repeat": WHOLE,
    "batch_size": WHOLE,
    "stage": STRING,
    "batch": WHOLE,
    "n_examples": WHOLE,
    "sequence_length": WHOLE,
    "n_tokens": WHOLE,
    "tokenize_seconds": NUMBER,
    "run_seconds": NUMBER,
    "answer_seconds": NUMBER,
}


def read_latency(directory: Path) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """Read the settings, the texts and the timings of a latency study.

    Raises
    ------
    RunError
        A file cannot be read, lacks a part, or has a value that no measurement gives.
    """
    path = directory / "latency.json"
    settings = read_object(path, error=RunError, way_out=WAY_OUT)
    check_keys(settings, _SETTINGS, str(path), error=RunError, way_out=WAY_OUT)
    for key, kind in (("batch_sizes", int), ("checked", float | int)):
        values = {f"{key}[{i}]": value for i, value in enumerate(settings[key])}
        check_keys(values, dict.fromkeys(values, kind), str(path), error=RunError, way_out=WAY_OUT)
    counts = [settings["repeats"], settings["batches"], *settings["batch_sizes"]]
    are_checked = all(0 <= threshold <= 1 for threshold in settings["checked"])
    is_plain = min(counts) >= 1 and max(counts) <= 10**9 and settings["seed"] >= 0 and settings["batch_sizes"]
    if not is_plain or not are_checked or len(set(settings["batch_sizes"])) < len(settings["batch_sizes"]):
        raise RunError(
            f"{path}: repeats, batches, batch_sizes, checked and seed must be those of a measurement; {WAY_OUT}"
        )
    inputs = settings.get("inputs") or {}
    check_keys(inputs, dict.fromkeys(inputs, str), f"{path}: inputs", error=RunError, way_out=WAY_OUT)
    try:
        spec = CascadeSpec.from_dict(settings["cascade"], where=f"{path}: cascade")
    except SpecError as error:
        raise RunError(f"{shorten(str(error), 500)}; {WAY_OUT}") from error
    columns = {"example_id": STRING}
    for stage in spec.stages:
        columns |= {f"{stage.name}_probability": NUMBER, f"{stage.name}_tokens": WHOLE}
    texts, timings = _frame(directory / "texts.parquet", columns), _frame(directory / "timings.parquet", _TIMINGS)
    if texts.empty or timings.empty:
        raise RunError(f"{directory}: has no text or no timing; {WAY_OUT}")
    names = [stage.name for stage in spec.stages]
    if not timings["stage"].isin(names).all():
        raise RunError(f"{directory / 'timings.parquet'}: a row is of no stage of the cascade; {WAY_OUT}")
    for table, name, may_miss in ((texts, "texts", ()), (timings, "timings", ("threshold",))):
        numbers = table.select_dtypes("number").drop(columns=list(may_miss), errors="ignore")
        values = numbers.to_numpy(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise RunError(f"{directory / name}.parquet: a number is missing, negative or infinite; {WAY_OUT}")
    probabilities = texts[[f"{name}_probability" for name in names]].to_numpy(np.float64)
    tokens = texts[[f"{name}_tokens" for name in names]].to_numpy(np.int64)
    if probabilities.max() > 1 or not 1 <= tokens.min() <= tokens.max() <= _MOST_TOKENS:
        raise RunError(f"{directory / 'texts.parquet'}: a probability or a number of tokens is impossible; {WAY_OUT}")
    if not _is_measured(timings, settings, len(texts), names[0]):
        raise RunError(
            f"{directory / 'timings.parquet'}: has other rows than the measurement of these texts; {WAY_OUT}"
        )
    return settings, texts, timings


def _is_measured(timings: pd.DataFrame, settings: dict[str, Any], n_texts: int, first: str) -> bool:
    """Return whether the rows are those of a measurement: one per batch and stage, of sizes and times that can be.

    The settings determine the size of each batch that comes in, and all of its texts reach the first stage.
    """
    batch = ["check", "threshold", "repeat", "batch_size", "batch"]
    size, number, n = (timings[name].to_numpy() for name in ("batch_size", "batch", "n_examples"))
    n_measured = np.minimum(n_texts, size * np.minimum(settings["batches"], n_texts))
    incoming = np.minimum(size, n_measured - number * size)
    is_first = (timings["stage"] == first).to_numpy()
    seconds = timings[["tokenize_seconds", "run_seconds", "answer_seconds"]]
    length, n_tokens = timings["sequence_length"], timings["n_tokens"]
    own, checks = timings[~timings["check"]], timings[timings["check"]]
    return bool(
        size.max() <= n_texts
        and number.max() < n_texts
        and ((n >= 1) & (n <= incoming)).all()
        and (n == incoming)[is_first].all()
        and not timings.duplicated([*batch, "stage"]).any()
        and len(timings[batch].drop_duplicates()) == is_first.sum()
        and set(own["batch_size"]) == set(settings["batch_sizes"])
        and set(checks["batch_size"]) <= set(settings["batch_sizes"])
        and own["repeat"].max() + 1 == settings["repeats"]
        and (checks["repeat"] < settings["repeats"]).all()
        and own["threshold"].nunique() <= 1
        and checks["threshold"].isin(settings["checked"]).all()
        and length.between(1, _MOST_TOKENS).all()
        and n_tokens.between(n, n * length).all()
        and seconds.sum(axis=1).between(1e-9, 1e6).all()
    )


def _frame(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    try:
        if path.exists() and not path.is_file():
            raise RunError(f"{path}: is not a file; {WAY_OUT}")
        with open(path, "rb") as file:
            return bounded_table(file, path, columns, way_out=WAY_OUT).to_pandas()
    except DAMAGE as error:
        raise RunError(f"{path}: cannot be read ({shorten(str(error), 200)}); {WAY_OUT}") from error
