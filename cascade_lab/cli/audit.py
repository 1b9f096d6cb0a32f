"""`cascade-lab audit` lists the labels of a run to look at again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import ENCODING, OVERWRITE, RUN
from cascade_lab.cli.printing import cell, line, next_step, number, show, table
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    import pandas as pd

    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run

MAX_ROWS = 10


def audit(
    run: RUN,
    output: Annotated[Path, typer.Option(help="The csv to write.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN_OR_FILE", help="Look for the texts in another set too, such as the training set."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Use only this split of the file at --against.")] = None,
    encoding: ENCODING = None,
    similarity: Annotated[
        float,
        typer.Option(min=0.5, max=1, help="The least similarity of near duplicates: cosine of 4-grams."),
    ] = 0.85,
    overwrite: OVERWRITE = False,
) -> None:
    """List labels to look at again: those that the stages consider wrong, and duplicates.

    RUN must have shadow scores. Open the csv in a spreadsheet, write the right labels into corrected_label, and pass
    the file to **correct**.

    Example: cascade-lab audit runs/test --against data_full.json --split train --output audit.csv
    """
    from cascade_lab.analysis.label_audit import audit as audit_run
    from cascade_lab.analysis.label_audit import write_audit
    from cascade_lab.atomic import locked_file
    from cascade_lab.run import Run

    with locked_file(output, overwrite=overwrite, what="audit"):
        audited = Run.read(run)
        other = None if against is None else _read_set(against, split, encoding)
        doubts = audit_run(audited, other, similarity=similarity, progress=shows_progress())
        write_audit(doubts, output)
    _print_audit(doubts, int(audited.examples["label"].notna().sum()))
    line(f"audit: {output}")
    next_step("correct", run, output, "--output", "corrected.tsv")


def _print_audit(doubts: pd.DataFrame, n_labelled: int) -> None:
    counts = table("to look at", "texts")
    reasons = doubts["reason"].str.split("; ").explode().str.replace(r" by .*", "", regex=True)
    order = sorted(reasons.unique(), key=lambda reason: ("label" not in reason, "other set" in reason, reason))
    for reason in order:
        counts.add_row(cell(reason), f"{int((reasons == reason).sum()):,}")
    counts.add_row("any of these", f"{len(doubts):,} of {n_labelled:,}")
    show(counts)
    if doubts.empty:
        return
    shown = table("text", "label", "suggested", "p(label)")
    for row in doubts.head(MAX_ROWS).itertuples():
        shown.add_row(cell(row.text), cell(row.label), cell(row.suggested_label), number(row.score, ".2g"))
    show("", shown)


def _read_set(path: Path, split: str | None, encoding: str | None) -> Run | EvalSet:
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run

    if path.is_dir() and split is not None:
        raise CascadeLabError(f"{path}: is a run, which has no splits; omit --split, or give an eval set")
    return Run.read(path) if path.is_dir() else EvalSet.read(path, split=split, encoding=encoding)
