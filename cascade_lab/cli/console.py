"""Shows errors as one line, hides what TensorFlow prints, and decides whether to show progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.text import printable


class Group(TyperGroup):
    """A group of commands that shows an error of the user as one line on stderr, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CascadeLabError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(2) from error


@contextmanager
def quiet_tensorflow(activity: str) -> Iterator[None]:
    """Show `activity` on stderr while TensorFlow loads, and hide what TensorFlow itself prints there.

    TensorFlow prints to file descriptor 2 before it reads any setting that would silence it. So the descriptor itself
    is redirected.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr_copy = os.dup(2)
    with open(stderr_copy, "w", encoding="utf-8") as screen, open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            with Console(file=screen).status(activity):
                yield
        finally:
            os.dup2(stderr_copy, 2)


def shows_progress() -> bool:
    """Return whether stderr is a terminal, where a progress bar can be seen."""
    return sys.stderr.isatty()
