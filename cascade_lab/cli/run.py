"""`cascade-lab run` runs a cascade over an eval set and writes a run directory."""

from __future__ import annotations

from typing import Annotated

import typer

from cascade_lab.cli.actions import default_directory, load_cascade, make_report, read_evalset
from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import (
    BATCH_SIZE,
    CASCADE,
    COLUMNS,
    ENCODING,
    EVALSET,
    LABEL_COLUMN,
    LABEL_MAP,
    LIMIT,
    NEW_RUN,
    OVERWRITE,
    SPLIT,
    TEXT_COLUMN,
)
from cascade_lab.cli.printing import next_step, print_run


def run(
    cascade: CASCADE,
    evalset: EVALSET,
    split: SPLIT = None,
    encoding: ENCODING = None,
    text_column: TEXT_COLUMN = "text",
    label_column: LABEL_COLUMN = "label",
    label_map: LABEL_MAP = None,
    columns: COLUMNS = None,
    output: NEW_RUN = None,
    limit: LIMIT = None,
    shadow: Annotated[
        bool,
        typer.Option(
            "--shadow/--no-shadow",
            help="Afterwards let the later stages score the texts that ended before them, so that other thresholds can "
            "be replayed.",
        ),
    ] = True,
    keep_features: Annotated[
        bool,
        typer.Option(
            "--keep-features",
            help="Keep each stage's last [CLS] vector (16-bit), from which `fit-rejector` can compute distances.",
        ),
    ] = False,
    batch_size: BATCH_SIZE = None,
    overwrite: OVERWRITE = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Draw figures and write report.html.")] = True,
) -> None:
    """Run a cascade over an eval set: writes a run directory, figures and report.html, and prints the metrics.

    Example: cascade-lab run cascade.toml data_full.json --split test --output runs/clinc150
    """
    from cascade_lab.run_directory import check_run_output
    from cascade_lab.spec import CascadeSpec

    # Everything that can be refused early is refused before TensorFlow is loaded.
    spec = CascadeSpec.read(cascade)
    examples = read_evalset(
        evalset,
        spec,
        split=split,
        limit=limit,
        encoding=encoding,
        text_column=text_column,
        label_column=label_column,
        label_map=label_map,
        columns=columns,
    )
    output = output or default_directory(spec.name)
    check_run_output(output, overwrite=overwrite)
    with load_cascade(spec, keep_features=keep_features) as loaded:
        finished = loaded.run(
            examples,
            output=output,
            shadow=shadow,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=shows_progress(),
        )
    if report:
        make_report(finished)
    print_run(finished)
    next_step("report", output, *(["--notebook", "03_analyse_errors"] if report else []))
