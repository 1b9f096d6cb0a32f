"""Does what several commands need: loads a cascade, reads an eval set for it, writes a report, names a directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cascade_lab.cli.console import shows_progress, spinner
from cascade_lab.cli.options import read_columns

if TYPE_CHECKING:
    from cascade_lab.cascade import Cascade
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec


def default_directory(name: str) -> Path:
    """Return `runs/NAME-TIME`, for a command that was given no output; a name decides nothing about the folder."""
    letters = re.sub(r"[^\w.-]+", "-", name)[:80].strip(".-") or "cascade"
    return Path("runs") / f"{letters}-{datetime.now():%Y%m%d-%H%M%S}"


def read_evalset(
    path: Path,
    spec: CascadeSpec | None,
    *,
    split: str | None = None,
    limit: int | None = None,
    encoding: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    label_map: Path | None = None,
    columns: str | None = None,
    unlabelled: bool = False,
) -> EvalSet:
    """Read texts, check every label against the cascade (if one is given), and keep at most `limit` texts."""
    from cascade_lab.decisions import check_labels
    from cascade_lab.evalset import EvalSet
    from cascade_lab.label_files import read_label_map

    evalset = EvalSet.read(
        path,
        split=split,
        unlabelled=unlabelled,
        text_column=text_column,
        label_column=label_column,
        label_map=None if label_map is None else read_label_map(label_map),
        columns=read_columns(columns),
        encoding=encoding,
    )
    if spec is not None:
        check_labels(spec, evalset.examples, evalset.locations)
    return evalset if limit is None else evalset.limit(limit)


def load_cascade(spec: CascadeSpec, *, keep_features: bool = False) -> Cascade:
    """Load TensorFlow and every stage of a cascade, quietly. Close the cascade after use."""
    with spinner(f"loading {len(spec.stages)} stages"):
        from cascade_lab.cascade import Cascade

        return Cascade.load(spec, keep_features=keep_features)


def make_report(
    run: Run,
    output: Path | None = None,
    *,
    notebook: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run's report, with progress on a terminal; the first notebook's report comes with a run's figures."""
    from cascade_lab.reporting.report import NOTEBOOK, write_figures, write_report

    notebook = notebook or NOTEBOOK
    path = write_report(run, output, notebook=notebook, parameters=parameters, progress=shows_progress())
    if notebook == NOTEBOOK:
        with Console(stderr=True).status("drawing figures"):
            write_figures(run)
    return path
