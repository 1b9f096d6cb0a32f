"""`cascade-lab report` executes a notebook on a run and writes an HTML file, or writes a summary of one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.actions import make_report
from cascade_lab.cli.options import PARAMETERS, RUN, read_parameters
from cascade_lab.cli.printing import line, next_step
from cascade_lab.exceptions import RunError


def report(
    run: RUN,
    notebook: Annotated[
        str | None,
        typer.Option(
            help="The notebook to execute: a name, or the path of your own .ipynb [default: 01_run_cascade].",
            show_default=False,
        ),
    ] = None,
    parameter: PARAMETERS = None,
    summary: Annotated[
        bool,
        typer.Option(
            "--summary", help="Write one page to print, for a reader who knows no cascade; no notebook is executed."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file to write [default: report.html in the run, NOTEBOOK.html or summary.html there]."
        ),
    ] = None,
) -> None:
    """Execute a notebook on a run: writes what it shows as one HTML file, and all its numbers as JSON beside it.

    The first screen has the verdict, and what to try next. The same run gives the same bytes; `cascade-lab verify`
    rebuilds a report and compares.

    Example: cascade-lab report runs/clinc150 --notebook 03_analyse_errors
    """
    from cascade_lab.run import Run

    if summary and (notebook is not None or parameter):
        raise RunError("a summary executes no notebook; leave out --notebook and --parameter, or --summary")
    read = Run.read(run)
    if summary:
        from cascade_lab.reporting.summary import write_summary

        path = write_summary(read, output)
    else:
        path = make_report(read, output, notebook=notebook, parameters=read_parameters(parameter))
    line(f"{'summary' if summary else 'report'}: {path}")
    next_step("verify", path)
