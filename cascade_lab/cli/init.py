"""`cascade-lab init` drafts a cascade.toml from two checkpoints and an eval set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.actions import read_evalset
from cascade_lab.cli.console import spinner
from cascade_lab.cli.options import (
    COLUMNS,
    ENCODING,
    EVALSET,
    LABEL_MAP,
    NEW_CASCADE,
    OVERWRITE,
    SPLIT,
    read_columns,
    read_labels,
)
from cascade_lab.cli.printing import line, next_step
from cascade_lab.exceptions import SpecError


def init(
    gate: Annotated[
        Path,
        typer.Argument(
            metavar="GATE",
            help="The gate: a TensorFlow 1 checkpoint (directory or prefix), or a Hugging Face directory.",
            show_default=False,
        ),
    ],
    intent: Annotated[
        Path, typer.Argument(metavar="INTENT", help="The classifier after it, likewise.", show_default=False)
    ],
    evalset: EVALSET,
    output: NEW_CASCADE,
    split: SPLIT = None,
    encoding: ENCODING = None,
    text_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of the texts [default: text, or a guess].")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of the labels [default: label, or a guess].")
    ] = None,
    label_map: LABEL_MAP = None,
    columns: COLUMNS = None,
    gate_labels: Annotated[
        str | None,
        typer.Option(metavar="LABELS", help="The gate's labels, in the order of its head: a,b, or a file."),
    ] = None,
    intent_labels: Annotated[
        str | None,
        typer.Option(metavar="LABELS", help="The classifier's labels, in the order of its head: a,b,c, or a file."),
    ] = None,
    pass_label: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The gate's label for texts that go on [default: a guess].")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="The most texts to score, to check the labels.")] = 500,
    overwrite: OVERWRITE = False,
) -> None:
    """Draft a commented cascade.toml from two checkpoints and an eval set, and say what was assumed.

    Hugging Face directories are converted first, beside the output. Labels, lengths and lower-casing come from the
    checkpoints and the texts. Some texts are scored, which shows whether the labels of the gate are swapped.

    Example: cascade-lab init downloads/gate downloads/intent test.csv --output cascade.toml
    """
    from cascade_lab.evalset import guess_columns

    if output.suffix != ".toml":
        raise SpecError(f"{output}: a cascade is a .toml file; give a name such as cascade.toml")
    named = {"text": text_column, "label": label_column}
    guessed = guess_columns(evalset, columns=read_columns(columns), encoding=encoding)
    used = {key: guessed[key] if name is None else name for key, name in named.items()}
    examples = read_evalset(
        evalset,
        None,
        split=split,
        encoding=encoding,
        text_column=used["text"],
        label_column=used["label"],
        label_map=label_map,
        columns=columns,
    )
    labels = {"gate_labels": gate_labels, "intent_labels": intent_labels}
    given = {key: None if value is None else read_labels(value) for key, value in labels.items()}
    with spinner("looking at the checkpoints"):
        from cascade_lab.draft import draft_cascade

        draft = draft_cascade(
            gate, intent, examples, output, **given, pass_label=pass_label, limit=limit, overwrite=overwrite
        )
    for path in draft.imported:
        line(f"converted: {path}")
    for key, name in used.items():
        if named[key] is None and name != key:
            line(f"assumed: the {key}s are in column '{name}'")
    for assumption in draft.assumptions:
        line(f"assumed: {assumption}")
    for check in draft.checks:
        line(f"checked: {check}")
    for warning in draft.warnings:
        line(f"warning: {warning}")
    line(f"cascade: {output}")
    flags = {"split": split, "encoding": encoding, "label-map": label_map, "columns": columns}
    flags |= {f"{key}-column": name for key, name in used.items() if name != key}
    words = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", value)]
    next_step("run", output, evalset, *words, "--output", "RUN")
