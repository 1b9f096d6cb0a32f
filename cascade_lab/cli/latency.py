"""`cascade-lab latency` measures live serving at several batch sizes."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cascade_lab.cli.actions import default_directory, load_cascade, read_evalset
from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import (
    CASCADE,
    COLUMNS,
    ENCODING,
    EVALSET,
    LABEL_COLUMN,
    LABEL_MAP,
    LIMIT,
    OVERWRITE,
    SPLIT,
    TEXT_COLUMN,
)
from cascade_lab.cli.printing import UNDEFINED, line, next_step, number, percent, show, table, title
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    import pandas as pd

    from cascade_lab.analysis.serving_latency import LatencyStudy


def latency(
    cascade: CASCADE,
    evalset: EVALSET,
    split: SPLIT = None,
    encoding: ENCODING = None,
    text_column: TEXT_COLUMN = "text",
    label_column: LABEL_COLUMN = "label",
    label_map: LABEL_MAP = None,
    columns: COLUMNS = None,
    output: Annotated[
        Path | None, typer.Option(help="The directory to write [default: runs/latency-NAME-TIME].")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="How many texts arrive together; several sizes.")] = "1,8,32,128",
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 5,
    limit: LIMIT = 512,
    batches: Annotated[int, typer.Option(min=1, help="The most batches per repeat and batch size.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Decides the random order of the texts.")] = 0,
    overwrite: OVERWRITE = False,
) -> None:
    """Measure live serving at several batch sizes: how long a caller waits, and what another threshold would cost.

    The measurement works like a server: texts arrive in random order, and only the texts of a batch that pass a gate
    go on to the next stage.

    Example: cascade-lab latency cascade.toml data_full.json --split test
    """
    from cascade_lab.analysis.serving_latency import LATENCY_DIRECTORY
    from cascade_lab.atomic import check_directory, whole_directory
    from cascade_lab.latency_benchmark import check_sizes, measure
    from cascade_lab.spec import CascadeSpec

    # Everything that can be refused early is refused before TensorFlow is loaded.
    spec = CascadeSpec.read(cascade)
    texts = read_evalset(
        evalset,
        None,
        split=split,
        limit=limit,
        encoding=encoding,
        text_column=text_column,
        label_column=label_column,
        label_map=label_map,
        columns=columns,
    )
    sizes = _read_sizes(batch_sizes)
    check_sizes(sizes, len(texts))
    output = output or default_directory(f"latency-{spec.name}")
    check_directory(output, overwrite=overwrite, **LATENCY_DIRECTORY)
    with load_cascade(spec) as loaded, whole_directory(output, overwrite=overwrite, **LATENCY_DIRECTORY) as directory:
        study = measure(
            loaded,
            texts,
            batch_sizes=sizes,
            repeats=repeats,
            limit=None,
            batches=batches,
            seed=seed,
            progress=shows_progress(),
        )
        study.write_into(directory)
    _print_study(study)
    line(f"latency: {output}")
    next_step("report", "RUN", "--notebook", "05_study_latency", "-p", f"latency_dir={output}")


def _print_study(study: LatencyStudy) -> None:
    """Print what a caller waits, what a text costs, and the predicted beside the measured cost."""
    from cascade_lab.analysis.serving_latency import WHOLE, checked_cost, serving_metrics
    from cascade_lab.analysis.serving_summary import missing_intervals

    metrics = serving_metrics(study.own)
    waits = table("batch", "stage", "p50 ms", "p95 ms", "p99 ms")
    costs = table("batch", "stage", "ms/text", "texts/second", "tokenizing", "share")
    numbers = metrics[["value", "low", "high"]]
    measured = metrics.index.droplevel("metric").unique()
    stages = [*(stage.name for stage in study.spec.stages), WHOLE]
    for batch_size, stage in product(measured.unique("batch_size"), stages):
        if (batch_size, stage) not in measured:
            continue
        values = numbers.loc[(batch_size, stage)]
        waits.add_row(str(batch_size), stage, *[_with_interval(*values.loc[f"batch_p{p}_ms"]) for p in (50, 95, 99)])
        costs.add_row(
            str(batch_size),
            stage,
            _with_interval(*values.loc["text_ms"]),
            _with_interval(*values.loc["texts_per_second"]),
            *[percent(values.loc[name, "value"]) for name in ("tokenize_share", "share")],
        )
    show(title(study.spec.name))
    show("\nWhat a caller waits for the whole batch, with 95% intervals", waits, *missing_intervals(study))
    show("\nWhat a text costs, amortised: the time of its batch divided by the texts in it", costs)
    if study.settings["checked"]:
        gate = study.spec.stages[0].name
        show(
            f"\nms/text at other thresholds of {gate}: predicted, and measured with 95% intervals",
            _checks(checked_cost(study)),
        )


def _checks(checks: pd.DataFrame) -> Table:
    shown = table("threshold", "reach", "batch", "goes on", "predicted ms", "measured ms", "error")
    for row in checks.itertuples(index=False):
        shown.add_row(
            f"{row.threshold:.6g}",
            f"{row.reach:.1%}",
            str(row.batch_size),
            number(row.surviving, ".1f"),
            _significant(row.predicted_ms),
            _with_interval(row.measured_ms, row.measured_low_ms, row.measured_high_ms),
            number(row.error, "+.1%"),
        )
    return shown


def _with_interval(value: float, low: float, high: float) -> str:
    return _significant(value) + ("" if math.isnan(low) else f" ({_significant(low)}–{_significant(high)})")


def _significant(value: float) -> str:
    """Return three significant digits, or all digits before the point.

    >>> _significant(1.2345), _significant(12.345), _significant(1234.5), _significant(float("nan"))
    ('1.23', '12.3', '1234', '–')
    """
    if math.isnan(value):
        return UNDEFINED
    n_decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{n_decimals}f}"


def _read_sizes(sizes: str) -> list[int]:
    try:
        return [int(size) for size in sizes.split(",")]
    except ValueError as error:
        raise CascadeLabError(f"batch sizes '{sizes}' are not whole numbers; write them like 1,8,32") from error
