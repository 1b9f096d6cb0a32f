"""`cascade-lab correct` writes an eval set with the labels that were corrected in an audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.options import ENCODING, OVERWRITE, RUN
from cascade_lab.cli.printing import cell, line, next_step, show, table

MAX_ROWS = 10


def correct(
    run: RUN,
    csv: Annotated[
        Path,
        typer.Argument(metavar="AUDIT", help="The csv of `audit`, with labels in corrected_label.", show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="The eval set to write: .tsv, .jsonl or .parquet.", show_default=False)],
    encoding: ENCODING = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Write a run's eval set again with the labels that were corrected in an audit.

    RUN is the run that was audited.

    Example: cascade-lab correct runs/test audit.csv --output corrected.tsv
    """
    from cascade_lab.analysis.label_audit import read_corrections
    from cascade_lab.atomic import locked_file
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run

    with locked_file(output, overwrite=overwrite, what="eval set"):
        audited = Run.read(run)
        before = EvalSet.from_frame(audited.examples, unlabelled=True)
        corrected = read_corrections(csv, before, audited.spec, encoding=encoding)
        corrected.write(output)
    labels = corrected.examples[["text", "label"]].assign(before=audited.examples["label"]).dropna()
    changed = labels[labels["label"] != labels["before"]]
    shown = table("text", "was", "is")
    for row in changed.head(MAX_ROWS).itertuples():
        shown.add_row(cell(row.text), cell(row.before), cell(row.label))
    if shown.rows:
        show(shown)
    line(f"{len(changed):,} of {len(labels):,} labels corrected")
    line(f"eval set: {output}")
    next_step("run", "CASCADE", output, "--output", "RUN")
