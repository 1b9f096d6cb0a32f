"""`cascade-lab log` logs a run to MLflow or Weights & Biases."""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

import typer

from cascade_lab.cli.console import spinner
from cascade_lab.cli.options import RUN
from cascade_lab.cli.printing import line, next_step


def log(
    run: RUN,
    to: Annotated[
        Literal["mlflow", "wandb"],
        typer.Option(help="MLflow, or Weights & Biases. Each is an extra: cascade-lab[mlflow], cascade-lab[wandb]."),
    ],
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help="The experiment, or W&B's project [default: the cascade's name].")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name of the run there [default: the run's folder].")
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="The server or the store [default: by the tracker's own settings]."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Log a run that is there already a second time.")] = False,
    tables: Annotated[
        bool, typer.Option(help="Upload the tables too: texts, logits, predictions. A report may contain texts too.")
    ] = True,
) -> None:
    """Log a run to MLflow or Weights & Biases: settings, metrics with intervals, digests, reports, tables.

    Example: cascade-lab log runs/first --to mlflow --tracking-uri http://localhost:5000
    """
    from cascade_lab.run import Run
    from cascade_lab.tracking import log_run

    opened = Run.read(run)
    with spinner(f"logging to {to}"):
        logged, record = log_run(
            opened,
            to,
            experiment=experiment,
            name=name,
            tracking_uri=tracking_uri,
            again=again,
            tables=tables,
        )
    line(f"{to}: run {logged.name} ({logged.run_id}) of {logged.experiment}")
    line(
        f"{len(record.parameters)} parameters, {len(record.metrics)} metrics, {len(record.tags)} tags, "
        f"{len(record.files)} files ({record.n_bytes / 1e6:.1f} MB)"
    )
    line(f"at: {logged.place}")
    if to == "mlflow" and not logged.place.startswith("http"):
        line(f"look at it: mlflow ui --backend-store-uri {shlex.quote(logged.place)}")
    elif to == "wandb" and not logged.place.startswith("http"):
        line(f"upload it: wandb sync {shlex.quote(logged.place)}")
    if "report.html" not in record.files:
        line("the run has no report; write one with `cascade-lab report` and log the run with --again")
    next_step("runs")
