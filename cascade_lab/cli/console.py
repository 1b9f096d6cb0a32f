"""What the commands share: how errors look, how TensorFlow is kept quiet, tables and numbers."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from cascade_lab.errors import CascadeLabError


class Group(TyperGroup):
    """Shows an error that a person can mend as one line, exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CascadeLabError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo("error: " + str(error).replace("\n", " "), err=True)
            raise typer.Exit(2) from error


@contextmanager
def tensorflow(doing: str) -> Iterator[None]:
    """Say what goes on while TensorFlow loads, and keep its start-up chatter off the screen.

    It writes that to file descriptor 2 itself, before it reads any setting of how much to write.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with open(kept, "w", encoding="utf-8") as screen, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            with Console(file=screen).status(doing):
                yield
        finally:
            os.dup2(kept, 2)


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(
            Text(column),
            justify="left" if i == 0 else "right",
            no_wrap=column not in ("text", "variable", "scheme"),
            overflow="fold",
        )
    return made


def figure(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def printable(text: str) -> str:
    """Keep a text on one line of a terminal, its control characters harmless."""
    shown = "".join(char if char.isprintable() else "�" for char in text.replace("\n", " "))
    return shown if len(shown) <= 200 else shown[:199] + "…"


def line(text: str) -> None:
    """Print one line as it is, however long, so that it can be copied."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)
