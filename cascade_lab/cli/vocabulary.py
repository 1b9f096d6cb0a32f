"""`cascade-lab vocabulary` builds a WordPiece vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.options import (
    COLUMNS,
    DO_LOWER_CASE,
    ENCODING,
    OVERWRITE,
    SPLIT,
    TEXT_COLUMN,
    TRAINING_SET,
    read_columns,
)
from cascade_lab.cli.printing import line, next_step


def vocabulary(
    train: TRAINING_SET,
    output: Annotated[Path, typer.Option(help="The vocab.txt to write.", show_default=False)],
    size: Annotated[int, typer.Option(min=100, help="The most tokens.")] = 8000,
    split: SPLIT = None,
    encoding: ENCODING = None,
    text_column: TEXT_COLUMN = "text",
    columns: COLUMNS = None,
    do_lower_case: DO_LOWER_CASE = True,
    overwrite: OVERWRITE = False,
) -> None:
    """Build a WordPiece vocabulary from the texts in a file.

    Example: cascade-lab vocabulary --train train.tsv --size 4000 --output vocab.txt
    """
    from cascade_lab.atomic import locked_file, write_text
    from cascade_lab.bert.vocabulary import train_vocabulary
    from cascade_lab.evalset import EvalSet

    with locked_file(output, overwrite=overwrite, what="vocabulary"):
        named = read_columns(columns)
        texts = EvalSet.read(
            train, split=split, unlabelled=True, text_column=text_column, columns=named, encoding=encoding
        ).texts
        tokens = train_vocabulary(texts, size=size, do_lower_case=do_lower_case)
        write_text(output, "".join(f"{token}\n" for token in tokens))
    line(f"{output}: {len(tokens):,} tokens from {len(texts):,} texts")
    flags = ("--bert-config-file", "CONFIG", "--vocab-file", output, "--train", train, "--eval", "EVALSET")
    next_step("finetune", "--init", "random", *flags, "--output", "DIRECTORY")
