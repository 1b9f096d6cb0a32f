"""`cascade-lab calibrate` fits the stages' temperatures or calibrators and writes the calibrated cascade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.options import NEW_CASCADE, OVERWRITE, RUN, STAGES
from cascade_lab.cli.printing import interval, line, next_step, number, print_dropped_bounds, show, table
from cascade_lab.text import exact

if TYPE_CHECKING:
    import pandas as pd

    from cascade_lab.analysis.calibrators import Calibrated, CalibratorComparison
    from cascade_lab.analysis.metrics import On
    from cascade_lab.spec import CascadeSpec


def calibrate(
    run: RUN,
    output: NEW_CASCADE,
    stage: STAGES = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="temperature; platt, beta or isotonic (for gates); vector (for classes); or auto: for each stage what "
            "has the lowest held-out log loss, if it is lower than the temperature's by more than its standard error.",
        ),
    ] = "temperature",
    everything: Annotated[
        bool,
        typer.Option(
            "--everything",
            help="Fit a stage on all texts that have a true label there, not only on those that reached it.",
        ),
    ] = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Fit each stage's temperature or calibrator on a run's kept logits, and write the cascade that has them.

    RUN is a run of a set to fit on, not of the test set. A gate of two labels keeps its decisions: its threshold, a
    probability, changes with its calibration.

    Example: cascade-lab calibrate runs/val --method auto --output calibrated.toml
    """
    import pandas as pd

    from cascade_lab.analysis.calibrators import calibrated, compare_calibrators
    from cascade_lab.analysis.temperature import fit_temperatures
    from cascade_lab.atomic import locked_file
    from cascade_lab.run import Run

    with locked_file(output, overwrite=overwrite, what="calibrated cascade"):
        fitted_run = Run.read(run)
        on: On = "all" if everything else "reached"
        comparison, names = None, stage or [s.name for s in fitted_run.spec.stages]
        if method != "temperature":
            comparison = compare_calibrators(fitted_run, stage or None, method=method, on=on)
            names = [name for name in comparison.table.index.unique("stage") if name not in comparison.chosen]
        temperatures = fit_temperatures(fitted_run, names, on=on) if names else pd.DataFrame()
        result = calibrated(fitted_run, temperatures, comparison)
        result.spec.write(output)

    if comparison is not None:
        _print_comparison(comparison)
    if len(temperatures):
        _print_temperatures(temperatures)
    _print_thresholds(fitted_run.spec, result, names=[*temperatures.index, *(comparison.chosen if comparison else ())])
    if result.n_changed:
        line(f"{result.n_changed:,} answers of this run change; tune thresholds again on a run of the new cascade")
    else:
        line("no answer of this run changes")
    has_dropped = print_dropped_bounds(fitted_run.spec, result.spec, output)
    line(f"cascade: {output}")
    if not has_dropped:
        next_step("run", output, "EVALSET", "--output", "RUN")


def _print_temperatures(temperatures: pd.DataFrame) -> None:
    shown = table("stage", "texts", "temperature", "95% interval", "log loss", "after", "held out")
    for name, row in temperatures.iterrows():
        losses = [number(row[key]) for key in ("before", "after", "held_out")]
        between = interval(row["low"], row["high"], ".4g")
        shown.add_row(str(name), f"{row['n_examples']:,}", f"{row['value']:.4g}", between, *losses)
    show(shown)
    _print_out_of_scope(temperatures["n_out_of_scope"])
    line("held out: by cross-validation, on texts that the temperature was not fitted on")


def _print_comparison(comparison: CalibratorComparison) -> None:
    shown = table("stage", "texts", "method", "held out", "gain", "standard error", "chosen")
    for (name, method), row in comparison.table.iterrows():
        gain = ("", "") if method == "temperature" else (number(row["gain"], "+.4f"), number(row["standard_error"]))
        shown.add_row(
            name, f"{row['n_examples']:,}", method, number(row["held_out"]), *gain, "yes" if row["chosen"] else ""
        )
    show(shown)
    _print_out_of_scope(comparison.table["n_out_of_scope"].groupby(level="stage").first())
    line("held out: log loss by cross-validation; gain: how much lower it is than the temperature's")
    for name, stage in comparison.chosen.items():
        line(f"{name}: {stage.calibrator}")
        if stage.is_gate:
            row = comparison.table.loc[name].iloc[0]
            share = row["n_out_of_scope"] / row["n_examples"]
            line(f"{name}: fits the {share:.1%} of texts out of scope in this run; where that share differs, fit again")


def _print_out_of_scope(n_out_of_scope: pd.Series) -> None:
    for name, n in n_out_of_scope.items():
        if n:
            line(f"{name}: {n:,} of its texts are out of scope")


def _print_thresholds(spec: CascadeSpec, result: Calibrated, *, names: list[str]) -> None:
    before, after = spec.thresholds, result.spec.thresholds
    for stage in spec.stages:
        old, new = before[stage.name], after[stage.name]
        if stage.name not in result.kept:
            moved = "stays as it is" if old == new else f"{exact(old)} becomes {exact(new)}"
            calibrator = result.spec.stage(stage.name).calibrator
            why = "its decisions can change"
            if calibrator is None or calibrator.method != "vector":
                why = "no threshold gives exactly the same decisions"
            line(f"{stage.name}: its threshold {moved}, because {why}" if old is not None else f"{stage.name}: {why}")
        elif stage.name in names and old is not None and new != old:
            line(f"{stage.name}: threshold {exact(old)} becomes {exact(new)}, which decides the same")
