"""`cascade-lab import-logits` makes a run from logits that were computed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.actions import default_directory, read_evalset
from cascade_lab.cli.options import (
    CASCADE,
    COLUMNS,
    ENCODING,
    EVALSET,
    LABEL_COLUMN,
    LABEL_MAP,
    NEW_RUN,
    OVERWRITE,
    SPLIT,
    TEXT_COLUMN,
    read_pair,
)
from cascade_lab.cli.printing import line, next_step, print_run
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.spec import CascadeSpec


def import_logits(
    cascade: CASCADE,
    evalset: EVALSET,
    logits: Annotated[
        list[str],
        typer.Option(
            metavar="STAGE=FILE",
            help="The logits of a stage: npy, npz, parquet or csv. Give it once for every stage.",
            show_default=False,
        ),
    ],
    split: SPLIT = None,
    encoding: ENCODING = None,
    text_column: TEXT_COLUMN = "text",
    label_column: LABEL_COLUMN = "label",
    label_map: LABEL_MAP = None,
    columns: COLUMNS = None,
    output: NEW_RUN = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="The files contain probabilities, not logits.")
    ] = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Make a run from logits that were computed elsewhere; every command that reads runs then works on it.

    The stages in CASCADE need no checkpoint. The label of a text may be empty. An array has one row per text, in the
    order of EVALSET, and one column per label, in the order of the stage's labels. A table has one column per label,
    or a list column named logits; with a column example_id its rows are matched by id. A row of NaN is a text that
    the stage did not score.

    Example: cascade-lab import-logits cascade.toml test.tsv --logits gate=gate.npy --logits intent=intent.parquet
    """
    from cascade_lab.logits import read_logits
    from cascade_lab.provenance import sha256
    from cascade_lab.run import Run
    from cascade_lab.run_directory import check_run_output
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    files = _read_files(logits, spec)
    output = output or default_directory(spec.name)
    check_run_output(output, overwrite=overwrite)
    examples = read_evalset(
        evalset,
        None,
        split=split,
        limit=None,
        encoding=encoding,
        text_column=text_column,
        label_column=label_column,
        label_map=label_map,
        columns=columns,
        unlabelled=True,
    )
    ids = examples.examples["example_id"].tolist()
    arrays = {name: read_logits(path, spec.stage(name), ids) for name, path in files.items()}
    run = Run.from_logits(
        spec,
        examples,
        arrays,
        probabilities=probabilities,
        inputs={str(path): sha256(path) for path in files.values()},
    ).write(output, overwrite=overwrite)
    print_run(run)
    for name in files:
        n_scored = int(run.scores(name).scored.sum())
        if n_scored < len(ids):
            line(f"{name}: scored {n_scored:,} of {len(ids):,} texts")
    next_step("report", output)


def _read_files(pairs: Sequence[str], spec: CascadeSpec) -> dict[str, Path]:
    """Read STAGE=FILE, once per stage, in the order of the stages."""
    files: dict[str, Path] = {}
    for pair in pairs:
        name, path = read_pair(pair, "STAGE=FILE")
        if spec.stage(name).name in files:
            raise CascadeLabError(f"--logits {pair}: stage '{name}' has a file already; give one file per stage")
        files[name] = Path(path)
    missing = [stage.name for stage in spec.stages if stage.name not in files]
    if missing:
        raise CascadeLabError(f"stage '{missing[0]}' has no logits; add --logits {missing[0]}=FILE")
    return {stage.name: files[stage.name] for stage in spec.stages}
