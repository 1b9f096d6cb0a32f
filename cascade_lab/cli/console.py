"""Shows errors as one line, hides what TensorFlow prints, and decides whether to show progress."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from typer.core import TyperGroup

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.text import printable


class Group(TyperGroup):
    """A group of commands that shows an error of the user as one line on stderr, with exit code 2.

    SIGINT and SIGTERM end a command like an exception, so that it removes what it has not finished: one line, and exit
    code 130 or 143. A character that the output's encoding lacks is printed as "?".
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _raised_sigterm():
                return super().invoke(ctx)
        except CascadeLabError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(2) from error
        except (KeyboardInterrupt, _Terminated) as stop:
            number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
            typer.echo(f"error: stopped by {number.name}", err=True)
            raise typer.Exit(128 + number) from stop


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _raised_sigterm() -> Iterator[None]:
    """Make SIGTERM raise `_Terminated`, unless somebody handles it already."""

    def terminate(*_: object) -> None:
        raise _Terminated

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def quiet_tensorflow(activity: str) -> Iterator[None]:
    """Show `activity` on stderr while TensorFlow loads, and hide what TensorFlow itself prints there.

    TensorFlow prints to file descriptor 2 before it reads any setting that would silence it. So the descriptor itself
    is redirected. Later on, its log shows errors only.
    """
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # its warnings are about functions that it deprecates
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr_copy = os.dup(2)
    with open(stderr_copy, "w", encoding="utf-8") as screen, open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            # Without the two options, rich replaces sys.stderr meanwhile; TensorFlow's log would keep that stream, and
            # write to it after it is closed.
            with Live(
                Spinner("dots", activity, style="status.spinner"),
                console=Console(file=screen),
                refresh_per_second=12.5,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            ):
                yield
        finally:
            os.dup2(stderr_copy, 2)


def shows_progress() -> bool:
    """Return whether stderr is a terminal, where a progress bar can be seen."""
    return sys.stderr.isatty()
