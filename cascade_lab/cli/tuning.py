"""`cascade-lab tune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cascade_lab.cli.console import figure, line, table
from cascade_lab.errors import CascadeLabError, GoalError

RunDirectory = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run of the set to tune on, with shadow scores.", show_default=False)
]
Pairs = list[str]


def tune(
    run: RunDirectory,
    output: Annotated[Path, typer.Option(help="The cascade.toml to write.", show_default=False)],
    maximize: Annotated[str | None, typer.Option(help="The figure to maximize, such as reject_recall.")] = None,
    minimize: Annotated[str | None, typer.Option(help="The figure to minimize, such as mean_cost.")] = None,
    at_least: Annotated[
        Pairs, typer.Option(metavar="FIGURE=VALUE", help="A bound, such as in_scope_accuracy=0.95.")
    ] = [],  # noqa: B006 - typer takes lists as they are
    at_most: Annotated[
        Pairs, typer.Option(metavar="FIGURE=VALUE", help="A bound, such as risk=0.05 or p95_ms=20.")
    ] = [],  # noqa: B006
    cost: Annotated[
        Pairs, typer.Option(metavar="OUTCOME=COST", help='What an outcome costs, such as "false accept=5".')
    ] = [],  # noqa: B006
    prevalence: Annotated[
        float | None, typer.Option(help="The fraction of texts out of scope to tune for [default: the set's].")
    ] = None,
    stage: Annotated[
        Pairs, typer.Option(metavar="STAGE", help="A stage to tune, one or two [default: those that can reject].")
    ] = [],  # noqa: B006
    guarantee: Annotated[
        str | None,
        typer.Option(
            metavar="FIGURE=VALUE",
            help="Of in_scope_accuracy or reject_recall: at least so much with probability 1 - DELTA.",
        ),
    ] = None,
    delta: Annotated[float, typer.Option(min=1e-6, max=0.5, help="How often the guarantee may fail.")] = 0.1,
    by_label: Annotated[
        bool,
        typer.Option("--by-label", help="Try a threshold for each label of the last stage, kept if it pays."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at the output.")] = False,
) -> None:
    """Choose thresholds on a run's kept logits, and write the cascade that has them.

    The figures are accuracy, in_scope_accuracy, reject_recall, reject_precision, coverage, risk and mean_cost.

    Example: cascade-lab tune runs/val --maximize reject_recall --at-least in_scope_accuracy=0.95 --output tuned.toml
    """
    from cascade_lab.analysis.goals import Goal
    from cascade_lab.analysis.per_class import per_class
    from cascade_lab.analysis.thresholds import choose
    from cascade_lab.analysis.tuning import certainty, controlled, figures_at, optimism, write_tuned
    from cascade_lab.run import Run

    goal = Goal(maximize, minimize, _pairs(at_least), _pairs(at_most), _pairs(cost), prevalence)
    if output.exists() and not overwrite:
        raise CascadeLabError(f"{output} exists already; choose another output, or ask to overwrite it")
    made = Run.read(run)
    stages = stage or None
    more: dict[str, object] = {}
    progress = sys.stderr.isatty()
    if guarantee is None:
        chosen = choose(made, goal, stages)
    else:
        ((name, value),) = _pairs([guarantee]).items()
        chosen = controlled(made, goal, name, value, delta=delta, stages=stages)
        more["guarantee"] = f"{name} at least {value:g} with probability {1 - delta:g}"
    labels = None
    if by_label:
        labels = per_class(made, goal, chosen.thresholds)
        more["by_label"] = f"a gain of {labels.gain.value:.4f} ({labels.gain.low:.4f} to {labels.gain.high:.4f})"
    kept = labels.min_probabilities if labels is not None and labels.pays else None
    sure = None if guarantee else certainty(made, goal, stages, progress=progress)
    apart = optimism(made, goal, stages, n_repeats=4, progress=progress)
    intervals = figures_at(made, chosen.thresholds, goal)
    more["intervals"] = {name: [found.low, found.high] for name, found in intervals.items() if found.low == found.low}
    more["optimism"] = {name: value for name, value in apart["optimism"].items() if value == value}
    write_tuned(made, chosen, goal, output, min_probabilities=kept, more=more)

    console = Console()
    thresholds = table("stage", "threshold", *(["95% of resamples"] if sure else []))
    for name, value in chosen.thresholds.items():
        low, high = ("", "") if sure is None else sure.thresholds[name].quantile([0.025, 0.975])
        thresholds.add_row(name, f"{value:.6g}", *([f"{low:.4g} to {high:.4g}"] if sure else []))
    console.print(thresholds)
    console.print()
    figures = table("figure", "on this set", "95% interval", "by cross-validation, on others")
    for name, found in intervals.items():
        between = f"{figure(found.low, 4)} to {figure(found.high, 4)}"
        figures.add_row(name, figure(found.value, 4), between, figure(apart.loc[name, "held_out"], 4))
    console.print(figures)
    if sure is not None and sure.infeasible:
        line(f"on {sure.infeasible:.0%} of resamples no thresholds satisfy the goal")
    if labels is not None:
        line(f"a threshold by label: {more['by_label']} in {goal.figure}: {'kept' if kept else 'not kept'}")
    line(f"goal: {goal}")
    line(f"cascade: {output}")


def _pairs(given: Pairs) -> dict[str, float]:
    """Read NAME=NUMBER; raises GoalError."""
    pairs = {}
    for pair in given:
        name, _, value = pair.rpartition("=")
        try:
            pairs[name.strip()] = float(value)
        except ValueError as error:
            raise GoalError(f"'{pair}' is not NAME=NUMBER; write it so") from error
    return pairs
