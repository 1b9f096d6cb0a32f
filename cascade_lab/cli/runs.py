"""`cascade-lab runs` lists the runs in a folder, the best first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.options import AS_JSON
from cascade_lab.cli.printing import METRICS, UNDEFINED, line, next_step, number, print_json, show_runs, tuned_on

if TYPE_CHECKING:
    import pandas as pd


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with runs, maybe in folders.")] = Path(
        "runs"
    ),
    sort: Annotated[
        str, typer.Option(metavar="METRIC", help="Show the runs with the highest values first; or date.")
    ] = "accuracy",
    as_json: AS_JSON = False,
) -> None:
    """List the runs in a folder, the best first: cascade, eval set, date, metrics, and what was tuned on.

    The metrics are accuracy, in_scope_accuracy, reject_recall, reject_precision and macro_f1.

    Example: cascade-lab runs runs --sort reject_recall
    """
    from cascade_lab.leaderboard import leaderboard

    listed = leaderboard(folder, sort=sort)
    if as_json:
        for row in listed.to_dict("records"):
            print_json(row)
        return
    good = listed[listed["problem"].isna()]
    _print_runs(good, folder, sort)
    for row in listed[listed["problem"].notna()].itertuples():
        line(f"cannot be read: {row.problem}")
    if len(good) > 1:
        next_step("compare", good["run"].iloc[1], good["run"].iloc[0])
    elif len(good):
        next_step("report", good["run"].iloc[0])


def _print_runs(good: pd.DataFrame, folder: Path, sort: str) -> None:
    if good.empty:
        return
    runs = {
        os.path.relpath(row["run"], folder): {
            "cascade": row["cascade"],
            "eval set": row["evalset"],
            "tuned on": tuned_on(row),
            "date": row["date"][:10] or UNDEFINED,
        }
        for row in good.to_dict("records")
    }
    metrics = list(dict.fromkeys(["accuracy", "in_scope_accuracy", "reject_recall", *([sort] * (sort in METRICS))]))
    show_runs(runs, {METRICS[key]: good[key].map(number).tolist() for key in metrics})
    line("recall: of texts out of scope, rejected with the right label")
    if good["same_texts"].eq(True).any():
        line("same texts: the thresholds were tuned on the texts of the run, so its metrics are too high")
