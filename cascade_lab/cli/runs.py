"""`cascade-lab runs` lists the runs in a folder, the best first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.options import AS_JSON
from cascade_lab.cli.printing import UNDEFINED, cell, line, next_step, number, print_json, show, table

if TYPE_CHECKING:
    import pandas as pd

N_TEXT_COLUMNS = 4


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
    from cascade_lab.leaderboard import METRICS

    metrics = list(METRICS[:3]) + ([sort] if sort in METRICS[3:] else [])
    names = {"in_scope_accuracy": "in scope", "reject_recall": "recall", "reject_precision": "precision"}
    headers = [names.get(key, key.replace("_", " ")) for key in metrics]
    shown = table("run", "cascade", "eval set", "tuned on", "date", *headers, fold_first=True)
    for column in shown.columns[: N_TEXT_COLUMNS + 1]:
        column.justify = "left"
    for row in good.to_dict("records"):
        tuned_on = UNDEFINED if row["tuned_on"] is None else row["tuned_on"] + " (same texts)" * bool(row["same_texts"])
        texts = (os.path.relpath(row["run"], folder), row["cascade"], row["evalset"], tuned_on)
        shown.add_row(*map(cell, texts), row["date"][:10], *(number(row[key]) for key in metrics))
    if len(good):
        show(shown)
        line("recall: of texts out of scope, rejected with the right label")
    if good["same_texts"].eq(True).any():
        line("same texts: the thresholds were tuned on the texts of the run, so its metrics are too high")
