"""`cascade-lab score` scores files of any size: resumable, on this machine or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import CASCADE, TEXT_COLUMN
from cascade_lab.cli.printing import cell, line, next_step, number, show, table
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.batch.dry_run import Estimate
    from cascade_lab.batch.job import ScoringResult

NOT_WHOLE = 3  # the exit code where a file or a shard is missing
SHOWN_LABELS = 10


def score(
    cascade: CASCADE,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files or folders of texts: parquet, csv, tsv, jsonl (text files also as .gz); paths, or URIs such as "
            "s3://bucket/texts.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The folder to write; that of an interrupted job goes on.", show_default=False
        ),
    ] = None,
    text_column: TEXT_COLUMN = "text",
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The column of the ids [default: example_id or id; without one, ids are made]."
        ),
    ] = None,
    make_ids: Annotated[bool, typer.Option("--make-ids", help="Make ids of file and row, such as a.csv:17.")] = False,
    keep: Annotated[
        str | None, typer.Option(metavar="WHAT", help="Keep scores, or scores,features: `collect` makes a run of them.")
    ] = None,
    sample: Annotated[
        float, typer.Option(metavar="SHARE", help="Keep them of this share of the texts, chosen by a hash of the id.")
    ] = 1.0,
    shadow: Annotated[
        bool,
        typer.Option(
            "--shadow/--no-shadow",
            help="Let the later stages score kept texts that ended before them: other thresholds can be replayed.",
        ),
    ] = True,
    workers: Annotated[
        int | None, typer.Option(min=1, help="The number of processes, or of Ray's actors [default: one per core].")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="The threads of each worker [default: cores divided by workers].")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Score on this Ray cluster: auto, HOST:PORT, or local to start one here."),
    ] = None,
    shard_rows: Annotated[
        int | None,
        typer.Option(min=1, help="The texts of a shard [default: a 64th of all, 8,192 to a million]."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a thousand texts; say how long all take, and how many bytes.")
    ] = False,
) -> None:
    """Score files of texts of any size, and go on after an interruption.

    Writes parts of predictions in parquet, one per shard, and a summary. The same command goes on where it was, also
    with other --workers. A row without a text has an error in the predictions. A file that cannot be read is left out
    and named, and the exit code is 3.

    Example: cascade-lab score cascade.toml texts/ --output scored --keep scores --sample 0.01
    """
    from cascade_lab.spec import CascadeSpec

    CascadeSpec.read(cascade)  # before TensorFlow is loaded
    options: dict[str, Any] = {
        "text_column": text_column,
        "id_column": id_column,
        "make_ids": make_ids,
        "keep": [name.strip() for name in keep.split(",")] if keep else [],
        "sample": sample,
        "shadow": shadow,
        "shard_rows": shard_rows,
    }
    machine: dict[str, Any] = {"workers": workers, "threads": threads, "progress": shows_progress()}
    if dry_run:
        from cascade_lab.batch.dry_run import dry_run as measure

        if ray is not None:
            raise CascadeLabError("--dry-run measures this machine; omit --ray, and divide the hours by the cluster")
        estimate = measure(cascade, inputs, **machine, **options)
        _print_estimate(estimate)
        raise typer.Exit(NOT_WHOLE if estimate.unreadable else 0)
    if output is None:
        raise CascadeLabError("no --output; give the folder to write, or --dry-run")
    from cascade_lab.batch.job import score as score_files

    result = score_files(cascade, inputs, output, ray=ray, **machine, **options)
    _print_result(result)
    if not result.is_whole:
        raise typer.Exit(NOT_WHOLE)
    if options["keep"]:
        next_step("collect", output, "--output", "RUN")


def _print_estimate(estimate: Estimate) -> None:
    for file in estimate.unreadable:
        line(f"not read: {file.reason}")
    line(f"input: {estimate.n_texts:,} texts in {estimate.n_files:,} files; {estimate.n_shards:,} shards")
    line(
        f"measured: {estimate.n_measured:,} texts, {estimate.n_errors:,} of them with an error; "
        f"{estimate.texts_per_second:,.0f} texts/s on this machine"
    )
    line(f"the whole input: {_duration(estimate.seconds)}, {_bytes(estimate.n_bytes)} of output")


def _print_result(result: ScoringResult) -> None:
    counts = result.counts
    stages = table("stage", "reached", "of all", "decided")
    n = max(counts.n_texts - counts.n_errors, 1)
    for name, reached in counts.reached.items():
        stages.add_row(name, f"{reached:,}", number(reached / n, ".1%"), f"{counts.decided_by[name]:,}")
    labels = table("predicted", "texts", "of all")
    for label, count in counts.predicted.most_common(SHOWN_LABELS):
        labels.add_row(cell(label), f"{count:,}", number(count / n, ".1%"))
    show(stages, labels)
    if len(counts.predicted) > SHOWN_LABELS:
        line(f"and {len(counts.predicted) - SHOWN_LABELS:,} more labels: see {result.folder / 'manifest.json'}")
    if result.n_new:
        rate = f"{result.n_new / result.seconds:,.0f} texts/s"
        line(f"scored: {result.n_new:,} texts in {_duration(result.seconds)} ({rate})")
    line(f"whole: {counts.n_texts:,} of {result.n_planned:,} rows are in {result.folder / 'predictions'}")
    for file in result.unreadable:
        line(f"not read: {file.reason}")
    for shard, reason in result.failed.items():
        line(f"not scored: shard {shard}: {reason}")
    for note in result.notes:
        line(f"note: {note}")


def _duration(seconds: float) -> str:
    """Return a duration in a unit that fits.

    >>> _duration(9.2), _duration(600), _duration(5e5)
    ('9.2 seconds', '10.0 minutes', '138.9 hours')
    """
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _bytes(n: float) -> str:
    """Return a size in a unit that fits.

    >>> _bytes(900), _bytes(2.5e9)
    ('0.9 kB', '2.5 GB')
    """
    for unit in ("kB", "MB", "GB"):
        n /= 1000
        if n < 1000:
            return f"{n:.1f} {unit}"
    return f"{n / 1000:,.1f} TB"
