"""`cascade-lab report` executes a notebook on a run and writes an HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.actions import make_report
from cascade_lab.cli.options import PARAMETERS, RUN, read_parameters
from cascade_lab.cli.printing import line, next_step


def report(
    run: RUN,
    notebook: Annotated[
        str, typer.Option(help="The notebook to execute: a name, or the path of your own .ipynb.")
    ] = "01_run_cascade",
    parameter: PARAMETERS = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write [default: report.html in the run, or NOTEBOOK.html there]."),
    ] = None,
) -> None:
    """Execute a notebook on a run: writes what it shows as one HTML file, and all its numbers as JSON beside it.

    The same run gives the same bytes; `cascade-lab verify` rebuilds a report and compares.

    Example: cascade-lab report runs/clinc150 --notebook 03_analyse_errors
    """
    from cascade_lab.run import Run

    path = make_report(Run.read(run), output, notebook=notebook, parameters=read_parameters(parameter))
    line(f"report: {path}")
    next_step("verify", path)
