"""`cascade-lab calibrate` fits the stages' temperatures and writes the calibrated cascade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.options import NEW_CASCADE, OVERWRITE, RUN, STAGES
from cascade_lab.cli.printing import interval, line, number, show, table

if TYPE_CHECKING:
    import pandas as pd


def calibrate(
    run: RUN,
    output: NEW_CASCADE,
    stage: STAGES = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--everything",
            help="Fit a stage on all texts that have a true label there, not only on those that reached it.",
        ),
    ] = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Fit each stage's temperature on a run's kept logits, and write the cascade that has the temperatures.

    RUN is a run of a set to fit on, not of the test set. A gate of two labels keeps its decisions: its threshold, a
    probability, changes with its temperature.

    Example: cascade-lab calibrate runs/val --output calibrated.toml
    """
    from cascade_lab.analysis.temperature import calibrated, fit_temperatures
    from cascade_lab.atomic import refuse_existing
    from cascade_lab.run import Run

    refuse_existing(output, overwrite=overwrite)
    fitted_run = Run.read(run)
    temperatures = fit_temperatures(fitted_run, stage or None, on="all" if everything else "reached")
    result = calibrated(fitted_run, temperatures)
    result.spec.write(output)

    _print_temperatures(temperatures)
    before, after = fitted_run.spec.thresholds, result.spec.thresholds
    for name in temperatures.index:
        if name not in result.kept:
            line(f"{name}: its threshold stays as it is, because no threshold gives exactly the same decisions")
        elif before[name] is not None and after[name] != before[name]:
            line(f"{name}: threshold {before[name]:.6g} becomes {after[name]:.6g}, which decides the same")
    if result.n_changed:
        line(f"{result.n_changed:,} answers of this run change; tune thresholds again on a run of the new cascade")
    else:
        line("no answer of this run changes")
    line(f"cascade: {output}")


def _print_temperatures(temperatures: pd.DataFrame) -> None:
    shown = table("stage", "texts", "temperature", "95% interval", "log loss", "after", "held out")
    for name, row in temperatures.iterrows():
        losses = [number(row[key]) for key in ("before", "after", "held_out")]
        between = interval(row["low"], row["high"], ".4g")
        shown.add_row(str(name), f"{row['n_examples']:,}", f"{row['value']:.4g}", between, *losses)
    show(shown)
    line("held out: by cross-validation, on texts that the temperature was not fitted on")
