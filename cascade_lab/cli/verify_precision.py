"""`cascade-lab verify-precision` compares a cascade with float32, or measures the bounds of mixed precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade_lab.cli.actions import read_evalset
from cascade_lab.cli.console import shows_progress, spinner
from cascade_lab.cli.options import (
    CASCADE,
    COLUMNS,
    ENCODING,
    EVALSET,
    LABEL_COLUMN,
    LABEL_MAP,
    LIMIT,
    OVERWRITE,
    SHOWN_TEXTS,
    SPLIT,
    TEXT_COLUMN,
)
from cascade_lab.cli.printing import cell, line, next_step, number, show, table
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    import pandas as pd


def verify_precision(
    cascade: CASCADE,
    evalset: EVALSET,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure how far float32 moves each stage's decisions from bfloat16's, and write the cascade with "
            "mixed precision.",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="The cascade.toml to write with --calibrate.", show_default=False)
    ] = None,
    overwrite: OVERWRITE = False,
    split: SPLIT = None,
    encoding: ENCODING = None,
    text_column: TEXT_COLUMN = "text",
    label_column: LABEL_COLUMN = "label",
    label_map: LABEL_MAP = None,
    columns: COLUMNS = None,
    limit: LIMIT = None,
    texts: SHOWN_TEXTS = 10,
) -> None:
    """Compare a cascade in its own precision with float32; a cascade in float32 is compared in bfloat16.

    A cascade with mixed precision is compared by its answers. --calibrate writes such a cascade: it measures the stages
    whose precision is mixed; if there are none, all stages become mixed. EVALSET is then a validation set, with texts
    like those that will be scored.

    Example: cascade-lab verify-precision cascade.toml data_full.json --split test
    """
    from cascade_lab.atomic import locked_file
    from cascade_lab.spec import CascadeSpec

    if calibrate != (output is not None):
        given, missing = ("--calibrate", "--output") if calibrate else ("--output", "--calibrate")
        raise CascadeLabError(f"{given} is given without {missing}; give both, or neither")
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
    with spinner("loading TensorFlow"):
        from cascade_lab import precision_check
    options: dict[str, Any] = {"progress": shows_progress(), "quiet": spinner}
    if output is not None:
        with locked_file(output, overwrite=overwrite, what="cascade with mixed precision"):
            measured = precision_check.measure_bounds(spec, examples, **options)
            measured.spec.write(output)
        _print_bounds(measured)
        line(f"cascade: {output}")
        next_step("verify-precision", output, "EVALSET")
    elif any(stage.precision == "mixed" for stage in spec.stages):
        mixed = precision_check.verify_mixed(spec, examples, **options)
        stages = table("stage", "precision", "texts", "scored again", "of its texts")
        for name, row in mixed.stages.iterrows():
            share = number(row["n_rescored"] / row["n_scored"] if row["n_scored"] else None, ".1%")
            stages.add_row(str(name), row["precision"], f"{row['n_scored']:,}", f"{row['n_rescored']:,}", share)
        show(stages)
        _print_changed(mixed.changed, mixed.n_examples, texts)
        line(
            f"with confidence {precision_check.LEVEL:.0%}, at most {rounded_up(mixed.limit)} of texts like these get "
            "another answer"
        )
        next_step("run", cascade, evalset, "--output", "RUN")
    else:
        check = precision_check.verify_precision(spec, examples, **options)
        stages = table("stage", "precision", "logits: rms", "p99", "largest", "answers changed")
        for name, row in check.stages.iterrows():
            differences = [number(row[key]) for key in ("rms", "p99", "max")]
            stages.add_row(str(name), row["precision"], *differences, f"{row['n_changed']:,}")
        show(stages)
        _print_changed(check.changed, check.n_examples, texts)
        next_step("latency", cascade, evalset)


def _print_changed(changed: pd.DataFrame, n_examples: int, n_shown: int) -> None:
    line(f"{len(changed):,} of {n_examples:,} texts get another answer than in float32")
    if len(changed) and n_shown:
        shown = table("text", "true label", "float32", "lower precision")
        for row in changed.head(n_shown).itertuples():
            shown.add_row(cell(row.text), cell(row.label), cell(row.float32), cell(row.lower))
        show(shown)


def rounded_up(share: float) -> str:
    """Return an upper limit of a share in percent, rounded up to two digits.

    >>> rounded_up(0.002029), rounded_up(0.00005), rounded_up(1.0)
    ('0.21%', '0.005%', '100%')
    """
    if not 0 < share < 1:
        return f"{share:.0%}"
    step = 10.0 ** (math.floor(math.log10(100 * share)) - 1)
    return f"{math.ceil(round(100 * share / step, 6)) * step:.2g}%"


def _print_bounds(measured: Any) -> None:
    from cascade_lab.precision_check import LEVEL

    stages = table("stage", "bound: labels", "confidence", "scored again")
    for name, row in measured.stages.iterrows():
        stages.add_row(str(name), number(row["labels"]), number(row["confidence"]), number(row["rescored"], ".1%"))
    show(stages)
    line(
        "labels: how much the difference of two labels' logits changes between bfloat16 and float32; confidence: how "
        "much its log-odds change; each is the largest change on these texts"
    )
    line(
        f"with confidence {LEVEL:.0%}, fewer than {rounded_up(measured.outside_probability)} of texts like these "
        f"{measured.n_texts:,} are outside the bounds; only those can get another answer than in float32"
    )
