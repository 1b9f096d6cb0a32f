"""`cascade-lab verify-precision`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cascade_lab.cli.console import figure, line, printable, table, tensorflow


def verify_precision(
    cascade: Annotated[Path, typer.Argument(metavar="CASCADE", help="A cascade.toml.", show_default=False)],
    evalset: Annotated[
        Path, typer.Argument(metavar="EVALSET", help="Texts, as `cascade-lab run` takes them.", show_default=False)
    ],
    split: Annotated[
        str | None, typer.Option(help="Take only this split (of CLINC150's json, or of a column 'split').")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take only so many texts, evenly spaced through the set.")
    ] = None,
    texts: Annotated[int, typer.Option(min=0, help="How many changed answers to show.")] = 10,
) -> None:
    """Say what a cascade's precision, or bfloat16 where it has float32, changes against float32.

    Example: cascade-lab verify-precision cascade.toml data_full.json --split test
    """
    from cascade_lab.evalset import EvalSet
    from cascade_lab.serial import check_labels
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    examples = EvalSet.read(evalset, split=split)
    check_labels(spec, examples.examples, examples.locations)
    examples = examples if limit is None else examples.limit(limit)
    with tensorflow("loading TensorFlow"):
        from cascade_lab.precision import verify_precision as verify
    found = verify(spec, examples, progress=sys.stderr.isatty(), quiet=tensorflow)
    stages = table("stage", "precision", "logits: rms", "p99", "largest", "answers changed")
    for name, row in found.stages.iterrows():
        differences = [figure(row[key], 4) for key in ("rms", "p99", "max")]
        stages.add_row(str(name), row["precision"], *differences, f"{row['n_changed']:,}")
    console = Console()
    console.print(stages)
    line(f"the cascade answers {len(found.changed):,} of {found.n_examples:,} texts otherwise than in float32")
    if len(found.changed) and texts:
        shown = table("text", "gold", "float32", "lower precision")
        for row in found.changed.head(texts).itertuples():
            shown.add_row(*(Text(printable(value)) for value in (row.text, row.label, row.float32, row.lower)))
        console.print(shown)
