"""`cascade-lab audit` and `correct`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from cascade_lab.cli.console import line, printable, table
from cascade_lab.errors import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run

RunDirectory = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run of the set, with shadow scores.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file at the output.")]
N_SHOWN = 10


def audit(
    run: RunDirectory,
    output: Annotated[Path, typer.Option(help="The csv to write.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN_OR_FILE", help="Look for the texts in another set too, such as the training set."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the file at --against, take only this split.")] = None,
    similarity: Annotated[
        float,
        typer.Option(min=0.5, max=1, help="How alike near duplicates are: cosine of 4-grams."),
    ] = 0.85,
    overwrite: Overwrite = False,
) -> None:
    """List the gold labels to look at again: those that the stages hold wrong, and duplicates.

    Open the csv in a spreadsheet, write the right labels into corrected_label, and hand it to **correct**.

    Example: cascade-lab audit runs/test --against data_full.json --split train --output audit.csv
    """
    from cascade_lab.analysis.audit import audit as audited
    from cascade_lab.analysis.audit import write_audit
    from cascade_lab.run import Run

    _refuse(output, overwrite)
    made = Run.read(run)
    other = None if against is None else _set(against, split)
    found = audited(made, other, similarity=similarity, progress=sys.stderr.isatty())
    write_audit(found, output)

    console = Console()
    counts = table("to look at", "texts")
    reasons = found["reason"].str.split("; ").explode().str.replace(r" by .*", "", regex=True)
    order = sorted(reasons.unique(), key=lambda reason: ("label" not in reason, "other set" in reason, reason))
    for reason in order:
        counts.add_row(Text(reason), f"{int((reasons == reason).sum()):,}")
    counts.add_row("any of these", f"{len(found):,} of {len(made.examples):,}")
    console.print(counts)
    if len(found):
        console.print()
        shown = table("text", "label", "suggested", "p(label)")
        for row in found.head(N_SHOWN).itertuples():
            texts = (Text(printable(text)) for text in (row.text, row.label, row.suggested_label))
            shown.add_row(*texts, f"{row.score:.2g}")
        console.print(shown)
    line(f"audit: {output}")


def correct(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run that was audited.", show_default=False)],
    csv: Annotated[
        Path, typer.Argument(metavar="AUDIT", help="The csv, with labels in corrected_label.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="The eval set to write: .tsv, .jsonl or .parquet.", show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Write a run's eval set again with the labels that were corrected in an audit.

    Example: cascade-lab correct runs/test audit.csv --output corrected.tsv
    """
    from cascade_lab.analysis.audit import read_corrections
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run

    _refuse(output, overwrite)
    made = Run.read(run)
    corrected = read_corrections(csv, EvalSet.from_frame(made.examples), made.spec)
    corrected.write(output)
    changed = corrected.examples["label"].to_numpy() != made.examples["label"].to_numpy()
    shown = table("text", "was", "is")
    for old, new in zip(made.examples["label"][changed], corrected.examples[changed].itertuples(), strict=True):
        if len(shown.rows) < N_SHOWN:
            shown.add_row(Text(printable(new.text)), Text(printable(old)), Text(printable(new.label)))
    if shown.rows:
        Console().print(shown)
    line(f"{int(changed.sum()):,} of {len(corrected):,} labels corrected")
    line(f"eval set: {output}")


def _refuse(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise CascadeLabError(f"{output} exists already; choose another output, or ask to overwrite it")


def _set(path: Path, split: str | None) -> Run | EvalSet:
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run

    if path.is_dir() and split is not None:
        raise CascadeLabError(f"{path}: is a run, which has no splits; leave --split out, or give an eval set")
    return Run.read(path) if path.is_dir() else EvalSet.read(path, split=split)
