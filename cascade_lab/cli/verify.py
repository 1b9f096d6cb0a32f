"""`cascade-lab verify` rebuilds a report and compares it with the saved one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import PARAMETERS, read_parameters
from cascade_lab.cli.printing import MAX_CELL, line, next_step
from cascade_lab.text import shorten

if TYPE_CHECKING:
    from cascade_lab.reporting.verify import Verdict

MAX_LINES = 20  # differences that are shown


def verify(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT", help="The HTML or the JSON of a report.", show_default=False)
    ],
    run: Annotated[
        Path | None, typer.Option(help="The run of the report [default: the run directory that it is in].")
    ] = None,
    notebook: Annotated[
        Path | None,
        typer.Option(help="The notebook, if it is your own; executed only if the report was made with it."),
    ] = None,
    parameter: PARAMETERS = None,
) -> None:
    """Rebuild a report and compare it with the saved one; exit code 1 if a number or a word differs.

    Example: cascade-lab verify runs/clinc150/report.html
    """
    from cascade_lab.reporting.verify import verify_report
    from cascade_lab.run import Run

    verdict = verify_report(
        report,
        None if run is None else Run.read(run),
        notebook=notebook,
        parameters=read_parameters(parameter),
        progress=shows_progress(),
    )
    for name, before, after in verdict.changed_values[:MAX_LINES]:
        line(f"{_shown(name)}: was {_shown(before)}, is {_shown(after)}")
    if len(verdict.changed_values) > MAX_LINES:
        line(f"and {len(verdict.changed_values) - MAX_LINES:,} more")
    versions = "; ".join(
        f"{name} was {_shown(before)}, is {_shown(after)}" for name, (before, after) in verdict.changed_packages.items()
    )
    line(f"{report}: {_result(verdict)}" + (f" ({versions})" if versions else ""))
    next_step("runs")
    if not verdict.holds:
        raise typer.Exit(1)


def _result(verdict: Verdict) -> str:
    if verdict.changed_values:
        return f"{len(verdict.changed_values):,} values differ"
    if verdict.page_difference == "other page":
        return (
            "every number is the same, but the HTML is not the page that was written with the JSON: it was edited, or "
            "its writing was interrupted"
        )
    if verdict.page_difference == "words":
        return "every number is the same, but the page is not: another version of cascade-lab wrote it"
    if verdict.page_difference == "pictures":
        return "every number and word is the same, but the pictures are not the same bytes"
    fonts = [name for name in verdict.changed_packages if name.startswith("font ")]
    kinds = ["versions of packages"] * (len(fonts) < len(verdict.changed_packages)) + ["fonts"] * bool(fonts)
    return f"identical except for {' and '.join(kinds)}" if kinds else "identical"


def _shown(value: Any) -> str:
    return "missing" if value is None else shorten(str(value), MAX_CELL)
