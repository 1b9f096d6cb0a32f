"""`cascade-lab tune` chooses thresholds on a run and writes the tuned cascade."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import AT_LEAST, COST, NEW_CASCADE, OVERWRITE, RUN, STAGES, read_numbers
from cascade_lab.cli.printing import interval, line, next_step, number, print_labelled, show, signed, table
from cascade_lab.text import exact

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.thresholds import Tuning


def tune(
    run: RUN,
    output: NEW_CASCADE,
    maximize: Annotated[str | None, typer.Option(help="The metric to maximize, such as reject_recall.")] = None,
    minimize: Annotated[str | None, typer.Option(help="The metric to minimize, such as mean_cost.")] = None,
    at_least: AT_LEAST = None,
    at_most: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=VALUE", help="An upper bound, such as risk=0.05 or p95_ms=20.")
    ] = None,
    cost: COST = None,
    cost_matrix: Annotated[
        Path | None,
        typer.Option(
            help="A csv of costs, one row per true label and one column per predicted label; a reject label's column "
            "has the costs of rejecting. Not with --cost.",
            show_default=False,
        ),
    ] = None,
    prevalence: Annotated[
        float | None,
        typer.Option(help="The fraction of out-of-scope texts to tune for [default: the fraction in the run]."),
    ] = None,
    stage: STAGES = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0.5, max=1 - 1e-6, help="Every bound then holds on new texts, all together, with this probability."
        ),
    ] = None,
    guarantee: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="A lower bound to guarantee with probability 1 - DELTA. Several hold together with it.",
        ),
    ] = None,
    delta: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="The probability that the guarantees may fail.")
    ] = 0.1,
    by_label: Annotated[
        bool,
        typer.Option(
            "--by-label",
            help="Try a threshold per label of the last stage; use them if better. Not with --guarantee.",
        ),
    ] = False,
    test: Annotated[
        Path | None, typer.Option(help="A run of other texts, with shadow scores, to compare on.", show_default=False)
    ] = None,
    write_anyway: Annotated[
        bool,
        typer.Option(
            "--write-anyway", help="Write the chosen thresholds even if cross-validation shows no gain over RUN's own."
        ),
    ] = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Choose thresholds from a run's kept logits, and write the cascade that has them if they are better.

    RUN is a run of a tuning set, not of the test set, with shadow scores. By default every stage with a threshold is
    tuned. The metrics are accuracy, in_scope_accuracy, reject_recall, reject_precision, coverage, risk and mean_cost.
    Each is shown with RUN's own thresholds and with the chosen ones.

    Example: cascade-lab tune runs/val --maximize reject_recall --at-least in_scope_accuracy=0.95 --output tuned.toml
    """
    from cascade_lab.analysis.costs import CostMatrix
    from cascade_lab.atomic import locked_file
    from cascade_lab.run import Run
    from cascade_lab.thresholds import Goal
    from cascade_lab.thresholds import tune as tune_run

    goal = Goal(
        maximize=maximize,
        minimize=minimize,
        at_least=read_numbers(at_least),
        at_most=read_numbers(at_most),
        costs=read_numbers(cost),
        cost_matrix=None if cost_matrix is None else CostMatrix.read(cost_matrix),
        prevalence=prevalence,
    )
    with locked_file(output, overwrite=overwrite, what="tuned cascade"):
        tuned_run = Run.read(run)
        tuning = tune_run(
            tuned_run,
            goal,
            stages=stage or None,
            test=None if test is None else Run.read(test),
            guarantee=read_numbers(guarantee) or None,
            delta=delta,
            confidence=confidence,
            by_label=by_label,
            progress=shows_progress(),
        )
        is_written = tuning.verdict.improves or write_anyway
        if is_written:
            tuning.write(output, overwrite=overwrite)
    _print_tuning(tuning)
    print_labelled(tuned_run)
    line(f"result: {tuning.verdict.sentence}")
    line(f"cascade: {output}" if is_written else "nothing is written; --write-anyway writes the chosen thresholds")
    if is_written:
        next_step("run", output, "EVALSET", "--output", "RUN")
    else:
        next_step("report", run, "--notebook", "03_analyse_errors")


def _print_tuning(tuning: Tuning) -> None:
    """Print own and chosen thresholds, every metric with both, the gain of thresholds per label, and the guarantee."""
    from cascade_lab.thresholds.gain import THIS_SET

    thresholds = table("stage", "own", "chosen")
    for stage, row in tuning.thresholds.iterrows():
        chosen = "per label" if math.isnan(row["chosen"]) else exact(row["chosen"])
        thresholds.add_row(str(stage), exact(row["own"]), chosen)
    on_set = table("this set", "own", "chosen", "95% of chosen, new texts")
    for name, row in tuning.metrics.iterrows():
        own = tuning.comparison.loc[(THIS_SET, name), "own"]
        on_set.add_row(str(name), number(own), number(row["value"]), interval(row["low"], row["high"]))
    compared = []
    for texts in tuning.comparison.index.unique("texts").drop(THIS_SET):
        compared.append(table(texts, "own", "chosen", "difference", "95%"))
        for name, row in tuning.comparison.loc[texts].iterrows():
            between = interval(row["low"], row["high"], "+.4f")
            values = number(row["own"]), number(row["chosen"]), signed(row["difference"])
            compared[-1].add_row(str(name), *values, between)
    show(thresholds, "", on_set, *(block for each in compared for block in ("", each)))
    if tuning.per_label is not None:
        gain = tuning.per_label.gain
        used = "used" if tuning.uses_per_label else "not used"
        between = interval(gain.low, gain.high)
        line(f"a threshold per label: a gain of {number(gain.value)} ({between}) in {tuning.goal.metric}: {used}")
    line(f"goal: {tuning.goal}")
    if tuning.guarantee:
        line(f"guarantee: {tuning.guarantee}")
    for note in tuning.notes:
        line(f"note: {note}")
    _print_front(tuning.run, tuning.test)


def _print_front(run: Run, test: Run | None) -> None:
    """Print a few points of the front of accuracy and time, where a stage defers and the run has times."""
    import numpy as np

    from cascade_lab.analysis.latency import is_timed
    from cascade_lab.exceptions import RunError
    from cascade_lab.thresholds import cost_front, cost_summary

    stages = [stage.name for stage in run.spec.stages if stage.is_deferral]
    if not stages or not is_timed(run):
        return
    try:
        front = cost_front(run, test=test)
    except RunError as error:  # no text reached a stage, so its time is not known
        line(f"note: accuracy against time: {error}")
        return
    shown = table(*(f"threshold of {stage}" for stage in stages), "ms/text", "accuracy", "95%")
    for row in front.iloc[np.unique(np.linspace(0, len(front) - 1, 8).round().astype(int))].to_dict("records"):
        between = interval(row["accuracy_low"], row["accuracy_high"])
        cells = [exact(row[stage]) for stage in stages]
        shown.add_row(*cells, number(row["mean_ms"], ".2f"), number(row["accuracy"]), between)
    show("", "accuracy against time, at the thresholds that no other ones beat in both (on this set)", shown)
    for sentence in cost_summary(front):
        line(sentence)
