"""`cascade-lab report` and `verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cascade_lab.cli.console import line, printable
from cascade_lab.errors import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.run import Run

Parameters = Annotated[
    list[str],
    typer.Option(
        "--parameter", "-p", metavar="NAME=VALUE", help="Another parameter of the notebook: a number, a text, a run."
    ),
]
_MOST = 20  # lines that name what moved


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    notebook: Annotated[
        str, typer.Option(help="The notebook that makes it: a name, or the path of an .ipynb of one's own.")
    ] = "01_run_cascade",
    parameter: Parameters = [],  # noqa: B006 - typer takes lists as they are
    output: Annotated[
        Path | None,
        typer.Option(help="The HTML file to write [default: report.html in the run, or NOTEBOOK.html there]."),
    ] = None,
) -> None:
    """Write what a notebook shows of a run as one HTML file, with all its numbers as JSON beside it.

    The same run gives the same bytes; `cascade-lab verify` makes a report again and says so.

    Example: cascade-lab report runs/clinc150 --notebook 03_analyse_errors
    """
    from cascade_lab.run import Run

    made = make_report(Run.read(run), output, notebook=notebook, parameters=_values(parameter))
    line(f"report: {made}")


def verify(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A report's HTML or JSON.", show_default=False)],
    run: Annotated[
        Path | None, typer.Option(help="The run that it is of [default: the run that it lies in].", show_default=False)
    ] = None,
    notebook: Annotated[
        Path | None, typer.Option(help="The notebook, where it is one of one's own.", show_default=False)
    ] = None,
    parameter: Parameters = [],  # noqa: B006
) -> None:
    """Make a report again and say that it is identical, or which numbers moved (exit code 1).

    Example: cascade-lab verify runs/clinc150/report.html
    """
    from cascade_lab.run import Run
    from cascade_lab.verification import verify_report

    verdict = verify_report(
        report,
        None if run is None else Run.read(run),
        notebook=notebook,
        parameters=_values(parameter),
        progress=sys.stderr.isatty(),
    )
    for name, was, now in verdict.moved[:_MOST]:
        line(f"{printable(name)}: was {_said(was)}, is {_said(now)}")
    if len(verdict.moved) > _MOST:
        line(f"and {len(verdict.moved) - _MOST:,} more")
    versions = "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in verdict.packages.items())
    if verdict.moved:
        said = f"{len(verdict.moved):,} moved"
    elif verdict.page == "words":
        said = "every number is the same, and the page is not: its HTML was changed, or is of another cascade-lab"
    elif verdict.page == "pictures":
        said = "every number and word is the same, the pictures are not byte for byte"
    else:
        said = "identical" if not verdict.packages else "identical but for the versions of packages"
    line(f"{report}: {said}" + (f" ({versions})" if versions else ""))
    if not verdict.holds:
        raise typer.Exit(1)


def make_report(run: Run, output: Path | None = None, **more: Any) -> Path:
    """Write a run's report and draw its figures, with progress on a terminal."""
    from cascade_lab.report import NOTEBOOK, write_figures, write_report

    path = write_report(run, output, progress=sys.stderr.isatty(), **more)
    if more.get("notebook", NOTEBOOK) == NOTEBOOK:
        with Console(stderr=True).status("drawing figures"):
            write_figures(run)
    return path


def _values(given: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE, the value as JSON where it is some, else as text."""
    values = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise CascadeLabError(f"'{pair}' is not NAME=VALUE; write it so")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def _said(value: Any) -> str:
    return "not there" if value is None else printable(str(value))
