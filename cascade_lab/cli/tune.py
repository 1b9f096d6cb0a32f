"""`cascade-lab tune` chooses thresholds on a run and writes the tuned cascade."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import NEW_CASCADE, OVERWRITE, RUN, STAGES, read_numbers
from cascade_lab.cli.printing import interval, line, number, print_labelled, show, table

if TYPE_CHECKING:
    from cascade_lab.thresholds import Tuning


def tune(
    run: RUN,
    output: NEW_CASCADE,
    maximize: Annotated[str | None, typer.Option(help="The metric to maximize, such as reject_recall.")] = None,
    minimize: Annotated[str | None, typer.Option(help="The metric to minimize, such as mean_cost.")] = None,
    at_least: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=VALUE", help="A lower bound, such as in_scope_accuracy=0.95.")
    ] = None,
    at_most: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=VALUE", help="An upper bound, such as risk=0.05 or p95_ms=20.")
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTCOME=COST", help='What an outcome costs, such as "false accept=5".'),
    ] = None,
    prevalence: Annotated[
        float | None,
        typer.Option(help="The fraction of out-of-scope texts to tune for [default: the fraction in the run]."),
    ] = None,
    stage: STAGES = None,
    guarantee: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="The least value of in_scope_accuracy or reject_recall, guaranteed with probability 1 - DELTA.",
        ),
    ] = None,
    delta: Annotated[float, typer.Option(min=1e-6, max=0.5, help="The probability that the guarantee may fail.")] = 0.1,
    by_label: Annotated[
        bool,
        typer.Option(
            "--by-label",
            help="Try a threshold per label of the last stage; use them if better. Not with --guarantee.",
        ),
    ] = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Choose thresholds from a run's kept logits, and write the cascade that has them.

    RUN is a run of a tuning set, not of the test set, with shadow scores. By default every stage that can reject is
    tuned. The metrics are accuracy, in_scope_accuracy, reject_recall, reject_precision, coverage, risk and mean_cost.

    Example: cascade-lab tune runs/val --maximize reject_recall --at-least in_scope_accuracy=0.95 --output tuned.toml
    """
    from cascade_lab.atomic import refuse_existing
    from cascade_lab.run import Run
    from cascade_lab.thresholds import Goal
    from cascade_lab.thresholds import tune as tune_run

    goal = Goal(
        maximize=maximize,
        minimize=minimize,
        at_least=read_numbers(at_least),
        at_most=read_numbers(at_most),
        costs=read_numbers(cost),
        prevalence=prevalence,
    )
    guarantees = read_numbers([guarantee] if guarantee else None)
    refuse_existing(output, overwrite=overwrite)
    tuned_run = Run.read(run)
    tuning = tune_run(
        tuned_run,
        goal,
        stages=stage or None,
        guarantee=next(iter(guarantees.items()), None),
        delta=delta,
        by_label=by_label,
        progress=shows_progress(),
    )
    tuning.write(output, overwrite=overwrite)
    _print_tuning(tuning)
    print_labelled(tuned_run)
    line(f"cascade: {output}")


def _print_tuning(tuning: Tuning) -> None:
    """Print the thresholds, every metric at them, the gain of thresholds per label, and the guarantee."""
    bootstrap = tuning.bootstrap
    thresholds = table("stage", "threshold", *(["95% of resamples"] if bootstrap else []))
    for stage, row in tuning.thresholds.iterrows():
        resampled = [interval(row["low"], row["high"], ".4g")] if bootstrap else []
        chosen = "per label" if math.isnan(row["chosen"]) else f"{row['chosen']:.6g}"
        thresholds.add_row(str(stage), chosen, *resampled)
    metrics = table("metric", "on this set", "95% interval", "held out (cross-validation)")
    for name, row in tuning.metrics.iterrows():
        between = interval(row["low"], row["high"])
        metrics.add_row(str(name), number(row["value"]), between, number(row["cross_validated"]))
    show(thresholds, "", metrics)
    if bootstrap and bootstrap.infeasible:
        line(f"on {bootstrap.infeasible:.0%} of the resamples no thresholds satisfy the goal")
    if tuning.per_label is not None:
        gain = tuning.per_label.gain
        used = "used" if tuning.uses_per_label else "not used"
        between = interval(gain.low, gain.high)
        line(f"a threshold per label: a gain of {number(gain.value)} ({between}) in {tuning.goal.metric}: {used}")
    line(f"goal: {tuning.goal}")
    if tuning.guarantee:
        line(f"guarantee: {tuning.guarantee}")
