"""`cascade-lab latency`."""

from __future__ import annotations

import sys
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from cascade_lab.cli.console import figure, line, percent, table, tensorflow
from cascade_lab.errors import CascadeLabError

if TYPE_CHECKING:
    import pandas as pd

    from cascade_lab.analysis.live_latency import LatencyStudy


def latency(
    cascade: Annotated[Path, typer.Argument(metavar="CASCADE", help="A cascade.toml.", show_default=False)],
    evalset: Annotated[
        Path, typer.Argument(metavar="EVALSET", help="Texts, as `cascade-lab run` takes them.", show_default=False)
    ],
    split: Annotated[
        str | None, typer.Option(help="Take only this split (of CLINC150's json, or of a column 'split').")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The directory to make [default: runs/latency-NAME-TIME].")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="How many texts come in at a time.")] = "1,8,32,128",
    repeats: Annotated[int, typer.Option(min=1, help="How often everything is served.")] = 5,
    limit: Annotated[int, typer.Option(min=1, help="Take only so many texts, evenly spaced through the set.")] = 512,
    batches: Annotated[int, typer.Option(min=1, help="The most batches of a repeat at one batch size.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the texts' order, which is by chance.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the study at the output.")] = False,
) -> None:
    """Serve texts live at several batch sizes, and say what a caller waits and what another threshold would cost.

    As a server does: in the order in which the texts come, each batch's survivors going on alone.

    Example: cascade-lab latency cascade.toml data_full.json --split test
    """
    from cascade_lab.analysis.live_latency import LATENCY_DIRECTORY
    from cascade_lab.evalset import EvalSet
    from cascade_lab.spec import CascadeSpec
    from cascade_lab.timing import check_sizes, measure
    from cascade_lab.wholly import check_directory

    # All that can be refused cheaply is, before TensorFlow is loaded.
    spec = CascadeSpec.read(cascade)
    texts = EvalSet.read(evalset, split=split).limit(limit)
    sizes = _sizes(batch_sizes)
    check_sizes(sizes, len(texts))
    output = output or Path("runs") / f"latency-{spec.name}-{datetime.now():%Y%m%d-%H%M%S}"
    check_directory(output, overwrite=overwrite, **LATENCY_DIRECTORY)
    with tensorflow(f"loading {len(spec.stages)} stages"):
        from cascade_lab.cascade import Cascade

        loaded = Cascade.load(spec)
    with loaded:
        study = measure(
            loaded,
            texts,
            batch_sizes=sizes,
            repeats=repeats,
            limit=None,
            batches=batches,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    study.write(output, overwrite=overwrite)
    print_study(study)
    line(f"latency: {output}")


def print_study(study: LatencyStudy) -> None:
    """Print what a caller waits, what a text costs, and the predicted beside the measured cost."""
    from cascade_lab.analysis.live_latency import WHOLE, checked_cost, live_figures

    figures = live_figures(study.own)
    waits = table("batch", "stage", "p50 ms", "p95 ms", "p99 ms")
    costs = table("batch", "stage", "ms a text", "texts a second", "tokenizing", "share")
    reached = figures.index.droplevel("figure").unique()
    names = [*(stage.name for stage in study.spec.stages), WHOLE]
    for batch_size, stage in product(reached.unique("batch_size"), names):
        if (batch_size, stage) not in reached:
            continue
        own = figures.loc[(batch_size, stage)]
        waits.add_row(str(batch_size), stage, *[_between(*own.loc[f"batch_p{p}_ms"]) for p in (50, 95, 99)])
        costs.add_row(
            str(batch_size),
            stage,
            _between(*own.loc["text_ms"]),
            _between(*own.loc["texts_per_second"]),
            *[percent(own.loc[name, "value"]) for name in ("tokenize_share", "share")],
        )
    console = Console()
    console.print(Text(study.spec.name, style="bold"))
    console.print("\nWhat a caller waits for the whole batch, and the 95% interval", waits, sep="\n", highlight=False)
    console.print("\nWhat a text costs: the batch's time divided among its texts", costs, sep="\n", highlight=False)
    if study.settings["checked"]:
        gate = study.spec.stages[0].name
        console.print(f"\nWhat a text costs at other thresholds of {gate}", highlight=False)
        console.print(_checks(checked_cost(study)))


def _checks(checks: pd.DataFrame) -> object:
    shown = table("threshold", "reach", "batch", "goes on", "predicted ms", "measured ms", "error")
    for row in checks.itertuples(index=False):
        shown.add_row(
            f"{row.threshold:.6g}",
            f"{row.reach:.1%}",
            str(row.batch_size),
            figure(row.surviving, 1),
            _short(row.predicted_ms),
            _between(row.measured_ms, row.measured_low_ms, row.measured_high_ms),
            "–" if row.error != row.error else f"{row.error:+.1%}",
        )
    return shown


def _between(value: float, low: float, high: float) -> str:
    return _short(value) + ("" if low != low else f" ({_short(low)}–{_short(high)})")


def _short(value: float) -> str:
    """Three figures that count, or the whole part."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return "–" if value != value else f"{value:.{digits}f}"


def _sizes(given: str) -> list[int]:
    try:
        return [int(size) for size in given.split(",")]
    except ValueError as error:
        raise CascadeLabError(f"batch sizes '{given}' are not whole numbers; write them so: 1,8,32") from error
