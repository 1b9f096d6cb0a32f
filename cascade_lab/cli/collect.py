"""`cascade-lab collect` makes a run of a service's traffic log, or of the scores that a scoring job kept."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.actions import default_directory
from cascade_lab.cli.options import ENCODING, NEW_RUN, OVERWRITE
from cascade_lab.cli.printing import interval, line, next_step, number, print_run, show, table
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.run import Run


def collect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="The folder that `cascade-lab serve --log` writes, or `cascade-lab score --keep scores`.",
            show_default=False,
        ),
    ],
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Only texts that arrived then or later, such as 2026-11-26 or "
            "2026-11-26T07:30 (UTC, unless it ends like +01:00).",
        ),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Only texts that arrived before.")] = None,
    digest: Annotated[
        str, typer.Option(metavar="HEX", help="The beginning of the digest of the cascade, where several answered.")
    ] = "",
    sample: Annotated[
        bool,
        typer.Option(
            "--sample",
            help="Only the random share of the texts that `serve --shadow` chose, which every stage has scored: other "
            "thresholds can be replayed and tuned on it.",
        ),
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labels of some or all texts: tsv, csv, jsonl or parquet with columns example_id and label. Optional: "
            "weight (the number of texts that a row stands for, where they were drawn with unequal probabilities), "
            "and text.",
        ),
    ] = None,
    encoding: ENCODING = None,
    output: NEW_RUN = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Make a run of a service's traffic log or of kept scores, on which every command that reads runs works.

    Its replay equals what the service answered. A log that a service still writes, or that was killed, is read up to
    the last whole record. Metrics are of the texts that have a label.

    Example: cascade-lab collect traffic --since 2026-11-25 --labels labelled.tsv --output runs/tuesday
    """
    from cascade_lab.batch.kept_run import is_job, read_scores
    from cascade_lab.label_files import read_labels
    from cascade_lab.run_directory import check_run_output
    from cascade_lab.serving.collect import collect as collect_run

    times = _read_time(since, "--since"), _read_time(until, "--until")
    given = None if labels is None else read_labels(labels, encoding=encoding)
    if output is not None:
        check_run_output(output, overwrite=overwrite)
    if is_job(folder):
        if since or until or digest or sample:
            raise CascadeLabError(f"{folder}: is of `cascade-lab score`; omit --since, --until, --digest and --sample")
        kept = read_scores(folder, labels=given)
        output = output or default_directory(kept.spec.name)
        print_run(kept.write(output, overwrite=overwrite))
        next_step("report", output)
        return
    found = collect_run(folder, since=times[0], until=times[1], digest=digest, sample=sample, labels=given)
    output = output or default_directory(found.run.spec.name)
    run = found.run.write(output, overwrite=overwrite)
    print_run(run)
    if given is not None:
        n_joined = int(run.examples["label"].notna().sum())
        line(f"labels: {n_joined:,} of the {len(given.labels):,} ids in {labels} are texts of this run")
        _print_sampled(run)
    for note in found.notes:
        line(f"note: {note}")
    next_step("monitor", output, "--against", "RUN")


def _read_time(value: str | None, option: str) -> datetime | None:
    if value is None:
        return None
    try:
        time = datetime.fromisoformat(value.removesuffix("Z") + ("+00:00" if value.endswith("Z") else ""))
        return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError) as error:  # in UTC the year may be 0 or 10000
        raise CascadeLabError(
            f"{option} {value}: is not a time; write it like 2026-11-26 or 2026-11-26T07:30"
        ) from error


def _print_sampled(run: Run) -> None:
    """Print the metrics of all texts, estimated from the labelled ones, where only some have labels."""
    from cascade_lab.analysis.sampled_labels import sampled_metrics
    from cascade_lab.label_files import has_unequal_weights

    if run.examples["label"].notna().all():
        return
    shown = table("of all texts", "estimate", "95% interval", "labelled")
    for name, row in sampled_metrics(run).iterrows():
        shown.add_row(
            str(name).replace("_", " "),
            number(row["value"]),
            interval(row["low"], row["high"]),
            f"{row['n_labelled']:,.0f}",
        )
    show(shown)
    if has_unequal_weights(run.examples):
        line("weighted by the column weight of the labels")
    else:
        line("if the labelled texts are a simple random sample; otherwise add a column weight to the labels")
