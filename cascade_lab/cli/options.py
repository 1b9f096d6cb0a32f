"""Defines the arguments and options that several commands have, and reads their values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cascade_lab.exceptions import CascadeLabError, GoalError

CASCADE = Annotated[Path, typer.Argument(metavar="CASCADE", help="A cascade.toml.", show_default=False)]
EVALSET = Annotated[
    Path,
    typer.Argument(
        metavar="EVALSET",
        help="Labelled texts: tsv, csv, jsonl or parquet with columns text and label (optional: text_b, example_id, "
        "STAGE_label, any others), or CLINC150's json.",
        show_default=False,
    ),
]
RUN = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]

SPLIT = Annotated[
    str | None, typer.Option(help="Use only this split (of CLINC150's json, or of a column named split).")
]
ENCODING = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The encoding of a text file, such as cp1252 [default: UTF-8, or its byte-order mark's]."
    ),
]
TEXT_COLUMN = Annotated[str, typer.Option(metavar="NAME", help="The column of the texts.")]
LABEL_COLUMN = Annotated[str, typer.Option(metavar="NAME", help="The column of the labels.")]
LABEL_MAP = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A csv with the columns from and to: labels of the set, labels of the cascade."),
]
COLUMNS = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="The columns of a csv or tsv without a header, such as text,label."),
]
LIMIT = Annotated[int | None, typer.Option(min=1, help="Use at most this number of texts, evenly spaced over the set.")]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object per line instead of a table.")]
BATCH_SIZE = Annotated[
    int | None, typer.Option(min=1, help="The most texts in one batch of a stage [default: the fastest].")
]
STAGES = Annotated[
    list[str] | None, typer.Option("--stage", metavar="STAGE", help="Only this stage. Can be given several times.")
]
AT_LEAST = Annotated[
    list[str] | None, typer.Option(metavar="METRIC=VALUE", help="A lower bound, such as in_scope_accuracy=0.95.")
]
COST = Annotated[
    list[str] | None,
    typer.Option(metavar="OUTCOME=COST", help='What an outcome costs, such as "false accept=5".'),
]
SHOWN_TEXTS = Annotated[int, typer.Option("--texts", min=0, help="How many changed texts to show, of each kind.")]
DO_LOWER_CASE = Annotated[bool, typer.Option(help="Convert texts to lower case, for uncased models.")]
TRAINING_SET = Annotated[
    Path, typer.Option("--train", help="Labelled texts, in a format that `run` reads.", show_default=False)
]
PARAMETERS = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        "-p",
        metavar="NAME=VALUE",
        help="Another parameter of the notebook: a number, a text, a run. Can be given several times.",
    ),
]

NEW_RUN = Annotated[Path | None, typer.Option("--output", help="The run directory to write [default: runs/NAME-TIME].")]
NEW_CASCADE = Annotated[Path, typer.Option("--output", help="The cascade.toml to write.", show_default=False)]
NEW_DIRECTORY = Annotated[Path, typer.Option("--output", help="The directory to write.", show_default=False)]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")]


def read_pair(pair: str, form: str) -> tuple[str, str]:
    """Split NAME=VALUE at the first "="; `form` is how the option is written, for the message."""
    name, equals, value = pair.partition("=")
    if not equals or not name.strip():
        raise CascadeLabError(f"'{pair}' is not {form}; write a name, an equals sign and a value")
    return name.strip(), value


def read_columns(names: str | None) -> list[str] | None:
    """Read the names of columns.

    >>> read_columns("text, label")
    ['text', 'label']
    """
    columns = None if names is None else [name.strip() for name in names.split(",")]
    if columns is not None and "" in columns:
        raise CascadeLabError(f"--columns '{names}': a name is empty; name all columns, like text,label")
    return columns


def read_labels(labels: str) -> list[str]:
    """Read labels from a list with commas, or from a file with one label per line."""
    if "," in labels:
        return labels.split(",")
    try:
        return Path(labels).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CascadeLabError(
            f"{labels}: cannot be read ({reason}); give a file with one label per line, or a,b,c"
        ) from error


def read_numbers(pairs: Sequence[str] | None) -> dict[str, float]:
    """Read NAME=NUMBER, once per name.

    >>> read_numbers(["in_scope_accuracy=0.95", "false accept = 5"])
    {'in_scope_accuracy': 0.95, 'false accept': 5.0}
    """
    numbers = {}
    for pair in pairs or ():
        name, _, value = pair.rpartition("=")
        try:
            numbers[name.strip()] = float(value)
        except ValueError as error:
            raise GoalError(f"'{pair}' is not NAME=NUMBER; write it like accuracy=0.95") from error
        if not math.isfinite(numbers[name.strip()]):
            raise GoalError(f"'{pair}': the number must be finite; write it like accuracy=0.95")
    return numbers


def read_parameters(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE; a value that is JSON is read as JSON, any other is a text.

    >>> read_parameters(["factor=2", "title=two words"])
    {'factor': 2, 'title': 'two words'}
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        name, value = read_pair(pair, "NAME=VALUE")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values
