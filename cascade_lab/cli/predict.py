"""`cascade-lab predict` predicts labels of texts that have none."""

from __future__ import annotations

import codecs
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.actions import load_cascade
from cascade_lab.cli.console import shows_progress
from cascade_lab.cli.options import AS_JSON, BATCH_SIZE, CASCADE
from cascade_lab.cli.printing import cell, next_step, number, print_json, show, table
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    import pandas as pd

    from cascade_lab.spec import CascadeSpec

PROGRESS_FROM = 500  # texts; fewer take so little time that a progress bar would only flicker


def predict(
    cascade: CASCADE,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...", help="Texts, or - to read one text per line from standard input.", show_default=False
        ),
    ],
    as_json: AS_JSON = False,
    batch_size: BATCH_SIZE = None,
) -> None:
    """Predict labels of texts that have none.

    Example: cascade-lab predict cascade.toml - --json < texts.txt > predictions.jsonl
    """
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    if texts == ["-"]:
        texts = _read_lines(sys.stdin.buffer.read())
    with load_cascade(spec) as loaded:
        progress = len(texts) > PROGRESS_FROM and shows_progress()
        predictions = loaded.predict(texts, batch_size=batch_size, progress=progress)
    if as_json:
        for row in predictions.to_dict("records"):
            print_json(row)
    else:
        _print_table(predictions, spec)
        if texts:
            next_step("attribute", cascade, texts[0])


def _print_table(predictions: pd.DataFrame, spec: CascadeSpec) -> None:
    probabilities = [f"p({stage.pass_label or stage.name})" for stage in spec.stages]
    with_rejector = any(stage.rejector is not None for stage in spec.stages)
    shown = table("text", "predicted", "decided by", *probabilities, *(["confidence"] if with_rejector else []))
    for row in predictions.to_dict("records"):
        p = [number(row[f"{stage.name}_probability"], ".3f") for stage in spec.stages]
        p += [number(row["confidence"], ".3f")] if with_rejector else []
        shown.add_row(cell(row["text"]), cell(row["predicted"]), row["decided_by"], *p)
    show(shown)


def _read_lines(content: bytes) -> list[str]:
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    texts = []
    for line_number, text in enumerate(lines, 1):
        try:
            texts.append(text.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise CascadeLabError(
                f"standard input line {line_number}: byte {error.start} is not UTF-8; send UTF-8"
            ) from error
    return texts
