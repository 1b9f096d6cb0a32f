"""`cascade-lab calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cascade_lab.cli.console import figure, line, table
from cascade_lab.errors import CascadeLabError


def calibrate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run of a set to fit on, not of the test set.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The cascade.toml to write.", show_default=False)],
    stage: Annotated[
        list[str], typer.Option(metavar="STAGE", help="A stage to calibrate [default: every stage].")
    ] = [],  # noqa: B006 - typer takes lists as they are
    everything: Annotated[
        bool,
        typer.Option(
            "--everything", help="Fit a stage on all texts with a gold label there, not just on what reached it."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at the output.")] = False,
) -> None:
    """Fit each stage's temperature on a run's kept logits, and write the cascade that has them.

    A gate of two labels keeps its decisions: its threshold, a probability, moves with its temperature.

    Example: cascade-lab calibrate runs/val --output calibrated.toml
    """
    from cascade_lab.analysis.temperature import calibrated, fit_temperatures
    from cascade_lab.run import Run

    if output.exists() and not overwrite:
        raise CascadeLabError(f"{output} exists already; choose another output, or ask to overwrite it")
    made = Run.read(run)
    on = "all" if everything else "reached"
    fitted = fit_temperatures(made, stage or None, on=on)
    found = calibrated(made, fitted)
    try:
        found.spec.write(output)
    except OSError as error:
        raise CascadeLabError(f"{output}: cannot be written ({error.strerror}); choose another place") from error

    shown = table("stage", "texts", "temperature", "95% interval", "log loss", "after", "held out")
    for name, row in fitted.iterrows():
        between = f"{row['low']:.4g} to {row['high']:.4g}"
        losses = [figure(row[key], 4) for key in ("before", "after", "held_out")]
        shown.add_row(name, f"{row['n_examples']:,}", f"{row['value']:.4g}", between, *losses)
    Console().print(shown)
    line("held out: by cross-validation, on texts that the temperature was not fitted on")
    for name in fitted.index:
        _say_thresholds(name, made.spec.thresholds[name], found.spec.thresholds[name], name in found.kept)
    if found.n_changed:
        line(f"{found.n_changed:,} answers of this run change; tune thresholds again on a run of the new cascade")
    else:
        line("no answer of this run changes")
    line(f"cascade: {output}")


def _say_thresholds(name: str, before: float | None, after: float | None, is_kept: bool) -> None:
    if not is_kept:
        line(f"{name}: its threshold stays as it is and means something else now, for none does exactly the same")
    elif before is not None and after != before:
        line(f"{name}: threshold {before:.6g} becomes {after:.6g}, which decides the same")
