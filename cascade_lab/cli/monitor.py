"""`cascade-lab monitor` compares traffic without labels with a reference, and raises alarms."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.options import AT_LEAST, COST, OVERWRITE, RUN, read_numbers
from cascade_lab.cli.printing import (
    cell,
    interval,
    line,
    next_step,
    number,
    p_value,
    print_labelled,
    show,
    table,
    title,
)
from cascade_lab.text import exact

if TYPE_CHECKING:
    from cascade_lab.analysis.monitoring import Monitoring
    from cascade_lab.thresholds.proposal import Proposal

MAX_LABELS = 8  # labels that are shown
MAX_NAME = 40  # characters of a label


def monitor(
    run: RUN,
    against: Annotated[
        Path,
        typer.Option(
            metavar="RUN",
            help="The reference: a run of earlier traffic, or the labelled run that the cascade was tuned on. Without "
            "labels, only changes and alarms are shown.",
            show_default=False,
        ),
    ],
    alpha: Annotated[
        float,
        typer.Option(
            min=1e-6,
            max=0.5,
            help="The probability of any false alarm, ever, however often you look, if RUN has all days since the "
            "watch began.",
        ),
    ] = 0.01,
    maximize: Annotated[
        str | None, typer.Option(help="The metric that proposed thresholds maximize [default: accuracy].")
    ] = None,
    minimize: Annotated[
        str | None, typer.Option(help="The metric that proposed thresholds minimize, such as mean_cost.")
    ] = None,
    at_least: AT_LEAST = None,
    at_most: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=VALUE", help="An upper bound, such as risk=0.05.")
    ] = None,
    cost: COST = None,
    output: Annotated[
        Path | None, typer.Option(help="A cascade.toml to write, with the proposed thresholds [default: none].")
    ] = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Watch a cascade without labels: what has changed since the reference, and whether that is an alarm.

    RUN is a run of traffic, such as `collect` makes; its texts need no labels. Days are those of its column time, in
    UTC. Give all days since the watch began: a run of one day alone starts the watch anew. From the reference's labels,
    the share out of scope and the accuracy of RUN are estimated, and thresholds are proposed. Nothing is written
    without --output.

    Example: cascade-lab monitor runs/tuesday --against runs/val
    """
    from cascade_lab.analysis.monitoring import monitor as monitor_run
    from cascade_lab.atomic import locked_file
    from cascade_lab.exceptions import GoalError, InfeasibleError, RunError
    from cascade_lab.run import Run
    from cascade_lab.thresholds import Goal
    from cascade_lab.thresholds.proposal import propose_thresholds

    goal = Goal(
        maximize="accuracy" if maximize is None and minimize is None else maximize,
        minimize=minimize,
        at_least=read_numbers(at_least),
        at_most=read_numbers(at_most),
        costs=read_numbers(cost),
    )
    proposal, not_proposed = None, ""
    lock = nullcontext() if output is None else locked_file(output, overwrite=overwrite, what="cascade")
    with lock:
        found = monitor_run(Run.read(run), Run.read(against), alpha=alpha)
        try:
            if found.estimates is None:
                raise GoalError(f"{against}: has no labels; give --against a labelled run")
            interval_of = found.estimates.loc["prevalence_em", ["now", "low", "high"]]
            proposal = propose_thresholds(found.reference, goal, interval_of)
        except (GoalError, InfeasibleError, RunError) as error:
            if output is not None:
                raise
            not_proposed = str(error)
        if output is not None and proposal is not None:
            proposal.write(output, overwrite=overwrite)
    _print_monitoring(found)
    if proposal is not None:
        _print_proposal(proposal)
    else:
        line(f"no thresholds are proposed: {not_proposed}")
    line("")
    for sentence in found.summary():
        line(sentence)
    if output is not None:
        line(f"cascade: {output}")
    next_step("report", run, "--notebook", "09_watch_traffic", "-p", f"against_dir={against}")


def _print_monitoring(found: Monitoring) -> None:
    from cascade_lab.analysis.prevalence import ESTIMATES

    show(title(f"{found.run.name} against {found.reference.name}"))
    changes = table("quantity", "then", "now", "change", "95%", "PSI", "p (Holm)", fold_first=True)
    for name, row in found.changes.iterrows():
        values = (number(row["then"], ".3f"), number(row["now"], ".3f"), number(row["difference"], "+.3f"))
        between = interval(row["low"], row["high"], "+.3f")
        changes.add_row(str(name), *values, between, number(row["psi"], ".2f"), p_value(row["p_holm"]))
    labels = table("predicted label", "then", "now", "change", "95%", "p (Holm)", fold_first=True)
    for name, row in found.labels.head(MAX_LABELS).iterrows():
        values = (number(row["then"], ".2%"), number(row["now"], ".2%"), number(row["difference"], "+.3f"))
        between = interval(row["low"], row["high"], "+.3f")
        labels.add_row(cell(str(name), MAX_NAME), *values, between, p_value(row["p_holm"]))
    show(changes, "", labels)
    line(
        "rates: Fisher's exact test; probability and confidence: means, and the test of Kolmogorov and Smirnov; "
        "predicted labels: total variation distance, and chi-square; PSI: population stability index, not a test"
    )
    alarms = table("alarm", "days", "last rate", "alarm beyond", "raised", "since about")
    raised = found.raised.set_index("watch")
    for name in found.alarms.index.unique("watch"):
        of_watch = found.alarms.loc[name]
        days = (raised.loc[name, "day"], raised.loc[name, "began"]) if name in raised.index else ("no", "–")
        last = of_watch.iloc[-1]
        cells = [f"{len(of_watch):,}", number(last["rate"]), number(last["limit"]), *map(str, days)]
        alarms.add_row(str(name), *cells)
    show("", alarms)
    line(
        f"if nothing changes, a false alarm is ever raised with probability {found.alpha:g} at most, however often "
        "you look, if each run has all days since the watch began; low confidence: the answer's probability is in the "
        "reference's lowest tenth"
    )
    if not found.has_days:
        line("the texts have no column time, so all are one day")
    if found.estimates is None:
        return
    estimates = table("estimate", "then", "now", "95%", fold_first=True)
    for name, row in found.estimates.iterrows():
        between = interval(row["low"], row["high"])
        estimates.add_row(str(name), number(row["then"]), number(row["now"]), between)
    show("", estimates)
    line("from: " + "; ".join(f"{name}, {source}" for name, source in ESTIMATES.items()))
    line(f"test that another share out of scope alone explains the scores: p = {p_value(found.fit_p_value)}")


def _print_proposal(proposal: Proposal) -> None:
    columns = ("cascade.toml", "proposed", "at the low end", "at the high end")
    thresholds = table("threshold", *columns)
    for stage, row in proposal.thresholds.iterrows():
        thresholds.add_row(str(stage), *(exact(value) for value in row))
    metrics = table("at that share", "cascade.toml", "proposed")
    for name, row in proposal.metrics.iterrows():
        metrics.add_row(str(name), number(row["own"]), number(row["chosen"]))
    show("", thresholds, "", metrics)
    print_labelled(proposal.run)
    line(f"goal: {proposal.goal}; on the labelled texts, where the proposed thresholds look too good")
    if not proposal.depends_on_prevalence:
        line("this goal does not depend on the share out of scope")
