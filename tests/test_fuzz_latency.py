"""Fuzzers of the directory of a latency study: it is read and everything is computed of it, or refused in one line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_fuzz_files import changed_bytes, changed_value, report, rounds, tried
from test_serving_latency import simulated

from cascade_lab.analysis import serving_summary
from cascade_lab.analysis.serving_latency import LatencyStudy, serving_metrics
from cascade_lab.displays.latency import BatchLatencyDisplay, LengthLatencyDisplay, PredictedCostDisplay

CELLS = [
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    2**40,
    2**62,
    0.5,
    1e-300,
    1e308,
    np.nan,
    np.inf,
    "",
    "gate0",
    "x" * 3000,
    b"\xff",
    [],
    {},
]


def computed(folder: Path) -> None:
    """Compute what `cascade-lab latency` prints and notebook 05 shows."""
    study = LatencyStudy.read(folder)
    repr(study), study._repr_html_(), serving_metrics(study.own)
    for compute in ("waiting_times", "text_costs", "missing_intervals", "summary"):
        repr(getattr(serving_summary, compute)(study))
    BatchLatencyDisplay.from_study(study).frame()
    for stage in study.spec.stages:
        LengthLatencyDisplay.from_study(study, stage=stage.name).frame()
    if len(study.spec.stages) > 1:
        PredictedCostDisplay.from_study(study).frame(), serving_summary.cost_checks(study)


def changed_table(table: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """Return a table with one change: a cell, a column, or its rows."""
    table = table.copy()
    row, column = int(rng.integers(len(table))), str(rng.choice(table.columns))
    value = CELLS[rng.integers(len(CELLS))]
    kind = rng.integers(7)
    if kind <= 1:
        cells = table[column].tolist()
        cells[row] = value
        table[column] = pd.Series(cells, dtype=object if isinstance(value, list | dict | bytes) else None)
    elif kind == 2:
        table[column] = [value] * len(table)
    elif kind == 3:
        return table.drop(columns=column)
    elif kind == 4:
        return table.drop(index=rng.choice(len(table), int(rng.integers(1, len(table))), replace=False))
    elif kind == 5:
        return pd.concat([table, table.iloc[row : row + 3]])
    else:
        table[column] = rng.permutation(table[column].to_numpy())
    return table


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "latency"
    simulated(n=40, batch_sizes=(1, 4), repeats=2).write(folder)
    computed(folder)
    return folder


@rounds
@pytest.mark.parametrize("name", ["latency.json", "texts.parquet", "timings.parquet"])
def test_latency_studies(name, n, study, tmp_path):
    good = {path.name: path.read_bytes() for path in study.iterdir()}
    for other, content in good.items():
        (tmp_path / other).write_bytes(content)
    path = tmp_path / name
    rng, outcomes = np.random.default_rng(7), Counter()
    for number in range(n // 6):  # to compute everything takes most of a second
        by_bytes = rng.random() < 0.3
        if by_bytes:
            path.write_bytes(changed_bytes(good[name], rng))
        elif name == "latency.json":
            path.write_text(json.dumps(changed_value(json.loads(good[name]), rng)))
        else:
            try:
                changed_table(pd.read_parquet(study / name), rng).to_parquet(path, index=False)
            except (ValueError, TypeError, OverflowError, pa.ArrowException):  # pyarrow cannot write such a column
                continue
        outcomes[tried(lambda: computed(tmp_path), f"{number}: {name}")] += 1
    report(f"latency studies, {name}", outcomes)
